"""Whether all pixels of a PNG or JPEG file are in it, which PIL does not say when it decodes one.

PIL passes over the checksums of a PNG's pixels. Where the compressed data come to an orderly end
before the last row, it leaves the rest as it was, black or grey, without a word.
"""

import re
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from PIL import Image

PNG_START = 8  # bytes before the first chunk
JPEGS = ("JPEG", "MPO")  # MPO: what some cameras write, a JPEG with others behind it

# More passes over the pixels than any program makes: a small file could take hours to decode.
MOST_SCANS = 200

# What PNGs of these modes are filled with beforehand: the labels of hardly any data set hold it.
FILLED = ("L", "P")
UNFILLED = 254

# What is put behind the data of a scan: more than pixels that are coded together take.
OTHER_BYTES = b"\x5a\xa5" * 2048

# What a system that crashed may leave in place of a part of a file.
ZEROS = bytes(512)

# Frames, as JPEG calls them: markers that say its size and channels, and those of several passes.
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
TABLES, START_OF_SCAN, END_OF_IMAGE = 0xC4, 0xDA, 0xD9
LONE_MARKERS = {0x01, *range(0xD0, 0xD9)}  # that nothing belongs to
ANY_MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
# In the data of a scan, 0xff 0x00 is a byte of 0xff, and 0xd0 to 0xd7 are marks to restart at.
AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


def check_before(image: Image.Image, data: bytes) -> None:
    """Check what can be told from a file before its pixels are decoded.

    Args:
        image: opened from the bytes of the file, and not decoded yet.

    Raises:
        OSError: something is missing or damaged.
    """
    if image.format == "PNG":
        _check_chunks(data)
        if image.mode in FILLED:
            image.im = Image.core.fill(image.mode, image.size, UNFILLED)
    elif image.format in JPEGS:
        _check_scans(data)


def check_after(image: Image.Image, data: bytes) -> None:
    """Check that the pixels of an image, which was decoded by now, come from its file to the last.

    What costs as much as to decode the image is only done where the last pixels look like those
    of a file that ends early.

    Raises:
        OSError: the file ends before the last pixel.
    """
    if image.format == "PNG":
        if image.info.get("interlace") or _may_be_unfilled(image):
            check_pixels(image.format, data)
    elif image.format in JPEGS and _is_mid_grey(image):
        check_pixels(image.format, data)


def check_pixels(image_format: str | None, data: bytes) -> None:
    """Check that the data of the pixels reach to the last, by decoding them once more.

    Args:
        image_format: as PIL calls it; any but PNG and JPEG passes.

    Raises:
        OSError: they end early, or hold more than the header says.
    """
    if image_format == "PNG":
        expected, found = _png_length(data), _inflated_length(data)
        if found != expected:
            what = "end before the last row" if found < expected else "hold more than its size"
            raise OSError(f"its pixels {what}")
    elif image_format in JPEGS:
        # The decoder takes what is missing for zeros. Where it never comes to the end, other
        # bytes there make no difference.
        longer, start = [], 0
        for end in [end for *_, end in _scans(data, _frame(data)[2])]:
            longer += [data[start:end], OTHER_BYTES]
            start = end
        if (_pixels(data) != _pixels(b"".join([*longer, data[start:]]))).any():
            raise OSError("its pixels end early")


