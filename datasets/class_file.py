"""Files that name the classes of a data set, in the forms that people and labelling tools write."""

import colorsys
import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.images import IGNORE_INDEX, DatasetError
from datasets.segmentation import Classes

# Classes of these names, in any case, are neither trained on nor scored.
IGNORED = {"ignore", "ignored", "unlabeled", "unlabelled", "void"}
LABELME_IGNORED = "__ignore__"  # stands for -1, and does not use up a value
MAX_CLASSES = 254

# Columns of a table and keys of JSON, as letters only; the first that is there counts.
NAMES = ("name", "classname", "labelname", "title", "class", "label", "category", "readable")
VALUES = ("id", "value", "labelid", "classid", "pixelvalue", "index", "idx", "class", "label")
COLORS = ("color", "colour", "rgb", "colorrgb", "hex")
CHANNELS = (("r", "g", "b"), ("red", "green", "blue"))
COLUMNS = {"trainid", *VALUES, *COLORS, *CHANNELS[0], *CHANNELS[1]}
TITLES = {*NAMES, "names", "labels", "classes", "categories"}  # a line of this word alone
TABLES = ("categories", "labels", "classes", "names", "id2label", "label2id")  # keys of JSON

INTEGER = re.compile(r"-?\d+")
HEX = re.compile(r"#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})\b", re.IGNORECASE)
COMMENT = re.compile(rf"(?!{HEX.pattern})#.*", re.IGNORECASE)
CVAT = re.compile(r"([^:]*):\s*(\d+,\s*\d+,\s*\d+)?\s*:[^:]*:[^:]*")  # name:R,G,B:parts:actions
BRACKETED = re.compile(r"(?:rgb)?[(\[{]\s*(\d+)[\s,;]+(\d+)[\s,;]+(\d+)\s*[)\]}]")
NUMBERING = re.compile(r"(-?\d+)\s*(?:[:=|)]|(?:\.|->?)(?=\s))")  # `7: road`, `7. road`, `7 - road`
SEPARATORS = re.compile(r"[,;|]|(?<=\d)\s*[:=]|[:=]\s*(?=\d)")
NUMBERS_LEFT = re.compile(r"\d\S*\s+\S*\d")  # in a name, they must mean something else


class NotUnderstood(ValueError):
    """What is wrong with a part of a file of classes."""


@dataclass
class Row:
    """A class as the file states it."""

    place: str  # "line 3"
    name: str
    value: int | None  # in the label files; None: the next one
    color: tuple[int, ...] | None
    ignored: bool


