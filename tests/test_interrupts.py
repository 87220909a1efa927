import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import differences
from conftest import PRETRAIN_QUICK, ROOT, Forked, after_step, run_script
from torch import nn

from datasets.images import DatasetError
from datasets.loading import Batch
from utils import distributed, interrupts
from utils.errors import UserError
from utils.interrupts import Action, Diverged, Guard, StopSignals
from utils.script import Interrupted
from utils.script import run_script as run_main
from utils.training import TrainState

PROGRAM = "lednet_imagenet.py"
SIGNALS = [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that time.monotonic shows."""
    now = [1000.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    return now


def guarded(
    minutes: float = 10.0, signals: StopSignals | None = None, **place: int
) -> tuple[Guard, list[str]]:
    """Return the guard of a stage that takes no real steps, and the places where it saved."""
    model = nn.Linear(2, 2)
    files = {3: ["3.png", "3_labels.png"], 8: ["8.png"]}
    stage = SimpleNamespace(number=0, model=model, scored=model, files=files.get)
    state, saved = TrainState(stage, **place), []
    state.state_dict = state.place

    run = SimpleNamespace(
        args=SimpleNamespace(checkpoint_minutes=minutes),
        signals=signals or StopSignals(),
        last=Path("run/last.pth"),
        command="python main.py",
        save=saved.append,
    )
    return Guard(run, state), saved


def step(guard: Guard, loss: float = 1.0) -> None:
    guard.state.step += 1
    guard.note_loss(torch.tensor(loss), [3, 8])


# Checkpoints from time to time


def test_a_checkpoint_is_saved_every_few_minutes(clock):
    guard, saved = guarded(minutes=2)
    for _ in range(10):
        step(guard)
        guard.poll()
        clock[0] += 50
    # After more than 120 s: there are 150 s between steps 1, 4, 7 and 10.
    assert saved == [f"step {number} of epoch 1" for number in (4, 7, 10)]


def test_the_checkpoint_of_an_epoch_starts_the_interval_anew(clock):
    guard, saved = guarded(minutes=2)
    clock[0] += 119
    guard.save()
    clock[0] += 119
    guard.poll()
    assert len(saved) == 1


# Signals


@pytest.mark.parametrize(("number", "name"), SIGNALS)
def test_a_signal_lets_the_step_finish_and_saves(capfd, number, name):
    signals, before = StopSignals(), signal.getsignal(number)
    guard, saved = guarded(signals=signals)
    with signals:
        os.kill(os.getpid(), number)
        assert guard.stopping and saved == []
        step(guard)
        with pytest.raises(Interrupted) as raised:
            guard.poll()
    assert signal.getsignal(number) == before
    assert saved == ["step 1 of epoch 1"] and raised.value.status == 128 + number
    how = "saved after step 1 of epoch 1; resume with: python main.py"
    assert str(raised.value) == f"stopped by {name}, {how}"
    assert capfd.readouterr().err.endswith(": finishing the step to save; again to stop at once\n")


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


class SignalInDestructor:
    """Receives a signal where Python drops the exception that its handler raises."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("number", "name"), SIGNALS)
def test_a_signal_whose_exception_python_drops_is_not_lost(number, name, capfd):
    signals = StopSignals()
    guard, saved = guarded(signals=signals)

    def main() -> None:
        SignalInDestructor(number)
        with signals:
            guard.poll()

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert saved == ["epoch 0"] and end.value.code == 128 + number
    assert f"stopped by {name}, saved after epoch 0" in capfd.readouterr().err
    with StopSignals() as later:
        assert later.received is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process_at_once(tmp_path, number):
    def program() -> None:
        with StopSignals():
            try:
                print("ready")
                time.sleep(60)
            finally:
                print("cleaned up")

    process = Forked(program, tmp_path)
    process.wait_for("ready")
    process.signal(signal.SIGTERM)
    process.wait_for("finishing the step", process.err)
    process.signal(number)
    result = process.finish()
    assert result.status == 128 + number and result.out == "ready\n"
    assert result.err.endswith(": stopped at once\n")


def test_torchrun_may_deliver_a_signal_twice(clock, monkeypatch):
    """A cluster sends it to every process, and torchrun forwards it; a later one is another."""
    monkeypatch.setattr(distributed, "local_rank", lambda: 0)
    ended = []
    monkeypatch.setattr(interrupts.os, "_exit", ended.append)
    with StopSignals() as signals:
        for seconds, expected in ((0, []), (0.9, []), (0.2, [143])):
            clock[0] += seconds
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM and ended == expected


# Training that diverges


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
    """It comes before whatever else there is to do, and nothing is saved."""
    signals = StopSignals()
    guard, saved = guarded(minutes=0, signals=signals, **begun)
    clock[0] += 60
    signals.received = signal.SIGTERM
    step(guard, loss)
    place = guard.state.place()
    with pytest.raises(Diverged) as raised:
        guard.poll(DatasetError("another failure"))
    assert saved == []
    text = str(raised.value)
    assert text.startswith(f"the loss is {loss} in {place}, with 3.png, 3_labels.png, 8.png: ")
    assert kept in text


def test_a_large_batch_is_named_in_part():
    guard, _ = guarded()
    guard.state.stage.files = lambda index: [f"{index}.png", None]
    guard.note_loss(torch.tensor(math.nan), range(30))
    with pytest.raises(Diverged, match=r"18\.png, 19\.png and 10 more: "):
        guard.poll()


def test_the_last_good_checkpoint_is_the_one_saved_last(clock):
    guard, saved = guarded(minutes=1)
    for _ in range(2):
        step(guard)
        clock[0] += 50
        guard.poll()
    step(guard, math.nan)
    with pytest.raises(Diverged, match=r"last good checkpoint is .* after step 2 of epoch 1"):
        guard.poll()
    assert saved == ["step 2 of epoch 1"]


def test_weights_that_are_not_finite_are_never_saved(clock):
    guard, saved = guarded(minutes=0)
    step(guard)
    guard.state.stage.model.weight.data[0, 1] = math.nan
    clock[0] += 60
    for end in (guard.poll, guard.save, lambda: guard.poll(DatasetError("broken"))):
        with pytest.raises(Diverged, match="a weight is not finite after step 1 of epoch 1"):
            end()
    assert saved == []


def test_an_average_that_is_not_finite_is_not_saved():
    guard, saved = guarded()
    guard.state.stage.scored = nn.BatchNorm1d(2)
    guard.state.stage.scored.running_var[0] = math.inf
    with pytest.raises(Diverged, match="a weight is not finite"):
        guard.save()
    assert saved == []


def test_losses_are_checked_before_anything_is_saved():
    guard, saved = guarded()
    step(guard, math.nan)
    with pytest.raises(Diverged, match=r"3\.png"):
        guard.save()
    assert saved == []


# Failures


def test_a_users_mistake_saves_first_and_says_how_to_go_on():
    guard, saved = guarded()
    step(guard)
    with pytest.raises(UserError, match=r"^a\.png is broken\n") as raised:
        guard.poll(DatasetError("a.png is broken"))
    assert saved == ["step 1 of epoch 1"]
    assert raised.value.__notes__ == ["saved after step 1 of epoch 1; resume with: python main.py"]


def test_a_bug_saves_first_and_keeps_its_traceback(capsys):
    guard, saved = guarded()
    step(guard)
    with pytest.raises(ZeroDivisionError):
        guard.poll(ZeroDivisionError("division by zero"))
    assert saved == ["step 1 of epoch 1"]
    assert capsys.readouterr().out == "saved after step 1 of epoch 1; resume with: python main.py\n"


def test_a_failure_of_another_process_ends_this_one(monkeypatch):
    others = iter([Action.FAIL])
    monkeypatch.setattr(distributed, "agree", lambda own: max(own, next(others, own)))
    guard, saved = guarded()
    with pytest.raises(SystemExit):
        guard.poll()
    assert saved == ["epoch 0"]


# Batches


class Loader(list):
    dataset = range(3)


def batch(*indices: int, left_out: Sequence[str] = ()) -> Batch:
    return Batch([0] * len(indices), [], [], list(indices), list(left_out))


LOOPS = pytest.mark.parametrize("loop", [Guard.training_batches, Guard.validation_batches])


@LOOPS
def test_a_signal_ends_the_loading_of_batches(loop):
    guard, saved = guarded()
    batches = loop(guard, Loader(map(batch, range(3))), torch.tensor(0))
    assert next(batches).indices == [0]
    guard.signals.received = signal.SIGTERM
    with pytest.raises(Interrupted):
        next(batches)
    assert saved == ["epoch 0"]


@LOOPS
def test_an_error_of_the_loader_saves_first(loop):
    def loader() -> Iterator[Batch]:
        yield batch(0)
        raise DatasetError("b.png is broken")

    guard, saved = guarded(step=3)
    batches = loop(guard, loader(), torch.tensor(0))
    assert next(batches).indices == [0]
    with pytest.raises(DatasetError, match=r"b\.png is broken"):
        next(batches)
    assert saved == ["step 3 of epoch 1"]


@LOOPS
def test_images_that_are_left_out_are_counted_and_named(loop, capsys):
    (guard, _), count = guarded(), torch.tensor(0)
    loader = Loader([batch(0, left_out=["a\n.png is broken"]), batch(2)])
    assert [found.indices for found in loop(guard, loader, count)] == [[0], [2]]
    assert count == 1 and capsys.readouterr().err == "left out: a\n.png is broken\n"


def test_validation_needs_an_image_that_can_be_read():
    guard, _ = guarded()
    loader = Loader([batch(left_out=["a.png"]), batch(1), batch(left_out=["c.png"])])
    found = guard.validation_batches(loader, torch.tensor(0))
    assert [batch.indices for batch in found] == [[1]]
    loader = Loader(batch(left_out=[name]) for name in "abc")
    with pytest.raises(UserError, match="none of the images to validate on can be read"):
        list(guard.validation_batches(loader, torch.tensor(0)))


# The program


@pytest.fixture(scope="module")
def argv(shapes) -> tuple:
    """The command line of a run of two epochs of three steps, with processes that load data."""
    options = ("--epochs", 2, "--lr", 0.01, "--workers", 2, "--steps-loss", 1, "--device", "cpu")
    return (PROGRAM, "--datadir", shapes, *PRETRAIN_QUICK, *options)


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory) -> Path:
    """The folder of a run that was never disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run_script(*argv, "--savedir", folder, "--workers", 0) == 0
    return folder


def test_ctrl_c_in_a_terminal_prints_the_command_that_goes_on(argv, whole, tmp_path):
    """The terminal sends the signal to the workers of the loader as well."""
    folder = tmp_path / "a run"
    process = subprocess.Popen(
        [sys.executable, *map(str, argv), "--savedir", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert any("step 1/3" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    first, last = err.splitlines()
    assert first == f"{PROGRAM}: finishing the step to save; again to stop at once"
    assert last.startswith(f"{PROGRAM}: stopped by Ctrl-C, saved after ")
    command = last.split("resume with: python ")[1]
    assert command == f"{PROGRAM} --savedir '{folder}' --resume"
    assert run_script(*shlex.split(command), "--workers", 0) == 0
    assert differences(folder, whole) == []


@pytest.mark.parametrize("which", ["one", "all"])
def test_a_killed_worker_is_reported_in_one_line_and_costs_nothing(argv, whole, tmp_path, which):
    folder = tmp_path / "run"

    def kill_workers() -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for child in children[-1 if which == "one" else 0 :]:
            os.kill(int(child), signal.SIGKILL)

    with after_step("step 1 of epoch 1", kill_workers):
        result = Forked(lambda: run_script(*argv, "--savedir", folder), tmp_path).finish(60)
    assert result.status == 2
    (line,) = result.err.splitlines()
    assert line.startswith(f"{PROGRAM}: error: a process that loads data died (")
    assert "fewer --workers" in line and f"--savedir {folder} --resume" in line
    assert run_script(PROGRAM, "--savedir", folder, "--resume", "--workers", 0) == 0
    assert differences(folder, whole) == []
