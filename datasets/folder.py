"""A data set that needs no code: a folder of images, one of labels, and a file of the classes."""

import colorsys
import json
import os
from pathlib import Path

from datasets.images import DatasetError
from datasets.segmentation import Classes, Segmentation, matched_files, png_files

# Classes of these names, in any case, are neither trained on nor scored.
IGNORED = {"ignore", "ignored", "unlabeled", "unlabelled", "void"}
MOST_CLASSES = 254


class Folder(Segmentation):
    """images/<split>/<name>.png or .jpg with labels/<split>/<name>.png; see `read_classes`.

    A split "test" may come without labels.
    """

    def files(self) -> list[tuple[str, str | None]]:
        labels = self._label_folder()
        unlabelled = self.split == "test" and not os.path.isdir(labels)
        images = os.path.join(self.root, "images", self.split)
        return matched_files(images, None if unlabelled else labels)

    def label_files(self) -> list[str]:
        labels = self._label_folder()
        return png_files(labels) if os.path.isdir(labels) else []

    def _label_folder(self) -> str:
        return os.path.join(self.root, "labels", self.split)


def read_classes(path: str | os.PathLike) -> Classes:
    """Read the classes of a data set from a file, in the order of their values in the labels.

    A text file has a line for each class, the value 0 first: its name, and if wanted its colour
    as three numbers (`traffic light 250 170 30`); empty lines and those after # do not count. A
    JSON file has a list of {"name": ..., "color": [R, G, B]} or of names, or an object
    {"name": [R, G, B]}. A class named as in IGNORED is neither trained on nor scored. Classes
    without a colour get one.

    Raises:
        DatasetError: names the file and what is wrong in it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise DatasetError(f"{path} cannot be read as a file of classes ({error})") from error
    rows = _from_json(path, text) if path.suffix.lower() == ".json" else _from_text(text)
    names = [name for name, _ in rows]
    for name, color in rows:
        if not name or names.count(name) > 1:
            raise DatasetError(f"{path}: every class needs a name of its own, {name!r} is none")
        if color is not None and not (
            len(color) == 3 and all(type(part) is int and 0 <= part <= 255 for part in color)
        ):
            raise DatasetError(
                f"{path}: the colour of {name} is {color}: give three whole numbers of 0 to 255"
            )
    kept = [value for value, name in enumerate(names) if name.lower() not in IGNORED]
    if len(kept) < 2 or len(rows) > MOST_CLASSES:
        raise DatasetError(
            f"{path} has {len(kept)} classes: give 2 to {MOST_CLASSES}, a line for each"
        )
    colors = [rows[value][1] or _some_color(value, len(rows)) for value in kept]
    return Classes(
        names=[names[value] for value in kept],
        colors=[tuple(color) for color in colors],
        label_ids=kept,
        ignored_ids=[value for value in range(len(rows)) if value not in kept],
    )


Row = tuple[str, list[int] | None]  # name and colour of a class


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
            f'{path} is no JSON list of {{"name": ..., "color": [R, G, B]}}: {error}'
        ) from error


def _some_color(value: int, count: int) -> list[int]:
    """One of `count` colours that lie far apart, evenly around the colour circle."""
    lightness = (1.0, 0.75, 0.5)[value % 3]
    return [round(255 * part) for part in colorsys.hsv_to_rgb(value / count, 0.8, lightness)]
