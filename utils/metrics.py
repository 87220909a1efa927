"""Scores: a confusion matrix, counted as the official Cityscapes evaluation does, and top-k."""

from collections.abc import Sequence

import torch
from torch import Tensor

from datasets.images import IGNORE_INDEX


class ConfusionMatrix:
    """Counts of (true class, predicted class) over pixels, on one device."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        # Rows are the truth, columns the prediction.
        self.counts = torch.zeros((num_classes, num_classes), dtype=torch.int64, device=device)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count the pixels of integer tensors of one shape, except ignored labels."""
        # Ignored pixels go to an extra row that is cut off, which is cheaper than selection.
        rows = labels.flatten().masked_fill(labels.flatten() == IGNORE_INDEX, self.num_classes)
        cells = rows * self.num_classes + predictions.flatten()
        counts = self.counts.new_zeros((self.num_classes + 1) * self.num_classes)
        # Not by bincount, which waits for a GPU.
        counts.scatter_add_(0, cells, counts.new_ones(()).expand_as(cells))
        self.counts += counts.view(self.num_classes + 1, self.num_classes)[:-1]

    def update_from_logits(self, logits: Tensor, labels: Tensor) -> None:
        """Count the argmax of logits, N x C x H x W, against labels, N x H x W."""
        self.update(logits.argmax(1), labels)

    def summary(self) -> dict[str, float]:
        return {"miou": mean_score(self.class_iou())}

    def class_iou(self) -> Tensor:
        """Return the intersection over union of each class in [0, 1], float64; NaN if absent."""
        return _iou(self.counts.double())

    def category_iou(self, categories: Sequence[str]) -> dict[str, float]:
        """Return the IoU of each category in [0, 1], in order of appearance; NaN if absent.

        Confusion between classes of one category is no error. `categories` has that of each class.
        """
        names = list(dict.fromkeys(categories))
        member = torch.tensor([[c == name for c in categories] for name in names])
        member = member.double().to(self.counts.device)
        iou = _iou(member @ self.counts.double() @ member.T)
        return dict(zip(names, iou.tolist(), strict=True))

    def pixel_accuracy(self) -> float:
        """Return the share of labelled pixels that are classified correctly; NaN without labels."""
        return (self.counts.diagonal().sum().double() / self.counts.sum()).item()

    def mean_accuracy(self) -> float:
        """Return the accuracy within each true class, averaged over the classes."""
        counts = self.counts.double()
        return (counts.diagonal() / counts.sum(1)).nanmean().item()


class TopKAccuracy:
    """How often the label of an image is among the k classes with the largest logits."""

    def __init__(self, ks: Sequence[int] = (1, 5), device: torch.device | str = "cpu") -> None:
        self.ks = tuple(ks)
        # Hits for each k, then the number of images.
        self.counts = torch.zeros(len(self.ks) + 1, dtype=torch.int64, device=device)

    def update_from_logits(self, logits: Tensor, labels: Tensor) -> None:
        """Count logits, N x C, against labels, N; with k classes or fewer, every image is a hit."""
        classes = logits.topk(min(max(self.ks), logits.shape[1])).indices  # N x k, best first
        hit = classes == labels[:, None]
        for place, k in enumerate(self.ks):
            self.counts[place] += hit[:, :k].sum()
        self.counts[-1] += len(labels)

    def summary(self) -> dict[str, float]:
        """Return the share of hits for each k in [0, 1], as "top1", ...; NaN without images."""
        shares = (self.counts[:-1].double() / self.counts[-1]).tolist()
        return {f"top{k}": share for k, share in zip(self.ks, shares, strict=True)}


def mean_score(scores: Sequence[float] | Tensor) -> float:
    """Return the mean of the scores that are not NaN, as the official evaluation does."""
    return torch.as_tensor(scores, dtype=torch.float64).nanmean().item()


def _iou(counts: Tensor) -> Tensor:
    hits = counts.diagonal()
    return hits / (counts.sum(0) + counts.sum(1) - hits)
