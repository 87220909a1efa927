"""What the README says about data sets of one's own is run as it stands there."""

import re
import types

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from datasets import DATASETS

TINY = ("--preset", "camvid", "--height", 64, "--crop", 64, 64, "--epochs", 1, "--batch-size", 2)
TINY += ("--workers", 0)


def blocks(section: str, language: str) -> list[str]:
    """The code blocks of a language in a section of the README."""
    text = (ROOT / "README.md").read_text()
    text = text[text.index(f"\n## {section}\n") :].split("\n## ")[1]
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [code for of, code in found if of == language]


def draw(path, size, values=None):
    """A noisy picture, or a label map of stripes of some values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, (width, height) = np.random.default_rng(0), size
    if values is None:
        Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8)).save(path)
    else:
        stripes = np.repeat(np.array(values, np.uint8), -(-height // len(values)))[:height]
        Image.fromarray(np.repeat(stripes[:, None], width, 1)).save(path)


def test_your_own_data_without_code(script, tmp_path):
    (classes,) = blocks("Your own data", "")
    (tmp_path / "classes.txt").write_text(classes)
    for split, count in (("train", 3), ("val", 2)):
        for number in range(count):
            size = (90 + 7 * number, 70 + number)
            draw(tmp_path / f"mydata/images/{split}/{number}.png", size)
            draw(tmp_path / f"mydata/labels/{split}/{number}.png", size, [0, 1, 2, 3, 255])
    (commands,) = blocks("Your own data", "sh")
    train, score, predict = commands.replace("\\\n", "").splitlines()
    argv = train.replace("weights/", f"{ROOT}/weights/").split()[2:]
    result = script("main.py", *argv, *TINY)
    assert result.status == 0 and "decoder.classifier.weight" in result.out
    result = script("eval_cityscapes_server.py", *score.split()[2:], "--workers", 0)
    assert result.status == 0 and "IoU of the 3 classes" in result.out
    assert re.search(r"traffic light +[\d.]+", result.out)
    draw(tmp_path / "pictures/a.png", (80, 70))
    assert script("predict.py", *predict.split()[2:], "--workers", 0).status == 0
    labels = np.asarray(Image.open(tmp_path / "results/pictures/labels/a.png"))
    assert set(np.unique(labels)) <= {0, 1, 2}


@pytest.fixture
def rooms(tmp_path, monkeypatch):
    """The example's module, entered as the README says, and data for it."""
    (code, *_) = blocks("Your own data", "python")
    assert len(code.splitlines()) <= 30
    module = types.ModuleType("rooms")
    exec(compile(code, "rooms.py", "exec"), module.__dict__)
    monkeypatch.setitem(DATASETS, "rooms", module.Rooms)
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            draw(tmp_path / f"rooms/{split}/{number}_rgb.png", (80, 64))
            draw(tmp_path / f"rooms/{split}/{number}_ids.png", (80, 64), [1, 2, 5, 0])
    return tmp_path / "rooms"


def test_a_data_set_of_thirty_lines(script, fails, rooms, tmp_path):
    argv = ("--dataset", "rooms", "--datadir", rooms, *TINY, "--D", 4)
    assert script("main.py", *argv, "--savedir", "a").status == 0
    argv = ("--checkpoint", "save/a/best.pth", "--datadir", rooms, "--workers", 0)
    result = script("eval_cityscapes_server.py", *argv, "--save-results", "out")
    assert result.status == 0 and "IoU of the 3 classes" in result.out
    labels = np.asarray(Image.open(tmp_path / "out/0_rgb.png"))
    assert labels.shape == (64, 80) and set(np.unique(labels)) <= {1, 2, 5}
    draw(rooms / "val/1_ids.png", (80, 64), [1, 4])
    line = fails("main.py", "--dataset", "rooms", "--datadir", rooms, *TINY, "--savedir", "b")
    assert "val/1_ids.png holds the label id 4" in line and "0 to 2, 5" in line