def read_classes(path: str | os.PathLike) -> Classes:
    """Read the classes of a data set from a file.

    A text file has a line for each class: its name, optionally its colour behind or before it
    (`traffic light 250 170 30`), and optionally its value in the label files in front (`7 road`).
    Without values, classes have 0, 1, 2, ... A line `255 NAME` says what 255 is, whose pixels are
    ignored otherwise. Empty lines and text after # are skipped. A table may have a header instead,
    and JSON may hold names, objects, or an object by name or value. Classes named as in IGNORED are
    neither trained on nor scored. Classes without a colour get one.

    Raises:
        DatasetError: the file cannot be read or is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise DatasetError(f"{path} cannot be read as a file of classes ({error})") from error
    try:
        if path.suffix.lower() == ".json":
            rows = [_row(f"class {n}", entry) for n, entry in enumerate(_from_json(text), 1)]
        else:
            rows = [_row(f"line {n}", entry) for n, entry in _from_text(text)]
        return _to_classes(rows)
    except NotUnderstood as error:
        raise DatasetError(f"{path}: {error}") from error


def _to_classes(rows: list[Row]) -> Classes:
    _number(rows)
    trained: dict[int, Row] = {}
    for row in rows:
        for what, content in (("name", row.name), ("value", row.value)):
            same = [other for other in rows if getattr(other, what) == content]
            if content == "" or (len(same) > 1 and not all(other.ignored for other in same)):
                raise NotUnderstood(
                    f"{row.place}: every class needs a unique {what}, {content!r} is not"
                )
        if not row.ignored:
            trained[row.value] = row
    if not 2 <= len(trained) <= MAX_CLASSES:
        raise NotUnderstood(
            f"the file has {len(trained)} classes: give 2 to {MAX_CLASSES}, a line for each"
        )
    picked = {row.value: _pick_color(place, len(rows)) for place, row in enumerate(rows)}
    return Classes(
        names=[row.name for row in trained.values()],
        colors=[row.color or picked[value] for value, row in trained.items()],
        label_ids=list(trained),
        ignored_ids=sorted({row.value for row in rows} - set(trained)),
        label_colors={row.value: row.color for row in rows if row.color},
    )


def _number(rows: list[Row]) -> None:
    """Give 0, 1, 2, ... to rows without values: all of them but those of 255."""
    others = [row for row in rows if row.value != IGNORE_INDEX]
    if any(row.value is not None for row in others):
        for row in others:
            if row.value is None:
                raise NotUnderstood(
                    f"{row.place}: {row.name!r} has no value and others have: give a value in "
                    "front of each name or of none (but 255), and write numbers in names as words"
                )
        return
    for value, row in enumerate(others):
        row.value = value
    if len(others) > IGNORE_INDEX:
        raise NotUnderstood(f"the file has {len(others)} classes: give 2 to {MAX_CLASSES}")


def _row(place: str, entry: Mapping[str, Any]) -> Row:
    """Read a row of a table, or an object of JSON."""
    fields = {_letters(key): value for key, value in entry.items()}
    name_key = next((key for key in NAMES if key in fields), None)
    if name_key is None:
        raise NotUnderstood(f"{place}: {dict(entry)} has no name")
    name = str(fields[name_key]).strip()
    value_key = next((key for key in (*VALUES, "trainid") if key in fields and key != name_key), "")
    value = _value(place, name, fields.get(value_key))
    if name == LABELME_IGNORED and value is None:
        value = IGNORE_INDEX
    color = next((fields[key] for key in COLORS if key in fields), None)
    for channels in CHANNELS:
        if all(key in fields for key in channels):
            color = [fields[key] for key in channels]
    ignored = name.strip("_").lower() in IGNORED or fields.get("ignoreineval") is True
    ignored |= str(fields.get("trainid")) in ("-1", "255")
    return Row(place, name, value, _color(place, name, color), ignored)


def _letters(key: str) -> str:
    return re.sub(r"[\W\d_]", "", key).lower()


def _value(place: str, name: str, value: Any) -> int | None:
    if value is None or value == "":
        return None
    if type(value) in (int, str) and INTEGER.fullmatch(str(value).strip()):
        if -1 <= int(value) <= 255:
            return int(value) % 256  # -1 is stored as 255
    raise NotUnderstood(f"{place}: the value of {name} is {value!r}: values are 0 to 255")


def _color(place: str, name: str, color: Any) -> tuple[int, ...] | None:
    if color is None or color == "" or (isinstance(color, list) and set(color) == {""}):
        return None
    parts = color
    if isinstance(color, str):
        parts = re.split(r"[\s,;]+", _decimal(color).strip(" ()[]"))
    if isinstance(parts, list):
        integers = [int(p) if isinstance(p, str) and p.strip().isdecimal() else p for p in parts]
        if len(parts) == 3 and all(type(p) is int and 0 <= p <= 255 for p in integers):
            return tuple(integers)
    raise NotUnderstood(
        f"{place}: the colour of {name} is {color}: give three integers from 0 to 255"
    )


def _decimal(text: str) -> str:
    """Replace #804080 by 128 64 128."""
    return HEX.sub(lambda match: " ".join(str(int(part, 16)) for part in match.groups()), text)


def _from_text(text: str) -> list[tuple[int, dict[str, Any]]]:
    """Return the number and the fields of each line."""
    lines = [
        (n, COMMENT.sub("", line).strip().removeprefix("- "))
        for n, line in enumerate(text.splitlines(), 1)
    ]
    lines = [(number, line) for number, line in lines if line]
    if lines and re.sub(r"\W+$", "", lines[0][1]).lower() in TITLES:
        lines = lines[1:]
    first = lines[0][1] if lines else ""
    delimiter = next((sign for sign in "\t;,:" if sign in first), None)
    columns = [_letters(column) for column in first.split(delimiter)]
    name = next((columns.index(key) for key in NAMES if key in columns), None)
    if name is not None and (len(COLUMNS.intersection(columns)) > (columns[name] in COLUMNS)):
        return [(n, _table_row(n, line, columns, name, delimiter)) for n, line in lines[1:]]
    if re.search(r"[,;\t]", first) and not re.search(r"\d", first) and len(lines) > 1:
        if all(re.search(r"\d", line) for _, line in lines[1:]):
            raise NotUnderstood(
                f"line {lines[0][0]}: {first!r} has none of the numbers of the other lines: call "
                "the columns of a header name, id, r, g and b, or leave it out"
            )
    return _from_lines([(number, *_split(number, line)) for number, line in lines])


def _table_row(
    number: int, line: str, columns: Sequence[str], name: int, delimiter: str | None
) -> dict[str, str]:
    """Return the fields of a line below a header; a name may hold the delimiter."""
    if delimiter:
        words = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    else:
        words = re.split(r"[\s,;]+", line)
    end = len(words) - (len(columns) - name - 1)
    if end <= name:
        raise NotUnderstood(f"line {number}: {line!r} has fewer columns than the header")
    fields = [*words[:name], " ".join(words[name:end]), *words[end:]]
    return dict(zip(columns, fields, strict=True))


