"""Label maps as pictures and videos, and scores as a table."""

import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from itertools import chain

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from utils.files import atomic_write

Colors = Sequence[Sequence[int]]  # RGB, 0 to 255, of each class

# Fonts of common systems, for letters that Pillow's own lacks.
FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc",
    "Arial Unicode.ttf", "arial.ttf", "msyh.ttc", "malgun.ttf",
)  # fmt: skip
# Plain spellings of letters that Unicode does not decompose.
PLAIN = str.maketrans("ØøĐđÐðĦħıŁłŊŋŦŧ", "OoDdDdHhiLlNnTt") | str.maketrans(
    {"ß": "ss", "Æ": "AE", "æ": "ae", "Œ": "OE", "œ": "oe", "Þ": "Th", "þ": "th"}
)


def strip(
    image: Tensor, prediction: Tensor, label: Tensor, colors: Colors, height: int = 256
) -> Tensor:
    """Put an image, 3 x h x w, beside its prediction and its label, both H x W of any size.

    Returns:
        3 x height x 3 width, uint8, on the CPU; `height` is limited by that of the image.
    """
    maps = (paint(classes.cpu().to(torch.uint8), colors) for classes in (prediction, label))
    panels = [image.cpu(), *(pil_to_tensor(picture.convert("RGB")) for picture in maps)]
    height = min(height, image.shape[1])
    size = height, round(image.shape[2] * height / image.shape[1])
    panels = [F.interpolate(panel[None], size, mode="nearest-exact")[0] for panel in panels]
    return torch.cat(panels, dim=2)


def captioned(image: Tensor, caption: str, right: bool) -> Tensor:
    """Add a line below an image, 3 x H x W to 3 x (H + 16) x W, uint8; green if right, else red."""
    picture = to_pil_image(image.cpu())
    page = Image.new("RGB", (picture.width, picture.height + 16), "white")
    page.paste(picture)
    color = "green" if right else "red"
    text, font = drawable(caption, "right" if right else "wrong", 10)
    ImageDraw.Draw(page).text((2, picture.height + 2), text, color, font)
    return pil_to_tensor(page)


def paint(labels: Tensor, colors: Colors) -> Image.Image:
    """Return labels, H x W, uint8, on the CPU, as a picture with a palette; others are black."""
    picture = Image.fromarray(labels.numpy())
    picture.putpalette([value for color in colors for value in color])
    return picture


def overlay(image: Tensor, labels: Tensor, names: Sequence[str], colors: Colors) -> Image.Image:
    """Blend an image, 3 x H x W, with the colours of its labels, H x W; add a legend below."""
    painted = Image.blend(to_pil_image(image), paint(labels, colors).convert("RGB"), 0.5)
    key = legend(tuple(names), tuple(map(tuple, colors)), painted.width)
    page = Image.new("RGB", (max(painted.width, key.width), painted.height + key.height), "white")
    page.paste(painted)
    page.paste(key, (0, painted.height))
    return page


def drawable(text: str, otherwise: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return a text and a font that has all its letters.

    Without such a font the text loses its accents, or if that is not enough, is `otherwise`.
    """
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    parts = unicodedata.normalize("NFKD", text.translate(PLAIN))
    plain = "".join(letter for letter in parts if not unicodedata.combining(letter))
    for candidate in (text, plain):
        for font in _fonts(size):
            missing = bytes(font.getmask("\U0010ffff"))  # the box for what has no glyph
            if all(bytes(font.getmask(letter)) != missing for letter in candidate):
                return candidate, font
    return otherwise, next(_fonts(size))


def _fonts(size: int) -> Iterator[ImageFont.FreeTypeFont]:
    yield ImageFont.load_default(size)
    for name in FONTS:
        with suppress(OSError):  # it is not installed
            yield ImageFont.truetype(name, size)


@lru_cache(maxsize=8)
def legend(names: Sequence[str], colors: Colors, width: int) -> Image.Image:
    """Draw the names of classes beside their colours, in rows of `width` if the names fit."""
    size = min(40, max(11, width // 60))  # of the text, in pixels
    texts = [drawable(name, f"class {number}", size) for number, name in enumerate(names)]
    margin = size // 2
    row = size + margin
    cell = row + margin + max(round(font.getlength(text)) for text, font in texts)
    columns = min(len(names), max(1, (width - margin) // cell))
    rows = -(-len(names) // columns)
    page = Image.new("RGB", (margin + cell * columns, margin + row * rows), "white")
    draw = ImageDraw.Draw(page)
    for number, ((text, font), color) in enumerate(zip(texts, colors, strict=True)):
        left, top = margin + number % columns * cell, margin + number // columns * row
        draw.rectangle((left, top, left + size, top + size), tuple(color), outline="black")
        draw.text((left + size + margin // 2, top + size / 2), text, "black", font, anchor="lm")
    return page


def write_video(
    path: str | os.PathLike, rate: Fraction | int, pictures: Iterable[Image.Image]
) -> int:
    """Write pictures as an MP4 file with PyAV, whole or not at all; if there are none, no file.

    Args:
        rate: pictures per second.
        pictures: pictures; all are padded or cropped to the size of the first.

    Returns:
        The number of pictures.
    """
    import av

    pictures = iter(pictures)
    first = next(pictures, None)
    if first is None:
        return 0
    with atomic_write(path) as unfinished, av.open(str(unfinished), "w") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        # MPEG-4 counts time in at most 65,535 parts of a second.
        stream = container.add_stream(codec, Fraction(rate).limit_denominator(65_535))
        stream.pix_fmt = "yuv420p"  # which needs an even size
        stream.width, stream.height = (length // 2 * 2 for length in first.size)
        count = 0
        for picture in chain([first], pictures):
            picture = picture.crop((0, 0, stream.width, stream.height))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            count += 1
        container.mux(stream.encode())
    return count


def score_table(names: Collection[str], scores: Iterable[float], columns: int = 2) -> str:
    """Return names beside percentages, in columns that are read downwards; '-' for NaN."""
    width = max(map(len, names))
    cells = [
        f"{name:<{width}}  {'-' if score != score else f'{100 * score:.1f}':>5}"
        for name, score in zip(names, scores, strict=True)
    ]
    rows = -(-len(cells) // columns)
    return "\n".join("    ".join(cells[row::rows]).rstrip() for row in range(rows))
