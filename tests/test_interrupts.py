import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import differences
from conftest import PRETRAIN_QUICK, Forked, run_script
from torch import nn

from datasets.images import DatasetError
from datasets.loading import Batch
from utils import interrupts, script
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.interrupts import Action, Diverged, Guard, StopSignals
from utils.script import Interrupted
from utils.training import TrainState

LAST = Path("run/last.pth")
PROGRAM = "lednet_imagenet.py"


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that time.monotonic shows; the wall clock jumps meanwhile."""
    now, wall = [1000.0], iter([5e9, 0.0, 9e9, 1.0] * 100)
    fake = SimpleNamespace(monotonic=lambda: now[0], time=lambda: next(wall))
    monkeypatch.setattr(interrupts, "time", fake)
    return now


def guarded(minutes: float = 10.0, epoch: int = 0, step: int = 0) -> tuple[Guard, list[str]]:
    """Return the guard of a stage of which nothing is trained, and the places where it saved."""
    model = nn.Linear(2, 2)
    files = {3: ["3.png", "3_labels.png"], 8: ["8.png", None]}
    stage = SimpleNamespace(number=0, model=model, scored=model, files=files.__getitem__)
    state = TrainState(stage, epoch, step)
    saved: list[str] = []
    save = lambda: saved.append(state.place())  # noqa: E731
    return Guard(StopSignals(), state, save, LAST, minutes, "python main.py"), saved


def take_step(guard: Guard, loss: float = 1.0) -> None:
    guard.state.step += 1
    guard.note_loss(torch.tensor(loss), [3, 8])


# Saving


def test_a_checkpoint_is_saved_every_so_many_minutes_whatever_the_wall_clock_shows(clock):
    guard, saved = guarded(minutes=2)
    for _ in range(10):
        take_step(guard)
        guard.poll()
        clock[0] += 50
    # After more than 120 s: steps 3 and 6 are 150 s apart.
    assert saved == [f"step {number} of epoch 1" for number in (4, 7, 10)]


def test_the_minutes_count_from_the_checkpoint_after_an_epoch(clock):
    guard, saved = guarded(minutes=2)
    clock[0] += 119
    guard.save()
    clock[0] += 119
    guard.poll()
    assert len(saved) == 1


# Signals


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")]
)
def test_a_signal_ends_training_after_the_step(capfd, number, name):
    guard, saved = guarded()
    before = signal.getsignal(number)
    with guard.signals:
        os.kill(os.getpid(), number)
        assert guard.stopping and saved == []
        take_step(guard)
        with pytest.raises(Interrupted) as raised:
            guard.poll()
    assert signal.getsignal(number) == before
    assert saved == ["step 1 of epoch 1"]
    expected = f"stopped by {name}, saved after step 1 of epoch 1, to go on: python main.py"
    assert str(raised.value) == expected and raised.value.status == 128 + number
    assert capfd.readouterr().err.endswith(": finishing the step to save; again to stop at once\n")


def test_an_ignored_signal_stays_ignored():
    signals, before = StopSignals(), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


class SignalledWhenDeleted:
    """Receives a signal where Python drops the exception of its handler."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_whose_exception_python_dropped_is_not_lost(number, capfd):
    guard, saved = guarded()

    def main() -> None:
        SignalledWhenDeleted(number)
        with guard.signals:
            assert guard.stopping
            guard.poll()

    with pytest.raises(SystemExit) as end:
        script.run_script(main)
    assert saved == ["epoch 0"] and end.value.code == 128 + number
    assert "saved after epoch 0, to go on: python main.py" in capfd.readouterr().err
    with StopSignals() as others:
        assert others.received is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(number, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py"])

    def main() -> None:
        with StopSignals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                print("still here")
                os.kill(os.getpid(), number)
            finally:
                print("never printed")

    end = Forked(main, tmp_path).finish()
    assert end.status == 128 + number and end.out == "still here\n"
    noted, stopped = end.err.splitlines()
    assert noted.startswith("main.py: finishing the step") and stopped == "main.py: stopped at once"


def test_torchrun_may_repeat_a_signal_within_a_second(clock, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = []
    monkeypatch.setattr(interrupts.os, "_exit", ended.append)
    with StopSignals() as signals:
        for seconds, expected in ((0, []), (0.9, []), (0.2, [143])):
            clock[0] += seconds
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM and ended == expected


# Failures


@pytest.mark.parametrize(
    ("begun", "kept"),
    [
        ({}, "no checkpoint was written yet"),
        ({"epoch": 2}, "the last good checkpoint is run/last.pth, after epoch 2"),
        ({"epoch": 2, "step": 4}, "checkpoint is run/last.pth, after step 4 of epoch 3"),
    ],
)
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_files_and_the_last_good_checkpoint(
    clock, begun, kept, loss
):
    """It counts more than a signal, another failure and the time to save."""
    guard, saved = guarded(minutes=0, **begun)
    clock[0] += 60
    guard.signals.received = signal.SIGTERM
    take_step(guard, loss)
    place = guard.state.place()
    with pytest.raises(Diverged) as raised:
        guard.poll(DatasetError("another failure"))
    assert saved == []
    text = str(raised.value)
    assert text.startswith(f"the loss is {loss} in {place}, with 3.png, 3_labels.png, 8.png: ")
    assert kept in text


def test_a_large_batch_is_named_in_part():
    guard, _ = guarded()
    guard.state.stage.files = lambda index: [f"{index}.png"]
    guard.note_loss(torch.tensor(math.nan), range(30))
    with pytest.raises(Diverged, match=r"18\.png, 19\.png and 10 more: "):
        guard.poll()


def test_the_last_good_checkpoint_is_the_last_that_was_written(clock, tmp_path):
    guard, saved = guarded(minutes=1)
    for loss in (1.0, 1.0, math.nan):
        take_step(guard, loss)
        clock[0] += 50
        if not math.isnan(loss):
            guard.poll()
    with pytest.raises(Diverged, match=r"last good checkpoint is .* after step 2 of epoch 1"):
        guard.poll()
    assert saved == ["step 2 of epoch 1"]


def test_the_last_good_checkpoint_may_be_of_the_stage_before(tmp_path):
    (tmp_path / "last.pth").write_text("")
    guard = Guard(StopSignals(), guarded()[0].state, print, tmp_path / "last.pth", 10, "")
    assert guard.last_good == f"the last good checkpoint is {tmp_path}/last.pth"


def test_weights_that_are_not_finite_are_never_saved(clock):
    guard, saved = guarded(minutes=0)
    take_step(guard)
    guard.state.stage.model.weight.data[0, 1] = math.nan
    clock[0] += 60
    for end in (guard.poll, guard.save, lambda: guard.poll(DatasetError("broken"))):
        with pytest.raises(Diverged, match="a weight is not finite after step 1 of epoch 1"):
            end()
    assert saved == []


def test_an_average_that_is_not_finite_is_not_saved_either():
    guard, saved = guarded()
    guard.state.stage.scored = nn.BatchNorm1d(2)
    guard.state.stage.scored.running_var[0] = math.inf
    with pytest.raises(Diverged, match="a weight is not finite"):
        guard.save()
    assert saved == []


def test_the_newest_loss_is_checked_before_saving():
    guard, saved = guarded()
    take_step(guard, math.nan)
    with pytest.raises(Diverged, match=r"3\.png"):
        guard.save()
    assert saved == []


def test_a_broken_file_ends_training_after_saving():
    guard, saved = guarded()
    take_step(guard)
    with pytest.raises(DatasetError) as raised:
        guard.poll(DatasetError("a.png is broken"))
    assert str(raised.value) == "a.png is broken" and saved == ["step 1 of epoch 1"]
    assert raised.value.__notes__ == ["saved after step 1 of epoch 1, to go on: python main.py"]


def test_a_bug_is_raised_as_it_is_after_saving(capsys):
    guard, saved = guarded()
    take_step(guard)
    with pytest.raises(ZeroDivisionError):
        guard.poll(ZeroDivisionError("division by zero"))
    assert saved == ["step 1 of epoch 1"]
    assert capsys.readouterr().out == "saved after step 1 of epoch 1, to go on: python main.py\n"


def test_the_failure_of_another_process_ends_this_one_after_saving(monkeypatch):
    guard, saved = guarded()
    take_step(guard)
    others = iter([Action.FAIL, Action.CONTINUE])
    monkeypatch.setattr(interrupts.distributed, "agree", lambda own: max(own, next(others)))
    with pytest.raises(SystemExit) as end:
        guard.poll()
    assert end.value.code == 2 and saved == ["step 1 of epoch 1"]


# Batches


class Loader(list):
    dataset = range(3)


def batch(*indices: int, left_out: tuple[str, ...] = ()) -> Batch:
    images = [torch.zeros(3, 4, 4)] * len(indices)
    return Batch(images, images, [0] * len(indices), list(indices), list(left_out))


def test_a_signal_is_noticed_before_each_batch():
    guard, saved = guarded()
    batches = guard.training_batches([batch(0), batch(1), batch(2)], torch.tensor(0))
    assert next(batches).indices == [0] and next(batches).indices == [1]
    take_step(guard)
    guard.signals.received = signal.SIGINT
    with pytest.raises(Interrupted):
        next(batches)
    assert saved == ["step 1 of epoch 1"]


def test_a_signal_breaks_off_validation():
    guard, saved = guarded(epoch=1)
    batches = guard.validation_batches(Loader([batch(0), batch(1)]), torch.tensor(0))
    assert next(batches).indices == [0]
    guard.signals.received = signal.SIGTERM
    with pytest.raises(Interrupted):
        next(batches)
    assert saved == ["epoch 1"]


def failing(*batches: Batch):
    yield from batches
    raise DatasetError("b.png is broken")


@pytest.mark.parametrize("batches", [Guard.training_batches, Guard.validation_batches])
def test_a_failure_of_a_loader_saves_first(batches):
    guard, saved = guarded(step=3)
    found = batches(guard, failing(batch(0)), torch.tensor(0))
    assert next(found).indices == [0]
    with pytest.raises(DatasetError, match=r"b\.png is broken"):
        next(found)
    assert saved == ["step 3 of epoch 1"]


@pytest.mark.parametrize("batches", [Guard.training_batches, Guard.validation_batches])
def test_images_that_are_left_out_are_counted_and_printed(batches, capsys):
    guard, count = guarded()[0], torch.tensor(0)
    loader = Loader([batch(0, left_out=("a.png is broken",)), batch(2)])
    assert [found.indices for found in batches(guard, loader, count)] == [[0], [2]]
    assert count == 1 and capsys.readouterr().err == "left out: a.png is broken\n"


def test_batches_of_which_nothing_can_be_read_are_not_scored():
    guard, saved = guarded(epoch=1)
    loader = Loader([batch(left_out=("a.png",)), batch(1), batch(left_out=("c.png",))])
    found = guard.validation_batches(loader, torch.tensor(0))
    assert [batch.indices for batch in found] == [[1]]
    loader = Loader(batch(left_out=(name,)) for name in "abc")
    with pytest.raises(UserError, match="none of the images to validate on can be read"):
        list(guard.validation_batches(loader, torch.tensor(0)))
    assert saved == ["epoch 1"]


# A real run, with processes that load data


@pytest.fixture(scope="module")
def start(shapes, tmp_path_factory) -> Callable[[Path], Forked]:
    """Start a run of two epochs of three steps in a process of its own."""
    options = (*PRETRAIN_QUICK, "--epochs", 2, "--lr", 0.01, "--workers", 2, "--steps-loss", 1)

    def begin(folder: Path) -> Forked:
        argv = (PROGRAM, "--datadir", shapes, *options, "--savedir", folder)
        return Forked(lambda: sys.exit(run_script(*argv)), tmp_path_factory.mktemp("output"))

    return begin


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """The folder of a run that was never disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    end = start(folder).finish()
    assert end.status == 0, end.err
    return folder


def test_ctrl_c_in_a_terminal_prints_the_command_that_goes_on(start, whole, tmp_path):
    """Ctrl-C reaches the processes that load data too."""
    folder = tmp_path / "a run"
    run = start(folder)
    run.wait_for("step 1/3")
    for number in (*children_of(run), run.pid):
        os.kill(number, signal.SIGINT)
    end = run.finish()
    assert end.status == 130
    noted, stopped = end.err.splitlines()
    assert noted == f"{PROGRAM}: finishing the step to save; again to stop at once"
    assert stopped.startswith(f"{PROGRAM}: stopped by Ctrl-C, saved after ")
    command = shlex.split(stopped.split("to go on: python ")[1])
    assert command[1:] == ["--savedir", str(folder), "--resume"]
    assert run_script(*command) == 0
    assert differences(folder, whole) == []


def children_of(run: Forked) -> list[int]:
    """Return the numbers of the processes that load data."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text()
    return [int(number) for number in children.split()]


@pytest.mark.parametrize("which", ["one", "all"])
def test_when_a_process_that_loads_data_is_killed_nothing_is_lost(start, whole, tmp_path, which):
    folder = tmp_path / "run"
    run = start(folder)
    run.wait_for("step 1/3")
    for number in children_of(run)[-1 if which == "one" else 0 :]:
        os.kill(number, signal.SIGKILL)
    killed = time.monotonic()
    end = run.finish()
    assert time.monotonic() - killed < 60 and end.status == 2
    (line,) = end.err.splitlines()
    assert line.startswith(f"{PROGRAM}: error: a process that loads data died (")
    assert "give fewer --workers" in line
    assert line.endswith(f"{PROGRAM} --savedir {folder} --resume")
    assert load_checkpoint(folder / "last.pth")["epoch"] <= 1
    assert run_script(PROGRAM, "--savedir", folder, "--resume") == 0
    assert differences(folder, whole) == []
