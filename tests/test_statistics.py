import numpy as np
import pytest

from datasets.cityscapes import Cityscapes
from datasets.statistics import count_pixels


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_are_those_of_the_labels(cityscapes, workers):
    parts = [Cityscapes(cityscapes, split) for split in ("train", "train_extra")]
    expected = np.zeros(20, np.int64)
    for part in parts:
        for index in range(len(part)):
            train_ids = part.read_train_ids(index)
            expected += [*((train_ids == c).sum() for c in range(19)), (train_ids == 255).sum()]
    counts = count_pixels(parts, 19, workers)
    assert counts.tolist() == expected.tolist()
    assert counts.sum() == 9 * 64 * 128


def test_coarse_labels_leave_more_unlabelled(cityscapes):
    fine, coarse = (
        count_pixels([Cityscapes(cityscapes, split)], 19) for split in ("train", "train_coarse")
    )
    assert coarse[-1] > 2 * fine[-1]
