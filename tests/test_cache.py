import errno
import multiprocessing
import os
import shutil
import signal
import time
from collections import namedtuple
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import run_script, same_weights
from torch.utils.data import Dataset

import datasets.cache
from datasets.cache import InFile, keep_decoded, memory_limit
from datasets.camvid import CamVid
from datasets.check import check_headers
from datasets.cityscapes import Cityscapes
from datasets.folder import Folder, read_classes
from datasets.images import DatasetError
from datasets.loading import ShuffledSeeds, WithSeed, as_lists, training_loader
from datasets.segmentation import Classes, Segmentation
from datasets.transforms import Augment, Paper, Strong, to_floats
from utils.checkpoint import load_checkpoint

PLACES = ["ram", "folder"]


@pytest.fixture
def keep(tmp_path):
    """Keep data sets in memory or in a folder of tmp_path."""

    def kept(place: str, *datasets: Segmentation, **options) -> list[Dataset]:
        sizes = {dataset: check_headers(dataset.pairs) for dataset in datasets}
        return keep_decoded(sizes, "ram" if place == "ram" else str(tmp_path / place), **options)

    return kept


def assert_same_items(ours: Dataset, theirs: Dataset) -> None:
    assert len(ours) == len(theirs)
    for index in range(len(theirs)):
        for kept, read in zip(ours[index], theirs[index], strict=True):
            assert kept.dtype == torch.uint8 and torch.equal(kept, read)
            assert kept.stride() == read.stride()


