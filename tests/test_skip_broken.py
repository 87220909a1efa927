"""Runs that go on without images that break while they train."""

import math
from pathlib import Path

import pytest
import torch
from conftest import PRETRAIN_QUICK, QUICK, read_log
from torch.utils.data import Dataset, Subset, TensorDataset

from datasets.images import DatasetError
from datasets.loading import batch_loader
from utils.evaluation import evaluate, evaluate_classifier
from utils.interrupts import Guard

CPU = torch.device("cpu")


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


def test_segmentation_is_scored_on_the_rest():
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(5, 3, 8, 8), torch.randint(0, 4, (5, 8, 8)))
    network, images = torch.nn.Conv2d(3, 4, 1), lambda images: images
    broken = batch_loader(Broken(data, 0, 3), None, 2, 0, skip_broken=True)
    whole = batch_loader(Subset(data, [1, 2, 4]), None, 2, 0)
    (loss, confusion), (expected_loss, expected) = (
        evaluate(network, loader, images, 4, "", 5, torch.ones(4)) for loader in (broken, whole)
    )
    assert torch.equal(confusion.counts, expected.counts)
    assert loss == pytest.approx(expected_loss, rel=1e-6)


def test_classification_is_scored_on_the_rest():
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 1, 0]))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 6))
    broken = batch_loader(Broken(data, 0, 3), None, 2, 0, skip_broken=True, stacked=True)
    whole = batch_loader(Subset(data, [1, 2, 4]), None, 2, 0, stacked=True)
    scores, expected = (
        evaluate_classifier(network, loader, lambda images: images, "", 5)
        for loader in (broken, whole)
    )
    assert scores == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def cut_after_the_first_step(monkeypatch):
    """Cut files short after the first step of a run."""

    def cut(*files: Path) -> None:
        note_loss = Guard.note_loss

        def note_and_cut(self: Guard, *args: object) -> None:
            note_loss(self, *args)
            if self.state.place().startswith("step 1 of epoch 1"):
                for file in files:
                    file.write_bytes(file.read_bytes()[:100])

        monkeypatch.setattr(Guard, "note_loss", note_and_cut)

    return cut


def check(result, folder: Path, broken: dict[str, Path]) -> None:
    """One image of train is replaced, one of val left out, in the second epoch at the latest."""
    assert result.status == 0, result.err
    for file in broken.values():
        assert f"left out: {file}" in result.err
    first, second = read_log(folder)
    # The image of train may have been read before it was cut.
    assert first["left_out"] in ("1", "2") and second["left_out"] == "2"
    assert "2 broken images left out" in result.out
    assert math.isfinite(float(second["val_loss"]))
    assert torch.load(folder / "last.pth", weights_only=True)["epoch"] == 2


@pytest.mark.parametrize("what", ["leftImg8bit/{}/*/*.png", "gtFine/{}/*/*_labelIds.png"])
def test_segmentation_goes_on(script, cityscapes_copy, tmp_path, cut_after_the_first_step, what):
    broken = {
        split: sorted(cityscapes_copy.glob(what.format(split)))[0] for split in ("train", "val")
    }
    cut_after_the_first_step(*broken.values())
    argv = ("main.py", "--datadir", cityscapes_copy, *QUICK, "--decoder", "--D", 4, "--num-epochs")
    result = script(*argv, 2, "--skip-broken", "--savedir", tmp_path / "run")
    check(result, tmp_path / "run", broken)


def test_classification_goes_on(script, shapes_copy, tmp_path, cut_after_the_first_step):
    broken = {split: sorted(shapes_copy.glob(f"{split}/*/*.jpg"))[0] for split in ("train", "val")}
    cut_after_the_first_step(*broken.values())
    argv = ("lednet_imagenet.py", "--datadir", shapes_copy, *PRETRAIN_QUICK, "--epochs", 2)
    result = script(*argv, "--skip-broken", "--savedir", tmp_path / "run")
    check(result, tmp_path / "run", broken)


def test_a_validation_without_a_readable_image_ends_the_run(
    script, cityscapes_copy, tmp_path, cut_after_the_first_step
):
    cut_after_the_first_step(*cityscapes_copy.glob("leftImg8bit/val/*/*.png"))
    argv = ("main.py", "--datadir", cityscapes_copy, *QUICK, "--decoder", "--D", 4)
    result = script(*argv, "--skip-broken", "--savedir", tmp_path / "run")
    assert result.status == 2
    assert "none of the images to validate on can be read: is the disk gone?" in result.err
    assert "saved after step 3 of epoch 1" in result.err
