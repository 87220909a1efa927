"""A full disk, a read-only folder, and two runs on one folder."""

import os
import time
from contextlib import ExitStack, suppress

import pytest
from compare import differences

from faults.processes import Process, mounted
from faults.trials import LAST, Programs, Trial, assert_refused, assert_whole, final_files


@pytest.mark.trials(main=10)
def test_full_disk(trial: Trial, program: Programs):
    """Another program fills the disk but for a random rest; then there is room again."""
    run = program(trial.case)
    sizes = {path.name: path.stat().st_size for path in run.reference.iterdir()}
    # The files of a run, the checkpoint before the last, and one that is being written.
    room = sum(sizes.values()) + sizes[LAST] + (8 << 20)
    rest = trial.random.choice([0, 0, trial.random.randrange(int(1.2 * sizes[LAST]))])
    trial.folder.mkdir()
    other = trial.folder / "other.bin"

    def fill(_: Process) -> None:
        with suppress(OSError), other.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        os.truncate(other, max(0, other.stat().st_size - rest))

    with mounted(trial.folder, "-t", "tmpfs", "-o", f"size={room}", "tmpfs"):
        result = trial.disturb(run, fill)
        assert_whole(trial.folder)
        if result.status != 0:  # the rest was too small
            assert_refused(result, str(trial.folder))
        assert not list(trial.folder.glob(".*.unfinished*"))
        other.unlink()
        trial.finish(run)


@pytest.mark.trials(at_the_start=2, on_resuming=2, during_the_run=2)
def test_read_only_folder(trial: Trial, program: Programs):
    """Read-only even for root, and then no more."""
    run = program("main")
    if trial.case == "on_resuming":
        trial.interrupt(run)
    trial.folder.mkdir(exist_ok=True)
    before = final_files(trial.folder)
    aside = trial.output / "aside"
    aside.mkdir()
    # What is mounted is read-only at once. Changing the mount would fail while a run writes.
    read_only = mounted(trial.folder, "--bind", str(aside))
    with mounted(aside, "--bind", "-o", "ro", str(trial.folder)), ExitStack() as stack:
        if trial.case == "during_the_run":
            result = trial.disturb(run, lambda _: stack.enter_context(read_only))
            assert_whole(trial.folder)
        else:
            stack.enter_context(read_only)
            result = trial.run(run.command(trial.folder))
            assert final_files(trial.folder) == before
    if result.status != 0 or trial.case != "during_the_run":  # then it had nothing left to write
        assert_refused(result, str(trial.folder))
    trial.finish(run)


@pytest.mark.trials(new=3, resumed=3)
def test_two_runs_on_one_folder(trial: Trial, program: Programs):
    """One goes on, and the other is refused, unless the first one had ended."""
    run, random = program("main"), trial.random
    if trial.case == "resumed":
        trial.interrupt(run)
    command = run.command(trial.folder)
    first = trial.start(command)
    time.sleep(random.choice([0, 0, random.uniform(0, 0.05), random.uniform(0, 1)]))
    second = trial.start(command)
    one, other = sorted([first.finish(), second.finish()], key=lambda result: result.status)
    assert one.status == 0, one
    if other.status != 0:
        assert_refused(other, str(trial.folder))
    assert "images/s" not in one.out or "images/s" not in other.out, "both have trained"
    assert differences(trial.folder, run.reference) == []
