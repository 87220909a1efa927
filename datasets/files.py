"""Reading image and label files, and the errors that a user can mend."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

# The label of pixels that are neither trained on nor scored.
IGNORE_INDEX = 255
# PIL modes whose pixels are one 8-bit id; in "P" the id is the palette index.
LABEL_MODES = ("L", "P")
# What PIL raises on a file that is not an image, is cut short, or declares an absurd size.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DatasetError(Exception):
    """The data set on disk is not usable; the message is one line that says what to do."""


def read_image(path: str) -> Image.Image:
    """Read an image as RGB.

    Raises:
        DatasetError: the file is missing, cut short or not an image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except IMAGE_ERRORS as error:
        raise unreadable(path, error) from error


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


def image_size(path: str) -> tuple[int, int]:
    """Height and width of an image, from its header.

    Raises:
        DatasetError: the file is missing, cut short or not an image.
    """
    (width, height), _ = _read_header(path)
    return height, width


def check_headers(pairs: list[tuple[str, str | None]]) -> None:
    """Look at the header and the end of every file of a data set, without decoding pixels.

    Args:
        pairs: paths of each image and its label, None where there is no label.

    Raises:
        DatasetError: names the first file that is missing, not an image or cut short, a label
            of another size than its image or of a wrong mode, or an image of another size
            than the first.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        checked = pool.map(_check_pair, pairs)
        sizes = list(tqdm(checked, "checking files", len(pairs), leave=False, disable=None))
    for (path, _), size in zip(pairs, sizes, strict=True):
        if size != sizes[0]:
            raise DatasetError(
                f"{path} is {size[0]}x{size[1]} but {pairs[0][0]} is {sizes[0][0]}x{sizes[0][1]}:"
                " all images of a data set must have one size"
            )


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
    """Width, height and mode of an image whose beginning and end are in place."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG" and not _ends_as_png(Path(path)):
                raise OSError("the file is cut short")
            return image.size, image.mode
    except IMAGE_ERRORS as error:
        raise unreadable(path, error) from error


def _ends_as_png(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 1024), 2)
        return b"IEND" in file.read()
