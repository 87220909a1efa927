import functools
import os
import re
import signal
import struct
import zlib
from collections.abc import Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import ADAM7, chunks_of, joined
from PIL import ExifTags, Image

from datasets import check
from datasets.camvid import CamVid
from datasets.check import (
    Problem,
    check_file,
    check_files,
    decode_fully,
    find_problems,
    labels_without_image,
    leave_out_broken,
    summary,
)
from datasets.cityscapes import Cityscapes
from datasets.class_file import read_classes
from datasets.folder import Folder
from datasets.imagenet import ImageFolder
from datasets.images import BrokenFiles, FileError, NothingReadable, read_image
from datasets.labels import read_label
from datasets.segmentation import Segmentation
from datasets.workers import WorkerError

NOISE = np.random.default_rng(0).integers(0, 256, (60, 70, 3)).astype(np.uint8)


LAYOUTS = {"cityscapes_copy": Cityscapes, "camvid_copy": CamVid, "fields_copy": Folder}


@pytest.fixture(params=LAYOUTS)
def make(request):
    """A function that opens train of a data set of each layout, as it is on disk by then."""
    dataset_class = LAYOUTS[request.param]
    root = request.getfixturevalue(request.param)
    classes = read_classes(root / "classes.txt") if dataset_class is Folder else None
    return functools.partial(dataset_class, root, "train", classes, need_labels=False)


# Damages


def remove(path: str) -> None:
    Path(path).unlink()


def cut(path: str) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])


