import pytest
import torch

from utils import progress
from utils.progress import Progress, Waiting, describe


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that time.perf_counter shows."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_counts_are_shown_only_if_something_went_wrong():
    row = {"epoch": 3, "train_loss": 0.51234, "val_miou": 0.0, "skipped_steps": 0, "left_out": 0}
    assert describe(row) == "train loss 0.5123, val mIoU 0.00%"
    assert describe(row | {"skipped_steps": 2, "left_out": 1}) == (
        "train loss 0.5123, val mIoU 0.00%, 2 steps skipped by the scaler, 1 broken images left out"
    )


def test_a_log_gets_lines_with_loss_speed_and_time_left(clock, capsys):
    """Of an epoch of six steps that was resumed after the second."""
    scores = lambda: {"train_loss": 1.0, "data_wait": 0.25}  # noqa: E731
    shown = Progress("epoch 1/9", 6, 2, 2, scores)
    for _ in range(4):
        clock[0] += 0.5
        shown.step(4)
    assert shown.images_per_second == 8
    line = "epoch 1/9: step {}/6, train loss 1.0000, 8.0 images/s, waiting for data 25%, {} s left"
    assert capsys.readouterr().out.splitlines() == [line.format(4, 1), line.format(6, 0)]


def test_lines_can_be_turned_off(capsys):
    shown = Progress("epoch 1/9", 6, 0, 0, dict)
    for _ in range(6):
        shown.step(4)
    assert capsys.readouterr().out == ""


def test_waiting_is_the_time_until_each_batch(clock):
    class Loader:
        """Takes 2 seconds to start, and 1 for each batch."""

        def __iter__(self):
            clock[0] += 2
            return self.batches()

        def batches(self):
            for number in range(3):
                clock[0] += 1
                yield number

    waiting, taken = Waiting(torch.device("cpu")), []
    for number in waiting.measured(Loader()):
        taken.append(number)
        clock[0] += 10
    assert taken == [0, 1, 2]
    assert waiting.seconds() == 5 and waiting.seconds() == 5


def test_a_gpus_own_clock_measures_the_waiting(monkeypatch):
    """A program runs ahead of its GPU, which works from 0 to 5 and from 7 to 9 seconds."""
    times = iter([0.0, 0.0, 5.0, 7.0, 9.0])  # before and after each of two batches, and at the end

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = next(times)

        def elapsed_time(self, later: "Event") -> float:
            return 1000 * (later.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waiting = Waiting(torch.device("cuda"))
    assert list(waiting.measured("ab")) == ["a", "b"]
    assert waiting.seconds() == 2 and waiting.seconds() == 2
