"""ImageNet, or any set of images in a folder for each class.

    <datadir>/train/<class>/*.JPEG
    <datadir>/val/<class>/*.JPEG

Decoding dominates, so a file is cropped before it is decoded: where the crop is large, a JPEG is
decoded at 1/2, 1/4 or 1/8 of its size, never below the size that the crop is resized to.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datasets.check import check_files, leave_out_broken
from datasets.drawn import draw_once
from datasets.drawn.shapes import make_shapes
from datasets.images import (
    SIDEWAYS,
    Box,
    DatasetError,
    opened,
    orientation,
    to_rgb,
    to_stored,
    upright,
)

# Of ImageNet's RGB values in [0, 1], which everyone normalises with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Validation shows the central part of the shorter side, as 224 of 256 pixels.
CENTRAL_PART = 224 / 256


def open_images(
    args: argparse.Namespace,
    first: Callable[[Callable[[], Any]], Any] = lambda function: function(),
    check: bool = True,
) -> tuple["ImageFolder", "ImageFolder"]:
    """Open and check the images to train and to validate on.

    Args:
        args: dataset ("shapes" are drawn if they are missing), datadir, size, recipe, workers and
            skip_broken.
        first: calls a function in the first process only and returns its result in all.
        check: check every file; a resumed run has done so already.

    Raises:
        UserError: the images cannot be trained on.
    """
    train, val = first(lambda: _find_images(args, check))
    if len(train.classes) < 2:
        raise DatasetError(f"{args.datadir} has only one class: there is nothing to tell apart")
    return train, val


def _find_images(args: argparse.Namespace, check: bool) -> tuple["ImageFolder", "ImageFolder"]:
    if args.dataset == "shapes":
        draw_once(args.datadir, make_shapes, "shapes and textures")
    train = training_images(args.datadir, args.size, augment=args.recipe == "modern")
    val = validation_images(args.datadir, args.size, train.classes)
    if args.skip_broken:
        leave_out_broken(train, args.workers, replace=True)
        leave_out_broken(val, args.workers)
    elif check:
        check_files(train.pairs + val.pairs)
    return train, val


def training_images(datadir: str | Path, size: int, augment: bool) -> "ImageFolder":
    """The images of train as uint8 tensors, 3 x size x size: cropped and flipped at random and,
    if asked, changed by RandAugment."""
    steps = [v2.RandomHorizontalFlip()]
    if augment:
        steps += [v2.ToPILImage(), v2.RandAugment(), v2.PILToTensor()]  # faster on PIL images
    return ImageFolder(datadir, "train", CropLoader(size, random=True), v2.Compose(steps))


def validation_images(datadir: str | Path, size: int, classes: list[str]) -> "ImageFolder":
    """The centres of val's images as uint8 tensors, 3 x size x size.

    Args:
        classes: those that the network is trained on, in the order of its logits.
    """
    return ImageFolder(datadir, "val", CropLoader(size, random=False), classes=classes)


class ImageFolder(torchvision.datasets.ImageFolder):
    """Images of one split, in the order of their names, with the number of their class.

    Args:
        datadir: folder that holds the splits.
        split: "train" or "val".
        loader: reads an image file.
        transform: of what the loader returns.
        classes: the names to number the classes by; without it, the folder's own, sorted.

    Raises:
        DatasetError: the split is missing or holds no class, a class has no image, or is not
            one of `classes`.
    """

    def __init__(
        self,
        datadir: str | Path,
        split: str,
        loader: Callable[[str], Any],
        transform: Callable[[Any], Any] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        root = Path(datadir) / split
        self.known_classes = classes
        if not Path(datadir).is_dir():
            raise DatasetError(f"{datadir} does not exist: give the folder that holds {split}")
        if not root.is_dir():
            raise DatasetError(
                f"{datadir} has no folder {split}: images lie in {split}/<class>/, "
                "for train and val alike"
            )
        super().__init__(str(root), transform, loader=loader, allow_empty=True)
        counts = np.bincount(self.targets, minlength=len(self.classes))
        for name, count in zip(self.classes, counts, strict=True):
            if count == 0 and (root / name).is_dir():
                raise DatasetError(
                    f"{root / name} holds no images ({', '.join(IMG_EXTENSIONS)}): "
                    "put some in, or remove the folder"
                )

    @property
    def pairs(self) -> list[tuple[str, None]]:
        """Paths as a segmentation data set lists them: each image, without a label."""
        return [(path, None) for path, _ in self.samples]

    def keep(self, indices: Iterable[int]) -> None:
        """Go on with the images of these indices alone, in this order."""
        self.samples = self.imgs = [self.samples[index] for index in indices]
        self.targets = [target for _, target in self.samples]

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        found = sorted(entry.name for entry in Path(directory).iterdir() if entry.is_dir())
        if not found:
            raise DatasetError(f"{directory} holds no folder: images lie in {directory}/<class>/")
        classes = self.known_classes or found
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise DatasetError(
                f"{directory} has a class that the network is not trained on ({unknown[0]}): "
                "train and val must have the same classes, remove the folder or rename it"
            )
        return classes, {name: number for number, name in enumerate(classes)}


class CropLoader:
    """Reads the part of an image that a crop shows: 3 x size x size, uint8, RGB, upright.

    Args:
        size: pixels that the crop is resized to, bilinearly with antialiasing.
        random: crop as `RandomResizedCrop` does, else the centre, as Resize and CenterCrop do.
    """

    def __init__(self, size: int, random: bool) -> None:
        self.size = size
        self.random_crop = v2.RandomResizedCrop(size) if random else None

    def __call__(self, path: str) -> Tensor:
        """Read an image file of any mode.

        Raises:
            DatasetError: the file is missing, damaged, cut short, too large or not an image.
        """
        with opened(path) as image:
            box, _ = self.choose(image)
            part = upright(to_rgb(image).crop(box), orientation(image))
        # PyTorch resizes bytes several times as fast as PIL does.
        return F.resize(F.pil_to_tensor(part), [self.size, self.size])

    def choose(self, image: Image.Image) -> tuple[tuple[int, int, int, int], int]:
        """Draw the crop of an image that is not decoded yet, and set what it is decoded at.

        Returns:
            Left, upper, right and lower edge of the crop, in pixels of the image as it will be
            decoded, and how many times smaller than stored that is: 1, or for a JPEG 2, 4, 8.
        """
        if image.format == "TIFF":
            image.load()  # which turns it upright, and may change its size
        left, top, width, height = self._box(image.size, orientation(image))
        # The size of the whole image at which the crop has just the pixels that are asked for.
        full_width, full_height = image.size
        enough = self.size / width, self.size / height
        needed = math.ceil(full_width * enough[0]), math.ceil(full_height * enough[1])
        drafted = image.draft(None, needed)
        smaller = round(full_width / drafted[1][2]) if drafted else 1
        edges = (left, top, left + width, top + height)
        left, top, right, bottom = (round(edge / smaller) for edge in edges)
        return (left, top, max(right, left + 1), max(bottom, top + 1)), smaller

    def _box(self, size: tuple[int, int], turned: int) -> Box:
        """The crop, drawn on the upright image, where it lies in an image as it is stored."""
        width, height = size[::-1] if turned in SIDEWAYS else size
        if self.random_crop is None:
            side = CENTRAL_PART * min(width, height)
            box = (width - side) / 2, (height - side) / 2, side, side
        else:
            crop = self.random_crop.make_params([torch.empty(3, height, width, device="meta")])
            box = tuple(crop[name] for name in ("left", "top", "width", "height"))
        return to_stored(box, (width, height), turned)
