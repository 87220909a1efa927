"""Image and label from file to tensors: resizing, and the two recipes of augmentation."""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datasets.files import IGNORE_INDEX


def train_transforms(
    augment: str,
    size: tuple[int, int],
    label_stride: int = 1,
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
) -> v2.Compose:
    """Augment a pair of PIL image and `tv_tensors.Mask` at random and make tensors of it.

    Args:
        augment: "paper", the published recipe (resize, flip, shift by up to 2 pixels), or
            "strong" (random scale 0.5 to 2, random crop, flip, colour jitter).
        size: height and width of the images that come out.
        label_stride: labels come out this many times smaller, 8 for the encoder's resolution.
        mean, std: of each RGB channel, in [0, 1], to normalise with; 0 and 1 as published.

    Returns:
        A transform whose results are the image, 3 x H x W, float32, and the label, int64, of
        H x W or the fraction of it, rounded up; 255 = ignore.
    """
    height, _ = size
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE_INDEX}
    if augment == "paper":
        steps = [
            ResizeToHeight(height),
            v2.ToImage(),
            v2.RandomHorizontalFlip(),
            v2.RandomCrop(size, padding=2, fill=fill),  # a shift by up to 2 pixels each way
        ]
    elif augment == "strong":
        steps = [
            ResizeToHeight(height, scale=(0.5, 2.0)),
            v2.ToImage(),
            v2.RandomCrop(size, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
        ]
    else:
        raise ValueError(f"augment is {augment!r}, not 'paper' or 'strong'")
    if label_stride > 1:
        steps.append(ShrinkLabel(label_stride))
    return v2.Compose([*steps, *_to_tensors(mean, std)])


def eval_transforms(
    height: int, mean: Sequence[float] = (0, 0, 0), std: Sequence[float] = (1, 1, 1)
) -> v2.Compose:
    """Resize a PIL image to `height` and make tensors; its label keeps its own full size.

    The results are those of `train_transforms`.
    """
    resize = ResizeToHeight(height, labels=False)
    return v2.Compose([resize, v2.ToImage(), *_to_tensors(mean, std)])


def _to_tensors(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}
    steps = [v2.ToDtype(dtypes, scale=True)]
    if any(m != 0 for m in mean) or any(s != 1 for s in std):
        steps.append(v2.Normalize(list(mean), list(std)))
    return [*steps, v2.ToPureTensor()]


class ResizeToHeight(v2.Transform):
    """Resize to a height, times a factor drawn from `scale`; the width keeps the proportions.

    Images are resized bilinearly with antialiasing. Labels take the nearest pixel to each
    centre: v2.Resize would take the top-left one of each block and shift them against the image.
    """

    def __init__(
        self, height: int, scale: tuple[float, float] = (1.0, 1.0), labels: bool = True
    ) -> None:
        super().__init__()
        self.height, self.scale, self.labels = height, scale, labels

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = F.get_size(flat_inputs[0])
        low, high = self.scale
        new_height = self.height
        if low != high:
            new_height = round(self.height * torch.empty(()).uniform_(low, high).item())
        return {"size": resized_size(height, width, new_height)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return resize_label(inpt, params["size"]) if self.labels else inpt
        return F.resize(inpt, list(params["size"]))


class ShrinkLabel(v2.Transform):
    """Make the label `stride` times smaller, rounded up as strided convolutions do."""

    _transformed_types = (tv_tensors.Mask,)

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return resize_label(inpt, tuple(-(-length // self.stride) for length in inpt.shape[-2:]))


def resized_size(height: int, width: int, new_height: int) -> tuple[int, int]:
    """Height and width of an image after its height was changed in proportion."""
    new_height = max(1, new_height)
    return new_height, max(1, round(width * new_height / height))


def resize_label(label: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize labels, ... x H x W, to the nearest pixel of each centre; no new value appears."""
    planes = label.as_subclass(torch.Tensor).unsqueeze(-3)
    resized = F.resize_image(planes, list(size), interpolation=v2.InterpolationMode.NEAREST_EXACT)
    return tv_tensors.wrap(resized.squeeze(-3), like=label)
