import pytest
import torch
from torch.utils.data import Dataset

from datasets.seeded import Seeded, WithSeed, as_lists, training_loader


class Noise(Dataset):
    """Items that are their index and a random number."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(())])


def epochs(workers: int, count: int = 2, generator: torch.Generator | None = None) -> torch.Tensor:
    generator = generator or torch.Generator().manual_seed(3)
    options = {"batch_size": 3, "num_workers": workers, "persistent_workers": workers > 0}
    loader = training_loader(Seeded(Noise()), generator, **options)
    return torch.stack([torch.cat(list(loader)) for _ in range(count)])


def test_every_index_once_in_an_order_of_its_own():
    first, second = epochs(0)
    assert sorted(first[:, 0].tolist()) == list(range(10)) == sorted(second[:, 0].tolist())
    assert not torch.equal(first[:, 0], second[:, 0])
    # The same image is augmented otherwise in the next epoch.
    assert not set(first[:, 1].tolist()) & set(second[:, 1].tolist())
    assert len(set(first[:, 1].tolist())) == 10


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(workers):
    assert torch.equal(epochs(workers), epochs(0))


def test_an_epoch_depends_on_the_generators_state_alone():
    generator = torch.Generator().manual_seed(3)
    first = epochs(0, 1, generator)
    state = generator.get_state()
    second = epochs(0, 1, generator)
    torch.rand(7)
    generator.set_state(state)
    assert torch.equal(epochs(0, 1, generator), second)
    assert torch.equal(torch.cat([first, second]), epochs(0))


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
    def epoch(dataset, generator):
        options = {"batch_size": 2, "num_workers": workers, "collate_fn": as_lists}
        return list(training_loader(dataset, generator, **options))

    batches = epoch(WithSeed(Sizes()), torch.Generator().manual_seed(3))
    order, seeds = [], []
    for firsts, seconds, numbers in batches:
        for first, second, seed in zip(firsts, seconds, numbers, strict=True):
            index = len(second)
            assert first.tolist() == [[index, index]] * (index + 1)
            assert second.tolist() == [index] * index
            order.append(index)
            seeds.append(seed)
    assert [len(batch[0]) for batch in batches] == [2, 2, 1]
    assert sorted(order) == list(range(5)) and len(set(seeds)) == 5
    # The same order and seeds as where the items are drawn from them at once.
    generator = torch.Generator().manual_seed(3)
    assert order == torch.randperm(5, generator=generator).tolist()
    assert seeds == torch.randint(2**62, (5,), generator=generator).tolist()


def test_as_lists_keeps_items_of_any_size():
    items = [(torch.ones(2), "a", 1), (torch.ones(3, 4), "b", 2)]
    tensors, letters, numbers = as_lists(items)
    assert [tensor.shape for tensor in tensors] == [(2,), (3, 4)]
    assert letters == ["a", "b"] and numbers == [1, 2]
    with pytest.raises(ValueError):
        as_lists([(1, 2), (3,)])