Line = tuple[int, list[str], str, list[str]]  # number; integers before the name; name; behind it


def _split(number: int, line: str) -> tuple[list[str], str, list[str]]:
    """Return the integers before the name, the name, and the integers behind it."""
    if match := CVAT.fullmatch(line):
        line = f"{match[1]} {match[2] or ''}"
    line = _decimal(BRACKETED.sub(r" \1 \2 \3 ", line.replace('"', " ")))
    words = SEPARATORS.sub(" ", NUMBERING.sub(r"\1 ", line, count=1)).split()
    if len(words) == 1:
        return [], words[0], []
    start, end = 0, len(words)
    while start < end and INTEGER.fullmatch(words[start]):
        start += 1
    while end > start and words[end - 1].isdecimal():
        end -= 1
    name = " ".join(words[start:end])
    key, colon, _ = name.partition(":")  # `name: road`, from YAML
    odd = NUMBERS_LEFT.search(name) or (colon and _letters(key) in TITLES | COLUMNS)
    if start not in (0, 1, 3, 4) or end == start or odd:
        raise NotUnderstood(
            f"line {number}: {' '.join(words)!r} is not `name`, `name R G B` or `7 name R G B`"
        )
    return words[:start], name, words[end:]


def _from_lines(lines: list[Line]) -> list[tuple[int, dict[str, Any]]]:
    """Tell values, colours and numbers that belong to a name from each other."""
    counts = {len(behind) for _, _, _, behind in lines}
    names = {name for _, _, name, _ in lines}
    plain = all(not before for _, before, _, _ in lines)
    # `road 7`, `sky 8`, ..., but not `lane 1`, `lane 2`, ...
    numbered = plain and counts in ({1}, {4}) and len(names) == len(lines) > 1
    if numbered and (
        len({behind[0] for *_, behind in lines}) < len(lines)
        or {behind[-1] for *_, behind in lines} == {"255"}
    ):
        raise NotUnderstood(
            f"line {lines[0][0]}: what is the number behind each name? Give values in front, and "
            "colours as R G B"
        )
    if len({len(before) > 1 for _, before, _, _ in lines}) > 1:
        wrong = next(number for number, before, _, _ in lines if len(before) < 2)
        raise NotUnderstood(f"line {wrong}: other lines begin with a colour, this one does not")
    rows = []
    for number, before, name, behind in lines:
        row: dict[str, Any] = {"id": before[0] if len(before) in (1, 4) else None}
        color = before[-3:] if len(before) > 1 else None
        if numbered:
            row["id"], behind = behind[0], behind[1:]
        if len(behind) in (1, 4) and not color:  # `lane 2`
            name, behind = f"{name} {behind[0]}", behind[1:]
        if len(behind) == 3 and not color:
            color, behind = [int(part) for part in behind], []
        if behind:
            raise NotUnderstood(f"line {number}: what are the numbers behind {name!r}?")
        rows.append((number, row | {"name": name, "color": color}))
    return rows


def _from_json(text: str) -> list[Mapping[str, Any]]:
    """Return an object for each class."""
    colors = None
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            tables = [content[key] for key in TABLES if isinstance(content.get(key), dict | list)]
            tables = [table for table in tables if not all(isinstance(v, int) for v in table)]
            if tables:
                colors, content = content.get("palette") or content.get("colors"), tables[0]
        if isinstance(content, dict):
            content = [_named(key, value) for key, value in content.items()]
        entries = [{"name": row} if isinstance(row, str) else row for row in content]
        if colors and len(colors) != len(entries):
            raise ValueError(f"it has {len(entries)} classes and {len(colors)} colours")
        if colors:
            entries = [e | {"color": c} for e, c in zip(entries, colors, strict=True)]
        if not isinstance(content, list) or not all(isinstance(e, dict) for e in entries):
            raise TypeError(f"it holds {text.strip()[:40]}")
        return entries
    except (ValueError, TypeError) as error:
        raise NotUnderstood(
            f'it is not a JSON list of {{"name": ..., "color": [R, G, B]}}: {error}'
        ) from error


def _named(key: str, value: Any) -> dict[str, Any]:
    """Return the object that an entry of an object by name, or by value, stands for."""
    row: dict[str, Any] = {"name": key} | ({"id": key} if INTEGER.fullmatch(key) else {})
    if isinstance(value, dict):
        return row | value
    if type(value) is int:
        return row | {"id": value}
    return row | {"name" if isinstance(value, str) and "id" in row else "color": value}


def _pick_color(place: int, count: int) -> tuple[int, ...]:
    """Return one of `count` colours, spread evenly around the colour circle."""
    lightness = (1.0, 0.75, 0.5)[place % 3]
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(place / count, 0.8, lightness))
