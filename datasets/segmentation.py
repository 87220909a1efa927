"""A segmentation data set: its classes, and pairs of image and label files."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datasets.images import (
    IGNORE_INDEX,
    DatasetError,
    FileError,
    FilePair,
    Size,
    check_label_size,
    read_image,
)
from datasets.labels import Color, Label, read_label
from datasets.listing import JPEG_SUFFIXES, PICTURES, is_picture

# trainId of label ids that the data set does not define.
UNKNOWN = 254


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of their trainIds 0, 1, 2, ..."""

    names: Sequence[str]
    colors: Sequence[Sequence[int]]  # RGB, 0 to 255
    label_ids: Sequence[int]  # value of each class in the label files, 0 to 255
    ignored_ids: Collection[int] = ()  # neither trained on nor scored, as 255 is
    categories: Sequence[str] = ()  # group of each class, for scores by group; may be empty
    # Colours of label files by label id, of ignored ids as well; None: those of the classes.
    label_colors: Mapping[int, Sequence[int]] | None = None
    # Classes of another data set that are parts of each, the main one first; not in checkpoints.
    related: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def to_train_ids(self) -> np.ndarray:
        """Return the trainId of each of 256 label ids, uint8; 255 = ignore, or UNKNOWN."""
        table = np.full(256, UNKNOWN, np.uint8)
        table[[IGNORE_INDEX, *self.ignored_ids]] = IGNORE_INDEX
        table[list(self.label_ids)] = range(len(self))
        return table

    def known_ids(self) -> set[int]:
        """Return the label ids of all classes, and those that are stated to be ignored."""
        return {*self.label_ids, *self.ignored_ids}

    def stated_colors(self) -> dict[int, Color]:
        """Return the colours of label files by label id, ignored ones as well."""
        colors = self.label_colors
        if colors is None:
            colors = dict(zip(self.label_ids, self.colors, strict=True))
        return {label_id: tuple(color) for label_id, color in colors.items()}

    def ids_by_color(self) -> dict[Color, int]:
        """Return the label id of each stated colour, except for those of several classes."""
        stated, train_ids = self.stated_colors(), self.to_train_ids()
        shared: dict[Color, set[int]] = {}
        for label_id, color in stated.items():
            shared.setdefault(color, set()).add(int(train_ids[label_id]))
        return {color: label_id for label_id, color in stated.items() if len(shared[color]) == 1}

    def to_checkpoint(self) -> dict[str, Any]:
        """Return the classes as plain values for a checkpoint."""
        return {
            "num_classes": len(self),
            "class_names": list(self.names),
            "colors": [list(color) for color in self.colors],
            "label_ids": list(self.label_ids),
            "ignored_ids": sorted(self.ignored_ids),
            "categories": list(self.categories),
            "label_colors": self.label_colors
            and {label_id: list(color) for label_id, color in self.label_colors.items()},
        }

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> "Classes":
        return cls(
            checkpoint["class_names"],
            checkpoint["colors"],
            checkpoint["label_ids"],
            checkpoint.get("ignored_ids", ()),
            checkpoint.get("categories", ()),
            # {}, not None: older checkpoints do not tell stated colours from those that the program
            # picked, so their label files are not read by colour.
            checkpoint.get("label_colors", {}),
        )


