"""Read the file that names the classes of a data set: lines, a table with a header, or JSON.

What has no clear meaning is refused with its line.
"""

import colorsys
import csv
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ImageColor

from datasets.images import IGNORE_INDEX, DatasetError
from datasets.segmentation import Classes

# Classes of these names, whatever their case and signs, are neither trained on nor scored.
IGNORED = "ignore ignored ignoreregion dontcare unlabeled unlabelled void".split()
LABELME_IGNORED = "__ignore__"  # stands for 255, and does not use up a value
MAX_CLASSES = 254

# Columns of a table and keys of JSON, in lower case without signs.
ROLES = {
    "name": "name class classname label labelname category title".split(),
    "id": "id value labelid classid index idx".split(),
    "color": "color colour rgb hex".split(),
    "r": ["r", "red"],
    "g": ["g", "green"],
    "b": ["b", "blue"],
}
ROLE_OF = {word: role for role, words in ROLES.items() for word in words}
SKIPPED = "supercategory isthing hasinstances instances readable description".split()
TABLES = "categories labels classes names id2label".split()  # keys of JSON, and titles

# `name`, `name R G B`, `R G B name`, `7 name`, `7: name`, CVAT's `name:R,G,B::`
LINE = re.compile(r"((?:-?\d+[\s,;:=.)]+)*)([^\W\d].*?)((?:[\s,;:=]+-?\d+)*)[\s,;:]*")
# Separators, and words of digits and signs.
NOT_IN_NAMES = re.compile(
    r"""[,;:="#\t|，；：]|(?<!\S)(?:[^\w\s]|[\d_])*\d(?:[^\w\s]|[\d_])*(?!\S)"""
)
COMMENT = re.compile(r"(?:^|\s)#(?![0-9a-f]{3}\b|[0-9a-f]{6}\b).*", re.IGNORECASE)
INTEGER = re.compile(r"-?\d{1,9}")


class NotUnderstood(ValueError):
    """What is wrong with a part of a file of classes."""


@dataclass
class Row:
    """A class as the file states it."""

    place: str  # "line 3"
    name: str
    value: int | None = None  # in the label files; None: the next one
    color: tuple[int, ...] | None = None

    @property
    def ignored(self) -> bool:
        return _plain(self.name) in IGNORED


