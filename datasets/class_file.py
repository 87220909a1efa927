"""Files that name the classes of a data set, in the forms that people and labelling tools write.

What could be meant in two ways is refused, with the line and what to write instead.
"""

import colorsys
import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.images import IGNORE_INDEX, DatasetError
from datasets.segmentation import Classes

# Classes of these names, whatever their case and signs, are neither trained on nor scored.
IGNORED = "ignore ignored ignoreregion dontcare unlabeled unlabelled void".split()
STATED = (["255"], ["-1"])  # values that a line may have in front where the others have none
LABELME_IGNORED = "__ignore__"  # stands for -1, and does not use up a value
FLAGS = {"ignore": ("true", "1"), "ignoreineval": ("true", "1"), "evaluate": ("false", "0")}
MAX_CLASSES = 254

# Columns of a table and keys of JSON, without signs; of each role the first that is there counts.
NAMES = "name classname labelname categoryname title readable class label category".split()
IDS = "id value labelid classid pixelvalue maskvalue pixel gray grey number code index idx".split()
ROLES = {
    "name": NAMES,
    "id": [*IDS, "class", "label", "trainid", "categoryid"],
    "color": "color colour rgb colorrgb hex hexcode hexcolor colorhex".split(),
    "r": "r red colorr colorred".split(),
    "g": "g green colorg colorgreen".split(),
    "b": "b blue colorb colorblue".split(),
}
TITLES = {*NAMES, "names", "classes", "labels", "categories"}  # a line of this word alone
TITLES |= {"classnames", "labelnames", "categorynames"}
TABLES = ("categories", "labels", "classes", "names", "id2label")  # keys of JSON

INTEGER = re.compile(r"-?\d{1,9}")
HEX = re.compile(r"#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})\b", re.IGNORECASE)
COMMENT = re.compile(r"(?!#(?:[0-9a-f]{3,4}|[0-9a-f]{6}|[0-9a-f]{8})\b)#.*", re.IGNORECASE)
WIDE = str.maketrans("，；：（）", ",;:()")
JSON = re.compile(r"\s*[\[{]\s*[\"\[{]")  # but not `[1] road` or `[classes]`
STATES_255 = re.compile(r"(255|-1)[\s,;:]+[^\W\d]")  # `255 void`
CVAT = re.compile(r"([^:]*):\s*(\d+,\s*\d+,\s*\d+)?\s*:[^:]*:[^:]*")  # name:R,G,B:parts:actions
BRACKETED = re.compile(r"(?:rgb)?[(\[{]\s*(-?\d+(?:[\s,;]+\d+)*)\s*[)\]}]")
NUMBERING = re.compile(r"^(-?\d+)(?:\.0+(?=[\s,;])|\s*[:=|)]|\s*(?:\.|->?)(?=\s))")  # `7: road`
SEPARATORS = re.compile(r"[,;|]|(?<=\d)\s*[:=]|[:=]\s*(?=-?\d)")
NUMBERS_LEFT = re.compile(r"\d\S*\s+\S*\d|(?<!\S)-?\d*\.\d+(?!\S)")  # in a name: `7 0 flat`, `7.5`


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


@dataclass
class Line:
    """A line of a text without a header."""

    place: str
    before: list[str]  # integers in front of the name
    name: str
    behind: list[str]


Entry = tuple[str, dict[str, Any]]  # a class as a place, and its contents by column or key


