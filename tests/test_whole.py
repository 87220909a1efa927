import re
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from fuzzing import ADAM7, chunks_of, joined
from PIL import Image

from datasets import whole
from datasets.images import DatasetError, read_image
from datasets.whole import MOST_SCANS, check_after, check_before, check_pixels

NOISE = np.random.default_rng(0).integers(0, 256, (60, 70, 3)).astype(np.uint8)


def file_of(image: Image.Image | np.ndarray, image_format: str, **options) -> bytes:
    file = BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, image_format, **options
    )
    return file.getvalue()


def check_reading(data: bytes) -> None:
    with Image.open(BytesIO(data)) as image:
        check_before(image, data)
        image.load()
        check_after(image, data)


def check_all(data: bytes) -> None:
    with Image.open(BytesIO(data)) as image:
        image_format = image.format
    check_reading(data)
    check_pixels(image_format, data)


# Nothing is wrong with these


@pytest.mark.parametrize("value", [0, 127, 128, 254, 255])
@pytest.mark.parametrize("size", [(7, 5), (65, 33), (1024, 512)])
def test_one_colour_passes(value, size):
    """Even that of what is missing, and where zeros are all that is stored."""
    for mode in ("L", "RGB", "CMYK"):
        image = Image.new(mode, size, value if mode == "L" else (value,) * len(mode))
        for way in ({}, {"optimize": True}, {"progressive": True}, {"restart_marker_rows": 1}):
            check_all(file_of(image, "JPEG", **way))
    for mode in ("1", "L", "P", "I;16"):
        check_all(file_of(Image.new(mode, size, value), "PNG"))
    for mode in ("LA", "RGB", "RGBA"):
        check_all(file_of(Image.new(mode, size, (value,) * len(mode)), "PNG"))


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (17, 16), (70, 60)])
def test_noise_passes(size):
    noise = NOISE[: size[1], : size[0]]
    for subsampling in (0, 1, 2):
        data = file_of(noise, "JPEG", subsampling=subsampling, quality=95)
        check_all(data)
        check_all(data + bytes(5000))  # some programs fill a block
    check_all(file_of(noise, "PNG"))
    bits = Image.fromarray(noise[..., 0] > 127)
    check_all(file_of(bits, "PNG"))


def test_a_preview_with_an_end_of_its_own_is_passed_over():
    exif = Image.Exif()
    exif[0x9286] = file_of(NOISE[:9, :9], "JPEG") + b"\xff\xda\xff\xd9" + bytes(1000)
    data = file_of(NOISE, "JPEG", exif=exif)
    assert data.count(b"\xff\xd9") > 1
    check_all(data)


# JPEG


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_jpeg_whose_data_end_early(mode, part):
    data = file_of(Image.fromarray(NOISE).convert(mode), "JPEG")
    start = data.index(b"\xff\xda") + 14
    early = data[: start + int(part * (len(data) - start))] + b"\xff\xd9"
    with Image.open(BytesIO(early)) as image:
        assert image.load()  # PIL says nothing
    with pytest.raises(OSError, match="its pixels end early"):
        check_reading(early)


@pytest.mark.parametrize("count", [2, 100, 1000])
def test_a_jpeg_with_zeros_instead_of_its_end(count):
    data = file_of(NOISE, "JPEG", quality=95)
    with pytest.raises(OSError, match="cut short"):
        check_before(Image.open(BytesIO(data)), data[:-count] + bytes(count))


@pytest.mark.parametrize("quality", [50, 97])
def test_a_jpeg_with_a_hole(quality):
    data = file_of(np.tile(NOISE, (4, 4, 1)), "JPEG", quality=quality)
    middle = len(data) // 2
    with pytest.raises(OSError, match=r"zeros|end early"):
        check_reading(data[:middle] + bytes(600) + data[middle + 600 :])


@pytest.mark.parametrize("left", [1, 3, 7])
def test_a_jpeg_that_lacks_some_of_its_scans(left):
    data = file_of(NOISE, "JPEG", progressive=True)
    starts = [place.start() for place in re.finditer(rb"\xff\xda", data)]
    assert len(starts) == 10
    early = data[: starts[left]] + b"\xff\xd9"
    with Image.open(BytesIO(early)) as image:
        assert image.load()
    with pytest.raises(OSError, match="a part of its scans is missing"):
        check_reading(early)


