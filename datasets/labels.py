"""Reading of label maps: the label id of each pixel, whatever pixels the file has.

Grey pixels are ids. Colours stand for the classes that state them. A palette is either: its colours
decide if all that are used are colours of classes, else its indices are the ids.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.images import IGNORE_INDEX, JPEGS, FileError, open_image

Color = tuple[int, int, int]

# Formats that change pixels, and with them the ids, and compressions of TIFF that do.
LOSSY = (*JPEGS, "JPEG2000", "WEBP", "AVIF")
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "I;16B")
# What PIL multiplies grey values of fewer than 8 bits by, by their raw mode.
SCALES = {"1": 255, "L;2": 85, "L;4": 17}


class Label(NamedTuple):
    """A label map as it is read."""

    ids: np.ndarray  # H x W, uint8
    colors: frozenset[tuple[int, Color]] = frozenset()  # label ids, and the colours they had


def check_label_format(path: str, image: Image.Image) -> None:
    """Raise a FileError if the pixels of an opened image cannot be label ids."""
    if image.format in LOSSY or image.info.get("compression") in LOSSY_TIFF:
        raise FileError(
            f"{path} is a {image.format} file, whose compression changes label ids: export the "
            "labels again, as PNG",
            "lossy label",
        )
    wide = not image.mode.startswith("I") and ";16" in _raw_mode(image)
    if wide or image.mode not in MODES:
        raise FileError(
            f"{path} has pixels of mode {_raw_mode(image) if wide else image.mode}: a label map "
            "has ids of 8 bits, or colours of 3 times 8",
            "wrong mode",
        )


def _raw_mode(image: Image.Image) -> str:
    """Return how the pixels of an image that is not decoded yet are stored, as PIL names it."""
    args = image.tile[0][3] if image.tile else ""
    return str(args[0] if isinstance(args, tuple) else args)


def read_label(
    path: str, known: Collection[int] = range(256), colors: Mapping[Color, int] | None = None
) -> Label:
    """Read a label map.

    Args:
        known: label ids of the data set.
        colors: label ids by colour, as far as the classes state colours.
    """
    with open_image(path) as image:
        check_label_format(path, image)
        scale = SCALES.get(_raw_mode(image), 1)
        if image.mode == "L" and scale == 1:
            return Label(np.array(image))
        if image.mode == "P":
            return _from_palette(path, image, set(known), colors or {})
        if image.mode in ("RGB", "RGBA"):
            return _from_colors(path, image, colors or {})
        values = np.array(image.convert("L") if image.mode in ("1", "LA") else image)
    if values.min() < 0 or values.max() > 255:
        wrong = values.max() if values.max() > 255 else values.min()
        raise FileError(f"{path} holds the label id {wrong}: ids are 0 to 255", "unknown label")
    stored = values // scale
    black_and_white = [(colors or {}).get((grey,) * 3) for grey in (0, 255)]
    if scale == 255 and None not in black_and_white:
        stored = np.array(black_and_white)[stored]
    # Programs that shrink PNGs store 0 and 255 in one bit.
    elif scale > 1 and not _within(stored, known) and _within(values, known):
        stored = values
    return Label(stored.astype(np.uint8))


def _within(values: np.ndarray, known: Collection[int]) -> bool:
    return set(np.unique(values).tolist()) <= set(known)


def _from_palette(
    path: str, image: Image.Image, known: set[int], colors: Mapping[Color, int]
) -> Label:
    indices, used = np.array(image), np.flatnonzero(image.histogram())
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette = np.pad(palette, ((0, max(0, used[-1] + 1 - len(palette))), (0, 0)))
    if len(palette) > 2 and (palette == np.arange(len(palette))[:, None]).all():
        return Label(indices)  # grey, in its own order
    found = [tuple(color) for color in palette[used].tolist()]
    ids = [colors.get(color) for color in found]
    if None in ids:
        greys = _grey_ids(path, palette, used, known)
        moved = any(value not in (None, index) for value, index in zip(ids, used, strict=True))
        if greys is None and moved:
            other = found[ids.index(None)]
            raise FileError(
                f"{path} has a palette in another order than the classes, and {other} in it is "
                "the colour of none: give each class its colour, and ignored ones as well",
                "unknown colour",
            )
        ids = used.tolist() if greys is None else greys
    if ids != used.tolist():
        table = np.zeros(256, np.uint8)
        table[used] = ids
        indices = table[indices]
    return Label(indices, frozenset(zip(ids, found, strict=True)))


def _grey_ids(
    path: str, palette: np.ndarray, used: np.ndarray, known: set[int]
) -> list[int] | None:
    """Return the ids of the indices `used` of a palette if its greys are the ids, else None.

    Programs that shrink PNGs turn grey pixels into such palettes, in any order.
    """
    greys = palette[:, 0]
    if (palette != greys[:, None]).any():
        return None
    levels = set(greys.tolist())
    if levels <= {0, 255} and {0, 1} <= known:  # a mask: 0 and 1
        if greys[0] == 0:
            return None
        if IGNORE_INDEX not in known:
            raise FileError(
                f"{path} has a palette that begins with white: give the classes their colours to "
                "say whether white is 0, 1 or 255",
                "unknown colour",
            )
    known = known | {IGNORE_INDEX} if levels <= known | {IGNORE_INDEX} else known
    ids = greys[used].tolist()
    return ids if known.issuperset(ids) else None


def _from_colors(path: str, image: Image.Image, colors: Mapping[Color, int]) -> Label:
    packed = np.array(image.convert("RGBA")).view("<u4")[..., 0] & 0xFFFFFF  # without alpha
    seen = np.zeros(1 << 24, bool)
    seen[packed] = True
    used = np.flatnonzero(seen)
    found = [(value & 255, value >> 8 & 255, value >> 16) for value in used.tolist()]
    ids = [colors.get(color) for color in found]
    if None in ids and all(len(set(color)) == 1 for color in found):
        ids = [grey for grey, _, _ in found]  # three equal channels of ids
    if None in ids:
        first = found[ids.index(None)]
        more = ids.count(None) - 1
        others = f" and {more} others" if more else ""
        raise FileError(
            f"{path} holds the colour {first}{others}, which {'are' if more else 'is'} of no "
            "class, or of several: state a colour for each class, for ignored ones as well (`void "
            f"{' '.join(map(str, first))}`)",
            "unknown colour",
        )
    table = np.zeros(1 << 24, np.uint8)
    table[used] = ids
    return Label(table[packed], frozenset(zip(ids, found, strict=True)))