def read_classes(path: str | os.PathLike) -> Classes:
    """Read the classes of a data set from a file.

    A text file has a line for each class: `name`, `name R G B` or `R G B name`, where a value in
    the label files may stand in front of the names or alone behind them. Without values, classes
    have 0, 1, 2, ... A line `255 NAME` says what 255 is, whose pixels are ignored otherwise. Empty
    lines and text after # are skipped. A table may have a header instead, and JSON may hold names,
    objects, or an object by name or value. Classes named as in IGNORED are neither trained on nor
    scored. Classes without a colour get one.

    Raises:
        DatasetError: the file cannot be read or is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise UnicodeError("it has bytes of value 0")
    except (OSError, ValueError) as error:
        hint = "save it as UTF-8: " if isinstance(error, UnicodeError) else ""
        raise DatasetError(f"{path} cannot be read as a file of classes ({hint}{error})") from error
    try:
        is_json = path.suffix.lower() == ".json" or JSON.match(text)
        entries = _from_json(text) if is_json else _from_text(text.translate(WIDE))
        _check_unused(entries)
        return _to_classes([_row(place, fields) for place, fields in entries])
    except (NotUnderstood, csv.Error) as error:
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
        ignored = ", ".join(row.name for row in rows if row.ignored)
        raise NotUnderstood(
            f"the file has {len(trained)} classes{f' ({ignored} is ignored)' if ignored else ''}: "
            f"give 2 to {MAX_CLASSES}, a line for each"
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


def _plain(key: str) -> str:
    """Return a word as columns, titles and ignored names are compared: letters and digits."""
    return re.sub(r"[\W_]", "", key).lower()


def _roles(keys: Iterable[str]) -> dict[str, str]:
    """Return the key of each role that some key has; of the colours all or none."""
    found: dict[str, str] = {}
    for role, words in ROLES.items():
        known = [word for word in words if word in keys and word not in found.values()]
        found |= {role: known[0]} if known else {}
    if not all(channel in found for channel in "rgb"):
        found = {role: key for role, key in found.items() if role not in "rgb"}
    return found


def _row(place: str, fields: Mapping[str, Any]) -> Row:
    """Read a line, a row of a table, or an object of JSON."""
    contents = {role: fields[key] for role, key in _roles(fields).items()}
    name, number = contents.get("name"), contents.get("id")
    if not isinstance(name, str | int) or re.search(r"[\ud800-\udfff]", str(name)):
        raise NotUnderstood(f"{place}: {dict(fields)} has no name")
    name = " ".join(str(name).split())
    value = _value(place, name, number)
    other = next((k for k in IDS if _integer(fields.get(k)) not in (None, _integer(number))), None)
    if other:
        raise NotUnderstood(
            f"{place}: is the value of {name} {number!r}, or {other} {fields[other]!r}? Leave the "
            "column out that is not in the label files"
        )
    if name == LABELME_IGNORED and value is None:
        value = IGNORE_INDEX
    color = contents.get("color")
    if "r" in contents:
        color = [contents[channel] for channel in "rgb"]
    ignored = _plain(name) in IGNORED or _integer(fields.get("trainid")) in (-1, 255)
    ignored |= any(str(fields.get(key)).lower() in said for key, said in FLAGS.items())
    return Row(place, name, value, _color(place, name, color), ignored)


def _integer(value: Any) -> int | None:
    """Return an integer that may be written as 7, "7" or 7.0, or None."""
    text = "" if isinstance(value, bool) else re.sub(r"\.0*$", "", str(value).strip())
    return int(text) if INTEGER.fullmatch(text) else None


def _value(place: str, name: str, value: Any) -> int | None:
    if value is None or value == "":
        return None
    number = _integer(value)
    if number is None or not -1 <= number <= 255:
        raise NotUnderstood(
            f"{place}: the value of {name} is {value!r}: values are 0 to 255, as in the label "
            "files; leave out ids of a database"
        )
    return number % 256  # -1 is stored as 255


def _color(place: str, name: str, color: Any) -> tuple[int, ...] | None:
    if color is None or color == "" or color == ["", "", ""]:
        return None
    parts = color
    if isinstance(color, str):
        parts = re.split(r"[\s,;]+", _decimal(BRACKETED.sub(r"\1", color)).strip())
    if isinstance(parts, list):
        integers = [int(p) if isinstance(p, str) and INTEGER.fullmatch(p) else p for p in parts]
        if len(parts) == 3 and all(type(p) is int and 0 <= p <= 255 for p in integers):
            return tuple(integers)
    raise NotUnderstood(
        f"{place}: the colour of {name} is {color}: give three integers from 0 to 255"
    )


def _decimal(text: str) -> str:
    """Replace #804080 by 128 64 128."""
    return HEX.sub(lambda match: " ".join(str(int(part, 16)) for part in match.groups()), text)


def _check_unused(entries: Sequence[Entry]) -> None:
    """Refuse columns of unknown names that may hold values or colours."""
    keys = {key for _, fields in entries for key in fields}
    roles = _roles(keys)
    for key in sorted(keys.difference(*ROLES.values())):
        values = [_integer(fields.get(key)) for _, fields in entries]
        unique = all(v is not None and 0 <= v <= 255 for v in values) and len(set(values))
        if "id" not in roles and unique == len(values) and values != list(range(len(values))):
            raise NotUnderstood(
                f"is {key!r} the value in the label files? Call it id, or leave it out"
            )
        if not {"color", "r"}.intersection(roles) and re.search("colou?r|hex|rgb", key):
            raise NotUnderstood(f"is {key!r} the colour? Call it color, or r, g and b")
    channels = keys.intersection(ROLES["r"] + ROLES["g"] + ROLES["b"])
    if channels and "r" not in roles:
        raise NotUnderstood(f"the colour has only {', '.join(sorted(channels))}: give r, g and b")


