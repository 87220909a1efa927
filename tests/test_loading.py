import signal
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from datasets.images import DatasetError
from datasets.loading import (
    Seeded,
    ShuffledSeeds,
    WithSeed,
    as_lists,
    loader_options,
    reading_loader,
    training_loader,
)


class Noise(Dataset):
    """Items that are their index and a random number."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor]:
        return (torch.tensor([index, torch.rand(())]),)


def epoch_of(
    number: int, workers: int = 0, start: int = 0, seed: int = 3, process: int = 0, of: int = 1
) -> torch.Tensor:
    """The indices and random numbers of one epoch, as its batches bring them."""
    sampler = ShuffledSeeds(10, seed, process, of)
    loader = training_loader(Seeded(Noise()), sampler, batch_size=3, num_workers=workers)
    sampler.begin(number, start)
    assert len(loader) == -(-len(sampler) // 3)
    batches = list(loader)
    assert all(
        items[:, 0].tolist() == indices.tolist() and reasons == ("",) * len(items)
        for items, indices, reasons in batches
    )
    return torch.cat([items for items, _, _ in batches])


def test_every_index_once_in_an_order_of_its_own():
    first, second = epoch_of(1), epoch_of(2)
    assert sorted(first[:, 0].tolist()) == list(range(10)) == sorted(second[:, 0].tolist())
    assert not torch.equal(first[:, 0], second[:, 0])
    # The same image is augmented otherwise in the next epoch.
    assert not set(first[:, 1].tolist()) & set(second[:, 1].tolist())
    assert len(set(first[:, 1].tolist())) == 10


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(workers):
    assert torch.equal(epoch_of(2, workers), epoch_of(2))


def test_an_epoch_depends_on_seed_and_number_alone():
    torch.rand(7)
    assert torch.equal(epoch_of(4), epoch_of(4))
    epochs = [epoch_of(number, seed=seed)[:, 1] for seed in (0, 1, 2) for number in (1, 2, 3)]
    assert len(set(torch.cat(epochs).tolist())) == 90  # none of one seed is one of another


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 3, 7, 10])
def test_an_epoch_goes_on_in_the_middle(start, workers):
    if start == 10:
        sampler = ShuffledSeeds(10, 3)
        sampler.begin(2, 10)
        assert len(sampler) == 0 and list(sampler) == []
    else:
        assert torch.equal(epoch_of(2, workers, start), epoch_of(2)[start:])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_an_epoch(processes):
    """Their batches are together those of one process, and no image is anyone's twice."""
    whole = epoch_of(1).tolist()
    parts = [epoch_of(1, process=number, of=processes).tolist() for number in range(processes)]
    assert len({len(part) for part in parts}) == 1
    together = [item for items in zip(*parts, strict=True) for item in items]
    assert together == whole[: len(together)] and len(together) > 10 - processes


class Broken(Noise):
    """Some items cannot be read."""

    def __init__(self, *broken: int) -> None:
        self.broken = broken

    def __getitem__(self, index: int) -> tuple[torch.Tensor]:
        if index in self.broken:
            raise DatasetError(f"{index}.png is broken")
        return super().__getitem__(index)


def test_a_broken_item_ends_the_epoch_or_is_stood_in_for():
    with pytest.raises(DatasetError, match=r"4\.png"):
        Seeded(Broken(4))[4, 0]
    item, index, reason = Seeded(Broken(4, 5), skip_broken=True)[4, 0]
    assert item[0] == 6 == index and reason == "4.png is broken\n5.png is broken"
    _, index, reason = Seeded(Broken(9), skip_broken=True)[9, 0]
    assert index == 0 and reason == "9.png is broken"
    assert Seeded(Broken(4), skip_broken=True)[5, 0][1:] == (5, "")


@pytest.mark.parametrize("kind", [Seeded, WithSeed])
def test_a_disk_that_is_gone_is_not_searched_for_ever(kind):
    with pytest.raises(DatasetError, match="10 images one after the other are broken"):
        kind(Broken(*range(10)), skip_broken=True)[4, 0]


@pytest.mark.parametrize(
    "loader",
    [
        lambda dataset: DataLoader(dataset, **loader_options(1, 1, torch.device("cpu"))),
        lambda dataset: reading_loader(dataset, workers=1),
    ],
)
def test_workers_leave_signals_to_the_training_process(loader):
    class Handlers(Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> bool:
            numbers = (signal.SIGINT, signal.SIGTERM)
            return all(signal.getsignal(number) == signal.SIG_IGN for number in numbers)

    assert [bool(ignored) for ignored in loader(Handlers())] == [True, True]


def test_workers_leave_it_to_the_training_process_to_say_what_went_wrong(capfd):
    class Connected(Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> int:
            # As the thread of multiprocessing that hands over batches does, when nobody takes them.
            sys.excepthook(EOFError, EOFError(), None)
            return index

    list(DataLoader(Connected(), **loader_options(1, 1, torch.device("cpu"))))
    assert capfd.readouterr().err == ""


def test_items_leave_the_training_processs_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Seeded(Noise())[4, 12345]
    assert torch.equal(torch.rand(3), expected)


def test_items_leave_the_gpu_alone(monkeypatch):
    def reseeded(seed):
        raise AssertionError("the GPU was reseeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    Seeded(Noise())[4, 12345]


class Sizes(Dataset):
    """Items of two tensors, each of a size of its own."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((index + 1, 2), index), torch.full((index,), index)


@pytest.mark.parametrize("workers", [0, 2])
def test_items_come_with_the_seeds_that_transforms_start_from(workers):
    sampler = ShuffledSeeds(5, seed=3)
    options = {"batch_size": 2, "num_workers": workers, "collate_fn": as_lists}
    batches = list(training_loader(WithSeed(Sizes()), sampler, **options))
    order, seeds = [], []
    for *columns, reasons in batches:
        assert reasons == [""] * len(reasons)
        for first, second, seed, index in zip(*columns, strict=True):
            assert index == len(second)
            assert first.tolist() == [[index, index]] * (index + 1)
            assert second.tolist() == [index] * index
            order.append(index)
            seeds.append(seed)
    assert [len(batch[0]) for batch in batches] == [2, 2, 1]
    assert sorted(order) == list(range(5)) and len(set(seeds)) == 5
    # The same order and seeds as where the items are drawn from them at once.
    assert list(zip(order, seeds, strict=True)) == list(sampler)


def test_as_lists_keeps_items_of_any_size():
    items = [(torch.ones(2), "a", 1), (torch.ones(3, 4), "b", 2)]
    tensors, letters, numbers = as_lists(items)
    assert [tensor.shape for tensor in tensors] == [(2,), (3, 4)]
    assert letters == ["a", "b"] and numbers == [1, 2]
    with pytest.raises(ValueError):
        as_lists([(1, 2), (3,)])
