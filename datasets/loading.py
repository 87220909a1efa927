"""Random augmentation that depends on the seed alone, not on which process draws it, or when."""

import atexit
import signal
import sys
from collections.abc import Iterator
from multiprocessing import active_children
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from datasets.images import DatasetError

Item = tuple[int, int]  # index and seed

# As many neighbours of a broken image are tried before the whole disk is taken for broken.
MOST_BROKEN = 10


class ShuffledSeeds(Sampler[Item]):
    """Every index once, in random order, each with the seed that its item is drawn from.

    Of several processes each gets every so-manieth index, so that together they make the batches
    that one process would; the indices that do not go round are left out of this epoch.

    Args:
        length: of the data set.
        seed: decides, with the number of the epoch, the whole epoch.
        process, processes: the number of this process from 0 on, and how many there are.
    """

    def __init__(self, length: int, seed: int, process: int = 0, processes: int = 1) -> None:
        # Mixed: the epoch is added, and the epochs of seeds 0 and 1 would be the same ones.
        mixed = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
        self.order = DistributedSampler(
            range(length), processes, process, seed=mixed[0], drop_last=processes > 1
        )
        self.seed = mixed[1]
        self.start = 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and how many of its items this process has seen already."""
        self.order.set_epoch(epoch)
        self.start = start

    def __len__(self) -> int:
        return max(0, len(self.order) - self.start)

    def __iter__(self) -> Iterator[Item]:
        generator = torch.Generator().manual_seed(self.seed + self.order.epoch)
        # Of all images, in the order of the data set: the same however many processes there are.
        seeds = torch.randint(2**62, (len(self.order.dataset),), generator=generator)
        indices = list(self.order)[self.start :]
        return zip(indices, seeds[indices].tolist(), strict=True)


class Seeded(Dataset):
    """A data set whose random transforms start from the seed that comes with each index.

    Each item ends with its index, and the reason why it stands in for another, "" where it does
    not.

    Args:
        skip_broken: in place of an image that cannot be read comes the next one that can: batches
            keep their size.
    """

    def __init__(self, dataset: Dataset, skip_broken: bool = False) -> None:
        self.dataset, self.skip_broken = dataset, skip_broken

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, drawn: Item) -> tuple:
        index, seed = drawn
        # Without workers this runs in the training process, whose random state is its own.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU too
            return self.read(index)

    def read(self, index: int) -> tuple:
        """An item with its index and what was wrong with the ones before it.

        Raises:
            DatasetError: it cannot be read, nor can its neighbours with `skip_broken`.
        """
        reasons: list[str] = []
        while True:
            try:
                return *self.dataset[index], index, "\n".join(reasons)
            except DatasetError as error:
                if not self.skip_broken:
                    raise
                reasons.append(str(error))
                if len(reasons) >= min(MOST_BROKEN, len(self.dataset)):
                    raise DatasetError(
                        f"{len(reasons)} images one after the other are broken: is the disk gone? "
                        f"{error}"
                    ) from error
            index = (index + 1) % len(self.dataset)


class WithSeed(Seeded):
    """A data set that hands each item on with its seed, for transforms that come later."""

    def __getitem__(self, drawn: Item) -> tuple:
        index, seed = drawn
        *item, index, reason = self.read(index)
        return *item, seed, index, reason


def as_lists(items: list[tuple]) -> tuple[list, ...]:
    """Collate items as lists, so that their tensors may differ in size."""
    return tuple(map(list, zip(*items, strict=True)))


def training_loader(dataset: Seeded, sampler: ShuffledSeeds, **options: Any) -> DataLoader:
    """Batches of a shuffled data set whose random transforms follow the sampler alone.

    Args:
        options: of the DataLoader, such as `loader_options` returns.
    """
    return DataLoader(dataset, sampler=sampler, **options)


def loader_options(batch_size: int, workers: int, device: torch.device) -> dict[str, Any]:
    """How the scripts load, for training and validation alike: options of a DataLoader."""
    return {
        "batch_size": batch_size,
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        # To fork anew in every epoch would copy much of the memory that training on a CPU holds.
        "persistent_workers": workers > 0,
        "worker_init_fn": leave_all_to_training,
        # Loaders draw a number when they start: not from the state that training draws from, or
        # a run that is resumed, and starts them again, would draw otherwise.
        "generator": torch.Generator(),
    }


def reading_loader(dataset: Dataset, workers: int, **options: Any) -> DataLoader:
    """Reads a data set through once, in order, without a part in what training draws.

    Args:
        options: further ones of the DataLoader.
    """
    return DataLoader(
        dataset,
        num_workers=workers,
        worker_init_fn=leave_all_to_training,
        generator=torch.Generator(),
        **options,
    )


def leave_all_to_training(_worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which a terminal or a cluster sends to every process of a run, to
    the training process: it needs its workers to finish its step. It is sent the errors of items,
    too; what else there is to tell comes of its having ended, and is no news to anybody."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *_: None


@atexit.register  # after torch is imported: this comes before what Python does
def end_workers() -> None:
    """End the workers that an error left: Python would send them a SIGTERM, which they ignore, and
    wait for them for ever."""
    for process in active_children():
        if process.daemon:
            process.kill()
