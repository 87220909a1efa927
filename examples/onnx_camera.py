"""An exported network on pictures, a video or a camera, without torch: what goes onto a robot.

    python export.py --checkpoint weights/lednet_d20_camvid.pth --output lednet.onnx --labels
    python examples/onnx_camera.py --model lednet.onnx --input photo.jpg
    python examples/onnx_camera.py --model lednet.onnx --input camera:0

This file and the model are all that the robot needs, with Python 3.8 or newer and

    pip install onnxruntime numpy 'pillow>=10.1'      and for videos and cameras opencv-python

Pictures, turned upright, become overlays/NAME.jpg and labels/NAME.png, the label ids of the data
set; a video becomes overlays.mp4. A camera is shown in a window until q is pressed; with --output
it is filmed instead, until Ctrl-C. Classes, colours, working height and normalisation are read from
the model. Labels are those of the working height, enlarged to the picture without smoothing.
"""

from __future__ import annotations  # for Python 3.8, which older Jetsons have

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont, ImageOps

PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
PROVIDERS = {  # of onnxruntime, the fastest first
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
# The network takes 64 pixels each way, and pictures far wider than high would not fit in memory.
SHORTEST, WIDEST = 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail  # in one line
    parser.add_argument("--model", required=True, metavar="FILE", help="that export.py wrote")
    parser.add_argument("--input", required=True, help="a picture, a folder, a video or camera:0")
    parser.add_argument("--output", metavar="DIR", help="a new folder; default: results/INPUT")
    parser.add_argument("--threads", type=int, default=0, help="default: one for each core")
    parser.add_argument("--provider", choices=PROVIDERS, help="default: the fastest of those here")
    args = parser.parse_args()
    camera = args.input.startswith("camera:")
    if not camera and not os.path.exists(args.input):
        fail(f"--input {args.input} does not exist")
    session = open_session(args.model, args.threads, args.provider)
    about = read_metadata(session, args.model)

    seconds: list[np.ndarray] = []  # of each picture: until it is read, then of the three steps
    try:
        if os.path.isdir(args.input) or Path(args.input).suffix.lower() in PICTURES:
            results = segment(read_pictures(args.input), session, about, seconds)
            save(results, new_folder(args.output, args.input), about["label_ids"])
        else:
            frames, rate = open_video(args.input)
            results = segment(frames, session, about, seconds)
            if camera and args.output is None:
                show(results, seconds)
            else:
                path = new_folder(args.output, args.input) / "overlays.mp4"
                film(results, path, rate, live=camera)
    except KeyboardInterrupt:
        pass  # that is how filming a camera ends
    if not seconds:
        fail(f"--input {args.input} gave no picture")
    steady = seconds[1:] or seconds  # the first run plans the memory, and builds TensorRT's engine
    _, before, network, after = 1e3 * np.mean(steady, 0)
    print(
        f"{len(seconds)} pictures, {session.get_providers()[0]}: preprocessing {before:.1f} ms, "
        f"network {network:.1f} ms, labels and drawing {after:.1f} ms; {fps(steady):.1f} FPS with "
        "reading and writing"
    )


def fail(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def open_session(path: str, threads: int, wanted: str | None) -> onnxruntime.InferenceSession:
    if not os.path.isfile(path):
        fail(f"--model {path} does not exist: give the file that export.py wrote")
    here = [name for name in PROVIDERS.values() if name in onnxruntime.get_available_providers()]
    if wanted and PROVIDERS[wanted] not in here:
        fail(f"--provider {wanted} is not in this onnxruntime, which has {', '.join(here)}")
    providers = list(dict.fromkeys([PROVIDERS[wanted], PROVIDERS["cpu"]])) if wanted else here
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(0, threads)
    options.log_severity_level = 4  # what is wrong is said here
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime has a class for each kind of failure
        fail(f"--model {path} cannot be loaded ({' '.join(str(error).split())})")
    if wanted and session.get_providers()[0] != PROVIDERS[wanted]:
        fail(f"--provider {wanted} does not start: its libraries or its device are missing")
    return session


def read_metadata(session: onnxruntime.InferenceSession, path: str) -> dict[str, Any]:
    """The classes of the network, and what its images have to be."""
    names = ("class_names", "colors", "label_ids", "mean", "std", "height")
    stored = session.get_modelmeta().custom_metadata_map
    missing = [name for name in names if name not in stored]
    if missing:
        fail(f"--model {path} does not say its {', '.join(missing)}: export it with export.py")
    return {name: json.loads(stored[name]) for name in names}


def read_pictures(given: str) -> Iterator[tuple[str, Image.Image]]:
    """Name and upright picture of a file, or those of a folder."""
    paths = [Path(given)]
    if os.path.isdir(given):
        paths = sorted(path for path in paths[0].iterdir() if path.suffix.lower() in PICTURES)
    for path in paths:
        try:
            with Image.open(path) as picture:
                upright = ImageOps.exif_transpose(picture).convert("RGB")
        except Exception as error:  # what PIL raises on anyone's files is not documented
            fail(f"--input {path} cannot be read as a picture ({error})")
        yield path.stem, upright


def open_video(given: str) -> tuple[Iterator[tuple[str, Image.Image]], float]:
    """The frames of a video or a camera, without names, and how many there are in a second."""
    # What OpenCV and FFmpeg would print of a file or camera that they cannot open is said here.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError:
        fail(f"--input {given} is read with OpenCV: pip install opencv-python")
    number = given[len("camera:") :] if given.startswith("camera:") else ""
    capture = cv2.VideoCapture(int(number) if number.isdigit() else given)
    if not capture.isOpened():
        fail(f"--input {given} cannot be opened as a {'camera' if number else 'video'}")

    def frames() -> Iterator[tuple[str, Image.Image]]:
        while True:
            more, pixels = capture.read()
            if not more:
                return
            yield "", Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))

    return frames(), capture.get(cv2.CAP_PROP_FPS) or 25


