"""From uint8 images to the network's input: normalisation, and two recipes of augmentation.

Images are augmented on the device of the training, each from its own seed: the same on any device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from datasets.images import IGNORE_INDEX, Size
from datasets.loading import Batch
from datasets.segmentation import resize_label

TensorPair = tuple[Tensor, Tensor]


def normalizer(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return a function from uint8 images, N x 3 x H x W, to the input of the network.

    That is float32, in channels_last format, on the device. Mean and standard deviation are those
    of each RGB channel in [0, 1]; 0 and 1, as published, only scale to [0, 1].
    """
    # Made once: a copy to the GPU in every step would wait for it.
    scale = 1 / (255 * torch.tensor(std, device=device))
    shift = torch.tensor(mean, device=device) / torch.tensor(std, device=device)

    def normalize(images: Tensor) -> Tensor:
        images = images.to(device, non_blocking=True)
        images = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
        # As rows of 3 x W numbers: on a CPU, arithmetic on three at a time takes ten times as long.
        count, _, height, width = images.shape
        rows = images.permute(0, 2, 3, 1).view(count, height, 3 * width)
        rows.mul_(scale.repeat(width)).sub_(shift.repeat(width))
        return images

    return normalize


@dataclass
class Augment:
    """Augment a batch and normalise its images, on the device."""

    recipe: Callable[[Tensor, Tensor, torch.Generator], TensorPair]  # augments image and label
    normalize: Callable[[Tensor], Tensor]  # turns uint8 images into the input of the network
    device: torch.device
    jitter: float = 0.0  # largest relative change of brightness, contrast and saturation
    label_stride: int = 1  # by which labels are made smaller; 8 for the encoder's resolution

    def __call__(self, batch: Batch) -> TensorPair:
        """Return images, N x 3 x h x w, float32, and labels, N x h x w, int64, where h and w of the
        labels are divided by label_stride and rounded up."""
        pairs, factors = [], []
        for image, label, seed in zip(batch.images, batch.labels, batch.seeds, strict=True):
            random = torch.Generator().manual_seed(seed)
            image = image.to(self.device, non_blocking=True)
            label = label.to(self.device, non_blocking=True)
            pairs.append(self.recipe(image, label, random))
            factors.append(uniform(1 - self.jitter, 1 + self.jitter, random, 3))
        # Stacked in channels_last format, as images come and convolutions want them.
        images = torch.stack([image.permute(1, 2, 0) for image, _ in pairs]).permute(0, 3, 1, 2)
        if self.jitter:
            images = jittered(images, torch.tensor(factors))
        labels = torch.stack([label for _, label in pairs])
        if self.label_stride > 1:
            smaller = [-(-length // self.label_stride) for length in labels.shape[-2:]]
            labels = resize_label(labels, smaller)
        return self.normalize(images), labels.long()


class Paper:
    """The published recipe: a random flip, and a shift by up to 2 pixels in each direction."""

    max_shift = 2

    def __call__(self, image: Tensor, label: Tensor, random: torch.Generator) -> TensorPair:
        if uniform(0, 1, random)[0] < 0.5:
            image, label = image.flip(-1), label.flip(-1)
        limits = -self.max_shift, self.max_shift + 1
        down, right = torch.randint(*limits, (2,), generator=random).tolist()
        return shifted(image, down, right, 0), shifted(label, down, right, IGNORE_INDEX)


@dataclass
class Strong:
    """A random scale, log-uniform from `scale`, a random crop of `size`, and a random flip."""

    size: Size
    scale: tuple[float, float] = (0.5, 2.0)

    def __call__(self, image: Tensor, label: Tensor, random: torch.Generator) -> TensorPair:
        low, high = (math.log(factor) for factor in self.scale)
        factor = math.exp(uniform(low, high, random)[0])
        # Cropped first, then resized: far fewer pixels than the other way around.
        crop = [max(1, round(length / factor)) for length in self.size]
        shares = uniform(0, 1, random, 2)
        top, left = (
            round((length - part) * share)
            for length, part, share in zip(label.shape, crop, shares, strict=True)
        )
        image = F.crop_image(image, top, left, *crop)
        # crop_image fills with 0, which is a class: uint8 arithmetic makes IGNORE_INDEX the 0.
        label = F.crop_image(label[None] - IGNORE_INDEX, top, left, *crop)[0] + IGNORE_INDEX
        if uniform(0, 1, random)[0] < 0.5:
            image, label = image.flip(-1), label.flip(-1)
        image = F.resize_image(image, list(self.size), antialias=True)
        return image, resize_label(label, self.size)


def shifted(planes: Tensor, down: int, right: int, fill: int) -> Tensor:
    """Shift planes, ... x H x W, by some pixels; the border becomes `fill`."""
    height, width = planes.shape[-2:]
    margin = max(abs(down), abs(right))
    padded = torch.nn.functional.pad(planes, [margin] * 4, value=fill)
    top, left = margin - down, margin - right
    return padded[..., top : top + height, left : left + width]


def jittered(images: Tensor, factors: Tensor) -> Tensor:
    """Change the brightness, contrast and saturation of images, N x 3 x H x W, uint8.

    Args:
        factors: N x 3, one of each for every image; 1 changes nothing.

    Returns:
        N x 3 x H x W, float32, 0 to 255.
    """
    brightness, contrast, saturation = (
        factors.to(images.device, non_blocking=True).view(-1, 3, 1, 1, 1).unbind(1)
    )
    images = (images * brightness).clamp_(max=255)
    mean = F.rgb_to_grayscale_image(images).mean((1, 2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp_(0, 255)
    return torch.lerp(F.rgb_to_grayscale_image(images), images, saturation).clamp_(0, 255)


def uniform(low: float, high: float, random: torch.Generator, count: int = 1) -> list[float]:
    return torch.empty(count).uniform_(low, high, generator=random).tolist()
