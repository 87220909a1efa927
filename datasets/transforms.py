"""From uint8 images to the network's input: normalisation, and two recipes of augmentation.

Images are augmented on the device of the training, each from its own seed: the same on any device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from datasets.images import IGNORE_INDEX, Size
from datasets.loading import Batch
from datasets.segmentation import resize_label
from datasets.soft_labels import STRIDE

TensorPair = tuple[Tensor, Tensor]
Tensors = Sequence[Tensor]


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


class Window(NamedTuple):
    """The part of an image that becomes a crop; it may reach beyond the image."""

    top: int
    left: int
    height: int
    width: int
    flipped: bool  # after it is cut out


class Recipe(Protocol):
    """How images are augmented before their colours are: a window is drawn, then cut out."""

    def draw(self, label: Tensor, random: torch.Generator) -> Window:
        """Choose the window of an image, given its label, H x W."""

    def __call__(self, images: Tensors, labels: Tensors, windows: Sequence[Window]) -> TensorPair:
        """Cut windows of images, 3 x H x W, and labels, H x W, to one size, and stack them."""


@dataclass
class Augment:
    """Augment a batch and normalise its images, on the device."""

    recipe: Recipe
    normalize: Callable[[Tensor], Tensor]  # turns images, 0 to 255, into the input of the network
    device: torch.device
    jitter: float = 0.0  # largest relative change of brightness, contrast and saturation
    noise: float = 0.0  # largest standard deviation of grey noise, of 255 levels
    label_stride: int = 1  # by which labels are made smaller; 8 for the encoder's resolution

    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        """Augment a batch.

        Returns:
            Images, N x 3 x h x w, float32; labels, N x h x w, int64, where h and w are divided by
            label_stride and rounded up; and what `crop_soft_labels` returns, if the batch has soft
            labels.
        """
        randoms = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
        images, labels, soft_labels = (
            [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            for tensors in (batch.images, batch.labels, batch.soft_labels)
        )
        windows = [self.recipe.draw(*pair) for pair in zip(labels, randoms, strict=True)]
        sizes = [label.shape for label in labels]
        images, labels = self.recipe(images, labels, windows)
        size = labels.shape[1:]
        soft = [crop_soft_labels(soft_labels, sizes, windows, size)] if soft_labels else []
        if self.jitter:
            limits = 1 - self.jitter, 1 + self.jitter
            factors = torch.tensor([uniform(*limits, random, 3) for random in randoms])
            images = jittered(images, factors)
        if self.noise:
            images = noisy(images, randoms, self.noise)
        if self.label_stride > 1:
            smaller = [-(-length // self.label_stride) for length in labels.shape[-2:]]
            labels = resize_label(labels, smaller)
        return self.normalize(images), labels.long(), *soft


class Paper:
    """The published recipe: a random flip, and a shift by up to 2 pixels in each direction."""

    max_shift = 2

    def draw(self, label: Tensor, random: torch.Generator) -> Window:
        flipped = uniform(0, 1, random)[0] < 0.5
        limits = -self.max_shift, self.max_shift + 1
        down, right = torch.randint(*limits, (2,), generator=random).tolist()
        return Window(-down, right if flipped else -right, *label.shape, flipped)

    def __call__(self, images: Tensors, labels: Tensors, windows: Sequence[Window]) -> TensorPair:
        # Labels go the same way as images, as planes of one channel.
        labels = [label[None] for label in labels]
        return moved(images, windows, 0), moved(labels, windows, IGNORE_INDEX)[:, 0]


@dataclass
class Strong:
    """A random scale, log-uniform from `scale`, a random crop of `size`, and a random flip."""

    size: Size
    scale: tuple[float, float] = (0.5, 2.0)

    def draw(self, label: Tensor, random: torch.Generator) -> Window:
        low, high = (math.log(factor) for factor in self.scale)
        factor = math.exp(uniform(low, high, random)[0])
        window = [max(1, round(length / factor)) for length in self.size]
        shares = uniform(0, 1, random, 2)
        corner = (
            round((length - part) * share)
            for length, part, share in zip(label.shape, window, shares, strict=True)
        )
        return Window(*corner, *window, uniform(0, 1, random)[0] < 0.5)

    def __call__(self, images: Tensors, labels: Tensors, windows: Sequence[Window]) -> TensorPair:
        together = zip(images, labels, windows, strict=True)
        # Images of one size in a row are cropped together.
        parts = [
            cropped(*zip(*same_size, strict=True), self.size)
            for _, same_size in groupby(together, lambda item: item[1].shape)
        ]
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        return images, labels


def cropped(images: Tensors, labels: Tensors, windows: Sequence[Window], size: Size) -> TensorPair:
    """Cut windows out of images and labels of one size, and resize them.

    Args:
        images, labels: each 3 x H x W and H x W, uint8.
        windows: one for each image.
        size: height h and width w of the results.

    Returns:
        Images, N x 3 x h x w, float32, bilinear, black beyond their borders; and labels, N x h x w,
        uint8, of the nearest pixel, IGNORE_INDEX beyond.
    """
    planes = torch.nn.functional.pad(torch.stack(labels), (0, 1, 0, 1), value=IGNORE_INDEX)
    height, width = labels[0].shape
    rows, columns = centres(windows, size)

    def nearest(places: Tensor, length: int, old: int) -> Tensor:
        pixels = places.div(2 * length, rounding_mode="floor")
        pixels = pixels.masked_fill((pixels < 0) | (pixels >= old), old)  # the padding
        return pixels.to(planes.device, non_blocking=True)

    number = torch.arange(len(windows), device=planes.device)[:, None, None]
    row, column = nearest(rows, size[0], height), nearest(columns, size[1], width)
    labels = planes[number, row[:, :, None], column[:, None]]
    grid = grid_of(rows / (size[0] * height), columns / (size[1] * width), planes.device)
    images = torch.nn.functional.grid_sample(stacked(images).float(), grid, align_corners=False)
    return images, labels


def crop_soft_labels(
    soft_labels: Tensors, sizes: Sequence[Size], windows: Sequence[Window], size: Size
) -> Tensor:
    """Cut windows out of soft labels, as of the images that they belong to.

    Args:
        soft_labels: each C x h x w, uint8, of any resolution.
        sizes: height and width of each image.
        windows: one for each image, in its pixels.
        size: height H and width W of the crops of the images.

    Returns:
        Probabilities, N x C x H/4 x W/4, rounded up, bilinear, float32. They fade to 0 within half
        a pixel of the borders of the images, and are 0 beyond.
    """
    size = [-(-length // STRIDE) for length in size]
    rows, columns = centres(windows, size)
    heights, widths = torch.tensor(sizes)[:, :, None].unbind(1)
    device = soft_labels[0].device
    grid = grid_of(rows / (size[0] * heights), columns / (size[1] * widths), device)
    crops = []
    for _, same_size in groupby(zip(soft_labels, grid, strict=True), lambda pair: pair[0].shape):
        planes, points = map(torch.stack, zip(*same_size, strict=True))
        crop = torch.nn.functional.grid_sample(planes.float(), points, align_corners=False)
        crops.append(crop)
    return torch.cat(crops) / 255


def centres(windows: Sequence[Window], size: Size) -> TensorPair:
    """Return where in an image the centre of each pixel of a crop of `size` h, w comes from.

    Returns:
        Rows, N x h, and columns, N x w, times 2h and 2w: whole numbers, so that labels are the same
        on any device.
    """
    top, left, tall, wide, flipped = torch.tensor(windows)[:, :, None].unbind(1)
    rows = 2 * size[0] * top + (2 * torch.arange(size[0]) + 1) * tall
    steps = 2 * torch.arange(size[1]) + 1
    columns = 2 * size[1] * left + torch.where(flipped > 0, steps.flip(0), steps) * wide
    return rows, columns


def grid_of(rows: Tensor, columns: Tensor, device: torch.device) -> Tensor:
    """Return the points of grid_sample, given places from 0 to 2, the borders of the image."""
    x, y = (places.sub(1).to(device, non_blocking=True) for places in (columns, rows))
    return torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), -1)


def stacked(images: Tensors) -> Tensor:
    """Stack images in channels_last format, as they come and as convolutions want them."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def moved(images: Tensors, windows: Sequence[Window], fill: int) -> Tensor:
    """Cut windows out of images of one size, each C x H x W; pixels from outside become `fill`."""
    margin = max(max(abs(window.top), abs(window.left)) for window in windows)
    parts = []
    padded = torch.nn.functional.pad(stacked(images), [margin] * 4, value=fill)
    for image, (top, left, height, width, flipped) in zip(padded, windows, strict=True):
        top, left = margin + top, margin + left
        part = image[:, top : top + height, left : left + width]
        parts.append(part.flip(-1) if flipped else part)
    return stacked(parts)


