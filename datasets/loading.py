"""Batches for training and validation, and calls of a function in worker processes.

Random augmentation depends on a seed per image, not on which process reads the image, or when.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, Sampler
from tqdm import tqdm

from datasets.images import DatasetError, NothingReadable
from datasets.soft_labels import SoftLabels
from datasets.workers import Loader

# After this many unreadable images in a row, the disk is more likely gone than the images broken.
MAX_BROKEN = 10

T = TypeVar("T")


class Batch(NamedTuple):
    """A batch as the loaders yield it; of image classification, the first two are tensors."""

    images: list[Tensor] | Tensor  # 3 x H x W, uint8, of any sizes
    labels: list[Tensor] | Tensor  # H x W, uint8, trainIds
    seeds: list[int]  # of the augmentation of each image; 0 in validation
    indices: list[int]  # in the data set
    left_out: list[str]  # why images could not be read, with skip_broken
    soft_labels: Sequence[Tensor] = ()  # C x h x w, uint8, 255 = 1, if training has them


class ShuffledSeeds(Sampler[tuple[int, int]]):
    """Every index once, in random order, with the seed of its augmentation.

    Of P processes, each gets every P-th index, so that together they form the batches of a single
    process; indices that do not divide evenly are left out of the epoch.

    Args:
        length: length of the data set.
        seed: seed of the run; with the number of the epoch it decides the whole epoch.
        process, processes: number of this process, from 0, and of all.
    """

    def __init__(self, length: int, seed: int, process: int = 0, processes: int = 1) -> None:
        # Mixed, as the epoch is added: seeds 0 and 1 would share all their epochs but one.
        mixed = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
        self.order = DistributedSampler(
            range(length), processes, process, seed=mixed[0], drop_last=processes > 1
        )
        self.seed, self.start = mixed[1], 0

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
    """Items of a data set by index and seed, from which random transforms start, as batches of one.

    Args:
        skip_broken: report unreadable images instead of raising their errors.
        replace: with skip_broken, read the next readable image instead: batches keep their size.
        soft_labels: those of each image, if training has them.
    """

    def __init__(
        self,
        dataset: Dataset,
        skip_broken: bool = False,
        replace: bool = True,
        soft_labels: SoftLabels | None = None,
    ) -> None:
        self.dataset, self.skip_broken, self.replace = dataset, skip_broken, replace
        self.soft_labels = soft_labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        index, seed = key
        left_out: list[str] = []
        # Without workers this runs in the training process, whose random state is its own.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU too
            for _ in range(min(MAX_BROKEN, len(self.dataset))):
                try:
                    image, label = self.dataset[index]
                    soft = [self.soft_labels[index]] if self.soft_labels else []
                    return Batch([image], [label], [seed], [index], left_out, soft)
                except DatasetError as error:
                    if not self.skip_broken:
                        raise
                    left_out.append(str(error))
                    if not self.replace:
                        return Batch([], [], [], [], left_out)
                index = (index + 1) % len(self.dataset)
        raise NothingReadable(
            f"{len(left_out)} images in a row cannot be read: is the disk gone? {left_out[-1]}"
        )


def collate(items: Sequence[Batch], stacked: bool = False) -> Batch:
    """Join batches of one item; `stacked` puts their images into one tensor."""
    batch = Batch(*(list(chain(*column)) for column in zip(*items, strict=True)))
    if not stacked or not batch.images:
        return batch
    # Not by default_collate, which takes the memory for it from /dev/shm.
    return batch._replace(images=torch.stack(batch.images), labels=torch.tensor(batch.labels))


def batch_loader(
    dataset: Dataset,
    sampler: ShuffledSeeds | None,
    batch_size: int,
    workers: int,
    pin_memory: bool = False,
    skip_broken: bool = False,
    stacked: bool = False,
    drop_last: bool = False,
    soft_labels: SoftLabels | None = None,
) -> Loader:
    """Return a loader of `Batch`.

    Args:
        sampler: order and seeds of training; None to validate, in the order of the data set.
        pin_memory: put batches where a GPU can fetch them from.
        skip_broken: leave out unreadable images: training reads the next one in place of each, and
            a batch of validation is smaller, or empty.
        stacked: stack the images, which must be of one size; labels are class numbers.
        drop_last: leave out a smaller last batch.
        soft_labels: those of each image, if training has them.
    """
    validating = sampler is None
    return Loader(
        SeededItems(dataset, skip_broken, not validating, soft_labels),
        workers,
        partial(collate, stacked=stacked),
        sampler=[(index, 0) for index in range(len(dataset))] if validating else sampler,
        batch_size=batch_size,
        drop_last=drop_last,
        pin_memory=pin_memory,
    )


def call_in_workers(
    function: Callable[[int], T], count: int, workers: int, title: str
) -> Iterator[T]:
    """Yield function(0), function(1), ... of `count` images, computed by worker processes."""
    # With batch_size=None a DataLoader applies collate_fn to each item: here, to each index.
    loader = Loader(range(count), workers, function, batch_size=None)
    yield from tqdm(loader, title, unit="img", leave=False, disable=None)
