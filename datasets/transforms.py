"""From bytes to what the network takes: normalising, and the two recipes of augmentation.

Images and labels come from their data set as uint8, on whatever device they are kept, and are
augmented there, each image from a seed of its own: where it is done changes nothing of the result.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from datasets.images import IGNORE_INDEX
from datasets.segmentation import resize_label

# A batch as loaders make it: images, labels, and in training the seed of each.
Batch = tuple[list[Tensor], list[Tensor], list[int]]
Pair = tuple[Tensor, Tensor]


def to_floats(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """What makes of uint8 images, N x 3 x H x W, what the network takes.

    Args:
        mean, std: of each RGB channel, in [0, 1], to normalise with; 0 and 1 as published.

    Returns:
        A function that returns float32 on the device, in the memory format of convolutions.
    """
    # Made once: a copy to the GPU in every step would wait for it.
    scale = 1 / (255 * torch.tensor(std, device=device))
    shift = torch.tensor(mean, device=device) / torch.tensor(std, device=device)

    def convert(images: Tensor) -> Tensor:
        images = images.to(device, non_blocking=True)
        floats = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
        # As rows of 3 x W numbers: on a CPU, arithmetic on three at a time takes ten times as long.
        count, _, height, width = floats.shape
        rows = floats.permute(0, 2, 3, 1).view(count, height, 3 * width)
        rows.mul_(scale.repeat(width)).sub_(shift.repeat(width))
        return floats

    return convert


class Augment:
    """Turn a batch from the data set into what training takes.

    Args:
        pair: the recipe: makes of an image, a label and a generator those of `size`.
        jitter: brightness, contrast and saturation change by up to this share.
        label_stride: labels come out this many times smaller, 8 for the encoder's resolution.
        floats: `to_floats`, of the network's normalisation.
        device: that training runs on.
    """

    def __init__(
        self,
        pair: Callable[[Tensor, Tensor, torch.Generator], Pair],
        floats: Callable[[Tensor], Tensor],
        device: torch.device,
        jitter: float = 0.0,
        label_stride: int = 1,
    ) -> None:
        self.pair, self.floats, self.device = pair, floats, device
        self.jitter, self.label_stride = jitter, label_stride

    def __call__(self, images: list[Tensor], labels: list[Tensor], seeds: list[int]) -> Pair:
        """Augment N pairs, each from its seed.

        Args:
            images: 3 x H x W, uint8, each of any size that the recipe takes.
            labels: H x W, uint8, trainIds, 255 = ignore.

        Returns:
            Images, N x 3 x h x w, float32, and labels, N x h x w or the fraction of it that
            label_stride says, rounded up, int64; on the device.
        """
        pairs, factors = [], []
        for image, label, seed in zip(images, labels, seeds, strict=True):
            random = torch.Generator().manual_seed(seed)
            image = image.to(self.device, non_blocking=True)
            label = label.to(self.device, non_blocking=True)
            pairs.append(self.pair(image, label, random))
            factors.append(uniform(1 - self.jitter, 1 + self.jitter, random, 3))
        # Stacked with the three values of a pixel together, as images come and convolutions want.
        batch = torch.stack([image.permute(1, 2, 0) for image, _ in pairs]).permute(0, 3, 1, 2)
        if self.jitter:
            batch = jittered(batch, torch.tensor(factors))
        truth = torch.stack([label for _, label in pairs])
        if self.label_stride > 1:
            smaller = [-(-length // self.label_stride) for length in truth.shape[-2:]]
            truth = resize_label(truth, smaller)
        return self.floats(batch), truth.long()


class Paper:
    """The published recipe: a random flip, and a shift by up to 2 pixels each way."""

    reach = 2

    def __call__(self, image: Tensor, label: Tensor, random: torch.Generator) -> Pair:
        if uniform(0, 1, random)[0] < 0.5:
            image, label = image.flip(-1), label.flip(-1)
        down, right = torch.randint(-self.reach, self.reach + 1, (2,), generator=random).tolist()
        return shifted(image, down, right, 0), shifted(label, down, right, IGNORE_INDEX)


class Strong:
    """A random scale, a random part of that, a random flip.

    Args:
        size: height and width of what comes out.
        scale: the least and the largest scale, drawn evenly by their logarithm.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float] = (0.5, 2.0)) -> None:
        self.size, self.scale = size, scale

    def __call__(self, image: Tensor, label: Tensor, random: torch.Generator) -> Pair:
        low, high = (math.log(factor) for factor in self.scale)
        factor = math.exp(uniform(low, high, random)[0])
        # What is cut out first and resized then: far fewer pixels than the other way around.
        cut = [max(1, round(length / factor)) for length in self.size]
        places = uniform(0, 1, random, 2)
        top, left = (
            round((length - part) * place)
            for length, part, place in zip(label.shape, cut, places, strict=True)
        )
        image = F.crop_image(image, top, left, *cut)
        label = crop_label(label, top, left, *cut)
        if uniform(0, 1, random)[0] < 0.5:
            image, label = image.flip(-1), label.flip(-1)
        image = F.resize_image(image, list(self.size), antialias=True)
        return image, resize_label(label, self.size)


def shifted(planes: Tensor, down: int, right: int, fill: int) -> Tensor:
    """Move planes, ... x H x W, by some pixels; what was beyond them becomes `fill`."""
    height, width = planes.shape[-2:]
    moved = torch.full_like(planes, fill)
    moved[..., max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = (
        planes[..., max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
    )
    return moved


def crop_label(label: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Cut a part out of a label; what lies beyond it is ignored."""
    # Cropping fills with 0, which is a class: so ignore is made 0 for a moment.
    shifted = F.crop_image(label[None] - IGNORE_INDEX, top, left, height, width)[0]
    return shifted + IGNORE_INDEX


def jittered(images: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, contrast and saturation of images, each by factors of its own.

    Args:
        images: N x 3 x H x W, uint8.
        factors: N x 3, of brightness, contrast and saturation; 1 changes nothing.

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
