"""tools/mix_camvid.py."""

import numpy as np
from conftest import CITYSCAPES_WEIGHTS, write_pair
from PIL import Image

from datasets.camvid import CamVid
from datasets.cityscapes import Cityscapes

TOOL = "tools/mix_camvid.py"
QUICK = ("--preset", "camvid", "--height", 72, "--crop", 64, 64, "--epochs", 1, "--workers", 0)
# Of Cityscapes' trainIds 0 to 18, by hand: road is Road, ..., truck is Car, rider is Bicyclist.
CAMVID_IDS = [3, 4, 1, 1, 7, 2, 6, 6, 5, 5, 0, 9, 10, 8, 8, 8, 8, 10, 10]


def test_cityscapes_gets_the_classes_of_camvid(script, camvid, cityscapes, tmp_path):
    argv = ("--camvid", camvid, "--cityscapes", cityscapes, "--repeat", 2, "--output", "mixed")
    result = script(TOOL, *argv)
    train, city = CamVid(tmp_path / "mixed", "train"), Cityscapes(cityscapes, "train")
    own = CamVid(camvid, "train")
    assert result.status == 0
    assert f"2 x {len(own)} images of CamVid, {len(city)} of Cityscapes and 0 without" in result.out
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
    val, own = (CamVid(root, "val") for root in (tmp_path / "mixed", camvid))
    assert len(val) == len(own) and (val[0][1] == own[0][1]).all()


def test_a_smaller_copy_and_pictures_without_labels(script, camvid, tmp_path):
    (tmp_path / "names.txt").write_text("Truck\nroad\nother\n")
    for place in "ab":  # of the same name
        pair = [tmp_path / f"city/{kind}/train/{place}/0.png" for kind in ("images", "labels")]
        write_pair(*pair, (72, 96), range(3), seed=0)
    write_pair(tmp_path / "more/deep/x.png", tmp_path / "y.png", (64, 80), range(3), seed=1)
    argv = ("--camvid", camvid, "--cityscapes", "city", "--classes", "names.txt")
    argv += ("--train-on", "trainval", "--unlabelled", "more", "--output", "mixed")
    result = script(TOOL, *argv)
    assert result.status == 0 and "ignored, as Cityscapes has no such classes: other" in result.out
    train = CamVid(tmp_path / "mixed", "train")
    assert len(train) == 6 * 9 + 2 + 1
    stored = np.array(Image.open(pair[1]))
    for index in (-3, -2):
        assert (train[len(train) + index][1].numpy() == np.array([8, 3, 255])[stored]).all()
    image, label = train[len(train) - 1]
    assert image.shape == (3, 64, 80) and (label == 255).all()


def test_a_network_of_cityscapes_learns_from_both(script, camvid, cityscapes):
    argv = ("--camvid", camvid, "--cityscapes", cityscapes, "--train-on", "trainval")
    assert script(TOOL, *argv, "--output", "mixed").status == 0
    argv = ("--dataset", "camvid", "--datadir", "mixed", *QUICK, "--init", CITYSCAPES_WEIGHTS)
    result = script("main.py", *argv, "--savedir", "both")
    assert "it knows 11 of the 11 classes" in result.out
    assert "val is trained on" in result.out


def test_nothing_is_written_after_a_mistake(fails, camvid_copy, fields, tmp_path):
    argv = ("--cityscapes", fields, "--classes", fields / "classes.txt", "--output", "mixed")
    assert "give a data set with Cityscapes'" in fails(TOOL, "--camvid", camvid_copy, *argv)
    next((camvid_copy / "trainannot").iterdir()).unlink()
    assert "have no label" in fails(TOOL, "--camvid", camvid_copy, *argv)
    assert not (tmp_path / "mixed").exists()
