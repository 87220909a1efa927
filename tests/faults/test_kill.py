"""kill -9 of a run, of its workers, or of a process of torchrun: the resumed run ends the same."""

import os
import time
from contextlib import suppress
from signal import SIGKILL

import pytest
from compare import read

from faults.processes import Process, children
from faults.trials import LAST, PROGRESS, Programs, Trial, assert_refused, assert_whole


@pytest.mark.trials(main=20, imagenet=8)
def test_kill(trial: Trial, program: Programs):
    """Of the process alone or of all, up to three times, a third of them at any moment.

    The others strike while a checkpoint is written, or when an epoch is logged and not yet saved.
    """
    run, log = program(trial.case), trial.folder / "log.csv"

    def newest(pattern: str) -> float:
        """Return when the newest of some files was written."""
        times = [0.0]
        for path in trial.folder.glob(pattern):
            with suppress(FileNotFoundError):  # it was renamed
                times.append(path.stat().st_mtime)
        return max(times)

    moments = [
        lambda _: time.time() - newest(f"*{LAST}*") < 0.01,
        lambda _: newest(log.name) > newest(LAST),
        lambda _: True,
    ]

    def kill(process: Process) -> None:
        time.sleep(trial.random.uniform(0, 0.03))
        trial.random.choice([process.kill, trial.kill])()

    for kills in range(trial.random.choice([1, 1, 1, 2, 3])):
        trial.disturb(run, kill, when=moments[(trial.number + kills) % 3])
        assert_whole(trial.folder)
        rows = read(log)[:-1] if log.exists() else []
    trial.finish(run)
    # Only the last row may be newer than its checkpoint. The others keep even their times: no epoch
    # was trained twice.
    assert read(log)[: len(rows)] == rows


@pytest.mark.trials(first=3, second=3)
def test_kill_of_one_process_of_torchrun(trial: Trial, program: Programs):
    """The other one ends too."""
    run = program("torchrun")

    def kill(process: Process) -> None:
        os.kill(children(process.pid)[trial.case == "second"], SIGKILL)

    result = trial.disturb(run, kill, when=lambda process: len(children(process.pid)) == 2)
    assert result.status != 0
    trial.assert_ended()
    assert_whole(trial.folder)
    trial.finish(run)


@pytest.mark.trials(main=8, imagenet=4)
def test_kill_of_a_worker(trial: Trial, program: Programs):
    """As by a machine that is out of memory. A worker with nothing left to do is not missed."""
    run = program(trial.case)

    def kill(process: Process) -> None:
        with suppress(ProcessLookupError, IndexError):  # it ends
            os.kill(trial.random.choice(children(process.pid)), SIGKILL)

    result = trial.disturb(run, kill, when=lambda process: children(process.pid))
    if result.status != 0:
        assert_refused(result, "died", "worker")
        assert (trial.folder / LAST).exists() or not PROGRESS.search(result.out)
    assert_whole(trial.folder)
    trial.finish(run)