def files_in(folder: Path) -> list[str]:
    """Their names, but that of the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# The items


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("height", "resize_labels"), [(None, True), (50, True), (50, False), (None, False)]
)
def test_items_are_those_of_the_data_set(keep, fields, place, workers, height, resize_labels):
    """Of several sizes, PNG and JPEG; with workers they keep their order."""
    classes = read_classes(fields / "classes.txt")
    parts = [Folder(fields, split, classes, height, resize_labels) for split in ("train", "val")]
    ours = keep(place, *parts, workers=workers)
    assert len({image.shape for image, _ in ours[0]}) > 1
    for kept, part in zip(ours, parts, strict=True):
        assert_same_items(kept, part)


@pytest.mark.parametrize("place", PLACES)
def test_a_split_without_labels(keep, cityscapes, place):
    test = Cityscapes(cityscapes, "test", height=32, resize_labels=False)
    (ours,) = keep(place, test)
    assert_same_items(ours, test)
    assert (ours[0][1] == 255).all() and ours[0][1].shape == (64, 128)


@pytest.mark.parametrize("recipe", [Paper(), Strong((48, 64))])
@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_batches_are_the_same(keep, camvid, recipe, workers):
    train = CamVid(camvid, "train", height=60)
    cpu = torch.device("cpu")
    augment = Augment(recipe, to_floats([0.1] * 3, [0.2] * 3, cpu), cpu)

    def batches(dataset: Dataset) -> list[torch.Tensor]:
        sampler = ShuffledSeeds(len(dataset), seed=5)
        options = {"batch_size": 4, "collate_fn": as_lists, "num_workers": workers}
        loader = training_loader(WithSeed(dataset), sampler, **options)
        return [tensor for *batch, _, _ in loader for tensor in augment(*batch)]

    expected = batches(train)
    assert len(expected) == 4
    for place in PLACES:
        for ours, theirs in zip(batches(*keep(place, train)), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("place", PLACES)
def test_reading_leaves_the_random_state_alone(keep, camvid, place):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    keep(place, CamVid(camvid, "val"))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_named(keep, camvid_copy, tmp_path, place, workers):
    path = sorted((camvid_copy / "train").glob("*.png"))[-1]
    data = path.read_bytes()
    path.write_bytes(data[:200] + bytes(1800) + data[2000:])
    with pytest.raises(DatasetError, match=path.name):
        keep(place, CamVid(camvid_copy, "train"), workers=workers)
    assert place == "ram" or files_in(tmp_path / place) == []


@pytest.mark.parametrize("place", PLACES)
def test_an_image_that_changed_its_size_is_named(camvid, tmp_path, place):
    val = CamVid(camvid, "val", height=36)
    sizes = [*check_headers(val.pairs)[:-1], (72, 99)]
    with pytest.raises(DatasetError, match=f"{Path(val.pairs[-1][0]).name} has changed its size"):
        keep_decoded({val: sizes}, "ram" if place == "ram" else str(tmp_path))


# In memory


def test_all_items_lie_in_one_array_that_they_fill(keep, fields):
    (train,) = keep("ram", Folder(fields, "train", read_classes(fields / "classes.txt"), 50))
    tensors = [tensor for item in train for tensor in item]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    places = sorted((t.data_ptr(), t.data_ptr() + t.numel()) for t in tensors)
    assert all(end == start for (_, end), (start, _) in pairwise(places))
    assert tensors[0].untyped_storage().nbytes() == sum(tensor.numel() for tensor in tensors)


def machine_of(monkeypatch, megabytes: int) -> None:
    pages = {"SC_PHYS_PAGES": megabytes * 250, "SC_PAGE_SIZE": 4000}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)


def test_too_little_memory_is_said(keep, camvid, monkeypatch):
    """Six images and labels take 166 kB as they are and 628 kB at this height, over the half."""
    machine_of(monkeypatch, 1)
    train = CamVid(camvid, "train", height=140)
    message = r"camvid takes 0.6 MB .* has 1.0 MB: give --cache off, a folder, or a smaller --hei"
    with pytest.raises(DatasetError, match=message):
        keep("ram", train)
    keep("ram", CamVid(camvid, "train"))


def test_memory_must_hold_all_splits_together(keep, camvid, monkeypatch):
    """At this height train takes 461 kB and val 231 kB: each fits into half of a megabyte."""
    machine_of(monkeypatch, 1)
    train, val = (CamVid(camvid, split, height=120) for split in ("train", "val"))
    keep("ram", train)
    keep("ram", val)
    with pytest.raises(DatasetError, match=r"takes 0.7 MB of memory"):
        keep("ram", train, val)


def test_a_gpu_without_the_room_leaves_the_bytes_to_the_cpu(keep, camvid, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300_000, 10**9))
    val = CamVid(camvid, "train")  # of 166 kB: over half of what is free
    (ours,) = keep("ram", val, device="cuda")
    assert ours[0][0].device.type == "cpu"
    assert_same_items(ours, val)


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "5000"}, 5000),
        ("0::/job/step\n", {"job/memory.max": "4000", "job/step/memory.max": "max"}, 4000),
        ("0::/job/step\n", {"job/memory.max": "4000", "job/step/memory.max": "3000"}, 3000),
        ("5:cpu:/a\n4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "2000"}, 2000),
        ("4:cpu,memory:/gone\n", {"memory/memory.limit_in_bytes": "1000"}, 1000),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": str(2**63 - 4096)}, 10**6),
        ("5:cpu:/\n", {"memory/memory.limit_in_bytes": "1000"}, 10**6),
        (None, {}, 10**6),
    ],
)
def test_the_memory_of_a_container_or_job(tmp_path, monkeypatch, groups, limits, expected):
    machine_of(monkeypatch, 1)
    for name, text in limits.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    assert memory_limit(tmp_path) == expected


# In a folder


class Unread(CamVid):
    """Of which no item may be read."""

    def __getitem__(self, index: int) -> None:
        raise AssertionError("an image was read")


Unread.__name__ = "CamVid"


def test_a_second_run_reads_no_image(keep, camvid, tmp_path):
    parts = [CamVid(camvid, "train", height=36), CamVid(camvid, "val", height=36)]
    keep("folder", *parts)
    names = files_in(tmp_path / "folder")
    assert [name.rsplit("-", 1)[0] for name in names] == ["camvid-train-36", "camvid-val-36"]
    assert all(name.endswith(".bin") for name in names)
    ours = keep("folder", Unread(camvid, "train", height=36), Unread(camvid, "val", height=36))
    assert_same_items(ours[0], parts[0])
    assert_same_items(ours[1], parts[1])
    assert files_in(tmp_path / "folder") == names


def test_a_file_holds_the_bytes_of_the_items_alone(keep, camvid, tmp_path):
    keep("folder", CamVid(camvid, "val", height=36, resize_labels=False))
    (path,) = (tmp_path / "folder").glob("*.bin")
    assert path.stat().st_size == 3 * (3 * 36 * 48 + 72 * 96)


def test_an_item_that_is_changed_leaves_the_file_alone(keep, camvid):
    val = CamVid(camvid, "val")
    (ours,) = keep("folder", val)
    image, label = ours[1]
    image.zero_(), label.zero_()
    assert_same_items(ours, val)


def path_of(root: Path, split: str = "train", classes: Classes | None = None, **options) -> Path:
    dataset = CamVid(root, split, classes, **options)
    return InFile(dataset, check_headers(dataset.pairs), Path("folder")).path


def test_what_decides_the_bytes_decides_the_file(camvid_copy, tmp_path, monkeypatch):
    ours = CamVid.CLASSES
    other_ids = Classes(ours.names, ours.colors, ours.label_ids[::-1], ours.ignored_ids)
    first = path_of(camvid_copy, height=36)
    paths = [
        first,
        path_of(camvid_copy),
        path_of(camvid_copy, height=37),
        path_of(camvid_copy, "val", height=36),
        path_of(camvid_copy, height=36, resize_labels=False),
        path_of(camvid_copy, classes=other_ids, height=36),
    ]
    for folder in ("train", "trainannot"):
        path = min((camvid_copy / folder).glob("*.png"))
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        paths.append(path_of(camvid_copy, height=36))
        with path.open("ab") as file:
            file.write(b"more")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        paths.append(path_of(camvid_copy, height=36))
    for folder in ("train", "trainannot"):
        path = min((camvid_copy / folder).glob("*.png"))
        path.rename(path.with_stem("0000TP_000009"))
    paths.append(path_of(camvid_copy, height=36))
    with monkeypatch.context() as patch:
        patch.setattr(datasets.cache.PIL, "__version__", "99")
        paths.append(path_of(camvid_copy, height=36))
    with monkeypatch.context() as patch:
        patch.setattr(datasets.cache, "FORMAT", 99)
        paths.append(path_of(camvid_copy, height=36))
    assert len(set(paths)) == len(paths) == 13


def test_names_of_classes_and_the_place_of_the_data_decide_nothing(camvid_copy, tmp_path):
    first = path_of(camvid_copy, height=36)
    ours = CamVid.CLASSES
    names = [f"other {name}" for name in ours.names]
    renamed = Classes(names, ours.colors, ours.label_ids, ours.ignored_ids)
    assert path_of(camvid_copy, classes=renamed, height=36) == first
    shutil.copytree(camvid_copy, tmp_path / "elsewhere")
    assert path_of(tmp_path / "elsewhere", height=36) == first


def test_an_image_that_was_changed_is_read_again(keep, camvid_copy, tmp_path):
    (before,) = keep("folder", CamVid(camvid_copy, "val"))
    paths = [Path(path) for path, _ in CamVid(camvid_copy, "val").pairs]
    shutil.copy(paths[0], paths[2])
    (after,) = keep("folder", CamVid(camvid_copy, "val"))
    assert torch.equal(after[2][0], after[0][0]) and not torch.equal(before[2][0], after[2][0])
    assert len(files_in(tmp_path / "folder")) == 2  # the old one may be of use to another run


class Breaking(CamVid):
    """Whose third item does something else first."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 2:
            self.breaks()
        return super().__getitem__(index)


