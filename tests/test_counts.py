"""What the labels of a data set hold as a whole."""

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.cityscapes import Cityscapes
from datasets.counts import LabelCounts, count_labels, jpeg_traces, label_problems


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_are_counted(cityscapes, workers):
    parts = [Cityscapes(cityscapes, split) for split in ("train", "train_extra")]
    labels = [part.read_train_ids(index) for part in parts for index in range(len(part))]
    values, numbers = np.unique(labels, return_counts=True)
    expected = dict(zip(values.tolist(), numbers.tolist(), strict=True))
    counts = count_labels(parts, workers).by_class(Cityscapes.CLASSES)
    assert counts.dtype == torch.int64 and counts.sum() == 9 * 64 * 128
    assert counts.tolist() == [expected.get(value, 0) for value in (*range(19), 255)]


def problems_of(dataset: Cityscapes) -> list[str]:
    return label_problems({"train": count_labels([dataset])}, dataset.classes, None)


@pytest.mark.parametrize("quality", [50, 75, 90, 95, 98])
def test_ids_that_went_through_jpeg_are_refused(cityscapes_copy, tmp_path, quality):
    """All values are ids of Cityscapes, so that none is unknown."""
    train = Cityscapes(cityscapes_copy, "train")
    assert problems_of(train) == []
    for _, label in train.pairs:
        Image.open(label).save(tmp_path / "label.jpg", quality=quality)
        Image.open(tmp_path / "label.jpg").point(lambda value: min(value, 33)).save(label)
    (problem,) = problems_of(train)
    assert problem.startswith("the labels of train went through JPEG, which blurs the ids at bor")


@pytest.mark.parametrize("kind", ["noise", "patches", "noisy patches", "rows", "single pixels"])
def test_labels_of_odd_forms_did_not_go_through_jpeg(kind):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 19, (256, 512), np.uint8)
    patches = noise[::8, ::8].repeat(8, 0).repeat(8, 1)
    ids = {
        "noise": noise,
        "patches": patches,
        "noisy patches": np.where(rng.random(noise.shape) < 0.01, noise, patches),
        "rows": noise[:, :1].repeat(512, 1),
        "single pixels": np.where(rng.random(noise.shape) < 0.01, noise, 3),
    }[kind]
    for part in (ids, ids[:5, :5], ids[:1], ids[:, :1], ids[:9]):
        counts = LabelCounts(torch.ones(256).long(), traces=torch.tensor(jpeg_traces(part)))
        assert label_problems({"train": counts}, Cityscapes.CLASSES, None) == []
