"""A network to learn from: ESPNetv2 with the weights that EdgeNets trained on Cityscapes.

Mehta et al., "ESPNetv2: A Light-weight, Power Efficient, and General Purpose Convolutional Neural
Network", CVPR 2019. Code and weights (MIT) are taken from a clone of the authors' repository,
https://github.com/sacmehta/EdgeNets: 0.79 million parameters at s = 2.
"""

import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets import DATASETS
from datasets.cityscapes import Cityscapes
from datasets.segmentation import Classes
from utils.checkpoint import Description, fill, load_checkpoint, load_network
from utils.errors import UserError

WEIGHTS = "model/segmentation/model_zoo/espnetv2/espnetv2_s_2.0_city_1024x512.pth"
OUTPUTS = 20  # the 19 classes of Cityscapes, in their order, and background

# Mean and std of the inputs in [0, 1] that the weights were trained with.
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

STRIDE = 32  # sizes of images must be multiples of it


class Teacher(nn.Module):
    """ESPNetv2 with the classes of a data set, each the sum of its parts in Cityscapes.

    Args:
        network: N x 3 x H x W to N x 20 x H x W, for multiples of STRIDE.
        parts: the outputs that make up each of C classes.
    """

    def __init__(self, network: nn.Module, parts: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.network, self.lengths = network, [len(part) for part in parts]
        self.register_buffer("outputs", torch.tensor(list(chain(*parts))), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Segment images of any size, N x 3 x H x W, RGB normalised by MEAN and STD.

        Returns:
            Logits, N x C x H x W, float32. The probability of a class is the sum over its parts.
        """
        size = images.shape[-2:]
        fitting = [-(-length // STRIDE) * STRIDE for length in size]
        logits = self.network(resize(images, fitting)).float().index_select(1, self.outputs)
        parts = logits.split(self.lengths, 1)
        return resize(torch.stack([part.logsumexp(1) for part in parts], 1), size)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def build_teacher(edgenets: str, dataset: str, classes: Classes) -> Teacher:
    """Build a teacher with the weights of Cityscapes.

    Args:
        edgenets: a clone of EdgeNets.
        dataset: a key of `datasets.DATASETS`.
        classes: its classes; Cityscapes must have their names, or those that the data set relates.

    Raises:
        UserError: it is no such clone, or a class is not in Cityscapes.
    """
    parts = parts_of(classes, related_names(dataset))
    path = Path(edgenets, WEIGHTS)
    if not path.is_file():
        raise UserError(f"{edgenets} is not a clone of EdgeNets: it has no {WEIGHTS}")
    if edgenets not in sys.path:
        sys.path.append(edgenets)
    try:
        module = importlib.import_module("model.segmentation.espnetv2")
    except ImportError as error:
        raise UserError(f"{edgenets} cannot be imported: {error}") from error
    network = module.ESPNetv2Segmentation(Namespace(s=2.0), classes=OUTPUTS, dataset="city")
    fill(network, load_checkpoint(path)["model"], path)
    return Teacher(network, parts)


def related_names(dataset: str) -> Mapping[str, Sequence[str]]:
    """Return what a data set says of its classes in Cityscapes; checkpoints do not tell."""
    classes = DATASETS[dataset].CLASSES if dataset in DATASETS else None
    return classes.related if classes else {}


def parts_of(classes: Classes, related: Mapping[str, Sequence[str]]) -> list[list[int]]:
    """Return the trainIds in Cityscapes of the parts of each class."""
    train_ids = {name: index for index, name in enumerate(Cityscapes.CLASSES.names)}
    parts = [
        [train_ids[part] for part in related.get(name, [name.lower()]) if part in train_ids]
        for name in classes.names
    ]
    if unknown := [name for name, part in zip(classes.names, parts, strict=True) if not part]:
        raise UserError(f"the teacher knows the classes of Cityscapes, not {', '.join(unknown)}")
    return parts


def load_teacher(path: str | os.PathLike, edgenets: str | None) -> tuple[nn.Module, Description]:
    """Load what tools/train_teacher.py trained, or main.py, in evaluation mode on the CPU.

    Args:
        edgenets: a clone of EdgeNets, of which main.py's networks have no need.

    Raises:
        CheckpointError: the file is no checkpoint of either.
        UserError: the clone is missing.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.get("apn_channels") != 0:
        return load_network(path)
    if edgenets is None:
        raise UserError(f"{path} holds a teacher, which needs a clone of EdgeNets")
    about = Description.from_checkpoint(checkpoint, path)
    teacher = build_teacher(edgenets, about.dataset, about.classes)
    fill(teacher, checkpoint["model"], path)
    return teacher.eval(), about