def _from_text(text: str) -> list[Entry]:
    """Return the place and the fields of each line."""
    lines = [
        (f"line {n}", re.sub(r"^[-*•]\s+", "", COMMENT.sub("", line).strip(" ")))
        for n, line in enumerate(text.splitlines(), 1)
    ]
    lines = [(place, line) for place, line in lines if line.strip(" \t,;")]
    if lines and re.fullmatch(r"sep=.", lines[0][1]):  # of Excel
        lines = lines[1:]
    if not lines:
        return []
    first = lines[0][1]
    if _plain(first) in TITLES:
        return _from_lines([_split(*line) for line in lines[1:]])
    delimiter = next((sign for sign in "\t;,:" if sign in first), None)
    columns = [_plain(column) for column in first.split(delimiter)]
    roles = _roles(columns)
    if any(columns.count(key) > 1 for key in roles.values()):
        raise NotUnderstood(f"{lines[0][0]}: the header {first!r} has a column twice")
    if "name" in roles and (len(roles) > 1 or (len(columns) > 1 and delimiter in list("\t;,"))):
        return [_table_row(*line, columns, delimiter) for line in lines[1:]]
    parts = [_split(*line) for line in lines]
    if "r" in roles or _is_header([line for _, line in lines]):
        raise NotUnderstood(
            f"{lines[0][0]}: is {first!r} a header? Call its columns name, id, r, g and b, or "
            "leave it out. Names hold no commas or tabs"
        )
    return _from_lines(parts)


def _is_header(lines: Sequence[str]) -> bool:
    """Return whether the first line may be a header, although not in the words of ROLES."""
    if len(lines) == 1 or re.search(r"\d", lines[0]):
        return False
    columns = {len(re.findall(r"[^\s,;]+", line)) for line in lines}
    only_words = len(columns) == 1 and all(re.search(r"\d", line) for line in lines[1:])
    text_table = all(re.search(r"[,;\t]\s*[^\W\d]", line) for line in lines)
    return (only_words and columns != {1}) or text_table


def _table_row(place: str, line: str, columns: Sequence[str], delimiter: str | None) -> Entry:
    """Return the fields of a line below a header."""
    roles = _roles(columns)
    short = delimiter and delimiter not in line
    if STATES_255.match(line) and ("id" not in roles or short):
        return _from_lines([_split(place, line)])[0]
    if delimiter:
        words = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    else:
        words = re.split(r"[\s,;]+", line)
        first = columns.index(roles["name"])  # a name of several words
        end = max(first + 1, first + 1 + len(words) - len(columns))
        words[first:end] = [" ".join(words[first:end])]
    while len(words) > len(columns) and not words[-1]:
        words.pop()
    if len(words) != len(columns):
        count = "fewer" if len(words) < len(columns) else "more"
        raise NotUnderstood(
            f"{place}: {line!r} has {count} columns than the header (quote names with separators)"
        )
    return place, dict(zip(columns, words, strict=True))


def _split(place: str, line: str) -> Line:
    """Tell the integers before and behind a name from it."""
    yaml, colon, _ = line.partition(":")
    if match := CVAT.fullmatch(line):
        line, colon = f"{match[1]} {match[2] or ''}", ""
    line = _decimal(BRACKETED.sub(r" \1 ", line.replace('"', " "))).strip()
    words = SEPARATORS.sub(" ", NUMBERING.sub(r"\1 ", line)).split()
    if len(words) == 1 and INTEGER.fullmatch(words[0]):
        return Line(place, words, words[0], [])  # 0, 1, 2, ... are names as well as values
    start, end = 0, len(words)
    while start < end and INTEGER.fullmatch(words[start]):
        start += 1
    while end > start and INTEGER.fullmatch(words[end - 1]):
        end -= 1
    name = " ".join(words[start:end])
    odd = not re.search(r"\w", name) or "#" in name or NUMBERS_LEFT.search(name)
    if start not in (0, 1, 3) or odd or (colon and _plain(yaml) in TITLES | {"id", "nc"}):
        hint = ". Of a YAML file, give the names alone" if colon else ""
        raise NotUnderstood(
            f"{place}: {' '.join(words)!r} is not `name`, `name R G B` or `7 name R G B`{hint}"
        )
    return Line(place, words[:start], name, words[end:])


