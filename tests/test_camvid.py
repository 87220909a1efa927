import json
from itertools import chain

import numpy as np
import pytest
from conftest import read_log, run_script
from PIL import Image

from datasets.camvid import CamVid
from datasets.cityscapes import Cityscapes
from datasets.images import DatasetError
from utils.checkpoint import load_checkpoint

QUICK = ("--preset", "camvid", "--height", 72, "--crop", 64, 64, "--batch-size", 2, "--D", 4)
QUICK += ("--epochs", 1, "--workers", 0)
EVAL = "eval_cityscapes_server.py"


def test_class_table():
    classes = CamVid.CLASSES
    assert len(classes) == 11 and len(classes.colors) == len(set(classes.colors)) == 11
    assert classes.names[0] == "Sky" and classes.names[3] == "Road"
    assert classes.colors[8] == (64, 0, 128) and classes.names[8] == "Car"
    expected = [*range(11), 255, *[254] * 243, 255]  # 11 is unlabelled
    assert classes.to_train_ids().tolist() == expected


def test_every_class_of_cityscapes_is_a_part_of_one():
    parts = list(chain.from_iterable(CamVid.CLASSES.related.values()))
    assert sorted(parts) == sorted(Cityscapes.CLASSES.names)
    assert list(CamVid.CLASSES.related) == list(CamVid.CLASSES.names)


def test_splits_are_pairs_of_two_folders(camvid):
    for split, count in {"train": 6, "val": 3, "test": 2}.items():
        pairs = CamVid(camvid, split).pairs
        assert len(pairs) == count and pairs == sorted(pairs)
        for image, label in pairs:
            stem = image.removeprefix(f"{camvid}/{split}/").rsplit(".", 1)[0]
            assert label == f"{camvid}/{split}annot/{stem}.png"
        assert any(image.endswith(".jpg") for image, _ in pairs)


def test_trainval_is_both(camvid):
    parts = [CamVid(camvid, split).pairs for split in ("train", "val")]
    assert CamVid(camvid, "trainval").pairs == parts[0] + parts[1]
    assert CamVid.TRAIN_ON == {"train": ["train"], "trainval": ["trainval"]}


def test_items(camvid):
    train, ignored = CamVid(camvid, "train"), 0
    for index, (_, path) in enumerate(train.pairs):
        image, label = train[index]
        assert image.shape == (3, 72, 96) and label.shape == (72, 96)
        stored = np.array(Image.open(path))
        assert (label.numpy()[stored == 11] == 255).all()
        assert (label.numpy()[stored < 11] == stored[stored < 11]).all()
        ignored += (stored == 11).sum()
    assert ignored > 0


def test_missing_folders_are_named(camvid_copy):
    (camvid_copy / "valannot").rename(camvid_copy / "away")
    with pytest.raises(DatasetError, match="valannot does not exist"):
        CamVid(camvid_copy, "trainval")
    with pytest.raises(DatasetError, match="test does not exist"):
        (camvid_copy / "test").rename(camvid_copy / "nowhere")
        CamVid(camvid_copy, "test")


# Training and scoring


@pytest.fixture(scope="module")
def run_folder(camvid, tmp_path_factory):
    """The folder of a short run on CamVid by its own preset; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "camvid"
    argv = ("--dataset", "camvid", "--datadir", camvid, *QUICK, "--savedir", folder)
    assert run_script("main.py", *argv) == 0
    return folder


def test_a_checkpoint_describes_its_data(run_folder):
    best = load_checkpoint(run_folder / "best.pth")
    assert best["dataset"] == "camvid" and best["class_names"] == list(CamVid.CLASSES.names)
    assert best["label_ids"] == list(range(11)) and best["ignored_ids"] == [11]
    assert best["categories"] == [] and best["height"] == 72 and best["train_images"] == 6
    assert best["model"]["decoder.classifier.weight"].shape[0] == 11
    args = json.loads((run_folder / "args.json").read_text())
    assert args["train_on"] == "train" and args["cache"] == "ram" and args["ema"] is True
    counts = json.loads((run_folder / "class_counts.json").read_text())
    assert list(counts) == [*CamVid.CLASSES.names, "ignored"]
    assert sum(counts.values()) == 6 * 72 * 96 and counts["ignored"] > 0
    (row,) = read_log(run_folder)
    assert row["stage"] == "2" and "iou Bicyclist" in row


def test_a_network_is_scored_as_its_checkpoint_says(run_folder, script, camvid, tmp_path):
    argv = ("--checkpoint", run_folder / "best.pth", "--datadir", camvid, "--json", "f.json")
    result = script(EVAL, *argv, "--save-results", "out", "--workers", 0)
    assert result.status == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["images"] == 3 and list(figures["class_iou"]) == list(CamVid.CLASSES.names)
    assert "class IoU in %" in result.out
    assert "categor" not in result.out and "category_miou" not in figures
    assert (figures["input_height"], figures["input_width"]) == (72, 96)
    best = load_checkpoint(run_folder / "best.pth")["best"]
    assert figures["class_miou"] == pytest.approx(best["miou"], abs=1e-3)

    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [f"0001TP_00000{number}.png" for number in range(3)]
    hits = pixels = 0
    for name in written:
        with Image.open(tmp_path / "out" / name) as label:
            assert label.size == (96, 72) and label.mode == "L"
            found = np.array(label)
        assert found.max() <= 10
        truth = np.array(Image.open(camvid / "valannot" / name))
        hits += (found == truth).sum()
        pixels += (truth < 11).sum()
    assert figures["pixel_accuracy"] == pytest.approx(hits / pixels, abs=1e-12)


def test_other_splits_are_scored(run_folder, script, fails, camvid):
    argv = ("--checkpoint", run_folder / "best.pth", "--datadir", camvid, "--workers", 0)
    assert "scoring 2 images of test" in script(EVAL, *argv, "--subset", "test").out
    assert "scoring 9 images of trainval" in script(EVAL, *argv, "--subset", "trainval").out
    assert "camvid has no split train_extra, only train" in fails(
        EVAL, *argv, "--subset", "train_extra"
    )


def test_training_learns_its_images(script, camvid, tmp_path):
    """Through scaling, cropping, flips and jitter; with labels that are flipped again, it stays
    below 0.06."""
    argv = ("--dataset", "camvid", "--datadir", camvid, *QUICK, "--epochs", 14, "--val-every", 14)
    easy = ("--batch-size", 6, "--D", 20, "--dropout", 0, "--jitter", 0.1, "--scale", 0.9, 1.1)
    recipe = ("--lr", 0.01, "--iouTrain", "--savedir", "a")
    assert script("main.py", *argv, *easy, *recipe).status == 0
    rows = [float(row["train_miou"]) for row in read_log(tmp_path / "save/a")]
    assert rows[0] < 0.04 and max(rows) > 0.08, rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--dataset camvid needs --datadir, the folder of the data set"),
        (
            ("--datadir", "here", "--classes", "a.txt"),
            "has classes of its own; see --classes",
        ),
        (
            ("--datadir", "here", "--train-on", "coarse"),
            "--train-on coarse: camvid has train and trainval",
        ),
        (("--datadir", "here"), "here does not exist"),
    ],
)
def test_wrong_options(fails, tmp_path, options, message):
    assert message in fails("main.py", "--dataset", "camvid", *QUICK, *options, "--savedir", "a")
    assert not (tmp_path / "save").exists()
