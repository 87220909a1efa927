"""Reading of image files, and the errors of a data set."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from utils.errors import UserError

# PIL refuses images of more than 179 megapixels, and only warns of those above half of that.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

Size = tuple[int, int]  # height and width
FilePair = tuple[str, str | None]  # paths of an image and its label, if there is one

# The label of pixels that are neither trained on nor scored.
IGNORE_INDEX = 255
# The smallest height and width that LEDNet takes.
MIN_SIZE = 64

JPEGS = ("JPEG", "MPO")  # MPO: a JPEG with others behind it, from some cameras
JPEG_END = b"\xff\xd9"
# Put behind the pixels of a JPEG: more than what is coded together takes, and not its padding.
MORE_BYTES = b"\x5a\xa5" * 2048

# How to turn an image of each EXIF orientation upright.
TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DatasetError(UserError):
    """The data set on disk cannot be used; scripts add to its subclasses which option helps."""


class FileError(DatasetError):
    """A file cannot be used; the message begins with its path, `problem` names it in two words.

    Within `open_image`, raise it without the path, which is put in front there.
    """

    def __init__(self, message: str, problem: str = "unreadable") -> None:
        super().__init__(message)
        self.problem = problem


class BrokenFiles(DatasetError):
    """Some files of a data set cannot be used; the message names the first."""


class NothingReadable(DatasetError):
    """None of the images that were tried can be read."""


def read_image(path: str) -> Image.Image:
    """Read an image as upright RGB; whatever is wrong with the file raises a FileError."""
    with open_image(path) as image:
        rgb = decode(image)
        check_jpeg_end(path, image)
        return rgb


def check_jpeg_end(path: str, image: Image.Image) -> None:
    """Raise an OSError if the data of a decoded JPEG end before its last pixel.

    PIL leaves the rest mid-grey, without an error. Only an image that ends so is decoded again.
    """
    if image.format not in JPEGS:
        return
    pixel = image.getpixel((image.width - 1, image.height - 1))
    if image.mode == "RGB":
        pixel = [(299 * pixel[0] + 587 * pixel[1] + 114 * pixel[2]) / 1000]
    channels = [pixel] if isinstance(pixel, int) else pixel
    # The channels of CMYK are stored with less detail, which blurs them.
    if any(120 <= value <= 135 for value in channels) and jpeg_ends_early(path):
        raise OSError("its pixels end early")


def jpeg_ends_early(path: str) -> bool:
    """Whether decoding a JPEG uses bytes that are put behind its data."""
    data = Path(path).read_bytes()
    with Image.open(BytesIO(data)) as image:
        end = data.find(JPEG_END, image.fp.tell())
        pixels = np.asarray(image)
    with Image.open(BytesIO(data[:end] + MORE_BYTES + data[end:])) as longer:
        return bool((pixels != np.asarray(longer)).any())


@contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """Open an image file, to be decoded in the block; any exception there becomes a FileError."""
    try:
        with Image.open(path) as image:
            yield image
    except FileError as error:
        raise FileError(f"{path} {error}", error.problem) from error
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist: unpack it again", "missing") from error
    except Image.DecompressionBombError as error:
        raise FileError(f"{path} declares an absurd size ({error})", "absurd size") from error
    except Exception as error:  # PIL does not document what it raises on damaged files
        reason, advice = " ".join(str(error).split()) or type(error).__name__, ""
        if isinstance(error, UnidentifiedImageError):
            reason, advice = "Pillow does not know its format", ", or convert it to PNG"
        raise FileError(
            f"{path} cannot be read as an image ({reason}): fetch it again{advice}"
        ) from error


def check_label_size(path: str, size: Size, image_size: Size) -> None:
    """Raise a FileError if the size of a label is not that of its image."""
    if size != image_size:
        raise FileError(
            f"{path} is {size[1]}x{size[0]} but its image is {image_size[1]}x{image_size[0]}: "
            "fetch them again",
            "wrong size",
        )


def decode(image: Image.Image) -> Image.Image:
    """Decode an image of any mode to upright 8-bit RGB."""
    rgb, turned = to_rgb(image), orientation(image)
    return rgb.transpose(TO_UPRIGHT[turned]) if turned > 1 else rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image of any mode to 8-bit RGB; transparency is dropped."""
    deep = ";16" in str(getattr(image, "tile", ())[:1])
    if image.mode == "RGB" and not deep:
        image.load()  # convert would copy it
        return image
    if image.mode.startswith(("I", "F")):  # PIL would clip all above 255 to white
        return Image.fromarray(to_8_bits(np.asarray(image))).convert("RGB")
    rgb = image.convert("RGB")
    if deep:  # PIL keeps the upper bytes of colours, which are nearly black if 12 bits are used
        bits = max(high for _, high in rgb.getextrema()).bit_length()
        rgb = rgb.point(lambda value: value << (8 - bits - bits % 2))
    return rgb


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale the grey values of an image to 0 to 255, uint8, by the range that they use.

    Integers keep the upper 8 of the 8, 10, 12, 14, 16, ... bits that the largest one takes. Floats
    are from 0 to 1, or from 0 to 255, if all lie there; else from their least to their greatest.
    """
    if values.dtype.kind != "f":
        bits = int(values.max()).bit_length()
        return (values >> max(0, bits + bits % 2 - 8)).clip(0, 255).astype(np.uint8)
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    if low >= 0 and high <= 255:
        low, high = 0, 1 if high <= 1 else 255
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return np.round((values - low) * 255 / (high - low or 1)).astype(np.uint8)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 (upright) to 8; 1 if it cannot be read."""
    if "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # PIL does not document what it raises on broken EXIF data
        return 1
    return value if value in TO_UPRIGHT else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the width and height of an image when it is turned upright."""
    return image.size[::-1] if orientation(image) >= 5 else image.size
