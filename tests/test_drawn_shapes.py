import filecmp

import numpy as np
import pytest
from PIL import Image

from datasets.drawn.shapes import CLASSES, draw_shape, make_shapes


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
    files = sorted(path.relative_to(shapes) for path in shapes.rglob("*.jpg"))
    assert len(files) == 18
    same, different, missing = filecmp.cmpfiles(shapes, tmp_path / "again", files, shallow=False)
    assert len(same) == 18 and not different and not missing


def test_no_two_pictures_are_the_same(shapes):
    assert len({path.read_bytes() for path in shapes.rglob("*.jpg")}) == 18


def test_brightness_and_color_do_not_tell_the_class():
    """The nearest mean of a class, by the share of bright pixels and the colours' means."""

    def features(name, seeds):
        pictures = np.stack([draw_shape(np.random.default_rng(s), name, (64, 64)) for s in seeds])
        bright = (pictures.astype(int).sum(3) > 3 * 115).mean((1, 2))
        return np.column_stack([255 * bright, pictures.mean((1, 2))])

    means = np.stack([features(name, range(40)).mean(0) for name in CLASSES])
    hits = []
    for number, name in enumerate(CLASSES):
        distances = np.linalg.norm(features(name, range(100, 130))[:, None] - means, axis=2)
        hits.extend(distances.argmin(1) == number)
    assert np.mean(hits) < 0.4


def test_an_existing_folder_is_not_touched(tmp_path):
    with pytest.raises(FileExistsError):
        make_shapes(tmp_path)
    assert not list(tmp_path.iterdir())