Breaking.__name__ = "CamVid"


def interrupt() -> None:
    raise KeyboardInterrupt


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_interrupted_run_leaves_nothing(keep, camvid, tmp_path):
    val = Breaking(camvid, "val")
    val.breaks = interrupt
    with pytest.raises(KeyboardInterrupt):
        keep("folder", val)
    assert files_in(tmp_path / "folder") == []
    val.breaks = lambda: None
    assert_same_items(*keep("folder", val), val)


FORK = multiprocessing.get_context("fork")


def test_a_killed_run_leaves_nothing_that_is_taken_for_whole(keep, camvid, tmp_path):
    val = Breaking(camvid, "val")
    val.breaks = die
    process = FORK.Process(target=keep, args=("folder", val))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = files_in(tmp_path / "folder")
    assert left.endswith(".unfinished")
    # Of the right length already, since its room was reserved.
    assert (tmp_path / "folder" / left).stat().st_size == 3 * 4 * 72 * 96
    (tmp_path / "folder/camvid-train-36-0123456789ab.unfinished").write_text("of another run")
    val = CamVid(camvid, "val")
    assert_same_items(*keep("folder", val), val)
    (name,) = files_in(tmp_path / "folder")
    assert name.endswith(".bin")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_is_made_again(keep, camvid, tmp_path, change):
    val = CamVid(camvid, "val")
    keep("folder", val)
    (path,) = (tmp_path / "folder").glob("*.bin")
    os.truncate(path, path.stat().st_size + change)
    assert_same_items(*keep("folder", val), val)


