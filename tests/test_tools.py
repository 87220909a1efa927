import json
import re

import numpy as np
import pytest
from conftest import ROOT
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


def test_benchmark_runs_every_form(script, tmp_path):
    argv = ("--quick", "--seconds", 0.1, "--networks", "LEDNet D = 20")
    result = script("tools/benchmark.py", *argv)
    assert result.status == 0, result.err
    line = result.out.splitlines()[-1]
    assert line.startswith("LEDNet D = 20, 1 x 128x64, logits, ms: ") and "failed" not in line
    for form in ("eager", "eager half", "compiled", "onnx", "deployed", "reference"):
        assert re.search(rf"[ (]{form} [\d.]+[, ]", line), form
    assert not list(tmp_path.iterdir())


def test_page_of_benchmarks_is_that_of_its_figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    from benchmark_page import PAGE, RESULTS, page

    assert PAGE.read_text() == page()
    figures = json.loads((RESULTS / "cpu.json").read_text())
    for row in figures["speed"]:
        for form in row["forms"].values():
            if "failed" not in form:
                ratio = row["reference_ms"] / form["median_ms"]
                assert form["ratio"] == pytest.approx(ratio)


def test_evaluation_is_compared(script):
    result = script("tools/evaluation_speed.py", "--device", "cpu", "--images", 2)
    assert result.status == 0
    assert float(re.search(r"([\d.]+) times as many", result.out)[1]) > 0


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
