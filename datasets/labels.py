"""Reading of label maps: the label id of each pixel, whatever pixels the file has.

Grey pixels are ids. Colours stand for the classes that state them. A palette is either: its colours
decide if all that are used are colours of classes, else its indices are the ids.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.images import IGNORE_INDEX, JPEGS, FileError, open_image

Color = tuple[int, int, int]

# Formats that change pixels, and with them the ids, and compressions of TIFF that do.
LOSSY = (*JPEGS, "JPEG2000", "AVIF")
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "I;16B")
# How grey pixels of up to 8 bits are stored, as PIL names it; I: white is 0.
GREY = re.compile(r"(?P<kind>1|L)(;(?P<bits>[24]?)(?P<inverted>I?)R?)?")


class Label(NamedTuple):
    """A label map as it is read."""

    ids: np.ndarray  # H x W, uint8
    colors: frozenset[tuple[int, Color]] = frozenset()  # its ids and their colours in a palette


def check_label_format(image: Image.Image) -> None:
    """Raise a FileError if the pixels of an image in `open_image` cannot be label ids."""
    lossy = image.format in LOSSY or image.info.get("compression") in LOSSY_TIFF
    if lossy or (image.format == "WEBP" and not _is_lossless_webp(image.filename)):
        raise FileError(
            f"is a {image.format} file, whose compression changes label ids: export the labels "
            "again, as PNG",
            "lossy label",
        )
    wide = not image.mode.startswith("I") and ";16" in _raw_mode(image)
    if wide or image.mode not in MODES:
        raise FileError(
            f"has pixels of mode {_raw_mode(image) if wide else image.mode}: a label map has ids "
            "of 8 bits, or colours of 3 times 8",
            "wrong mode",
        )


def _is_lossless_webp(path: str) -> bool:
    """Whether the first pixels of a WebP are in a chunk of the lossless kind."""
    data, start = Path(path).read_bytes(), 12
    while (kind := data[start : start + 4]) not in (b"VP8L", b"VP8 ", b"ANMF", b""):
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        start += 8 + size + size % 2
    return kind == b"VP8L"


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
        check_label_format(image)
        if image.mode == "P":
            return _from_palette(image, set(known), colors or {})
        if image.mode in ("RGB", "RGBA"):
            return _from_colors(image, colors or {})
        return _from_greys(image, known, colors or {})


def _from_greys(image: Image.Image, known: Collection[int], colors: Mapping[Color, int]) -> Label:
    raw, tile = GREY.fullmatch(_raw_mode(image)), image.tile[:1]
    bilevel, inverted = image.mode == "1", bool(raw and raw["inverted"])
    shown = stored = np.array(image.convert("L") if image.mode in ("1", "LA") else image)
    # PIL scales what has fewer bits than its own pixels, and turns white-is-zero around.
    if inverted:
        stored = 255 - stored
    if raw and (bilevel or raw["bits"]):
        stored = stored // (255 // (2 ** int(raw["bits"] or 1) - 1))
    elif tile and tile[0][0].startswith("ppm"):  # a PGM, and the value that it calls white
        white = 255 if image.mode == "L" else 65535
        stored = np.round(stored * (tile[0][3][1] / white)).astype(int)
    if stored.min() < 0 or stored.max() > 255:
        wrong = stored.max() if stored.max() > 255 else stored.min()
        raise FileError(f"holds the label id {wrong}: ids are 0 to 255", "unknown label")
    black_and_white = [colors.get((grey,) * 3) for grey in (0, 255)]
    if bilevel and None not in black_and_white:
        stored = np.array(black_and_white)[shown // 255]
    # Programs that shrink PNGs store 0 and 255 in one bit.
    elif stored is not shown and not _within(stored, known) and _within(shown, known):
        stored = shown
    elif bilevel and inverted:  # most programs turn a mask around as they write it
        raise FileError(
            "stores white as 0 and black as 1: give the classes their colours to say which one is "
            "white",
            "unknown colour",
        )
    return Label(stored.astype(np.uint8, copy=False))


def _within(values: np.ndarray, known: Collection[int]) -> bool:
    return set(np.unique(values).tolist()) <= set(known)


def _from_palette(image: Image.Image, known: set[int], colors: Mapping[Color, int]) -> Label:
    indices, used = np.array(image), np.flatnonzero(image.histogram())
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    stated = len(palette)
    palette = np.pad(palette, ((0, max(0, used[-1] + 1 - stated)), (0, 0)))
    if len(palette) > 2 and (palette == np.arange(len(palette))[:, None]).all():
        return Label(indices)  # grey, in its own order
    found = [tuple(color) for color in palette[used].tolist()]
    ids, greys = [colors.get(color) for color in found], None
    if None in ids:
        greys = _grey_ids(palette, used, known)
        moved = any(value not in (None, index) for value, index in zip(ids, used, strict=True))
        if greys is None and moved:
            other = found[ids.index(None)]
            raise FileError(
                f"has a palette in another order than the classes, and {other} in it is the "
                "colour of none: give each class its colour, and ignored ones as well",
                "unknown colour",
            )
        ids = used.tolist() if greys is None else greys
    if ids != used.tolist():
        table = np.zeros(256, np.uint8)
        table[used] = ids
        indices = table[indices]
    count = 0 if greys else np.searchsorted(used, stated)  # greys are ids, and no colours
    return Label(indices, frozenset(zip(ids[:count], found[:count], strict=True)))


def _grey_ids(palette: np.ndarray, used: np.ndarray, known: set[int]) -> list[int] | None:
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
                "has a palette that begins with white: give the classes their colours to say "
                "whether white is 0, 1 or 255",
                "unknown colour",
            )
    known = known | {IGNORE_INDEX} if levels <= known | {IGNORE_INDEX} else known
    ids = greys[used].tolist()
    return ids if known.issuperset(ids) else None


def _from_colors(image: Image.Image, colors: Mapping[Color, int]) -> Label:
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
            f"holds the colour {first}{others}, which {'are' if more else 'is'} of no class, or of "
            "several: state a colour for each class, for ignored ones as well (`void "
            f"{' '.join(map(str, first))}`)",
            "unknown colour",
        )
    table = np.zeros(1 << 24, np.uint8)
    table[used] = ids
    return Label(table[packed])
