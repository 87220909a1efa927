"""A run that was stopped anywhere and goes on ends as the one that was never stopped: bit for bit,
in every file that it leaves."""

import itertools
import os
import shlex
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, run_script, wait_for_the_next_second

import utils.evaluation
import utils.run_folder
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.interrupts import Watch

sys.path.insert(0, str(ROOT / "tools"))

from fault_compare import differences

MAIN, CLASSIFIER = "main.py", "lednet_imagenet.py"
OFTEN = ("--checkpoint-minutes", 0)  # after every step
EVERY = ("--height", 64, "--batch-size", 2, "--D", 4, "--dropout", 0.3, "--iouTrain", *OFTEN)
STRONG = ("--augment", "strong", "--jitter", 0.4, "--loss", "ohem", "--ema")
SMALL = ("--size", 32, "--batch-size", 4, "--lr", 0.01, "--epochs", 2, *OFTEN)
# Of three steps an epoch, all of them.
RECIPES = {
    "two stages": (MAIN, *EVERY, *STRONG, "--encoder-epochs", 1, "--epochs", 2, "--workers", 2),
    "one stage": (
        *(MAIN, *EVERY, *STRONG, "--encoder-epochs", 0, "--epochs", 2, "--aux-weight", 0.4),
        *("--optimizer", "adamw", "--schedule", "onecycle", "--workers", 0),
    ),
    "published classifier": (CLASSIFIER, *SMALL, "--recipe", "paper", "--workers", 2),
    "modern classifier": (CLASSIFIER, *SMALL, "--recipe", "modern", "--workers", 0),
}


