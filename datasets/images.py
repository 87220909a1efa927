"""Reading image and label files, and the errors that a user can mend."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from datasets.whole import check_after, check_before
from utils.errors import UserError

# The label of pixels that are neither trained on nor scored.
IGNORE_INDEX = 255
# The smallest height and width that LEDNet takes.
MIN_SIZE = 64
# PIL modes whose pixels are one 8-bit id; in "P" the id is the palette index.
LABEL_MODES = ("L", "P")
# Larger files are not read at all: no image within PIL's limit of pixels needs so much.
MOST_BYTES = 2**30

Box = tuple[float, float, float, float]  # left, top, width and height, in pixels

# EXIF orientations whose width is the upright image's height.
SIDEWAYS = (5, 6, 7, 8)
# What makes an image of an EXIF orientation upright.
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
    """The data set on disk cannot be used.

    Its subclasses that a script should follow with advice, such as the option that mends them:

        FileError         an image or label is missing, damaged or wrong; raised while training,
                          its name opens the message: leave out broken files
        BrokenFiles       the check at the start found such files: list them, leave them out
        NothingReadable   no image can be read, with broken files left out: list them
        CacheError        the cache cannot be written: another folder, or no cache
        CacheTooLarge     there is too little memory or disk for it: smaller images as well
        CacheLost         it was removed while in use: resume, which writes it again
        DrawingError      the embedded data set cannot be drawn: another folder
    """


class BrokenFiles(DatasetError):
    """Some files of a data set cannot be used; the message names the first."""


class NothingReadable(DatasetError):
    """None of the images that were tried can be read."""


class FileError(DatasetError):
    """One of its files is not usable; the message begins with the path of the file."""

    kind = "unreadable"


class MissingFile(FileError):
    kind = "missing"


class AbsurdSize(FileError):
    kind = "absurd size"


class WrongMode(FileError):
    kind = "wrong mode"


class WrongSize(FileError):
    kind = "wrong size"


class UnknownLabel(FileError):
    kind = "unknown label"


def read_image(path: str) -> Image.Image:
    """Read an image as upright RGB.

    Raises:
        DatasetError: the file is missing, damaged, cut short, too large or not an image.
    """
    with opened(path) as image:
        return upright(to_rgb(image), orientation(image))


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """An image file, to be decoded inside; at the end it is seen to that all of it was there.

    Raises:
        DatasetError: the file is missing, damaged, cut short, too large or not an image.
    """
    with naming(path):
        data = read_bytes(path)
        with Image.open(BytesIO(data)) as image:
            check_declared_size(image)
            check_before(image, data)
            yield image
            check_after(image, data)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Have whatever is raised inside, on reading an image file, name the file.

    Raises:
        DatasetError: instead of any other exception.
    """
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:  # what PIL raises on damaged files is not documented
        raise unreadable(path, error) from error


def read_bytes(path: str) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: it is missing, too large, or no file: to read from a pipe could wait forever.
    """
    check_is_file(path)
    return Path(path).read_bytes()


def check_is_file(path: str) -> None:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is no file")
    if status.st_size > MOST_BYTES:
        raise OSError(f"it has {status.st_size} bytes, which no image needs")


def check_declared_size(image: Image.Image) -> None:
    """Refuse before they are decoded the images that PIL only warns of.

    Raises:
        DecompressionBombError: the image has too many pixels.
    """
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(
            f"{image.width}x{image.height} are more than {Image.MAX_IMAGE_PIXELS} pixels"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image of any mode to 8-bit RGB; transparency is dropped."""
    if image.mode == "RGB":
        image.load()  # to convert it would copy it
        return image
    if image.mode.startswith("I"):  # 16-bit grey, of which PIL would clip all above 255 to white
        high_bytes = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(high_bytes).convert("RGB")
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 (upright) to 8; 1 where none can be read."""
    if "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # what PIL raises on broken EXIF data is not documented
        return 1
    return value if value in TO_UPRIGHT else 1


def upright(image: Image.Image, turned: int) -> Image.Image:
    """Turn an image of an EXIF orientation as it is to be seen."""
    return image.transpose(TO_UPRIGHT[turned]) if turned > 1 else image


def to_stored(box: Box, size: tuple[int, int], turned: int) -> Box:
    """Where a part of an upright image lies in the file, which is turned as EXIF says.

    Args:
        size: width and height of the upright image.
    """
    left, top, width, height = box
    if turned in (2, 3, 6, 7):
        left = size[0] - left - width
    if turned in (3, 4, 7, 8):
        top = size[1] - top - height
    return (top, left, height, width) if turned in SIDEWAYS else (left, top, width, height)


def read_label(path: str) -> np.ndarray:
    """Read a label map as it is stored, H x W, uint8.

    Raises:
        DatasetError: the file is missing, damaged, cut short, too large, or not an image of one
            8-bit channel.
    """
    with opened(path) as label:
        check_label_mode(path, label.mode)
        return np.array(label)


def check_label_mode(path: str, mode: str) -> None:
    if mode not in LABEL_MODES:
        raise WrongMode(
            f"{path} has pixels of mode {mode}: give a label map, one 8-bit channel of class ids"
        )


def unreadable(path: str, error: Exception) -> FileError:
    """The error that names a file which PIL cannot read."""
    if isinstance(error, FileNotFoundError):
        return MissingFile(f"{path} does not exist: unpack the data set again")
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # whose message tells of PIL's objects
        reason = "its content is none that is known"
    if isinstance(error, Image.DecompressionBombError):
        return AbsurdSize(f"{path} declares an absurd size ({reason}): remove it")
    return FileError(f"{path} cannot be read as an image ({reason}): fetch it again")


def check_sizes(label_path: str, label_size: tuple[int, int], size: tuple[int, int]) -> None:
    if label_size != size:
        raise WrongSize(
            f"{label_path} is {label_size[0]}x{label_size[1]} but its image is "
            f"{size[0]}x{size[1]}: they must have one size, fetch them again"
        )


def read_header(path: str) -> tuple[tuple[int, int], str]:
    """Upright width and height, and mode of an image whose beginning and end are in place.

    Raises:
        DatasetError: the file is missing, cut short, too large or not an image.
    """
    with naming(path):
        check_is_file(path)
        with Image.open(path) as image:
            check_declared_size(image)
            if image.format == "PNG" and not _ends_with(Path(path), b"IEND"):
                raise OSError("the file is cut short")
            # A JPEG may lack its end, or have more after it, and be read all the same.
            if image.format == "JPEG" and not _ends_with(Path(path), b"\xff\xd9"):
                image.load()
            size = image.size[::-1] if orientation(image) in SIDEWAYS else image.size
            return size, image.mode


def _ends_with(path: Path, mark: bytes) -> bool:
    """Whether the last kilobyte of a file holds a mark."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 1024), 2)
        return mark in file.read()
