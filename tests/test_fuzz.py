"""Fuzzed files: each is read as it was, or refused by its name."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from fuzzing import Fuzzed, fuzzed_file

from datasets.check import check_file, decode_fully
from datasets.cityscapes import Cityscapes
from datasets.imagenet import CropLoader
from datasets.images import FileError, read_image
from datasets.segmentation import Segmentation

# More seeds by hand: pytest -m slow tests/test_fuzz.py
SEEDS = [range(150), pytest.param(range(150, 5000), marks=pytest.mark.slow)]


class OneLabel(Segmentation):
    """A data set of one image, whose label is fuzzed."""

    CLASSES = Cityscapes.CLASSES
    SPLITS = ("train",)

    def files(self):
        return [(str(Path(self.root, "fuzzed.png")), str(Path(self.root, "fuzzed.png")))]


def files(kind: str, seeds: range, folder: Path):
    for seed in seeds:
        fuzzed = fuzzed_file(Random(seed), folder, kind)
        yield fuzzed, str(fuzzed.path)
        fuzzed.path.unlink()


def passes(fuzzed: Fuzzed, check, *args) -> bool:
    """Whether a check passes; if not, it must name the file, and the file must be damaged."""
    try:
        check(str(fuzzed.path), *args)
    except FileError as error:
        assert str(error).startswith(str(fuzzed.path)) and "\n" not in str(error), fuzzed
        assert not fuzzed.how.endswith(", nothing"), f"{fuzzed} is sound: {error}"
        return False
    return True


def must_be_found(fuzzed: Fuzzed) -> bool:
    """Whether the damage can be told: not changed bits of a JPEG, nor its last scans left out."""
    damage = fuzzed.how.split(", ")[-1]
    jpeg = "jpeg" in fuzzed.how and damage in ("flip", "random_bytes")
    scans = "progressive" in fuzzed.how and damage == "end_early_jpeg"
    return not jpeg and not scans and damage != "double"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_images(kind, seeds, tmp_path):
    crops = [CropLoader(16, random) for random in (True, False)]
    for fuzzed, path in files(kind, seeds, tmp_path):
        quick = passes(fuzzed, check_file)
        if passes(fuzzed, decode_fully, read_image) and quick and must_be_found(fuzzed):
            image = read_image(path)
            assert image.mode == "RGB" and image.size == tuple(fuzzed.size), fuzzed
            assert fuzzed.pixels is None or (np.asarray(image) == fuzzed.pixels).all(), fuzzed
        for crop in crops:
            torch.manual_seed(0)
            if passes(fuzzed, crop):
                torch.manual_seed(0)  # the same crop
                image = crop(path)
                assert image.shape == (3, 16, 16) and image.dtype == torch.uint8, fuzzed


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("seeds", SEEDS)
def test_labels(seeds, tmp_path):
    for fuzzed, path in files("label", seeds, tmp_path):
        quick = passes(fuzzed, check_file, True)
        dataset = OneLabel(tmp_path)
        if passes(fuzzed, decode_fully, lambda _, dataset=dataset: dataset.read_train_ids(0)):
            found = dataset.read_train_ids(0)
            assert ((found < 19) | (found == 255)).all() and found.shape == fuzzed.size[::-1], path
            if quick and must_be_found(fuzzed) and fuzzed.pixels is not None:
                assert (found == dataset.classes.to_train_ids()[fuzzed.pixels]).all(), fuzzed
