"""The folder of a training run: its options, its log, and what may not be overwritten."""

import argparse
import csv
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from utils import distributed
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.events import drop_events_after, flush_events, naming_events, open_events
from utils.files import atomic_write, remove_unfinished
from utils.options import ArgumentParser, file_path, natural_float, natural_int, seed_int

# The checkpoint to go on from, and the one before it, in case it is damaged.
LAST, PREVIOUS = "last.pth", "previous.pth"
BEST, ENCODER = "best.pth", "encoder.pth"
ARGS, LOG, COUNTS, LOCK = "args.json", "log.csv", "class_counts.json", ".lock"

# Options that may differ from the run's own when it is resumed.
FREE_ON_RESUME = {
    "datadir", "dataset", "device", "amp", "workers", "batch_size", "skip_broken",
    "checkpoint_minutes", "steps_loss", "resume", "savedir",
}  # fmt: skip

# What last.pth says beside the weights and what they are, to go on with a run.
RUN_STATE = (
    "stage", "epoch", "step", "steps", "lr", "batch_size", "best", "training_model", "ema_updates",
    "optimizer", "scheduler", "scaler", "computed_by", "processes",
)  # fmt: skip

# Columns of the log that TensorBoard shows, beside the IoU of every class.
TAGS = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "lr": "lr",
    "train_miou": "miou/train",
    "val_miou": "miou/val",
    "val_pixel_accuracy": "pixel accuracy/val",
    "images_per_second": "images per second/train",
    "data_wait": "share of time waiting for data/train",
    "skipped_steps": "steps skipped by the scaler/train",
    "left_out": "broken images left out",
    "train_top1": "top-1/train",
    "val_top1": "top-1/val",
    "train_top5": "top-5/train",
    "val_top5": "top-5/val",
}


def add_run_options(parser: ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that every training run has: the machine, the seed and the output.

    Returns:
        The group of the output, for more options.
    """
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--workers",
        "--num-workers",
        type=natural_int,
        default=min(4, os.cpu_count() or 1),
        help="processes that load data; default %(default)s",
    )
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1; default auto")
    machine.add_argument(
        "--amp",
        choices=("auto", "off", "bf16", "fp16"),
        default="auto",
        help="mixed precision; auto: on a GPU only; default auto",
    )
    machine.add_argument("--seed", type=seed_int, default=0, help="default 0")
    machine.add_argument(
        "--sync-bn",
        action="store_true",
        help="batch norm over the images of all processes that torchrun started; on GPUs",
    )
    machine.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out images and labels that cannot be read, and count them: all files are read "
        "at the start, and those that break later are left out as well; without it, the "
        "first one ends the run",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--savedir",
        type=file_path,
        help="a name under save/, or a path; default: by data set and time",
    )
    output.add_argument("--resume", action="store_true", help="go on with the run in --savedir")
    output.add_argument(
        "--checkpoint-minutes",
        type=natural_float,
        default=10.0,
        help="save what resuming needs this often within an epoch, and after each; default 10",
    )
    output.add_argument(
        "--steps-loss",
        type=natural_int,
        default=50,
        help="steps between lines of progress in a log, 0 for none; default 50",
    )
    return output


def parse_run_args(
    parser: ArgumentParser,
    settle: Callable[[argparse.Namespace], None],
    free: Collection[str] = (),
) -> argparse.Namespace:
    """Parse the options of a run; of one that is resumed, those that it was begun with.

    Args:
        settle: fills in what the command line leaves open, and refuses what cannot be.
        free: options that may differ on resume, beside FREE_ON_RESUME.

    Raises:
        UserError: there is no run to resume, or it was begun with other options.
    """
    stored = None
    again = ArgumentParser(add_help=False)
    again.add_argument("--resume", action="store_true")
    again.add_argument("--savedir")
    first, _ = again.parse_known_args()
    if first.resume:
        if not first.savedir:
            raise UserError("--resume needs --savedir, the folder of the run to go on with")
        folder = run_folder(first.savedir, "")
        stored = read_args(folder)
        if not stored.keys() <= {*vars(parser.parse_args([])), "dataset"}:
            raise UserError(f"{folder} holds a run of another program: resume it with that")
        parser.set_defaults(**{k: v for k, v in stored.items() if k not in ("savedir", "resume")})
    args = parser.parse_args()
    settle(args)
    if stored:
        args.dataset = stored["dataset"]
    for name, value in (stored or {}).items():
        if name not in {*FREE_ON_RESUME, *free} and getattr(args, name, value) != value:
            raise UserError(
                f"the run in {args.savedir} has --{name.replace('_', '-')} {value}: "
                "leave the option out to resume, or start another run"
            )
    return args


def run_folder(savedir: str | None, dataset: str) -> Path:
    """Where a run writes: a name lies under save/, a path is taken as it is."""
    if savedir is None:
        return Path("save") / f"{dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(savedir) if os.sep in savedir or savedir in (".", "..") else Path("save") / savedir


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep an output folder for this process, and the run that it is the first of, alone.

    A folder that is made for it, and into which nothing is written, is removed at the end.

    Raises:
        UserError: another run has it, or it cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
        remove_unfinished(folder)
    except Timeout as error:
        raise UserError(
            f"another run is writing into {folder}: wait for its end, or give another --savedir"
        ) from error
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): give another --savedir"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # where another run, or somebody, changed these folders meanwhile
            if made and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                for path in made:
                    path.rmdir()
        lock.release()


def check_free(folder: Path) -> None:
    """See that no run lies in the folder.

    Raises:
        UserError: one does.
    """
    names = (
        ARGS, LOG, COUNTS, LAST, PREVIOUS, f"damaged-{LAST}", BEST, ENCODER,
        "stage*-epoch*.pth", "events.out.tfevents.*",
    )  # fmt: skip
    for found in (path for name in names for path in folder.glob(name)):
        raise UserError(
            f"{folder} holds a run already ({found.name}): continue it with --resume or give "
            "another --savedir"
        )


def start_run(folder: Path, args: Mapping[str, Any]) -> None:
    """Write the options of a new run into its folder.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        with atomic_write(folder / ARGS) as unfinished:
            unfinished.write_text(json.dumps(dict(args), indent=2))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): give another --savedir"
        ) from error


