"""Scoring without the images that cannot be read, in a run that is to go on without them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, default_collate

from datasets.images import DatasetError


class ReadableBatch(NamedTuple):
    """What a loader of `Readable` yields.

    Attributes:
        batch: of the items that could be read, None where there was none.
        reasons: why each of the others could not.
    """

    batch: Any
    reasons: list[str]


class Readable(Dataset):
    """A data set whose items that cannot be read are the reason why."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except DatasetError as error:
            return str(error)


class CollateReadable:
    """Collates the items of `Readable`, those that were read by a function for such items."""

    def __init__(self, collate: Callable[[list], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list) -> ReadableBatch:
        read = [item for item in items if not isinstance(item, str)]
        reasons = [item for item in items if isinstance(item, str)]
        return ReadableBatch(self.collate(read) if read else None, reasons)


def validation_loader(dataset: Dataset, skip_broken: bool, **options: Any) -> DataLoader:
    """Batches to score on, in order; with `skip_broken` a `ReadableBatch` each.

    Args:
        options: of the DataLoader, such as `loader_options` returns.
    """
    if not skip_broken:
        return DataLoader(dataset, **options)
    collate = CollateReadable(options.get("collate_fn", default_collate))
    return DataLoader(Readable(dataset), **options | {"collate_fn": collate})
