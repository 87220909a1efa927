"""Run an exported network on pictures, a video or a camera, without torch: the program of a robot.

    python export.py --checkpoint weights/lednet_d20_camvid.pth --output lednet.onnx --labels
    python examples/onnx_camera.py --model lednet.onnx --input photo.jpg
    python examples/onnx_camera.py --model lednet.onnx --input camera:0

The robot needs this file, the model, Python 3.8 or newer and

    pip install onnxruntime numpy 'pillow>=10.1'      for videos and cameras also opencv-python

Upright pictures become overlays/NAME.jpg and labels/NAME.png, the label ids of the data set; a
video becomes overlays.mp4. A camera is shown in a window until q is pressed; with --output it is
filmed instead, until Ctrl-C. Labels are computed at the height that the model states, and enlarged.
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
# Of onnxruntime, the fastest first.
PROVIDERS = {
    name.lower(): f"{name}ExecutionProvider" for name in "Tensorrt CUDA OpenVINO CPU".split()
}
METADATA = ("class_names", "colors", "label_ids", "mean", "std", "height")
MIN_WIDTH = 64  # of the network
MAX_ASPECT = 8  # wider pictures are squeezed: they would not fit in memory


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.error = fail  # one line, without the usage
    parser.add_argument("--model", required=True, metavar="FILE", help="model of export.py")
    parser.add_argument("--input", required=True, help="a picture, a folder, a video or camera:0")
    parser.add_argument("--output", metavar="DIR", help="new folder; default: results/INPUT")
    parser.add_argument("--threads", type=int, default=0, help="default: one for each core")
    parser.add_argument("--provider", choices=PROVIDERS, help="default: the fastest available")
    args = parser.parse_args()
    camera = args.input.startswith("camera:")
    if not camera and not os.path.exists(args.input):
        fail(f"--input {args.input} does not exist")
    session, about = open_model(args.model, args.threads, args.provider)

    times: list[list[float]] = []  # seconds to read, prepare, run and draw each picture
    try:
        if os.path.isdir(args.input) or Path(args.input).suffix.lower() in PICTURES:
            results = segment(read_pictures(args.input), session, about, times)
            save(results, new_folder(args), about["label_ids"])
        else:
            frames, rate = open_video(args.input)
            results = segment(frames, session, about, times)
            if camera and args.output is None:
                show(results, times)
            else:
                film(results, new_folder(args) / "overlays.mp4", rate, live=camera)
    except KeyboardInterrupt:
        pass  # the end of filming a camera
    if not times:
        fail(f"--input {args.input} gave no picture")
    # The first run also plans memory, or builds an engine.
    read, prepare, run, draw = 1e3 * np.mean(times[1:] or times, 0)
    print(
        f"{len(times)} pictures, {session.get_providers()[0]}: preprocessing {prepare:.1f} ms, "
        f"network {run:.1f} ms, labels and drawing {draw:.1f} ms; "
        f"{1e3 / (read + prepare + run + draw):.1f} FPS with reading and writing"
    )


def fail(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def open_model(
    path: str, threads: int, provider: str | None
) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    """Return a session of the model, and its metadata."""
    if not os.path.isfile(path):
        fail(f"--model {path} does not exist: give a model of export.py")
    available = onnxruntime.get_available_providers()
    wanted = [PROVIDERS[provider]] if provider else PROVIDERS.values()
    providers = [name for name in wanted if name in available]
    if not providers:
        fail(f"--provider {provider} is not in this onnxruntime, which has {', '.join(available)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(0, threads)
    options.log_severity_level = 4  # errors are reported below
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime has a class for each kind of failure
        fail(f"--model {path} cannot be loaded ({' '.join(str(error).split())})")
    if provider and session.get_providers()[0] not in providers:
        fail(f"--provider {provider} does not start: its libraries or its device are missing")
    stored = session.get_modelmeta().custom_metadata_map
    missing = [name for name in METADATA if name not in stored]
    if missing:
        fail(f"--model {path} does not state its {', '.join(missing)}: export it with export.py")
    return session, {name: json.loads(stored[name]) for name in METADATA}


def read_pictures(path: str) -> Iterator[tuple[str, Image.Image]]:
    """Yield the name and the upright picture of a file, or of those in a folder."""
    paths = [Path(path)]
    if os.path.isdir(path):
        paths = sorted(file for file in Path(path).iterdir() if file.suffix.lower() in PICTURES)
    for path in paths:
        try:
            with Image.open(path) as picture:
                upright = ImageOps.exif_transpose(picture).convert("RGB")
        except Exception as error:  # what PIL raises on damaged files is not documented
            fail(f"--input {path} cannot be read as a picture ({error})")
        yield path.stem, upright


def open_video(source: str) -> tuple[Iterator[tuple[str, Image.Image]], float]:
    """Return the frames of a video or camera, without names, and their rate per second."""
    # OpenCV and FFmpeg would print their own errors beside the one below.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError:
        fail(f"--input {source} is read with OpenCV: pip install opencv-python")
    kind = "camera" if source.startswith("camera:") else "video"
    number = source[len("camera:") :] if kind == "camera" else ""
    capture = cv2.VideoCapture(int(number) if number.isdigit() else source)
    if not capture.isOpened():
        fail(f"--input {source} cannot be opened as a {kind}")

    def frames() -> Iterator[tuple[str, Image.Image]]:
        while True:
            more, pixels = capture.read()
            if not more:
                return
            yield "", Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))

    return frames(), capture.get(cv2.CAP_PROP_FPS) or 25


def segment(
    frames: Iterator, session: onnxruntime.InferenceSession, about: dict, times: list[list[float]]
) -> Iterator[tuple[str, Image.Image, np.ndarray]]:
    """Yield name, overlay and classes, H x W, uint8, of each picture, and note the times."""
    clock = [time.perf_counter()]
    for name, picture in frames:
        clock.append(time.perf_counter())
        images = prepare(picture, about)
        clock.append(time.perf_counter())
        labels = session.run(None, {"images": images})[0][0]
        clock.append(time.perf_counter())
        if labels.ndim == 3:  # logits, C x h x w
            labels = labels.argmax(0).astype(np.uint8)
        labels = np.asarray(Image.fromarray(labels).resize(picture.size, Image.Resampling.NEAREST))
        page = overlay(picture, labels, about)
        clock.append(time.perf_counter())
        times.append(np.diff(clock).tolist())
        clock = clock[-1:]
        yield name, page, labels


def prepare(picture: Image.Image, about: dict[str, Any]) -> np.ndarray:
    """Resize a picture to the working height and normalise it: 1 x 3 x h x w, float32."""
    height = about["height"]
    width = round(picture.width * height / picture.height)
    size = min(max(width, MIN_WIDTH), MAX_ASPECT * height), height
    pixels = np.asarray(picture.resize(size, Image.Resampling.BILINEAR), np.float32)
    mean, std = np.float32(about["mean"]), np.float32(about["std"])
    return np.ascontiguousarray((pixels / (255 * std) - mean / std).transpose(2, 0, 1)[None])


def overlay(picture: Image.Image, labels: np.ndarray, about: dict[str, Any]) -> Image.Image:
    """Blend a picture with the colours of its classes, and write their names onto it."""
    paint = Image.fromarray(labels)
    paint.putpalette([value for color in about["colors"] for value in color])
    page = Image.blend(picture, paint.convert("RGB"), 0.5)
    draw, size = ImageDraw.Draw(page), max(11, page.height // 40)
    font = ImageFont.load_default(size)
    for row, number in enumerate(np.flatnonzero(np.bincount(labels.ravel()))):
        top, color = size // 2 + row * (size + size // 2), tuple(about["colors"][number])
        draw.rectangle((size // 2, top, size // 2 + size, top + size), color, "black")
        name = about["class_names"][number]
        draw.text((2 * size, top), name, "white", font, stroke_width=1, stroke_fill="black")
    return page


def new_folder(args: argparse.Namespace) -> Path:
    # Without its suffix, "...png" is "..", which would lead elsewhere.
    name = Path(args.input).resolve().stem.strip(".") or "pictures"
    folder = Path(args.output or Path("results", name))
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
    """Write overlays as a video; those of a camera in real time, each until the next one."""
    import cv2

    writer, code = cv2.VideoWriter(), cv2.VideoWriter_fourcc(*"mp4v")
    written, started = 0, time.perf_counter()
    try:
        for _, page, _ in results:
            if not (writer.isOpened() or writer.open(str(path), code, rate, page.size)):
                fail(f"{path} cannot be written as a video: give another --output")
            due = int((time.perf_counter() - started) * rate) - written if live else 1
            for _ in range(due):
                writer.write(cv2.cvtColor(np.asarray(page), cv2.COLOR_RGB2BGR))
            written += due
    finally:
        writer.release()


def show(results: Iterator, times: list[list[float]]) -> None:
    """Show overlays and their frame rate in a window, until q is pressed."""
    import cv2

    # Without a screen, OpenCV would abort the program.
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        fail("there is no screen to show a camera on: give --output DIR to film it")
    for _, page, _ in results:
        last = times[-10:]
        caption, place = f"{len(last) / np.sum(last):.1f} FPS", (page.width // 2, 5)
        ImageDraw.Draw(page).text(place, caption, "white", ImageFont.load_default(20))
        try:
            cv2.imshow("LEDNet", cv2.cvtColor(np.asarray(page), cv2.COLOR_RGB2BGR))
        except cv2.error:
            fail("this OpenCV has no windows: pip install opencv-python, or give --output DIR")
        if cv2.waitKey(1) == ord("q"):
            break


if __name__ == "__main__":
    main()