def keep_options(folder: Path, args: Mapping[str, Any]) -> None:
    """Write the options that a run is resumed with, for when it is resumed again.

    Raises:
        UserError: the folder cannot be written.
    """
    begun = read_args(folder)
    now = dict(args) | {name: begun[name] for name in ("resume", "savedir")}
    if now != begun:
        write_json(folder / ARGS, now)


def save_run(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Write last.pth; the one before becomes previous.pth.

    Raises:
        UserError: the disk takes no more; both are as they were.
    """
    last = folder / LAST
    with told(folder / LAST):
        if last.exists():
            with atomic_write(folder / PREVIOUS) as copy:
                shutil.copyfile(last, copy)
        save_checkpoint(checkpoint, last)


def save_network(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint of a run that nothing is resumed from.

    Raises:
        UserError: the disk takes no more; what was there is as it was.
    """
    with told(path):
        save_checkpoint(checkpoint, path)


def load_run(folder: Path) -> dict[str, Any] | None:
    """Read the checkpoint that a run is resumed from: last.pth, or previous.pth where the last is
    damaged or missing, which is said.

    Returns:
        None where nothing was saved yet.

    Raises:
        CheckpointError: neither can be read, or both were removed.
        UserError: the folder cannot be written.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if not last.exists() and not previous.exists():
        # A run that is killed in its first epoch leaves none, and of the log a row at most.
        log = folder / LOG
        if (folder / f"damaged-{LAST}").exists() or (
            log.exists() and len(log.read_text().splitlines()) > 2
        ):
            raise CheckpointError(
                f"{last} and {previous} are missing, but something had been saved: put one of them "
                "back, or start another run"
            )
        return None
    try:
        return _load_state(last)
    except CheckpointError as error:
        if not previous.exists():
            raise
        checkpoint = _load_state(previous)
        print(f"{error}; going on from {previous}")
        # The next checkpoint would otherwise make of the damaged one the previous.
        with told(last):
            if last.exists():
                os.replace(last, folder / f"damaged-{LAST}")
            with atomic_write(last) as copy:
                shutil.copyfile(previous, copy)
        return checkpoint


def _load_state(path: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    for key in RUN_STATE:
        if key not in checkpoint:
            raise CheckpointError(
                f"{path} does not hold the {key} of a run: put back the file that the run wrote, "
                "or start another run"
            )
    return checkpoint


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Have a failure to write a file of a run told in one line.

    Args:
        path: of the file, or of the folder of the run.

    Raises:
        UserError: instead of an OSError.
    """
    folder = path if path.is_dir() else path.parent
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path} cannot be written ({error.strerror or error}): mend that, "
            f"and go on with: {resume_command(folder)}"
        ) from error


