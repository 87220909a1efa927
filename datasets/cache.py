"""A data set decoded and resized once and kept as bytes, in memory or in a file for each split.

A file holds the items one after the other, each the image, H x W x 3, and then the label. Its name
contains a hash of everything that its bytes depend on, so a file is never out of date: another
height, or an image that was changed, gives another name.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path, PurePosixPath

import numpy as np
import PIL
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import Dataset

from datasets.images import DatasetError, Size
from datasets.loading import call_in_workers
from datasets.segmentation import Segmentation, resized_size
from utils.files import atomic_write, remove_unfinished

# Increase when the same files decode to other bytes, so that older caches are not read.
FORMAT = 2

Splits = Mapping[Segmentation, list[Size]]  # data sets with the sizes of their image files


class CacheError(DatasetError):
    """The cache cannot be used."""


class CacheTooLarge(CacheError):
    """The cache does not fit into memory or on the disk."""


class CacheLost(CacheError):
    """A file of the cache was removed or cut short while in use."""


def cached(
    splits: Splits, place: str, workers: int = 0, device: torch.device | str = "cpu",
    processes: int = 1,
) -> list[Dataset]:  # fmt: skip
    """Return the same data sets, decoded and resized once; items are equal bit for bit.

    Args:
        place: "ram", the memory of the device, or of the CPU if the device has too little; or a
            folder, whose files later runs find.
        processes: processes on this machine, each of which keeps the data in memory.
    """
    if place == "ram":
        return _in_memory(splits, workers, torch.device(device), processes)
    return _in_folder(splits, Path(place), workers)


class Cached(Dataset):
    """Items of a data set as bytes: in `array`, or in a file that is mapped an item at a time."""

    array: Tensor | None = None  # on a device

    def __init__(self, dataset: Segmentation, sizes: list[Size], path: Path | None = None) -> None:
        self.dataset, self.path, self.shapes, self.starts = dataset, path, [], [0]
        for size in sizes:
            resized = size if dataset.height is None else resized_size(*size, dataset.height)
            image, label = (*resized, 3), resized if dataset.resize_labels else size
            self.shapes.append((image, label))
            self.starts.append(self.starts[-1] + prod(image) + prod(label))
        self.length = self.starts[-1]

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.shapes[index]
        pixels, classes = self.item_bytes(index).split([prod(image), prod(label)])
        return pixels.view(image).permute(2, 0, 1), classes.view(label)

    def item_bytes(self, index: int) -> Tensor:
        """Return the bytes of an item, the image and then the label, without a copy."""
        start, end = self.starts[index], self.starts[index + 1]
        if self.array is not None:
            return self.array[start:end]
        try:
            # Mapped as "c", copy on write, so that nothing changes the file.
            return torch.from_numpy(np.memmap(self.path, np.uint8, "c", start, end - start))
        except (OSError, ValueError) as error:
            raise CacheLost(f"{self.path} was removed or cut short while in use") from error

    def decode(self, workers: int) -> Iterator[Tensor]:
        """Read the data set in order, and yield the bytes of each item."""
        read, title = self.dataset.__getitem__, f"reading {self.dataset.split}"
        for index, (image, label) in enumerate(call_in_workers(read, len(self), workers, title)):
            image = image.permute(1, 2, 0)
            if (image.shape, label.shape) != self.shapes[index]:
                path = self.dataset.pairs[index][0]
                raise DatasetError(f"{path} has changed its size since it was checked: start again")
            yield torch.cat([image.flatten(), label.flatten()])

    def load(self, workers: int, device: torch.device) -> None:
        """Decode all items into the memory of a device."""
        self.array = torch.empty(self.length, dtype=torch.uint8, device=device)
        for index, values in enumerate(self.decode(workers)):
            self.item_bytes(index).copy_(values)

    def write(self, workers: int) -> None:
        """Decode all items into the file, whole or not at all."""
        with atomic_write(self.path) as unfinished, unfinished.open("wb") as file:
            for values in self.decode(workers):
                file.write(values.numpy())

    def is_written(self) -> bool:
        """Whether the file exists, at its full length."""
        return self.path.is_file() and self.path.stat().st_size == self.length


def _in_memory(splits: Splits, workers: int, device: torch.device, processes: int) -> list[Dataset]:
    """Keep all splits on the device, or all on the CPU, in at most half of its memory."""
    datasets = [Cached(dataset, sizes) for dataset, sizes in splits.items()]
    count, total = sum(dataset.length for dataset in datasets), memory_limit()
    if device.type == "cuda" and count > torch.cuda.mem_get_info(device)[0] / 2:
        device = torch.device("cpu")
    if device.type == "cpu" and processes * count > total / 2:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise CacheTooLarge(
            f"{next(iter(splits)).root} takes {_readable(count)} of memory{each}, and the machine "
            f"has {_readable(total)}"
        )
    print(f"cache: {_readable(count)} in the memory of {device}", flush=True)
    for dataset in datasets:
        dataset.load(workers, device)
    return datasets


def memory_limit(root: Path = Path("/")) -> int:
    """Return the memory of this machine, or the limit of this container or job, in bytes."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    lines: list[str] = []
    with suppress(OSError):  # not on Linux
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    for group in (PurePosixPath(line.split(":", 2)[2]) for line in lines):
        # The limits of the groups around it apply as well; a container sees its own as the root.
        for around in (group, *group.parents):
            for path in (f"{around}/memory.max", f"memory{around}/memory.limit_in_bytes"):
                with suppress(OSError, ValueError):  # there is none, or it is "max"
                    limits.append(int((root / "sys/fs/cgroup" / path.lstrip("/")).read_text()))
    return min(limits)


