"""Pictures and videos of any kind, as frames to segment."""

import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageSequence
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from datasets.images import MIN_SIZE, DatasetError, Size, decode, open_image, to_rgb
from datasets.listing import UNREPORTED, is_stray, list_pictures

# Formats that Pillow opens but cannot draw, at least not without other programs.
NOT_DRAWN = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
KNOWN = Image.registered_extensions().items()
DRAWABLE = {suffix for suffix, kind in KNOWN if kind in set(Image.OPEN) - NOT_DRAWN}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
# Formats whose further images are an animation; those of others, such as the previews that cameras
# put behind a photo, are passed over.
ANIMATED = {"GIF", "PNG", "WEBP"}

# A camera, by its number or device, and the address of a stream or a file.
LIVE = re.compile(r"camera:.*|\d+|/dev/video\d+|\w+://.*", re.DOTALL)

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")

# Width over height: wider pictures are squeezed, or they would not fit in memory.
MAX_ASPECT = 8


@dataclass
class Frame:
    """A picture to segment."""

    name: str  # of its results, a path without suffix
    image: Tensor  # 3 x H x W, uint8, RGB, upright
    resized: Tensor  # 3 x h x w, at the size of the network's input


@dataclass
class Animation:
    """An animated picture, for `animation_frames`."""

    path: str
    name: str


def find_pictures(inputs: Sequence[str]) -> list[tuple[str, str]]:
    """Return the path of each picture and video in files, globs, and folders at any depth, with a
    unique name for its results. Results of earlier runs are found only by their own names."""
    found: dict[str, str] = {}  # name by path
    results: set[str] = set()
    unread: list[str] = []

    def skip_folder(folder: str) -> bool:
        if holds_results(folder):
            results.add(folder)
        return folder in results

    for path in inputs:
        known = len(results) + len(unread)
        if os.path.isdir(path):
            files = sorted(list_pictures(path, DRAWABLE | VIDEOS, skip_folder))
            names = {file: result_name(Path(file).relative_to(path)) for file in files}
        else:
            # A file whose name looks like a glob is a file.
            files = [path] if os.path.exists(path) else expand(path, skip_folder)
            if files != [path] or len(inputs) > 1:  # found by a glob, ours or the shell's
                unread += filter(is_unread, files)
                files = [file for file in files if not is_unread(file)]
            names = {file: result_name(Path(file).name) for file in files if os.path.isfile(file)}
        if not names and len(results) + len(unread) == known:
            if LIVE.fullmatch(path) and not os.path.isdir(path):
                raise DatasetError(
                    f"{path} is no file: examples/onnx_camera.py takes cameras and streams; "
                    "download a picture or video first"
                )
            what = "holds no picture or video" if os.path.isdir(path) else "is no file or folder"
            raise DatasetError(f"{path} {what}: give a picture, a folder, a glob or a video")
        found = found | names | found  # in their order, under the first name
    if results:
        print(f"note: results of earlier runs, as in {min(results)}, are left out", file=sys.stderr)
    suffixes = {Path(file).suffix for file in unread}
    if told := sorted(suffix for suffix in suffixes if suffix.lower() not in UNREPORTED):
        print(f"note: {', '.join(told)} is not read: such files are left out", file=sys.stderr)
    if not found:
        raise DatasetError(
            f"{inputs[0]} holds nothing but results of earlier runs, or kinds that are not read"
        )
    taken: set[str] = set()
    twins: Counter[str] = Counter()
    for path, name in found.items():
        while found[path] in taken:
            twins[name] += 1
            found[path] = f"{name}-{twins[name] + 1}"
        taken.add(found[path])
    return list(found.items())


def is_unread(path: str) -> bool:
    """Whether the suffix of a file says that it is neither a picture nor a video."""
    return Path(path).suffix.lower() not in DRAWABLE | VIDEOS | {""}


def expand(pattern: str, skip_folder: Callable[[str], bool]) -> list[str]:
    """Return the files that a glob finds, sorted, without strays and folders to skip, unless it
    names them.

    Brackets in the names of folders that exist stand for themselves.
    """
    named = {*Path(pattern).parts}

    def wanted(path: str) -> bool:
        file = Path(path)
        folders = [folder for folder in file.parents if folder.name not in named]
        return (
            not any(map(is_stray, {*file.parts} - named))
            and not any(skip_folder(str(folder)) for folder in folders)
            and file.suffix.lower() not in UNREPORTED - {""}
        )

    start = next((folder for folder in Path(pattern).parents if folder.is_dir()), Path())
    literal = Path(glob.escape(str(start)), Path(pattern).relative_to(start))
    return sorted(filter(wanted, glob.glob(str(literal), recursive=True)))


def holds_results(folder: str) -> bool:
    """Whether a folder is the usual place of results, or one of those that predict.py fills."""
    parent, name = os.path.split(folder)
    if name not in ("overlays", "labels", "colors"):
        return name == "results"
    return all(os.path.isdir(os.path.join(parent, other)) for other in ("overlays", "labels"))


def result_name(path: str | os.PathLike) -> str:
    """Return a path without its suffix, safe to use within a folder of results.

    Control characters, and the dots of names that would lead elsewhere (`...gif` without its suffix
    is `..`), become underscores.
    """
    path = Path(path)
    parts = [UNPRINTABLE.sub("_", part) for part in (*path.parent.parts, path.stem)]
    return "/".join("_" * len(part) if set(part) == {"."} else part for part in parts)


def is_video(path: str) -> bool:
    return Path(path).suffix.lower() in VIDEOS


def working_size(height: int, width: int, new_height: int) -> Size:
    """Return the height and width of the network's input: in proportion, within its limits."""
    new_width = round(width * new_height / height)
    return new_height, min(max(new_width, MIN_SIZE), MAX_ASPECT * new_height)


def read_picture(
    files: Sequence[tuple[str, str]], height: int, index: int
) -> Frame | Animation | str:
    """Read one of the files that `find_pictures` found, or say why that is not possible."""
    path, name = files[index]
    try:
        with open_image(path) as picture:
            # All frames at once could fill the memory.
            if picture.format in ANIMATED and getattr(picture, "n_frames", 1) > 1:
                return Animation(path, name)
            return make_frame(name, decode(picture), height)
    except DatasetError as error:
        return str(error)


def animation_frames(animation: Animation, height: int) -> Iterator[Frame]:
    """Yield the frames of an animated picture."""
    with open_image(animation.path) as picture:
        for number, image in enumerate(ImageSequence.Iterator(picture)):
            yield make_frame(f"{animation.name}/{number:06d}", to_rgb(image.copy()), height)


def make_frame(name: str, image: Image.Image, height: int) -> Frame:
    size = working_size(image.height, image.width, height)
    resized = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return Frame(name, F.pil_to_tensor(image), F.pil_to_tensor(resized))


def video_frames(path: str, name: str, height: int) -> Iterator[Frame]:
    """Yield the frames of a video, upright."""
    with open_video(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for number, frame in enumerate(container.decode(video=0)):
            # Phones store frames as the sensor lies, and the angle to turn them by.
            image = frame.to_image().rotate(frame.rotation, expand=True)
            yield make_frame(f"{name}/{number:06d}", image, height)


@contextmanager
def open_video(path: str) -> Iterator["av.container.InputContainer"]:  # noqa: F821
    """Open a video with PyAV."""
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
