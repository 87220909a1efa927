"""What the training labels consist of, for class weights."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from tqdm import tqdm

from datasets.images import IGNORE_INDEX
from datasets.loading import reading_loader
from datasets.segmentation import Segmentation


class _Histograms(Dataset):
    """The number of pixels of each class in one label map, ignored pixels last."""

    def __init__(self, dataset: Segmentation, num_classes: int) -> None:
        self.dataset, self.num_classes = dataset, num_classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        counts = np.bincount(self.dataset.read_train_ids(index).ravel(), minlength=256)
        return torch.from_numpy(np.append(counts[: self.num_classes], counts[IGNORE_INDEX]))


def count_pixels(parts: Sequence[Segmentation], num_classes: int, workers: int = 0) -> Tensor:
    """Count the pixels of each class over all labels of some data sets, at full size.

    Returns:
        int64, num_classes + 1: the pixels of each class, then the ignored ones.

    Raises:
        DatasetError: a label file cannot be read or holds an unknown id.
    """
    histograms = ConcatDataset([_Histograms(part, num_classes) for part in parts])
    loader = reading_loader(histograms, workers, batch_size=8)
    counts = torch.zeros(num_classes + 1, dtype=torch.int64)
    for batch in tqdm(loader, "counting label pixels", leave=False, disable=None):
        counts += batch.sum(0)
    return counts
