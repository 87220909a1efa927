import functools
import os
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import check
from datasets.camvid import CamVid
from datasets.check import (
    Problem,
    check_headers,
    check_images,
    labels_without_image,
    look_through,
    summary,
    told_left_out,
    without_broken,
)
from datasets.cityscapes import Cityscapes
from datasets.folder import Folder, read_classes
from datasets.imagenet import ImageFolder
from datasets.images import DatasetError, read_image
from datasets.segmentation import Segmentation

LAYOUTS = {"cityscapes_copy": Cityscapes, "camvid_copy": CamVid, "fields_copy": Folder}


@pytest.fixture(params=LAYOUTS)
def make(request):
    """Lists train of a data set of each layout, as it is on disk by then."""
    root = request.getfixturevalue(request.param)
    classes = read_classes(root / "classes.txt") if request.param == "fields_copy" else None
    kind = LAYOUTS[request.param]
    return functools.partial(kind, root, "train", classes, need_labels=False)


# What can be done to a pair, and what is found then. Each returns the kind and the broken file.


def remove(path: str) -> None:
    Path(path).unlink()


def cut(path: str) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])


def flip_a_checksum(path: str) -> None:
    data = bytearray(Path(path).read_bytes())
    data[data.rindex(b"IEND") - 5] ^= 1  # the last byte of the last chunk's checksum before it
    Path(path).write_bytes(data)


def end_early(path: str) -> None:
    """Half of the rows, in a PNG that is in order otherwise."""
    array = np.asarray(Image.open(path))
    half = array[: len(array) // 2]
    rows = b"".join(b"\0" + row.tobytes() for row in half)
    with Image.open(path) as image:
        palette_free = image.mode in ("L", "RGB")
        size = image.size
    assert palette_free
    head = struct.pack(">II", *size) + bytes([8, 0 if array.ndim == 2 else 2, 0, 0, 0])
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in chunks))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def declare(path: str, width: int, height: int) -> None:
    """Change the size that a PNG declares, its checksum too."""
    data = Path(path).read_bytes()
    head = struct.pack(">II", width, height) + data[24:29]
    Path(path).write_bytes(data[:8] + png_chunk(b"IHDR", head) + data[33:])


def set_pixel(path: str, value: int) -> None:
    label = np.array(Image.open(path))
    label[3, 4] = value
    Image.fromarray(label).save(path)


def narrow(path: str) -> None:
    with Image.open(path) as image:
        part = image.crop((0, 0, image.width - 1, image.height))
    part.save(path)


# The kind that is found, where (0: image, 1: label), the damage, and whether a look at the headers
# and ends finds it.
DAMAGES = {
    "no label": ("image without label", 0, lambda image, label: remove(label), True),
    "no image": ("label without image", 1, lambda image, label: remove(image), True),
    "empty image": ("unreadable", 0, lambda image, label: Path(image).write_bytes(b""), True),
    "text": ("unreadable", 1, lambda image, label: Path(label).write_text("none"), True),
    "cut image": ("unreadable", 0, lambda image, label: cut(image), True),
    "cut label": ("unreadable", 1, lambda image, label: cut(label), True),
    "checksum": ("unreadable", 1, lambda image, label: flip_a_checksum(label), False),
    "half an image": ("unreadable", 0, lambda image, label: end_early(image), False),
    "half a label": ("unreadable", 1, lambda image, label: end_early(label), False),
    "a folder": ("unreadable", 1, lambda image, label: (remove(label), Path(label).mkdir()), True),
    "a pipe": ("unreadable", 1, lambda image, label: (remove(label), os.mkfifo(label)), True),
    "size": ("wrong size", 1, lambda image, label: narrow(label), True),
    "mode": ("wrong mode", 1, lambda image, label: Image.new("RGB", (96, 72)).save(label), True),
    "id": ("unknown label", 1, lambda image, label: set_pixel(label, 77), False),
    "absurd": ("absurd size", 0, lambda image, label: declare(image, 60000, 60000), True),
    "large": ("absurd size", 1, lambda image, label: declare(label, 10000, 10000), True),
}


