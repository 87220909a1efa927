"""The folder of a training run: its options, checkpoints, log and TensorBoard events."""

import argparse
import csv
import io
import json
import math
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from utils import distributed
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.files import WriteError, atomic_write, remove_unfinished, write_errors
from utils.interrupts import StopSignals

# The checkpoint to resume from, and the one before it in case the last is damaged.
LAST, PREVIOUS = "last.pth", "previous.pth"
BEST, ENCODER = "best.pth", "encoder.pth"
ARGS, LOG, COUNTS, LOCK = "args.json", "log.csv", "class_counts.json", ".lock"
EVENTS = "events.out.tfevents.*"

# Columns of the log that TensorBoard does not show.
NOT_SHOWN = ("stage", "epoch", "seconds")


class FolderInUse(UserError):
    """The folder holds a run already."""


class FolderLocked(UserError):
    """Another program is writing into the folder."""


class NoRun(UserError):
    """The folder holds no run to resume."""


class Run:
    """A training run in its folder. Call its write methods through `distributed.first`."""

    def __init__(
        self, args: argparse.Namespace, folder: Path, resumed: dict[str, Any] | None
    ) -> None:
        self.args, self.folder, self.last = args, folder, folder / LAST
        self.resumed = resumed  # checkpoint to resume from; None for a new run
        self.signals = StopSignals()  # handled from `begin` on
        self.command = resume_command(folder)
        self.writer: SummaryWriter | None = None
        self.opened = ExitStack()

    def past_stage(self, number: int) -> bool:
        """Return whether the resumed run has finished this stage."""
        return self.resumed is not None and self.resumed["stage"] > number

    def epochs_done(self) -> int:
        """Return the finished epochs of the resumed run, over all stages."""
        if not self.resumed:
            return 0
        before = self.args.encoder_epochs if self.resumed["stage"] == 2 else 0
        return before + self.resumed["epoch"]

    def on_same_data(self) -> bool:
        """Return whether this resumes a run that began with the same folder of data."""
        return self.args.resume and read_args(self.folder)["datadir"] == self.args.datadir

    def class_counts(self) -> dict[str, int] | None:
        """Return the training pixels by class if this run has counted them before."""
        return read_json(self.folder / COUNTS) if self.on_same_data() else None

    def begin(self) -> None:
        """Start writing, and drop what the log has beyond the last checkpoint.

        A run that ends before this leaves no folder behind.
        """
        print(f"output: {self.folder}", flush=True)
        if self.args.resume and not self.resumed:
            print("no checkpoint was saved: starting again")
        self.opened.enter_context(self.signals)
        if not distributed.is_first():
            return
        options = dict(vars(self.args))
        if self.args.resume:  # changed options hold from now on
            begun = read_args(self.folder)
            options |= {name: begun[name] for name in ("resume", "savedir")}
        self.write_json(ARGS, options)
        rows, epochs = read_log(self.folder / LOG), self.epochs_done()
        if len(rows) > epochs:
            self._write_log(rows[:epochs])

    def close(self) -> None:
        """Finish the event file."""
        if self.writer:
            with self.write_errors(self.folder / EVENTS):
                self.writer.close()

    @contextmanager
    def write_errors(self, path: Path) -> Iterator[None]:
        """Turn an OSError into a WriteError that ends with the command to resume."""
        try:
            with write_errors(path):
                yield
        except WriteError as error:
            error.add_note(f"then resume with: {self.command}")
            raise

    def save(self, checkpoint: Mapping[str, Any]) -> None:
        """Write last.pth, and keep the one before it as previous.pth."""
        with self.write_errors(self.last):
            # Copied, not renamed: last.pth exists at every moment.
            if self.last.exists():
                copy_whole(self.last, self.folder / PREVIOUS)
            save_checkpoint(checkpoint, self.last)

    def save_network(self, checkpoint: Mapping[str, Any], name: str) -> None:
        """Write a checkpoint that no run resumes from."""
        with self.write_errors(self.folder / name):
            save_checkpoint(checkpoint, self.folder / name)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(dict(content), indent=2)
        path = self.folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            self._write_text(name, text)

    def record(self, row: Mapping[str, Any], step: int, pictures: Sequence[Tensor]) -> None:
        """Add an epoch to the log and to TensorBoard; `step` counts epochs over all stages."""
        self._write_log([*read_log(self.folder / LOG), dict(row)])
        with self.write_errors(self.folder / EVENTS):
            if self.writer is None:
                threading.excepthook = _without_event_writer
                # TensorBoard drops what earlier event files have from this step on.
                purge = {"purge_step": step} if self.args.resume else {}
                self.writer = SummaryWriter(os.fspath(self.folder), **purge)
            for name, value in row.items():
                if name not in NOT_SHOWN and not math.isnan(value):
                    self.writer.add_scalar(tensorboard_tag(name), value, step)
            for number, picture in enumerate(pictures):
                self.writer.add_image(f"val/{number}", picture, step)
            self.writer.flush()

    def _write_log(self, rows: list[dict[str, Any]]) -> None:
        columns = dict.fromkeys(column for row in rows for column in row)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(columns), restval=math.nan)
        writer.writeheader()
        writer.writerows(rows)
        self._write_text(LOG, text.getvalue() if rows else "")

    def _write_text(self, name: str, text: str) -> None:
        path = self.folder / name
        with self.write_errors(path), atomic_write(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8", newline="")


@contextmanager
def open_run(args: argparse.Namespace) -> Iterator[Run]:
    """Lock the folder of a run, and read the checkpoint to resume from.

    Raises:
        FolderInUse: it holds a run that is not to be resumed.
        FolderLocked: another program is writing into it.
        CheckpointError: no checkpoint of the run can be read.
        WriteError: the folder cannot be written to.
    """
    folder = Path(distributed.first(lambda: args.savedir))  # processes may disagree on the time
    with locked_folder(folder) if distributed.is_first() else nullcontext():
        resumed = distributed.first(lambda: load_run(folder) if args.resume else check_free(folder))
        run = Run(args, folder, resumed)
        with run.opened:
            yield run
            run.close()


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs; remove it at the end if nothing was written to it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK)
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise FolderLocked(f"another run is writing into {folder}") from error
        remove_unfinished(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be gone, or its parents in use by now
            if made and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                for path in made:
                    path.rmdir()
        lock.release()


def check_free(folder: Path) -> None:
    """Raise FolderInUse if a folder holds a run."""
    for pattern in (ARGS, LOG, COUNTS, "*.pth", EVENTS):
        for found in folder.glob(pattern):
            raise FolderInUse(f"{folder} holds a run already ({found.name})")


def load_run(folder: Path) -> dict[str, Any] | None:
    """Read last.pth, or previous.pth if that is damaged; return None if nothing was saved yet."""
    last, previous = folder / LAST, folder / PREVIOUS
    if not last.exists() and not previous.exists():
        # A run saves after its first epoch at the latest; killed before, it has at most one row in
        # its log.
        if (folder / f"damaged-{LAST}").exists() or len(read_log(folder / LOG)) > 1:
            raise CheckpointError(
                f"{last} and {previous} are missing, but the run had saved them: put one back, or "
                "start another run"
            )
        return None
    try:
        return _load_state(last)
    except CheckpointError as error:
        if not previous.exists():
            raise
        checkpoint = _load_state(previous)
        print(f"{error}; resuming from {previous}")
        # Otherwise the next save would copy the damaged file over the good one.
        with write_errors(last):
            if last.exists():
                os.replace(last, folder / f"damaged-{LAST}")
            copy_whole(previous, last)
        return checkpoint


def _load_state(path: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    if not {"stage", "optimizer", "processes"} <= checkpoint.keys():
        raise CheckpointError(
            f"{path} is not the state of a run: put back the file that the run wrote, or start "
            "another run"
        )
    return checkpoint


def tensorboard_tag(column: str) -> str:
    """Return the tag of a column of the log: loss/train for train_loss, iou/road for "iou road"."""
    split, _, score = column.partition("_")
    return f"{score}/{split}" if split in ("train", "val") else column.replace(" ", "/", 1)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file whole or not at all."""
    with atomic_write(target) as unfinished:
        shutil.copyfile(source, unfinished)


def run_path(savedir: str | None, dataset: str) -> Path:
    """Return the folder of a run: a name lies under save/, a path is taken as it is."""
    if savedir is None:
        return Path("save") / f"{dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(savedir) if os.sep in savedir or savedir in (".", "..") else Path("save") / savedir


def resume_command(folder: Path) -> str:
    """Return the command line that resumes the run in a folder."""
    start = "python"
    if distributed.processes() > 1:
        local = distributed.local_processes()
        more = " ..." if distributed.processes() > local else ""  # as on the other machines
        start = f"torchrun --nproc-per-node {local}{more}"
    name = str(folder.relative_to("save")) if folder.parent == Path("save") else str(folder)
    if folder.parent == Path():  # as a bare name, it would lie under save/
        name = os.path.join(".", folder)
    return f"{start} {shlex.quote(sys.argv[0])} --savedir {shlex.quote(name)} --resume"


def read_args(folder: Path) -> dict[str, Any]:
    """Return the options of the run in a folder; raise NoRun if there is none."""
    args = read_json(folder / ARGS)
    if args is None:
        raise NoRun(f"{folder} holds no run to resume: {ARGS} is missing or damaged")
    return args


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log as strings; none if there is no log yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _without_event_writer(failed: threading.ExceptHookArgs) -> None:
    """Print the error of a thread, unless it is TensorBoard's, whose next call raises it again."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)
