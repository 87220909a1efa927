"""Label maps and images as pictures, and scores as a table."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image


def colorize(labels: Tensor, colors: Sequence[Sequence[int]]) -> Tensor:
    """Paint classes: H x W integers to 3 x H x W, uint8; what is no class becomes black."""
    palette = torch.zeros(256, 3, dtype=torch.uint8, device=labels.device)
    palette[: len(colors)] = torch.tensor(colors, dtype=torch.uint8, device=labels.device)
    return palette[labels.long()].permute(2, 0, 1)


def strip(
    image: Tensor,
    prediction: Tensor,
    label: Tensor,
    colors: Sequence[Sequence[int]],
    height: int = 256,
) -> Tensor:
    """Image, prediction and truth side by side, as a picture of at most `height` rows.

    Args:
        image: 3 x h x w, uint8.
        prediction, label: H x W, classes; H x W need not be h x w.

    Returns:
        3 x height x 3 width, uint8, on the CPU.
    """
    panels = [image.cpu(), *(colorize(classes, colors).cpu() for classes in (prediction, label))]
    height = min(height, image.shape[1])
    size = height, round(image.shape[2] * height / image.shape[1])
    panels = [F.interpolate(panel[None], size, mode="nearest-exact")[0] for panel in panels]
    return torch.cat(panels, dim=2)


def captioned(image: Tensor, caption: str, right: bool) -> Tensor:
    """A picture with a line of text below it, green where it is right, else red.

    Args:
        image: 3 x H x W, uint8.

    Returns:
        3 x (H + 16) x W, uint8.
    """
    picture = to_pil_image(image.cpu())
    page = Image.new("RGB", (picture.width, picture.height + 16), "white")
    page.paste(picture)
    color = "green" if right else "red"
    ImageDraw.Draw(page).text((2, picture.height + 2), caption, fill=color)
    return pil_to_tensor(page)


def paint(labels: Tensor, colors: Sequence[Sequence[int]]) -> Image.Image:
    """Classes, H x W, uint8, on the CPU, as a picture whose palette is their colours."""
    picture = Image.fromarray(labels.numpy())
    picture.putpalette([part for color in colors for part in color])
    return picture


def overlay(
    image: Tensor,
    labels: Tensor,
    names: Sequence[str],
    colors: Sequence[Sequence[int]],
    strength: float = 0.5,
) -> Image.Image:
    """A picture with its classes painted over it, and a legend of all classes below.

    Args:
        image: 3 x H x W, uint8.
        labels: H x W, uint8, classes, on the CPU.
        strength: of the paint, 0 to 1.
    """
    painted = Image.blend(to_pil_image(image), paint(labels, colors).convert("RGB"), strength)
    key = legend(tuple(names), tuple(map(tuple, colors)), painted.width)
    page = Image.new("RGB", (max(painted.width, key.width), painted.height + key.height), "white")
    page.paste(painted)
    page.paste(key, (0, painted.height))
    return page


@lru_cache(maxsize=8)
def legend(names: Sequence[str], colors: Sequence[Sequence[int]], width: int) -> Image.Image:
    """Names of classes beside their colours, in rows of about `width`, wider where it must be."""
    size = min(40, max(11, width // 60))  # of the text, in pixels
    font, margin = ImageFont.load_default(size), size // 2
    row = size + margin
    cell = row + margin + max(round(font.getlength(name)) for name in names)
    columns = max(1, (width - margin) // cell)
    rows = -(-len(names) // columns)
    page = Image.new(
        "RGB", (margin + cell * min(columns, len(names)), margin + row * rows), "white"
    )
    draw = ImageDraw.Draw(page)
    for number, (name, color) in enumerate(zip(names, colors, strict=True)):
        left, top = margin + number % columns * cell, margin + number // columns * row
        draw.rectangle((left, top, left + size, top + size), tuple(color), outline="black")
        draw.text((left + size + margin // 2, top + size / 2), name, "black", font, anchor="lm")
    return page


def score_table(names: Sequence[str], scores: Sequence[float], columns: int = 2) -> str:
    """Names beside percentages, in columns that are read downwards; '-' for NaN."""
    width = max(map(len, names))
    cells = [
        f"{name:<{width}}  {'-' if score != score else f'{100 * score:.1f}':>5}"
        for name, score in zip(names, scores, strict=True)
    ]
    rows = -(-len(cells) // columns)
    return "\n".join("    ".join(cells[row::rows]).rstrip() for row in range(rows))
