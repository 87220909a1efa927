"""Programs as processes that can be killed with all their children, and mounts. Linux only."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGKILL

import pytest
from conftest import ROOT, Result

MARK = "LEDNET_FAULT"  # environment variable that children inherit
Command = list[str | Path]
LIMIT = 300.0  # seconds after which a program counts as hanging


class Process(subprocess.Popen):
    """A running program, whose output goes into files."""

    def __init__(self, command: Command, output: Path, mark: str) -> None:
        self.files = [output.with_suffix(suffix) for suffix in (".out", ".err")]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with self.files[0].open("wb") as out, self.files[1].open("wb") as err:
            # A session of its own, so that it has a process group to signal.
            super().__init__(
                command, cwd=ROOT, env=os.environ | {"PATH": path, MARK: mark},
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    def ended(self) -> bool:
        return self.poll() is not None

    def out(self) -> str:
        return self.files[0].read_text(errors="replace")

    def err(self) -> str:
        return self.files[1].read_text(errors="replace")

    def finish(self) -> Result:
        """Wait for the end; a status below 0 is that of a signal."""
        try:
            return Result(self.wait(LIMIT), self.out(), self.err())
        finally:
            self.kill()


class Processes:
    """Processes that are found again with all their descendants, whoever their parent is by now.

    Args:
        output: folder for what they print.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.mark, self.started = output, uuid.uuid4().hex, 0

    def start(self, command: Command) -> Process:
        self.started += 1
        return Process(command, self.output / str(self.started), self.mark)

    def run(self, command: Command) -> Result:
        return self.start(command).finish()

    def running(self) -> list[int]:
        mark, found = f"{MARK}={self.mark}".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
        return found

    def kill(self) -> None:
        """Kill all of them, as a power cut would, also those that start meanwhile."""
        while pids := self.running():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, SIGKILL)
            time.sleep(0.01)

    def assert_ended(self) -> None:
        """Check that nothing was left running."""
        wait_until(lambda: not self.running(), 30)  # workers notice that their parent is gone
        left = self.running()
        self.kill()
        assert not left, f"{len(left)} processes were left running"


def wait_until(done: Callable[[], object], seconds: float = LIMIT) -> bool:
    """Wait until something holds; return whether it came to hold in time."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def children(pid: int) -> list[int]:
    """Return the children that run a script: workers of a program, or what torchrun started."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    with suppress(OSError):
        found = sorted(int(number) for path in lists for number in path.read_text().split())
        return [n for n in found if b".py\0" in Path(f"/proc/{n}/cmdline").read_bytes()]
    return []


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """Mount something on a folder, with options of `mount`; skip the test if not allowed."""
    mount = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting is not allowed, try unshare -rm: {mount.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