def _in_folder(splits: Splits, folder: Path, workers: int) -> list[Dataset]:
    """Find the files in the folder; one process writes those that are missing, others wait."""
    files = [Cached(part, sizes, folder / file_name(part)) for part, sizes in splits.items()]
    if all(file.is_written() for file in files):
        return files
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            print(f"cache: waiting for another process, which writes into {folder}", flush=True)
            held = lock.acquire()
        with held:
            _write_missing(files, folder, workers)
    except OSError as error:
        raise CacheError(f"{folder} cannot be written ({error.strerror or error})") from error
    return files


def _write_missing(files: list[Cached], folder: Path, workers: int) -> None:
    remove_unfinished(folder)
    missing = [file for file in files if not file.is_written()]
    count, free = sum(file.length for file in missing), shutil.disk_usage(folder).free
    if count > free:
        raise CacheTooLarge(
            f"the decoded images take {_readable(count)}, and {folder} has {_readable(free)} free"
        )
    if missing:  # else the other process has written them
        print(f"cache: writing {_readable(count)} into {folder}, this once", flush=True)
    for file in missing:
        file.write(workers)


def file_name(dataset: Segmentation) -> str:
    """Return a name with a hash of all that the items depend on, wherever the data set lies."""
    paths = [path for pair in dataset.pairs for path in pair if path is not None]
    found = [(os.path.relpath(path, dataset.root), os.stat(path)) for path in paths]
    content = {
        "format": FORMAT,
        "pillow": PIL.__version__,
        "kind": type(dataset).__name__,
        "split": dataset.split,
        "height": dataset.height,
        "resize_labels": dataset.resize_labels,
        "train_ids": dataset.classes.to_train_ids().tolist(),
        "label_ids": sorted(dataset.classes.known_ids()),
        "label_colors": sorted(dataset.classes.ids_by_color().items()),
        "files": [(path, status.st_size, status.st_mtime_ns) for path, status in found],
    }
    content_hash = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    name = f"{type(dataset).__name__.lower()}-{dataset.split}-{dataset.height or 'full'}"
    return f"{name}-{content_hash}.bin"


def _readable(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
