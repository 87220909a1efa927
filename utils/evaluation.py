"""Scoring: one pass over validation images, for segmentation and for image classification."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets.images import IGNORE_INDEX
from datasets.loading import Batch
from models.lednet import upsample
from utils import distributed
from utils.errors import UserError
from utils.metrics import ConfusionMatrix, TopKAccuracy
from utils.progress import progress_bar
from utils.speed import device_of, kernel_search

Normalize = Callable[[Tensor], Tensor]


class OutOfMemory(UserError):
    """The GPU has too little memory for a batch."""


@contextmanager
def memory_errors(images: Sequence[Tensor], *notes: str) -> Iterator[None]:
    """Turn a CUDA out-of-memory error into OutOfMemory, with the batch's size."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise
        height, width = images[0].shape[-2:]
        batch = f"a batch of {len(images)} images of {width}x{height}"
        raise OutOfMemory("; ".join([f"the GPU ran out of memory with {batch}", *notes])) from error


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], normalize: Normalize, num_classes: int, title: str,
    total: int, class_weights: Tensor | None = None, amp_dtype: torch.dtype | None = None,
    on_image: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> tuple[float, ConfusionMatrix]:  # fmt: skip
    """Score a network at the labels' own resolution: upsample its logits, then take the argmax.

    Each of several processes scores its own batches, and returns the scores of all.

    Args:
        batches: images, 3 x h x w, and labels, H x W; each of any size.
        normalize: turns images of one size, N x 3 x h x w, uint8, into inputs of the model.
        title, total: title and number of images of the progress bar.
        class_weights: weight of each class in the cross entropy; None skips the loss.
        on_image: called with each image, its prediction and its label, both H x W, uint8.

    Returns:
        The weighted cross entropy over all labelled pixels, NaN without class weights, and the
        confusion matrix.
    """
    model.eval()
    device = device_of(model)
    confusion = ConfusionMatrix(num_classes, device)
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    first_shape: tuple[int, ...] | None = None
    with progress_bar(title, total) as bar:
        for batch in batches:
            first_shape = first_shape or (len(batch.images), *batch.images[0].shape)
            with memory_errors(batch.images):
                outputs = _logits(model, batch.images, normalize, device, amp_dtype, first_shape)
                # One at a time: the upsampled logits of a whole batch need not fit in memory.
                for image, logits, label in zip(batch.images, outputs, batch.labels, strict=True):
                    label = label.to(device, non_blocking=True)
                    truth = label.long()
                    if class_weights is None:
                        prediction = label_map(logits[0], label.shape)
                    else:
                        logits = upsample(logits, label)
                        prediction = argmax_classes(logits[0])
                        total_loss += F.cross_entropy(
                            logits, truth[None], class_weights,
                            ignore_index=IGNORE_INDEX, reduction="sum",
                        )  # fmt: skip
                    confusion.update(prediction, truth)
                    if on_image is not None:
                        on_image(image, prediction, label)
                    bar.update()
    confusion.counts = distributed.total(confusion.counts)
    if class_weights is None:
        return math.nan, confusion
    total_loss = distributed.total(total_loss)
    weights = (confusion.counts.sum(1) * class_weights.double()).sum()
    return (total_loss / weights).item(), confusion


def _logits(
    model: nn.Module, images: Sequence[Tensor], normalize: Normalize, device: torch.device,
    amp_dtype: torch.dtype | None, first_shape: tuple[int, ...],
) -> Iterator[Tensor]:  # fmt: skip
    """Yield logits, 1 x C x h x w, float32; images of one size in a row run together.

    Kernels are searched for the shape of the first batch, and not for others, such as that of a
    smaller last one.
    """
    for _, same_size in groupby(images, lambda image: image.shape):
        # Stacked on the device, since each image lies in pinned memory of its own.
        batch = normalize(torch.stack([image.to(device, non_blocking=True) for image in same_size]))
        with (
            kernel_search(batch.shape == first_shape),
            torch.autocast(batch.device.type, amp_dtype, enabled=amp_dtype is not None),
        ):
            logits = model(batch)
        yield from logits.float().split(1)


def label_map(logits: Tensor, size: tuple[int, int], rows: int | None = None) -> Tensor:
    """Upsample the logits of one image as `evaluate` does, and take the argmax.

    This is done in bands of `rows`, by default as many as suit a CPU's caches or a GPU's kernels:
    the whole upsampled logits of a 30-megapixel photo would take gigabytes.

    Args:
        logits: C x h x w.
        size: height H and width W of the result, which is uint8 on the device of the logits.
    """
    _, height, _ = logits.shape
    if logits.shape[-2:] == size:
        return argmax_classes(logits)
    if rows is None:
        rows = 64 if logits.device.type == "cpu" else 1024
    labels = torch.empty(size, dtype=torch.uint8, device=logits.device)
    places = torch.linspace(0, height - 1, size[0], device=logits.device)
    for first in range(0, size[0], rows):
        place = places[first : first + rows]
        above = place.floor().long()
        below = (above + 1).clamp(max=height - 1)
        band = torch.lerp(logits[:, above], logits[:, below], (place - above)[:, None])
        band = F.interpolate(band[None], (len(place), size[1]), mode="bilinear", align_corners=True)
        labels[first : first + rows] = argmax_classes(band[0])
    return labels


def argmax_classes(logits: Tensor) -> Tensor:
    """Return the class of the largest logit of each pixel: C x H x W to H x W, uint8."""
    if logits.device.type != "cpu" or logits.stride(0) == 1:
        return logits.argmax(0).to(torch.uint8)
    # On a CPU, argmax over a dimension of large stride is several times slower than this.
    most, labels = logits[0].clone(), torch.zeros(logits.shape[1:], dtype=torch.uint8)
    for number, plane in enumerate(logits[1:], 1):
        labels.masked_fill_(plane > most, number)
        torch.maximum(most, plane, out=most)
    return labels


@torch.inference_mode()
def evaluate_classifier(
    model: nn.Module, batches: Iterable[Batch], normalize: Normalize, title: str, total: int,
    amp_dtype: torch.dtype | None = None, on_batch: Callable[[Batch, Tensor], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Score an image classifier; unnamed arguments are those of `evaluate`.

    Args:
        batches: images, N x 3 x H x W, uint8, and class numbers, N, int64.
        on_batch: called with each batch and its logits, N x C.

    Returns:
        "val_loss", the mean cross entropy; "val_top1" and "val_top5" in [0, 1].
    """
    model.eval()
    device = device_of(model)
    accuracy = TopKAccuracy(device=device)
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    first_shape: tuple[int, ...] | None = None
    with progress_bar(title, total) as bar:
        for batch in batches:
            first_shape = first_shape or batch.images.shape
            labels = batch.labels.to(device, non_blocking=True)
            with (
                memory_errors(batch.images),
                kernel_search(batch.images.shape == first_shape),
                torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None),
            ):
                logits = model(normalize(batch.images)).float()
            total_loss += F.cross_entropy(logits, labels, reduction="sum")
            accuracy.update_from_logits(logits, labels)
            if on_batch is not None:
                on_batch(batch, logits)
            bar.update(len(labels))
    accuracy.counts = distributed.total(accuracy.counts)
    total_loss = distributed.total(total_loss)
    scores = {f"val_{name}": value for name, value in accuracy.summary().items()}
    return {"val_loss": (total_loss / accuracy.counts[-1]).item()} | scores
