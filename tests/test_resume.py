"""A run that was stopped anywhere and resumed ends like one that was never stopped, bit for bit."""

import itertools
import os
import resource
import shlex
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from compare import differences, shown
from conftest import ROOT, Forked, after_step, read_log, run_script, send

import utils.run_folder
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.interrupts import Guard

MAIN, CLASSIFIER = "main.py", "lednet_imagenet.py"
OFTEN = ("--checkpoint-minutes", 0)  # a checkpoint after every step
SELDOM = ("--checkpoint-minutes", 10)
STRONG = (
    *("--height", 64, "--batch-size", 2, "--D", 4, "--augment", "strong", "--loss", "ohem"),
    *("--ema", "--iouTrain", "--workers", 0),
)
SMALL = ("--size", 32, "--batch-size", 4, "--lr", 0.01, "--epochs", 2, "--workers", 0)
# Each has epochs of three steps.
RECIPES = {
    "two stages": (MAIN, *STRONG, "--encoder-epochs", 1, "--epochs", 2),
    "one stage": (
        *(MAIN, *STRONG, "--encoder-epochs", 0, "--epochs", 2, "--aux-weight", 0.4),
        *("--optimizer", "adamw", "--schedule", "onecycle", "--cache", "ram"),
    ),
    "published classifier": (CLASSIFIER, *SMALL, "--recipe", "paper"),
    "modern classifier": (CLASSIFIER, *SMALL, "--recipe", "modern"),
    "few validations": (CLASSIFIER, *SMALL, "--epochs", 4, "--val-every", 3),
}


