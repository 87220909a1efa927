"""Whether the folder of a disturbed run holds the same end as that of one that was never stopped.

Everything has to be the same, bit for bit: weights and states, the rows of the log but for what the
clock says, every value and picture of TensorBoard, each once. Files are read from the disk as they
lie there, by torch and TensorBoard, and by none of the code that wrote them.
"""

import csv
import hashlib
import io
import json
import logging
import math
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch import Tensor

# It tells of every run that was resumed.
logging.getLogger("tensorboard").setLevel(logging.ERROR)

# What the clock says, in the log and in checkpoints; the tags under which TensorBoard shows it.
CLOCK = {"images_per_second", "data_wait", "seconds"}
CLOCK_TAGS = {"images per second/train", "share of time waiting for data/train"}
# Options that say where a run lies, not what it computes.
PLACES = {"savedir", "datadir", "cache", "resume"}

EVENTS = "events.out.tfevents."
# May lie beside an end.
FREE = ("previous.pth",)


def differences(folder: Path, reference: Path) -> list[str]:
    """What is not the same in two folders of runs that came to their end, in words."""
    found = []
    names, wanted = names_in(folder), names_in(reference)
    found += [f"{name} is missing" for name in sorted(wanted - names)]
    found += [f"{name} was left behind" for name in sorted(names - wanted)]
    for name in sorted(names & wanted):
        ours, theirs = folder / name, reference / name
        if name == "log.csv":
            found += log_differences(ours, theirs)
        elif name.endswith(".pth"):
            found += read_and_compare(name, ours, theirs, read_checkpoint)
        elif name.endswith(".json"):
            found += read_and_compare(name, ours, theirs, lambda path: json.loads(path.read_text()))
    return [*found, *tensorboard_differences(folder, reference)]


def names_in(folder: Path) -> set[str]:
    """The files of a run that has ended, all of its event files as one."""
    names = {path.name for path in folder.iterdir()}
    return {
        EVENTS if name.startswith(EVENTS) else name
        for name in names
        if name not in FREE and not name.endswith("lock")
    }


def read_checkpoint(path: Path) -> Any:
    """What a checkpoint holds, by torch; its checksums are looked at first, which torch leaves out.

    Raises:
        ValueError: the file is not whole.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path.name} is no archive ({error})") from error
    if damaged is not None:
        raise ValueError(f"{path.name} is damaged (checksum of {damaged})")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_and_compare(
    name: str, ours: Path, theirs: Path, read: Callable[[Path], Any]
) -> Iterator[str]:
    try:
        values = read(ours)
    except (OSError, ValueError, RuntimeError) as error:
        yield f"{name} cannot be read ({error})"
        return
    yield from value_differences(values, read(theirs), name)


def value_differences(ours: Any, theirs: Any, where: str) -> Iterator[str]:
    """Where two nests of dicts, lists, tensors and plain values differ."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            yield f"{where} differs"
    elif isinstance(ours, dict) and isinstance(theirs, dict):
        keys = [key for key in {**ours, **theirs} if key not in CLOCK | PLACES]
        for key in keys:
            if key not in ours or key not in theirs:
                yield f"{where}: {key} is {'missing' if key in theirs else 'new'}"
            else:
                yield from value_differences(ours[key], theirs[key], f"{where}: {key}")
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            yield f"{where} has {len(ours)} values, not {len(theirs)}"
        for place, pair in enumerate(zip(ours, theirs, strict=False)):
            yield from value_differences(*pair, f"{where}: {place}")
    elif not (ours == theirs or (is_nan(ours) and is_nan(theirs))):
        yield f"{where} is {ours}, not {theirs}"


def is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a log, as text; none where there is no log yet."""
    if not path.exists():
        return []
    with io.StringIO(path.read_text(), newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def log_differences(ours: Path, theirs: Path) -> Iterator[str]:
    rows, wanted = read_rows(ours), read_rows(theirs)
    places, expected = ([place_of(row) for row in log] for log in (rows, wanted))
    for place, count in Counter(places).items():
        if count > 1:
            yield f"log.csv has {count} rows of {place}"
    for place in expected:
        if place not in places:
            yield f"log.csv has no row of {place}"
    if Counter(places) == Counter(expected) and places != expected:
        yield "log.csv has its rows in another order"
    if places == expected:
        for place, row, other in zip(places, rows, wanted, strict=True):
            if list(row) != list(other):
                yield "log.csv has other columns"
                return
            for column in row:
                if column not in CLOCK and row[column] != other[column]:
                    yield f"log.csv, {place}: {column} is {row[column]}, not {other[column]}"


def place_of(row: dict[str, str]) -> str:
    stage = f"stage {row['stage']} " if "stage" in row else ""
    return f"{stage}epoch {row['epoch']}"


def tensorboard_differences(folder: Path, reference: Path) -> Iterator[str]:
    """Two looks: every record of the files, and what TensorBoard makes of them, which drops those
    that a later file says to have begun anew."""
    for kind, read in (("the event files", records), ("TensorBoard", shown)):
        ours, theirs = read(folder), read(reference)
        for (tag, step), values in ours.items():
            if (tag, step) not in theirs:
                yield f"{kind}: {tag} at step {step} is new"
            elif len(values) > 1:
                yield f"{kind}: {tag} at step {step} is there {len(values)} times"
            elif tag not in CLOCK_TAGS and values != theirs[tag, step]:
                yield f"{kind}: {tag} at step {step} differs"
        for tag, step in theirs.keys() - ours.keys():
            yield f"{kind}: {tag} at step {step} is missing"


def records(folder: Path) -> dict[tuple[str, int], list[Any]]:
    """Every value in the event files by tag and step; of a picture, the hash of its bytes."""
    found: dict[tuple[str, int], list[Any]] = {}
    for path in sorted(folder.glob(f"{EVENTS}*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                picture = value.image.encoded_image_string
                content = hashlib.sha256(picture).hexdigest() if picture else value.simple_value
                found.setdefault((value.tag, event.step), []).append(content)
    return found


def shown(folder: Path) -> dict[tuple[str, int], list[Any]]:
    """The scalars that TensorBoard shows, by tag and step."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found: dict[tuple[str, int], list[Any]] = {}
    for tag in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    return found


def broken_files(folder: Path) -> list[str]:
    """Files of a run that lie there under their final name and are not whole.

    To be asked at any moment, such as that of a kill. Event files are left out: they grow record by
    record, and readers stop before a last one that is cut short.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith("."):
            continue  # not its final name
        try:
            if path.suffix == ".pth":
                read_checkpoint(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".csv":
                text = path.read_text()
                rows = list(csv.reader(io.StringIO(text, newline="")))
                if not text.endswith("\n") or len({len(row) for row in rows}) != 1:
                    raise ValueError("a row is cut short")
        except (OSError, ValueError, RuntimeError) as error:
            found.append(f"{path.name} is not whole ({error})")
    return found


def hashes(folder: Path) -> dict[str, str]:
    """The hash of every file at any depth that lies there under its final name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and is_final(path.relative_to(folder))
    }


def is_final(path: Path) -> bool:
    """Whether a name is that of a finished file: others begin with a dot, or say it."""
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix not in (".unfinished", ".lock")