def found_in(dataset: Segmentation, fast: bool) -> list[tuple[str, str]]:
    problems = [problem for found in look_through(dataset, fast=fast) for problem in found]
    problems += labels_without_image(dataset)
    return [(problem.kind, problem.path) for problem in problems]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_found_and_nothing_else(make, damage):
    pair = make().pairs[2]
    assert pair[0].endswith(".png")
    kind, which, do, by_header = DAMAGES[damage]
    do(*pair)
    assert found_in(make(), fast=False) == [(kind, pair[which])]
    assert found_in(make(), fast=True) == ([(kind, pair[which])] if by_header else [])


def test_nothing_is_wrong_with_what_is_drawn(make):
    for fast in (False, True):
        assert found_in(make(), fast) == []


def test_all_damages_of_a_pair_are_found(cityscapes_copy):
    train = Cityscapes(cityscapes_copy, "train")
    label = train.pairs[0][1]
    narrow(label)
    set_pixel(label, 77)
    set_pixel(label, 99)
    cut(train.pairs[1][0])
    remove(train.pairs[1][1])
    train = Cityscapes(cityscapes_copy, "train", need_labels=False)
    assert sorted(found_in(train, fast=False)) == [
        ("image without label", train.pairs[1][0]),
        ("unknown label", label),
        ("unreadable", train.pairs[1][0]),
        ("wrong size", label),
    ]
    (found, *_) = look_through(train)
    assert found[1].what.startswith("holds the label id 99, which is no class of this data set")
    assert str(found[0]).startswith(f"{found[0].kind}: {label}: ")
    assert summary(found) == "wrong size: 1, unknown label: 1"


def test_other_files_of_cityscapes_are_no_labels(cityscapes_copy):
    for split in Cityscapes.SPLITS:
        dataset = Cityscapes(cityscapes_copy, split)
        assert any(Path(cityscapes_copy, "gtFine").rglob("*_instanceIds.png"))
        assert labels_without_image(dataset) == []
    lonely = cityscapes_copy / "gtCoarse/val/nowhere/nowhere_1_gtCoarse_labelIds.png"
    lonely.parent.mkdir()
    Image.new("L", (8, 8)).save(lonely)
    problems = labels_without_image(Cityscapes(cityscapes_copy, "val_coarse"))
    assert [problem.path for problem in problems] == [str(lonely)]
    assert labels_without_image(Cityscapes(cityscapes_copy, "val")) == []