# PNG


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each chunk, and where its content starts and ends; the last is IEND."""
    start, kind = PNG_START, b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        end = start + 8 + length
        if end + 4 > len(data):
            raise OSError("the file is cut short")
        yield kind, start + 8, end
        start = end + 4


def _check_chunks(data: bytes) -> None:
    """See that a PNG has one header and an end, and that every checksum is right."""
    view = memoryview(data)  # whose parts are no copies
    for kind, start, end in _chunks(data):
        if zlib.crc32(view[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise OSError(f"a checksum of it is wrong, in {kind.decode('latin-1')}")
        if (kind == b"IHDR") != (start == PNG_START + 8):
            raise OSError("its header does not come first, or twice")


def _may_be_unfilled(image: Image.Image) -> bool:
    """Whether the last row of a PNG may be as it was before the image was decoded."""
    width, height = image.size
    if image.mode == "RGB":  # PIL keeps a fourth byte, which is only set with the others
        last = image.crop((width - 1, height - 1, width, height))
        return last.tobytes("raw", "RGBX")[3] == 0
    row = image.crop((0, height - 1, width, height))
    if image.mode in FILLED:
        return row.getextrema() == (UNFILLED, UNFILLED)
    return row.getbbox() is None  # all zero, as PIL makes it


def _png_length(data: bytes) -> int:
    """The bytes that the pixels of a PNG take before they are compressed, as its header says."""
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    bits, color, interlaced = data[24], data[25], data[28]
    bits *= {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    passes = [(0, 0, 1, 1)]  # the first column and row of each, and its steps from there
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)]
        passes += [(0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    total = 0
    for left, top, across, down in passes:
        columns, rows = -((left - width) // across), -((top - height) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _inflated_length(data: bytes) -> int:
    """The bytes of a PNG's pixels, uncompressed and not kept.

    Raises:
        OSError: they are damaged, or not all there.
    """
    inflater, length = zlib.decompressobj(), 0
    for kind, start, end in _chunks(data):
        if kind == b"IDAT":
            left = data[start:end]
            while left and not inflater.eof:
                length += len(inflater.decompress(left, 2**20))
                left = inflater.unconsumed_tail
    if not inflater.eof:
        raise OSError("its pixels are cut short")
    return length


# JPEG

Scan = tuple[bytes, int, int, int, int]  # channels, first and last frequency, bits left, its end


def _check_scans(data: bytes) -> None:
    """See that the scans of a JPEG, which are passes over its pixels, tell all of them."""
    marker, channels, first_scan = _frame(data)
    if data.rfind(b"\xff\xd9", first_scan) < 0:  # PIL does without, where zeros come instead
        raise OSError("the file is cut short")
    progressive = marker in PROGRESSIVE
    hole = data.find(ZEROS, first_scan)
    if hole >= 0 and not progressive and hole < _scan_end(data, first_scan + 2):
        if any(_first_symbols(data)):
            raise OSError("there are zeros in place of a part of its pixels")
    if not progressive and data[first_scan + 4] == len(channels):
        return  # as most are: all in one pass
    missing = {channel: [True] * 64 for channel in channels}  # the frequencies of each
    for count, (of, first, last, bits_left, _) in enumerate(_scans(data, first_scan)):
        if count == MOST_SCANS:
            raise OSError(f"it has more than {MOST_SCANS} scans")
        if not progressive:
            first, last, bits_left = 0, 63, 0
        for channel in of:
            if channel in missing and last < 64:
                missing[channel][first : last + 1] = [bits_left > 0] * (last + 1 - first)
    if any(map(any, missing.values())):
        raise OSError("a part of its scans is missing")


def _frame(data: bytes) -> tuple[int, bytes, int]:
    """The marker of a JPEG's frame, the numbers of its channels, and where its first scan is."""
    marker, channels = 0, b""
    for found, start, end in _segments(data, 2):
        if found in FRAMES:
            marker, channels = found, data[start + 6 : end : 3]
        elif found == START_OF_SCAN:
            return marker, channels, start - 4
    raise OSError("it holds no pixels")


def _first_symbols(data: bytes) -> Iterator[int]:
    """What zeros stand for, in each of the Huffman tables of a JPEG before its first scan.

    If it is 0 in all, for "as before" and "nothing more", zeros are an even surface.
    """
    for marker, start, end in _segments(data, 2):
        if marker == START_OF_SCAN:
            return
        while marker == TABLES and start + 17 < end:
            yield data[start + 17]
            start += 17 + sum(data[start + 1 : start + 17])


def _scans(data: bytes, position: int) -> Iterator[Scan]:
    """The scans of a JPEG, the first of which is at a position."""
    for marker, start, end in _segments(data, position):
        if marker == START_OF_SCAN:
            first, last, bits = data[end - 3 : end]
            yield data[start + 1 : end - 3 : 2], first, last, bits & 15, _scan_end(data, end)


def _segments(data: bytes, position: int) -> Iterator[tuple[int, int, int]]:
    """The marker of each segment of a JPEG up to its end, and where its content starts and ends."""
    while found := ANY_MARKER.search(data, position):
        marker, start = data[found.end() - 1], found.end() + 2
        position = found.end()
        if marker == END_OF_IMAGE:
            return
        if marker in LONE_MARKERS:
            continue
        position += int.from_bytes(data[found.end() : start], "big")
        if not start <= position <= len(data):
            break
        yield marker, start, position
        if marker == START_OF_SCAN:
            position = _scan_end(data, position)
    raise OSError("the file is cut short")


def _scan_end(data: bytes, position: int) -> int:
    """Where the data of a scan end that begin at a position."""
    found = AFTER_SCAN.search(data, position)
    if found is None:
        raise OSError("the file is cut short")
    return found.start()


def _is_mid_grey(image: Image.Image) -> bool:
    """Whether the last pixel of a JPEG is as dark as those are that the file does not tell of."""
    pixel = image.getpixel((image.width - 1, image.height - 1))
    if image.mode == "CMYK":  # whose channels its neighbours may blur
        return any(120 <= value <= 135 for value in pixel)
    if image.mode == "RGB":
        pixel = (299 * pixel[0] + 587 * pixel[1] + 114 * pixel[2] + 500) // 1000
    return 126 <= pixel <= 129


def _pixels(data: bytes) -> np.ndarray:
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image)
