"""Cityscapes: street scenes from 50 cities, 19 classes in 7 categories.

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016.
"""

import os
import warnings
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision import tv_tensors

from datasets.files import (
    IGNORE_INDEX,
    DatasetError,
    check_headers,
    check_sizes,
    read_image,
    read_label,
)

# The official class table, in the order of the trainIds 0 to 18.
TRAIN_CLASSES = sorted(
    (c for c in torchvision.datasets.Cityscapes.classes if 0 <= c.train_id < IGNORE_INDEX),
    key=lambda c: c.train_id,
)
CLASS_NAMES = [c.name for c in TRAIN_CLASSES]
COLORS = [c.color for c in TRAIN_CLASSES]
CATEGORIES = [c.category for c in TRAIN_CLASSES]
TRAIN_ID_TO_LABEL_ID = np.array([c.id for c in TRAIN_CLASSES], np.uint8)

# A labelIds map holds 0 to 33, and 255 where somebody stored the license plate's -1. 254 marks
# values that the table does not know.
UNKNOWN = 254
LABEL_ID_TO_TRAIN_ID = np.full(256, UNKNOWN, np.uint8)
for _class in torchvision.datasets.Cityscapes.classes:
    LABEL_ID_TO_TRAIN_ID[_class.id] = IGNORE_INDEX if _class.train_id < 0 else _class.train_id

# (split, mode) of the parts that each choice of annotations trains on.
ANNOTATIONS = {
    "fine": [("train", "fine")],
    "coarse": [("train", "coarse"), ("train_extra", "coarse")],
    "fine+coarse": [("train", "fine"), ("train_extra", "coarse")],
}

# Published with the data set and known to be broken.
BROKEN_IMAGE = "troisdorf_000000_000073"


class Cityscapes(torchvision.datasets.Cityscapes):
    """Pairs of image and trainId label of one split, in the order of their file names.

    An item is what `transforms` makes of a PIL image and a `tv_tensors.Mask` of trainIds, H x W,
    uint8, 255 = ignore. The labels of "test" are not public: there every pixel is 255, and no
    label file is read.

    Args:
        root: folder that holds leftImg8bit and gtFine or gtCoarse.
        split: train, val or test; with coarse annotations train, train_extra or val.
        mode: fine or coarse annotations.
        transforms: called with image and label together.

    Raises:
        DatasetError: folders are missing or empty, or an image has no label.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "train",
        mode: str = "fine",
        transforms: Callable | None = None,
    ) -> None:
        images, labels = f"leftImg8bit/{split}", f"gt{mode.capitalize()}/{split}"
        # Looked at first: where a folder is missing, torchvision unpacks archives unasked.
        _check_folders(root, (images, labels))
        try:
            super().__init__(root, split, mode, target_type="semantic", transforms=transforms)
        except OSError as error:
            raise DatasetError(
                f"{error.filename} is not a folder that can be read: {images} must hold "
                "a folder for each city, and nothing else"
            ) from error

        pairs = sorted(
            (image, target[0])
            for image, target in zip(self.images, self.targets, strict=True)
            if image.endswith("_leftImg8bit.png")
        )
        if any(BROKEN_IMAGE in image for image, _ in pairs):
            warnings.warn(f"{BROKEN_IMAGE} is known to be broken and is left out", stacklevel=2)
            pairs = [pair for pair in pairs if BROKEN_IMAGE not in pair[0]]
        if not pairs:
            raise DatasetError(
                f"{os.path.join(root, images)} holds no <city>/*_leftImg8bit.png: "
                "unpack the Cityscapes images there"
            )
        self.images = [image for image, _ in pairs]
        self.targets = [[] if split == "test" else [label] for _, label in pairs]
        unlabelled = [t[0] for t in self.targets if t and not os.path.isfile(t[0])]
        if unlabelled:
            raise DatasetError(
                f"{len(unlabelled)} of {len(pairs)} images of {images} have no label, first "
                f"missing: {unlabelled[0]}; unpack the annotations again or remove the image"
            )

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = read_image(self.images[index])
        if self.targets[index]:
            train_ids = self.read_train_ids(index)
            check_sizes(self.targets[index][0], train_ids.shape[::-1], image.size)
        else:
            train_ids = np.full(image.size[::-1], IGNORE_INDEX, np.uint8)
        label = tv_tensors.Mask(torch.from_numpy(train_ids))
        return self.transforms(image, label) if self.transforms else (image, label)

    def read_train_ids(self, index: int) -> np.ndarray:
        """Read one label map as trainIds at its full size, H x W, uint8, 255 = ignore.

        Raises:
            DatasetError: the file cannot be read or holds an id outside the official table.
        """
        path = self.targets[index][0]
        label_ids = read_label(path)
        train_ids = LABEL_ID_TO_TRAIN_ID[label_ids]
        if (train_ids == UNKNOWN).any():
            values = np.unique(label_ids[train_ids == UNKNOWN]).tolist()
            raise DatasetError(
                f"{path} holds the label id {', '.join(map(str, values[:5]))}, which Cityscapes "
                "does not have: its label ids are 0 to 33"
            )
        return train_ids


def check_files(*parts: Cityscapes) -> None:
    """Look at the header of every file, without decoding pixels, before a long run.

    Raises:
        DatasetError: names the first file that is missing, damaged, of another size than its
            image, or of another size than the other images.
    """
    pairs = [
        (image, target[0] if target else None)
        for part in parts
        for image, target in zip(part.images, part.targets, strict=True)
    ]
    check_headers(pairs)


def training_parts(root: str | os.PathLike, annotations: str) -> list[Cityscapes]:
    """The data sets that training on `annotations` (a key of ANNOTATIONS) reads, in order."""
    return [Cityscapes(root, split, mode) for split, mode in ANNOTATIONS[annotations]]


def _check_folders(root: str | os.PathLike, folders: Iterable[str]) -> None:
    if not os.path.isdir(root):
        raise DatasetError(f"{root} does not exist: give the folder that holds leftImg8bit")
    for folder in folders:
        if not os.path.isdir(os.path.join(root, folder)):
            raise DatasetError(
                f"{root} has no folder {folder}: it must hold Cityscapes in its official layout, "
                "leftImg8bit/<split>/<city> and gtFine/<split>/<city> or gtCoarse/<split>/<city>"
            )
