import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import QUICK, ROOT
from torch import nn

from datasets.images import DatasetError
from utils import interrupts as watch_module
from utils import script as cli
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.interrupts import Diverged, Watch
from utils.script import Interrupted
from utils.training import Training

sys.path.insert(0, str(ROOT / "tools"))

from fault_compare import differences


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that time.monotonic shows; the clock on the wall jumps meanwhile."""
    now, wall = [1000.0], iter([5e9, 0.0, 9e9, 1.0] * 100)
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch_module.time, "time", lambda: next(wall))
    return now


def watching(minutes: float = 10.0, epoch: int = 0, step: int = 0) -> tuple[Watch, Training, list]:
    """A watch over a training that is only said to be done, and the places where it saved."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    training = Training(model, model, optimizer, schedule, scaler, 2, 5, epoch=epoch, step=step)
    files = {3: ["3.png", "3_labels.png"], 8: ["8.png"]}
    watch = Watch(Path("run/last.pth"), minutes, "python main.py", files.get, (DatasetError,))
    saved: list[str] = []
    watch.begin(training, lambda: saved.append(watch.place))
    return watch, training, saved


def step(watch: Watch, training: Training, loss: float = 1.0) -> None:
    training.step += 1
    watch.note_loss(torch.tensor(loss), [3, 8])


def test_a_checkpoint_is_saved_every_so_many_minutes_whatever_the_clock_on_the_wall_says(clock):
    watch, training, saved = watching(minutes=2)
    for _ in range(10):
        step(watch, training)
        watch.look_up()
        clock[0] += 50
    # After more than 120 s: those of steps 3 and 6 are 150 s apart.
    assert saved == [f"step {number} of epoch 1" for number in (4, 7, 10)]


def test_saving_after_an_epoch_begins_the_minutes_anew(clock):
    watch, _, saved = watching(minutes=2)
    clock[0] += 119
    watch.save()
    clock[0] += 119
    watch.look_up()
    assert len(saved) == 1


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")]
)
def test_a_signal_is_noted_and_the_step_finished(clock, capfd, number, name):
    watch, training, saved = watching()
    before = signal.getsignal(number)
    with watch:
        os.kill(os.getpid(), number)
        assert watch.stopping and saved == []
        step(watch, training)
        with pytest.raises(Interrupted) as raised:
            watch.look_up()
    assert signal.getsignal(number) == before
    assert saved == ["step 1 of epoch 1"]
    expected = f"stopped by {name}, saved after step 1 of epoch 1, to go on: python main.py"
    assert str(raised.value) == expected and raised.value.status == 128 + number
    assert capfd.readouterr().err.endswith(": finishing the step to save; again to stop at once\n")


def test_a_signal_that_is_ignored_stays_ignored():
    watch, _, _ = watching()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watch:
            os.kill(os.getpid(), signal.SIGINT)
            assert not watch.stopping
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


class Callback:
    """Receives a signal where Python drops what its handler raises."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_was_dropped_before_there_was_a_watch_is_not_lost(number, capfd):
    watch, _, saved = watching()
    stopping = []

    def main() -> None:
        Callback(number)
        with watch:
            stopping.append(watch.stopping)
            watch.look_up()

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert stopping == [True] and saved == ["epoch 0"] and end.value.code == 128 + number
    assert "saved after epoch 0, to go on: python main.py" in capfd.readouterr().err
    with watching()[0] as another:
        assert not another.stopping


TWICE = """
import os, signal, sys, time
sys.path[:0] = ["tests", "."]
import test_watch
watch, training, saved = test_watch.watching()
with watch:
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("never said")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process_at_once(number):
    process = subprocess.Popen(
        [sys.executable, "-c", TWICE],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert "finishing the step" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=50)
    assert process.returncode == 128 + number
    assert err == "-c: stopped at once\n" and out == ""


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
    watch, training, saved = watching(minutes=0, **begun)
    clock[0] += 60  # it would be time to save
    watch.received = signal.SIGTERM  # and to stop
    place = f"step {training.step + 1} of epoch {training.epoch + 1}"
    step(watch, training, loss)
    with pytest.raises(Diverged) as raised:
        watch.look_up(DatasetError("another failure"))
    assert saved == []
    text = str(raised.value)
    assert text.startswith(f"the loss is {loss} in {place}, of 3.png, 3_labels.png, 8.png: ")
    assert kept in text


