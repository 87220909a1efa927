"""tools/check_dataset.py, on a data set with one file of each kind broken."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from test_check import DAMAGES, cut

from datasets.camvid import CamVid
from datasets.cityscapes import Cityscapes
from datasets.folder import Folder, read_classes

TOOL = "tools/check_dataset.py"


def lines_of(out: str) -> set[tuple[str, str]]:
    """The kind and path of each problem that was listed, before the two lines of the summary."""
    return {tuple(line.split(": ")[:2]) for line in out.splitlines()[:-2]}


def damage_all(datasets, names) -> set[tuple[str, str]]:
    """Do each damage to a pair of its own; returns the kinds and paths to be found."""
    pairs = [pair for dataset in datasets for pair in dataset.pairs if pair[0].endswith(".png")]
    expected = set()
    for pair, name in zip(pairs, names, strict=False):
        kind, which, do, _ = DAMAGES[name]
        do(*pair)
        expected.add((kind, pair[which]))
    assert len(expected) == len(names)
    return expected


ONE_OF_EACH = ("no label", "no image", "checksum", "size", "mode", "id", "absurd")


@pytest.mark.parametrize("workers", [0, 2])
def test_all_and_only_those_are_listed_of_cityscapes(script, cityscapes_copy, workers):
    names = (*ONE_OF_EACH, "cut image", "half a label")
    splits = [Cityscapes(cityscapes_copy, split) for split in ("train", "train_extra")]
    expected = damage_all(splits, names)
    result = script(TOOL, "--datadir", cityscapes_copy, "--workers", workers)
    # What is wrong with an image of train concerns both its fine and its coarse labels.
    coarse = {(kind, path) for kind, path in lines_of(result.out) if "gtCoarse/train/" in path}
    assert lines_of(result.out) - coarse == expected and result.status == 1
    assert {kind for kind, _ in coarse} == {"label without image"}
    *_, checked, problems = result.out.splitlines()
    assert re.fullmatch(r"checked all of \d+ images and \d+ labels, \d+ images/s", checked)
    assert re.fullmatch(r"problems: \d+ \(.*\)", problems) and "wrong size: 1" in problems


def test_all_and_only_those_are_listed_of_camvid(script, camvid_copy):
    splits = [CamVid(camvid_copy, split) for split in ("train", "val")]
    expected = damage_all(splits, ONE_OF_EACH)
    argv = ("--dataset", "camvid", "--datadir", camvid_copy, "--workers", 0)
    result = script(TOOL, *argv)
    assert lines_of(result.out) == expected and result.status == 1
    assert "problems: 7 (" in result.out  # once each, though trainval holds train and val
    result = script(TOOL, *argv, "--split", "test")
    assert result.status == 0 and lines_of(result.out) == set()


@pytest.mark.parametrize("names", [ONE_OF_EACH[:3], ONE_OF_EACH[3:6], ONE_OF_EACH[6:]])
def test_all_and_only_those_are_listed_of_a_folder(script, fields_copy, names):
    classes = read_classes(fields_copy / "classes.txt")
    argv = ("--classes", fields_copy / "classes.txt", "--datadir", fields_copy, "--workers", 0)
    assert script(TOOL, *argv).status == 0
    expected = damage_all([Folder(fields_copy, "train", classes)], names)
    result = script(TOOL, *argv)
    assert lines_of(result.out) == expected and result.status == 1
    result = script(TOOL, *argv, "--split", "val")
    assert result.status == 0 and result.out.splitlines()[-1] == "problems: 0"


def test_images_of_classes(script, shapes_copy):
    argv = ("--dataset", "imagenet", "--datadir", shapes_copy, "--workers", 0)
    result = script(TOOL, *argv)
    assert result.status == 0 and "checked all of 18 images and 0 labels" in result.out
    path = next((shapes_copy / "val").rglob("*.*g"))
    cut(str(path))
    result = script(TOOL, *argv)
    assert lines_of(result.out) == {("unreadable", str(path))} and result.status == 1


def test_a_class_that_train_lacks_is_told(script, shapes_copy):
    (shapes_copy / "val/checks").rename(shapes_copy / "val/others")
    argv = ("--dataset", "imagenet", "--datadir", shapes_copy, "--workers", 0)
    result = script(TOOL, *argv)
    assert lines_of(result.out) == {("split not checked", str(shapes_copy))}
    assert "has a class that the network is not trained on (others)" in result.out


def test_fast_looks_at_headers_and_ends(script, cityscapes_copy):
    argv = ("--datadir", cityscapes_copy, "--workers", 0, "--split", "train")
    expected = damage_all([Cityscapes(cityscapes_copy, "train")], ("checksum", "cut image"))
    result = script(TOOL, *argv, "--fast")
    assert lines_of(result.out) == {(k, p) for k, p in expected if "leftImg8bit" in p}
    assert "checked headers and ends of 6 images and 6 labels" in result.out
    assert lines_of(script(TOOL, *argv).out) == expected


def test_what_is_not_there(script, cityscapes_copy):
    """A download without coarse labels is whole; one without a needed split is not."""
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
    assert "needs --classes FILE" in fails(TOOL, "--dataset", "folder", "--datadir", fields)
    argv = ("--dataset", "camvid", "--datadir", camvid, "--classes", fields / "classes.txt")
    assert "leave --classes out" in fails(TOOL, *argv)
    (tmp_path / "empty").mkdir()
    assert "no folder train" in fails(TOOL, "--dataset", "imagenet", "--datadir", "empty")


@pytest.mark.parametrize("kind", ["absurd", "text chunks"])
def test_refusing_takes_no_memory(cityscapes_copy, kind):
    """Where 512 MB more than the libraries need are all there is."""
    pair = Cityscapes(cityscapes_copy, "train").pairs[0]
    if kind == "absurd":
        DAMAGES["absurd"][2](*pair)
    else:
        from PIL.PngImagePlugin import PngInfo

        texts = PngInfo()
        for number in range(100):  # half a gigabyte, once it is uncompressed
            texts.add_text(f"text {number}", "0" * 5_000_000, zip=True)
        Image.new("RGB", (128, 64)).save(pair[0], pnginfo=texts)
    code = (
        "import resource, sys\n"
        "from datasets.check import check_headers\n"
        "from datasets.images import DatasetError, read_image\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))\n"
        "for read in (read_image, lambda path: check_headers([(path, None)])):\n"
        "    try:\n"
        "        read(sys.argv[1])\n"
        "    except DatasetError as error:\n"
        "        print(error)\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    )
    argv = [sys.executable, "-c", code, pair[0]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=120)
    lines = result.stdout.splitlines()
    assert len(lines) == 2 and all(pair[0] in line for line in lines), result
    assert "MemoryError" not in result.stdout
    assert ("absurd size" if kind == "absurd" else "too large") in lines[0], lines
    assert Path(pair[0]).exists()
