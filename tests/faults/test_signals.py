"""SIGTERM and Ctrl-C: the run saves, and prints the command that resumes it to the same end."""

import os
import re
import time
from contextlib import suppress
from signal import SIGINT, SIGTERM

import pytest
from conftest import Result

from faults.processes import Process, wait_until
from faults.trials import PROGRESS, Program, Programs, Trial, assert_whole, final_files, steps_done

COMMAND = re.compile(r"(?:python|torchrun) \S.* --resume")


def stop(trial: Trial, run: Program, number: int, to_all: bool) -> None:
    """Signal a run, and go on with the command that it prints, as it is printed."""
    steps = 0

    def strike(process: Process) -> None:
        nonlocal steps
        steps = len(PROGRESS.findall(process.out()))
        (os.killpg if to_all else os.kill)(process.pid, number)

    result = trial.disturb(run, strike)
    assert_whole(trial.folder)
    assert_stopped(trial, run, result, number)
    done = len(PROGRESS.findall(result.out))
    # The step that is finished, and one that may have ended since the output was read.
    assert done <= steps + 2, result.out
    command = COMMAND.findall(result.err)
    if command:
        assert steps_done(trial.folder) == done, "not all steps were saved"
    elif done < len(run.steps):  # in start-up
        assert final_files(trial.folder) == {}
    trial.finish(run, ["sh", "-c", command[-1]] if command else ())


def assert_stopped(trial: Trial, run: Program, result: Result, number: int) -> None:
    """Check the status of a run that was signalled."""
    done, status = len(PROGRESS.findall(result.out)), {128 + number}
    if trial.case == "torchrun":  # which has a status of its own
        status.add(1)
    if done in (0, len(run.steps)):  # Python itself starts or ends
        status.add(-number)
    if done == len(run.steps):  # too late
        status.add(0)
    assert result.status in status, result


@pytest.mark.trials(main=8, imagenet=4, torchrun=3)
def test_sigterm(trial: Trial, program: Programs):
    """To the process alone or, as by Slurm and systemd, to all of them."""
    to_all = trial.case != "torchrun" and trial.random.random() < 0.5
    stop(trial, program(trial.case), SIGTERM, to_all)


@pytest.mark.trials(main=8)
def test_ctrl_c(trial: Trial, program: Programs):
    """A terminal sends it to all processes."""
    stop(trial, program(trial.case), SIGINT, True)


@pytest.mark.trials(main=4)
def test_ctrl_c_twice(trial: Trial, program: Programs):
    run = program(trial.case)

    def strike(process: Process) -> None:
        os.killpg(process.pid, SIGINT)
        # Python takes two signals within one long operation for one.
        wait_until(lambda: process.ended() or "again to stop" in process.err(), 1)
        time.sleep(trial.random.uniform(0, 0.1))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, SIGINT)

    result = trial.disturb(run, strike)
    assert_whole(trial.folder)
    assert_stopped(trial, run, result, SIGINT)
    trial.finish(run)
