"""The folder of a training run: its options, its log, and what may not be overwritten."""

import argparse
import csv
import json
import math
import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from utils.cli import ArgumentParser, UsageError, file_path, natural_int, seed_int

LAST, BEST, ENCODER = "last.pth", "best.pth", "encoder.pth"
ARGS, LOG, COUNTS = "args.json", "log.csv", "class_counts.json"

# Options that may differ from the run's own when it is resumed.
FREE_ON_RESUME = {
    "datadir", "dataset", "device", "amp", "workers", "steps_loss", "resume", "savedir"
}  # fmt: skip

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

    output = parser.add_argument_group("output")
    output.add_argument(
        "--savedir",
        type=file_path,
        help="a name under save/, or a path; default: by data set and time",
    )
    output.add_argument("--resume", action="store_true", help="go on with the run in --savedir")
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
        UsageError: there is no run to resume, or it was begun with other options.
    """
    stored = None
    again = ArgumentParser(add_help=False)
    again.add_argument("--resume", action="store_true")
    again.add_argument("--savedir")
    first, _ = again.parse_known_args()
    if first.resume:
        if not first.savedir:
            raise UsageError("--resume needs --savedir, the folder of the run to go on with")
        folder = run_folder(first.savedir, "")
        stored = read_args(folder)
        if not stored.keys() <= {*vars(parser.parse_args([])), "dataset"}:
            raise UsageError(f"{folder} holds a run of another program: resume it with that")
        parser.set_defaults(**{k: v for k, v in stored.items() if k not in ("savedir", "resume")})
    args = parser.parse_args()
    settle(args)
    if stored:
        args.dataset = stored["dataset"]
    for name, value in (stored or {}).items():
        if name not in {*FREE_ON_RESUME, *free} and getattr(args, name, value) != value:
            raise UsageError(
                f"the run in {args.savedir} has --{name.replace('_', '-')} {value}: "
                "leave the option out to resume, or start another run"
            )
    return args


def run_folder(savedir: str | None, dataset: str) -> Path:
    """Where a run writes: a name lies under save/, a path is taken as it is."""
    if savedir is None:
        return Path("save") / f"{dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(savedir) if os.sep in savedir or savedir in (".", "..") else Path("save") / savedir


def check_free(folder: Path) -> None:
    """See that no run lies in the folder.

    Raises:
        UsageError: one does.
    """
    names = (ARGS, LOG, COUNTS, LAST, BEST, ENCODER, "stage*-epoch*.pth", "events.out.tfevents.*")
    for found in (path for name in names for path in folder.glob(name)):
        raise UsageError(
            f"{folder} holds a run already ({found.name}): continue it with --resume or give "
            "another --savedir"
        )


def start_run(folder: Path, args: Mapping[str, Any]) -> None:
    """Make the folder and write the options of a new run into it.

    Raises:
        UsageError: the folder holds a run or cannot be written.
    """
    check_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ARGS).open("x") as file:
            json.dump(dict(args), file, indent=2)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror}): give another --savedir"
        ) from error


def read_args(folder: Path) -> dict[str, Any]:
    """The options that a run was started with.

    Raises:
        UsageError: the folder holds no run.
    """
    args = read_json(folder / ARGS)
    if args is None:
        raise UsageError(
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


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line to a CSV file; the first also writes the header, which the others follow."""
    names = list(row)
    if path.exists():
        with path.open(newline="") as file:
            names = next(csv.reader(file), names)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, restval=math.nan, extrasaction="ignore")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def write_scalars(writer: SummaryWriter, row: Mapping[str, float], step: int) -> None:
    """A row of the log to TensorBoard; what was not measured in this epoch is left out."""
    for name, value in row.items():
        if name in TAGS or name.startswith("iou "):
            tag = TAGS.get(name) or name.replace("iou ", "iou/", 1)
            if not math.isnan(value):
                writer.add_scalar(tag, value, step)


def drop_rows_after(path: Path, **done: int) -> None:
    """Cut from the log what was trained after the checkpoint that a run resumes from, and a
    last row that was not written to its end.

    Args:
        done: columns of the last row to keep, the slower one first: stage=1, epoch=3.
    """
    if not path.exists():
        return
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), reader.fieldnames
    if names is None:  # not even the header was written
        path.unlink()
        return
    kept = [
        row
        for row in rows
        if None not in row.values()  # fewer values than the header has names
        and tuple(int(row[column]) for column in done) <= tuple(done.values())
    ]
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(kept)
    os.replace(unfinished, path)
