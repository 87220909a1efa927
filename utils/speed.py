"""Size and speed of a network: parameters, multiply-adds, latency."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Latency:
    """Time of single forward passes, from an input on the device to logits on the device."""

    median_ms: float
    p95_ms: float
    fps: float  # at the median
    passes: int  # number of passes that were timed


class InPrecision(nn.Module):
    """A copy of a network in another floating-point type; takes and returns float32 (or labels)."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = copy.deepcopy(network).to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.network(images.to(self.dtype))
        return outputs.float() if outputs.is_floating_point() else outputs


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model; the CPU for runtimes that hide their parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def count_parameters(module: nn.Module) -> int:
    """Count the trainable values; the running statistics of batch norm are not among them."""
    return sum(p.numel() for p in module.parameters())


def count_multiply_adds(model: nn.Module, size: tuple[int, int]) -> int:
    """Count the multiply-adds of the convolutions for one image of `size` (height, width)."""
    image = torch.empty(1, 3, *size, device=device_of(model))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2  # a multiply-add is two floating point operations


@contextmanager
def kernel_search(wanted: bool) -> Iterator[None]:
    """Let cuDNN search for its fastest kernels for each size of input that it has not met, or not.

    A search takes seconds, so it pays for sizes that come often.
    """
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@torch.inference_mode()
def time_pass(model: Callable[[Tensor], Any], images: Tensor) -> float:
    """Return the seconds of one forward pass, until the device is done."""
    synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None
    synchronize()
    started = time.perf_counter()
    model(images)
    synchronize()
    return time.perf_counter() - started


@torch.inference_mode()  # as in scoring: a compiler starts anew for tensors made outside of it
def measure_latency(
    model: nn.Module, size: tuple[int, int], passes: int = 50, warmup: int = 5, seconds: float = 10
) -> Latency:
    """Time forward passes of one image of `size` (height, width).

    Args:
        model: network, or a runtime with the same interface.
        passes: timed passes; fewer, but at least 5, if they would take more than `seconds`.
        warmup: passes before these.
    """
    image = torch.rand(1, 3, *size, device=device_of(model))
    image = image.contiguous(memory_format=torch.channels_last)
    for _ in range(warmup):
        time_pass(model, image)
    times: list[float] = []
    while len(times) < passes and (len(times) < 5 or sum(times) < seconds):
        times.append(time_pass(model, image))
    median, p95 = np.percentile(times, [50, 95]).tolist()
    return Latency(1e3 * median, 1e3 * p95, 1 / median, len(times))
