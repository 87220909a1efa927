"""The faults: what is done to a run in each, and what must be true afterwards.

Each is a function of a try and of the lab that all tries share; it returns where nothing was lost,
and raises `Lost` otherwise.
"""

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals

from fault_compare import broken_files, differences, hashes, read_checkpoint, read_rows
from fault_runs import (
    LIMIT,
    Ended,
    Lost,
    Started,
    Try,
    children,
    last_line,
    mounted,
    ranks,
    read_only,
)
from PIL import Image

# 14 images in batches of 4: four steps an epoch, of which the last one is smaller.
SCENES = {"train": 14, "val": 3}
SHAPES = {"train": 5, "val": 1}
PICTURES = 12
FILES = 25  # fuzzed ones, for a process
# Every tenth of a second or so: much of a run is then the writing of checkpoints.
OFTEN = ("--checkpoint-minutes", "0.002", "--steps-loss", "1")
MAIN = (
    "--height", "64", "--augment", "strong", "--ema", "--encoder-epochs", "2", "--epochs", "3",
    "--batch-size", "4", "--workers", "2", *OFTEN,
)  # fmt: skip
IMAGENET = (
    "--recipe", "modern", "--size", "32", "--epochs", "4", "--batch-size", "4", "--workers", "2",
    *OFTEN,
)  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

LAST, PREVIOUS = "last.pth", "previous.pth"
PROGRESS = re.compile(r"(?:stage (\d) )?epoch (\d+)/(\d+): step (\d+)/(\d+)")
RESUME = re.compile(r"((?:python|torchrun)\b.*--resume.*)$", re.MULTILINE)


@dataclass
class Program:
    """A script with what it is told to do, and how it ends where nothing disturbs it."""

    script: str
    options: list[str]
    before: tuple[str, ...] = ()  # between Python and the script
    reference: Path = Path()
    seconds: float = 0.0

    def begin(self, folder: Path, *more: str) -> list[str]:
        return [*self._start(), *self.options, *more, "--savedir", str(folder)]

    def resume(self, folder: Path, *more: str) -> list[str]:
        return [*self._start(), "--savedir", str(folder), "--resume", *more]

    def _start(self) -> list[str]:
        return [sys.executable, *self.before, self.script]


@dataclass
class Lab:
    """What all tries share: the drawn data, and the undisturbed ends."""

    folder: Path
    programs: dict[str, Program]
    results: dict[str, tuple[dict[str, str], float]] = field(default_factory=dict)
    one_at_a_time: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Row:
    """A fault and how it is tried."""

    name: str
    tries: int
    attempt: Callable[[Try, Lab], None]
    programs: tuple[str, ...] = ("main",)
    mounts: bool = False
    results: str = ""


# What the tries are made of.


def disturb(
    t: Try,
    program: Program,
    command: list[str],
    strike: Callable[[Started], str | None],
    **env: str,
) -> Ended:
    """Start a run, and strike at a moment that chance picks; again where it had ended before.

    Args:
        strike: does the damage; returns what it did, None where it was too late for that.
    """
    moment = t.random.uniform(0, program.seconds)
    for _ in range(8):
        before = save_state(t.run_folder)
        started = t.start(command, **env)
        early = t.sleep(moment, lambda s=started: not s.running())
        done = None if early else strike(started)
        if done is not None:
            after = time.monotonic() - started.started
            t.struck.append(part_of_run(t.run_folder, started.out()))
            t.say(f"{done} after {after:.2f} s ({t.struck[-1]})")
            return started.wait()
        end = started.wait()
        if end.status != 0:
            raise Lost(f"failed before the fault: {end.says()}")
        restore_state(t.run_folder, before)
        moment *= 0.7
    raise Lost("ended before every moment that was tried")


def save_state(folder: Path) -> Path | None:
    """A copy of a run's folder, to begin anew from; None where there is none yet."""
    if not folder.exists():
        return None
    copy = folder.with_name(f"{folder.name}-before")
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(folder, copy))


def restore_state(folder: Path, copy: Path | None) -> None:
    # The folder itself stays: something may be mounted on it.
    for path in folder.iterdir():
        path.unlink()
    if copy is None:
        with suppress(OSError):
            folder.rmdir()
        return
    for path in copy.iterdir():
        shutil.copy2(path, folder)


