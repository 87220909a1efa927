"""One epoch of training, and one pass of evaluation."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import distributed
from utils.errors import UserError
from utils.interrupts import Watch
from utils.losses import IGNORE_INDEX
from utils.metrics import ConfusionMatrix, TopKAccuracy
from utils.speed import device_of
from utils.training import Training

SECONDS_BETWEEN_UPDATES = 0.5

Batch = TypeVar("Batch")


def train_one_epoch(
    training: Training,
    forward: nn.Module,
    loader: DataLoader,
    prepare: Callable[..., tuple[Tensor, Tensor]],
    loss_function: Callable[[Any, Tensor], Tensor],
    watch: Watch,
    title: str,
    steps_loss: int,
    count: Callable[[Any, Tensor], None] | None = None,
    figures: Callable[[], dict[str, str]] | None = None,
    size_option: str = "--height",
) -> dict[str, float]:
    """Train on every batch once, from the step on that `training` has come to.

    Args:
        forward: the model of `training`, or what runs it: compiled, in parallel.
        loader: batches whose last two values are, of each item, its index and the reason why it
            stands in for a broken one, or "".
        prepare: makes of the other values images and labels on the model's device.
        loss_function: of what the model returns and the labels, a scalar.
        watch: is asked between the steps whether to save, and whether to stop.
        title: of the progress bar.
        steps_loss: steps between lines of progress where there is no terminal for a bar; 0: none.
        count: is called with what the model returned and the labels of each batch.
        figures: what the progress shows beside the loss.
        size_option: what makes images smaller, for where they do not fit into memory.

    Returns:
        "images_per_second", of all processes; and "data_wait", the share of the time that the
        device had nothing to do but to wait for data. What was summed up lies in
        `training.totals`: "loss" over "images", "skipped_steps" of the scaler, images "left_out",
        and what `count` adds to.
    """
    training.model.train()
    device, totals, scaler = training.device, training.totals, training.scaler
    amp_dtype = training.amp_dtype
    waiting = Waiting(device)
    seen, steps, begun, started = 0, 0, training.step, time.perf_counter()
    updated = started
    one = torch.ones((), device=device)

    def shown() -> dict[str, str]:
        loss = {"loss": f"{(totals['loss'] / totals['images']).item():.4f}"}  # waits for the GPU
        more = figures() if figures is not None else {}
        for name in ("skipped_steps", "left_out"):
            if totals[name]:
                more[name.replace("_", " ")] = str(totals[name].item())
        share = waiting.seconds() / (time.perf_counter() - started)
        return loss | more | {"waiting for data": f"{100 * share:.0f} %"}

    batches = waiting.through(loader)
    with _progress_bar(title, len(loader.dataset)) as bar:
        bar.update(begun * training.batch_size * distributed.processes())
        while True:
            batch, failure = None, None
            if not watch.stopping:
                try:
                    batch = next(batches, None)
                except Exception as error:
                    failure = error
            watch.look_up(failure)
            if batch is None:
                break
            *inputs, indices, reasons = batch
            for reason in filter(None, reasons):
                bar.write(f"left out: {reason}", file=sys.stderr)
                totals["left_out"] += len(reason.splitlines())
            more = f"; --batch-size may change with --resume; {watch.kept}"
            with told_memory(inputs[0], size_option, more):
                images, labels = prepare(*inputs)
                with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                    outputs = forward(images)
                loss = loss_function(outputs, labels)
                training.optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                before = scaler.scale(one)
                scaler.step(training.optimizer)
                scaler.update()
                if scaler.is_enabled() and distributed.is_first():
                    # It falls where gradients were not finite, and the step was left out: in all
                    # processes at once, so that one is to count.
                    totals["skipped_steps"] += scaler.scale(one) < before
                training.scheduler.step()
                if training.ema:
                    training.ema.update_parameters(training.network)
                training.step += 1
                watch.note_loss(loss, indices)

                # Each process's loss is its share of the batch's, of which their mean is the whole.
                totals["loss"] += loss.detach() * len(images)
                totals["images"] += len(images)
                if count is not None:
                    count(outputs, labels)
            together = len(images) * distributed.processes()
            seen, steps = seen + together, steps + 1
            bar.update(together)
            now = time.perf_counter()
            if bar.disable and steps_loss and training.step % steps_loss == 0:
                left = (training.steps - training.step) * (now - started) / steps
                print(
                    f"{title}: step {training.step}/{training.steps}, "
                    + ", ".join(f"{name} {value}" for name, value in shown().items())
                    + f", {seen / (now - started):.1f} images/s, {left:.0f} s left",
                    flush=True,
                )
            elif not bar.disable and now - updated > SECONDS_BETWEEN_UPDATES:
                bar.set_postfix(shown())
                updated = now
    watch.check()  # before anything is scored or kept
    seconds = time.perf_counter() - started
    return {
        "images_per_second": seen / seconds,
        "data_wait": min(1.0, waiting.seconds() / seconds),
    }


@contextmanager
def told_memory(
    images: Sequence[Tensor], size_option: str = "--height", more: str = ""
) -> Iterator[None]:
    """Have a GPU that runs out of memory told with what it was given, and what to lower.

    Args:
        images: of one batch as it was loaded, each 3 x H x W.
        size_option: what makes images smaller.
        more: to end the message.

    Raises:
        UserError: instead of torch.OutOfMemoryError, or what CUDA's libraries have for it.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise
        height, width = images[0].shape[-2:]
        raise UserError(
            f"the GPU ran out of memory with a batch of {len(images)} images of {width}x{height}: "
            f"give a smaller --batch-size or {size_option}{more}"
        ) from error


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
        # The loader would raise an error about a worker that died at any moment, in the middle of
        # a step too. It notices when it waits for the worker's next batch as well: that will do.
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
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
    watch: Watch | None = None,
    left_out: list[str] | None = None,
) -> tuple[float, ConfusionMatrix]:
    """Score a network at the labels' own resolution: its logits are upsampled, then argmax.

    Of several processes, each scores the images of its loader, and gets the scores of all images.

    Args:
        loader: batches of images, a list of 3 x h x w, and of labels, H x W, integers; each of
            any size.
        prepare: makes of images of one size, N x 3 x h x w, what the model takes.
        title: of the progress bar.
        class_weights: of the cross entropy, one weight a class; None: it is not computed.
        on_image: is called for each image, in order, with the image as it was loaded, its
            predicted classes and its label (H x W, uint8 both).
        watch: is asked whether to stop, and told of errors.
        left_out: where it is given, the loader yields batches in pairs with the reasons why items
            are missing from each, None for one that is empty; the reasons are added to it.

    Returns:
        The weighted cross entropy over all labelled pixels, NaN where it was not asked for, and
        the confusion matrix.
    """
    model.eval()
    device = device_of(model)
    confusion = ConfusionMatrix(num_classes, device)
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    with _progress_bar(title, len(loader.dataset)) as bar:
        for images, labels in _until_stopped(loader, watch, bar, left_out):
            with told_memory(images):
                # One image at a time: a batch of 19 planes at full resolution need not fit.
                logits_of_each = _logits(model, images, prepare, device, amp_dtype)
                for image, logits, label in zip(images, logits_of_each, labels, strict=True):
                    label = label.to(device, non_blocking=True)
                    if class_weights is None:
                        prediction = label_map(logits[0], label.shape)
                    else:
                        logits = F.interpolate(
                            logits, label.shape, mode="bilinear", align_corners=True
                        )
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
    confusion.counts = distributed.total(confusion.counts)
    if class_weights is None:
        return math.nan, confusion
    total_loss = distributed.total(total_loss)
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
    watch: Watch | None = None,
    left_out: list[str] | None = None,
) -> dict[str, float]:
    """Score an image classifier; of several processes, each on the images of its loader.

    Args:
        loader: batches of images and labels, N, int64.
        prepare: makes of a batch of images what the model takes.
        title: of the progress bar.
        on_batch: is called with the images as they were loaded, their logits (N x C) and labels.
        watch: is asked whether to stop, and told of errors.
        left_out: where it is given, the loader yields batches in pairs with the reasons why items
            are missing from each, None for one that is empty; the reasons are added to it.

    Returns:
        "val_loss", the mean cross entropy; "val_top1" and "val_top5", shares in [0, 1].
    """
    model.eval()
    device = next(model.parameters()).device
    accuracy = TopKAccuracy(device=device)
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    with _progress_bar(title, len(loader.dataset)) as bar:
        for loaded, labels in _until_stopped(loader, watch, bar, left_out):
            labels = labels.to(device, non_blocking=True)
            with (
                told_memory(loaded, "--size"),
                torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None),
            ):
                logits = model(prepare(loaded)).float()
            total_loss += F.cross_entropy(logits, labels, reduction="sum")
            accuracy.update(logits, labels)
            if on_batch is not None:
                on_batch(loaded, logits, labels)
            bar.update(len(loaded))
    accuracy.counts = distributed.total(accuracy.counts)
    total_loss = distributed.total(total_loss)
    top1, top5 = accuracy.shares()
    return {
        "val_loss": (total_loss / accuracy.seen).item(),
        "val_top1": top1,
        "val_top5": top5,
    }


def _until_stopped(
    loader: DataLoader, watch: Watch | None, bar: tqdm, left_out: list[str] | None
) -> Iterator[Any]:
    """The batches of a loader; after them, or where they end too early, the watch is asked."""
    failure = None
    try:
        for batch in loader:
            if watch is not None and watch.stopping:
                break
            if left_out is not None:
                batch, reasons = batch
                left_out += reasons
                for reason in reasons:
                    bar.write(f"left out: {reason}", file=sys.stderr)
                    bar.update()
            if batch is not None:
                yield batch
        if left_out and len(left_out) == len(loader.dataset):
            raise UserError("none of the images to validate on can be read: is the disk gone?")
    except Exception as error:
        if watch is None:
            raise
        failure = error
    if watch is not None:
        watch.look_up(failure)


def _progress_bar(title: str, images: int) -> tqdm:
    """A bar that counts images, on a terminal only: a log would fill with control codes."""
    disable = None if distributed.is_first() else True
    return tqdm(total=images, desc=title, unit="img", leave=False, disable=disable)
