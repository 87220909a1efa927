import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from datasets.seeded import Seeded, ShuffledSeeds


class Noise(Dataset):
    """Items that are their index and a random number."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(())])


def epochs(workers: int, count: int = 2, generator: torch.Generator | None = None) -> torch.Tensor:
    generator = generator or torch.Generator().manual_seed(3)
    data = Seeded(Noise())
    loader = DataLoader(
        data,
        batch_size=3,
        sampler=ShuffledSeeds(len(data), generator),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
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
