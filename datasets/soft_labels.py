"""Soft labels: the class probabilities that a teacher gave to the pixels of training images.

A folder of them holds a .npy file for each image, named by the path of the image in the data set,
and classes.txt. A network that learns from them learns what the teacher knows, also where pictures
have no labels: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.images import DatasetError, FileError
from utils.errors import few

TEMPERATURE = 2.0  # by which logits are divided before the softmax
STRIDE = 4  # of their resolution

CLASSES = "classes.txt"  # names of the classes, one per line


class SoftLabels:
    """The soft labels of the images of a data set, by index.

    They are softened by TEMPERATURE, at 1/STRIDE of the resolution, and rounded to 1/255, so that
    those of a pixel add up to about 1.

    Args:
        folder: written by tools/write_soft_labels.py.
        datadir: folder of the data set.
        images: paths of its images.
        names: names of its classes, C of them.

    Raises:
        DatasetError: the folder has other classes, or a file for none of the images.
    """

    def __init__(
        self, folder: str, datadir: str, images: Sequence[str], names: Sequence[str]
    ) -> None:
        try:
            found = Path(folder, CLASSES).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError as error:
            raise DatasetError(
                f"{folder} has no {CLASSES}: it holds no soft labels, or only a part of them"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{folder}/{CLASSES} cannot be read: {error}") from error
        if found != list(names):
            raise DatasetError(
                f"{folder} has soft labels of other classes than the data set: {few(found)}"
            )
        paths = [soft_label_path(folder, datadir, image) for image in images]
        self.paths = [path if os.path.exists(path) else None for path in paths]
        if not any(self.paths):
            raise DatasetError(f"{folder} has no {paths[0].name}, nor that of any other image")
        self.num_classes = len(found)

    def count(self) -> int:
        """Return the number of images that have soft labels."""
        return sum(path is not None for path in self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Read the soft labels of an image.

        Returns:
            C x h x w, uint8: 255 is a probability of 1. All zeros, and of one pixel, if the image
            has none.

        Raises:
            FileError: the file is damaged.
        """
        path = self.paths[index]
        if path is None:
            return torch.zeros(self.num_classes, 1, 1, dtype=torch.uint8)
        try:
            array = np.load(path)
            fits = array.dtype == np.uint8 and array.ndim == 3 and len(array) == self.num_classes
        except Exception as error:  # what np.load raises on other files is not documented
            raise FileError(f"{path} is damaged: write the soft labels again") from error
        if not fits:
            raise FileError(f"{path} does not hold probabilities of {self.num_classes} classes")
        return torch.from_numpy(array)


def soft_label_path(folder: str, datadir: str, image: str) -> Path:
    """Return the path of the soft labels of an image of a data set."""
    return Path(folder, os.path.relpath(image, datadir) + ".npy")