def jittered(images: Tensor, factors: Tensor) -> Tensor:
    """Change the brightness, contrast and saturation of images, N x 3 x H x W, 0 to 255.

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


def noisy(images: Tensor, randoms: Sequence[torch.Generator], noise: float) -> Tensor:
    """Add grey noise: a part of one fixed pattern, chosen at random for each image.

    Args:
        images: N x 3 x H x W, 0 to 255.
        randoms: a generator for each.
        noise: largest standard deviation, of 255 levels; that of an image is drawn evenly up to it.

    Returns:
        N x 3 x H x W, float32, 0 to 255.
    """
    height, width = images.shape[2:]
    pattern = noise_pattern(2 * height, 2 * width, images.device)
    parts, strengths = [], []
    for random in randoms:
        strength, down, right = uniform(0, 1, random, 3)
        top, left = int(down * height), int(right * width)
        parts.append(pattern[top : top + height, left : left + width])
        strengths.append(noise * strength)
    scale = torch.tensor(strengths).to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    return (images + scale * torch.stack(parts)[:, None]).clamp_(0, 255)


@cache
def noise_pattern(height: int, width: int, device: torch.device) -> Tensor:
    """Return normal noise, H x W, float32, made once: to draw it in each step would be slow."""
    return torch.randn(height, width, generator=torch.Generator().manual_seed(0)).to(device)


def uniform(low: float, high: float, random: torch.Generator, count: int = 1) -> list[float]:
    return torch.empty(count).uniform_(low, high, generator=random).tolist()
