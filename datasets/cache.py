"""A data set decoded and resized once, and kept as bytes: in memory, or in a file of each split.

A file is named by what its bytes come from and holds the items one after the other, each the image
and then the label; where they lie follows from the sizes of the images. So there is no index, and
nothing to be out of date: another height, or a file that was changed, makes another name.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np
import PIL
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from datasets.images import DatasetError
from datasets.loading import reading_loader
from datasets.segmentation import Segmentation, resized_size
from utils.files import sync

# To be raised when the same files come to other bytes, so that no older file is read.
FORMAT = 1

UNFINISHED = ".unfinished"


class CacheError(DatasetError):
    """The cache cannot be used; the message says why."""


class CacheTooLarge(CacheError):
    """The cache does not fit into memory or on the disk."""


class CacheLost(CacheError):
    """A file of the cache was removed or cut short while in use."""


Size = tuple[int, int]
Pair = tuple[Tensor, Tensor]
Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of an image and its label


def cached(
    datasets: Mapping[Segmentation, list[Size]],
    place: str,
    workers: int = 0,
    device: torch.device | str = "cpu",
    processes: int = 1,
) -> list[Dataset]:
    """The same data sets, decoded and resized once; their items are the same, bit for bit.

    Args:
        datasets: each with the height and width of its image files, as `check_headers` returns.
        place: "ram", the memory of the device, or of the CPU where the device lacks the room; or
            a folder, in which each data set has a file that any later run finds.
        workers: processes that decode.
        processes: that keep them on this machine, each in its own memory.

    Raises:
        DatasetError: there is too little room, the folder cannot be written, or an image or label
            cannot be read.
    """
    if place == "ram":
        return _in_memory(datasets, workers, torch.device(device), processes)
    return _in_folder(datasets, Path(place), workers)


# In memory


class InMemory(Dataset):
    """The items of a data set out of one array of uint8 on a device."""

    def __init__(
        self, dataset: Segmentation, sizes: list[Size], workers: int, device: torch.device
    ) -> None:
        shapes = shapes_of(dataset, sizes)
        lengths = [_length(of_item) for of_item in shapes]
        array = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
        self.items = [_views(*item) for item in zip(array.split(lengths), shapes, strict=True)]
        for kept, item in zip(self.items, _decoded(dataset, shapes, workers), strict=True):
            _fill(kept, item)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Pair:
        return self.items[index]


def _in_memory(
    datasets: Mapping[Segmentation, list[Size]],
    workers: int,
    device: torch.device,
    processes: int,
) -> list[Dataset]:
    """Keep them on the device, or all on the CPU; half of the memory is left to everything else."""
    count = sum(_length(item) for part in datasets.items() for item in shapes_of(*part))
    if device.type == "cuda" and count > torch.cuda.mem_get_info(device)[0] / 2:
        device = torch.device("cpu")
    total = memory_limit()
    if device.type == "cpu" and processes * count > total / 2:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise CacheTooLarge(
            f"{next(iter(datasets)).root} takes {_size(count)} of memory{each}, and the machine "
            f"has {_size(total)}"
        )
    print(f"cache: {_size(count)} in the memory of {device}", flush=True)
    return [InMemory(dataset, sizes, workers, device) for dataset, sizes in datasets.items()]


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may have: the machine's, or less in a container or job.

    What the system keeps of files counts as well: it is not free, but can be had.

    Args:
        root: of the file system that says what the limits of the control groups are.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not on Linux
        groups = []
    for line in groups:
        _, controllers, group = line.split(":", 2)
        if not controllers:  # version 2 has one tree of groups for all
            folder, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # The limits of the groups around it hold as well; a container sees its own as the root.
        group_folder = folder / group.lstrip("/")
        for around in (group_folder, *group_folder.parents):
            try:
                limits.append(int((around / name).read_text()))
            except (OSError, ValueError):  # there is none, or it is "max"
                continue
    return min(limits)


# In a folder


class InFile(Dataset):
    """The items of a data set out of a file that is mapped into memory.

    Args:
        folder: that the file lies in, or will; its name says what its bytes come from.
    """

    def __init__(self, dataset: Segmentation, sizes: list[Size], folder: Path) -> None:
        self.shapes = shapes_of(dataset, sizes)
        lengths = [_length(of_item) for of_item in self.shapes]
        *self.starts, self.length = accumulate(lengths, initial=0)
        name = f"{type(dataset).__name__.lower()}-{dataset.split}-{dataset.height or 'full'}"
        self.path = folder / f"{name}-{key_of(dataset)}.bin"

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Pair:
        shapes = self.shapes[index]
        try:
            # An item at a time: the whole cannot be mapped where it is larger than the memory. "c"
            # leaves the file as it is, whatever becomes of the item.
            part = np.memmap(self.path, np.uint8, "c", self.starts[index], _length(shapes))
        except (OSError, ValueError) as error:
            raise CacheLost(f"{self.path} was removed or cut short while in use") from error
        return _views(torch.from_numpy(part), shapes)

    def exists(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.length

    def write(self, dataset: Segmentation, workers: int) -> None:
        """Make the file: written beside, synced and renamed, it is whole or absent.

        Raises:
            OSError: it cannot be written.
            DatasetError: an image or label cannot be read.
        """
        unfinished = self.path.with_suffix(UNFINISHED)
        try:
            with unfinished.open("wb") as file:
                _reserve(file.fileno(), self.length)
                items = _decoded(dataset, self.shapes, workers)
                for shapes, item in zip(self.shapes, items, strict=True):
                    part = torch.empty(_length(shapes), dtype=torch.uint8)
                    _fill(_views(part, shapes), item)
                    file.write(part.numpy())
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.path)
            sync(self.path.parent)
        finally:
            unfinished.unlink(missing_ok=True)


def _reserve(handle: int, length: int) -> None:
    """Have a full disk found before all is decoded, where the file system can tell."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(handle, 0, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _in_folder(
    datasets: Mapping[Segmentation, list[Size]], folder: Path, workers: int
) -> list[Dataset]:
    """Find the files in the folder; one process makes what is missing, others wait for it."""
    kept = {dataset: InFile(dataset, sizes, folder) for dataset, sizes in datasets.items()}
    if all(file.exists() for file in kept.values()):
        return list(kept.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            print(f"cache: waiting for another process, which writes into {folder}", flush=True)
            held = lock.acquire()
        with held:
            _write_missing(kept, folder, workers)
    except OSError as error:
        raise CacheError(f"{folder} cannot be written ({error.strerror or error})") from error
    return list(kept.values())


def _write_missing(kept: Mapping[Segmentation, InFile], folder: Path, workers: int) -> None:
    """Write the files that are missing; no other process may do so at the time."""
    for left in folder.glob(f"*{UNFINISHED}"):  # by a process that was killed
        left.unlink()
    missing = {dataset: file for dataset, file in kept.items() if not file.exists()}
    if not missing:  # another process has made them meanwhile
        return
    count, free = sum(file.length for file in missing.values()), shutil.disk_usage(folder).free
    if count > free:
        raise CacheTooLarge(
            f"the decoded images take {_size(count)}, and {folder} has {_size(free)} free"
        )
    print(
        f"cache: writing {_size(count)} into {folder}, this once; {_size(free)} are free there",
        flush=True,
    )
    for dataset, file in missing.items():
        file.write(dataset, workers)


def key_of(dataset: Segmentation) -> str:
    """A short hash of all that decides the items of a data set, wherever it lies."""
    paths = [path for pair in dataset.pairs for path in pair if path is not None]
    found = [(os.path.relpath(path, dataset.root), os.stat(path)) for path in paths]
    made_of = {
        "format": FORMAT,
        "pillow": PIL.__version__,
        "kind": type(dataset).__name__,
        "split": dataset.split,
        "height": dataset.height,
        "resize_labels": dataset.resize_labels,
        "train_ids": dataset.classes.to_train_ids().tolist(),
        "files": [(path, status.st_size, status.st_mtime_ns) for path, status in found],
    }
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]


