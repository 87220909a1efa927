"""Batches for training and validation, and one pass over the training labels.

Random augmentation depends on a seed per image, not on which process reads the image, or when.
"""

import atexit
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import active_children
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    Sampler,
    default_collate,
)
from tqdm import tqdm

from datasets.images import IGNORE_INDEX, DatasetError, NothingReadable
from datasets.segmentation import Segmentation

# After this many unreadable images in a row, the disk is more likely gone than the images broken.
MAX_BROKEN = 10


class Batch(NamedTuple):
    """A batch as the loaders yield it.

    Attributes:
        images: list of 3 x H x W, uint8, of any sizes; stacked for image classification.
        labels: list of H x W, uint8, trainIds; class numbers, int64, for image classification.
        seeds: seed of each image's augmentation; 0 in validation.
        indices: index of each image in the data set.
        left_out: reasons why images could not be read; only with skip_broken.
    """

    images: list[Tensor] | Tensor
    labels: list[Tensor] | Tensor
    seeds: list[int]
    indices: list[int]
    left_out: list[str]


class _Item(NamedTuple):
    """One image of a batch; no image if it could not be read and nothing replaces it."""

    image: Tensor | None = None
    label: Tensor | int | None = None
    seed: int = 0
    index: int = 0
    left_out: Sequence[str] = ()