@pytest.fixture(scope="module")
def start(cityscapes, shapes) -> Callable[..., int]:
    """Start a run by one of the RECIPES; returns its status."""

    def started(recipe: str, folder: Path) -> int:
        name, *argv = RECIPES[recipe]
        datadir = cityscapes if name == MAIN else shapes
        return run_script(name, "--datadir", datadir, *argv, "--savedir", folder)

    return started


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a run that was never stopped; each is run once."""

    @cache
    def folder_of(recipe: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "whole"
        assert start(recipe, folder) == 0
        return folder

    return folder_of


def signal_after_step(patch: pytest.MonkeyPatch, place: str, number: int = signal.SIGTERM) -> None:
    """Send this process a signal when a step is done, and before it is looked up."""
    note_loss = Watch.note_loss

    def noted(self, *step):
        note_loss(self, *step)
        if self.place == place:
            os.kill(os.getpid(), number)

    patch.setattr(Watch, "note_loss", noted)


def signal_after_validated_batch(patch: pytest.MonkeyPatch, nth: int) -> None:
    """Send this process SIGTERM in the middle of a validation, counted over all of them."""
    until_stopped, batches = utils.evaluation._until_stopped, itertools.count(1)

    def stopped(*loader_and_more):
        for batch in until_stopped(*loader_and_more):
            place = next(batches)
            assert place <= nth, "the rest is not scored"
            if place == nth:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    patch.setattr(utils.evaluation, "_until_stopped", stopped)


def goes_on(recipe: str, folder: Path, whole: Callable, capsys) -> str:
    """Resume, and compare with the whole run; returns what was printed."""
    wait_for_the_next_second()
    capsys.readouterr()
    assert run_script(RECIPES[recipe][0], "--savedir", folder, "--resume") == 0
    out = capsys.readouterr().out
    assert "note: " not in out
    assert differences(folder, whole(recipe)) == []
    return out


@pytest.mark.parametrize(
    ("recipe", "place"),
    [
        ("two stages", "step 2 of epoch 1 of stage 1"),
        ("two stages", "step 3 of epoch 1 of stage 1"),
        ("two stages", "step 1 of epoch 2 of stage 2"),
        ("one stage", "step 1 of epoch 1 of stage 2"),
        ("one stage", "step 2 of epoch 2 of stage 2"),
        ("one stage", "step 3 of epoch 2 of stage 2"),
        ("published classifier", "step 2 of epoch 1"),
        ("published classifier", "step 3 of epoch 2"),
        ("modern classifier", "step 1 of epoch 2"),
        ("modern classifier", "step 3 of epoch 1"),
    ],
)
def test_stopped_by_sigterm_after_any_step(
    start, whole, tmp_path, monkeypatch, capsys, recipe, place
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_after_step(patch, place)
        assert start(recipe, folder) == 128 + signal.SIGTERM
    err = capsys.readouterr().err
    program = shlex.quote(str(ROOT / RECIPES[recipe][0]))
    how = f"to go on: python {program} --savedir {folder} --resume"
    assert f"stopped by SIGTERM, saved after {place}, {how}\n" in err
    assert f"resuming after {place}" in goes_on(recipe, folder, whole, capsys)


def test_stopped_by_ctrl_c_twice_over(start, whole, tmp_path, monkeypatch, capsys):
    """The run that goes on is stopped again."""
    folder, recipe = tmp_path / "run", "one stage"
    with monkeypatch.context() as patch:
        signal_after_step(patch, "step 1 of epoch 1 of stage 2", signal.SIGINT)
        assert start(recipe, folder) == 128 + signal.SIGINT
        signal_after_step(patch, "step 2 of epoch 1 of stage 2", signal.SIGINT)
        assert run_script(MAIN, "--savedir", folder, "--resume") == 128 + signal.SIGINT
    goes_on(recipe, folder, whole, capsys)


@pytest.mark.parametrize(
    ("recipe", "batch", "place"),
    [
        ("two stages", 1, "step 3 of epoch 1 of stage 1"),  # at 2 images a batch, 2 a validation
        ("two stages", 3, "step 3 of epoch 1 of stage 2"),
        ("one stage", 4, "step 3 of epoch 2 of stage 2"),
        ("published classifier", 1, "step 3 of epoch 1"),
        ("modern classifier", 3, "step 3 of epoch 2"),
    ],
)
def test_stopped_during_validation(
    start, whole, tmp_path, monkeypatch, capsys, recipe, batch, place
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_after_validated_batch(patch, batch)
        assert start(recipe, folder) == 128 + signal.SIGTERM
    assert f"saved after {place}" in capsys.readouterr().err
    goes_on(recipe, folder, whole, capsys)


def place_of(checkpoint: dict) -> tuple[int, int, int]:
    return checkpoint["stage"], checkpoint["epoch"], checkpoint["step"]


class Killed(BaseException):
    """What nothing in the programs is ready for."""


@pytest.mark.parametrize(
    ("recipe", "place"),
    [
        ("two stages", (1, 0, 2)),
        ("two stages", (1, 1, 0)),  # between the stages
        ("two stages", (2, 1, 1)),
        ("one stage", (2, 0, 3)),
        ("published classifier", (0, 1, 2)),
        ("modern classifier", (0, 0, 1)),
    ],
)
def test_killed_after_a_checkpoint_within_an_epoch(
    start, whole, tmp_path, monkeypatch, capsys, recipe, place
):
    """At once, so that nothing that comes after it is done."""
    folder = tmp_path / "run"

    def save_and_die(checkpoint, path):
        save_checkpoint(checkpoint, path)
        if path.name == "last.pth" and place_of(checkpoint) == place:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(utils.run_folder, "save_checkpoint", save_and_die)
        start(recipe, folder)
    assert place_of(load_checkpoint(folder / "last.pth")) == place
    goes_on(recipe, folder, whole, capsys)


def test_killed_between_the_stages(start, whole, tmp_path, monkeypatch, capsys):
    """When the encoder of stage 1 is written, and nothing of stage 2."""

    def save_and_die(checkpoint, path):
        save_checkpoint(checkpoint, path)
        if path.name == "encoder.pth":
            raise Killed

    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(utils.run_folder, "save_checkpoint", save_and_die)
        start("two stages", folder)
    assert load_checkpoint(folder / "last.pth")["stage"] == 1
    goes_on("two stages", folder, whole, capsys)


def test_killed_while_a_step_is_computed(start, whole, tmp_path, monkeypatch, capsys):
    """The step is done again, and comes to the same."""
    folder, recipe = tmp_path / "run", "one stage"
    note_loss = Watch.note_loss

    def noted(self, *step):
        note_loss(self, *step)
        if self.place == "step 2 of epoch 2 of stage 2":
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Watch, "note_loss", noted)
        start(recipe, folder)
    assert "resuming after step 1 of epoch 2" in goes_on(recipe, folder, whole, capsys)


def test_the_number_of_workers_may_change(start, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_after_step(patch, "step 2 of epoch 1 of stage 2")
        start("one stage", folder)
    assert run_script(MAIN, "--savedir", folder, "--resume", "--workers", 2) == 0
    assert all("workers" in found for found in differences(folder, whole("one stage")))
