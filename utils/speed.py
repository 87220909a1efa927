"""Size and speed of a network: parameters, multiply-adds, latency; and what makes it fast."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.deployed import Deployed
from models.lednet import LEDNet


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


class InPrecision(nn.Module):
    """A network in another floating-point type, which takes and returns float32 (or labels)."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = copy.deepcopy(network).to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.network(images.to(self.dtype))
        return outputs.float() if outputs.is_floating_point() else outputs


class WithoutGradients(nn.Module):
    """A network in inference mode, without which compiled weights would not become constants."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def deploy(
    network: LEDNet,
    labels: bool = False,
    dtype: torch.dtype = torch.float32,
    compiled: bool = True,
) -> nn.Module:
    """A trained network ready to serve, on the device that it is on; see `models.deployed`.

    Args:
        network: stays as it is; later changes of its weights are not seen.
        labels: return the class of each pixel, N x H x W, uint8, in place of logits,
            N x C x H x W, float32.
        dtype: that it computes in, float16 or bfloat16 for half precision.
        compiled: by torch.compile, for each size and number of images by itself, in a minute at
            its first pass; on a CPU that takes a C++ compiler. On a GPU the passes become CUDA
            graphs: what one returns is overwritten by the next.
    """
    device = device_of(network)
    on_gpu = device.type == "cuda"
    served = Deployed(network, labels, products=not on_gpu)
    served.to(device, dtype, memory_format=torch.channels_last)
    if not compiled:
        return served
    return WithoutGradients(compiled_for(served, device))


def compiled_for(network: nn.Module, device: torch.device) -> nn.Module:
    """A network for inference by torch.compile, with what pays on the device."""
    # Sizes that vary in one graph would cost speed at every one of them.
    if device.type == "cuda":
        return torch.compile(network, mode="reduce-overhead", dynamic=False)
    return torch.compile(network, options={"freezing": True}, dynamic=False)


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes; the CPU, if it has no parameters of torch's."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def count_parameters(module: nn.Module) -> int:
    """Number of trainable values; running statistics of batch norm are not among them."""
    return sum(p.numel() for p in module.parameters())


def count_multiply_adds(model: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-adds of the convolutions for one image of `size` (height, width).

    torch.utils.flop_counter counts floating point operations, two for each multiply-add.
    """
    image = torch.empty(1, 3, *size, device=device_of(model))
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
    device = device_of(model)
    image = torch.rand(1, 3, *size, device=device).contiguous(memory_format=torch.channels_last)

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
