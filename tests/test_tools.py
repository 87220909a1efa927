import json
import re

import numpy as np
from PIL import Image

from datasets.cityscapes import Cityscapes


def test_color_baseline_reads_classes_off_unique_colors(script, cityscapes_copy):
    """Where every class has one colour of its own, colour alone tells all but unseen classes."""
    for split in ("train", "val"):
        dataset = Cityscapes(cityscapes_copy, split)
        for index, (path, _) in enumerate(dataset.pairs):
            train_ids = dataset.read_train_ids(index)
            color = np.stack([train_ids, train_ids * 0, train_ids * 0], -1)
            Image.fromarray(color).save(path)
    result = script("tools/color_baseline.py", "--datadir", cityscapes_copy)
    assert result.status == 0
    scores = [float(score) for score in re.findall(r"class mIoU +([\d.]+) %", result.out)]
    assert len(scores) == 4 and scores[0] > 75 and scores[0] > scores[-1]


def test_color_baseline_fails_on_drawn_scenes(script, cityscapes):
    result = script("tools/color_baseline.py", "--datadir", cityscapes)
    scores = [float(score) for score in re.findall(r"class mIoU +([\d.]+) %", result.out)]
    assert len(scores) == 4 and max(scores) < 30


def test_strips_are_drawn(script, fails, trained, cityscapes, tmp_path):
    argv = ("--checkpoint", trained / "best.pth", "--datadir", cityscapes, "--images", 0, 2)
    assert script("tools/draw_strips.py", *argv, "--output", "strips.png").status == 0
    with Image.open(tmp_path / "strips.png") as picture:
        assert picture.size == (3 * 128, 2 * 64)
    line = fails("tools/draw_strips.py", *argv, "--output", "strips.png")
    assert "strips.png exists" in line
    argv = (*argv, 3, "--output", "more.png")
    assert "val holds the images 0 to 2" in fails("tools/draw_strips.py", *argv)


def test_loaders_are_compared(script, shapes):
    argv = ("--datadir", shapes, "--size", 32, "--images", 4, "--turns", 1)
    result = script("tools/loader_speed.py", *argv)
    assert result.status == 0
    assert "4 images of train: plain" in result.out
    assert "0 wide images and 4 enlarged ones: plain" in result.out
    ratios = [float(ratio) for ratio in re.findall(r"([\d.]+) times as many", result.out)]
    assert len(ratios) == 2 and min(ratios) > 0
    differences = [float(x) for x in re.findall(r"([\d.]+) of 255", result.out)]
    assert len(differences) == 4 and max(differences) < 30 and differences[0] < 2


def test_training_is_measured_with_a_cache_and_without(script, fails, cityscapes, tmp_path):
    argv = ("--datadir", cityscapes, "--height", 64, "--images", 5, "--batch-size", 2)
    argv = ("tools/training_speed.py", *argv, "--turns", 1, "--json", "figures.json")
    result = script(*argv)
    assert result.status == 0, result.err
    assert "5 images of 128x64 in batches of 2" in result.out
    assert re.search(r"loader, one core +images/s +ratio\n  decoding +[\d.]+ +1.00\n", result.out)
    assert re.search(r"  plain, decoding +[\d.]+ +1.00\n", result.out)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["loader"]) == ["decoding", "--cache ram", "--cache DIR"]
    assert list(figures["training"]) == ["plain, decoding", *figures["loader"]]
    assert min([*figures["loader"].values(), *figures["training"].values()]) > 0
    assert "figures.json exists" in fails(*argv)
    assert "has 5 images to train on" in fails(*argv[:-2], "--batch-size", 6)
    assert not list(tmp_path.glob("*.bin"))
