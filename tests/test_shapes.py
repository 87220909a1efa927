import filecmp

import numpy as np
import pytest
from PIL import Image

from datasets.shapes import CLASSES, draw_shape, make_shapes


def test_layout_is_that_of_imagenet(shapes):
    for split, count in (("train", 2), ("val", 1)):
        assert sorted(path.name for path in (shapes / split).iterdir()) == CLASSES
        for name in CLASSES:
            images = list((shapes / split / name).iterdir())
            assert len(images) == count
            for path in images:
                with Image.open(path) as image:
                    assert image.size == (48, 40) and image.format == "JPEG"
    assert not list(shapes.parent.glob(".*")), "the unfinished folder is left behind"


def test_the_same_seed_gives_the_same_pictures(shapes, tmp_path):
    counts = {"train": 2, "val": 1}
    make_shapes(tmp_path / "again", counts, size=(40, 48), workers=1)
    make_shapes(tmp_path / "other", counts, size=(40, 48), seed=1)
    files = sorted(path.relative_to(shapes) for path in shapes.rglob("*.jpg"))
    assert len(files) == 18
    same, different, missing = filecmp.cmpfiles(shapes, tmp_path / "again", files, shallow=False)
    assert len(same) == 18 and not different and not missing
    same, _, _ = filecmp.cmpfiles(shapes, tmp_path / "other", files, shallow=False)
    assert not same


def test_no_two_pictures_are_the_same(shapes):
    assert len({path.read_bytes() for path in shapes.rglob("*.jpg")}) == 18


@pytest.mark.parametrize("name", CLASSES)
def test_a_pattern_is_bright_on_dark(name):
    """How much of a picture is bright tells little of the class, so shapes have to be learned."""
    shares = []
    for seed in range(20):
        picture = draw_shape(np.random.default_rng(seed), name, (64, 64))
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        shares.append((picture.astype(int).sum(2) > 3 * 115).mean())
    assert 0.1 < np.mean(shares) < 0.6
    assert max(shares) - min(shares) > 0.02


def test_an_existing_folder_is_not_touched(tmp_path):
    with pytest.raises(FileExistsError):
        make_shapes(tmp_path)
    assert not list(tmp_path.iterdir())
