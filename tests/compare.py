"""Whether two runs ended in the same way, bit for bit: what resuming promises.

Files are read by torch, csv, json and TensorBoard, with none of the code that wrote them.
"""

import csv
import json
import logging
import math
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

# It would report each resumed run.
logging.getLogger("tensorboard").setLevel(logging.ERROR)

EVENTS = "events.out.tfevents."
# Columns of the log that depend on the time that steps take.
CLOCK = {"images_per_second", "data_wait", "seconds"}
# Options that do not influence results.
FREE = {"savedir", "datadir", "cache", "resume", "workers", "checkpoint_minutes", "steps_loss"}


def differences(folder: Path, reference: Path) -> list[str]:
    """Return what differs between two folders of finished runs; `reference` must never change."""
    return list(value_differences(content_of(folder), content_of_reference(reference)))


def content_of(folder: Path) -> dict[str, Any]:
    """Return the content of a run's files, and what TensorBoard shows of it.

    The copy of an earlier checkpoint and the lock say nothing about how a run ended.
    """
    paths = [path for path in folder.iterdir() if path.name not in ("previous.pth", ".lock")]
    files = {path.name: read(path) for path in paths if not path.name.startswith(EVENTS)}
    return files | {"TensorBoard": shown(folder)}


content_of_reference = cache(content_of)


def read(path: Path) -> Any:
    """Return the content of a checkpoint, a log or a JSON file, or say why it cannot be read."""
    if path.suffix not in (".pth", ".csv", ".json") or path.name.startswith("."):
        return None
    try:
        if path.suffix == ".pth":
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch itself checks no checksums
            if damaged is not None:
                return f"damaged ({damaged})"
            return torch.load(path, map_location="cpu", weights_only=True)
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                return list(csv.DictReader(file))
        return json.loads(path.read_text())
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        return f"unreadable ({error})"


def shown(folder: Path) -> dict[str, dict[int, list[Any]]]:
    """Return what TensorBoard shows: for each tag and step, its values or pictures."""
    run = EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()
    tags = run.Tags()
    values = [
        (tag, event.step, event.value) for tag in tags["scalars"] for event in run.Scalars(tag)
    ]
    values += [
        (tag, event.step, event.encoded_image_string)
        for tag in tags["images"]
        for event in run.Images(tag)
    ]
    found: dict[str, dict[int, list[Any]]] = {}
    for tag, step, value in values:
        if tag not in CLOCK:
            found.setdefault(tag, {}).setdefault(step, []).append(value)
    return found


def value_differences(value: Any, expected: Any, *where: object) -> Iterator[str]:
    """Say where two nests of dicts, lists, tensors and plain values differ."""
    place = ": ".join(map(str, where))
    if isinstance(value, dict) and isinstance(expected, dict):
        for key in sorted((value.keys() | expected.keys()) - CLOCK - FREE, key=str):
            if key in value and key in expected:
                yield from value_differences(value[key], expected[key], *where, key)
            else:
                change = "was left behind" if key in value else "is missing"
                yield f"{': '.join(map(str, (*where, key)))} {change}"
    elif isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        if len(value) != len(expected):
            yield f"{place} has {len(value)} values, not {len(expected)}"
        for number, pair in enumerate(zip(value, expected, strict=False)):
            yield from value_differences(*pair, *where, number)
    elif isinstance(value, Tensor) and isinstance(expected, Tensor):
        if value.dtype != expected.dtype or not torch.equal(value, expected):
            yield f"{place} differs"
    elif isinstance(value, bytes) or isinstance(expected, bytes):
        if value != expected:
            yield f"{place} differs"
    elif value != expected and not (is_nan(value) and is_nan(expected)):
        yield f"{place} is {value}, not {expected}"


def is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
