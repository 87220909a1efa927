"""Runs that go on without images that break under them."""

import csv
import math
from pathlib import Path

import pytest
import torch
from conftest import PRETRAIN_QUICK, QUICK
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from datasets.images import DatasetError
from datasets.loading import as_lists
from datasets.readable import validation_loader
from utils.evaluation import evaluate, evaluate_classifier
from utils.interrupts import Watch


class Numbers(Dataset):
    """0 to 5, of which some are broken."""

    def __init__(self, *broken: int) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[int, str]:
        if index in self.broken:
            raise DatasetError(f"{index}.png is broken")
        return index, str(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_what_can_be_read(workers):
    loader = validation_loader(
        Numbers(1, 4, 5), True, batch_size=2, num_workers=workers, collate_fn=as_lists
    )
    batches = list(loader)
    assert [batch.batch for batch in batches] == [([0], ["0"]), ([2, 3], ["2", "3"]), None]
    assert [batch.reasons for batch in batches] == [
        ["1.png is broken"],
        [],
        ["4.png is broken", "5.png is broken"],
    ]


def test_other_errors_are_raised():
    class Wrong(Numbers):
        def __getitem__(self, index: int) -> int:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(iter(validation_loader(Wrong(), True)))


def test_without_skipping_it_is_a_loader_as_any_other():
    loader = validation_loader(Numbers(), False, batch_size=3)
    assert type(loader) is DataLoader
    assert [numbers.tolist() for numbers, _ in loader] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(DatasetError):
        list(validation_loader(Numbers(3), False))


class Broken(Dataset):
    """Another data set, some of whose items are broken."""

    def __init__(self, dataset: Dataset, *broken: int) -> None:
        self.dataset, self.broken = dataset, broken

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index in self.broken:
            raise DatasetError(f"{index}.png is broken")
        return self.dataset[index]


def test_segmentation_is_scored_on_the_rest(capsys):
    torch.manual_seed(0)
    images, labels = torch.rand(5, 3, 8, 8), torch.randint(0, 4, (5, 8, 8))
    data, network = TensorDataset(images, labels), torch.nn.Conv2d(3, 4, 1)
    left_out: list[str] = []
    options = {"batch_size": 2, "collate_fn": as_lists}
    broken = validation_loader(Broken(data, 0, 3), True, **options)
    whole = DataLoader(Subset(data, [1, 2, 4]), **options)
    more = (lambda images: images, 4, "", torch.ones(4))
    loss, confusion = evaluate(network, broken, *more, left_out=left_out)
    expected_loss, expected = evaluate(network, whole, *more)
    assert torch.equal(confusion.counts, expected.counts)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert left_out == ["0.png is broken", "3.png is broken"]
    assert capsys.readouterr().err == "left out: 0.png is broken\nleft out: 3.png is broken\n"


def test_classification_is_scored_on_the_rest():
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 1, 0]))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 6))
    left_out: list[str] = []
    broken = validation_loader(Broken(data, 0, 3), True, batch_size=2)
    whole = DataLoader(Subset(data, [1, 2, 4]), batch_size=2)
    scores = evaluate_classifier(network, broken, lambda images: images, "", left_out=left_out)
    expected = evaluate_classifier(network, whole, lambda images: images, "")
    assert scores == pytest.approx(expected, rel=1e-6)
    assert len(left_out) == 2


@pytest.fixture
def damage_after_the_first_step(monkeypatch):
    """Have files cut short while a run goes on."""

    def damage(*files: Path) -> None:
        note_loss = Watch.note_loss

        def cut(self: Watch, *step: object) -> None:
            note_loss(self, *step)
            if self.place.startswith("step 1 of epoch 1"):
                for file in files:
                    file.write_bytes(file.read_bytes()[:100])

        monkeypatch.setattr(Watch, "note_loss", cut)

    return damage


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def check(result, folder: Path, broken: dict[str, Path]) -> None:
    """One of train, replaced, and one of val, left out, in the second epoch."""
    assert result.status == 0, result.err
    for file in broken.values():
        assert f"left out: {file}" in result.err
    first, second = rows_of(folder)
    # In the first, the one of train may have been read before it was cut.
    assert first["left_out"] in ("1", "2") and second["left_out"] == "2"
    assert "2 broken images left out" in result.out
    assert math.isfinite(float(second["val_loss"]))
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    assert checkpoint["epoch"] == 2


@pytest.mark.parametrize("what", ["leftImg8bit/{}/*/*.png", "gtFine/{}/*/*_labelIds.png"])
def test_segmentation_goes_on(script, cityscapes_copy, tmp_path, damage_after_the_first_step, what):
    broken = {
        split: sorted(cityscapes_copy.glob(what.format(split)))[0] for split in ("train", "val")
    }
    damage_after_the_first_step(*broken.values())
    argv = ("main.py", "--datadir", cityscapes_copy, *QUICK, "--decoder", "--D", 4, "--num-epochs")
    result = script(*argv, 2, "--skip-broken", "--savedir", tmp_path / "run")
    check(result, tmp_path / "run", broken)


def test_classification_goes_on(script, shapes_copy, tmp_path, damage_after_the_first_step):
    broken = {
        split: sorted(path for path in shapes_copy.glob(f"{split}/*/*") if path.is_file())[0]
        for split in ("train", "val")
    }
    damage_after_the_first_step(*broken.values())
    argv = ("lednet_imagenet.py", "--datadir", shapes_copy, *PRETRAIN_QUICK, "--epochs", 2)
    result = script(*argv, "--skip-broken", "--savedir", tmp_path / "run")
    check(result, tmp_path / "run", broken)


def test_a_validation_of_which_nothing_can_be_read_ends_the_run(
    script, cityscapes_copy, tmp_path, damage_after_the_first_step
):
    damage_after_the_first_step(*cityscapes_copy.glob("leftImg8bit/val/*/*.png"))
    argv = ("main.py", "--datadir", cityscapes_copy, *QUICK, "--decoder", "--D", 4)
    result = script(*argv, "--skip-broken", "--savedir", tmp_path / "run")
    assert result.status == 2
    assert "none of the images to validate on can be read: is the disk gone?" in result.err
    assert "saved after step 3 of epoch 1" in result.err
