"""Anyone's pictures: files, folders, globs and videos, as frames to be segmented."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageSequence
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from datasets.images import DatasetError, orientation, to_rgb, unreadable, upright

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
# Formats whose further frames are moments of one scene; of others, such as the previews that
# cameras put behind a photo, the first is the picture.
ANIMATED = {"GIF", "PNG", "WEBP"}

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")

# The network takes 64 pixels each way, and pictures far wider than high would not fit in memory.
SHORTEST, WIDEST = 64, 8


@dataclass
class Frame:
    """A picture to segment.

    Attributes:
        name: that its results are given, a path without suffix.
        image: 3 x H x W, uint8, RGB, upright.
        resized: the same, 3 x h x w, at the resolution that the network works at.
    """

    name: str
    image: Tensor
    resized: Tensor


def find_pictures(inputs: Sequence[str]) -> list[tuple[str, str]]:
    """The files that inputs stand for, each with a name of its own for the results, sorted.

    Args:
        inputs: files, globs, and folders, whose pictures and videos are looked for at any depth.

    Raises:
        DatasetError: an input does not exist or holds no picture.
    """
    found: dict[str, str] = {}  # path and name
    for given in inputs:
        if os.path.isdir(given):
            inside = sorted(path for path in Path(given).rglob("*") if is_picture(path))
            paths = {str(path): result_name(path.relative_to(given)) for path in inside}
        elif os.path.exists(given):
            paths = {given: result_name(Path(given).name)}
        else:
            matched = sorted(path for path in glob.glob(given, recursive=True))
            paths = {path: result_name(Path(path).name) for path in matched if os.path.isfile(path)}
        if not paths:
            what = "holds no picture or video" if os.path.isdir(given) else "is no file or folder"
            raise DatasetError(f"{given} {what}: give a picture, a folder, a glob or a video")
        for path, name in paths.items():
            found.setdefault(path, name)
    taken: set[str] = set()
    twins: Counter[str] = Counter()
    for path, name in found.items():
        unique = name
        while unique in taken:
            twins[name] += 1
            unique = f"{name}-{twins[name] + 1}"
        taken.add(unique)
        found[path] = unique
    return list(found.items())


def result_name(path: str | os.PathLike) -> str:
    """What the results of a file are called: its path without suffix.

    Names of dots alone, which `...gif` has without its suffix, would lead elsewhere, and control
    characters would break lines: each such character becomes an underscore.
    """
    path = Path(path)
    parts = [UNPRINTABLE.sub("_", part) for part in (*path.parent.parts, path.stem)]
    return "/".join("_" * len(part) if set(part) == {"."} else part for part in parts)


def is_picture(path: Path) -> bool:
    suffix = path.suffix.lower()
    return (suffix in PICTURES or suffix in VIDEOS) and not path.name.startswith(".")


def is_video(path: str) -> bool:
    return Path(path).suffix.lower() in VIDEOS


def working_size(height: int, width: int, new_height: int) -> tuple[int, int]:
    """Height and width that the network works at: the proportions kept, within its limits."""
    new_width = round(width * new_height / height)
    return new_height, min(max(new_width, SHORTEST), WIDEST * new_height)


@dataclass
class Animation:
    """A picture file of several moments, to be read one at a time by `animation_frames`."""

    path: str
    name: str


class Pictures(Dataset):
    """Picture files as frames; of a file that cannot be read, the reason instead.

    Args:
        files: paths and names, as `find_pictures` returns them.
        height: that the network works at.
    """

    def __init__(self, files: Sequence[tuple[str, str]], height: int) -> None:
        self.files, self.height = files, height

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Frame | Animation | str:
        path, name = self.files[index]
        try:
            with Image.open(path) as picture:
                # All moments at once would fill the memory, and the pipe out of a worker.
                if picture.format in ANIMATED and getattr(picture, "n_frames", 1) > 1:
                    return Animation(path, name)
                turned = orientation(picture)
                return make_frame(name, upright(to_rgb(picture), turned), self.height)
        except Exception as error:  # anyone's files: what PIL raises on them is not documented
            return str(unreadable(path, error))


def animation_frames(animation: Animation, height: int) -> Iterator[Frame]:
    """The moments of an animated picture, in order.

    Raises:
        DatasetError: one of them cannot be read.
    """
    try:
        with Image.open(animation.path) as picture:
            for number, moment in enumerate(ImageSequence.Iterator(picture)):
                name = f"{animation.name}/{number:06d}"
                yield make_frame(name, to_rgb(moment.copy()), height)
    except Exception as error:  # as above
        raise unreadable(animation.path, error) from error


def make_frame(name: str, image: Image.Image, height: int) -> Frame:
    size = working_size(image.height, image.width, height)
    resized = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return Frame(name, F.pil_to_tensor(image), F.pil_to_tensor(resized))


def video_frames(path: str, name: str, height: int) -> Iterator[Frame]:
    """The frames of a video, in order.

    Raises:
        DatasetError: it cannot be decoded, or PyAV is not installed.
    """
    with open_video(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for number, frame in enumerate(container.decode(video=0)):
            # Phones store frames as the sensor lies, and by how far to turn them.
            image = frame.to_image().rotate(frame.rotation, expand=True)
            yield make_frame(f"{name}/{number:06d}", image, height)


@contextmanager
def open_video(path: str) -> Iterator["av.container.InputContainer"]:  # noqa: F821
    """A video as PyAV opens it.

    Raises:
        DatasetError: it cannot be decoded, or PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise DatasetError(f"{path} is a video, which PyAV reads: pip install av") from error
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise DatasetError(f"{path} holds no video")
            yield container
    except (av.FFmpegError, OSError) as error:
        raise DatasetError(f"{path} cannot be read as a video ({error.strerror})") from error


def stack(frames: Sequence[Frame]) -> Tensor:
    """The resized images of frames of one size as a batch."""
    return torch.stack([frame.resized for frame in frames])
