"""ImageNet, or any images in a folder for each class.

    <datadir>/train/<class>/*.JPEG
    <datadir>/val/<class>/*.JPEG

Decoding takes most of the time, so only the crop is decoded, and a JPEG with a large crop at 1/2,
1/4 or 1/8 of its size, but never below the size that the crop is resized to.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datasets.check import check_files, leave_out_broken
from datasets.drawn import draw_once
from datasets.drawn.shapes import make_shapes
from datasets.images import (
    DatasetError,
    check_jpeg_end,
    decode,
    open_image,
    orientation,
    upright_size,
)
from datasets.listing import PICTURES, is_stray, list_pictures, report_left_out
from utils import distributed

# Mean and standard deviation of ImageNet's RGB values in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Validation uses the centre of the shorter side, as in 224 of 256 pixels.
CENTRAL_PART = 224 / 256

TINY_VAL = "val_annotations.txt"  # of Tiny ImageNet: name and class of each image, and a box


def open_images(
    args: argparse.Namespace, check: bool = True
) -> tuple["ImageFolder", "ImageFolder"]:
    """Open and check the images to train and to validate on.

    Args:
        args: dataset, datadir, size, recipe, workers, skip_broken.
        check: check every file; a resumed run has done so already.
    """

    def find() -> tuple[ImageFolder, ImageFolder]:
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

    train, val = distributed.first(find)
    if len(train.classes) < 2:
        raise DatasetError(f"{args.datadir} has only one class: there is nothing to tell apart")
    return train, val


def training_images(datadir: str | Path, size: int, augment: bool) -> "ImageFolder":
    """Open train: uint8 tensors, 3 x size x size, randomly cropped and flipped; `augment` applies
    RandAugment as well."""
    steps = [v2.RandomHorizontalFlip()]
    if augment:
        steps += [v2.ToPILImage(), v2.RandAugment(), v2.PILToTensor()]  # faster on PIL images
    return ImageFolder(datadir, "train", CropLoader(size, random=True), v2.Compose(steps))


def validation_images(datadir: str | Path, size: int, classes: list[str]) -> "ImageFolder":
    """Open val: centre crops as uint8 tensors, 3 x size x size; `classes` are those of train."""
    return ImageFolder(datadir, "val", CropLoader(size, random=False), classes=classes)


class ImageFolder(torchvision.datasets.ImageFolder):
    """Images of one split with their class numbers, in the order of their names; val may have the
    form of Tiny ImageNet's, val/images and a table of the classes.

    An item is what `loader` returns, after `transform`, and the class number, an int.

    Args:
        classes: names of the classes in the order of their numbers; default: sorted folders.
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
        self.class_of: dict[str, str] = {}  # by name of the file, where folders do not tell
        if not Path(datadir).is_dir():
            raise DatasetError(f"{datadir} does not exist: give the folder that holds {split}")
        if not root.is_dir():
            raise DatasetError(f"{datadir} has no folder {split}: images lie in {split}/<class>/")
        super().__init__(str(root), transform, loader=loader, allow_empty=True)
        found = {self.classes[number] for number in self.targets}
        without = (root / name for name in self.classes if name not in found)
        if empty := [folder for folder in without if folder.is_dir()]:
            suffixes = ", ".join(sorted(PICTURES))
            raise DatasetError(f"{empty[0]} holds no images ({suffixes}): add some or remove it")

    @property
    def pairs(self) -> list[tuple[str, None]]:
        """The paths of the images, as those of a Segmentation without labels."""
        return [(path, None) for path, _ in self.samples]

    def keep(self, indices: Iterable[int]) -> None:
        """Keep the images of these indices only, in this order."""
        self.samples = self.imgs = [self.samples[index] for index in indices]
        self.targets = [target for _, target in self.samples]

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        folders = [entry.name for entry in Path(directory).iterdir() if entry.is_dir()]
        found = sorted(name for name in folders if not is_stray(name))
        if not found:
            raise DatasetError(f"{directory} holds no folder: images lie in {directory}/<class>/")
        table = Path(directory, TINY_VAL)
        if found == ["images"] and table.is_file():
            rows = [line.split() for line in table.read_text(encoding="utf-8").splitlines()]
            self.class_of = {row[0]: row[1] for row in rows if len(row) > 1}
            found = sorted(set(self.class_of.values()))
        classes = self.known_classes or found
        if unknown := sorted(set(found) - set(classes)):
            raise DatasetError(
                f"{directory} has a class that the network is not trained on ({unknown[0]}): "
                "train and val must have the same classes, remove the folder or rename it"
            )
        return classes, {name: number for number, name in enumerate(classes)}

    def make_dataset(
        self, directory: str, class_to_idx: dict[str, int], *_args: Any, **_options: Any
    ) -> list[tuple[str, int]]:
        """Return each image of any depth with the number of its class, by class."""
        samples: list[tuple[str, int]] = []
        pictures = list_pictures(directory)
        for path in pictures:
            folder = path[len(directory) + 1 :].partition(os.sep)[0]
            name = self.class_of.get(os.path.basename(path)) if self.class_of else folder
            if name in class_to_idx:
                samples.append((path, class_to_idx[name]))
        report_left_out(len(pictures), samples, directory, "they belong to no class")
        return sorted(samples, key=itemgetter(1))


class CropLoader:
    """Reader of the crop of an image: 3 x size x size, uint8, RGB, upright.

    Args:
        size: height and width that the crop is resized to, bilinearly with antialiasing.
        random: crop as `RandomResizedCrop`; else the centre, as `Resize` and `CenterCrop`.
    """

    def __init__(self, size: int, random: bool) -> None:
        self.size = size
        self.random_crop = v2.RandomResizedCrop(size) if random else None

    def __call__(self, path: str) -> Tensor:
        """Read an image file of any mode."""
        with open_image(path) as image:
            box = self.choose(image)  # before decoding, which then makes less
            part = decode(image).crop(box)
            check_jpeg_end(path, image)
        # PyTorch resizes bytes several times as fast as PIL does.
        return F.resize(F.pil_to_tensor(part), [self.size, self.size])

    def choose(self, image: Image.Image) -> tuple[int, int, int, int]:
        """Draw the crop of an image, and reduce the size that a JPEG will be decoded at.

        Returns:
            Left, upper, right and lower edge of the crop in the decoded image, upright.
        """
        if image.format == "TIFF":
            image.load()  # PIL turns it upright, and may change its size
        full_width, full_height = upright_size(image)
        if self.random_crop is None:
            width = height = CENTRAL_PART * min(full_width, full_height)
            left, top = (full_width - width) / 2, (full_height - height) / 2
        else:
            plane = torch.empty(3, full_height, full_width, device="meta")
            crop = self.random_crop.make_params([plane])
            left, top, width, height = (crop[name] for name in ("left", "top", "width", "height"))
        # The size of the whole image at which the crop has just the pixels that are needed.
        sides = ((full_width, width), (full_height, height))
        needed = [math.ceil(side * (self.size / part)) for side, part in sides]
        stored_width, sideways = image.width, orientation(image) >= 5
        drafted = image.draft(None, tuple(needed[::-1] if sideways else needed))
        smaller = round(stored_width / drafted[1][2]) if drafted else 1
        edges = (left, top, left + width, top + height)
        left, top, right, bottom = (round(edge / smaller) for edge in edges)
        return left, top, max(right, left + 1), max(bottom, top + 1)
