"""tools/check_dataset.py, on data sets with one file of each kind broken."""

import re

import pytest
from PIL import Image
from test_check import DAMAGES, cut
from test_datasets import put_masks

from datasets.camvid import CamVid
from datasets.cityscapes import Cityscapes
from datasets.class_file import read_classes
from datasets.folder import Folder

TOOL = "tools/check_dataset.py"
# Each is found wherever it is.
EACH = ("no label", "no image", "garbled", "size", "jpeg", "id", "absurd", "cut image", "checksum")


def lines_of(out: str) -> set[tuple[str, str]]:
    """The name and path of each problem, before the two lines of the summary."""
    return {tuple(line.split(": ")[:2]) for line in out.splitlines()[:-2]}


def damage_all(datasets, names) -> set[tuple[str, str]]:
    """Do each damage to a pair of its own; returns the problems to be found."""
    pairs = [pair for dataset in datasets for pair in dataset.pairs if pair[0].endswith(".png")]
    expected = set()
    for pair, damage in zip(pairs, names, strict=False):
        name, which, do, _ = DAMAGES[damage]
        do(*pair)
        expected.add((name, pair[which]))
    assert len(expected) == len(names)
    return expected


@pytest.mark.parametrize("workers", [0, 2])
def test_cityscapes(script, cityscapes_copy, workers):
    splits = [Cityscapes(cityscapes_copy, split) for split in ("train", "train_extra")]
    expected = damage_all(splits, EACH)
    result = script(TOOL, "--datadir", cityscapes_copy, "--workers", workers)
    # What is wrong with an image of train concerns both its fine and its coarse labels.
    coarse = {(name, path) for name, path in lines_of(result.out) if "gtCoarse/train/" in path}
    assert lines_of(result.out) - coarse == expected and result.status == 1
    assert {name for name, _ in coarse} == {"label without image"}
    *_, checked, problems = result.out.splitlines()
    assert re.fullmatch(r"checked all of \d+ images and \d+ labels", checked)
    assert re.fullmatch(r"problems: \d+ \(.*\)", problems) and "wrong size: 1" in problems


def test_camvid(script, camvid_copy):
    splits = [CamVid(camvid_copy, split) for split in ("train", "val")]
    expected = damage_all(splits, EACH[:7])
    argv = ("--dataset", "camvid", "--datadir", camvid_copy, "--workers", 0)
    result = script(TOOL, *argv)
    assert lines_of(result.out) == expected and result.status == 1
    assert "problems: 7 (" in result.out  # once each, though trainval holds train and val
    result = script(TOOL, *argv, "--split", "test")
    assert result.status == 0 and lines_of(result.out) == set()


def test_a_folder(script, fields_copy):
    classes = fields_copy / "classes.txt"
    argv = ("--classes", classes, "--datadir", fields_copy, "--workers", 0)
    assert script(TOOL, *argv).status == 0
    expected = damage_all([Folder(fields_copy, "train", read_classes(classes))], EACH[:3])
    result = script(TOOL, *argv)
    assert lines_of(result.out) == expected and result.status == 1
    result = script(TOOL, *argv, "--split", "val")
    assert result.status == 0 and result.out.splitlines()[-1] == "problems: 0"


def test_labels_as_a_whole(script, fields_copy):
    classes = fields_copy / "classes.txt"
    argv = ("--classes", classes, "--datadir", fields_copy, "--workers", 0)
    classes.write_text("background\nobject\n")
    put_masks(fields_copy, {"train": [0, 255], "val": [0, 255]})
    result = script(TOOL, *argv)
    assert lines_of(result.out) == {("labels", str(fields_copy))} and result.status == 1
    assert "no pixel of train is object, and 49" in result.out
    assert script(TOOL, *argv, "--fast").status == 0
    classes.write_text("a\nb\nc\n")
    put_masks(fields_copy, {"train": [0, 1], "val": [0, 2]})
    (fields_copy / "labels/train/0.png").write_bytes(b"")
    # The label of an image that cannot be trained on does not count either.
    Image.new("L", (80, 90), 2).save(fields_copy / "labels/train/1.png")
    (fields_copy / "images/train/1.jpg").write_bytes(b"")
    result = script(TOOL, *argv)
    assert {name for name, _ in lines_of(result.out)} == {"unreadable", "labels"}
    assert "classes without a pixel in train: c" in result.out
    assert "note: classes without a pixel in val: b\n" in result.err
    classes.write_text("a\nb\n")
    put_masks(fields_copy, {"val": [0]})
    result = script(TOOL, *argv, "--split", "val")
    assert result.status == 0 and result.err == "note: classes without a pixel in val: b\n"


