"""tools/mix_camvid.py."""

import numpy as np
from conftest import write_pair
from PIL import Image

from datasets.camvid import CamVid
from datasets.cityscapes import Cityscapes
from datasets.class_file import read_classes
from datasets.folder import Folder
from utils.checkpoint import load_checkpoint

TOOL = "tools/mix_camvid.py"
# Of Cityscapes' trainIds 0 to 18, by hand: road is Road, ..., truck is Car, rider is Bicyclist.
CAMVID_IDS = [3, 4, 1, 1, 7, 2, 6, 6, 5, 5, 0, 9, 10, 8, 8, 8, 8, 10, 10]


def test_cityscapes_gets_the_classes_of_camvid(script, camvid, cityscapes, tmp_path):
    argv = ("--camvid", camvid, "--cityscapes", cityscapes, "--repeat", 2, "--output", "mixed")
    assert script(TOOL, *argv).status == 0
    mixed = tmp_path / "mixed"
    classes = read_classes(mixed / "classes.txt")
    assert classes.names == list(CamVid.CLASSES.names)
    assert classes.colors == list(CamVid.CLASSES.colors)
    train, city = Folder(mixed, "train", classes), Cityscapes(cityscapes, "train")
    own = CamVid(camvid, "train")
    assert len(train) == 2 * len(own) + len(city)
    for index in range(len(own)):
        for copy in train[index], train[len(own) + index]:
            assert all((a == b).all() for a, b in zip(copy, own[index], strict=True))
    table = np.array(CAMVID_IDS + [255] * 237)
    seen = set()
    for index in range(len(city)):
        (image, label), (expected, train_ids) = train[2 * len(own) + index], city[index]
        assert (image == expected).all() and (label.numpy() == table[train_ids.numpy()]).all()
        seen.update(label.unique().tolist())
    assert len(seen) > 8 and 255 in seen
    assert len(Folder(mixed, "val", classes)) == len(CamVid(camvid, "val"))


def test_a_smaller_copy_and_all_of_camvid(script, camvid, tmp_path):
    """A network is trained on them, and then on CamVid alone with all of its classes."""
    (tmp_path / "names.txt").write_text("truck\nroad\nother\n")
    pair = tmp_path / "city/images/train/a.png", tmp_path / "city/labels/train/a.png"
    write_pair(*pair, (72, 96), range(3), seed=0)
    argv = ("--camvid", camvid, "--cityscapes", "city", "--classes", "names.txt")
    assert script(TOOL, *argv, "--train-on", "trainval", "--output", "mixed").status == 0
    labels = sorted((tmp_path / "mixed/labels/train").iterdir())
    assert len(labels) == 6 * 9 + 1
    stored, new = (np.array(Image.open(path)) for path in (pair[1], labels[-1]))
    assert (new == np.array([8, 3, 255])[stored]).all()

    quick = ("--preset", "camvid", "--height", 72, "--crop", 64, 64, "--D", 4, "--epochs", 1)
    quick += ("--workers", 0)
    argv = ("--dataset", "folder", "--classes", "mixed/classes.txt", "--datadir", "mixed")
    assert script("main.py", *argv, *quick, "--savedir", "both").status == 0
    argv = ("--dataset", "camvid", "--datadir", camvid, "--init", "save/both/last.pth")
    result = script("main.py", *argv, *quick, "--savedir", "alone")
    assert "it knows 11 of the 11 classes" in result.out
    assert load_checkpoint(tmp_path / "save/alone/last.pth")["dataset"] == "camvid"


def test_other_classes_are_refused(fails, camvid, fields, tmp_path):
    argv = ("--camvid", camvid, "--cityscapes", fields, "--classes", fields / "classes.txt")
    assert "give a data set with Cityscapes'" in fails(TOOL, *argv, "--output", "mixed")
    assert not (tmp_path / "mixed").exists()
