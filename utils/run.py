"""The folder of a training run: its options, its log, and what may not be overwritten."""

import csv
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from utils.cli import UsageError

LAST, BEST, ENCODER = "last.pth", "best.pth", "encoder.pth"
ARGS, LOG, COUNTS = "args.json", "log.csv", "class_counts.json"

# Columns of the log that TensorBoard shows, beside the IoU of every class.
TAGS = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "lr": "lr",
    "train_miou": "miou/train",
    "val_miou": "miou/val",
    "val_pixel_accuracy": "pixel accuracy/val",
    "images_per_second": "images per second/train",
}


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
    """Add a line to a CSV file; the first also writes the header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def write_scalars(writer: SummaryWriter, row: Mapping[str, float], step: int) -> None:
    """A row of the log to TensorBoard; what was not measured in this epoch is left out."""
    for name, value in row.items():
        if name in TAGS or name.startswith("iou "):
            tag = TAGS.get(name) or name.replace("iou ", "iou/", 1)
            if not math.isnan(value):
                writer.add_scalar(tag, value, step)


def drop_rows_after(path: Path, stage: int, epoch: int) -> None:
    """Cut from the log what was trained after the checkpoint that a run resumes from, and a
    last row that was not written to its end."""
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
        if None not in row.values() and (int(row["stage"]), int(row["epoch"])) <= (stage, epoch)
    ]
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(kept)
    os.replace(unfinished, path)
