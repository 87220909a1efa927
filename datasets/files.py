"""Reading image and label files, and the errors that a user can mend."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

# The label of pixels that are neither trained on nor scored.
IGNORE_INDEX = 255
# PIL modes whose pixels are one 8-bit id; in "P" the id is the palette index.
LABEL_MODES = ("L", "P")
# What PIL raises on a file that is not an image, is cut short, or declares an absurd size.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

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


class DatasetError(Exception):
    """The data set on disk is not usable; the message is one line that says what to do."""


def read_image(path: str) -> Image.Image:
    """Read an image as upright RGB.

    Raises:
        DatasetError: the file is missing, cut short or not an image.
    """
    try:
        with Image.open(path) as image:
            turned = orientation(image)
            return upright(to_rgb(image), turned)
    except IMAGE_ERRORS as error:
        raise unreadable(path, error) from error


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
        DatasetError: the file is missing, cut short, or not an image of one 8-bit channel.
    """
    try:
        with Image.open(path) as label:
            check_label_mode(path, label.mode)
            return np.array(label)
    except IMAGE_ERRORS as error:
        raise unreadable(path, error) from error


def check_headers(pairs: list[tuple[str, str | None]]) -> list[tuple[int, int]]:
    """Look at the header and the end of every file of a data set, without decoding pixels.

    Args:
        pairs: paths of each image and its label, None where there is no label.

    Returns:
        Height and width of each image.

    Raises:
        DatasetError: names the first file that is missing, not an image or cut short, or a label
            of another size than its image or of a wrong mode.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        checked = pool.map(_check_pair, pairs)
        sizes = list(tqdm(checked, "checking files", len(pairs), leave=False, disable=None))
    return [(height, width) for width, height in sizes]


def check_images(paths: list[str]) -> None:
    """Look at the header and the end of every image, without decoding pixels.

    Raises:
        DatasetError: names the first file that is missing, not an image or cut short.
    """
    with (
        ThreadPoolExecutor(max_workers=8) as pool,
        tqdm(total=len(paths), desc="checking files", leave=False, disable=None) as bar,
    ):
        for start in range(0, len(paths), 4096):  # at a time: ImageNet has over a million
            for _ in pool.map(_read_header, paths[start : start + 4096]):
                bar.update()


def check_label_mode(path: str, mode: str) -> None:
    if mode not in LABEL_MODES:
        raise DatasetError(
            f"{path} has pixels of mode {mode}: give a label map, one 8-bit channel of class ids"
        )


def unreadable(path: str, error: Exception) -> DatasetError:
    """The error that names a file which PIL cannot read."""
    if isinstance(error, FileNotFoundError):
        return DatasetError(f"{path} does not exist: unpack the data set again")
    reason = " ".join(str(error).split())
    return DatasetError(f"{path} cannot be read as an image ({reason}): fetch it again")


def _check_pair(pair: tuple[str, str | None]) -> tuple[int, int]:
    image_path, label_path = pair
    size, _ = _read_header(image_path)
    if label_path is not None:
        label_size, mode = _read_header(label_path)
        check_label_mode(label_path, mode)
        check_sizes(label_path, label_size, size)
    return size


def check_sizes(label_path: str, label_size: tuple[int, int], size: tuple[int, int]) -> None:
    if label_size != size:
        raise DatasetError(
            f"{label_path} is {label_size[0]}x{label_size[1]} but its image is "
            f"{size[0]}x{size[1]}: they must have one size, fetch them again"
        )


def _read_header(path: str) -> tuple[tuple[int, int], str]:
    """Upright width and height, and mode of an image whose beginning and end are in place."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG" and not _ends_with(Path(path), b"IEND"):
                raise OSError("the file is cut short")
            # A JPEG may lack its end, or have more after it, and be read all the same.
            if image.format == "JPEG" and not _ends_with(Path(path), b"\xff\xd9"):
                image.load()
            size = image.size[::-1] if orientation(image) in SIDEWAYS else image.size
            return size, image.mode
    except IMAGE_ERRORS as error:
        raise unreadable(path, error) from error


def _ends_with(path: Path, mark: bytes) -> bool:
    """Whether the last kilobyte of a file holds a mark."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 1024), 2)
        return mark in file.read()
