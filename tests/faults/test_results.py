"""kill -9 of programs that write results: each file is whole or not there."""

import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from compare import differences

from faults.processes import Command, Process, Processes, wait_until
from faults.trials import Program, Programs, Trial, final_files


def command(name: str, folder: Path, data: Path, main: Program) -> Command:
    """Return the command of a program that writes results into a folder."""
    if name == "cache":
        return main.command(folder.with_name("training"), "--cache", folder)
    scenes = ("--datadir", data / "scenes", "--subset", "train")
    options = {
        "export": ("export.py", "--output", folder / "network.onnx"),
        "predict": ("predict.py", "--input", data / "pictures", "--output", folder),
        "evaluation": ("eval_cityscapes_server.py", *scenes, "--save-results", folder),
    }
    folder.mkdir()
    return [sys.executable, *options[name], "--checkpoint", main.reference / "best.pth"]


def wait_for_file(folder: Path, process: Process) -> None:
    """Wait until there is a file of any name in a folder, or the process has ended."""
    wait_until(lambda: process.ended() or any(path.is_file() for path in folder.rglob("*")))


@pytest.fixture(scope="module")
def written(
    data: Path, program: Programs, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, str], float]]:
    """Return what an undisturbed program writes, and the seconds from its first file to its end."""

    @cache
    def undisturbed(name: str) -> tuple[dict[str, str], float]:
        output = tmp_path_factory.mktemp(name)
        process = Processes(output).start(command(name, output / "run", data, program("main")))
        wait_for_file(output / "run", process)
        began = time.monotonic()
        result = process.finish()
        assert result.status == 0, result.err
        return final_files(output / "run"), time.monotonic() - began

    return undisturbed


@pytest.mark.trials(cache=8, export=4, predict=8, evaluation=8)
def test_kill_of_a_writer(trial: Trial, program: Programs, data: Path, written: Callable):
    main = program("main")
    expected, seconds = written(trial.case)
    if trial.case == "cache":
        seconds = min(seconds, 1.0)  # the rest is training
    process = trial.start(command(trial.case, trial.folder, data, main))
    wait_for_file(trial.folder, process)
    wait_until(process.ended, trial.random.uniform(0, seconds))
    trial.kill()
    assert final_files(trial.folder).items() <= expected.items()
    if trial.case == "cache":  # the next run completes it
        training = trial.output / "training"
        result = trial.run(main.command(training, "--cache", trial.folder))
        assert result.status == 0, result.err
        assert differences(training, main.reference) == []
        assert final_files(trial.folder) == expected