# What both have in common: where the items lie, and how they are read


def shapes_of(dataset: Segmentation, sizes: list[Size]) -> list[Shapes]:
    """The shapes of each image and its label, of image files of these sizes."""
    shapes: list[Shapes] = []
    for size in sizes:
        resized = size if dataset.height is None else resized_size(*size, dataset.height)
        shapes.append(((3, *resized), resized if dataset.resize_labels else size))
    return shapes


def _length(shapes: Shapes) -> int:
    """The bytes of an image and its label."""
    image, label = shapes
    return prod(image) + prod(label)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _views(part: Tensor, shapes: Shapes) -> Pair:
    """An image and its label, of these shapes, that lie one after the other.

    The three colours of a pixel lie together, as in the items of a data set: the same kernels run
    on both, the fast ones.
    """
    (channels, *plane), label = shapes
    pixels, classes = part.split([channels * prod(plane), prod(label)])
    return pixels.view(*plane, channels).permute(2, 0, 1), classes.view(label)


def _fill(kept: Pair, item: Pair) -> None:
    for views, values in zip(kept, item, strict=True):
        views.copy_(values)


def _decoded(dataset: Segmentation, shapes: list[Shapes], workers: int) -> Iterator[Pair]:
    """Read every item of a data set, in order.

    Raises:
        DatasetError: a file cannot be read, or has another size than before.
    """
    loader = reading_loader(dataset, workers, batch_size=None)
    title = f"reading {dataset.split}"
    reading = tqdm(loader, title, unit="img", leave=False, disable=None)
    for item, expected, (path, _) in zip(reading, shapes, dataset.pairs, strict=True):
        if tuple(values.shape for values in item) != expected:
            raise DatasetError(f"{path} has changed its size since it was checked: start again")
        yield item