class Slow(CamVid):
    """Whose items take their time, and say in a file that they were read."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with self.read.open("a") as file:
            file.write("x")
        time.sleep(0.1)
        return super().__getitem__(index)


Slow.__name__ = "CamVid"


def test_of_processes_that_start_together_one_writes(keep, camvid, tmp_path):
    train = Slow(camvid, "train", height=36)
    train.read = tmp_path / "read"
    start = FORK.Barrier(3)

    def one_of_them(number: int) -> None:
        with (tmp_path / f"out{number}").open("w") as out, redirect_stdout(out):
            start.wait(60)
            (ours,) = keep("folder", train)
        assert_same_items(ours, CamVid(camvid, "train", height=36))

    processes = [FORK.Process(target=one_of_them, args=(number,)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((tmp_path / "read").read_text()) == len(train)
    assert len(files_in(tmp_path / "folder")) == 1
    said = "".join((tmp_path / f"out{number}").read_text() for number in range(3))
    assert said.count("cache: writing 0.0 MB into") == 1
    assert said.count(f"cache: waiting for another process, which writes into {tmp_path}") == 2


Usage = namedtuple("Usage", "total used free")


def test_a_disk_without_the_room_is_said_before_an_image_is_read(
    keep, camvid, tmp_path, monkeypatch
):
    """All splits together: 166 kB and 83 kB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 8 * 10**8, 2 * 10**5))
    parts = [Unread(camvid, "train"), Unread(camvid, "val")]
    message = "the decoded images take 0.2 MB, and .*folder has 0.2 MB free: give --cache another"
    with pytest.raises(DatasetError, match=message):
        keep("folder", *parts)
    assert files_in(tmp_path / "folder") == []
    keep("folder", CamVid(camvid, "val"))


@pytest.mark.parametrize("where", ["posix_fallocate", "fsync"])
def test_a_disk_that_fills_up_is_one_line(keep, camvid, tmp_path, monkeypatch, where):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, where, full)
    message = r"folder cannot be written \(No space left on device\): give --cache another folder"
    dataset = (CamVid if where == "fsync" else Unread)(camvid, "val")
    with pytest.raises(DatasetError, match=message):
        keep("folder", dataset)
    assert files_in(tmp_path / "folder") == []


def test_the_room_is_reserved_before_an_image_is_read(keep, camvid, tmp_path):
    val, seen = Breaking(camvid, "val"), []
    val.breaks = lambda: seen.extend(
        path.stat().st_blocks * 512 for path in (tmp_path / "folder").glob("*.unfinished")
    )
    keep("folder", val)
    assert len(seen) == 1 and seen[0] >= 3 * 4 * 72 * 96


def test_a_folder_that_cannot_be_written(keep, camvid, tmp_path):
    (tmp_path / "file").write_text("")
    for place, reason in (("file", "File exists"), ("file/below", "Not a directory")):
        with pytest.raises(DatasetError, match=rf"{place} cannot be written \({reason}\): give"):
            keep(place, CamVid(camvid, "val"))
    with pytest.raises(DatasetError, match=r"/proc/below cannot be written \(.+\): give --cache"):
        keep("/proc/below", CamVid(camvid, "val"))


