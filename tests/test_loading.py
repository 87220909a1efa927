import pytest
import torch
from torch.utils.data import Dataset

from datasets.images import DatasetError, NothingReadable
from datasets.loading import (
    Batch,
    SeededItems,
    ShuffledSeeds,
    batch_loader,
    call_in_workers,
)

CPU = torch.device("cpu")


class Noise(Dataset):
    """Ten images that are their index and a random number; some cannot be read."""

    def __init__(self, *broken: int) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self.broken:
            raise DatasetError(f"{index}.png is broken")
        return torch.tensor([index, torch.rand(())]), index


def epoch_of(
    number: int, workers: int = 0, start: int = 0, seed: int = 3, process: int = 0, of: int = 1
) -> torch.Tensor:
    """The indices and random numbers of one epoch, as its batches bring them."""
    sampler = ShuffledSeeds(10, seed, process, of)
    loader = batch_loader(Noise(), sampler, 3, workers, stacked=True)
    sampler.begin(number, start)
    assert len(loader) == -(-len(sampler) // 3)
    batches = list(loader)
    for batch in batches:
        assert batch.images[:, 0].tolist() == batch.labels.tolist() == batch.indices
        assert batch.labels.dtype == torch.int64 and batch.left_out == []
    assert list(sampler) == [pair for b in batches for pair in zip(b.indices, b.seeds, strict=True)]
    return torch.cat([batch.images for batch in batches])


# The order and the seeds of training


def test_every_index_comes_once_in_a_new_order():
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
@pytest.mark.parametrize("start", [0, 3, 7])
def test_an_epoch_is_resumed_in_the_middle(start, workers):
    assert torch.equal(epoch_of(2, workers, start), epoch_of(2)[start:])


def test_an_epoch_is_resumed_at_its_end():
    sampler = ShuffledSeeds(10, 3)
    sampler.begin(2, 10)
    assert len(sampler) == 0 and list(sampler) == []


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_an_epoch(processes):
    """Their batches are together those of one process, and no image comes twice."""
    whole = epoch_of(1).tolist()
    parts = [epoch_of(1, process=number, of=processes).tolist() for number in range(processes)]
    assert len({len(part) for part in parts}) == 1
    together = [item for items in zip(*parts, strict=True) for item in items]
    assert together == whole[: len(together)] and len(together) > 10 - processes


def test_a_smaller_last_batch_may_be_left_out():
    sampler = ShuffledSeeds(10, 3)
    assert [len(b.images) for b in batch_loader(Noise(), sampler, 3, 0)] == [3, 3, 3, 1]
    loader = batch_loader(Noise(), sampler, 3, 0, drop_last=True)
    assert [len(batch.images) for batch in loader] == [3, 3, 3] and len(loader) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_state_alone(workers):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(batch_loader(Noise(), ShuffledSeeds(10, 3), 4, workers))
    list(batch_loader(Noise(), None, 4, workers))
    list(call_in_workers(Noise().__getitem__, 1, 1, ""))
    assert torch.equal(torch.rand(3), expected)


def test_items_leave_the_gpu_alone(monkeypatch):
    def reseeded(seed):
        raise AssertionError("the GPU was reseeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    SeededItems(Noise())[4, 12345]


# Batches


class Sizes(Dataset):
    """Images and labels of many sizes."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((index + 1, 2), index), torch.full((index,), index)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_any_size_come_with_their_seeds(workers):
    sampler = ShuffledSeeds(5, seed=3)
    batches = list(batch_loader(Sizes(), sampler, 2, workers))
    assert [len(batch.images) for batch in batches] == [2, 2, 1]
    order = []
    for batch in batches:
        for image, label, seed, index in zip(*batch[:4], strict=True):
            assert image.tolist() == [[index, index]] * (index + 1)
            assert label.tolist() == [index] * index
            order.append((index, seed))
    assert order == list(sampler)


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_is_in_order(workers):
    first, second = batch_loader(Sizes(), None, 3, workers)
    assert isinstance(first, Batch) and first.indices == [0, 1, 2] and second.indices == [3, 4]
    assert [len(image) for image in second.images] == [4, 5]
    stacked = list(batch_loader(Noise(), None, 4, workers, stacked=True))
    assert [batch.images.shape for batch in stacked] == [(4, 2), (4, 2), (2, 2)]
    assert torch.cat([batch.labels for batch in stacked]).tolist() == list(range(10))


# Broken images


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_raises_its_error(workers):
    for loader in (
        batch_loader(Noise(4), ShuffledSeeds(10, 3), 3, workers),
        batch_loader(Noise(4), None, 3, workers),
    ):
        with pytest.raises(DatasetError, match=r"4\.png"):
            list(loader)


def test_the_next_image_replaces_a_broken_one_in_training():
    images, _, seeds, indices, left_out, _ = SeededItems(Noise(4, 5), skip_broken=True)[4, 7]
    assert images[0][0] == 6 and indices == [6] and seeds == [7]
    assert left_out == ["4.png is broken", "5.png is broken"]
    last = SeededItems(Noise(9), skip_broken=True)[9, 0]
    assert last.indices == [0] and last.left_out == ["9.png is broken"]
    assert SeededItems(Noise(4), skip_broken=True)[5, 0].left_out == []
    batches = list(batch_loader(Noise(4), ShuffledSeeds(10, 3), 5, 0, skip_broken=True))
    assert [len(batch.images) for batch in batches] == [5, 5]
    assert [reason for batch in batches for reason in batch.left_out] == ["4.png is broken"]


def test_a_disk_that_is_gone_is_not_searched_forever():
    with pytest.raises(NothingReadable, match="10 images in a row cannot be read: is the disk"):
        SeededItems(Noise(*range(10)), skip_broken=True)[4, 0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stacked", [False, True])
def test_validation_leaves_out_broken_images(workers, stacked):
    loader = batch_loader(Noise(1, 4, 5), None, 2, workers, skip_broken=True, stacked=stacked)
    batches = list(loader)
    assert [batch.indices for batch in batches] == [[0], [2, 3], [], [6, 7], [8, 9]]
    assert [len(batch.images) for batch in batches] == [1, 2, 0, 2, 2]
    assert len(batches[2].labels) == 0
    expected = [["1.png is broken"], [], ["4.png is broken", "5.png is broken"], [], []]
    assert [batch.left_out for batch in batches] == expected


def test_other_errors_are_raised():
    class Wrong(Noise):
        def __getitem__(self, index: int) -> int:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(iter(batch_loader(Wrong(), None, 2, 0, skip_broken=True)))