class ShuffledSeeds(Sampler[tuple[int, int]]):
    """Yield every index once, in random order, with the seed of its augmentation.

    Of P processes, each gets every P-th index, so that together they form the batches of a single
    process; indices that do not divide evenly are left out of the epoch.

    Args:
        length: length of the data set.
        seed: seed of the run; with the number of the epoch it decides the whole epoch.
        process: number of this process, from 0.
        processes: number of processes.
    """

    def __init__(self, length: int, seed: int, process: int = 0, processes: int = 1) -> None:
        # Mixed, as the epoch is added: seeds 0 and 1 would share all their epochs but one.
        mixed = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
        self.order = DistributedSampler(
            range(length), processes, process, seed=mixed[0], drop_last=processes > 1
        )
        self.seed = mixed[1]
        self.start = 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the number of its items that this process has already seen."""
        self.order.set_epoch(epoch)
        self.start = start

    def __len__(self) -> int:
        return max(0, len(self.order) - self.start)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed + self.order.epoch)
        # Drawn in the order of the data set: the same for any number of processes.
        seeds = torch.randint(2**62, (len(self.order.dataset),), generator=generator)
        indices = list(self.order)[self.start :]
        return zip(indices, seeds[indices].tolist(), strict=True)


class SeededItems(Dataset):
    """Items of a data set, read with the random state that their seed gives.

    Args:
        dataset: data set of (image, label).
        skip_broken: replace an unreadable image by the next readable one, so that batches keep
            their size.
    """

    def __init__(self, dataset: Dataset, skip_broken: bool = False) -> None:
        self.dataset, self.skip_broken = dataset, skip_broken

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> _Item:
        index, seed = key
        left_out: list[str] = []
        # Without workers this runs in the training process, whose random state is its own.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU too
            while True:
                try:
                    return _Item(*self.dataset[index], seed, index, left_out)
                except DatasetError as error:
                    if not self.skip_broken:
                        raise
                    left_out.append(str(error))
                    if len(left_out) >= min(MAX_BROKEN, len(self.dataset)):
                        raise NothingReadable(
                            f"{len(left_out)} images in a row cannot be read: is the disk gone? "
                            f"{error}"
                        ) from error
                index = (index + 1) % len(self.dataset)


class ReadableItems(Dataset):
    """Items of a data set in order; an unreadable one holds the reason and no image.

    Args:
        dataset: data set of (image, label).
        skip_broken: without it, an unreadable image raises its DatasetError.
    """

    def __init__(self, dataset: Dataset, skip_broken: bool = False) -> None:
        self.dataset, self.skip_broken = dataset, skip_broken

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Item:
        try:
            image, label = self.dataset[index]
        except DatasetError as error:
            if not self.skip_broken:
                raise
            return _Item(left_out=[str(error)])
        return _Item(image, label, index=index)


def collate(items: Sequence[_Item], stacked: bool = False) -> Batch:
    """Make a batch of items; `stacked` puts the images into one tensor."""
    left_out = [reason for item in items for reason in item.left_out]
    items = [item for item in items if item.image is not None]
    images, labels = [item.image for item in items], [item.label for item in items]
    if stacked and items:
        images, labels = default_collate(images), default_collate(labels)
    return Batch(
        images, labels, [item.seed for item in items], [item.index for item in items], left_out
    )


def training_loader(
    dataset: Dataset,
    sampler: ShuffledSeeds,
    batch_size: int,
    workers: int,
    device: torch.device,
    skip_broken: bool = False,
    stacked: bool = False,
    drop_last: bool = False,
) -> DataLoader:
    """Return a loader of `Batch` in the order of the sampler.

    Args:
        dataset: data set of (image, label).
        sampler: order and seeds.
        batch_size: images of a batch.
        workers: processes that read.
        device: device of the training; for a GPU, batches are pinned.
        skip_broken: replace unreadable images by the next readable one, and report them in
            `Batch.left_out`.
        stacked: all images are of one size, and stacked; labels are class numbers.
        drop_last: leave out a last batch that is smaller.
    """
    return _loader(
        SeededItems(dataset, skip_broken),
        workers,
        device,
        sampler=sampler,
        batch_size=batch_size,
        drop_last=drop_last,
        collate_fn=partial(collate, stacked=stacked),
    )


def validation_loader(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    device: torch.device,
    skip_broken: bool = False,
    stacked: bool = False,
) -> DataLoader:
    """Return a loader of `Batch` in the order of the data set.

    Args:
        dataset, batch_size, workers, device, stacked: as for `training_loader`.
        skip_broken: leave out unreadable images, and report them in `Batch.left_out`; the images
            and labels of a batch may be empty then.
    """
    return _loader(
        ReadableItems(dataset, skip_broken),
        workers,
        device,
        batch_size=batch_size,
        collate_fn=partial(collate, stacked=stacked),
    )


def _loader(dataset: Dataset, workers: int, device: torch.device, **options: Any) -> DataLoader:
    return reading_loader(
        dataset,
        workers,
        pin_memory=device.type == "cuda",
        # Forking anew in every epoch would copy much of the memory that training on a CPU holds.
        persistent_workers=workers > 0,
        **options,
    )


def reading_loader(dataset: Dataset, workers: int, **options: Any) -> DataLoader:
    """Return a loader that leaves the random state of this process alone.

    Args:
        dataset: any data set.
        workers: processes that read.
        options: further options of the DataLoader.
    """
    return DataLoader(
        dataset,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_parent,
        # A DataLoader draws a number whenever it starts. From the global generator, a resumed run,
        # which starts its loaders again, would train on other random numbers.
        generator=torch.Generator(),
        **options,
    )


def _leave_signals_to_parent(_worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which a terminal or cluster sends to all processes of a run.

    The training process needs its workers to finish its step. It reports the errors of items as
    well; whatever else a worker would print only says that the training process has ended.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *_: None


@atexit.register  # after importing torch, so that this runs before Python's own handler
def _kill_workers() -> None:
    """Kill workers that an error left behind: Python would wait for them forever, as they ignore
    its SIGTERM."""
    for process in active_children():
        if process.daemon:
            process.kill()


class _Histograms(Dataset):
    """Pixels of each class in each label map, the ignored ones last."""

    def __init__(self, dataset: Segmentation, num_classes: int) -> None:
        self.dataset, self.num_classes = dataset, num_classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        counts = np.bincount(self.dataset.read_train_ids(index).ravel(), minlength=256)
        return torch.from_numpy(np.append(counts[: self.num_classes], counts[IGNORE_INDEX]))


def count_pixels(parts: Sequence[Segmentation], num_classes: int, workers: int = 0) -> Tensor:
    """Count the pixels of each class in all labels of some data sets, at full size.

    Returns:
        num_classes + 1 counts, int64, the ignored pixels last.

    Raises:
        DatasetError: a label cannot be read or holds an unknown id.
    """
    histograms = ConcatDataset([_Histograms(part, num_classes) for part in parts])
    loader = reading_loader(histograms, workers, batch_size=8)
    counts = torch.zeros(num_classes + 1, dtype=torch.int64)
    for batch in tqdm(loader, "counting label pixels", leave=False, disable=None):
        counts += batch.sum(0)
    return counts