def test_each_label_is_decoded_once(script, fields, monkeypatch):
    decoded, read = [], Folder.read_ids
    monkeypatch.setattr(Folder, "read_ids", lambda *args: decoded.append(args[1]) or read(*args))
    argv = ("--classes", fields / "classes.txt", "--datadir", fields, "--workers", 0)
    assert script(TOOL, *argv).status == 0
    assert decoded == [*range(4), *range(2)]


def test_images_of_classes(script, shapes_copy):
    argv = ("--dataset", "imagenet", "--datadir", shapes_copy, "--workers", 0)
    result = script(TOOL, *argv)
    assert result.status == 0 and "checked all of 18 images and 0 labels" in result.out
    path = next((shapes_copy / "val").rglob("*.*g"))
    cut(str(path))
    result = script(TOOL, *argv)
    assert lines_of(result.out) == {("unreadable", str(path))} and result.status == 1
    (shapes_copy / "val/checks").rename(shapes_copy / "val/others")
    result = script(TOOL, *argv)
    assert lines_of(result.out) == {("split not checked", str(shapes_copy))}
    assert "has a class that the network is not trained on (others)" in result.out


def test_fast_is_the_check_of_main(script, cityscapes_copy):
    argv = ("--datadir", cityscapes_copy, "--workers", 0, "--split", "train")
    expected = damage_all([Cityscapes(cityscapes_copy, "train")], ("checksum", "garbled"))
    result = script(TOOL, *argv, "--fast")
    assert lines_of(result.out) == {(n, path) for n, path in expected if "gtFine" in path}
    assert "checked headers and ends of 6 images and 6 labels" in result.out
    assert lines_of(script(TOOL, *argv).out) == expected


def test_missing_splits(script, cityscapes_copy):
    """A download without coarse labels is complete; one without a needed split is not."""
    argv = ("--datadir", cityscapes_copy, "--workers", 0)
    (cityscapes_copy / "gtCoarse").rename(cityscapes_copy / "away")
    result = script(TOOL, *argv)
    assert result.status == 0
    assert "note: train_extra is not there: " in result.err
    (cityscapes_copy / "gtFine/val").rename(cityscapes_copy / "gone")
    result = script(TOOL, *argv)
    assert result.status == 1
    assert lines_of(result.out) == {("split not checked", str(cityscapes_copy))}


def test_mistakes(fails, cityscapes, camvid, fields, tmp_path):
    assert "--datadir" in fails(TOOL)
    assert "nowhere does not exist" in fails(TOOL, "--datadir", "nowhere")
    assert "no folder leftImg8bit/train" in fails(TOOL, "--datadir", camvid)
    argv = ("--datadir", cityscapes, "--split")
    assert "--split none: cityscapes has train, val" in fails(TOOL, *argv, "train", "none")
    assert "needs a file that names its classes; see --classes" in fails(
        TOOL, "--dataset", "folder", "--datadir", fields
    )
    argv = ("--dataset", "camvid", "--datadir", camvid, "--classes", fields / "classes.txt")
    assert "has classes of its own; see --classes" in fails(TOOL, *argv)
    (tmp_path / "empty").mkdir()
    assert "no folder train" in fails(TOOL, "--dataset", "imagenet", "--datadir", "empty")
