"""500 fuzzed files: each is read as it was, or refused by its name."""

import tempfile
from datetime import timedelta
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from fuzzing import Fuzzed, fuzzed_file
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.check import check_every_pixel
from datasets.cityscapes import Cityscapes
from datasets.imagenet import CropLoader
from datasets.images import DatasetError, read_image
from datasets.segmentation import Segmentation

# The largest part of a JPEG that is coded together, in pixels. Of the last, some may be missing,
# which changes the colour of the pixels beside it too.
BLOCK = 16


class OneLabel(Segmentation):
    """A data set of one image, whose label is fuzzed."""

    CLASSES = Cityscapes.CLASSES
    SPLITS = ("train",)

    def files(self):
        return [(str(Path(self.root, "fuzzed.png")), str(Path(self.root, "fuzzed.png")))]


def fuzz(kind: str, check) -> None:
    """Check 100 files of a kind: the same in every run, and each within 5 seconds."""

    @settings(max_examples=100, derandomize=True, database=None, deadline=timedelta(seconds=5))
    @given(st.integers(0, 2**32 - 1).map(Random))
    def run(random):
        with tempfile.TemporaryDirectory() as folder:
            fuzzed = fuzzed_file(random, Path(folder), kind)
            try:
                check(fuzzed)
            except DatasetError as error:
                assert str(error).startswith(str(fuzzed.path)), fuzzed
                assert "\n" not in str(error), fuzzed
                assert not fuzzed.how.endswith(", nothing"), f"{fuzzed} is sound: {error}"

    run()


def same_pixels(found: np.ndarray, fuzzed: Fuzzed) -> bool:
    """Whether an image was read as it was; what was flipped in a JPEG, nobody can tell."""
    if fuzzed.pixels is None:
        return True
    if "jpeg" not in fuzzed.how:
        return np.array_equal(found, fuzzed.pixels)
    if "flip" in fuzzed.how or "random" in fuzzed.how:
        return True
    different = (found != fuzzed.pixels).any(-1)
    height, width = different.shape
    top, left = ((side - 1) // BLOCK * BLOCK - 1 for side in (height, width))
    different[max(0, top) :, max(0, left) :] = False
    return not different.any()


def only_found_by_reading_twice(fuzzed: Fuzzed) -> bool:
    """What check_every_pixel says that it alone finds."""
    return fuzzed.how.endswith(("png, double", "png, interlaced, double")) or (
        "progressive" in fuzzed.how and fuzzed.how.endswith("end_early_jpeg")
    )


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_images(kind):
    def check(fuzzed: Fuzzed) -> None:
        image = read_image(str(fuzzed.path))
        assert image.mode == "RGB", fuzzed
        if "flip" not in fuzzed.how:
            assert image.size == tuple(fuzzed.size), fuzzed
            if only_found_by_reading_twice(fuzzed) and not same_pixels(np.asarray(image), fuzzed):
                check_every_pixel(str(fuzzed.path))
            assert same_pixels(np.asarray(image), fuzzed), fuzzed

    fuzz(kind, check)


def test_labels():
    def check(fuzzed: Fuzzed) -> None:
        dataset = OneLabel(fuzzed.path.parent)
        found = dataset.read_train_ids(0)
        assert ((found < 19) | (found == 255)).all(), fuzzed
        assert found.shape == fuzzed.size[::-1], fuzzed
        if fuzzed.pixels is not None:
            if only_found_by_reading_twice(fuzzed):
                check_every_pixel(str(fuzzed.path))
            assert (found == dataset.classes.to_train_ids()[fuzzed.pixels]).all(), fuzzed

    fuzz("label", check)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_images_of_classes(kind):
    crops = [CropLoader(16, random) for random in (True, False)]

    def check(fuzzed: Fuzzed) -> None:
        try:
            read_image(str(fuzzed.path))
        except DatasetError:
            if "flip" not in fuzzed.how:  # a small decoding may not meet what is flipped
                for crop in crops:
                    with pytest.raises(DatasetError):
                        crop(str(fuzzed.path))
        for crop in crops:
            image = crop(str(fuzzed.path))
            assert image.shape == (3, 16, 16) and image.dtype == torch.uint8, fuzzed

    fuzz(kind, check)
