"""The comparison of runs that the tests of resuming rely on finds every difference."""

import csv
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from compare import differences
from torch.utils.tensorboard import SummaryWriter


def write_run(folder: Path, first: int = 1, last: int = 3, purge: bool = False) -> None:
    """Write what a run leaves, from one epoch to another."""
    folder.mkdir(exist_ok=True)
    options = {"savedir": str(folder), "lr": 0.1}
    state = {"model": {"weight": torch.arange(6.0)}, "args": options, "best": float("nan")}
    for name in ("last.pth", "best.pth"):
        torch.save(state, folder / name)
    (folder / "args.json").write_text(json.dumps(options))
    with (folder / "log.csv").open("a", newline="") as file:
        writer = csv.writer(file)
        if first == 1:
            writer.writerow(["epoch", "train_loss", "seconds"])
        writer.writerows([n, 1 / n, time.perf_counter()] for n in range(first, last + 1))
    with SummaryWriter(folder, purge_step=first if purge else None) as writer:
        for epoch in range(first, last + 1):
            writer.add_scalar("loss/train", 1 / epoch, epoch)
            writer.add_scalar("images_per_second", time.perf_counter(), epoch)
            writer.add_image("val/0", torch.full((3, 4, 4), epoch, dtype=torch.uint8), epoch)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "reference"
    write_run(folder)
    return folder


@pytest.fixture
def copy(reference, tmp_path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "copy"))


def test_runs_that_ended_in_the_same_way_do_not_differ(reference, tmp_path):
    write_run(tmp_path / "whole")
    assert differences(tmp_path / "whole", reference) == []
    write_run(tmp_path / "resumed", last=2)
    write_run(tmp_path / "resumed", first=3)
    (tmp_path / "resumed/previous.pth").write_text("the one before")
    assert differences(tmp_path / "resumed", reference) == []


def test_a_changed_weight_is_found(reference, copy):
    state = torch.load(copy / "last.pth", weights_only=True)
    state["model"]["weight"][3] += 1e-6
    torch.save(state, copy / "last.pth")
    assert differences(copy, reference) == ["last.pth: model: weight differs"]


def test_a_damaged_checkpoint_is_found(reference, copy):
    content = bytearray((copy / "best.pth").read_bytes())
    content[content.index(torch.tensor(5.0).numpy().tobytes())] ^= 1
    (copy / "best.pth").write_bytes(content)
    (found,) = differences(copy, reference)
    assert found.startswith("best.pth is damaged (")


def test_other_options_and_other_rows_of_the_log_are_found(reference, copy):
    (copy / "args.json").write_text(json.dumps({"savedir": "elsewhere", "lr": 0.2}))
    assert differences(copy, reference) == ["args.json: lr is 0.2, not 0.1"]
    shutil.copy(reference / "args.json", copy)
    head, *rows = (copy / "log.csv").read_text().splitlines(keepends=True)
    (copy / "log.csv").write_text("".join([head, *rows[:2]]))
    assert differences(copy, reference) == ["log.csv has 2 values, not 3"]
    (copy / "log.csv").write_text("".join([head, rows[0].replace("1.0", "1.5"), *rows[1:]]))
    assert differences(copy, reference) == ["log.csv: 0: train_loss is 1.5, not 1.0"]


def test_missing_repeated_and_changed_steps_of_tensorboard_are_found(reference, copy, tmp_path):
    with SummaryWriter(copy) as writer:
        writer.add_scalar("loss/train", 1 / 3, 3)
    assert differences(copy, reference) == ["TensorBoard: loss/train: 3 has 2 values, not 1"]
    write_run(tmp_path / "missing", last=2)
    shutil.copy(reference / "log.csv", tmp_path / "missing")
    found = differences(tmp_path / "missing", reference)
    assert sorted(found) == [f"TensorBoard: {tag}: 3 is missing" for tag in ("loss/train", "val/0")]


def test_steps_that_tensorboard_has_forgotten_are_found(reference, copy):
    with SummaryWriter(copy, purge_step=3):
        pass
    found = differences(copy, reference)
    assert sorted(found) == [f"TensorBoard: {tag}: 3 is missing" for tag in ("loss/train", "val/0")]


def test_steps_that_a_resumed_run_repeats_are_no_difference(reference, tmp_path):
    """As after a kill between the log and the checkpoint: TensorBoard shows each of them once."""
    write_run(tmp_path / "run")
    (tmp_path / "run/log.csv").unlink()
    write_run(tmp_path / "run", first=2, purge=True)
    shutil.copy(reference / "log.csv", tmp_path / "run")
    assert differences(tmp_path / "run", reference) == []


def test_missing_and_extra_files_are_found(reference, copy):
    (copy / "best.pth").unlink()
    (copy / ".last.pth-0123abcd.unfinished.pth").write_text("")
    assert differences(copy, reference) == [
        ".last.pth-0123abcd.unfinished.pth was left behind",
        "best.pth is missing",
    ]
