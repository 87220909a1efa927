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
from torch.utils.data import Dataset

import datasets.cache
from datasets.cache import CacheError, CacheLost, CacheTooLarge, cached, file_name, memory_limit
from datasets.camvid import CamVid
from datasets.check import check_files
from datasets.cityscapes import Cityscapes
from datasets.class_file import read_classes
from datasets.folder import Folder
from datasets.images import DatasetError
from datasets.segmentation import Classes, Segmentation

PLACES = ["ram", "folder"]


@pytest.fixture
def keep(tmp_path):
    """Cache data sets in memory or in a folder of tmp_path."""

    def keep(place: str, *datasets: Segmentation, **options) -> list[Dataset]:
        sizes = {dataset: check_files(dataset.pairs) for dataset in datasets}
        return cached(sizes, "ram" if place == "ram" else str(tmp_path / place), **options)

    return keep


def assert_same_items(ours: Dataset, theirs: Dataset) -> None:
    assert len(ours) == len(theirs)
    for index in range(len(theirs)):
        for kept, read in zip(ours[index], theirs[index], strict=True):
            assert kept.dtype == torch.uint8 and torch.equal(kept, read)
            assert kept.stride() == read.stride()


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# The items


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("height", [None, 50])
def test_items_are_those_of_the_data_set(keep, fields, place, workers, height):
    """Of many sizes, PNG and JPEG, in their order with workers too."""
    classes = read_classes(fields / "classes.txt")
    parts = [
        Folder(fields, "train", classes, height),
        Folder(fields, "val", classes, height, resize_labels=False),
    ]
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


@pytest.mark.parametrize("place", PLACES)
def test_reading_leaves_the_random_state_alone(keep, camvid, place):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    keep(place, CamVid(camvid, "val"))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("place", PLACES)
def test_a_file_that_cannot_be_read_is_named(keep, camvid_copy, tmp_path, place):
    train = CamVid(camvid_copy, "train")
    sizes = {train: check_files(train.pairs)}
    path = Path(train.pairs[-1][0])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DatasetError, match=path.name):
        cached(sizes, "ram" if place == "ram" else str(tmp_path / place))
    assert place == "ram" or files_in(tmp_path / place) == []


@pytest.mark.parametrize("place", PLACES)
def test_an_image_that_changed_its_size_is_named(camvid, tmp_path, place):
    val = CamVid(camvid, "val", height=36)
    sizes = [*check_files(val.pairs)[:-1], (72, 99)]
    with pytest.raises(DatasetError, match=f"{Path(val.pairs[-1][0]).name} has changed its size"):
        cached({val: sizes}, "ram" if place == "ram" else str(tmp_path))


# In memory


def test_all_items_lie_in_one_array_that_they_fill(keep, fields):
    (train,) = keep("ram", Folder(fields, "train", read_classes(fields / "classes.txt"), 50))
    tensors = [tensor for item in train for tensor in item]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    places = sorted((t.data_ptr(), t.data_ptr() + t.numel()) for t in tensors)
    assert all(end == start for (_, end), (start, _) in pairwise(places))
    assert tensors[0].untyped_storage().nbytes() == sum(tensor.numel() for tensor in tensors)


def set_memory(monkeypatch, megabytes: int) -> None:
    pages = {"SC_PHYS_PAGES": megabytes * 250, "SC_PAGE_SIZE": 4000}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)


def test_half_of_the_memory_must_hold_all_splits(keep, camvid, monkeypatch):
    """At this height train takes 461 kB and val 231 kB: each fits into half of a megabyte."""
    set_memory(monkeypatch, 1)
    train, val = (CamVid(camvid, split, height=120) for split in ("train", "val"))
    keep("ram", train)
    keep("ram", val)
    with pytest.raises(CacheTooLarge, match=r"camvid takes 0.7 MB of memory, .* has 1.0 MB$"):
        keep("ram", train, val)
    with pytest.raises(CacheTooLarge, match=r"takes 0.5 MB of memory in each of 2 processes"):
        keep("ram", train, processes=2)


