"""Broken files of a data set: found before a run, all of them listed, or gone without."""

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import TypeVar

from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from datasets.images import (
    BrokenFiles,
    DatasetError,
    FileError,
    MissingFile,
    NothingReadable,
    check_label_mode,
    check_sizes,
    naming,
    read_bytes,
    read_header,
    read_image,
)
from datasets.loading import reading_loader
from datasets.segmentation import Segmentation
from datasets.whole import check_pixels

T = TypeVar("T")
Size = tuple[int, int]  # width and height


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a file.

    Attributes:
        kind: "unreadable", "absurd size", "wrong size", "wrong mode", "unknown label", "missing",
            "image without label" or "label without image".
        path: of the file.
        what: is wrong with it.
        index: of its image in the data set; None of a label without image.
    """

    kind: str
    path: str
    what: str
    index: int | None = None

    def __str__(self) -> str:
        text = f"{self.kind}: {self.path}: {self.what}"
        return text if text.isprintable() else repr(text)[1:-1]  # one line, whatever the name


# Before a run: headers and ends


def check_files(pairs: Sequence[tuple[str, str | None]]) -> list[tuple[int, int]]:
    """Check the header and the end of every file of a data set, without decoding pixels.

    Args:
        pairs: paths of each image and its label, None if there is no label.

    Returns:
        Height and width of each image.

    Raises:
        BrokenFiles: files are missing, damaged or cut short, or a label differs from its image in
            size or has a wrong mode.
    """
    sizes: list[tuple[int, int]] = []
    errors: list[DatasetError] = []
    with (
        ThreadPoolExecutor(max_workers=8) as pool,
        tqdm(total=len(pairs), desc="checking files", leave=False, disable=None) as bar,
    ):
        for start in range(0, len(pairs), 4096):  # ImageNet has over a million
            for found in pool.map(_size_or_error, pairs[start : start + 4096]):
                (errors if isinstance(found, DatasetError) else sizes).append(found)
                bar.update()
    if errors:
        raise BrokenFiles(
            f"{len(errors)} of {len(pairs)} images or their labels are broken, the first: "
            f"{errors[0]}"
        ) from errors[0]
    return sizes


def _size_or_error(pair: tuple[str, str | None]) -> tuple[int, int] | DatasetError:
    image_path, label_path = pair
    try:
        width, height = size = _header_size(image_path)
        if label_path is not None:
            check_sizes(label_path, _label_header_size(label_path), size)
        return height, width
    except DatasetError as error:
        return error


def _header_size(path: str) -> Size:
    return read_header(path)[0]


def _label_header_size(path: str) -> Size:
    size, mode = read_header(path)
    check_label_mode(path, mode)
    return size


# Everything


def look_through(dataset: Dataset, workers: int = 0, fast: bool = False) -> Iterator[list[Problem]]:
    """Look every image of a data set through, and its label, with a bar.

    Args:
        workers: processes that read.
        fast: headers and ends alone; else all is decoded and every label id looked up.

    Returns:
        What is wrong with each image and its label, in order: mostly nothing.

    Raises:
        DatasetError: a worker process died.
    """
    loader = reading_loader(_Checked(dataset, fast), workers, batch_size=8, collate_fn=list)
    with tqdm(
        total=len(dataset), desc="checking files", unit="img", leave=False, disable=None
    ) as bar:
        batches = iter(loader)
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError as error:
                raise DatasetError(
                    f"checking ended after {bar.n} of {len(dataset)} images: "
                    f"{' '.join(str(error).split())}; give fewer --workers if memory is short"
                ) from error
            if batch is None:
                return
            yield from batch
            bar.update(len(batch))


def labels_without_image(dataset: Segmentation) -> list[Problem]:
    """The label maps of a split that belong to no image."""
    labels = {label for _, label in dataset.pairs}
    if labels == {None}:
        return []
    what = f"there is no image of {dataset.split} to it"
    return [
        Problem("label without image", path, what)
        for path in dataset.label_files()
        if path not in labels
    ]


def leave_out_broken(dataset: Dataset, workers: int = 0, replace: bool = False) -> list[Problem]:
    """Remove broken images, and images whose label is broken, from a data set, and report them.

    Args:
        workers: processes that read.
        replace: replace each by the next good image; the data set keeps its length, as a run that
            is resumed needs it.

    Raises:
        NothingReadable: no image is left.
    """
    problems = [problem for found in look_through(dataset, workers) for problem in found]
    count, broken = len(dataset), {problem.index for problem in problems}
    if problems and len(broken) == count:
        raise NothingReadable(f"all {count} images are broken, the first: {problems[0]}")
    kept: deque[int] = deque()
    following = min(set(range(count)) - broken, default=0)  # after the last comes the first
    for index in reversed(range(count)):
        if index not in broken:
            following = index
        if replace or index not in broken:
            kept.appendleft(following)
    if broken:
        dataset.keep(kept)
        for problem in problems:
            print(f"left out: {problem}", file=sys.stderr)
        print(f"{len(broken)} broken images are left out", flush=True)
    return problems


class _Checked(Dataset):
    """The problems of each image of a data set, and of its label."""

    def __init__(self, dataset: Dataset, fast: bool) -> None:
        self.dataset, self.pairs, self.fast = dataset, dataset.pairs, fast

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> list[Problem]:
        image_path, label_path = self.pairs[index]
        problems: list[Problem] = []

        def attempt(path: str, read: Callable[[], T]) -> T | None:
            try:
                return read()
            except FileError as error:
                kind, what = error.kind, str(error).removeprefix(path).strip()
                if isinstance(error, MissingFile) and path == label_path:
                    kind, path, what = "image without label", image_path, str(error)
                problems.append(Problem(kind, path, what, index))
                return None

        size = attempt(image_path, lambda: _header_size(image_path))
        if size is not None and not self.fast:
            attempt(image_path, lambda: _decode_all(image_path))
        if label_path is not None:
            found = attempt(label_path, lambda: _label_header_size(label_path))
            if found is not None and size is not None:
                attempt(label_path, lambda: check_sizes(label_path, found, size))
            if found is not None and not self.fast:
                attempt(label_path, lambda: self._decode_label(index))
        return problems

    def _decode_label(self, index: int) -> None:
        self.dataset.read_train_ids(index)
        check_every_pixel(self.dataset.pairs[index][1])


def _decode_all(path: str) -> None:
    read_image(path)
    check_every_pixel(path)


def check_every_pixel(path: str) -> None:
    """See that the pixels of a PNG or JPEG are there to the last, at the cost of decoding it again.

    To read one sees most of it. What only this finds: a JPEG of several scans whose last ends
    early, a JPEG that lacks less than its last block, a PNG that holds more than it declares, or
    parts of it twice.

    Raises:
        DatasetError: they are not, or the file cannot be read.
    """
    with naming(path):
        data = read_bytes(path)
        with Image.open(BytesIO(data)) as image:
            image_format = image.format
        check_pixels(image_format, data)


def summary(problems: Iterable[Problem]) -> str:
    """How many problems there are of each kind, the most frequent first."""
    counts = Counter(problem.kind for problem in problems)
    return ", ".join(f"{kind}: {count}" for kind, count in counts.most_common())
