import re
import struct
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from conftest import ROOT
from fuzzing import chunks_of, joined
from PIL import ExifTags, Image, ImageOps

from datasets.images import FileError, orientation, read_image, upright_size
from datasets.labels import read_label

NOISE = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)

# The stored value of a pixel of each mode, and its grey or RGB.
MODES = {
    "1": (1, 255),
    "L": (100, 100),
    "LA": ((100, 7), 100),
    "RGB": ((10, 20, 30), (10, 20, 30)),
    "RGBA": ((10, 20, 30, 7), (10, 20, 30)),
    "I;16": (100 * 256 + 99, 100),
}


@pytest.mark.parametrize("mode", MODES)
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    path = str(tmp_path / "image.png")
    stored, expected = MODES[mode]
    Image.new(mode, (8, 6), stored).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (8, 6)
    assert (np.array(image) == expected).all()


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def save_grey(path, values: np.ndarray) -> str:
    Image.fromarray(values).save(path)
    return str(path)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_files_keep_the_upper_bits_that_are_used(tmp_path, bits):
    values = np.round(RAMP * (2**bits - 1)).astype(np.uint16)
    for suffix in ("png", "tif"):
        pixels = np.array(read_image(save_grey(tmp_path / f"a.{suffix}", values)))
        assert (pixels == (values >> (bits - 8))[..., None]).all()
    # A frame that is a little darker is not brighter.
    darker = np.array(read_image(save_grey(tmp_path / "b.png", values // 16 * 14)))
    assert darker.max() < 2**8 * 15 / 16


def test_32_bit_integers_are_scaled_and_negative_ones_are_black(tmp_path):
    values = np.array([[-5, 0], [2**23, 2**24 - 1]], np.int32)
    pixels = np.array(read_image(save_grey(tmp_path / "a.tif", values)))
    assert pixels[..., 0].tolist() == [[0, 0], [128, 255]]


@pytest.mark.parametrize("scale, shift", [(1, 0), (255, 0), (4000, 0), (2, -1), (3e38, 0)])
@pytest.mark.filterwarnings("error")
def test_floats_are_scaled_by_their_range(tmp_path, scale, shift):
    values = (RAMP * scale + shift).astype(np.float32)
    pixels = np.array(read_image(save_grey(tmp_path / "a.tif", values)))
    assert (pixels[..., 1] == np.arange(256).reshape(16, 16)).all()
    values[3, 4], values[3, 5], values[3, 6] = np.nan, np.inf, -np.inf
    pixels = np.array(read_image(save_grey(tmp_path / "b.tif", values)))
    assert pixels[3, 4:7, 0].tolist() == [0, 255, 0] and pixels[5, 0, 0] == 80
    for value in (np.nan, -7, 7000):
        even = np.full((4, 4), value, np.float32)
        assert (np.array(read_image(save_grey(tmp_path / "c.tif", even))) == 0).all()


def test_16_bit_colours_use_the_upper_bits_too(tmp_path):
    """Of which PIL decodes the upper byte."""
    (tmp_path / "a.png").write_bytes(png_of_16_bits(NOISE.astype(np.uint16) << 4))
    assert (np.array(read_image(str(tmp_path / "a.png"))) == NOISE & 0xF0).all()
    (tmp_path / "b.png").write_bytes(png_of_16_bits(NOISE.astype(np.uint16) << 8))
    assert (np.array(read_image(str(tmp_path / "b.png"))) == NOISE).all()


def png_of_16_bits(values: np.ndarray) -> bytes:
    """Return RGB values, H x W x 3, uint16, as a PNG, which PIL cannot write."""
    file = BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(file, "PNG")
    (name, header), *_, end = chunks_of(file.getvalue())
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = header[:8] + b"\x10" + header[9:]
    return joined([(name, header), (b"IDAT", zlib.compress(rows)), end])


@pytest.mark.parametrize("transparency", [None, 1, b"\xff\x00"])
@pytest.mark.filterwarnings("error")
def test_a_palette_becomes_rgb(tmp_path, transparency):
    path, image = str(tmp_path / "image.png"), Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(path, **({} if transparency is None else {"transparency": transparency}))
    assert (np.array(read_image(path)) == (10, 20, 30)).all()


def test_cmyk_becomes_rgb(tmp_path):
    path = str(tmp_path / "image.jpg")
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(path, quality=100)
    red, green, blue = np.array(read_image(path)).reshape(-1, 3).mean(0)
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("turned", range(1, 9))
def test_images_are_read_upright(tmp_path, turned, suffix):
    """As they are seen, and as their labels are drawn."""
    path, exif = str(tmp_path / f"image.{suffix}"), Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    Image.fromarray(NOISE).save(path, exif=exif)
    with Image.open(path) as stored:
        expected = np.array(ImageOps.exif_transpose(stored))
    assert (np.array(read_image(path)) == expected).all()
    if suffix == "png":
        with Image.open(path) as stored:
            assert upright_size(stored) == expected.shape[1::-1]


@pytest.mark.parametrize("error", [SyntaxError, KeyError, ZeroDivisionError])
def test_broken_exif_counts_as_upright(monkeypatch, error):
    def getexif(_image):
        raise error("broken")

    image = Image.new("RGB", (8, 6))
    image.info["exif"] = b"broken"
    monkeypatch.setattr(Image.Image, "getexif", getexif)
    assert orientation(image) == 1


def test_an_unknown_orientation_counts_as_upright():
    image, exif = Image.new("RGB", (8, 6)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 9
    image.info["exif"] = exif.tobytes()
    assert orientation(image) == 1


@pytest.mark.parametrize("read", [read_image, read_label])
@pytest.mark.parametrize("content", ["half", b"", b"this is no picture", b"\x89PNG\r\n\x1a\n"])
def test_a_broken_file_is_named(tmp_path, read, content):
    path = tmp_path / "broken.png"
    Image.fromarray(NOISE[..., 0]).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if content == "half" else content)
    with pytest.raises(FileError, match=f"{path} cannot be read as an image") as error:
        read(str(path))
    assert error.value.problem == "unreadable"
    assert "object at" not in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(FileError, match=r"gone\.png does not exist") as error:
        read_image("gone.png")
    assert error.value.problem == "missing"


def test_sizes_that_pil_refuses_are_absurd(tmp_path):
    path = tmp_path / "large.png"
    Image.fromarray(NOISE).save(path)
    head, *rest = chunks_of(path.read_bytes())
    path.write_bytes(joined([(b"IHDR", struct.pack(">II", 14000, 14000) + head[1][8:]), *rest]))
    with pytest.raises(FileError, match=r"large\.png declares an absurd size \(Image size"):
        read_image(str(path))


def test_an_image_of_96_megapixels_is_read_without_a_warning(tmp_path):
    """PIL warns of what may fill the memory from 89 megapixels on; cameras take such pictures."""
    path = tmp_path / "large.png"
    Image.new("L", (12_000, 8000), 90).save(path)
    code = f"from datasets.labels import read_label; print(read_label({str(path)!r}).ids.shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("(8000, 12000)\n", "")


def test_nothing_lifts_the_limits_of_pil():
    names = re.compile(r"(MAX_IMAGE_PIXELS|LOAD_TRUNCATED_IMAGES|MAX_TEXT_\w+)\s*=[^=]")
    folders = ("datasets", "examples", "models", "tools", "utils")
    paths = [path for name in folders for path in (ROOT / name).rglob("*.py")]
    paths += ROOT.glob("*.py")
    assert len(paths) > 40
    for path in paths:
        assert not names.search(path.read_text()), path
