"""Random augmentation that depends on the seed alone, not on which process draws it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

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