def _from_lines(lines: list[Line]) -> list[Entry]:
    """Tell values, colours and numbers that belong to a name from each other."""
    usual = [line for line in lines if line.before not in STATED]
    with_values = _have_values_behind(usual)
    with_colors = any(len(line.before) == 3 for line in usual)
    with_alpha = all(
        (len(line.before), len(line.behind)) == (1, 4) and line.behind[3] in ("0", "255")
        for line in usual
    )
    entries = []
    for line in lines:
        name, behind = line.name, line.behind
        value, color = ([], line.before) if len(line.before) == 3 else (line.before, [])
        if with_colors and not color and value not in STATED:
            raise NotUnderstood(f"{line.place}: other lines begin with a colour, this one does not")
        if with_values and not value:
            value, behind = behind, []
        elif len(behind) == 1:  # `lane 2`
            name, behind = f"{name} {behind[0]}", []
        elif with_alpha and len(behind) == 4:  # 3D Slicer, FreeSurfer
            behind = behind[:3]
        if behind and (color or len(behind) != 3):
            raise NotUnderstood(f"{line.place}: what are the numbers behind {name!r}? Give R G B")
        fields = {"name": name, "id": value[0] if value else None}
        color = [int(part) for part in color or behind]
        entries.append((line.place, fields | {"color": color or None}))
    return entries


def _have_values_behind(lines: list[Line]) -> bool:
    """Return whether the lines are `road 7`, `sky 8`, ..., but not `lane 1`, `lane 2`, ..."""
    glued = [line for line in lines if re.match(r"\d+[-_.][^\W\d]", line.name) and not line.before]
    if glued and glued == lines:
        raise NotUnderstood(
            f"{lines[0].place}: does {lines[0].name!r} begin with its value? Put a space behind it"
        )
    single = [line for line in lines if len(line.behind) == 1]
    if len({line.name for line in single}) < len(single):
        return False
    values = {int(line.behind[0]) for line in single}
    if single == lines and len(values) == len(lines) and not any(line.before for line in lines):
        return True
    for line in single:
        if len(single) > 1 or _plain(line.name) in IGNORED or values <= {-1, 255}:
            raise NotUnderstood(
                f"{line.place}: what is the number behind {line.name!r}? Write a value in front of "
                f"the name, as in `{line.behind[0]} {line.name}`, and colours as R G B"
            )
    return False


def _from_json(text: str) -> list[Entry]:
    """Return the place and the fields of each class."""
    colors = None
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys)
        if isinstance(content, dict) and (table := _find_table(content)):
            colors, content = content.get("palette") or content.get("colors"), content[table]
        if isinstance(content, dict):
            content = [_named(key, value) for key, value in content.items()]
        if not isinstance(content, list) or not all(isinstance(e, str | dict) for e in content):
            raise ValueError(f"it holds {text.strip()[:40]}")
    except (ValueError, RecursionError) as error:
        raise NotUnderstood(
            f'it is not a JSON list of {{"name": ..., "color": [R, G, B]}}: {error}'
        ) from error
    objects = [{"name": entry} if isinstance(entry, str) else entry for entry in content]
    entries = [{_plain(key): value for key, value in entry.items()} for entry in objects]
    if colors:
        if not isinstance(colors, list) or len(colors) != len(entries):
            count = len(colors) if isinstance(colors, list) else "no list of"
            raise NotUnderstood(f"it has {len(entries)} classes and {count} colours")
        entries = [e | {"color": color} for e, color in zip(entries, colors, strict=True)]
    return [(f"class {n}", entry) for n, entry in enumerate(entries, 1)]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{max(keys, key=keys.count)!r} is there twice")
    return dict(pairs)


def _find_table(content: Mapping[str, Any]) -> str | None:
    """Return a known key, or the key of a list of names or objects."""
    found = []
    for key, value in content.items():
        is_list = isinstance(value, list) and all(isinstance(e, str | dict) for e in value)
        if value and (is_list or (key in TABLES and isinstance(value, dict))):
            found.append(key)
    found = [key for key in found if key in TABLES] or found
    if len(found) > 1:
        raise NotUnderstood(f"are the classes under {' or '.join(found)}? Leave the other out")
    return found[0] if found else None


def _named(key: str, value: Any) -> dict[str, Any]:
    """Return the object that an entry of an object by name, or by value, stands for."""
    by_value = INTEGER.fullmatch(key)
    row: dict[str, Any] = {"index": key, "name": key} if by_value else {"name": key}
    if isinstance(value, dict):
        if value and not _roles([_plain(k) for k in value]):
            raise NotUnderstood(f"{key!r} is no class: it has no name, id or color")
        return row | value
    if type(value) is int:
        return row | {"id": value}
    return row | {"name" if isinstance(value, str) and by_value else "color": value}


def _pick_color(place: int, count: int) -> tuple[int, ...]:
    """Return one of `count` colours, spread evenly around the colour circle."""
    lightness = (1.0, 0.75, 0.5)[place % 3]
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(place / count, 0.8, lightness))
