"""CUDA graphs: the forward and the backward pass of a model, each started at once.

A step has thousands of kernels, and of a small batch, starting them takes longer than their work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Graphed:
    """A model in training on a GPU, whose passes are recorded with the first full batch.

    Full batches of the same shape repeat what was recorded, and overwrite the outputs of the batch
    before; other batches, such as a smaller last one, run as without graphs. Under autocast, its
    cache must be off.

    Args:
        model: takes one tensor, and must not have hooks.
        batch_size: images of a full batch.
        record: torch.cuda.make_graphed_callables, or a function that does the same.
    """

    def __init__(
        self, model: nn.Module, batch_size: int,
        record: Callable[..., nn.Module] = torch.cuda.make_graphed_callables,
    ) -> None:  # fmt: skip
        self.model, self.batch_size, self.record = model, batch_size, record
        self.shape: torch.Size | None = None  # of the images that were recorded
        self.replay: Callable[[Tensor], Any] = model

    def __call__(self, images: Tensor) -> Any:
        """Return the outputs of the model for images, N x 3 x H x W, on its device."""
        if self.shape is None and len(images) == self.batch_size:
            with unchanged(self.model, images.device):
                graphed = self.record(self.model, (images.clone(),))
            # Recording replaces the model's `forward`. Taken out again: other calls need the first
            # one, and a cycle of the two would keep the memory of the graphs when training ends.
            self.shape, self.replay = images.shape, vars(graphed).pop("forward")
        return (self.replay if images.shape == self.shape else self.model)(images)


@contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back what passes in training change: running statistics, and the random state."""
    before = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)  # in its place, which the graphs write to