def test_a_gpu_with_too_little_memory_leaves_the_data_to_the_cpu(keep, camvid, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300_000, 10**9))
    train = CamVid(camvid, "train")  # of 166 kB: over half of what is free
    (ours,) = keep("ram", train, device="cuda")
    assert ours[0][0].device.type == "cpu"
    assert_same_items(ours, train)


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "5000"}, 5000),
        ("0::/job/step\n", {"job/memory.max": "4000", "job/step/memory.max": "max"}, 4000),
        ("0::/job/step\n", {"job/memory.max": "4000", "job/step/memory.max": "3000"}, 3000),
        ("5:cpu:/a\n4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "2000"}, 2000),
        ("4:cpu,memory:/gone\n", {"memory/memory.limit_in_bytes": "1000"}, 1000),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": str(2**63 - 4096)}, 10**6),
        (None, {}, 10**6),
    ],
)
def test_the_memory_of_a_container_or_job(tmp_path, monkeypatch, groups, limits, expected):
    set_memory(monkeypatch, 1)
    for name, text in limits.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    assert memory_limit(tmp_path) == expected


# In a folder


class Reading(CamVid):
    """CamVid that calls a function before it reads an item."""

    def __init__(self, root: Path, split: str, before, **options) -> None:
        super().__init__(root, split, **options)
        self.before = before

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.before(index)
        return super().__getitem__(index)


Reading.__name__ = "CamVid"


def unread(_index: int) -> None:
    raise AssertionError("an image was read")


def test_a_second_run_reads_no_image(keep, camvid, tmp_path):
    parts = [CamVid(camvid, split, height=36) for split in ("train", "val")]
    keep("folder", *parts)
    names = files_in(tmp_path / "folder")
    assert [name.rsplit("-", 1)[0] for name in names] == ["camvid-train-36", "camvid-val-36"]
    assert all(name.endswith(".bin") for name in names)
    again = [Reading(camvid, split, unread, height=36) for split in ("train", "val")]
    for ours, part in zip(keep("folder", *again), parts, strict=True):
        assert_same_items(ours, part)
    assert files_in(tmp_path / "folder") == names


def test_a_file_holds_the_bytes_of_the_items_only(keep, camvid, tmp_path):
    keep("folder", CamVid(camvid, "val", height=36, resize_labels=False))
    (path,) = (tmp_path / "folder").glob("*.bin")
    assert path.stat().st_size == 3 * (3 * 36 * 48 + 72 * 96)


def test_changing_an_item_does_not_change_the_file(keep, camvid):
    val = CamVid(camvid, "val")
    (ours,) = keep("folder", val)
    image, label = ours[1]
    image.zero_(), label.zero_()
    assert_same_items(ours, val)


def name_of(root: Path, split: str = "train", classes: Classes | None = None, **options) -> str:
    return file_name(CamVid(root, split, classes, **options))


def test_the_name_of_a_file_depends_on_all_that_its_bytes_do(camvid_copy, monkeypatch):
    ours = CamVid.CLASSES
    other_ids = Classes(ours.names, ours.colors, ours.label_ids[::-1], ours.ignored_ids)
    other_colors = Classes(ours.names, ours.colors[::-1], ours.label_ids, ours.ignored_ids)
    names = [
        name_of(camvid_copy, height=36),
        name_of(camvid_copy),
        name_of(camvid_copy, height=37),
        name_of(camvid_copy, "val", height=36),
        name_of(camvid_copy, height=36, resize_labels=False),
        name_of(camvid_copy, classes=other_ids, height=36),
        name_of(camvid_copy, classes=other_colors, height=36),
    ]
    folders = ("train", "trainannot")
    for path in [min((camvid_copy / folder).glob("*.png")) for folder in folders]:
        status = path.stat()
        for more in (b"", b"more"):
            with path.open("ab") as file:
                file.write(more)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
            names.append(name_of(camvid_copy, height=36))
    for folder in folders:
        path = min((camvid_copy / folder).glob("*.png"))
        path.rename(path.with_stem("0000TP_000009"))
    names.append(name_of(camvid_copy, height=36))
    for module, name in ((datasets.cache.PIL, "__version__"), (datasets.cache, "FORMAT")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "99")
            names.append(name_of(camvid_copy, height=36))
    assert len(set(names)) == len(names) == 14


def test_the_name_of_a_file_depends_on_nothing_else(camvid_copy, tmp_path):
    first, ours = name_of(camvid_copy, height=36), CamVid.CLASSES
    names = [f"other {name}" for name in ours.names]
    renamed = Classes(names, ours.colors, ours.label_ids, ours.ignored_ids)
    assert name_of(camvid_copy, classes=renamed, height=36) == first
    shutil.copytree(camvid_copy, tmp_path / "elsewhere")
    assert name_of(tmp_path / "elsewhere", height=36) == first


