"""Scripts as processes that can be killed, of which none is left behind. For Linux: /proc, mount.

Every process that a try starts inherits a mark in its environment, by which it and all of its
children are found again, whoever their parent has become.
"""

import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = "LEDNET_FAULTS"
ALL = uuid.uuid4().hex  # the mark of everything that this process starts

# Seconds after which a process counts as hanging, ten times what an undisturbed one takes.
LIMIT = 150
# Workers of a killed process notice that it is gone, which they look for every 5 seconds.
LEFT_RUNNING = 30

stopping = threading.Event()


class Lost(Exception):
    """A promise was broken; the message says which."""


class Stopped(Exception):
    """The tool itself was interrupted."""


@dataclass
class Ended:
    """A process that has ended; below 0, its status is that of the signal that ended it."""

    status: int
    out: str
    err: str

    def says(self) -> str:
        """Its status and its last word, for the report of a fault."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return f"status {self.status}: {lines[-1] if lines else 'not a word'}"


class Started:
    """A process of a try, whose output goes into files."""

    def __init__(self, command: list[str], env: dict[str, str], output: Path) -> None:
        self.command, self.files = command, (output.with_suffix(".out"), output.with_suffix(".err"))
        with self.files[0].open("wb") as out, self.files[1].open("wb") as err:
            # In a session of its own, so that Ctrl-C in this terminal does not reach it.
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True,
            )  # fmt: skip
        self.pid = self.process.pid
        self.started = time.monotonic()

    def out(self) -> str:
        return self.files[0].read_text(errors="replace")

    def err(self) -> str:
        return self.files[1].read_text(errors="replace")

    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self, limit: float = LIMIT) -> Ended:
        """
        Raises:
            Lost: it hangs.
        """
        until = time.monotonic() + limit
        while self.running():
            if stopping.is_set():
                raise Stopped
            if time.monotonic() > until:
                said = Ended(0, self.out(), self.err()).says().partition(": ")[2]
                raise Lost(f"hung for {limit:.0f} s, the last it said: {said}")
            time.sleep(0.02)
        return Ended(self.process.returncode, self.out(), self.err())


@dataclass
class Try:
    """One try of a fault: its random numbers, its folder, and what it has to tell."""

    row: str
    number: int
    seed: int
    root: Path
    story: list[str] = field(default_factory=list)  # what was done, moment by moment
    struck: list[str] = field(default_factory=list)  # in which part of the run
    lost: list[str] = field(default_factory=list)
    tries: int = 1  # that this one counts for

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.seed} {self.row} {self.number}")
        self.mark = f"{ALL}-{self.row}-{self.number}"
        self.folder = self.root / f"{self.row}-{self.number}"
        self.folder.mkdir()
        self.run_folder = self.folder / "run"
        self.started: list[Started] = []

    def start(self, command: list[str], **environment: str) -> Started:
        if stopping.is_set():
            raise Stopped
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # on the CPU, where results are exact
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            MARK: self.mark,
        }
        output = self.folder / f"{len(self.started) + 1}"
        self.started.append(Started(command, env | environment, output))
        return self.started[-1]

    def run(self, command: list[str], **environment: str) -> Ended:
        return self.start(command, **environment).wait()

    def say(self, what: str) -> None:
        self.story.append(what)

    def sleep(self, seconds: float, until: Callable[[], bool]) -> bool:
        """Wait for so long, or less when something holds before; returns whether it did."""
        end = time.monotonic() + seconds
        while not until():
            left = end - time.monotonic()
            if left <= 0:
                return False
            if stopping.is_set():
                raise Stopped
            time.sleep(min(left, 0.002))
        return True

    def kill_all(self) -> None:
        """What the power does: every process of the try at once."""
        kill_marked(self.mark)

    def end(self) -> None:
        """
        Raises:
            Lost: something that was started has not ended by itself.
        """
        try:
            if not self.sleep(LEFT_RUNNING, lambda: not marked(self.mark)):
                raise Lost(f"{len(marked(self.mark))} processes were left running")
        finally:
            self.kill_all()


def marked(mark: str) -> list[int]:
    """The processes with a mark, those that have ended left out."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = (path / "environ").read_bytes().split(b"\0")
            # What has ended and is not yet waited for shows no environment.
            if any(variable == wanted for variable in variables):
                found.append(int(path.name))
    return found


def kill_marked(mark: str) -> None:
    """Kill until none is left: a process may have started another one meanwhile."""
    while pids := marked(mark):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def end_everything() -> None:
    """Kill whatever this tool has started and not yet ended, and let nothing interrupt that."""
    stopping.set()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    prefix = f"{MARK}={ALL}".encode()
    for _ in range(100):
        pids = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if any(v.startswith(prefix) for v in (path / "environ").read_bytes().split(b"\0")):
                    pids.append(int(path.name))
        if not pids:
            return
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """The processes that a process has forked and that run the same program: workers."""
    with suppress(OSError):
        own = Path(f"/proc/{pid}/cmdline").read_bytes()
        listed = Path(f"/proc/{pid}/task").glob("*/children")
        pids = [int(child) for path in listed for child in path.read_text().split()]
        return [child for child in pids if command_line(child) == own]
    return []


def ranks(pid: int) -> list[int]:
    """The training processes that torchrun has started."""
    found = []
    with suppress(OSError):
        listed = Path(f"/proc/{pid}/task").glob("*/children")
        for child in {int(child) for path in listed for child in path.read_text().split()}:
            with suppress(OSError):
                if b"\0RANK=" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                    found.append(child)
    return sorted(found)


def command_line(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "not a word"


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system on a folder, until the end of the block: options of `mount`."""
    subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder in which nothing can be made, renamed or opened for writing, not even by root."""
    # Made elsewhere and moved there at once: a file that a run opened in between would forbid it.
    aside = folder.with_name(f"{folder.name}-read-only")
    aside.mkdir()
    with mounted(aside, "--bind", str(folder)):
        remount = ["mount", "-o", "remount,bind,ro", str(aside)]
        subprocess.run(remount, check=True, capture_output=True)
        with mounted(folder, "--move", str(aside)):
            yield


def namespace() -> list[str] | None:
    """The command that gives a program mounts of its own, which vanish with it; None: not here."""
    for command in (["unshare", "-m"], ["unshare", "-rm"]):
        with suppress(OSError):
            tried = [*command, "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
            if subprocess.run(tried, capture_output=True).returncode == 0:
                return command
    return None


def shown(command: list[str]) -> str:
    """A command as a user would type it."""
    python = ["python" if part == sys.executable else part for part in command]
    return shlex.join(python)
