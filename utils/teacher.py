"""A network to learn from: ESPNetv2 with the weights that EdgeNets trained on Cityscapes.

Mehta et al., "ESPNetv2: A Light-weight, Power Efficient, and General Purpose Convolutional Neural
Network", CVPR 2019. Code and weights (MIT) are taken from a clone of the authors' repository,
https://github.com/sacmehta/EdgeNets: 0.79 million parameters at s = 2.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
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
        self.network, self.parts = network, parts

    def forward(self, images: Tensor) -> Tensor:
        """Segment images of any size, N x 3 x H x W, RGB normalised by MEAN and STD.

        Returns:
            Logits, N x C x H x W, float32. The probability of a class is the sum over its parts.
        """
        size = images.shape[-2:]
        fitting = [-(-length // STRIDE) * STRIDE for length in size]
        logits = self.network(resize(images, fitting).contiguous()).float()
        logits = torch.stack([logits[:, part].logsumexp(1) for part in self.parts], 1)
        return resize(logits, size)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def build_teacher(edgenets: str, classes: Classes) -> Teacher:
    """Build a teacher with the weights of Cityscapes.

    Args:
        edgenets: a clone of EdgeNets.
        classes: of the data set; Cityscapes must have their names, or their related ones.

    Raises:
        UserError: it is no such clone, or a class is not in Cityscapes.
    """
    path = Path(edgenets, WEIGHTS)
    if not path.is_file():
        raise UserError(f"{edgenets} is not a clone of EdgeNets: it has no {WEIGHTS}")
    if edgenets not in sys.path:
        sys.path.append(edgenets)
    module = importlib.import_module("model.segmentation.espnetv2")
    config = argparse.Namespace(
        s=2.0, channels=3, num_classes=1000, model_width=224, model_height=224, weights=""
    )
    network = module.ESPNetv2Segmentation(config, classes=OUTPUTS, dataset="city")
    fill(network, load_checkpoint(path).get("model", {}), path)
    return Teacher(network, parts_of(classes))


def parts_of(classes: Classes) -> list[list[int]]:
    """Return the trainIds in Cityscapes of the parts of each class."""
    train_ids = {name: index for index, name in enumerate(Cityscapes.CLASSES.names)}
    parts = [
        [train_ids[part] for part in classes.related.get(name, [name.lower()]) if part in train_ids]
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
        raise UserError(f"{path} holds a teacher: give --edgenets, the clone of EdgeNets")
    about = Description.from_checkpoint(checkpoint, path)
    # Checkpoints do not say which classes are related.
    fixed = DATASETS[about.dataset].CLASSES if about.dataset in DATASETS else None
    teacher = build_teacher(edgenets, fixed or about.classes)
    fill(teacher, checkpoint["model"], path)
    return teacher.eval(), about
