"""Cityscapes: street scenes from 50 cities, 19 classes in 7 categories.

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016.
"""

import os
import warnings
from pathlib import Path
from typing import ClassVar

import torchvision

from datasets.images import IGNORE_INDEX, DatasetError, FilePair
from datasets.listing import list_pictures, report_left_out
from datasets.segmentation import Classes, Segmentation

# The official class table, in the order of the trainIds 0 to 18. The license plate's -1 is left
# out: label files store it as 255, which is ignored anyway.
OFFICIAL = [c for c in torchvision.datasets.Cityscapes.classes if c.id >= 0]
TRAINED = sorted((c for c in OFFICIAL if 0 <= c.train_id < IGNORE_INDEX), key=lambda c: c.train_id)

# Published with the data set and known to be broken.
BROKEN_IMAGE = "troisdorf_000000_000073"

IMAGE_END = "_leftImg8bit.png"


class Cityscapes(Segmentation):
    """Cityscapes in its official layout; the labels of "test" are not public, and not read.

    Splits that end in "_coarse", and "train_extra", have the coarse annotations.
    """

    CLASSES = Classes(
        names=[c.name for c in TRAINED],
        colors=[c.color for c in TRAINED],
        label_ids=[c.id for c in TRAINED],
        ignored_ids=[c.id for c in OFFICIAL if c not in TRAINED],
        categories=[c.category for c in TRAINED],
    )
    SPLITS = ("train", "val", "test", "train_coarse", "val_coarse", "train_extra")
    TRAIN_ON: ClassVar = {
        "fine": ["train"],
        "coarse": ["train_coarse", "train_extra"],
        "fine+coarse": ["train", "train_extra"],
    }

    def files(self) -> list[FilePair]:
        coarse = self.split == "train_extra" or self.split.endswith("_coarse")
        split, kind = self.split.removesuffix("_coarse"), "gtCoarse" if coarse else "gtFine"
        images, labels = (os.path.join(self.root, name, split) for name in ("leftImg8bit", kind))
        for folder in (images,) if split == "test" else (images, labels):
            if not os.path.isdir(folder):
                raise DatasetError(
                    f"{self.root} has no folder {os.path.relpath(folder, self.root)}: it must hold "
                    "Cityscapes in its official layout, leftImg8bit/<split>/<city> and "
                    "gtFine/<split>/<city> or gtCoarse/<split>/<city>"
                )
        pictures = list_pictures(images)
        found = sorted(path for path in pictures if path.endswith(IMAGE_END))
        report_left_out(len(pictures), found, images, f"Cityscapes has <city>/*{IMAGE_END}")
        if any(BROKEN_IMAGE in path for path in found):
            warnings.warn(f"{BROKEN_IMAGE} is known to be broken and is left out", stacklevel=3)
            found = [path for path in found if BROKEN_IMAGE not in path]
        if not found:
            raise DatasetError(
                f"{images} holds no <city>/*{IMAGE_END}: unpack the Cityscapes images there"
            )
        if split == "test":
            return [(path, None) for path in found]
        end = f"_{kind}_labelIds.png"
        return [
            (path, labels + path[len(images) :].removesuffix(IMAGE_END) + end) for path in found
        ]

    def label_files(self) -> list[str]:
        paths = [path for path in super().label_files() if path.endswith("_labelIds.png")]
        return [path for path in paths if BROKEN_IMAGE not in path]

    def result_name(self, index: int) -> str:
        """Return the path that the official evaluation and the benchmark server look for."""
        image = Path(self.pairs[index][0])
        name = image.name.replace(IMAGE_END, "_pred_labelIds.png")
        return f"{image.parent.name}/{name}"
