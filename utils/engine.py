"""One epoch of training, and one pass of evaluation."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.losses import IGNORE_INDEX
from utils.metrics import ConfusionMatrix

SECONDS_BETWEEN_UPDATES = 0.5


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    scaler: torch.amp.GradScaler,
    amp_dtype: torch.dtype | None,
    title: str,
    steps_loss: int,
    confusion: ConfusionMatrix | None = None,
) -> dict[str, float]:
    """Train on every batch once; the schedule steps with each.

    Args:
        loss_function: of logits and labels, a scalar.
        amp_dtype: of mixed precision, None for full precision.
        title: of the progress bar.
        steps_loss: steps between lines of progress where there is no terminal for a bar; 0: none.
        confusion: counts the predictions on the training images, where given.

    Returns:
        "train_loss", the mean over images, and "images_per_second".
    """
    model.train()
    device = next(model.parameters()).device
    total_loss = torch.zeros((), device=device)  # stays there: reading it would wait for the GPU
    seen, started = 0, time.perf_counter()
    updated = started
    with _progress_bar(title, len(loader.dataset)) as bar:
        for step, (images, labels) in enumerate(loader, 1):
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model(images)
            loss = loss_function(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()

            total_loss += loss.detach() * len(images)
            seen += len(images)
            if confusion is not None:
                confusion.update(logits.detach().argmax(1), labels)
            bar.update(len(images))
            now = time.perf_counter()
            if bar.disable and steps_loss and step % steps_loss == 0:
                left = (len(loader) - step) * (now - started) / step
                print(
                    f"{title}: step {step}/{len(loader)}, loss {total_loss.item() / seen:.4f}, "
                    f"{seen / (now - started):.1f} images/s, {left:.0f} s left",
                    flush=True,
                )
            elif not bar.disable and now - updated > SECONDS_BETWEEN_UPDATES:
                bar.set_postfix(loss=f"{total_loss.item() / seen:.4f}")
                updated = now
    mean_loss = total_loss.item() / seen
    return {"train_loss": mean_loss, "images_per_second": seen / (time.perf_counter() - started)}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    num_classes: int,
    title: str,
    class_weights: Tensor | None = None,
    amp_dtype: torch.dtype | None = None,
    on_image: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> tuple[float, ConfusionMatrix]:
    """Score a network at the labels' own resolution: its logits are upsampled, then argmax.

    Args:
        loader: batches of images, N x 3 x h x w, and labels of any size, N x H x W, int64.
        title: of the progress bar.
        class_weights: of the cross entropy, one weight a class; None: it is not computed.
        on_image: is called for each image, in order, with the image (3 x h x w), its predicted
            classes and its label (H x W).

    Returns:
        The weighted cross entropy over all labelled pixels, NaN where it was not asked for, and
        the confusion matrix.
    """
    model.eval()
    device = next(model.parameters()).device
    confusion = ConfusionMatrix(num_classes, device)
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    with _progress_bar(title, len(loader.dataset)) as bar:
        for images, labels in loader:
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                batch = model(images)
            # One image at a time: a batch of 19 planes at full resolution need not fit.
            for image, logits, label in zip(images, batch.float().split(1), labels, strict=True):
                logits = F.interpolate(logits, label.shape, mode="bilinear", align_corners=True)
                prediction = logits.argmax(1)[0]
                confusion.update(prediction, label)
                if class_weights is not None:
                    total_loss += F.cross_entropy(
                        logits,
                        label[None],
                        class_weights,
                        ignore_index=IGNORE_INDEX,
                        reduction="sum",
                    )
                if on_image is not None:
                    on_image(image, prediction, label)
                bar.update()
    if class_weights is None:
        return math.nan, confusion
    weights = (confusion.counts.sum(1) * class_weights.double()).sum()
    return (total_loss / weights).item(), confusion


def _progress_bar(title: str, images: int) -> tqdm:
    """A bar that counts images, on a terminal only: a log would fill with control codes."""
    return tqdm(total=images, desc=title, unit="img", leave=False, disable=None)
