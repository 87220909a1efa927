"""Random augmentation that depends on the seed alone, not on which process draws it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

Item = tuple[int, int]  # index and seed


class ShuffledSeeds(Sampler[Item]):
    """Every index once, in random order, each with the seed that its item is drawn from.

    Args:
        length: of the data set.
        generator: its state before an epoch decides the whole epoch.
    """

    def __init__(self, length: int, generator: torch.Generator) -> None:
        self.length, self.generator = length, generator

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Item]:
        order = torch.randperm(self.length, generator=self.generator)
        seeds = torch.randint(2**62, (self.length,), generator=self.generator)
        return zip(order.tolist(), seeds.tolist(), strict=True)


class Seeded(Dataset):
    """A data set whose random transforms start from the seed that comes with each index."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Item) -> Any:
        index, seed = item
        # Without workers this runs in the training process, whose random state is its own.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU too
            return self.dataset[index]


class WithSeed(Dataset):
    """A data set that hands each item on with its seed, for transforms that come later."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Item) -> tuple:
        index, seed = item
        return *self.dataset[index], seed


def as_lists(items: list[tuple]) -> tuple[list, ...]:
    """Collate items as lists, so that their tensors may differ in size."""
    return tuple(map(list, zip(*items, strict=True)))


def training_loader(
    dataset: WithSeed | Seeded, shuffling: torch.Generator, **options: Any
) -> DataLoader:
    """Batches of a shuffled data set whose random transforms follow `shuffling` alone.

    Args:
        shuffling: its state before an epoch decides the epoch: order, crops, flips, all.
        options: of the DataLoader, such as `loader_options` returns.
    """
    return DataLoader(dataset, sampler=ShuffledSeeds(len(dataset), shuffling), **options)


def loader_options(batch_size: int, workers: int, device: torch.device) -> dict[str, Any]:
    """How the scripts load, for training and validation alike: options of a DataLoader."""
    return {
        "batch_size": batch_size,
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        # To fork anew in every epoch would copy much of the memory that training on a CPU holds.
        "persistent_workers": workers > 0,
        # Loaders draw a number when they start: not from the state that training draws from, or
        # a run that is resumed, and starts them again, would draw otherwise.
        "generator": torch.Generator(),
    }
