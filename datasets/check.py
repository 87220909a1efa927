"""Checks for broken files: a quick one before a run, and a deep one that decodes everything.

The quick check reads headers, the checksums of PNGs and the end markers of JPEGs. What only the
deep one finds: damage that decoding shows, a PNG whose pixels end early, and unknown label ids.
"""

import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from datasets.counts import LabelCounts, count_label
from datasets.images import (
    JPEG_END,
    JPEGS,
    BrokenFiles,
    FileError,
    FilePair,
    NothingReadable,
    Size,
    check_label_size,
    jpeg_ends_early,
    open_image,
    read_image,
    upright_size,
)
from datasets.labels import check_label_format
from datasets.loading import call_in_workers
from datasets.segmentation import Segmentation

ZEROS = bytes(512)
# Markers of a JPEG.
HUFFMAN_TABLES, START_OF_SCAN, PROGRESSIVE = 0xC4, 0xDA, (0xC2, 0xC6, 0xCA, 0xCE)

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a file."""

    name: str  # that of a FileError, "image without label", "label without image", "labels"
    path: str
    message: str
    index: int | None = None  # of its image in the data set

    def __str__(self) -> str:
        text = f"{self.name}: {self.path}: {self.message}"
        return text if text.isprintable() else repr(text)[1:-1]  # file names may hold newlines


def check_files(pairs: Sequence[FilePair]) -> list[Size]:
    """Check all images and labels in threads, without decoding pixels.

    Returns:
        Height and width of each image.

    Raises:
        BrokenFiles: files are missing, damaged or cut short, or labels do not fit their images.
    """
    check = partial(_check_pair, pairs)
    with ThreadPool(8) as pool:
        checked = pool.imap(check, range(len(pairs)), chunksize=16)
        found = list(tqdm(checked, "checking files", len(pairs), leave=False, disable=None))
    if broken := [problems[0] for problems, _, _ in found if problems]:
        raise BrokenFiles(
            f"{len(broken)} of {len(pairs)} images or their labels are broken, the first: "
            f"{broken[0].path} {broken[0].message}"
        )
    return [size for _, _, size in found]


def check_file(path: str, label: bool = False) -> Size:
    """Check the header of an image or label, the checksums of a PNG, and the end marker of a JPEG.

    Returns:
        Height and width of the upright image.
    """
    with open_image(path) as image:
        if label:
            check_label_format(image)
        width, height = upright_size(image)
        if image.format in JPEGS:
            _check_jpeg(image.fp)
        image.verify()  # every checksum of a PNG
    return height, width


def _check_jpeg(file: BinaryIO) -> None:
    """Look for the end marker of a JPEG, and for zeros in place of a part of its pixels, as a crash
    may leave them; `file` stands where the pixels begin."""
    start = file.tell()
    file.seek(0)
    data = file.read()
    end = data.find(JPEG_END, start)  # anything may follow the image
    if end < 0:
        raise OSError("the file is cut short")
    if data.find(ZEROS, start, end) >= 0 and any(_first_symbols(data)):
        raise OSError("there are zeros in place of a part of its pixels")


def _first_symbols(data: bytes) -> Iterator[int]:
    """Yield the symbol that zeros stand for in each Huffman table before the pixels of a JPEG.

    Zeros are an even surface if all symbols are 0: no change, and nothing more in the block. Of a
    progressive JPEG, whose tables have other meanings, nothing is yielded.
    """
    position = 2
    while (marker := data[position + 1]) != START_OF_SCAN and marker not in PROGRESSIVE:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        table = position + 4
        while marker == HUFFMAN_TABLES and table + 17 < end:
            yield data[table + 17]
            table += 17 + sum(data[table + 1 : table + 17])
        position = end
        while data[position + 1] == 0xFF:  # fill bytes
            position += 1


def find_problems(
    dataset: Dataset, workers: int = 0, fast: bool = False, counts: LabelCounts | None = None
) -> Iterator[list[Problem]]:
    """Yield the problems of each image of a Segmentation or ImageFolder, and of its label.

    Args:
        fast: do the quick check only.
        counts: what the labels without a problem hold is added to it, unless `fast`.
    """
    check = partial(_check_pair, dataset.pairs, decoded_by=None if fast else dataset)
    for problems, found, _ in call_in_workers(check, len(dataset), workers, "checking files"):
        if counts and found and not problems:
            counts.add(found)
        yield [_without_label(problem, dataset.pairs[problem.index]) for problem in problems]


def _without_label(problem: Problem, pair: FilePair) -> Problem:
    """Report a missing label as a problem of its image, and others as they are."""
    image_path, label_path = pair
    if (problem.name, problem.path) != ("missing", label_path):
        return problem
    message = f"{label_path} {problem.message}"
    return replace(problem, name="image without label", path=image_path, message=message)


def _check_pair(
    pairs: Sequence[FilePair], index: int, decoded_by: Dataset | None = None
) -> tuple[list[Problem], LabelCounts | None, Size | None]:
    """Check an image and its label; decode both if a data set is given to decode labels by.

    Returns:
        What is wrong, what a decoded label holds, and the size of the image.
    """
    image_path, label_path = pairs[index]
    problems, counts = [], None

    def attempt(check: Callable, path: str, *args: Any) -> Any:
        try:
            return check(path, *args)
        except FileError as error:
            message = str(error).removeprefix(path).strip()
            problems.append(Problem(error.problem, path, message, index))

    size = attempt(check_file, image_path)
    if size and decoded_by:
        attempt(decode_fully, image_path, read_image)
    if label_path is not None:
        label_size = attempt(check_file, label_path, True)
        if label_size and size:
            attempt(check_label_size, label_path, label_size, size)
        if label_size and decoded_by:
            counts = attempt(decode_fully, label_path, lambda _: count_label(decoded_by, index))
    return problems, counts, size


def decode_fully(path: str, read: Callable[[str], T]) -> T:
    """Return what `read` reads from a file, after a check that its pixels reach the last row."""
    content = read(path)
    with open_image(path) as image:
        kind = image.format
        if kind in JPEGS and jpeg_ends_early(path):
            raise OSError("its pixels end early")
    if kind == "PNG" and (_over(path, 0) != _over(path, 255)).any():
        raise FileError(f"{path} cannot be read as an image (its pixels end early): fetch it again")
    return content


def _over(path: str, background: int) -> np.ndarray:
    """Decode a PNG over pixels of one value.

    PIL leaves them as they were, without an error, if the compressed data end properly before it.
    """
    with open_image(path) as image:
        image.im = Image.new(image.mode, image.size, background).im
        return np.asarray(image)


def labels_without_image(dataset: Segmentation) -> list[Problem]:
    """Return the label maps of a split that belong to no image."""
    labels = {label for _, label in dataset.pairs}
    if labels == {None}:
        return []
    message = f"{dataset.split} has no image for it"
    lonely = [path for path in dataset.label_files() if path not in labels]
    return [Problem("label without image", path, message) for path in lonely]


def leave_out_broken(dataset: Dataset, workers: int = 0, replace: bool = False) -> list[Problem]:
    """Remove images that are broken, or whose label is, from a data set, and report them.

    Args:
        dataset: a Segmentation or ImageFolder.
        replace: replace each by the next good image, so that the data set keeps its length, as a
            run that is resumed needs it.
    """
    problems = [problem for found in find_problems(dataset, workers) for problem in found]
    broken, indices = {problem.index for problem in problems}, range(len(dataset))
    good = [index for index in indices if index not in broken]
    if not good:
        raise NothingReadable(f"all {len(dataset)} images are broken, the first: {problems[0]}")
    if problems:
        # The first good image follows the last one.
        dataset.keep([good[bisect_left(good, i) % len(good)] for i in indices] if replace else good)
        for problem in problems:
            print(f"left out: {problem}", file=sys.stderr)
        print(f"{len(broken)} broken images are left out", flush=True)
    return problems


def summary(problems: Iterable[Problem]) -> str:
    """Return the number of problems of each name, the most frequent first."""
    counts = Counter(problem.name for problem in problems)
    return ", ".join(f"{name}: {count}" for name, count in counts.most_common())
