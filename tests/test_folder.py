import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ASCII, FIELD_SIZES, ROOT, read_log, run_script, same_weights
from PIL import Image

from datasets.class_file import read_classes
from datasets.folder import Folder
from datasets.images import DatasetError
from utils.checkpoint import load_checkpoint


def test_splits_are_pairs_of_two_folders(fields):
    classes = read_classes(fields / "classes.txt")
    for split, sizes in FIELD_SIZES.items():
        dataset = Folder(fields, split, classes)
        assert len(dataset) == len(sizes) == len(dataset.pairs)
        for index, (image, label) in enumerate(dataset.pairs):
            assert image.startswith(f"{fields}/images/{split}/{index}.")
            assert label == f"{fields}/labels/{split}/{index}.png"
            assert dataset[index][1].shape == sizes[index]
            stored = np.array(Image.open(label))
            assert (dataset[index][1].numpy() == classes.to_train_ids()[stored]).all()


def test_test_may_come_without_labels(fields_copy):
    classes = read_classes(fields_copy / "classes.txt")
    (fields_copy / "images/val").rename(fields_copy / "images/test")
    test = Folder(fields_copy, "test", classes)
    assert [label for _, label in test.pairs] == [None, None]
    assert (test[0][1] == 255).all() and test[0][1].shape == (72, 96)
    (fields_copy / "labels/val").rename(fields_copy / "labels/test")
    assert (Folder(fields_copy, "test", classes)[0][1] != 255).any()


def test_train_needs_its_labels(fields_copy):
    (fields_copy / "labels/train").rename(fields_copy / "labels/away")
    with pytest.raises(DatasetError, match="labels/train does not exist"):
        Folder(fields_copy, "train", read_classes(fields_copy / "classes.txt"))


def test_an_image_without_its_label_is_named(fields_copy):
    classes, missing = read_classes(fields_copy / "classes.txt"), fields_copy / "labels/train/2.png"
    missing.unlink()
    message = f"1 of 4 images of train have no label, first missing: {missing} .*; unpack"
    with pytest.raises(DatasetError, match=message):
        Folder(fields_copy, "train", classes)
    assert len(Folder(fields_copy, "train", classes, need_labels=False)) == 4


# Training and scoring

QUICK = ("--preset", "camvid", "--height", 72, "--crop", 64, 64, "--batch-size", 2, "--D", 4)
QUICK += ("--epochs", 1, "--workers", 0)


def argv_of(root, *options) -> tuple:
    return ("--datadir", root, "--classes", root / "classes.txt", *QUICK, *options)


