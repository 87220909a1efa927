"""Your own data set, without code: a folder of images, one of labels, and a file of classes."""

import colorsys
import json
import os
from pathlib import Path

from datasets.images import DatasetError
from datasets.listing import matched_files
from datasets.segmentation import Classes, Segmentation

# Classes of these names, in any case, are neither trained on nor scored.
IGNORED = {"ignore", "ignored", "unlabeled", "unlabelled", "void"}
MAX_CLASSES = 254

Row = tuple[str, list[int] | None]  # name and colour of a class


class Folder(Segmentation):
    """images/<split>/<name>.png, .jpg, ... with labels/<split>/<name>.png; see `read_classes` and
    `matched_files`. The split "test" may come without labels.
    """

    DEPTH = 2

    def files(self) -> list[tuple[str, str | None]]:
        images, labels = (
            os.path.join(self.root, kind, self.split) for kind in ("images", "labels")
        )
        unlabelled = self.split == "test" and not os.path.isdir(labels)
        return matched_files(images, None if unlabelled else labels)


def read_classes(path: str | os.PathLike) -> Classes:
    """Read the classes of a data set from a file, in the order of their values in the labels.

    A text file has a line for each class, beginning with value 0: its name and, optionally, its
    colour (`traffic light 250 170 30`). Empty lines and text after # are skipped. A JSON file has a
    list of {"name": ..., "color": [R, G, B]} or of names, or an object {"name": [R, G, B]}. Classes
    named as in IGNORED are neither trained on nor scored. Classes without a colour get one.

    Raises:
        DatasetError: the file cannot be read or is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise DatasetError(f"{path} cannot be read as a file of classes ({error})") from error
    rows = _from_json(path, text) if path.suffix.lower() == ".json" else _from_text(text)
    _check_rows(path, rows)
    ids = [value for value, (name, _) in enumerate(rows) if name.lower() not in IGNORED]
    if len(ids) < 2 or len(rows) > MAX_CLASSES:
        raise DatasetError(
            f"{path} has {len(ids)} classes: give 2 to {MAX_CLASSES}, a line for each"
        )
    return Classes(
        names=[rows[value][0] for value in ids],
        colors=[tuple(rows[value][1] or _pick_color(value, len(rows))) for value in ids],
        label_ids=ids,
        ignored_ids=[value for value in range(len(rows)) if value not in ids],
    )


def _check_rows(path: Path, rows: list[Row]) -> None:
    names = [name for name, _ in rows]
    for name, color in rows:
        if not name or names.count(name) > 1:
            raise DatasetError(f"{path}: every class needs a unique name, {name!r} is not")
        if color is not None and not (
            len(color) == 3 and all(type(part) is int and 0 <= part <= 255 for part in color)
        ):
            raise DatasetError(
                f"{path}: the colour of {name} is {color}: give three integers from 0 to 255"
            )


def _from_text(text: str) -> list[Row]:
    rows: list[Row] = []
    for line in text.splitlines():
        words = line.split("#")[0].replace(",", " ").split()
        if len(words) > 3 and all(word.isdecimal() for word in words[-3:]):
            rows.append((" ".join(words[:-3]), [int(word) for word in words[-3:]]))
        elif words:
            rows.append((" ".join(words), None))
    return rows


def _from_json(path: Path, text: str) -> list[Row]:
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            content = [{"name": name, "color": color} for name, color in content.items()]
        if not isinstance(content, list):
            raise TypeError(f"it is a {type(content).__name__}")
        rows = [{"name": row} if isinstance(row, str) else row for row in content]
        return [
            (str(row["name"]), None if row.get("color") is None else list(row["color"]))
            for row in rows
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(
            f'{path} is not a JSON list of {{"name": ..., "color": [R, G, B]}}: {error}'
        ) from error


def _pick_color(value: int, count: int) -> list[int]:
    """Return one of `count` colours, spread evenly around the colour circle."""
    lightness = (1.0, 0.75, 0.5)[value % 3]
    return [round(255 * part) for part in colorsys.hsv_to_rgb(value / count, 0.8, lightness)]