class Segmentation(Dataset):
    """Pairs of image and label of one split, in the order of their file names.

    A data set derives from this class, defines CLASSES, SPLITS and TRAIN_ON, and lists its `files`.
    An item is the image, 3 x H x W, uint8, RGB, in channels_last format, and the label, H x W,
    uint8, trainIds with 255 = ignore; all of it where the split has no labels.

    Args:
        root: folder of the data set.
        split: one of SPLITS.
        classes: used instead of CLASSES.
        height: height that images are resized to, in proportion; None keeps their size.
        resize_labels: resize labels with their images.
        need_labels: raise an error if a label is missing.
    """

    CLASSES: ClassVar[Classes | None] = None
    SPLITS: ClassVar[Sequence[str]] = ("train", "val", "test")
    # Where the names of results begin in the parts of an image's path; -1 is its name alone.
    DEPTH: ClassVar[int] = -1
    # The splits to train on, by the name of the choice; the first is the default.
    TRAIN_ON: ClassVar[Mapping[str, Sequence[str]]] = {
        "train": ["train"],
        "trainval": ["train", "val"],
    }

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "train",
        classes: Classes | None = None,
        height: int | None = None,
        resize_labels: bool = True,
        need_labels: bool = True,
    ) -> None:
        if split not in self.SPLITS:
            raise ValueError(f"split is {split!r}, not one of {', '.join(self.SPLITS)}")
        self.root, self.split = os.fspath(root), split
        self.classes = classes or self.CLASSES
        self.height, self.resize_labels = height, resize_labels
        if not os.path.isdir(self.root):
            raise DatasetError(f"{self.root} does not exist: give the folder of the data set")
        self.pairs = self.files()
        labels = [label for _, label in self.pairs if label is not None]
        if need_labels and (missing := [path for path in labels if not os.path.isfile(path)]):
            raise DatasetError(
                f"{len(missing)} of {len(labels)} images of {split} have no label, first missing: "
                f"{missing[0]} (there lies {beside(missing[0])}); unpack the labels again, name "
                "them as their images, or remove the image"
            )
        self._to_train_ids = self.classes.to_train_ids()
        self._known_ids, self._ids_by_color = self.classes.known_ids(), self.classes.ids_by_color()

    def files(self) -> list[FilePair]:
        """Return the paths of each image and its label, which need not exist; None for the label if
        the split has none."""
        raise NotImplementedError

    def label_files(self) -> list[str]:
        """Return all label maps in the folders of the labels, also those without an image."""
        folders = {os.path.dirname(label) for _, label in self.pairs if label is not None}
        return [
            os.path.join(folder, name)
            for folder in sorted(filter(os.path.isdir, folders))
            for name in sorted(os.listdir(folder))
            if is_picture(name, PICTURES - JPEG_SUFFIXES)
        ]

    def keep(self, indices: Iterable[int]) -> None:
        """Keep the pairs of these indices only, in this order."""
        self.pairs = [self.pairs[index] for index in indices]

    def result_name(self, index: int) -> str:
        """Return the path of a predicted label map within a folder of results."""
        path = Path(os.path.relpath(self.pairs[index][0], self.root))
        return Path(*path.parts[self.DEPTH :]).with_suffix(".png").as_posix()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, label_path = self.pairs[index]
        image = read_image(path)
        if label_path is None:
            train_ids = np.full(image.size[::-1], IGNORE_INDEX, np.uint8)
        else:
            train_ids = self.read_train_ids(index)
            check_label_size(label_path, train_ids.shape, image.size[::-1])
        label = torch.from_numpy(train_ids)
        if self.height is not None:
            size = resized_size(image.height, image.width, self.height)
            image = image.resize(size[::-1], Image.Resampling.BILINEAR)
            if self.resize_labels:
                label = resize_label(label, size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), label

    def read_train_ids(self, index: int) -> np.ndarray:
        """Read one label map as trainIds at its full size, H x W, uint8, 255 = ignore."""
        return self.read_ids(index)[1]

    def read_ids(self, index: int) -> tuple[Label, np.ndarray]:
        """Read the label map of a pair: its label ids, and its trainIds; see `read_train_ids`."""
        path = self.pairs[index][1]
        label = read_label(path, self._known_ids, self._ids_by_color)
        train_ids = self._to_train_ids[label.ids]
        if (train_ids == UNKNOWN).any():
            values = np.unique(label.ids[train_ids == UNKNOWN]).tolist()
            also = "" if IGNORE_INDEX in self.classes.label_ids else ", and 255 is ignored"
            hint = "" if self.CLASSES else "; a file of classes may give values (`60 road`)"
            if len(values) > 5:
                hint = "; so many come of resizing or JPEG: export the labels again"
            raise FileError(
                f"{path} holds the label id {', '.join(map(str, values[:5]))}, which is not a "
                f"class of this data set: its label ids are {ranges(sorted(self._known_ids))}"
                f"{also}{hint}",
                "unknown label",
            )
        return label, train_ids


def write_label(file: str | os.PathLike | BinaryIO, prediction: Tensor, classes: Classes) -> None:
    """Write predicted trainIds, H x W, as a PNG of the data set's own label ids."""
    to_label_ids = np.array(classes.label_ids, np.uint8)
    Image.fromarray(to_label_ids[prediction.to("cpu", torch.uint8).numpy()]).save(file, "PNG")


def beside(path: str) -> str:
    """Name some files of the folder of one that is missing, those with a similar name first."""
    stem, folder = Path(path).stem, next(f for f in Path(path).parents if f.is_dir())
    names = [entry.name for entry in folder.iterdir()]
    names.sort(key=lambda name: (stem not in name, name))
    return ", ".join(names[:3]) or "no file"


def resized_size(height: int, width: int, new_height: int) -> Size:
    """Return the height and width of an image that is resized in proportion."""
    return new_height, max(1, round(width * new_height / height))


def resize_label(label: Tensor, size: Size) -> Tensor:
    """Resize labels, ... x H x W, to the nearest pixel of each centre; no new value appears.

    v2.Resize would take the top-left pixel of each block and shift the label against its image.
    """
    planes = label.unsqueeze(-3)
    nearest = InterpolationMode.NEAREST_EXACT
    return F.resize_image(planes, list(size), interpolation=nearest).squeeze(-3)


def ranges(numbers: Iterable[int]) -> str:
    """Shorten ascending numbers: [0, 1, 2, 5] is "0 to 2, 5"."""
    groups = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
