"""Size and speed of a network: parameters, multiply-adds, latency."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Latency:
    """Time of single forward passes.

    Attributes:
        median_ms, p95_ms: milliseconds from an input on the device to logits on the device.
        fps: images per second at the median.
        passes: how many were measured.
    """

    median_ms: float
    p95_ms: float
    fps: float
    passes: int


def count_parameters(module: nn.Module) -> int:
    """Number of trainable values; running statistics of batch norm are not among them."""
    return sum(p.numel() for p in module.parameters())


def count_multiply_adds(model: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-adds of the convolutions for one image of `size` (height, width).

    torch.utils.flop_counter counts floating point operations, two for each multiply-add.
    """
    image = torch.empty(1, 3, *size, device=next(model.parameters()).device)
    training = model.training
    model.eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(image)
    model.train(training)
    return counter.get_total_flops() // 2


@torch.inference_mode()
def measure_latency(
    model: nn.Module, size: tuple[int, int], passes: int = 50, warmup: int = 10, seconds: float = 10
) -> Latency:
    """Time forward passes of one image, each until the device has finished it.

    Args:
        size: height and width of the image.
        passes: how many to time, fewer (but at least 5) where they would take over `seconds`.
        warmup: passes before the first that is timed, cut short in the same way.
    """
    model.eval()
    device = next(model.parameters()).device
    image = torch.rand(1, 3, *size, device=device)

    def timed_pass() -> float:
        _synchronize(device)
        started = time.perf_counter()
        model(image)
        _synchronize(device)
        return time.perf_counter() - started

    _repeat(timed_pass, warmup, seconds / 5)
    times = _repeat(timed_pass, passes, seconds)
    median, p95 = np.percentile(times, [50, 95]).tolist()
    return Latency(1e3 * median, 1e3 * p95, 1 / median, len(times))


def _repeat(timed_pass: Callable[[], float], passes: int, seconds: float) -> list[float]:
    times: list[float] = []
    while len(times) < passes and (len(times) < 5 or sum(times) < seconds):
        times.append(timed_pass())
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