def test_what_only_a_second_reading_finds_of_a_jpeg():
    data = file_of(NOISE, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    early = data[: (last + len(data)) // 2] + b"\xff\xd9"
    check_reading(early)
    with pytest.raises(OSError, match="its pixels end early"):
        check_pixels("JPEG", early)


def test_a_jpeg_with_thousands_of_scans():
    data = file_of(NOISE, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    many = data[:-2] + data[last:-2] * MOST_SCANS + data[-2:]
    with pytest.raises(OSError, match=f"more than {MOST_SCANS} scans"):
        check_before(Image.open(BytesIO(many)), many)


# PNG


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("rows", [0, 1, 30, 59])
def test_a_png_that_ends_early_after_whole_rows(mode, rows):
    image = Image.fromarray(NOISE[..., 0] if mode == "I;16" else NOISE).convert(mode)
    with Image.open(BytesIO(file_of(image, "PNG"))) as stored:
        assert stored.mode == mode
    head, *_, end = chunks_of(file_of(image, "PNG"))
    rest = chunks_of(file_of(image.crop((0, 0, 70, max(1, rows))), "PNG"))[1:-1]
    early = joined([head, *rest, end])
    with pytest.raises(OSError, match=r"end before the last row|cut short|truncated"):
        check_reading(early)


def test_a_png_that_holds_more_than_it_declares():
    head, *rest = chunks_of(file_of(NOISE, "PNG"))
    lower = joined([(b"IHDR", struct.pack(">II", 70, 40) + head[1][8:]), *rest])
    with pytest.raises(OSError, match="hold more than its size"):
        check_pixels("PNG", lower)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 8), (70, 60)])
def test_an_interlaced_png(size):
    """PIL cannot write one."""
    pixels = NOISE[: size[1], : size[0]]
    parts = [pixels[top::down, left::across] for left, top, across, down in ADAM7]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    for length in (len(rows), len(rows) - 1, len(rows) // 2, 0):
        head = struct.pack(">II5B", *size, 8, 2, 0, 0, 1)
        chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows[:length])), (b"IEND", b"")]
        data = joined(chunks)
        if length == len(rows):
            check_all(data)
            assert (np.asarray(Image.open(BytesIO(data))) == pixels).all()
        else:
            with pytest.raises(OSError, match=r"end before|truncated|cut short"):
                check_reading(data)


def test_the_checksums_of_pixels_are_verified():
    """PIL does not; stored without compression, a byte of them is a byte of the image."""
    data = bytearray(file_of(NOISE, "PNG"))
    place = data.index(b"IEND") - 5
    data[place] ^= 1
    with Image.open(BytesIO(data)) as image:
        assert image.load()
    with pytest.raises(OSError, match="a checksum of it is wrong, in IDAT"):
        check_before(Image.open(BytesIO(data)), bytes(data))


def test_one_header_comes_first():
    chunks = chunks_of(file_of(NOISE, "PNG"))
    other = (b"IHDR", struct.pack(">II", 70, 40) + chunks[0][1][8:])
    for parts in ([chunks[0], other, *chunks[1:]], [*chunks[:-1], other, chunks[-1]]):
        data = joined(parts)
        with pytest.raises(OSError, match="its header does not come first, or twice"):
            check_before(Image.open(BytesIO(file_of(NOISE, "PNG"))), data)


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_a_sound_png_is_not_read_twice(monkeypatch, mode):
    """Whatever its last row, or a data set of floors, 0, would be read at half the speed."""
    monkeypatch.setattr(whole, "check_pixels", None)
    for value in (0, 7, 255):
        check_reading(file_of(Image.new("RGB", (30, 20), (value,) * 3).convert(mode), "PNG"))


# Limits


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_pil_only_warns_of_is_refused(tmp_path):
    head, *rest = chunks_of(file_of(NOISE, "PNG"))
    path = tmp_path / "large.png"
    path.write_bytes(joined([(b"IHDR", struct.pack(">II", 9500, 9500) + head[1][8:]), *rest]))
    with pytest.raises(DatasetError, match=r"large\.png declares an absurd size \(9500x9500 are"):
        read_image(str(path))