def test_a_folder_that_may_only_be_read_serves_what_it_holds(keep, camvid, tmp_path, monkeypatch):
    val = CamVid(camvid, "val")
    keep("folder", val)

    def read_only(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert_same_items(*keep("folder", val), val)
    with pytest.raises(DatasetError, match=r"folder cannot be written \(Permission denied\)"):
        keep("folder", CamVid(camvid, "train"))


def test_a_file_that_is_removed_while_it_is_read(keep, camvid, tmp_path):
    (ours,) = keep("folder", CamVid(camvid, "val"))
    (path,) = (tmp_path / "folder").glob("*.bin")
    os.truncate(path, 100)
    with pytest.raises(DatasetError, match="was removed or cut short"):
        ours[1]
    path.unlink()
    with pytest.raises(DatasetError, match=r"bin was removed .*: go on with --resume"):
        ours[0]


# Training

ARGV = ("--height", 64, "--encoder-epochs", 1, "--epochs", 1, "--batch-size", 2, "--D", 4)


def weights_of_a_run(root, folder, *options) -> dict[str, torch.Tensor]:
    argv = ("--dataset", "camvid", "--datadir", root, *ARGV, "--augment", "strong", *options)
    assert run_script("main.py", *argv, "--savedir", folder) == 0
    return load_checkpoint(folder / "best.pth")["model"]


@pytest.fixture(scope="module")
def plain(camvid, tmp_path_factory):
    """The weights of a run that reads its files in the training process."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    return weights_of_a_run(camvid, folder, "--cache", "off", "--workers", 0)


@pytest.mark.parametrize("cache", ["off", "ram", "./ram"])
@pytest.mark.parametrize("workers", [0, 2])
def test_neither_cache_nor_workers_change_the_weights(
    plain, camvid, tmp_path, monkeypatch, cache, workers
):
    monkeypatch.chdir(tmp_path)
    options = ("--cache", cache, "--workers", workers)
    assert same_weights(weights_of_a_run(camvid, tmp_path / "run", *options), plain)
    assert (tmp_path / "ram").is_dir() == (cache == "./ram")


def test_where_images_are_kept_may_change_on_resume(plain, camvid, script, tmp_path):
    folder, options = tmp_path / "run", ("--workers", 0, "--epochs", 2, "--cache", "ram")
    weights_of_a_run(camvid, folder, *options)
    (folder / "last.pth").unlink()
    result = script("main.py", "--savedir", folder, "--resume", "--cache", tmp_path / "c")
    assert result.status == 0 and f"MB into {tmp_path / 'c'}, this once" in result.out
    again = script("main.py", "--savedir", folder, "--resume", "--cache", tmp_path / "c")
    assert again.status == 0 and "cache:" not in again.out


def test_another_seed_changes_the_weights(plain, camvid, tmp_path):
    other = weights_of_a_run(camvid, tmp_path / "run", "--workers", 0, "--seed", 1)
    assert not same_weights(other, plain)


def test_a_machine_without_the_memory_is_one_line(fails, camvid, monkeypatch, tmp_path):
    machine_of(monkeypatch, 0)
    argv = ("--dataset", "camvid", "--datadir", camvid, *ARGV, "--workers", 0)
    assert "give --cache off" in fails("main.py", *argv, "--cache", "ram", "--savedir", "a")
    assert not (tmp_path / "save").exists()


def test_a_folder_that_cannot_be_written_is_one_line(fails, camvid, tmp_path):
    argv = ("--dataset", "camvid", "--datadir", camvid, *ARGV, "--workers", 0)
    (tmp_path / "file").write_text("")
    line = fails("main.py", *argv, "--cache", tmp_path / "file", "--savedir", "a")
    assert "file cannot be written (File exists): give --cache another folder" in line
    assert "the path is empty" in fails("main.py", *argv, "--cache", "", "--savedir", "a")
    assert not (tmp_path / "save").exists()