@pytest.fixture(scope="module")
def run_folder(fields, tmp_path_factory):
    """The folder of a short run on images of several sizes; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "fields"
    assert run_script("main.py", *argv_of(fields, "--savedir", folder)) == 0
    return folder


def test_a_checkpoint_describes_its_data(run_folder):
    best = load_checkpoint(run_folder / "best.pth")
    assert best["dataset"] == "folder" and best["class_names"] == ["grass", "water", "dirt road"]
    assert best["label_ids"] == [0, 1, 3] and best["ignored_ids"] == [2]
    assert best["colors"][0] == [90, 160, 60] and len(best["colors"]) == 3
    assert best["model"]["decoder.classifier.weight"].shape[0] == 3
    counts = json.loads((run_folder / "class_counts.json").read_text())
    assert list(counts) == ["grass", "water", "dirt road", "ignored"]
    assert sum(counts.values()) == sum(height * width for height, width in FIELD_SIZES["train"])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_images_of_several_sizes_are_scored(run_folder, script, fields, tmp_path, batch_size):
    argv = ("--checkpoint", run_folder / "best.pth", "--datadir", fields, "--json", "f.json")
    argv += ("--save-results", "out", "--workers", 0, "--batch-size", batch_size)
    result = script("eval_cityscapes_server.py", *argv)
    assert result.status == 0, result.err
    figures = json.loads((tmp_path / "f.json").read_text())
    assert list(figures["class_iou"]) == ["grass", "water", "dirt road"]
    best = load_checkpoint(run_folder / "best.pth")["best"]
    assert figures["class_miou"] == pytest.approx(best["miou"], abs=1e-3)
    for name, size in zip(("0.png", "1.png"), FIELD_SIZES["val"], strict=True):
        found = np.array(Image.open(tmp_path / "out" / name))
        assert found.shape == size and set(np.unique(found)) <= {0, 1, 3}


def test_fine_tuning_from_other_classes(trained, script, fields, tmp_path):
    argv = argv_of(fields, "--init", trained / "best.pth", "--D", 20, "--lr", 1e-9)
    result = script("main.py", *argv, "--savedir", "a")
    assert result.status == 0, result.err
    assert "best.pth: the network is loaded; it knows 0 of the 3 classes" in result.out
    tuned = load_checkpoint(tmp_path / "save/a/best.pth")
    assert tuned["class_names"] == ["grass", "water", "dirt road"]
    start = load_checkpoint(trained / "best.pth")["model"]
    # All else began as it was: so small a rate changes hardly anything.
    name = "encoder.3.left.0.weight"
    assert abs(tuned["model"][name] - start[name]).max() < 1e-6
    assert tuned["model"]["decoder.classifier.weight"].shape[0] == 3


def test_a_resumed_run_keeps_its_classes(run_folder, script, fields_copy, tmp_path):
    """Whatever their file says by then; and comes to the same weights."""
    argv = argv_of(fields_copy, "--epochs", 2, "--savedir", tmp_path / "a")
    assert script("main.py", *argv).status == 0
    weights = load_checkpoint(tmp_path / "a/last.pth")["model"]
    (tmp_path / "a/last.pth").unlink()
    (fields_copy / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    result = script("main.py", *argv, "--resume")
    assert result.status == 0, result.err
    stored = load_checkpoint(tmp_path / "a/last.pth")
    assert stored["class_names"] == ["grass", "water", "dirt road"]
    assert same_weights(stored["model"], weights)


def test_names_of_any_script_are_trained_on_in_any_locale(fields_copy, tmp_path):
    """Names of classes, files and folders."""
    (fields_copy / "classes.txt").write_text("Straße\nводa\nignore\n道路\n", encoding="utf-8")
    folder = fields_copy.rename(tmp_path / "Äcker")
    for path in (folder / "images/val").iterdir():
        label = folder / f"labels/val/{path.stem}.png"
        label.rename(label.with_stem(f"ß{path.stem}"))
        path.rename(path.with_stem(f"ß{path.stem}"))
    env = os.environ | ASCII
    argv = argv_of(folder, "--savedir", "läufe/1", "--epochs", 1)
    for more in (("--cache", "häcker"), ("--resume",)):
        command = [sys.executable, ROOT / "main.py", *argv, *more]
        result = subprocess.run(
            [*map(str, command)], cwd=tmp_path, env=env, capture_output=True, encoding="utf-8"
        )
        assert result.returncode == 0, result.stderr
        assert "Straße" in result.stdout
    assert {"iou Straße", "iou 道路"} <= read_log(tmp_path / "läufe/1")[0].keys()


def test_refused_runs_leave_no_folder(fails, fields_copy, tmp_path):
    """The other mistakes are those of open_splits and read_classes."""
    Image.new("RGB", (96, 72)).save(fields_copy / "images/train/0.jpg")
    argv = argv_of(fields_copy, "--savedir", "refused")
    assert "holds 0 twice" in fails("main.py", *argv)
    (fields_copy / "images/train/0.jpg").unlink()
    (fields_copy / "labels/val/1.png").unlink()
    assert "first missing: " in fails("main.py", *argv)
    assert "none.txt cannot be read" in fails("main.py", *argv, "--classes", "none.txt")
    assert not (tmp_path / "save").exists()
