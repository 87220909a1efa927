"""CUDA graphs: the forward and the backward pass of a model, each started at once.

A step has thousands of kernels, and of a small batch, starting them takes longer than their work.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Graphed:
    """A model in training on a GPU, whose passes are recorded with a sample.

    Batches of its shape repeat what was recorded, and overwrite the outputs of the batch before;
    others, such as a smaller last one, run as without graphs. While this records, no other thread
    may use the GPU or pin memory, and the cache of autocast must be off.

    Args:
        model: takes one tensor, is in training, and must not have hooks.
        sample: images, N x 3 x H x W, on the device of the model; their values do not matter. Their
            memory is used from then on.
    """

    def __init__(self, model: nn.Module, sample: Tensor) -> None:
        self.model, self.shape = model, sample.shape
        with unchanged(model, sample.device):
            graphed = torch.cuda.make_graphed_callables(model, (sample,))
        # Recording replaces the model's `forward`. Taken out again: other calls need the first one,
        # and the memory of the graphs must not be kept as long as the model.
        self.replay = vars(graphed).pop("forward")

    def __call__(self, images: Tensor) -> Any:
        """Return the outputs of the model for images, N x 3 x H x W, on its device."""
        return (self.replay if images.shape == self.shape else self.model)(images)


@contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back what passes in training change: running statistics, and the random state."""
    before = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)  # in its place, which the graphs write to