def read_classes(path: str | os.PathLike) -> Classes:
    """Read the classes of a data set from a file.

    A text file has a line for each class: `name`, `name R G B` or `R G B name`, and in front of
    it the value in the label files, on all lines or on none. Without values, classes have 0, 1,
    2, ... A line `255 NAME` says what 255 is, whose pixels are ignored otherwise. Empty lines and
    text after # are skipped. A table has a header with `name`, `id`, `color`, or `r`, `g`, `b`.
    JSON holds names, objects with these keys, or an object by name or by value. Classes named as
    in IGNORED are neither trained on nor scored. Classes without a colour get one.

    Raises:
        DatasetError: the file cannot be read or is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:  # UTF-16
            raise UnicodeError("it has bytes of value 0")
    except (OSError, ValueError) as error:
        hint = "save it as UTF-8: " if isinstance(error, UnicodeError) else ""
        raise DatasetError(f"{path} cannot be read as a file of classes ({hint}{error})") from error
    try:
        is_json = path.suffix.lower() == ".json" or text.lstrip().startswith(("[", "{"))
        return _to_classes(_read_json(text) if is_json else _read_text(text))
    except (NotUnderstood, csv.Error) as error:
        raise DatasetError(f"{path}: {error}") from error


def _to_classes(rows: list[Row]) -> Classes:
    _number(rows)
    trained = [row for row in rows if not row.ignored]
    if not 2 <= len(trained) <= MAX_CLASSES:
        ignored = ", ".join(row.name for row in rows if row.ignored)
        raise NotUnderstood(
            f"the file has {len(trained)} classes{f' ({ignored} is ignored)' if ignored else ''}: "
            f"give 2 to {MAX_CLASSES}, a line for each"
        )
    for row in rows:
        for what, content in (("name", row.name), ("value", row.value)):
            same = [other for other in rows if getattr(other, what) == content]
            if len(same) > 1 and not all(other.ignored for other in same):
                raise NotUnderstood(
                    f"{row.place}: every class needs a unique {what}, {content!r} is not"
                )
    picked = {row.value: _pick_color(place, len(rows)) for place, row in enumerate(rows)}
    return Classes(
        names=[row.name for row in trained],
        colors=[row.color or picked[row.value] for row in trained],
        label_ids=[row.value for row in trained],
        ignored_ids=sorted({row.value for row in rows if row.ignored}),
        label_colors={row.value: row.color for row in rows if row.color},
    )


def _number(rows: list[Row]) -> None:
    """Give 0, 1, 2, ... to rows without values: all of them but those of 255."""
    others = [row for row in rows if row.value != IGNORE_INDEX]
    if len(others) > IGNORE_INDEX:
        raise NotUnderstood(f"the file has {len(others)} classes: give 2 to {MAX_CLASSES}")
    numbered = any(row.value is not None for row in others)
    for value, row in enumerate(others):
        if numbered and row.value is None:
            raise NotUnderstood(
                f"{row.place}: {row.name!r} has no value and others have: give a value in front of "
                "each name or of none (but 255), and write numbers in names as words"
            )
        row.value = row.value if numbered else value


def _plain(word: str) -> str:
    """Return a word as columns, titles and ignored names are compared: letters and digits."""
    return re.sub(r"[\W_]", "", word).lower()


def _read_text(text: str) -> list[Row]:
    lines = [(f"line {n}", COMMENT.sub("", line)) for n, line in enumerate(text.splitlines(), 1)]
    lines = [(place, line.strip()) for place, line in lines if line.strip(",; \t")]
    first = lines[0][1] if lines else ""
    delimiter = next((sign for sign in "\t;," if sign in first), " ")
    columns = _cells(first, delimiter)
    if len(columns) == 1 and _plain(first) in [*TABLES, *ROLES["name"]]:
        lines = lines[1:]
    elif any(_plain(column) in ROLES["name"] for column in columns):
        return [_table_row(*line, columns, delimiter) for line in lines[1:]]
    rows = [_line_row(*line) for line in lines]
    if len(rows) > 2 and not rows[0].color and all(row.color for row in rows[1:]):
        raise NotUnderstood(
            f"{rows[0].place}: is {first!r} a header? Call its columns name, id, r, g and b. If it "
            "is a class, give it a colour as the others"
        )
    return rows


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])


def _table_row(place: str, line: str, columns: Sequence[str], delimiter: str) -> Row:
    cells = _cells(line, delimiter)
    if len(cells) != len(columns):
        raise NotUnderstood(
            f"{place}: {line!r} has {len(cells)} columns and the header {len(columns)}: separate "
            "them by commas, and quote names with commas"
        )
    return _row(place, zip(columns, cells, strict=True))


def _line_row(place: str, line: str) -> Row:
    """Read a line of a file without a header."""
    match = LINE.fullmatch(line)
    before, behind = (INTEGER.findall(match[part]) if match else [] for part in (1, 3))
    forms = ((0, 0), (0, 3), (3, 0), (1, 0), (1, 3))
    if not match or (len(before), len(behind)) not in forms or NOT_IN_NAMES.search(match[2]):
        raise NotUnderstood(
            f"{place}: {line!r} is not `name`, `7 name`, `name R G B` or `7 name R G B` (in names, "
            "write numbers as words)"
        )
    value = before[0] if len(before) == 1 else None
    if match[2] == LABELME_IGNORED and value is None:
        value = IGNORE_INDEX
    color = before if len(before) == 3 else behind
    return _row(place, {"name": match[2], "id": value, "color": color}.items())


def _row(place: str, fields: Iterable[tuple[str, Any]]) -> Row:
    """Read the columns of a table, or the keys of an object of JSON."""
    contents: dict[str, Any] = {}
    for key, content in fields:
        role = ROLE_OF.get(_plain(key))
        if role in contents:
            raise NotUnderstood(f"{place}: more than one {role}, {key!r} is one: leave it out")
        if role is None and _plain(key) not in SKIPPED:
            raise NotUnderstood(
                f"{place}: what is {key!r}? Call it name, id, color, or r, g and b, or leave it out"
            )
        contents[role or key] = content
    name, value = contents.get("name"), contents.get("id")
    numbers = _integers([value], least=-1)
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise NotUnderstood(f"{place}: a class needs a name of printable characters: {contents}")
    if re.match(r"-?\d+\s", name):
        raise NotUnderstood(f"{place}: is {name!r} a value and a name? Separate them")
    if not numbers and value not in (None, ""):
        raise NotUnderstood(
            f"{place}: the value of {name} is {value!r}: values are 0 to 255, as in the label "
            "files; leave out ids of a database"
        )
    value = numbers[0] % 256 if numbers else None  # -1 is stored as 255
    color = contents.get("color") or [contents.get(channel, "") for channel in "rgb"]
    return Row(place, " ".join(name.split()), value, _color(place, color))


def _color(place: str, color: Any) -> tuple[int, ...] | None:
    if color == ["", "", ""]:
        return None
    parts = color
    if isinstance(color, str):
        hexadecimal = re.fullmatch(r"#[0-9a-fA-F]{6}", color)
        parts = ImageColor.getrgb(color) if hexadecimal else re.split(r"[\s,;]+", color)
    if not isinstance(parts, Sequence) or not len(parts) == 3 == len(_integers(parts, least=0)):
        raise NotUnderstood(f"{place}: the colour is {color}: give three integers from 0 to 255")
    return tuple(_integers(parts, least=0))


def _integers(contents: Iterable[Any], least: int) -> list[int]:
    """Return those that are integers from `least` to 255, or are written so."""
    integers = [int(content) for content in contents if INTEGER.fullmatch(str(content))]
    return [integer for integer in integers if least <= integer <= 255]


def _read_json(text: str) -> list[Row]:
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys)
        tables = [key for key in TABLES if key in content] if isinstance(content, dict) else []
        if tables:
            unused = [key for key in (*tables[1:], "palette", "colors") if key in content]
            if unused:
                raise ValueError(f"{unused[0]!r} stands beside {tables[0]!r}")
            content = content[tables[0]]
        if isinstance(content, dict):
            content = [_entry(key, value) for key, value in content.items()]
        if not isinstance(content, list) or not all(isinstance(e, str | dict) for e in content):
            raise ValueError(f"it holds {text.strip()[:40]}")
    except (ValueError, RecursionError) as error:
        raise NotUnderstood(
            f'it is not a JSON list of {{"name": ..., "id": 7, "color": [R, G, B]}}: {error}'
        ) from error
    objects = [{"name": entry} if isinstance(entry, str) else entry for entry in content]
    return [_row(f"class {n}", entry.items()) for n, entry in enumerate(objects, 1)]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{max(keys, key=keys.count)!r} is there twice")
    return dict(pairs)


def _entry(key: str, value: Any) -> dict[str, Any]:
    """Return what `"road": 7`, `"road": [R, G, B]`, `"7": "road"` or `"7": {...}` stands for."""
    row, other = ({"id": key}, "name") if INTEGER.fullmatch(key) else ({"name": key}, "color")
    if isinstance(value, dict):
        return row | value
    return row | {"id" if type(value) is int else other: value}


def _pick_color(place: int, count: int) -> tuple[int, ...]:
    """Return one of `count` colours, spread evenly around the colour circle."""
    lightness = (1.0, 0.75, 0.5)[place % 3]
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(place / count, 0.8, lightness))
