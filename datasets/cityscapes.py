"""Cityscapes: street scenes from 50 cities, 19 classes in 7 categories.

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016.
"""

import os
import warnings
from pathlib import Path
from typing import ClassVar

import torchvision

from datasets.images import IGNORE_INDEX, DatasetError
from datasets.segmentation import Classes, Segmentation

# The official class table, in the order of the trainIds 0 to 18. The license plate's -1 is left
# out: label files store it as 255, which is ignored anyway.
OFFICIAL = [c for c in torchvision.datasets.Cityscapes.classes if c.id >= 0]
TRAINED = sorted((c for c in OFFICIAL if 0 <= c.train_id < IGNORE_INDEX), key=lambda c: c.train_id)

# Published with the data set and known to be broken.
BROKEN_IMAGE = "troisdorf_000000_000073"


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
    LABEL_NAMES = "*_labelIds.png"
    TRAIN_ON: ClassVar = {
        "fine": ["train"],
        "coarse": ["train_coarse", "train_extra"],
        "fine+coarse": ["train", "train_extra"],
    }

    def files(self) -> list[tuple[str, str | None]]:
        coarse = self.split == "train_extra" or self.split.endswith("_coarse")
        split, mode = self.split.removesuffix("_coarse"), "coarse" if coarse else "fine"
        images, labels = f"leftImg8bit/{split}", f"gt{mode.capitalize()}/{split}"
        # Checked first: where a folder is missing, torchvision unpacks archives unasked.
        for folder in (images, labels):
            if not os.path.isdir(os.path.join(self.root, folder)):
                raise DatasetError(
                    f"{self.root} has no folder {folder}: it must hold Cityscapes in its official "
                    "layout, leftImg8bit/<split>/<city> and gtFine/<split>/<city> or "
                    "gtCoarse/<split>/<city>"
                )
        try:
            listed = torchvision.datasets.Cityscapes(self.root, split, mode, "semantic")
        except OSError as error:
            raise DatasetError(
                f"{error.filename} is not a folder that can be read: {images} must hold "
                "a folder for each city, and nothing else"
            ) from error
        pairs = sorted(
            (image, target[0])
            for image, target in zip(listed.images, listed.targets, strict=True)
            if image.endswith("_leftImg8bit.png")
        )
        if any(BROKEN_IMAGE in image for image, _ in pairs):
            warnings.warn(f"{BROKEN_IMAGE} is known to be broken and is left out", stacklevel=3)
            pairs = [pair for pair in pairs if BROKEN_IMAGE not in pair[0]]
        if not pairs:
            raise DatasetError(
                f"{os.path.join(self.root, images)} holds no <city>/*_leftImg8bit.png: "
                "unpack the Cityscapes images there"
            )
        return [(image, None if split == "test" else label) for image, label in pairs]

    def label_files(self) -> list[str]:
        return [path for path in super().label_files() if BROKEN_IMAGE not in path]

    def result_name(self, index: int) -> str:
        """Return the path that the official evaluation and the benchmark server look for."""
        image = Path(self.pairs[index][0])
        name = image.name.replace("_leftImg8bit.png", "_pred_labelIds.png")
        return f"{image.parent.name}/{name}"
