"""One epoch of training, and one pass of evaluation."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.losses import IGNORE_INDEX
from utils.metrics import ConfusionMatrix, TopKAccuracy
from utils.speed import device_of

SECONDS_BETWEEN_UPDATES = 0.5

Batch = TypeVar("Batch")


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    prepare: Callable[..., tuple[Tensor, Tensor]],
    loss_function: Callable[[Any, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    amp_dtype: torch.dtype | None,
    title: str,
    steps_loss: int,
    scheduler: LRScheduler | None = None,
    on_step: Callable[[], None] | None = None,
    on_batch: Callable[[Any, Tensor], None] | None = None,
    figures: Callable[[], dict[str, str]] | None = None,
) -> dict[str, float]:
    """Train on every batch once.

    Args:
        prepare: makes of what the loader gives images and labels on the model's device.
        loss_function: of what the model returns and the labels, a scalar.
        amp_dtype: of mixed precision, None for full precision.
        title: of the progress bar.
        steps_loss: steps between lines of progress where there is no terminal for a bar; 0: none.
        scheduler: steps with each batch.
        on_step: is called after each step, to average the weights.
        on_batch: is called with what the model returned and the labels of each batch.
        figures: what the progress shows beside the loss.

    Returns:
        "train_loss", the mean over images; "images_per_second"; and "data_wait", the share of
        the time that the device had nothing to do but to wait for data.
    """
    model.train()
    device = next(model.parameters()).device
    total_loss = torch.zeros((), device=device)  # stays there: reading it would wait for the GPU
    waiting = Waiting(device)
    seen, started = 0, time.perf_counter()
    updated = started

    def shown() -> dict[str, str]:
        loss = {"loss": f"{total_loss.item() / seen:.4f}"}  # waits for the GPU
        more = figures() if figures is not None else {}
        share = waiting.seconds() / (time.perf_counter() - started)
        return loss | more | {"waiting for data": f"{100 * share:.0f} %"}

    with _progress_bar(title, len(loader.dataset)) as bar:
        for step, batch in enumerate(waiting.through(loader), 1):
            images, labels = prepare(*batch)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                outputs = model(images)
            loss = loss_function(outputs, labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if scheduler is not None:
                scheduler.step()
            if on_step is not None:
                on_step()

            total_loss += loss.detach() * len(images)
            seen += len(images)
            if on_batch is not None:
                on_batch(outputs, labels)
            bar.update(len(images))
            now = time.perf_counter()
            if bar.disable and steps_loss and step % steps_loss == 0:
                left = (len(loader) - step) * (now - started) / step
                print(
                    f"{title}: step {step}/{len(loader)}, "
                    + ", ".join(f"{name} {value}" for name, value in shown().items())
                    + f", {seen / (now - started):.1f} images/s, {left:.0f} s left",
                    flush=True,
                )
            elif not bar.disable and now - updated > SECONDS_BETWEEN_UPDATES:
                bar.set_postfix(shown())
                updated = now
    mean_loss = total_loss.item() / seen  # waits for the GPU to finish
    seconds = time.perf_counter() - started
    return {
        "train_loss": mean_loss,
        "images_per_second": seen / seconds,
        "data_wait": min(1.0, waiting.seconds() / seconds),
    }


class Waiting:
    """The time that a device stands idle between batches, since the loader has none yet.

    A program runs ahead of its GPU: what it waits while the GPU still works costs nothing. So
    there the GPU's own clock tells, from the end of its last work to the next batch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = 0.0
        self.gaps: list[tuple] = []  # beginning and end of those that are not in the total yet

    def through(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, with the time until each one measured."""
        before, end = self._now(), object()
        iterator = iter(batches)  # which may start workers
        while (batch := next(iterator, end)) is not end:
            self.gaps.append((before, self._now()))
            yield batch
            before = self._now()

    def seconds(self) -> float:
        """All waiting so far; on a GPU, to be asked when it has finished its work."""
        if self.device.type == "cuda":
            self.total += sum(before.elapsed_time(after) for before, after in self.gaps) / 1000
        else:
            self.total += sum(after - before for before, after in self.gaps)
        self.gaps.clear()
        return self.total

    def _now(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    prepare: Callable[[Tensor], Tensor],
    num_classes: int,
    title: str,
    class_weights: Tensor | None = None,
    amp_dtype: torch.dtype | None = None,
    on_image: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> tuple[float, ConfusionMatrix]:
    """Score a network at the labels' own resolution: its logits are upsampled, then argmax.

    Args:
        loader: batches of images, a list of 3 x h x w, and of labels, H x W, integers; each of
            any size.
        prepare: makes of images of one size, N x 3 x h x w, what the model takes.
        title: of the progress bar.
        class_weights: of the cross entropy, one weight a class; None: it is not computed.
        on_image: is called for each image, in order, with the image as it was loaded, its
            predicted classes and its label (H x W, uint8 both).

    Returns:
        The weighted cross entropy over all labelled pixels, NaN where it was not asked for, and
        the confusion matrix.
    """
    model.eval()
    device = device_of(model)
    confusion = ConfusionMatrix(num_classes, device)
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    with _progress_bar(title, len(loader.dataset)) as bar:
        for images, labels in loader:
            # One image at a time: a batch of 19 planes at full resolution need not fit.
            logits_of_each = _logits(model, images, prepare, device, amp_dtype)
            for image, logits, label in zip(images, logits_of_each, labels, strict=True):
                label = label.to(device, non_blocking=True)
                if class_weights is None:
                    prediction = label_map(logits[0], label.shape)
                else:
                    logits = F.interpolate(logits, label.shape, mode="bilinear", align_corners=True)
                    prediction = largest(logits[0])
                    total_loss += F.cross_entropy(
                        logits,
                        label[None].long(),
                        class_weights,
                        ignore_index=IGNORE_INDEX,
                        reduction="sum",
                    )
                confusion.update(prediction, label.long())
                if on_image is not None:
                    on_image(image, prediction, label)
                bar.update()
    if class_weights is None:
        return math.nan, confusion
    weights = (confusion.counts.sum(1) * class_weights.double()).sum()
    return (total_loss / weights).item(), confusion


def _logits(
    model: nn.Module,
    images: list[Tensor],
    prepare: Callable[[Tensor], Tensor],
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> Iterator[Tensor]:
    """The logits of each image, 1 x C x h x w, float32; neighbours of one size run together."""
    for _, same_size in groupby(images, lambda image: image.shape):
        # One by one onto the device, each out of pinned memory.
        batch = prepare(torch.stack([image.to(device, non_blocking=True) for image in same_size]))
        with torch.autocast(batch.device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(batch)
        yield from logits.float().split(1)


def label_map(logits: Tensor, size: tuple[int, int], rows: int | None = None) -> Tensor:
    """The class of the largest logit of each pixel at another size, as `evaluate` finds it.

    Bilinear with align_corners=True, a band of rows at a time: all planes of a photo of 30
    megapixels would take gigabytes.

    Args:
        logits: C x h x w.
        size: height and width, H and W, of the result.
        rows: of a band; None: as many as a CPU's caches hold, or a GPU's kernels are worth.

    Returns:
        H x W, uint8, on the device of the logits.
    """
    _, height, _ = logits.shape
    if logits.shape[-2:] == size:
        return largest(logits)
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
        labels[first : first + rows] = largest(band[0])
    return labels


def largest(logits: Tensor) -> Tensor:
    """The class of the largest logit of each pixel, C x H x W to H x W, uint8."""
    if logits.device.type != "cpu" or logits.stride(0) == 1:
        return logits.argmax(0).to(torch.uint8)
    # Class after class: where they lie apart in memory, argmax takes several times as long.
    most, labels = logits[0].clone(), torch.zeros(logits.shape[1:], dtype=torch.uint8)
    for number, plane in enumerate(logits[1:], 1):
        labels.masked_fill_(plane > most, number)
        torch.maximum(most, plane, out=most)
    return labels


@torch.inference_mode()
def evaluate_classifier(
    model: nn.Module,
    loader: DataLoader,
    prepare: Callable[[Tensor], Tensor],
    title: str,
    amp_dtype: torch.dtype | None = None,
    on_batch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> dict[str, float]:
    """Score an image classifier.

    Args:
        loader: batches of images and labels, N, int64.
        prepare: makes of a batch of images what the model takes.
        title: of the progress bar.
        on_batch: is called with the images as they were loaded, their logits (N x C) and labels.

    Returns:
        "val_loss", the mean cross entropy; "val_top1" and "val_top5", shares in [0, 1].
    """
    model.eval()
    device = next(model.parameters()).device
    accuracy = TopKAccuracy(device=device)
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    with _progress_bar(title, len(loader.dataset)) as bar:
        for loaded, labels in loader:
            labels = labels.to(device, non_blocking=True)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model(prepare(loaded)).float()
            total_loss += F.cross_entropy(logits, labels, reduction="sum")
            accuracy.update(logits, labels)
            if on_batch is not None:
                on_batch(loaded, logits, labels)
            bar.update(len(loaded))
    top1, top5 = accuracy.shares()
    return {
        "val_loss": (total_loss / accuracy.seen).item(),
        "val_top1": top1,
        "val_top5": top5,
    }


def _progress_bar(title: str, images: int) -> tqdm:
    """A bar that counts images, on a terminal only: a log would fill with control codes."""
    return tqdm(total=images, desc=title, unit="img", leave=False, disable=None)
