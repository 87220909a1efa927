import os
from itertools import pairwise

import pytest
import torch
from conftest import run_script, same_weights
from torch.utils.data import Dataset

from datasets.camvid import CamVid
from datasets.cityscapes import Cityscapes
from datasets.files import DatasetError, check_headers
from datasets.folder import Folder, read_classes
from datasets.memory import InMemory
from utils.checkpoint import load_checkpoint


def in_memory(dataset: Dataset, **options) -> InMemory:
    return InMemory(dataset, check_headers(dataset.pairs), **options)


def assert_same_items(ours: Dataset, theirs: Dataset) -> None:
    assert len(ours) == len(theirs)
    for index in range(len(theirs)):
        for kept, read in zip(ours[index], theirs[index], strict=True):
            assert kept.dtype == torch.uint8 and torch.equal(kept, read)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("height", "resize_labels"), [(None, True), (50, True), (50, False), (None, False)]
)
def test_items_are_those_of_the_data_set(fields, workers, height, resize_labels):
    """Of several sizes, PNG and JPEG; with workers they keep their order."""
    classes = read_classes(fields / "classes.txt")
    train = Folder(fields, "train", classes, height, resize_labels)
    ours = in_memory(train, workers=workers)
    assert len({image.shape for image, _ in ours}) > 1
    assert_same_items(ours, train)


def test_items_of_one_size(camvid):
    val = CamVid(camvid, "val", height=36)
    assert_same_items(in_memory(val), val)


def test_a_split_without_labels(cityscapes):
    test = Cityscapes(cityscapes, "test", height=32, resize_labels=False)
    ours = in_memory(test)
    assert_same_items(ours, test)
    assert (ours[0][1] == 255).all() and ours[0][1].shape == (64, 128)


def test_all_items_lie_in_one_array_that_they_fill(fields):
    train = Folder(fields, "train", read_classes(fields / "classes.txt"), 50)
    tensors = [tensor for item in in_memory(train) for tensor in item]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    places = sorted((t.data_ptr(), t.data_ptr() + t.numel()) for t in tensors)
    assert all(end == start for (_, end), (start, _) in pairwise(places))
    assert tensors[0].untyped_storage().nbytes() == sum(tensor.numel() for tensor in tensors)


def test_reading_leaves_the_random_state_alone(camvid):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    in_memory(CamVid(camvid, "val"))
    assert torch.equal(torch.rand(3), expected)


def machine_of(monkeypatch, megabytes: int) -> None:
    pages = {"SC_PHYS_PAGES": megabytes * 250, "SC_PAGE_SIZE": 4000}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)


def test_too_little_memory_is_said(camvid, monkeypatch):
    """Six images and labels take 166 kB as they are and 628 kB at this height, over the half."""
    machine_of(monkeypatch, 1)
    train = CamVid(camvid, "train", height=140)
    message = r"camvid takes 0.0 GB .* the machine has 0.0: give --cache off or a smaller --height"
    with pytest.raises(DatasetError, match=message):
        in_memory(train)
    in_memory(CamVid(camvid, "train"))


def test_a_gpu_without_the_room_leaves_the_bytes_to_the_cpu(camvid, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300_000, 10**9))
    val = CamVid(camvid, "train")  # of 166 kB: over half of what is free
    ours = in_memory(val, device="cuda")
    assert ours[0][0].device.type == "cpu"
    assert_same_items(ours, val)


def test_a_file_that_cannot_be_read_is_named(camvid_copy):
    path = next((camvid_copy / "train").glob("*.png"))
    data = path.read_bytes()
    path.write_bytes(data[:200] + bytes(1800) + data[2000:])
    with pytest.raises(DatasetError, match=path.name):
        in_memory(CamVid(camvid_copy, "train"))


# Training from memory

ARGV = ("--height", 64, "--encoder-epochs", 1, "--epochs", 1, "--batch-size", 2, "--D", 4)


def weights_of_a_run(root, folder, *options) -> dict[str, torch.Tensor]:
    argv = ("--dataset", "camvid", "--datadir", root, *ARGV, "--augment", "strong", *options)
    assert run_script("main.py", *argv, "--savedir", folder) == 0
    return load_checkpoint(folder / "best.pth")["model"]


@pytest.fixture(scope="module")
def plain(camvid, tmp_path_factory):
    """The weights of a run that reads its files in the training process."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    return weights_of_a_run(camvid, folder, "--cache", "off", "--workers", 0)


@pytest.mark.parametrize(("cache", "workers"), [("off", 2), ("ram", 0), ("ram", 2)])
def test_neither_memory_nor_workers_change_the_weights(plain, camvid, tmp_path, cache, workers):
    options = ("--cache", cache, "--workers", workers)
    assert same_weights(weights_of_a_run(camvid, tmp_path / "run", *options), plain)


def test_another_seed_changes_the_weights(plain, camvid, tmp_path):
    other = weights_of_a_run(camvid, tmp_path / "run", "--workers", 0, "--seed", 1)
    assert not same_weights(other, plain)


def test_a_machine_without_the_memory_is_one_line(fails, camvid, monkeypatch, tmp_path):
    machine_of(monkeypatch, 0)
    argv = ("--dataset", "camvid", "--datadir", camvid, *ARGV, "--workers", 0)
    assert "give --cache off" in fails("main.py", *argv, "--cache", "ram", "--savedir", "a")
    assert not (tmp_path / "save").exists()