def test_images_in_folders_of_classes(shapes_copy):
    train = ImageFolder(shapes_copy, "train", read_image)
    assert [found for found in look_through(train) if found] == []
    paths = [path for path, _ in train.samples]
    cut(paths[3])
    Path(paths[5]).write_text("none")
    for fast in (False, True):
        problems = [problem for found in look_through(train, fast=fast) for problem in found]
        assert [(p.kind, p.path, p.index) for p in problems] == [
            ("unreadable", paths[3], 3),
            ("unreadable", paths[5], 5),
        ]


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_ends_early_is_found(shapes_copy, progressive):
    """Its data stop before the last pixels, and an end is set behind: PIL reads it as grey."""
    train = ImageFolder(shapes_copy, "train", read_image)
    path = Path(train.samples[0][0])
    pixels = np.random.default_rng(0).integers(0, 256, (80, 90, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path, "JPEG", progressive=progressive)
    data = path.read_bytes()
    path.write_bytes(data[:-30] + b"\xff\xd9")
    (found, *others) = look_through(train)
    assert [problem.kind for problem in found] == ["unreadable"] and not any(others)


def test_workers_find_the_same(cityscapes_copy):
    train = Cityscapes(cityscapes_copy, "train")
    cut(train.pairs[1][0])
    set_pixel(train.pairs[4][1], 77)
    state = torch.get_rng_state()
    alone, together = (list(look_through(train, workers)) for workers in (0, 2))
    assert alone == together and sum(map(len, alone)) == 2
    assert torch.equal(state, torch.get_rng_state())


def test_a_worker_that_dies_is_reported(cityscapes, monkeypatch):
    train = Cityscapes(cityscapes, "train")
    monkeypatch.setattr(
        check, "read_header", lambda path: os.kill(os.getpid(), signal.SIGKILL) or None
    )
    with pytest.raises(DatasetError, match=r"ended after 0 of 6 images: .* worker"):
        list(look_through(train, workers=1))


# Before a run


def test_how_many_are_broken_is_said_and_the_first_named(cityscapes_copy):
    train = Cityscapes(cityscapes_copy, "train")
    for index in (4, 1, 5):
        cut(train.pairs[index][0])
    message = (
        f"3 of 6 images or their labels are broken, the first: {train.pairs[1][0]} cannot be read "
        r"as an image \(.*\): fetch it again; python tools/check_dataset.py lists them all, "
        "--skip-broken leaves them out"
    )
    with pytest.raises(DatasetError, match=message):
        check_headers(train.pairs)
    with pytest.raises(DatasetError, match=message):
        check_images([image for image, _ in train.pairs])
    with pytest.raises(DatasetError, match=r"fetch it again; ask somebody$"):
        check_headers(train.pairs, "ask somebody")


def test_broken_pairs_are_left_out(make):
    dataset, labels = make(), make().label_files()
    damages = ("checksum", "id") if len(dataset) < 5 else ("checksum", "id", "cut image")
    pairs = list(dataset.pairs)
    for index, damage in enumerate(damages):
        DAMAGES[damage][2](*pairs[2 * index])
    problems = without_broken(dataset)
    assert [problem.index for problem in problems] == [0, 2, 4][: len(damages)]
    assert dataset.pairs == [p for i, p in enumerate(pairs) if i not in (0, 2, 4)[: len(damages)]]
    assert len(dataset) == len(pairs) - len(damages) and dataset.label_files() == labels
    assert without_broken(dataset) == []
    for index in range(len(dataset)):
        assert dataset[index][0].shape[1:] == dataset[index][1].shape


def test_an_image_without_label_is_left_out(make):
    gone = make().pairs[2]
    remove(gone[1])
    dataset = make()
    assert len(without_broken(dataset, fast=True)) == 1 and gone not in dataset.pairs


def test_images_of_classes_are_left_out(shapes_copy):
    train = ImageFolder(shapes_copy, "train", read_image)
    samples = list(train.samples)
    cut(samples[3][0])
    (problem,) = without_broken(train, fast=True)
    assert problem.path == samples[3][0]
    expected = samples[:3] + samples[4:]
    assert train.samples == train.imgs == expected
    assert train.targets == [target for _, target in expected] and len(train) == len(expected)


def test_something_must_be_left(camvid_copy):
    val = CamVid(camvid_copy, "val")
    for image, _ in val.pairs:
        Path(image).write_bytes(b"")
    with pytest.raises(DatasetError, match="all 3 images are broken, the first: unreadable: "):
        without_broken(val)


@pytest.mark.parametrize(
    ("broken", "expected"),
    [({1, 2}, [0, 3, 3, 3, 4, 5]), ({0, 5}, [1, 1, 2, 3, 4, 1]), (set(), [0, 1, 2, 3, 4, 5])],
)
def test_the_next_whole_image_stands_in_for_a_broken_one(camvid_copy, broken, expected):
    train = CamVid(camvid_copy, "train")
    pairs = list(train.pairs)
    for index in broken:
        cut(pairs[index][0])
    assert {problem.index for problem in without_broken(train, replace=True)} == broken
    assert train.pairs == [pairs[index] for index in expected]


def test_a_problem_is_one_line_whatever_the_file_is_called():
    problem = Problem("unreadable", "a\nb.png", "is no image")
    assert str(problem) == "unreadable: a\\nb.png: is no image"


def test_broken_images_are_counted_once(capsys):
    problems = [Problem("unreadable", "a.png", "is broken", 3)]
    told_left_out([*problems, Problem("image without label", "a.png", "a_label.png is missing", 3)])
    captured = capsys.readouterr()
    assert captured.out == "1 broken images are left out\n"
    assert captured.err.splitlines()[0] == "left out: unreadable: a.png: is broken"
    told_left_out([])
    assert capsys.readouterr() == ("", "")
