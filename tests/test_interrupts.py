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
from conftest import QUICK, ROOT, Forked, after_step, run_script
from torch import nn

from datasets.images import DatasetError
from datasets.loading import Batch
from utils import distributed, interrupts
from utils.errors import UserError
from utils.interrupts import Action, Diverged, Guard, StopSignals
from utils.script import Interrupted
from utils.script import run_script as run_main
from utils.training import TrainState

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

    def save() -> None:
        saved.append(state.place())

    last = Path("run/last.pth")
    return Guard(signals or StopSignals(), state, save, last, minutes, "python main.py"), saved


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
    how = "saved after step 1 of epoch 1, to go on: python main.py"
    assert str(raised.value) == f"stopped by {name}, {how}"
    assert capfd.readouterr().err.endswith(": finishing the step to save; again to stop at once\n")


def test_a_signal_ends_the_loading_of_batches():
    signals = StopSignals()
    guard, _ = guarded(signals=signals)
    batches = [Batch([0], [0], [0], [number], []) for number in range(3)]
    for loop in (guard.training_batches, guard.validation_batches):
        signals.received, seen = None, []
        with pytest.raises(Interrupted):
            for batch in loop(batches, torch.tensor(0)):
                seen += batch.indices
                signals.received = signal.SIGTERM
        assert seen == [0]


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
    """A cluster sends it to every process, and torchrun forwards it."""
    monkeypatch.setattr(distributed, "local_rank", lambda: 0)
    monkeypatch.setattr(interrupts.os, "_exit", lambda status: pytest.fail("ended at once"))
    with StopSignals() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            clock[0] += 0.5
        assert signals.received == signal.SIGTERM


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


def test_the_last_good_checkpoint_may_be_of_the_stage_before(tmp_path):
    (tmp_path / "last.pth").write_text("")
    guard = Guard(StopSignals(), guarded()[0].state, print, tmp_path / "last.pth", 10, "")
    assert guard.last_good == f"the last good checkpoint is {tmp_path}/last.pth"


def test_weights_that_are_not_finite_are_never_saved(clock):
    guard, saved = guarded(minutes=0)
    step(guard)
    guard.state.stage.model.weight.data[0, 1] = math.nan
    clock[0] += 60
    for end in (guard.poll, guard.save, lambda: guard.poll(DatasetError("broken"))):
        with pytest.raises(Diverged, match="a weight is not finite after step 1 of epoch 1"):
            end()
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
    assert raised.value.__notes__ == ["saved after step 1 of epoch 1, to go on: python main.py"]


def test_a_bug_saves_first_and_keeps_its_traceback(capsys):
    guard, saved = guarded()
    step(guard)
    with pytest.raises(ZeroDivisionError):
        guard.poll(ZeroDivisionError("division by zero"))
    assert saved == ["step 1 of epoch 1"]
    assert capsys.readouterr().out == "saved after step 1 of epoch 1, to go on: python main.py\n"


def test_a_failure_of_another_process_ends_this_one(monkeypatch):
    others = iter([Action.FAIL])
    monkeypatch.setattr(distributed, "agree", lambda own: max(own, next(others, own)))
    guard, saved = guarded()
    with pytest.raises(SystemExit):
        guard.poll()
    assert saved == ["epoch 0"]


# The program


def argv(datadir: Path, folder: Path) -> tuple:
    return (
        *("main.py", "--datadir", datadir, *QUICK, "--decoder", "--epochs", 2, "--D", 4),
        *("--savedir", folder, "--device", "cpu", "--steps-loss", 1, "--workers", 2),
    )


@pytest.fixture(scope="module")
def whole(cityscapes, tmp_path_factory) -> Path:
    """The folder of a run that was never disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run_script(*argv(cityscapes, folder), "--workers", 0) == 0
    return folder


def test_ctrl_c_in_a_terminal_prints_the_command_that_goes_on(cityscapes, whole, tmp_path):
    """The terminal sends the signal to the workers of the loader as well."""
    folder = tmp_path / "a run"
    process = subprocess.Popen(
        [sys.executable, *map(str, argv(cityscapes, folder))],
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
    assert first == "main.py: finishing the step to save; again to stop at once"
    assert last.startswith("main.py: stopped by Ctrl-C, saved after ")
    command = last.split("to go on: python ")[1]
    assert command == f"main.py --savedir '{folder}' --resume"
    again = [sys.executable, *shlex.split(command)]
    subprocess.run(again, cwd=ROOT, capture_output=True, timeout=120, check=True)
    assert differences(folder, whole) == []


def children_of(run: Forked) -> list[int]:
    """Return the numbers of the processes that load data."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text()
    return [int(number) for number in children.split()]


@pytest.mark.parametrize("which", ["one", "all"])
def test_a_killed_worker_is_reported_in_one_line_and_costs_nothing(
    cityscapes, whole, tmp_path, which
):
    folder = tmp_path / "run"

    def kill_workers() -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for child in children[-1 if which == "one" else 0 :]:
            os.kill(int(child), signal.SIGKILL)

    program: Callable[[], int] = lambda: run_script(*argv(cityscapes, folder))  # noqa: E731
    with after_step("step 1 of epoch 1 of stage 2", kill_workers):
        result = Forked(program, tmp_path).finish(60)
    assert result.status == 2
    (line,) = result.err.splitlines()
    assert line.startswith("main.py: error: a process that loads data died (")
    assert "fewer --workers" in line and f"--savedir {folder} --resume" in line
    assert run_script("main.py", "--savedir", folder, "--resume", "--workers", 0) == 0
    assert differences(folder, whole) == []