def segment(
    frames: Iterator[tuple[str, Image.Image]],
    session: onnxruntime.InferenceSession,
    about: dict[str, Any],
    seconds: list[np.ndarray],
) -> Iterator[tuple[str, Image.Image, np.ndarray]]:
    """Name, overlay and classes, H x W, uint8, of each picture; its times go into a list."""
    done = time.perf_counter()
    for name, picture in frames:
        clock = [done, time.perf_counter()]
        images = prepare(picture, about)
        clock.append(time.perf_counter())
        labels = session.run(None, {"images": images})[0][0]
        clock.append(time.perf_counter())
        if labels.ndim == 3:  # logits, C x h x w
            labels = labels.argmax(0).astype(np.uint8)
        labels = np.asarray(Image.fromarray(labels).resize(picture.size, Image.Resampling.NEAREST))
        page = overlay(picture, labels, about)
        done = time.perf_counter()
        seconds.append(np.diff([*clock, done]))
        yield name, page, labels


def fps(seconds: list[np.ndarray]) -> float:
    return len(seconds) / np.sum(seconds)


def prepare(picture: Image.Image, about: dict[str, Any]) -> np.ndarray:
    """A picture at the size that the network works at, 1 x 3 x h x w, float32, normalised."""
    height = about["height"]
    width = round(picture.width * height / picture.height)
    size = min(max(width, SHORTEST), WIDEST * height), height
    pixels = np.asarray(picture.resize(size, Image.Resampling.BILINEAR), np.float32)
    mean, std = np.float32(about["mean"]), np.float32(about["std"])
    return np.ascontiguousarray((pixels / (255 * std) - mean / std).transpose(2, 0, 1)[None])


def overlay(picture: Image.Image, labels: np.ndarray, about: dict[str, Any]) -> Image.Image:
    """A picture with its classes painted over it, and the names of those that it has."""
    paint = Image.fromarray(labels)
    paint.putpalette([part for color in about["colors"] for part in color])
    page = Image.blend(picture, paint.convert("RGB"), 0.5)
    draw, size = ImageDraw.Draw(page), max(11, page.height // 40)
    font = ImageFont.load_default(size)
    for row, number in enumerate(np.flatnonzero(np.bincount(labels.ravel()))):
        top, color = size // 2 + row * (size + size // 2), tuple(about["colors"][number])
        draw.rectangle((size // 2, top, size // 2 + size, top + size), color, "black")
        name = about["class_names"][number]
        draw.text((2 * size, top), name, "white", font, stroke_width=1, stroke_fill="black")
    return page


def new_folder(output: str | None, given: str) -> Path:
    # A name of dots alone, which "...png" has without its suffix, would lead elsewhere.
    folder = Path(output or Path("results", Path(given).resolve().stem.strip(".") or "pictures"))
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        fail(f"{folder} cannot be made ({error.strerror}): give --output a new folder")
    return folder


def save(results: Iterator, folder: Path, label_ids: list[int]) -> None:
    """Write the overlays and label ids of pictures."""
    (folder / "overlays").mkdir()
    (folder / "labels").mkdir()
    for name, page, labels in results:
        path = folder / "labels" / f"{name}.png"
        if path.exists():
            fail(f"--input holds two pictures named {name}: rename one of them")
        Image.fromarray(np.uint8(label_ids)[labels]).save(path, "PNG")
        page.save(folder / "overlays" / f"{name}.jpg", "JPEG", quality=90)


def film(results: Iterator, path: Path, rate: float, live: bool) -> None:
    """Write overlays as a video; each of a camera's lasts until the next one."""
    import cv2

    writer, written, started = None, 0, time.perf_counter()
    try:
        for _, page, _ in results:
            if writer is None:
                code = cv2.VideoWriter_fourcc(*"mp4v")
                writer = cv2.VideoWriter(str(path), code, rate, page.size)
                if not writer.isOpened():
                    fail(f"{path} cannot be written as a video: give another --output")
            due = int((time.perf_counter() - started) * rate) - written if live else 1
            for _ in range(due):
                writer.write(cv2.cvtColor(np.asarray(page), cv2.COLOR_RGB2BGR))
            written += due
    finally:
        if writer is not None:
            writer.release()


def show(results: Iterator, seconds: list[np.ndarray]) -> None:
    """Show overlays, and how many come in a second, until q is pressed."""
    import cv2

    # OpenCV would end the program here without a word of its own.
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not screen:
        fail("there is no screen to show a camera on: give --output DIR to film it")
    for _, page, _ in results:
        caption, place = f"{fps(seconds[-10:]):.1f} FPS", (page.width // 2, 5)
        ImageDraw.Draw(page).text(place, caption, "white", ImageFont.load_default(20))
        try:
            cv2.imshow("LEDNet", cv2.cvtColor(np.asarray(page), cv2.COLOR_RGB2BGR))
        except cv2.error:
            fail("this OpenCV has no windows: pip install opencv-python, or give --output DIR")
        if cv2.waitKey(1) == ord("q"):
            break


if __name__ == "__main__":
    main()
