"""What open_splits and read_classes_for give the training programs."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIELD_SIZES, pretend_processes
from PIL import Image

from datasets import Data, open_splits, read_classes_for
from datasets.cache import CacheTooLarge
from datasets.images import BrokenFiles, DatasetError, FileError
from datasets.loading import ShuffledSeeds, batch_loader
from datasets.transforms import Augment, Paper, Strong, normalizer
from utils.errors import UserError

CPU = torch.device("cpu")


def options(dataset: str, datadir: Path, **changes) -> Namespace:
    classes = datadir / "classes.txt" if dataset == "folder" else None
    train_on = "fine" if dataset in ("cityscapes", "synthetic") else "train"
    values = {"dataset": dataset, "datadir": str(datadir), "classes": classes, "height": 72}
    values |= {"train_on": train_on, "augment": "paper", "crop": None, "scale": [0.5, 2.0]}
    others = {"soft_labels": None, "cache": "off", "workers": 0, "skip_broken": False}
    return Namespace(**(values | others | changes))


def opened(args: Namespace, **more) -> Data:
    return open_splits(args, read_classes_for(args), CPU, **more)


STRONG = {"augment": "strong", "crop": [64, 64]}


def test_data_of_several_parts(cityscapes):
    data = opened(options("cityscapes", cityscapes, height=64, train_on="fine+coarse"))
    parts = "6 of train + 3 of train_extra to train on"
    assert data.summary == f"{parts}, 3 of val to validate, 19 classes"
    assert len(data.train) == len(data.train_files) == 9 and len(data.val) == 3
    for (image, label), (path, label_path) in zip(data.train, data.train_files, strict=True):
        assert (image.numpy() == np.array(Image.open(path)).transpose(2, 0, 1)).all()
        assert label.shape == Image.open(label_path).size[::-1]
    assert "train_extra" in data.train_files[6][0] and "gtCoarse" in data.train_files[6][1]
    assert data.size == (64, 128) and isinstance(data.augment, Paper)
    assert list(data.counts) == [*data.classes.names, "ignored"]
    assert sum(data.counts.values()) == 9 * 64 * 128
    assert not data.trains_on_val and not data.pin_memory and data.workers == 0


def test_images_are_resized_and_labels_of_val_are_not(camvid):
    data = opened(options("camvid", camvid, height=64, workers=2))
    assert data.size == (64, 85) and data.workers == 2
    assert data.train[0][0].shape == (3, 64, 85) and data.train[0][1].shape == (64, 85)
    assert data.val[0][0].shape == (3, 64, 85) and data.val[0][1].shape == (72, 96)


def test_training_on_val_is_noticed(camvid, fields):
    data = opened(options("camvid", camvid, train_on="trainval"))
    assert data.summary == "9 of trainval to train on, 3 of val to validate, 11 classes"
    assert data.trains_on_val
    data = opened(options("folder", fields, train_on="trainval", **STRONG))
    assert data.summary.startswith("4 of train + 2 of val to train on") and data.trains_on_val


def test_crops_are_of_one_size(fields):
    data = opened(options("folder", fields, **STRONG))
    assert data.size == (64, 64) and data.augment.size == (64, 64)
    assert isinstance(data.augment, Strong) and data.augment.scale == (0.5, 2.0)
    assert len({image.shape for image, _ in data.train}) > 1
    assert sum(data.counts.values()) == sum(h * w for h, w in FIELD_SIZES["train"])


def test_images_of_several_sizes_need_crops(fields):
    message = "at a height of 72, .* are 64 to 115 wide"
    for changes in ({}, {"augment": "strong"}, {"crop": [72, 64]}):
        with pytest.raises(UserError, match=message):
            opened(options("folder", fields, **changes))
    assert opened(options("folder", fields, augment="strong", crop=[72, 64])).size == (72, 64)


def test_images_must_not_be_too_small(cityscapes_copy):
    for path in cityscapes_copy.rglob("*.png"):
        with Image.open(path) as image:
            image.crop((0, 0, 32, 64)).save(path)
    with pytest.raises(UserError, match="become 32x64 at a height of 64: LEDNet needs 64x64"):
        opened(options("cityscapes", cityscapes_copy, height=64))


def test_each_process_needs_two_images(camvid, monkeypatch):
    args = options("camvid", camvid)
    pretend_processes(monkeypatch, 3)
    assert len(opened(args).train) == 6
    pretend_processes(monkeypatch, 4)
    message = "too few training images, 6: give 2 in each of 4 processes"
    with pytest.raises(UserError, match=message):
        opened(args)


@pytest.mark.parametrize("split", ["train", "val"])
def test_unknown_label_ids_are_found_before_training(fields_copy, split):
    path = fields_copy / f"labels/{split}/1.png"
    label = np.array(Image.open(path))
    label[5, 6] = 9
    Image.fromarray(label).save(path)
    with pytest.raises(FileError, match=rf"{split}/1.png holds the label id 9, which is not a cla"):
        opened(options("folder", fields_copy, **STRONG))


def put_masks(root: Path, values: dict[str, list[int]], palettes: list | None = None) -> None:
    """Replace the labels of the splits: blocks of these values, and a different share of each."""
    for split, kinds in values.items():
        for number, path in enumerate(sorted((root / "labels" / split).iterdir())):
            with Image.open(path) as image:
                width, height = image.size
            columns = np.resize(np.repeat(kinds, 3), width).astype(np.uint8)
            label = Image.fromarray(np.tile(columns, (height, 1)))
            if palettes:
                label.putpalette(np.array(palettes[number % len(palettes)], np.uint8).tobytes())
            label.save(path)


@pytest.mark.parametrize(
    ("classes", "values", "message"),
    [
        (
            "background\nobject\n",
            {"train": [0, 255], "val": [0, 255]},
            "no pixel of train is object, and 49.* are 255, which is ignored: are these masks of 0 "
            r"and 255\? In .*classes.txt, `255 object` in place of `object` makes 255 that class",
        ),
        (
            "road 255 255 255\nground 0 0 0\n",
            {"train": [0, 255], "val": [0, 255]},
            "`255 road` in place of `road` makes 255 that class",
        ),
        ("0 a\n1 b\n2 c\n", {"train": [0, 1, 255], "val": [0, 1]}, "no pixel of train is c, and"),
        ("a\nb\nvoid\n", {"train": [0, 255], "val": [0, 1]}, "no pixel of train is b, and"),
        ("a\nb\n", {"train": [0, 1], "val": [0, 255]}, "no pixel of val is b, and"),
        ("a\nb\n", {"train": [255], "val": [0, 1]}, "all labels of train are ignored"),
        ("void\na\nb\n", {"train": [0], "val": [1, 2]}, "all labels of train are ignored"),
        ("a\nb\nvoid\n", {"train": [0, 1], "val": [2]}, "all labels of val are ignored"),
        ("a\nb\n", {"train": [0], "val": [0, 1]}, "only a has pixels in train: two classes are"),
    ],
)
def test_labels_that_teach_nothing_are_refused(fields_copy, classes, values, message):
    (fields_copy / "classes.txt").write_text(classes)
    put_masks(fields_copy, values)
    with pytest.raises(DatasetError, match=message):
        opened(options("folder", fields_copy, **STRONG))


@pytest.mark.parametrize(
    ("classes", "counted"),
    [
        ("background\n255 object\n", ["background", "object"]),
        ("0 background\n1 object\n2 other\n255 void\n", ["background", "ignored"]),
    ],
)
def test_255_is_what_the_file_of_classes_says(fields_copy, classes, counted, capsys):
    (fields_copy / "classes.txt").write_text(classes)
    values = [0, 255] if "object" in counted else [0, 1, 255]
    put_masks(fields_copy, {"train": values, "val": values})
    data = opened(options("folder", fields_copy, **STRONG))
    assert all(data.counts[name] > 0 for name in counted)
    assert ("without a pixel" in capsys.readouterr().out) == ("other" in classes)


def test_classes_without_a_pixel_are_named(fields_copy, capsys):
    (fields_copy / "classes.txt").write_text("a\nb\nc\nd\n")
    put_masks(fields_copy, {"train": [0, 1, 2], "val": [0, 3]})
    opened(options("folder", fields_copy, **STRONG))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: classes without a pixel in train: d",
        "note: classes without a pixel in val: b, c",
    ]


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
CREAM, BROWN = (250, 240, 200), (120, 70, 10)


def test_palettes_of_other_colours_are_told(fields_copy, capsys):
    (fields_copy / "classes.txt").write_text("a 9 9 8\nb\n")
    values = {"train": [0, 1], "val": [0, 1]}
    put_masks(fields_copy, values, [[RED, GREEN]])
    assert opened(options("folder", fields_copy, **STRONG)).counts["b"] > 0
    note = "note: (255, 0, 0) is the colour of 0 in a palette, not (9, 9, 8): the indices"
    assert capsys.readouterr().out.count(note) == 1
    (fields_copy / "classes.txt").write_text("a 0 255 0\nb 255 0 0\n")
    put_masks(fields_copy, values, [[RED, GREEN], [GREEN, RED]])
    opened(options("folder", fields_copy, **STRONG))
    assert "palette" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("palettes", "message"),
    [
        ([[RED, GREEN, BLUE], [RED, BLUE, GREEN]], r"1 is \(0, 255, 0\) in the .*/0.png and"),
        # An order that no two files share a colour of.
        (
            [[RED, GREEN, BLUE], [RED, CREAM, BROWN]],
            r"1 is \(0, 255, 0\) in the .*/0.png and",
        ),
        ([[RED, GREEN, BLUE], [CREAM, GREEN, BLUE]], r"0 is \(255, 0, 0\) in the .*/0.png and"),
    ],
)
def test_palettes_that_differ_are_refused_without_colours(fields_copy, palettes, message):
    (fields_copy / "classes.txt").write_text("a\nb\nc\n")
    put_masks(fields_copy, {"train": [0, 1, 2], "val": [0, 1, 2]}, palettes)
    message += r".* in that of .*train/1.png: give all labels one palette, or state the colour of "
    with pytest.raises(DatasetError, match=message + r"each class in .*classes.txt"):
        opened(options("folder", fields_copy, **STRONG))
    (fields_copy / "classes.txt").write_text("a 255 0 0\nb 0 255 0\nc 0 0 255\n")
    if {*palettes[1]} == {RED, GREEN, BLUE}:
        opened(options("folder", fields_copy, **STRONG))


@pytest.mark.parametrize(
    "palettes",
    [
        [[RED, GREEN, BLUE], [RED, GREEN, BLUE, CREAM]],  # what is not used does not count
        [[RED, GREEN, BLUE], [(value,) * 3 for value in range(256)]],  # a grey ramp: ids
        [[RED, GREEN, BLUE], [RED, GREEN]],  # 2 has no colour
    ],
)
def test_palettes_that_agree_on_what_is_used_are_taken(fields_copy, palettes):
    (fields_copy / "classes.txt").write_text("a\nb\nc\n")
    put_masks(fields_copy, {"train": [0, 1, 2], "val": [0, 1, 2]}, palettes)
    opened(options("folder", fields_copy, **STRONG))


def test_counts_that_are_known_are_not_counted_again(camvid, capsys, monkeypatch):
    counted = opened(options("camvid", camvid)).counts
    assert "counting the pixels of the labels" in capsys.readouterr().out
    monkeypatch.setattr("datasets.count_labels", None)
    assert opened(options("camvid", camvid), counts=counted).counts == counted


def test_broken_files_are_found_or_left_out(camvid_copy, capsys):
    for path in ("train/0000TP_000000.png", "val/0001TP_000000.png"):
        (camvid_copy / path).write_bytes(b"")
    (camvid_copy / "trainannot/0000TP_000004.png").unlink()
    with pytest.raises(DatasetError, match="1 of 6 images of train have no label"):
        opened(options("camvid", camvid_copy))
    data = opened(options("camvid", camvid_copy, skip_broken=True))
    assert len(data.train) == 6 and len(data.val) == 2  # training keeps its length
    assert data.train_files[0] == data.train_files[1] and data.train_files[4] == data.train_files[5]
    assert capsys.readouterr().out.count("2 broken images are left out") == 1
    (camvid_copy / "trainannot/0000TP_000004.png").write_bytes(b"")
    with pytest.raises(BrokenFiles, match="2 of 6 images or their labels are broken"):
        opened(options("camvid", camvid_copy))


def test_the_first_process_alone_looks_and_counts_and_writes(camvid, tmp_path, monkeypatch):
    calls = pretend_processes(monkeypatch, 2)
    opened(options("camvid", camvid, cache=str(tmp_path)))
    assert len(calls) == 3
    assert len(list(tmp_path.glob("*.bin"))) == 2


def test_memory_is_shared_by_the_processes_of_a_machine(camvid, monkeypatch):
    monkeypatch.setattr("datasets.cache.memory_limit", lambda: 900_000)
    args = options("camvid", camvid, cache="ram")
    pretend_processes(monkeypatch, 2, local_processes=1)
    opened(args)
    pretend_processes(monkeypatch, 2, local_processes=2)
    with pytest.raises(CacheTooLarge, match="in each of 2 processes"):
        opened(args)


@pytest.mark.parametrize("recipe", [{}, STRONG])
def test_neither_cache_nor_workers_change_a_batch(camvid, tmp_path, recipe):
    def batches(**changes) -> list[torch.Tensor]:
        data = opened(options("camvid", camvid, height=64, **recipe, **changes))
        assert data.workers == (0 if data and changes["cache"] == "ram" else changes["workers"])
        augment = Augment(data.augment, normalizer([0.1] * 3, [0.2] * 3, CPU), CPU, jitter=0.4)
        sampler = ShuffledSeeds(len(data.train), seed=5)
        loader = batch_loader(data.train, sampler, 4, data.workers)
        validation = batch_loader(data.val, None, 2, data.workers)
        tensors = [tensor for batch in loader for tensor in augment(batch)]
        return tensors + [image for batch in validation for image in batch.images]

    expected = batches(cache="off", workers=0)
    assert len(expected) == 2 * 2 + 3
    for cache in ("off", "ram", str(tmp_path)):
        for workers in (0, 2) if cache != "ram" else (0,):
            for ours, theirs in zip(batches(cache=cache, workers=workers), expected, strict=True):
                assert torch.equal(ours, theirs)


def test_the_drawn_scenes_are_made_once(tmp_path, monkeypatch, capsys):
    made = []

    def make(root, workers):
        made.append(root)
        (tmp_path / "scenes").mkdir()

    monkeypatch.setattr("datasets.make_synthetic", make)
    for _ in range(2):
        with pytest.raises(DatasetError, match="has no folder leftImg8bit/train"):
            opened(options("synthetic", tmp_path / "scenes"))
    assert made == [tmp_path / "scenes"]
    assert capsys.readouterr().out.count("drawing street scenes into") == 1


def test_classes_come_from_the_data_set_or_a_file(fields):
    assert len(read_classes_for(Namespace(dataset="cityscapes", classes=None))) == 19
    args = Namespace(dataset="folder", classes=fields / "classes.txt")
    assert list(read_classes_for(args).names) == ["grass", "water", "dirt road"]
    with pytest.raises(UserError, match="the data set folder needs a file that names its classes"):
        read_classes_for(Namespace(dataset="folder", classes=None))
    with pytest.raises(UserError, match="the data set camvid has classes of its own"):
        read_classes_for(Namespace(dataset="camvid", classes="classes.txt"))
