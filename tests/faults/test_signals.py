"""SIGTERM and Ctrl-C: the run saves, and prints the command that resumes it to the same end."""

import os
import re
import time
from contextlib import suppress
from signal import SIGINT, SIGTERM

import pytest

from faults.processes import Process
from faults.trials import PROGRESS, Program, Programs, Trial, assert_whole

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
    # The step that is finished, and one that may have ended since the output was read.
    assert len(PROGRESS.findall(result.out)) <= steps + 2, result.out
    if steps == 0 or result.status == 0 or "next:" in result.out:  # in start-up or at the end
        trial.finish(run)
        return
    assert result.status == 128 + number or trial.case == "torchrun", result
    command = COMMAND.findall(result.err)
    assert command, result.err
    trial.finish(run, ["sh", "-c", command[-1]])


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
        time.sleep(trial.random.uniform(0, 0.2))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, SIGINT)

    trial.disturb(run, strike)
    assert_whole(trial.folder)
    trial.finish(run)