def zero_the_end(path: str) -> None:
    """What a crashed system may leave of a file."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def flip_a_checksum(path: str) -> None:
    data = bytearray(Path(path).read_bytes())
    data[data.rindex(b"IEND") - 5] ^= 1
    Path(path).write_bytes(data)


def change_pixels(path: str, change) -> None:
    """Replace the compressed pixels of a PNG by others, with valid checksums."""
    chunks = chunks_of(Path(path).read_bytes())
    pixels = zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT"))
    head, end = chunks[0], chunks[-1]
    Path(path).write_bytes(joined([head, (b"IDAT", change(pixels)), end]))


def end_early(path: str) -> None:
    change_pixels(path, lambda pixels: zlib.compress(pixels[: len(pixels) // 2]))


def garble(path: str) -> None:
    change_pixels(path, lambda pixels: zlib.compress(pixels)[:30] + bytes(99))


def declare(path: str, width: int, height: int) -> None:
    head, *rest = chunks_of(Path(path).read_bytes())
    content = struct.pack(">II", width, height) + head[1][8:]
    Path(path).write_bytes(joined([(b"IHDR", content), *rest]))


def set_pixel(path: str, value: int) -> None:
    label = np.array(Image.open(path))
    label[3, 4] = value
    Image.fromarray(label).save(path)


def save_as(path: str, kind: str, mode: str = "L") -> None:
    with Image.open(path) as image:
        image.convert(mode).save(path, kind)


def paint(path: str, color: tuple[int, int, int]) -> None:
    with Image.open(path) as image:
        Image.new("RGB", image.size, color).save(path)


def narrow(path: str) -> None:
    with Image.open(path) as image:
        part = image.crop((0, 0, image.width - 1, image.height))
    part.save(path)


# The problem that is found, where (0: image, 1: label), the damage, and whether the quick check
# finds it.
DAMAGES = {
    "no label": ("image without label", 0, lambda image, label: remove(label), True),
    "no image": ("label without image", 1, lambda image, label: remove(image), True),
    "empty image": ("unreadable", 0, lambda image, label: Path(image).write_bytes(b""), True),
    "text": ("unreadable", 1, lambda image, label: Path(label).write_text("none"), True),
    "cut image": ("unreadable", 0, lambda image, label: cut(image), True),
    "cut label": ("unreadable", 1, lambda image, label: cut(label), True),
    "zeros": ("unreadable", 0, lambda image, label: zero_the_end(image), True),
    "checksum": ("unreadable", 1, lambda image, label: flip_a_checksum(label), True),
    "garbled": ("unreadable", 0, lambda image, label: garble(image), False),
    "half an image": ("unreadable", 0, lambda image, label: end_early(image), False),
    "half a label": ("unreadable", 1, lambda image, label: end_early(label), False),
    "a folder": ("unreadable", 1, lambda image, label: (remove(label), Path(label).mkdir()), True),
    "size": ("wrong size", 1, lambda image, label: narrow(label), True),
    "jpeg": ("lossy label", 1, lambda image, label: save_as(label, "JPEG"), True),
    "mode": ("wrong mode", 1, lambda image, label: save_as(label, "TIFF", "F"), True),
    "colour": ("unknown colour", 1, lambda image, label: paint(label, (250, 1, 2)), False),
    "id": ("unknown label", 1, lambda image, label: set_pixel(label, 77), False),
    "absurd": ("absurd size", 0, lambda image, label: declare(image, 60000, 60000), True),
    "large": ("absurd size", 1, lambda image, label: declare(label, 14000, 14000), True),
}


def names_and_paths(dataset: Segmentation, fast: bool = False) -> list[tuple[str, str]]:
    found = chain(*find_problems(dataset, fast=fast), labels_without_image(dataset))
    return [(problem.name, problem.path) for problem in found]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_found_and_nothing_else(make, damage):
    pair = make().pairs[2]
    assert pair[0].endswith(".png")
    name, which, do, quickly = DAMAGES[damage]
    do(*pair)
    dataset = make()
    assert names_and_paths(dataset) == [(name, pair[which])]
    assert names_and_paths(dataset, fast=True) == ([(name, pair[which])] if quickly else [])
    if quickly and damage != "no image":
        path = pair[1] if damage == "no label" else pair[which]
        message = rf"1 of \d+ images or their labels are broken, the first: {re.escape(path)} "
        with pytest.raises(BrokenFiles, match=message):
            check_files(dataset.pairs)
    else:
        check_files(dataset.pairs)


def test_sound_files_pass(make):
    dataset = make()
    assert names_and_paths(dataset) == []
    assert check_files(dataset.pairs) == [tuple(label.shape) for _, label in dataset]


def test_all_problems_of_a_pair_are_found(cityscapes_copy):
    train = Cityscapes(cityscapes_copy, "train", need_labels=False)
    label = train.pairs[0][1]
    narrow(label)
    set_pixel(label, 77)
    set_pixel(label, 99)
    cut(train.pairs[1][0])
    remove(train.pairs[1][1])
    assert sorted(names_and_paths(train)) == [
        ("image without label", train.pairs[1][0]),
        ("unknown label", label),
        ("unreadable", train.pairs[1][0]),
        ("wrong size", label),
    ]
    (found, *_) = find_problems(train)
    assert found[1].message.startswith("holds the label id 99, which is not a class")
    assert str(found[0]).startswith(f"{found[0].name}: {label}: ")
    assert summary(found) == "wrong size: 1, unknown label: 1"


def test_other_files_of_cityscapes_are_no_labels(cityscapes_copy):
    for split in Cityscapes.SPLITS:
        assert labels_without_image(Cityscapes(cityscapes_copy, split)) == []
    assert any(Path(cityscapes_copy, "gtFine").rglob("*_instanceIds.png"))
    city = next((cityscapes_copy / "gtCoarse/val").iterdir())
    lonely = city / f"{city.name}_1_gtCoarse_labelIds.png"
    Image.new("L", (8, 8)).save(lonely)
    problems = labels_without_image(Cityscapes(cityscapes_copy, "val_coarse"))
    assert [problem.path for problem in problems] == [str(lonely)]
    assert labels_without_image(Cityscapes(cityscapes_copy, "val")) == []


def test_images_in_folders_of_classes(shapes_copy):
    train = ImageFolder(shapes_copy, "train", read_image)
    assert names_and_paths(train) == []
    paths = [path for path, _ in train.samples]
    cut(paths[3])
    Path(paths[5]).write_text("none")
    for fast in (False, True):
        assert names_and_paths(train, fast) == [("unreadable", paths[3]), ("unreadable", paths[5])]


def test_workers_find_the_same(cityscapes_copy):
    train = Cityscapes(cityscapes_copy, "train")
    cut(train.pairs[1][0])
    set_pixel(train.pairs[4][1], 77)
    state = torch.get_rng_state()
    alone, together = (list(find_problems(train, workers)) for workers in (0, 2))
    assert alone == together and sum(map(len, alone)) == 2
    assert torch.equal(state, torch.get_rng_state())


def test_the_death_of_a_worker_is_an_error(cityscapes, monkeypatch):
    monkeypatch.setattr(check, "check_file", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(WorkerError, match="a process that loads data died"):
        list(find_problems(Cityscapes(cityscapes, "train"), workers=1))


# The quick check


def test_broken_files_are_counted_and_the_first_named(cityscapes_copy):
    train = Cityscapes(cityscapes_copy, "train")
    for index in (4, 1, 5):
        cut(train.pairs[index][0])
    message = (
        f"^3 of 6 images or their labels are broken, the first: {train.pairs[1][0]} cannot be read "
        r"as an image \(.*\): fetch it again$"
    )
    with pytest.raises(BrokenFiles, match=message):
        check_files(train.pairs)


def jpeg(**options) -> bytes:
    file = BytesIO()
    Image.fromarray(NOISE).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("count", [2, 100, 1000])
def test_a_jpeg_needs_its_end(tmp_path, count):
    path, data = tmp_path / "image.jpg", jpeg(quality=95)
    for broken in (data[:-count], data[:-count] + bytes(count), data[:-count] + bytes(5000)):
        path.write_bytes(broken)
        with pytest.raises(FileError, match="the file is cut short"):
            check_file(str(path))
    path.write_bytes(data + bytes(5000))  # some programs fill a block
    assert check_file(str(path)) == (60, 70)


def test_zeros_in_place_of_pixels_are_refused(tmp_path):
    path, data = tmp_path / "image.jpg", bytearray(jpeg(quality=95))
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(data)
    with pytest.raises(FileError, match="zeros in place of a part of its pixels"):
        check_file(str(path))


def test_zeros_of_an_even_surface_are_pixels(tmp_path):
    path = tmp_path / "image.jpg"
    Image.new("L", (2000, 2000), 90).save(path, optimize=True)
    assert bytes(512) in path.read_bytes() and check_file(str(path)) == (2000, 2000)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_with_a_forged_end_is_refused(tmp_path, progressive):
    path, data = tmp_path / "image.jpg", jpeg(quality=95, progressive=progressive)
    path.write_bytes(data)
    decode_fully(str(path), read_image)
    path.write_bytes(data[: len(data) * 2 // 3] + b"\xff\xd9")
    with pytest.raises(FileError, match="its pixels end early"):
        decode_fully(str(path), read_image)
    if not progressive:  # what is missing is grey
        with pytest.raises(FileError, match="its pixels end early"):
            read_image(str(path))


def test_the_end_of_a_preview_is_not_that_of_its_jpeg(tmp_path):
    exif, path = Image.Exif(), tmp_path / "image.jpg"
    exif[0x9286] = jpeg() + bytes(1000)
    data = jpeg(exif=exif)
    path.write_bytes(data)
    assert data.count(b"\xff\xd9") > 1 and check_file(str(path)) == (60, 70)
    path.write_bytes(data[:-2])
    with pytest.raises(FileError, match="the file is cut short"):
        check_file(str(path))


def test_the_size_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name in ("image.png", "image.jpg"):
        Image.fromarray(NOISE).save(tmp_path / name, exif=exif)
        assert check_file(str(tmp_path / name)) == (70, 60)


@pytest.mark.parametrize("kind", ["absurd", "texts"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_would_fill_the_memory_are_refused(cityscapes_copy, kind, monkeypatch):
    path = Cityscapes(cityscapes_copy, "train").pairs[0][0]
    if kind == "absurd":
        declare(path, 14000, 14000)
    else:
        head, *rest = chunks_of(Path(path).read_bytes())
        large = (b"zTXt", b"a\0\0" + zlib.compress(bytes(5_000_000)))
        Path(path).write_bytes(joined([head, *[large] * 20, *rest]))
    monkeypatch.setattr(Image.Image, "load", None)
    for read in (read_image, check_file):
        with pytest.raises(FileError, match="absurd size" if kind == "absurd" else "too large"):
            read(path)


# The deep check


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("rows", [0, 1, 30, 59, 60])
def test_a_png_that_ends_early_after_whole_rows(tmp_path, mode, rows):
    path = str(tmp_path / "image.png")
    image = Image.fromarray(NOISE[..., 0] if mode == "I;16" else NOISE).convert(mode)
    image.save(path)
    row = len(zlib.decompress(dict(chunks_of(Path(path).read_bytes()))[b"IDAT"])) // 60
    change_pixels(path, lambda pixels: zlib.compress(pixels[: rows * row]))
    check_file(path)
    if rows == 60:
        decode_fully(path, read_image)
    else:
        with pytest.raises(FileError, match=r"its pixels end early|truncated"):
            decode_fully(path, read_image)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 8), (70, 60)])
def test_an_interlaced_png_that_ends_early(tmp_path, size):
    """PIL cannot write one."""
    path, pixels = tmp_path / "image.png", NOISE[: size[1], : size[0]]
    parts = [pixels[top::down, left::right] for left, top, right, down in ADAM7]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    for length in (len(rows), len(rows) - 1, len(rows) // 2, 0):
        head = struct.pack(">II5B", *size, 8, 2, 0, 0, 1)
        chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows[:length])), (b"IEND", b"")]
        path.write_bytes(joined(chunks))
        if length == len(rows):
            decode_fully(str(path), read_image)
            assert (np.asarray(read_image(str(path))) == pixels).all()
        else:
            with pytest.raises(FileError, match=r"its pixels end early|truncated"):
                decode_fully(str(path), read_image)


@pytest.mark.parametrize("value", [0, 127, 255])
def test_images_of_one_colour_pass(tmp_path, value):
    for mode in ("1", "L", "P", "I;16", "RGB"):
        path = str(tmp_path / f"{mode[0]}.png")
        Image.new(mode, (30, 20), (value,) * 3 if mode == "RGB" else value).save(path)
        decode_fully(path, read_label if mode in "LP" else read_image)


# Leaving out


def damage(pairs: Sequence[tuple[str, str]], indices: Sequence[int]) -> None:
    for index, name in zip(indices, ("checksum", "id", "cut image"), strict=False):
        DAMAGES[name][2](*pairs[index])


def test_broken_pairs_are_left_out(make, capsys):
    dataset, labels = make(), make().label_files()
    pairs = list(dataset.pairs)
    broken = list(range(0, len(pairs) - 1, 2))
    damage(pairs, broken)
    problems = leave_out_broken(dataset)
    assert [problem.index for problem in problems] == broken
    assert dataset.pairs == [pair for i, pair in enumerate(pairs) if i not in broken]
    assert len(dataset) == len(pairs) - len(broken) and dataset.label_files() == labels
    captured = capsys.readouterr()
    assert captured.out == f"{len(broken)} broken images are left out\n"
    assert captured.err.splitlines() == [f"left out: {problem}" for problem in problems]
    assert leave_out_broken(dataset) == [] and capsys.readouterr() == ("", "")
    assert all(image.shape[1:] == label.shape for image, label in dataset)


def test_an_image_without_label_is_left_out(make):
    gone = make().pairs[2]
    remove(gone[1])
    dataset = make()
    assert len(leave_out_broken(dataset)) == 1 and gone not in dataset.pairs


def test_an_image_with_two_problems_counts_once(camvid_copy, capsys):
    train = CamVid(camvid_copy, "train")
    cut(train.pairs[2][0])
    set_pixel(train.pairs[2][1], 77)
    assert len(leave_out_broken(train)) == 2 and len(train) == 5
    assert capsys.readouterr().out == "1 broken images are left out\n"


def test_images_of_classes_are_left_out(shapes_copy):
    train = ImageFolder(shapes_copy, "train", read_image)
    samples = list(train.samples)
    cut(samples[3][0])
    (problem,) = leave_out_broken(train)
    assert problem.path == samples[3][0]
    expected = samples[:3] + samples[4:]
    assert train.samples == train.imgs == expected
    assert train.targets == [target for _, target in expected] and len(train) == len(expected)


def test_something_must_be_left(camvid_copy):
    val = CamVid(camvid_copy, "val")
    for image, _ in val.pairs:
        Path(image).write_bytes(b"")
    with pytest.raises(NothingReadable, match="all 3 images are broken, the first: unreadable: "):
        leave_out_broken(val)


@pytest.mark.parametrize(
    ("broken", "expected"),
    [({1, 2}, [0, 3, 3, 3, 4, 5]), ({0, 5}, [1, 1, 2, 3, 4, 1]), (set(), [0, 1, 2, 3, 4, 5])],
)
def test_the_next_good_image_replaces_a_broken_one(camvid_copy, broken, expected):
    train = CamVid(camvid_copy, "train")
    pairs = list(train.pairs)
    for index in broken:
        cut(pairs[index][0])
    assert {problem.index for problem in leave_out_broken(train, replace=True)} == broken
    assert train.pairs == [pairs[index] for index in expected]


def test_a_problem_is_one_line_whatever_the_file_is_called():
    problem = Problem("unreadable", "a\nb.png", "is no image")
    assert str(problem) == "unreadable: a\\nb.png: is no image"