def part_of_run(folder: Path, out: str) -> str:
    """What a run was about when it was struck, by its files and its last words."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if any(is_unfinished(name) for name in names):
        return "while a file was written"
    last = last_line(out)
    place = PROGRESS.match(last)
    if place is None:
        done = re.match(r"(?:(stage \d) )?epoch (\d+)/(\d+): train loss", last)
        if done is None:
            return "start-up" if "class IoU" not in out and "best on val" not in out else "the end"
        return f"end of {done[1] or 'training'}" if done[2] == done[3] else "between epochs"
    if place[4] == place[5]:
        return "validation"
    return f"stage {place[1]}" if place[1] else "training"


def is_unfinished(name: str) -> bool:
    return name.startswith(".") and not name.endswith("lock")


def wait_for_write(t: Try, started: Started) -> bool:
    """Wait until a checkpoint is being written, and then some milliseconds more."""

    def last() -> tuple[int, int]:
        with suppress(OSError):
            found = (t.run_folder / LAST).stat()
            return found.st_size, found.st_mtime_ns
        return 0, 0

    def writing() -> bool:
        with suppress(OSError):
            if any(name.startswith(f".{LAST}") for name in os.listdir(t.run_folder)):
                return True
        return last() != before  # not beside, but at once

    before = last()
    t.sleep(60, lambda: writing() or not started.running())
    time.sleep(t.random.uniform(0, 0.03))
    return started.running()


def has_begun(folder: Path) -> bool:
    """Whether there is a run to resume: before, it is started again as it was first."""
    return (folder / "args.json").exists()


def go_on(t: Try, program: Program, *more: str, **env: str) -> Ended:
    """Go on with a run to its end, from the step that its last checkpoint is of.

    Raises:
        Lost: it does not, or begins elsewhere.
    """
    if not has_begun(t.run_folder):
        t.say("started anew")
        end = t.run(program.begin(t.run_folder, *more), **env)
        if end.status != 0:
            raise Lost(f"cannot be started anew: {end.says()}")
        return end
    place = saved_place(t.run_folder / LAST)
    end = t.run(program.resume(t.run_folder, *more), **env)
    if end.status != 0:
        raise Lost(f"cannot be resumed: {end.says()}")
    t.say("resumed")
    check_place(place, end.out)
    return end


def saved_place(path: Path) -> tuple[int, int, int] | None:
    """The stage of a checkpoint, the epochs that are done, and the steps of the next one."""
    try:
        checkpoint = read_checkpoint(path)
        return checkpoint["stage"], checkpoint["epoch"], checkpoint["step"]
    except (OSError, ValueError, RuntimeError, KeyError):
        return None


def check_place(place: tuple[int, int, int] | None, out: str) -> None:
    """See that the first step of a resumed run is the one after that of its checkpoint.

    Raises:
        Lost: steps were repeated or left out.
    """
    first = PROGRESS.search(out)
    if place is None or first is None:
        return
    stage, epoch, step = place
    begun = (int(first[1] or 0), int(first[2]), int(first[4]))
    steps, epochs = int(first[5]), int(first[3])
    # A checkpoint of the last step of an epoch goes on with the validation, then the next epoch.
    follows = {(stage, epoch + 1, step + 1), (stage, epoch + 2, 1)}
    if step < steps:
        follows = {(stage, epoch + 1, step + 1)}
    if begun[0] != stage:  # whose number of epochs is not known here
        follows = {(stage + 1, 1, 1)}
    if begun not in follows:
        raise Lost(
            f"resumed at step {begun[2]} of epoch {begun[1]}/{epochs} of stage {begun[0]}, with a "
            f"checkpoint of step {step} after epoch {epoch} of stage {stage}"
        )


def same_end(t: Try, program: Program, allowed: tuple[str, ...] = ()) -> None:
    """
    Raises:
        Lost: the run ended otherwise than the undisturbed one.
    """
    for name in allowed:
        (t.run_folder / name).unlink(missing_ok=True)
    found = differences(t.run_folder, program.reference)
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise Lost("another end: " + "; ".join(found[:3]) + more)


def whole(folder: Path) -> None:
    """
    Raises:
        Lost: a file lies under its final name and is not whole.
    """
    found = broken_files(folder)
    if found:
        raise Lost("; ".join(found))


def refused(end: Ended, *words: str) -> None:
    """See that a run ended with status 2 and one line that holds one of the words.

    Raises:
        Lost: it did not.
    """
    lines = [line for line in end.err.strip().splitlines() if line.strip()]
    if end.status != 2:
        raise Lost(f"no status 2, but {end.says()}")
    if len(lines) != 1:
        raise Lost(f"not one line on stderr but {len(lines)}, the last: {last_line(end.err)}")
    if words and not any(word in lines[0] for word in words):
        raise Lost(f"the line says nothing of it: {lines[0]}")


def interrupted_run(t: Try, program: Program) -> None:
    """A run that was killed at some moment after it had both of its checkpoints."""

    def kill(started: Started) -> str | None:
        both = [t.run_folder / LAST, t.run_folder / PREVIOUS]
        t.sleep(60, lambda: all(path.exists() for path in both) or not started.running())
        if not started.running():
            return None
        t.kill_all()
        return "interrupted"

    disturb(t, program, program.begin(t.run_folder), kill)


# The faults.


def kill(t: Try, lab: Lab, name: str = "main") -> None:
    """kill -9 of the process alone or of all, once or several times; then to the same end."""
    program = lab.programs[name]
    kills = t.random.choice([1, 1, 1, 2, 3])
    for number in range(kills):
        resumed = has_begun(t.run_folder)
        command = program.resume if resumed else program.begin
        victim = t.random.choice(["the process", "all processes"])
        # Every third kill is aimed at the writing of a checkpoint.
        aimed = (t.number + number) % 3 == 2

        def strike(started: Started, victim: str = victim, aimed: bool = aimed) -> str | None:
            if aimed and not wait_for_write(t, started):
                return None
            if victim == "all processes":
                t.kill_all()
            else:
                started.process.kill()
            return f"kill -9 of {victim}"

        disturb(t, program, command(t.run_folder), strike)
        whole(t.run_folder)
        before = read_rows(t.run_folder / "log.csv")
    go_on(t, program)
    # A row that was written just before its checkpoint is measured again; all others stay, with
    # what the clock said: no epoch was computed twice.
    after = read_rows(t.run_folder / "log.csv")
    if before[:-1] != after[: len(before[:-1])]:
        raise Lost("an epoch that was done and saved has been computed again")
    same_end(t, program)


def kill_rank(t: Try, lab: Lab) -> None:
    """kill -9 of one process of a run under torchrun; the others must end, and all can resume."""
    program = lab.programs["torchrun"]
    place = t.random.randrange(2)

    def strike(started: Started) -> str | None:
        t.sleep(60, lambda: len(ranks(started.pid)) == 2 or not started.running())
        found = ranks(started.pid)
        if len(found) < 2:
            return None
        os.kill(found[place], SIGKILL)
        return f"kill -9 of process {place} of 2"

    end = disturb(t, program, program.begin(t.run_folder), strike)
    if end.status == 0:
        raise Lost("ended with status 0 though one process was killed")
    whole(t.run_folder)
    t.end()
    go_on(t, program)
    same_end(t, program)


def stop(t: Try, lab: Lab, number: Signals, name: str = "main", again: bool = False) -> None:
    """SIGTERM or Ctrl-C; then the command that the run has printed, as it was printed."""
    program = lab.programs[name]
    status = 128 + number
    # Ctrl-C reaches all processes of a terminal; SIGTERM one, or, as from Slurm and systemd, all.
    to_all = number == SIGINT or (t.random.random() < 0.5 and name != "torchrun")
    steps = 0  # before the signal

    def strike(started: Started) -> str | None:
        nonlocal steps
        steps = len(PROGRESS.findall(started.out()))
        if not started.running():
            return None
        (os.killpg if to_all else os.kill)(started.pid, number)
        what = "Ctrl-C" if number == SIGINT else number.name
        if again:
            time.sleep(t.random.uniform(0, 0.2))
            with suppress(ProcessLookupError):
                os.killpg(started.pid, number)
            what += " twice"
        return what + (" to all processes" if to_all and number != SIGINT else "")

    end = disturb(t, program, program.begin(t.run_folder), strike)
    whole(t.run_folder)
    begun = steps > 0
    more = len(PROGRESS.findall(end.out)) - steps
    # The step that is finished; the one before may not have been told when the signal was sent. Of
    # two processes both tell.
    if more > (4 if name == "torchrun" else 2):
        raise Lost(f"went on for {more} steps after the signal")
    if end.status == 0:
        t.say("had come to its end")
    elif t.struck[-1] == "the end" and end.status in (status, -number):
        t.say("at its end")
    elif begun and end.status != status and name != "torchrun":  # which has a status of its own
        raise Lost(f"no status {status}, but {end.says()}")
    elif not begun and end.status not in (status, -number) and name != "torchrun":
        raise Lost(f"in start-up, no status {status}, but {end.says()}")
    commands = RESUME.findall(end.err)
    if end.status == 0 or again or not begun or t.struck[-1] == "the end":
        go_on(t, program)
    elif not commands:
        raise Lost(f"no command to resume was printed, but {last_line(end.err)}")
    else:
        place = saved_place(t.run_folder / LAST)
        # torchrun without --standalone takes a port that all share.
        with lab.one_at_a_time:
            end = t.run(["sh", "-c", commands[-1]])
        if end.status != 0:
            raise Lost(f"the printed command fails: {commands[-1]}: {end.says()}")
        t.say("went on by the printed command")
        check_place(place, end.out)
    same_end(t, program)


def damage(t: Try, path: Path, how: str) -> None:
    """Make a checkpoint one that cannot be trusted."""
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        length = t.random.randrange(1, len(content))
        path.write_bytes(content[:length])
        how = f"truncated to {length} of {len(content)} bytes"
    elif how == "empty":
        path.write_bytes(b"")
    else:
        bits = t.random.sample(range(8 * len(content)), 1000 if how == "scrambled" else 1)
        for bit in bits:
            content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        how = f"bit {bits[0]} flipped" if how == "flipped" else "1000 bits flipped"
    t.say(f"{path.name} {how}")


def damaged_last(t: Try, lab: Lab, how: str) -> None:
    """A damaged last.pth: the one before takes its place, which is said, to the same end."""
    program = lab.programs["main"]
    interrupted_run(t, program)
    damage(t, t.run_folder / LAST, how)
    # Bits between the records of the archive mean nothing: with one of them flipped, the file is
    # as good as before.
    try:
        read_checkpoint(t.run_folder / LAST)
        sound = True
        t.say("which reads the same")
    except (OSError, ValueError, RuntimeError):
        sound = False
    end = go_on(t, program)
    if not sound and PREVIOUS not in end.out:
        raise Lost(f"resumed without a word of {PREVIOUS}")
    if not sound:
        t.say(f"from {PREVIOUS}")
    same_end(t, program, allowed=(f"damaged-{LAST}",))


def both_damaged(t: Try, lab: Lab) -> None:
    """Both checkpoints damaged: one line says so, and nothing is overwritten."""
    program = lab.programs["main"]
    interrupted_run(t, program)
    for name in (LAST, PREVIOUS):
        damage(t, t.run_folder / name, t.random.choice(["truncated", "empty", "scrambled"]))
    before = {name: (t.run_folder / name).read_bytes() for name in (LAST, PREVIOUS)}
    refused(t.run(program.resume(t.run_folder)), LAST, PREVIOUS)
    for name, content in before.items():
        if (t.run_folder / name).read_bytes() != content:
            raise Lost(f"{name} was changed")


def full_disk(t: Try, lab: Lab) -> None:
    """A disk that another program fills; then room is made."""
    program = lab.programs["main"]
    sizes = {path.name: path.stat().st_size for path in program.reference.iterdir()}
    # Room for an undisturbed run: last.pth, the one before and the one that is being written.
    room = sum(sizes.values()) + 2 * sizes[LAST] + (8 << 20)
    spare = t.random.choice([0, 0, t.random.randrange(int(1.2 * sizes[LAST]))])
    t.run_folder.mkdir()
    filler = t.run_folder.parent / "run" / "others.bin"

    def fill(started: Started) -> str | None:
        if not started.running():
            return None
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        os.truncate(filler, max(0, filler.stat().st_size - spare))
        return f"the disk filled but for {spare / 1e6:.1f} MB"

    with mounted(t.run_folder, "-t", "tmpfs", "-o", f"size={room}", "tmpfs"):
        end = disturb(t, program, program.begin(t.run_folder), fill)
        whole(t.run_folder)
        if end.status == 0:
            t.say("there was room enough")
        else:
            refused(end, str(t.run_folder))
        left = [path.name for path in t.run_folder.iterdir() if is_unfinished(path.name)]
        if left:
            raise Lost(f"{left[0]} was left behind")
        filler.unlink()
        go_on(t, program)
        same_end(t, program)


def read_only_folder(t: Try, lab: Lab) -> None:
    """A folder that nothing can be written into: from the start, on resuming, or all at once."""
    program = lab.programs["main"]
    kind = ("from the start", "on resuming", "in the middle")[t.number % 3]
    if kind == "from the start":
        t.run_folder.mkdir()
        with read_only(t.run_folder):
            refused(t.run(program.begin(t.run_folder)), str(t.run_folder))
    elif kind == "on resuming":
        interrupted_run(t, program)
        before = hashes(t.run_folder)
        with read_only(t.run_folder):
            refused(t.run(program.resume(t.run_folder)), str(t.run_folder))
        if hashes(t.run_folder) != before:
            raise Lost("files were changed all the same")
    else:
        t.run_folder.mkdir()
        mount = None

        def close(started: Started) -> str | None:
            nonlocal mount
            if not started.running():
                return None
            mount = read_only(t.run_folder)
            mount.__enter__()
            return "read-only"

        try:
            end = disturb(t, program, program.begin(t.run_folder), close)
        finally:
            if mount is not None:
                mount.__exit__(None, None, None)
        if end.status != 0:
            refused(end, str(t.run_folder))
        whole(t.run_folder)
    t.say(f"read-only {kind}")
    go_on(t, program)
    same_end(t, program)


def dead_worker(t: Try, lab: Lab, name: str = "main") -> None:
    """kill -9 of a process that loads data, as a machine does that is out of memory."""
    program = lab.programs[name]
    choice = t.random.random()

    def strike(started: Started) -> str | None:
        t.sleep(60, lambda: bool(children(started.pid)) or not started.running())
        workers = sorted(children(started.pid))
        if not workers:
            return None
        with suppress(ProcessLookupError):
            os.kill(workers[int(choice * len(workers))], SIGKILL)
        return f"kill -9 of worker {int(choice * len(workers)) + 1} of {len(workers)}"

    end = disturb(t, program, program.begin(t.run_folder), strike)
    if end.status == 0:
        t.say("it was not needed any more")
    else:
        refused(end, "died", "worker")
        if PROGRESS.search(end.out) and not (t.run_folder / LAST).exists():
            raise Lost("no checkpoint was saved")
    whole(t.run_folder)
    go_on(t, program)
    same_end(t, program)


CLOCK = '''
"""A wall clock that jumps by years, back and forth; the clocks that cannot be set go on."""
import datetime, os, random, time

real, monotonic = time.time_ns, time.monotonic
began, year = monotonic(), 365 * 86400 * 10**9

def time_ns():
    part = int((monotonic() - began) / 0.3)
    return real() + random.Random(f"{os.environ['CLOCK_SEED']} {part}").randint(-50, 20) * year

def with_default(function, place):
    def replaced(*args):
        return function(*args) if len(args) > place else function(*args, default(function))
    return replaced

def default(function):
    return time.localtime() if function in (strftime, asctime) else time.time()

strftime, asctime = time.strftime, time.asctime
time.time_ns, time.time = time_ns, lambda: time_ns() / 1e9
for name, place in dict(localtime=0, gmtime=0, ctime=0, strftime=1, asctime=0).items():
    setattr(time, name, with_default(getattr(time, name), place))

class Jumping(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
    @classmethod
    def utcnow(cls):
        return cls.utcfromtimestamp(time.time())
    @classmethod
    def today(cls):
        return cls.now()

datetime.datetime = Jumping
'''


def jumping_clock(t: Try, lab: Lab) -> None:
    """A clock that jumps all the time, in the run and in the one that goes on with it."""
    program = lab.programs[("main", "imagenet")[t.number % 2]]
    (t.folder / "sitecustomize.py").write_text(CLOCK)
    how = t.random.choice([SIGKILL, SIGTERM])

    def clock() -> dict[str, str]:
        return {"PYTHONPATH": str(t.folder), "CLOCK_SEED": str(t.random.random())}

    def strike(started: Started) -> str | None:
        if not started.running():
            return None
        started.process.send_signal(how)
        return f"{program.script} under a jumping clock, {how.name}"

    disturb(t, program, program.begin(t.run_folder), strike, **clock())
    go_on(t, program, **clock())
    same_end(t, program)


def broken_image(t: Try, lab: Lab, skip: bool = False) -> None:
    """An image or label that is cut short while the run goes on, of train or val."""
    program = lab.programs["main"]
    data = Path(shutil.copytree(lab.folder / "scenes", t.folder / "scenes"))
    split = t.random.choice(["train", "val"])
    images = sorted(data.glob(f"leftImg8bit/{split}/*/*.png"))
    labels = sorted(data.glob(f"gtFine/{split}/*/*_labelIds.png"))
    victim = t.random.choice(images + labels)
    content = victim.read_bytes()
    share = t.random.uniform(0.1, 0.8)
    options = ["--datadir", str(data), *(["--skip-broken"] if skip else [])]

    def strike(started: Started) -> str | None:
        t.sleep(60, lambda: PROGRESS.search(started.out()) is not None or not started.running())
        if not started.running():
            return None
        victim.write_bytes(content[: int(share * len(content))])
        return f"{victim.name} cut to {100 * share:.0f} %"

    # Late in a run nothing reads it any more.
    early = Program(**vars(program) | {"seconds": 0.5 * program.seconds})
    end = disturb(t, early, program.begin(t.run_folder, *options), strike)
    if skip:
        if end.status != 0:
            raise Lost(f"did not go on: {end.says()}")
        if victim.name not in end.out + end.err:
            raise Lost("the file is not named")
        rows, wanted = (
            [(row["stage"], row["epoch"]) for row in read_rows(folder / "log.csv")]
            for folder in (t.run_folder, program.reference)
        )
        if rows != wanted:
            raise Lost(f"log.csv has rows of {rows}")
        whole(t.run_folder)
        return
    if end.status == 0:
        raise Lost("the run came to its end and did not notice")
    refused(end, victim.name)
    if not (t.run_folder / LAST).exists():
        raise Lost("no checkpoint was saved")
    victim.write_bytes(content)
    t.say("file mended")
    go_on(t, program)
    same_end(t, program)


def two_runs(t: Try, lab: Lab) -> None:
    """Two runs on one folder, at the same moment or soon after: one goes on, one is refused."""
    program = lab.programs["main"]
    resumed = t.number % 2 == 1
    if resumed:
        interrupted_run(t, program)
    command = (program.resume if resumed else program.begin)(t.run_folder)
    delay = t.random.choice([0, 0, t.random.uniform(0, 0.05), t.random.uniform(0, 1)])
    first = t.start(command)
    time.sleep(delay)
    second = t.start(command)
    t.say(f"two {'resumed' if resumed else 'new'} runs, {delay:.3f} s apart")
    ends = sorted([first.wait(), second.wait()], key=lambda end: end.status)
    if ends[0].status != 0:
        raise Lost(f"neither came to its end: {ends[0].says()}")
    # Of a run that had come to its end nothing is left to do, and one may be through before the
    # other begins.
    trained = [end for end in ends if "images/s" in end.out]
    if ends[1].status == 0 and trained:
        raise Lost("both ran")
    if ends[1].status != 0:
        refused(ends[1])
    same_end(t, program)


def enlarge(folder: Path) -> None:
    """Pictures that take a while to write."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for path in sorted(folder.glob("scenes/leftImg8bit/train/*/*.png"))[:PICTURES]:
        with Image.open(path) as image:
            image.resize((1024, 512)).save(pictures / path.name)


def results_command(kind: str, t: Try, lab: Lab) -> list[str]:
    """A command that writes results into the folder of a try."""
    scenes, best = str(lab.folder / "scenes"), str(lab.programs["main"].reference / "best.pth")
    folder = t.run_folder
    if kind == "export":
        folder.mkdir(exist_ok=True)
        return [sys.executable, "export.py", "--checkpoint", best, "--output", f"{folder}/n.onnx"]
    if kind == "predict":
        command = ["predict.py", "--input", str(lab.folder / "pictures"), "--output", str(folder)]
        return [sys.executable, *command, "--checkpoint", best]
    if kind == "evaluation":
        command = ["eval_cityscapes_server.py", "--checkpoint", best, "--datadir", scenes]
        return [sys.executable, *command, "--subset", "train", "--save-results", str(folder)]
    command = lab.programs["main"].begin(t.folder / "training", "--cache", str(folder))
    return command


def wait_for_a_file(t: Try, started: Started) -> None:
    """Wait for the first file of a try, whatever its name."""

    def there() -> bool:
        return any(path.is_file() for path in t.run_folder.rglob("*"))

    t.sleep(LIMIT, lambda: there() or not started.running())


def killed_results(t: Try, lab: Lab, kind: str) -> None:
    """kill -9 while results are written: what lies there under its final name is whole."""
    wanted, seconds = lab.results[kind]
    if kind == "cache":
        seconds = min(seconds, 1.0)  # the rest is training
    delay = t.random.uniform(0, seconds)
    started = t.start(results_command(kind, t, lab))
    wait_for_a_file(t, started)
    t.sleep(delay, lambda: not started.running())
    t.kill_all()
    t.say(f"kill -9 {delay:.3f} s after the first file")
    found = hashes(t.run_folder)
    t.struck.append(
        "all files were there" if found.keys() == wanted.keys()
        else "some files were there" if found else "no file was there yet"
    )  # fmt: skip
    for name, content in found.items():
        if name not in wanted:
            raise Lost(f"{name} lies there, which an undisturbed run does not write")
        if content != wanted[name]:
            raise Lost(f"{name} is not whole")
    if kind == "cache":
        t.run_folder = t.folder / "training"
        go_on(t, lab.programs["main"], "--cache", str(t.folder / "run"))
        same_end(t, lab.programs["main"])
        if hashes(t.folder / "run") != wanted:
            raise Lost("the next run left another cache")


def fuzzed(t: Try, lab: Lab) -> None:
    """Fuzzed files into the loaders, many to a process; what ends or hangs it is found out."""
    read = refused_by_name = place = 0
    while place < FILES:
        command = ["tools/read_fuzzed.py", t.seed, t.number, place, FILES, t.folder / "files"]
        started = t.start([sys.executable, *map(str, command)])
        try:
            end = started.wait(120)
            ended = f"ended with {end.says()}"
        except Lost as error:
            started.process.kill()
            ended = str(error)
        said = started.out().splitlines()
        for title, result in zip(said[::2], said[1::2], strict=False):
            place = int(title.split()[0]) + 1
            read += result == "read"
            refused_by_name += result == "refused"
            if result not in ("read", "refused"):
                t.lost.append(f"{title}: {result}")
        if len(said) % 2:  # the last file has no result
            t.lost.append(f"{said[-1]}: {ended}")
            place = int(said[-1].split()[0]) + 1
        elif place < FILES:
            raise Lost(f"reading {ended}")
    t.tries = FILES
    t.say(f"{read} read, {refused_by_name} refused by name")
    for part, count in (("read", read), ("refused by name", refused_by_name)):
        t.struck += [part] * count


ROWS = [
    Row("kill", 20, kill),
    Row("kill-imagenet", 8, partial(kill, name="imagenet"), ("imagenet",)),
    Row("kill-rank", 6, kill_rank, ("torchrun",)),
    Row("sigterm", 8, partial(stop, number=SIGTERM)),
    Row("sigterm-imagenet", 4, partial(stop, number=SIGTERM, name="imagenet"), ("imagenet",)),
    Row("sigterm-torchrun", 3, partial(stop, number=SIGTERM, name="torchrun"), ("torchrun",)),
    Row("ctrl-c", 8, partial(stop, number=SIGINT)),
    Row("ctrl-c-twice", 4, partial(stop, number=SIGINT, again=True)),
    Row("truncated", 6, partial(damaged_last, how="truncated")),
    Row("empty", 2, partial(damaged_last, how="empty")),
    Row("flipped", 6, partial(damaged_last, how="flipped")),
    Row("removed", 2, partial(damaged_last, how="removed")),
    Row("both", 4, both_damaged),
    Row("disk", 10, full_disk, mounts=True),
    Row("read-only", 6, read_only_folder, mounts=True),
    Row("fuzzed", 8, fuzzed, ()),
    Row("worker", 8, dead_worker),
    Row("worker-imagenet", 4, partial(dead_worker, name="imagenet"), ("imagenet",)),
    Row("clock", 6, jumping_clock, ("main", "imagenet")),
    Row("broken-image", 6, broken_image),
    Row("skip-broken", 4, partial(broken_image, skip=True)),
    Row("two-runs", 6, two_runs),
    Row("cache", 8, partial(killed_results, kind="cache"), results="cache"),
    Row("export", 4, partial(killed_results, kind="export"), results="export"),
    Row("predict", 8, partial(killed_results, kind="predict"), results="predict"),
    Row("evaluation", 8, partial(killed_results, kind="evaluation"), results="evaluation"),
]  # fmt: skip