def resume_command(folder: Path) -> str:
    """The command line that goes on with a run that was stopped."""
    start = "python"
    if distributed.processes() > 1:
        local = distributed.local_processes()
        more = " ..." if distributed.processes() > local else ""  # as on the other machines
        start = f"torchrun --nproc-per-node {local}{more}"
    name = str(folder.relative_to("save")) if folder.parent == Path("save") else str(folder)
    if folder.parent == Path():  # a name alone would lie under save/
        name = os.path.join(".", folder)
    return f"{start} {shlex.quote(sys.argv[0])} --savedir {shlex.quote(name)} --resume"


def read_args(folder: Path) -> dict[str, Any]:
    """The options that a run was started with.

    Raises:
        UserError: the folder holds no run.
    """
    args = read_json(folder / ARGS)
    if args is None:
        raise UserError(
            f"{folder} holds no run to resume ({ARGS} is missing or damaged): give the "
            "--savedir of a run to resume, or another --savedir and no --resume"
        )
    return args


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where the file is missing, cut short or something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with told(path), atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(dict(content), indent=2))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, as strings; none where there is no log yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a log; its columns are those of the first row.

    Raises:
        UserError: it cannot be written, and is as it was.
    """
    with told(path), atomic_write(path) as unfinished, unfinished.open("w", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]), restval=math.nan, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a log, whose columns are those of its first row."""
    write_log(path, [*read_log(path), dict(row)])


def write_events(
    writer: SummaryWriter, row: Mapping[str, float], step: int, pictures: Sequence[Tensor]
) -> None:
    """A row of the log, without what was not measured, and pictures of val to TensorBoard.

    Raises:
        UserError: they cannot be written.
    """
    folder = Path(writer.log_dir)
    with told(folder), naming_events(folder):
        for name, value in row.items():
            if name in TAGS or name.startswith("iou "):
                tag = TAGS.get(name) or name.replace("iou ", "iou/", 1)
                if not math.isnan(value):
                    writer.add_scalar(tag, value, step)
        for number, picture in enumerate(pictures):
            writer.add_image(f"val/{number}", picture, step)
        flush_events(writer)


def notes(row: Mapping[str, float]) -> str:
    """What a row of the log tells of steps and images that were left out, to end its report."""
    named = {"skipped_steps": "steps skipped by the scaler", "left_out": "broken images left out"}
    return "".join(f", {row[name]} {what}" for name, what in named.items() if row[name])


def go_on_after(folder: Path, step: int, **done: int) -> SummaryWriter:
    """Cut from the log and the events of a run what came after the checkpoint to go on from.

    Args:
        step: the last one of the events to keep.
        done: columns of the last row of the log to keep, as for `drop_rows_after`.

    Returns:
        What writes further events.

    Raises:
        UserError: they cannot be written.
    """
    drop_rows_after(folder / LOG, **done)
    with told(folder):
        drop_events_after(folder, step)
        return open_events(folder)


def drop_rows_after(path: Path, **done: int) -> None:
    """Cut from a log what was trained after the checkpoint that a run resumes from.

    Args:
        done: columns of the last row to keep, the slower one first: stage=1, epoch=3.
    """
    rows = read_log(path)
    kept = [
        row for row in rows if tuple(int(row[column]) for column in done) <= tuple(done.values())
    ]
    if len(kept) < len(rows):
        write_log(path, kept)