def test_a_changed_image_is_read_again(keep, camvid_copy, tmp_path):
    (before,) = keep("folder", CamVid(camvid_copy, "val"))
    paths = [Path(path) for path, _ in CamVid(camvid_copy, "val").pairs]
    shutil.copy(paths[0], paths[2])
    (after,) = keep("folder", CamVid(camvid_copy, "val"))
    assert torch.equal(after[2][0], after[0][0]) and not torch.equal(before[2][0], after[2][0])
    assert len(files_in(tmp_path / "folder")) == 2  # another run may use the old one


def test_an_interrupted_run_leaves_nothing(keep, camvid, tmp_path):
    def interrupt(index: int) -> None:
        if index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep("folder", Reading(camvid, "val", interrupt))
    assert files_in(tmp_path / "folder") == []


FORK = multiprocessing.get_context("fork")


def test_a_killed_run_leaves_nothing_that_is_taken_for_whole(keep, camvid, tmp_path):
    def die(index: int) -> None:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=keep, args=("folder", Reading(camvid, "val", die)))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = files_in(tmp_path / "folder")
    assert ".unfinished" in left
    val = CamVid(camvid, "val")
    assert_same_items(*keep("folder", val), val)
    (name,) = files_in(tmp_path / "folder")
    assert name.endswith(".bin") and ".unfinished" not in name


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_is_written_again(keep, camvid, tmp_path, change):
    val = CamVid(camvid, "val")
    keep("folder", val)
    (path,) = (tmp_path / "folder").glob("*.bin")
    os.truncate(path, path.stat().st_size + change)
    assert_same_items(*keep("folder", val), val)


def test_one_of_several_processes_writes(keep, camvid, tmp_path):
    def slowly(_index: int) -> None:
        with (tmp_path / "read").open("a") as file:
            file.write("x")
        time.sleep(0.1)

    train = Reading(camvid, "train", slowly, height=36)
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


def test_too_little_disk_is_found_before_an_image_is_read(keep, camvid, tmp_path, monkeypatch):
    """All splits together: 166 kB and 83 kB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 8 * 10**8, 2 * 10**5))
    message = r"the decoded images take 0.2 MB, and .*folder has 0.2 MB free$"
    with pytest.raises(CacheTooLarge, match=message):
        keep("folder", *(Reading(camvid, split, unread) for split in ("train", "val")))
    assert files_in(tmp_path / "folder") == []
    keep("folder", CamVid(camvid, "val"))


def test_a_disk_that_fills_up_is_an_error(keep, camvid, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = r"folder cannot be written \(No space left on device\)$"
    with pytest.raises(CacheError, match=message):
        keep("folder", CamVid(camvid, "val"))
    assert files_in(tmp_path / "folder") == []


def test_a_folder_that_cannot_be_written(keep, camvid, tmp_path):
    (tmp_path / "file").write_text("")
    for place, reason in (("file", "File exists"), ("file/below", "Not a directory")):
        with pytest.raises(CacheError, match=rf"{place} cannot be written \({reason}\)$"):
            keep(place, CamVid(camvid, "val"))
    with pytest.raises(CacheError, match=r"/proc/below cannot be written \(.+\)$"):
        keep("/proc/below", CamVid(camvid, "val"))


def test_a_read_only_folder_serves_what_it_holds(keep, camvid, monkeypatch):
    val = CamVid(camvid, "val")
    keep("folder", val)

    def read_only(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert_same_items(*keep("folder", val), val)
    with pytest.raises(CacheError, match=r"folder cannot be written \(Permission denied\)"):
        keep("folder", CamVid(camvid, "train"))


def test_a_file_that_is_removed_while_in_use(keep, camvid, tmp_path):
    (ours,) = keep("folder", CamVid(camvid, "val"))
    (path,) = (tmp_path / "folder").glob("*.bin")
    os.truncate(path, 100)
    with pytest.raises(CacheLost, match="was removed or cut short"):
        ours[1]
    path.unlink()
    with pytest.raises(CacheLost, match=r"bin was removed"):
        ours[0]