@pytest.fixture(scope="module")
def start(cityscapes, shapes) -> Callable[..., int]:
    """Start a run of one of the RECIPES; returns its status."""

    def started(recipe: str, folder: Path, *options: object) -> int:
        name, *argv = RECIPES[recipe]
        datadir = cityscapes if name == MAIN else shapes
        return run_script(name, "--datadir", datadir, *argv, "--savedir", folder, *options)

    return started


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Callable[[str], Path]:
    """Return the folder of a run that was never stopped."""

    @cache
    def folder_of(recipe: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "whole"
        assert start(recipe, folder) == 0
        return folder

    return folder_of


@pytest.fixture
def resumed(whole, capsys) -> Callable[..., str]:
    """Resume a run and compare its end with that of the whole one; returns what was printed."""

    def resume(recipe: str, folder: Path, *options: object) -> str:
        capsys.readouterr()
        assert run_script(RECIPES[recipe][0], "--savedir", folder, "--resume", *options) == 0
        out = capsys.readouterr().out
        assert "note: " not in out
        assert differences(folder, whole(recipe)) == []
        return out

    return resume


def command(recipe: str, folder: Path) -> str:
    """Return the command line that resumes a run."""
    return f"python {shlex.quote(str(ROOT / RECIPES[recipe][0]))} --savedir {folder} --resume"


@pytest.mark.parametrize(
    ("recipe", "place"),
    [
        ("two stages", "step 2 of epoch 1 of stage 1"),
        ("two stages", "step 1 of epoch 2 of stage 2"),
        ("one stage", "step 1 of epoch 1 of stage 2"),
        ("one stage", "step 2 of epoch 2 of stage 2"),
        ("one stage", "step 3 of epoch 2 of stage 2"),
        ("published classifier", "step 2 of epoch 1"),
        ("published classifier", "step 3 of epoch 2"),
        ("modern classifier", "step 1 of epoch 2"),
    ],
)
def test_stopped_by_sigterm_after_any_step(start, resumed, tmp_path, capsys, recipe, place):
    folder = tmp_path / "run"
    with after_step(place, send(signal.SIGTERM)):
        assert start(recipe, folder) == 128 + signal.SIGTERM
    how = f"resume with: {command(recipe, folder)}\n"
    assert f"stopped by SIGTERM, saved after {place}; {how}" in capsys.readouterr().err
    assert f"resuming after {place}" in resumed(recipe, folder)


def test_stopped_by_ctrl_c_twice(start, resumed, tmp_path):
    """The resumed run is stopped again."""
    folder, recipe = tmp_path / "run", "one stage"
    with after_step("step 1 of epoch 1 of stage 2", send(signal.SIGINT)):
        assert start(recipe, folder) == 128 + signal.SIGINT
    with after_step("step 2 of epoch 1 of stage 2", send(signal.SIGINT)):
        assert run_script(MAIN, "--savedir", folder, "--resume") == 128 + signal.SIGINT
    resumed(recipe, folder)


@pytest.mark.parametrize(
    ("recipe", "batch", "place"),
    [
        ("two stages", 1, "step 3 of epoch 1 of stage 1"),  # a validation has two batches
        ("two stages", 3, "step 3 of epoch 1 of stage 2"),
        ("one stage", 4, "step 3 of epoch 2 of stage 2"),
        ("modern classifier", 3, "step 3 of epoch 2"),
    ],
)
def test_stopped_during_validation(
    start, resumed, tmp_path, monkeypatch, capsys, recipe, batch, place
):
    folder, numbers = tmp_path / "run", itertools.count(1)

    def validation_batches(self, *args, validation_batches=Guard.validation_batches):
        for found in validation_batches(self, *args):
            number = next(numbers)
            assert number <= batch, "the rest is not scored"
            if number == batch:
                os.kill(os.getpid(), signal.SIGTERM)
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(Guard, "validation_batches", validation_batches)
        assert start(recipe, folder) == 128 + signal.SIGTERM
    assert f"saved after {place}" in capsys.readouterr().err
    resumed(recipe, folder)


class Killed(BaseException):
    """An exception that nothing in the programs handles."""


@pytest.fixture
def killed(start, tmp_path, monkeypatch) -> Callable[..., Path]:
    """Run until a file is to be written, and end at once; returns the folder.

    The arguments of the returned function: a recipe, the name of the file, the stage, epoch and
    step that it states, whether it is still written, and further options of the run.
    """

    def run(
        recipe: str, name: str, place: tuple[int, int, int], written: bool, *options: object
    ) -> Path:
        def save_and_die(checkpoint: dict, path: Path) -> None:
            stated = tuple(checkpoint.get(key, 0) for key in ("stage", "epoch", "step"))
            here = path.name == name and stated == place
            if written or not here:
                save_checkpoint(checkpoint, path)
            if here:
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(utils.run_folder, "save_checkpoint", save_and_die)
            start(recipe, tmp_path / "run", *options)
        return tmp_path / "run"

    return run


@pytest.mark.parametrize(
    ("recipe", "place"),
    [
        ("two stages", (1, 0, 2)),
        ("two stages", (2, 1, 1)),
        ("one stage", (2, 0, 3)),
        ("published classifier", (0, 1, 2)),
        ("modern classifier", (0, 0, 1)),
    ],
)
def test_killed_after_a_checkpoint_within_an_epoch(killed, resumed, recipe, place):
    resumed(recipe, killed(recipe, "last.pth", place, True, *OFTEN), *SELDOM)


@pytest.mark.parametrize(
    ("recipe", "stage", "epoch", "written"),
    [
        ("two stages", 1, 1, True),
        ("two stages", 2, 1, True),
        ("one stage", 2, 1, False),  # nothing was saved
        ("published classifier", 0, 1, True),
        ("modern classifier", 0, 2, False),
    ],
)
def test_killed_at_the_end_of_an_epoch(killed, resumed, recipe, stage, epoch, written):
    """After its checkpoint, or before, when the log and TensorBoard have it already."""
    folder = killed(recipe, "last.pth", (stage, epoch, 0), written)
    out = resumed(recipe, folder)
    done = epoch if written else epoch - 1
    assert ("resuming after epoch" if done else "no checkpoint was saved: starting again") in out


@pytest.mark.parametrize(("written", "done"), [(False, 1), (True, 3)])
def test_killed_epochs_after_a_checkpoint(killed, resumed, written, done):
    """The log and TensorBoard have these epochs already, and have each one once in the end."""
    folder = killed("few validations", "last.pth", (0, 3, 0), written)
    assert len(read_log(folder)) == len(shown(folder)["loss/train"]) == 3
    assert f"resuming after epoch {done}\n" in resumed("few validations", folder)
    assert [row["epoch"] for row in read_log(folder)] == ["1", "2", "3", "4"]
    assert [len(values) for values in shown(folder)["loss/train"].values()] == [1] * 4


def test_killed_between_the_stages(killed, resumed):
    """When the encoder of stage 1 is written, and nothing of stage 2."""
    folder = killed("two stages", "encoder.pth", (1, 0, 0), True)
    assert load_checkpoint(folder / "last.pth")["stage"] == 1
    resumed("two stages", folder)


@pytest.mark.parametrize("recipe", ["one stage", "modern classifier"])
def test_killed_by_sigkill(start, resumed, tmp_path, recipe):
    """In the middle of a step, which the resumed run takes again."""
    folder, suffix = tmp_path / "run", " of stage 2" if recipe == "one stage" else ""
    with after_step(f"step 2 of epoch 2{suffix}", send(signal.SIGKILL)):
        run = Forked(lambda: start(recipe, folder, *OFTEN), tmp_path)
        assert run.finish().status == -signal.SIGKILL
    assert f"resuming after step 1 of epoch 2{suffix}" in resumed(recipe, folder, *SELDOM)


def test_tensorboard_shows_each_epoch_once(killed, resumed):
    """Also the one that a killed run had shown, but not saved."""
    folder = killed("two stages", "last.pth", (2, 2, 0), False)
    assert len(shown(folder)["loss/train"]) == 3
    resumed("two stages", folder)
    assert len(list(folder.glob("events.*"))) == 2
    found = shown(folder)
    assert {"loss/train", "miou/val", "iou/road", "val/0"} <= found.keys()
    for tag in found:
        assert {step: len(values) for step, values in found[tag].items()}.items() <= {
            (1, 1), (2, 1), (3, 1)
        }, tag  # fmt: skip


@pytest.mark.parametrize("damage", ["flipped bit", "removed"])
def test_a_damaged_checkpoint_costs_a_step_and_changes_nothing(
    start, whole, tmp_path, capsys, damage
):
    folder, recipe = tmp_path / "run", "modern classifier"
    with after_step("step 3 of epoch 1", send(signal.SIGTERM)):
        start(recipe, folder, *OFTEN)
    last = folder / "last.pth"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.unlink() if damage == "removed" else last.write_bytes(content)
    capsys.readouterr()
    assert run_script(CLASSIFIER, "--savedir", folder, "--resume", *SELDOM) == 0
    assert f"resuming from {folder}/previous.pth" in capsys.readouterr().out
    left = ["damaged-last.pth was left behind"] if damage != "removed" else []
    assert differences(folder, whole(recipe)) == left


def test_a_full_disk_loses_nothing_that_was_saved(start, resumed, tmp_path, capsys):
    folder, recipe = tmp_path / "run", "one stage"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # noqa: E731
    try:
        with after_step("step 1 of epoch 2 of stage 2", full):
            assert start(recipe, folder) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written (File too large)" in line
    assert f"then resume with: {command(recipe, folder)}" in line
    assert load_checkpoint(folder / "last.pth")["epoch"] == 1
    assert not list(folder.glob(".*.unfinished.*"))
    assert "resuming after epoch 1 of stage 2" in resumed(recipe, folder)


def test_workers_may_change(start, resumed, tmp_path):
    """A run without workers goes on with two."""
    folder, recipe = tmp_path / "run", "two stages"
    with after_step("step 2 of epoch 1 of stage 1", send(signal.SIGTERM)):
        start(recipe, folder)
    argv = ("--savedir", folder, "--resume", "--workers", 2)
    with after_step("step 1 of epoch 2 of stage 2", send(signal.SIGTERM)):
        result = Forked(lambda: run_script(MAIN, *argv), tmp_path).finish()
    assert result.status == 128 + signal.SIGTERM, result.err
    resumed(recipe, folder)
