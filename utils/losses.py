"""Class weights and the losses of training.

Each of several processes has a part of the batch. The mean of their losses is the loss of the whole
batch, as DistributedDataParallel takes the mean of their gradients.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from datasets.images import IGNORE_INDEX
from datasets.segmentation import resize_label
from datasets.soft_labels import TEMPERATURE
from utils import distributed

Loss = Callable[[Tensor, Tensor], Tensor]  # logits, labels -> scalar

SOFT_SHARE = 2.0  # of soft labels in the loss; that of labels is 1


def class_weights(counts: Tensor, c: float) -> Tensor:
    """Return w = 1 / ln(c + p) of each class, float32; p is its share of the pixels (ENet).

    Args:
        counts: pixels of each class, then the ignored pixels, which count in the total.
        c: 1.20 in LEDNet's stage 1 and 1.10 in its stage 2; smaller values favour rare classes.
    """
    shares = counts[:-1].double() / counts.sum()
    return (1 / torch.log(c + shares)).float()


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean cross entropy over the labelled pixels of the whole batch, or 0.

    Args:
        logits: N x C x H x W, in any precision; the loss is float32.
        labels: N x H x W, int64, 0 to C - 1, or 255 = ignore.
        weight: of each class.
    """
    total = F.cross_entropy(
        logits.float(), labels, weight, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return _mean(total, _pixel_weights(labels, weight).sum())


def ohem_cross_entropy(
    logits: Tensor, labels: Tensor, weight: Tensor, threshold: float = 0.7, min_kept: float = 1 / 16
) -> Tensor:
    """Return the cross entropy over hard pixels (online hard example mining).

    A pixel is hard if the probability of its true class is below `threshold`; at least the share
    `min_kept` of the labelled pixels counts, the hardest first (Shrivastava et al., CVPR 2016).
    The other arguments are those of `cross_entropy`.
    """
    losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
    losses = losses.flatten()
    # Only the GPU knows how many pixels are labelled, and asking it would wait for all its work.
    # So sort as many losses as could be needed, and let the GPU find the last of them itself.
    most = max(1, int(losses.numel() * distributed.processes() * min_kept))
    hardest = losses.detach().topk(min(most, losses.numel())).values
    if distributed.processes() > 1:  # all of the hardest may be in one process
        hardest = distributed.joined(hardest).topk(most).values
    labelled = distributed.total((labels != IGNORE_INDEX).sum())
    fewest = (labelled * min_kept).long().clamp(1, most)
    kept = (losses > -math.log(threshold)) | (losses >= hardest.take(fewest - 1))
    weights = _pixel_weights(labels, weight).flatten() * kept
    return _mean((losses * weights).sum(), weights.sum())


LOSSES = {"ce": cross_entropy, "ohem": ohem_cross_entropy}


def with_auxiliary(loss: Loss, share: float) -> Callable[[tuple[Tensor, Tensor], Tensor], Tensor]:
    """Return a loss that adds `share` times the loss of the auxiliary head."""

    def total(outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        logits, auxiliary = outputs
        smaller = resize_label(labels, auxiliary.shape[-2:])
        return loss(logits, labels) + share * loss(auxiliary, smaller)

    return total


def with_soft_labels(loss: Callable[[Any, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a loss that adds SOFT_SHARE times the divergence from soft labels."""

    def total(outputs: Any, labels: Tensor, soft_labels: Tensor) -> Tensor:
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return loss(outputs, labels) + SOFT_SHARE * divergence(logits, soft_labels)

    return total


def divergence(logits: Tensor, soft_labels: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence of softened logits from soft labels.

    Args:
        logits: N x C x H x W, in any precision; the mean of each block of pixels is compared.
        soft_labels: probabilities, N x C x h x w, float32; pixels whose probabilities do not add up
            to 1 count less, and those of zeros not at all.
    """
    means = F.adaptive_avg_pool2d(logits.float(), soft_labels.shape[-2:])
    own = (means / TEMPERATURE).log_softmax(1)
    return F.kl_div(own, soft_labels, reduction="none").sum(1).mean()


def _mean(total: Tensor, weights: Tensor) -> Tensor:
    """Divide the weighted losses of this process by the weights of the whole batch.

    The mean of the results over the processes is the mean over the batch.
    """
    return distributed.processes() * total / distributed.total(weights.detach()).clamp_min(1e-12)


def _pixel_weights(labels: Tensor, weight: Tensor) -> Tensor:
    """Return the weight of each pixel's class; 0 for ignored pixels."""
    return F.pad(weight, (0, IGNORE_INDEX + 1 - len(weight)))[labels]