def test_the_checkpoint_that_was_saved_last_is_the_good_one(clock):
    watch, training, saved = watching(minutes=1)
    for loss in (1.0, 1.0, math.nan):
        step(watch, training, loss)
        clock[0] += 50
        if math.isnan(loss):
            with pytest.raises(
                Diverged, match=r"last good checkpoint is .* after step 2 of epoch 1"
            ):
                watch.look_up()
        else:
            watch.look_up()
    assert saved == ["step 2 of epoch 1"]


def test_weights_that_are_not_finite_are_never_saved(clock):
    watch, training, saved = watching(minutes=0)
    step(watch, training)
    training.model.weight.data[0, 1] = math.nan
    clock[0] += 60
    for end in (watch.look_up, watch.save, lambda: watch.look_up(DatasetError("broken"))):
        with pytest.raises(Diverged, match="a weight is not finite after step 1 of epoch 1"):
            end()
    assert saved == []


def test_a_loss_that_nobody_looked_at_yet_is_looked_at_before_saving(clock):
    watch, training, saved = watching()
    step(watch, training, math.nan)
    with pytest.raises(Diverged, match=r"3\.png"):
        watch.save()
    assert saved == []


def test_a_failure_of_reading_saves_first_and_says_how_to_go_on(clock):
    watch, training, saved = watching()
    step(watch, training)
    with pytest.raises(UserError) as raised:
        watch.look_up(DatasetError("a.png is broken"))
    expected = (
        "a.png is broken, or leave it out with --skip-broken; "
        "saved after step 1 of epoch 1, to go on: python main.py"
    )
    assert saved == ["step 1 of epoch 1"] and str(raised.value) == expected


def test_a_mistake_of_the_program_saves_first_and_is_raised_as_it_is(clock, capsys):
    watch, training, saved = watching()
    step(watch, training)
    with pytest.raises(ZeroDivisionError):
        watch.look_up(ZeroDivisionError("division by zero"))
    assert saved == ["step 1 of epoch 1"]
    assert capsys.readouterr().out == "saved after step 1 of epoch 1, to go on: python main.py\n"


# The real program


def argv(datadir: Path, folder: Path, *options: object) -> list[str]:
    command = (
        *("main.py", "--datadir", datadir, *QUICK, "--decoder", "--epochs", 2, "--D", 4),
        *("--savedir", folder, "--device", "cpu", "--steps-loss", 1, *options),
    )
    return [sys.executable, *map(str, command)]


def started(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def whole(cityscapes, tmp_path_factory) -> Path:
    """The folder of a run with two workers that was never disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = started(argv(cityscapes, folder, "--workers", 2))
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_program_says_the_command_that_goes_on(cityscapes, whole, tmp_path, number):
    folder = tmp_path / "a run"
    process = started(argv(cityscapes, folder, "--workers", 2))
    wait_for(process, "step 1/3")
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    noted, end = err.splitlines()
    assert noted == "main.py: finishing the step to save; again to stop at once"
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    assert end.startswith(f"main.py: stopped by {name}, saved after ")
    command = end.split("to go on: python ")[1]
    assert command == f"main.py --savedir '{folder}' --resume"
    again = [sys.executable, *shlex.split(command)]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert differences(folder, whole) == []


@pytest.mark.parametrize("which", ["one", "all"])
def test_a_worker_that_is_killed_is_told_in_one_line_and_nothing_lost(
    cityscapes, whole, tmp_path, which
):
    folder = tmp_path / "run"
    process = started(argv(cityscapes, folder, "--workers", 2))
    wait_for(process, "step 1/3")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for child in children.read_text().split()[-1 if which == "one" else 0 :]:
        os.kill(int(child), signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=300)
    assert time.monotonic() - killed < 100
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert line.startswith("main.py: error: a process that loads data died (")
    assert f"to go on: python main.py --savedir {folder} --resume" in line
    assert load_checkpoint(folder / "last.pth")["epoch"] <= 1
    subprocess.run(
        [sys.executable, "main.py", "--savedir", folder, "--resume"], cwd=ROOT, check=True
    )
    assert differences(folder, whole) == []
