"""Scores: a confusion matrix, counted as the official Cityscapes evaluation does, and top-k."""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.losses import IGNORE_INDEX


class ConfusionMatrix:
    """Counts of (true class, predicted class) over pixels, kept on one device.

    Attributes:
        counts: num_classes x num_classes, int64; rows are the truth, columns the prediction.
    """

    def __init__(
        self, num_classes: int, device: torch.device | str = "cpu", ignore_index: int = IGNORE_INDEX
    ) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros((num_classes, num_classes), dtype=torch.int64, device=device)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count the pixels of integer tensors of one shape; ignored labels are left out."""
        # Ignored pixels go to one row more, which is cut off: cheaper than selecting the others.
        rows = labels.flatten().masked_fill(labels.flatten() == self.ignore_index, self.num_classes)
        cells = rows * self.num_classes + predictions.flatten()
        counts = torch.bincount(cells, minlength=(self.num_classes + 1) * self.num_classes)
        self.counts += counts.view(self.num_classes + 1, self.num_classes)[:-1]

    def update_from_logits(self, logits: Tensor, labels: Tensor) -> None:
        """Count the class of the largest logit: N x C x H x W against labels of N x H x W."""
        self.update(logits.argmax(1), labels)

    def class_iou(self) -> Tensor:
        """Intersection over union of each class in [0, 1], float64; NaN where a class is absent
        from truth and prediction."""
        return _iou(self.counts.double())

    def category_iou(self, categories: Sequence[str]) -> dict[str, float]:
        """IoU of groups of classes; confusing two classes of one group is no mistake.

        Args:
            categories: the group of each class.

        Returns:
            The IoU of each group in [0, 1], in order of appearance; NaN where it is absent.
        """
        names = list(dict.fromkeys(categories))
        member = torch.tensor([[c == name for c in categories] for name in names])
        member = member.double().to(self.counts.device)
        iou = _iou(member @ self.counts.double() @ member.T)
        return dict(zip(names, iou.tolist(), strict=True))

    def pixel_accuracy(self) -> float:
        """Share of the labelled pixels whose class is right; NaN without any."""
        return (self.counts.diagonal().sum().double() / self.counts.sum()).item()

    def mean_accuracy(self) -> float:
        """Share of right pixels in each class of the truth, averaged over the classes."""
        counts = self.counts.double()
        return (counts.diagonal() / counts.sum(1)).nanmean().item()


class TopKAccuracy:
    """How often the label of an image is among the k classes of the largest logits.

    Attributes:
        counts: hits of each k, then the images counted, int64, kept on one device.
    """

    def __init__(self, ks: Sequence[int] = (1, 5), device: torch.device | str = "cpu") -> None:
        self.ks = tuple(ks)
        self.counts = torch.zeros(len(self.ks) + 1, dtype=torch.int64, device=device)

    @property
    def seen(self) -> int:
        return int(self.counts[-1])

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits of N x C and labels of N; of k or fewer classes all hit."""
        classes = logits.topk(min(max(self.ks), logits.shape[1])).indices  # N x k, best first
        hit = classes == labels[:, None]
        for place, k in enumerate(self.ks):
            self.counts[place] += hit[:, :k].sum()
        self.counts[-1] += len(labels)

    def shares(self) -> list[float]:
        """The share of the images that each k hits, in [0, 1]; NaN without any image."""
        return (self.counts[:-1].double() / self.counts[-1]).tolist()

    def figures(self) -> dict[str, str]:
        """The shares as they are shown: {"top-1": "12.34 %", ...}."""
        pairs = zip(self.ks, self.shares(), strict=True)
        return {f"top-{k}": f"{100 * share:.2f} %" for k, share in pairs}


def mean_score(scores: Sequence[float] | Tensor) -> float:
    """The mean of the scores that are not NaN, as the official evaluation averages."""
    return torch.as_tensor(scores, dtype=torch.float64).nanmean().item()


def _iou(counts: Tensor) -> Tensor:
    hits = counts.diagonal()
    return hits / (counts.sum(0) + counts.sum(1) - hits)
