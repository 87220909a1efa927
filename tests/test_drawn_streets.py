import filecmp
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.cityscapes import Cityscapes
from datasets.drawn.streets import coarsen, make_synthetic


def test_layout_is_that_of_the_download(cityscapes):
    for split, count in {"train": 6, "val": 3, "test": 2, "train_extra": 3}.items():
        images = sorted((cityscapes / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        assert len(images) == count
        modes = {"test": ["gtFine"], "train_extra": ["gtCoarse"]}.get(split, ["gtFine", "gtCoarse"])
        for mode in modes:
            for kind in ("labelIds", "instanceIds"):
                for image in images:
                    name = image.name.replace("leftImg8bit", f"{mode}_{kind}")
                    path = cityscapes / mode / split / image.parent.name / name
                    with Image.open(path) as label:
                        assert label.size == (128, 64), path
    assert not (cityscapes / "gtFine/train_extra").exists()
    assert not list(cityscapes.parent.glob(".*")), "the unfinished folder is left behind"


def test_the_same_seed_gives_the_same_bytes(cityscapes, tmp_path):
    counts = {"train": 6, "val": 3, "test": 2, "train_extra": 3}
    make_synthetic(tmp_path / "again", counts, height=64, workers=1)
    files = sorted(p.relative_to(cityscapes) for p in cityscapes.rglob("*.png"))
    assert len(files) == 14 + 2 * (11 + 12)
    same, different, missing = filecmp.cmpfiles(
        cityscapes, tmp_path / "again", files, shallow=False
    )
    assert len(same) == len(files) and not different and not missing


def test_more_images_do_not_change_the_first(cityscapes, tmp_path):
    make_synthetic(tmp_path / "one", {"val": 1}, height=64)
    (image,) = (tmp_path / "one").rglob("*_leftImg8bit.png")
    assert image.read_bytes() == (cityscapes / image.relative_to(tmp_path / "one")).read_bytes()


def test_nothing_is_overwritten(cityscapes):
    with pytest.raises(FileExistsError):
        make_synthetic(cityscapes, {"val": 1}, height=64)


def test_test_labels_are_blank(cityscapes):
    for path in (cityscapes / "gtFine/test").rglob("*.png"):
        assert not np.array(Image.open(path)).any()


def test_coarse_labels_lie_inside_the_fine_ones(cityscapes):
    fine = Cityscapes(cityscapes, "train")
    coarse = Cityscapes(cityscapes, "train_coarse")
    for index in range(len(fine)):
        true, rough = fine.read_train_ids(index), coarse.read_train_ids(index)
        labelled = rough != 255
        assert (true[labelled] == rough[labelled]).all()
        assert 0.2 < labelled.mean() < 0.9
        # Both sides of every border that is left are unlabelled.
        change = rough[:, 1:] != rough[:, :-1]
        assert ((rough[:, 1:] == 255) | (rough[:, :-1] == 255))[change].all()


def test_coarsen_drops_what_is_thin():
    ids = np.full((64, 128), 7, np.uint8)
    ids[:, 60:62] = 17
    ids[:, 90:] = 11
    rough = coarsen(ids, cell=8)
    assert set(np.unique(rough)) == {0, 7, 11}


def test_coarsen_never_takes_one_class_for_another():
    """An island where four cells of the grid meet fills none of them."""
    ids = np.full((64, 128), 1, np.uint8)
    ids[27:38, 59:70] = 2
    rough = coarsen(ids, cell=16)
    assert ((rough == ids) | (rough == 0)).all()
    assert (rough == 1).any()


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    """The folder is never drawn again: a power cut must not leave empty files in it."""
    synced = []

    def sync(path):
        path = Path(path)
        synced.append("root" if path == tmp_path else path.name)
        assert path == tmp_path or (path.exists() and not (tmp_path / "data").exists())

    monkeypatch.setattr("datasets.drawn.sync", sync)
    make_synthetic(tmp_path / "data", {"train": 1}, height=64)
    files = {path.name for path in (tmp_path / "data").rglob("*")}
    assert files and files <= set(synced) and synced[-1] == "root"
