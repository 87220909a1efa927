"""Class weights and the losses of training.

Of several processes, each with its part of a batch, the mean of their losses is the loss of the
whole batch, and so is the mean of their gradients, which is what DistributedDataParallel makes.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from utils import distributed

IGNORE_INDEX = 255

Loss = Callable[[Tensor, Tensor], Tensor]  # of logits and labels


def class_weights(counts: Tensor, c: float) -> Tensor:
    """Weigh classes by how rare they are: w = 1 / ln(c + p), p the share of all pixels (ENet).

    Args:
        counts: pixels of each class, then of the ignored ones, which count in the total.
        c: 1.20 in LEDNet's stage 1 and 1.10 in its stage 2; the smaller, the stronger.

    Returns:
        float32, one weight a class.
    """
    shares = counts[:-1].double() / counts.sum()
    return (1 / torch.log(c + shares)).float()


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean cross entropy over the labelled pixels of the whole batch; 0 without any.

    Args:
        logits: N x C x H x W, of any precision; the loss is float32.
        labels: N x H x W, int64, 0 to C - 1 or 255 = ignore.
        weight: of each class.
    """
    total = F.cross_entropy(
        logits.float(), labels, weight, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return _mean(total, _pixel_weights(labels, weight).sum())


def ohem_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    threshold: float = 0.7,
    min_kept: float = 1 / 16,
) -> Tensor:
    """Cross entropy over the hard pixels alone (online hard example mining).

    Hard are the pixels whose true class got a probability below `threshold`, and at least the
    share `min_kept` of the labelled ones, the hardest first (Shrivastava et al., CVPR 2016).
    Arguments as in `cross_entropy`.
    """
    losses = F.cross_entropy(
        logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none"
    ).flatten()
    # How many pixels are labelled only the GPU knows, and to ask it would wait for all its work. So
    # the losses are sorted as far as they could be asked for, and it finds the last of them itself.
    most = max(1, int(losses.numel() * distributed.processes() * min_kept))
    hardest = losses.detach().topk(min(most, losses.numel())).values
    if distributed.processes() > 1:  # the hardest of the whole batch may all lie in one process
        hardest = distributed.joined(hardest).topk(most).values
    labelled = distributed.total((labels != IGNORE_INDEX).sum())
    fewest = (labelled * min_kept).long().clamp(1, most)
    kept = (losses > -math.log(threshold)) | (losses >= hardest.take(fewest - 1))
    weights = _pixel_weights(labels, weight).flatten() * kept
    return _mean((losses * weights).sum(), weights.sum())


LOSSES = {"ce": cross_entropy, "ohem": ohem_cross_entropy}


def build_loss(name: str, weight: Tensor) -> Loss:
    """The loss of that name (a key of LOSSES) as a function of logits and labels."""
    return partial(LOSSES[name], weight=weight)


def with_auxiliary(loss: Loss, share: float) -> Callable[[tuple[Tensor, Tensor], Tensor], Tensor]:
    """Add `share` times the loss of a second head, whose logits have a resolution of their own.

    Returns:
        A function of both heads' logits and the labels, which are made smaller for the second.
    """

    def total(outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        logits, auxiliary = outputs
        # The nearest pixel to each centre, as bytes: that mode does not take int64.
        planes = labels[:, None].to(torch.uint8)
        smaller = F.interpolate(planes, auxiliary.shape[-2:], mode="nearest-exact")[:, 0].long()
        return loss(logits, labels) + share * loss(auxiliary, smaller)

    return total


def _mean(total: Tensor, weights: Tensor) -> Tensor:
    """A sum of weighted losses over the sum of the weights in the whole batch.

    Each process has its part of both; the mean of what they return is the mean of the batch.
    """
    return distributed.processes() * total / distributed.total(weights.detach()).clamp_min(1e-12)


def _pixel_weights(labels: Tensor, weight: Tensor) -> Tensor:
    """The weight of each pixel's class, 0 where it is ignored."""
    by_label = F.pad(weight, (0, IGNORE_INDEX + 1 - len(weight)))
    return by_label[labels]
