"""Short training runs that a test disturbs, and what must hold afterwards."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest
from compare import differences, read
from conftest import Result

from faults.processes import Command, Process, Processes, wait_until

LAST, PREVIOUS = "last.pth", "previous.pth"
# What a run prints after each step: its place, and the scores of its epoch so far.
PROGRESS = re.compile(r"((?:stage \d )?epoch \d+/\d+: step \d+/\d+), (train loss .*), .* images/s")

# 14 scenes or 30 shapes, in batches of 4: the last step of an epoch is smaller. A checkpoint every
# tenth of a second: much of a run is then the writing of checkpoints.
SCENES, SHAPES = {"train": 14, "val": 3}, {"train": 5, "val": 1}
OPTIONS = "--batch-size 4 --workers 2 --checkpoint-minutes 0.002 --steps-loss 1"
MAIN = f"main.py --height 64 --augment strong --ema --encoder-epochs 2 --epochs 3 {OPTIONS}"
EPOCHS_BEFORE = {0: 0, 1: 0, 2: 2}  # each stage
PROGRAMS = {
    "main": MAIN,
    "torchrun": f"-m torch.distributed.run --standalone --nproc-per-node 2 {MAIN}",
    "imagenet": f"lednet_imagenet.py --recipe modern --size 32 --epochs 4 {OPTIONS}",
}


@dataclass
class Program:
    """A training program."""

    begin: Command  # that starts a run
    reference: Path  # folder of an undisturbed run
    seconds: float = 0.0  # that it took
    steps: list[tuple[str, str]] = field(default_factory=list)  # place and scores of each

    def run_undisturbed(self) -> None:
        began = time.monotonic()
        result = Processes(self.reference.parent).run(self.command(self.reference))
        assert result.status == 0, result.err
        self.seconds = time.monotonic() - began
        self.steps = PROGRESS.findall(result.out)
        # The checkpoint before the last one is at most an epoch older.
        assert steps_done(self.reference, [PREVIOUS]) >= 0.75 * len(self.steps) > 0

    def command(self, folder: Path, *more: str | Path) -> Command:
        """Return the command that starts a run in a folder, or resumes the one there."""
        if (folder / "args.json").exists():
            script = next(n for n, part in enumerate(self.begin) if str(part).endswith(".py"))
            return [*self.begin[: script + 1], "--resume", *more, "--savedir", folder]
        return [*self.begin, *more, "--savedir", folder]


Programs = Callable[[str], Program]
Call = Callable[[Process], object]


class Trial(Processes):
    """One trial of a case of a fault, and the folder of its run, which need not exist yet."""

    def __init__(self, case: str, number: int, random: Random, output: Path) -> None:
        super().__init__(output)
        self.case, self.number, self.random, self.folder = case, number, random, output / "run"

    def disturb(
        self, program: Program, strike: Call, *more: str, when: Call = lambda _: True
    ) -> Result:
        """Start or resume a run, and disturb it at a random moment; return how it ended.

        In every other trial this is after the first step, which start-up would often precede. Then,
        `when` must hold too. A new run that ended before is started again, and disturbed earlier.
        """
        after_step = self.number % 2 == 0
        moment = self.random.uniform(0, program.seconds / (2 if after_step else 1))
        for _ in range(8):
            resumed, done = (self.folder / "args.json").exists(), steps_done(self.folder)
            process = self.start(program.command(self.folder, *more))
            if after_step:
                wait_until(lambda p=process: p.ended() or PROGRESS.search(p.out()))
            wait_until(process.ended, moment)
            wait_until(lambda p=process: p.ended() or when(p))
            running = not process.ended()
            if running:
                strike(process)
            where = PROGRESS.findall(process.out())[-1:] or "start-up"
            result = process.finish()
            steps = [place for place, _ in PROGRESS.findall(result.out)]
            assert steps == [place for place, _ in program.steps[done : done + len(steps)]]
            if running or resumed:
                print(f"struck after {moment:.2f} s, {where}: {result.status} {result.err}")
                return result
            assert result.status == 0, result.err
            for path in self.folder.iterdir():
                path.unlink()
            moment *= 0.7
        pytest.fail("the run ended before each moment")

    def interrupt(self, program: Program) -> None:
        """Kill a new run once it has both of its checkpoints."""
        both = [self.folder / LAST, self.folder / PREVIOUS]
        self.disturb(program, lambda _: self.kill(), when=lambda _: all(map(Path.exists, both)))

    def finish(self, program: Program, command: Sequence[str] = (), left: str = "") -> Result:
        """Resume the run; its steps and its end must be those of an undisturbed one.

        Only the file `left` may be left behind.
        """
        done = steps_done(self.folder)
        result = self.run([*command] or program.command(self.folder))
        assert result.status == 0, result.err
        assert PROGRESS.findall(result.out) == program.steps[done:]
        assert {*differences(self.folder, program.reference)} <= {f"{left} was left behind"}
        return result


def steps_done(folder: Path, checkpoints: Sequence[str] = (LAST, PREVIOUS)) -> int:
    """Return the steps of a run up to the first of these checkpoints that is good."""
    for state in (read(folder / name) for name in checkpoints):
        if isinstance(state, dict):
            return (state["epoch"] + EPOCHS_BEFORE[state["stage"]]) * state["steps"] + state["step"]
    return 0


def assert_whole(folder: Path) -> None:
    """Check that all files of a run are whole, but for those that are still being written."""
    for path in folder.glob("[!.]*"):
        if path.suffix in (".pth", ".json", ".csv"):
            assert not isinstance(read(path), str), f"{path.name} is {read(path)}"
        if path.suffix == ".csv":
            assert path.read_text()[-1:] in ("", "\n"), "the last row is cut short"


def assert_refused(result: Result, *words: str) -> None:
    """Check that a program ended with status 2 and one line that has one of the words."""
    assert result.status == 2, result
    (line,) = result.err.splitlines()
    assert "error: " in line and any(word in line for word in words), line


def final_files(folder: Path) -> dict[str, str]:
    """Return the hashes of all files in a folder, without unfinished ones and locks."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "/." not in f"/{path.relative_to(folder)}" and path.suffix != ".lock"
    }
