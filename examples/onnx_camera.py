"""Run an exported network on pictures, a video or a camera, without torch: the program of a robot.

    python export.py --output lednet.onnx --labels
    python examples/onnx_camera.py --model lednet.onnx --input photo.jpg
    python examples/onnx_camera.py --model lednet.onnx --input camera:0
    python examples/onnx_camera.py --model lednet.onnx --input rtsp://192.168.0.8/stream
    python examples/onnx_camera.py --model lednet.onnx --input camera:0 --runtime openvino-bfloat16

The robot needs this file, the model, Python 3.8 or newer and

    pip install onnxruntime numpy 'pillow>=10.1'      for videos and cameras also opencv-python

For --runtime openvino it needs openvino in place of onnxruntime.

Pictures become overlays/NAME.jpg and labels/NAME.png, with the label ids of the data set; a video
becomes overlays.mp4. A camera or stream is shown in a window until q is pressed; with --output it
is filmed instead, until Ctrl-C. The model states its classes, colours, working height and
normalisation. Labels are computed at the working height, or at the size that the model is fixed to,
and enlarged without smoothing.
"""

from __future__ import annotations  # for Python 3.8, which older Jetsons have

import argparse
import json
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

PICTURES = {
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
}
# Of onnxruntime, the fastest first.
PROVIDERS = [f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "OpenVINO", "CPU")]
LIVE = re.compile(r"camera:.*|\d+|/dev/video\d+|\w+://.*")  # a camera or a stream
METADATA = ("class_names", "colors", "label_ids", "mean", "std", "height")
MIN_WIDTH = 64  # of the network
MAX_ASPECT = 8  # wider pictures are squeezed, since they would not fit in memory


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.error = fail  # one line, without the usage
    parser.add_argument("--model", required=True, metavar="FILE", help="model of export.py")
    parser.add_argument("--input", required=True, help="picture, folder, video, camera:0 or URL")
    parser.add_argument("--output", metavar="DIR", help="new folder; default: results/INPUT")
    parser.add_argument("--threads", type=int, default=0, help="default: one for each core")
    parser.add_argument(
        "--runtime", choices=OPENERS, default="onnxruntime", help="default %(default)s"
    )
    args = parser.parse_args()
    folder = os.path.isdir(args.input)
    camera = not (folder or os.path.isfile(args.input)) and LIVE.fullmatch(args.input) is not None
    if not camera and not os.path.exists(args.input):
        fail(f"--input {args.input} does not exist")
    broken: list[str] = []
    network = Network(args.model, max(0, args.threads), args.runtime)
    try:
        if folder or (not camera and Path(args.input).suffix.lower() in PICTURES):
            results = network.segment(read_pictures(args.input, broken))
            save(results, new_folder(args), network.label_ids)
        else:
            frames, rate = open_video(args.input, camera)
            results = network.segment(frames)
            if camera and args.output is None:
                show(results, network.seconds)
            else:
                film(results, new_folder(args) / "overlays.mp4", rate, live=camera)
    except KeyboardInterrupt:
        pass  # the end of filming a camera
    if not network.seconds:
        fail(f"--input {args.input} gave no picture")
    # The first run also plans memory, or builds an engine.
    fps = 1 / np.mean(network.seconds[1:] or network.seconds)
    count, runtime = len(network.seconds), network.runtime
    print(f"{count} pictures by {runtime}, {fps:.1f} FPS with reading and writing")
    if broken:
        sys.exit(1)


def fail(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def plain(name: str, number: int) -> str:
    """Return a name in letters that Pillow's own font has, or else the number of its class."""
    letters = unicodedata.normalize("NFKD", name.replace("ß", "ss"))
    letters = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return letters if letters.isascii() else f"class {number}"


def open_onnxruntime(path: str, threads: int) -> tuple[Callable, dict[str, str], list, str]:
    """Return a function from images to outputs, what the model states, the shape of the images,
    with numbers if it is fixed, and the name of the runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are reported by the caller
    providers = [p for p in PROVIDERS if p in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    stored, shape = session.get_modelmeta().custom_metadata_map, session.get_inputs()[0].shape
    run = lambda images: session.run(None, {"images": images})[0]  # noqa: E731
    return run, stored, shape, session.get_providers()[0]


def open_openvino(
    path: str, threads: int, precision: str = "f32"
) -> tuple[Callable, dict[str, str], list, str]:
    """The same in OpenVINO, on the CPU."""
    from openvino import Core, Model
    from openvino.op import Parameter

    core = Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        fail("this CPU has no bfloat16: give --runtime openvino")
    model = core.read_model(path)
    stated = [name for name in METADATA if model.has_rt_info(["framework", name])]
    stored = {name: model.get_rt_info(["framework", name]).astype(str) for name in stated}
    shape = [axis.get_length() if axis.is_static else None for axis in model.input(0).partial_shape]
    # The upsampling of the logits would be too coarse in bfloat16: it becomes a model of its own.
    convolutions = [op for op in model.get_ordered_ops() if op.get_type_name() == "Convolution"]
    readers = [reader.get_node() for reader in convolutions[-1].output(0).get_target_inputs()]
    logits = next(op.output(0) for op in readers if op.get_type_name() == "Add")  # with its bias
    given = Parameter(logits.get_element_type(), logits.get_partial_shape())
    for reader in logits.get_target_inputs():
        reader.replace_source_output(given.output(0))
    images = model.get_parameters()
    parts = Model([logits], images), Model(model.get_results(), [given, *images])
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    first = core.compile_model(parts[0], "CPU", {**options, "INFERENCE_PRECISION_HINT": precision})
    last = core.compile_model(parts[1], "CPU", {**options, "INFERENCE_PRECISION_HINT": "f32"})
    shared = {"share_inputs": True, "share_outputs": True}  # instead of copied

    def run(images: np.ndarray) -> np.ndarray:
        return last([first(images, **shared)[0], images], **shared)[0]

    return run, stored, shape, f"OpenVINO in {precision}"


OPENERS = {
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "openvino-bfloat16": partial(open_openvino, precision="bf16"),
}


class Network:
    """A model in its runtime, what it states, and the seconds that each picture took."""

    def __init__(self, path: str, threads: int, runtime: str) -> None:
        if not os.path.isfile(path):
            fail(f"--model {path} does not exist: give a model of export.py")
        try:
            self.run, stored, shape, self.runtime = OPENERS[runtime](path, threads)
        except ImportError as error:
            fail(f"{error}: pip install {runtime.split('-')[0]}")
        except Exception as error:  # onnxruntime has a class for each kind of failure
            fail(f"--model {path} cannot be loaded ({' '.join(str(error).split())})")
        missing = ", ".join(name for name in METADATA if name not in stored)
        if missing:
            fail(f"--model {path} does not state its {missing}: export it with export.py")
        self.names, self.colors, self.label_ids, self.mean, self.std, self.height = (
            json.loads(stored[name]) for name in METADATA
        )
        self.names = [plain(name, number) for number, name in enumerate(self.names)]
        self.fixed = shape[2:]
        self.seconds: list[float] = []

    def segment(self, frames: Iterator) -> Iterator[tuple[str, Image.Image, np.ndarray]]:
        """Yield the name, overlay and classes, H x W, uint8, of each picture."""
        started = time.perf_counter()
        for name, picture in frames:
            labels = self.run(self.prepare(picture))[0]
            if labels.ndim == 3:  # logits, C x h x w
                labels = labels.argmax(0).astype(np.uint8)
            labels = Image.fromarray(labels).resize(picture.size, Image.Resampling.NEAREST)
            labels = np.asarray(labels)
            page = self.overlay(picture, labels)
            finished = time.perf_counter()
            self.seconds.append(finished - started)
            started = finished
            yield name, page, labels

    def prepare(self, picture: Image.Image) -> np.ndarray:
        """Resize a picture to the input's size and normalise it: 1 x 3 x h x w, float32."""
        width = round(picture.width * self.height / picture.height)
        size = min(max(width, MIN_WIDTH), MAX_ASPECT * self.height), self.height
        if isinstance(self.fixed[0], int):
            size = self.fixed[1], self.fixed[0]
        pixels = np.asarray(picture.resize(size, Image.Resampling.BILINEAR), np.float32)
        mean, std = np.float32(self.mean), np.float32(self.std)
        return np.ascontiguousarray((pixels / (255 * std) - mean / std).transpose(2, 0, 1)[None])

    def overlay(self, picture: Image.Image, labels: np.ndarray) -> Image.Image:
        """Blend a picture with the colours of its classes, and write their names onto it."""
        paint = Image.fromarray(labels)
        paint.putpalette([value for color in self.colors for value in color])
        page = Image.blend(picture, paint.convert("RGB"), 0.5)
        draw, size = ImageDraw.Draw(page), max(11, page.height // 40)
        font = ImageFont.load_default(size)
        for row, number in enumerate(np.flatnonzero(np.bincount(labels.ravel()))):
            top, color = size // 2 + row * (size + size // 2), tuple(self.colors[number])
            draw.rectangle((size // 2, top, size // 2 + size, top + size), color, "black")
            text, place = self.names[number], (2 * size, top)
            draw.text(place, text, "white", font, stroke_width=1, stroke_fill="black")
        return page


def read_pictures(path: str, broken: list[str]) -> Iterator[tuple[str, Image.Image]]:
    """Yield the name and the upright picture of a file, or of each one in a folder; those that
    cannot be read are reported and become `broken`."""
    paths = [Path(path)]
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        paths = [Path(path, name) for name in names if Path(name).suffix.lower() in PICTURES]
    for path in paths:
        try:
            with Image.open(path) as picture:
                upright = upright_rgb(picture)
        except Exception as error:  # what PIL raises on damaged files is not documented
            broken.append(f"--input {path} cannot be read as a picture ({error})")
            if len(broken) == len(paths):
                fail(broken[-1])
            print(f"{Path(sys.argv[0]).name}: error: {broken[-1]}", file=sys.stderr)
            continue
        yield path.stem, upright


def upright_rgb(picture: Image.Image) -> Image.Image:
    deep = ";16" in str(picture.tile[:1])
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):  # PIL would clip all above 255 to white
        return Image.fromarray(to_8_bits(np.asarray(picture))).convert("RGB")
    picture = picture.convert("RGB")
    if deep:  # PIL keeps the upper bytes of colours, which are nearly black if 12 bits are used
        bits = max(high for _, high in picture.getextrema()).bit_length()
        picture = picture.point(lambda value: value << (8 - bits - bits % 2))
    return picture


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


def open_video(source: str, camera: bool) -> tuple[Iterator[tuple[str, Image.Image]], float]:
    """Return the frames of a video or camera, without names, and their rate per second."""
    # OpenCV and FFmpeg would print their own errors beside the one below.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError:
        fail(f"--input {source} is read with OpenCV: pip install opencv-python")
    name = source[len("camera:") :] if source.startswith("camera:") else source
    capture = cv2.VideoCapture(int(name) if camera and name.isdigit() else name)
    if not capture.isOpened():
        fail(f"--input {source} cannot be opened as a {'camera or stream' if camera else 'video'}")

    def frames() -> Iterator[tuple[str, Image.Image]]:
        more, pixels = capture.read()
        while more:
            yield "", Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
            more, pixels = capture.read()

    return frames(), capture.get(cv2.CAP_PROP_FPS) or 25


def new_folder(args: argparse.Namespace) -> Path:
    # Without its suffix, "...png" is "..", which would lead elsewhere.
    name = Path(args.input).resolve().stem.strip(".") or "pictures"
    folder, number = Path(args.output or Path("results", name)), 2
    while args.output is None and folder.exists():
        folder, number = Path("results", f"{name}-{number}"), number + 1
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
        path = folder / f"labels/{name}.png"
        if path.exists():
            fail(f"--input holds two pictures named {name}: rename one of them")
        Image.fromarray(np.uint8(label_ids)[labels]).save(path, "PNG")
        page.save(folder / f"overlays/{name}.jpg", "JPEG", quality=90)


def film(results: Iterator, path: Path, rate: float, live: bool) -> None:
    """Write overlays as a video; those of a camera in real time, each until the next one."""
    import cv2

    writer, code = cv2.VideoWriter(), cv2.VideoWriter_fourcc(*"mp4v")
    written, started = 0, time.perf_counter()
    try:
        for _, page, _ in results:
            if not (writer.isOpened() or writer.open(str(path), code, rate, page.size)):
                fail(f"{path} cannot be written as a video: give another --output")
            due = int((time.perf_counter() - started) * rate) if live else written + 1
            while written < due:
                writer.write(cv2.cvtColor(np.asarray(page), cv2.COLOR_RGB2BGR))
                written += 1
    finally:
        writer.release()


def show(results: Iterator, seconds: list[float]) -> None:
    """Show overlays and their frame rate in a window, until q is pressed."""
    import cv2

    # Without a screen, OpenCV would abort the program.
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        fail("there is no screen to show a camera on: give --output DIR to film it")
    for _, page, _ in results:
        caption, place = f"{1 / np.mean(seconds[-10:]):.1f} FPS", (page.width // 2, 5)
        ImageDraw.Draw(page).text(place, caption, "white", ImageFont.load_default(20))
        try:
            cv2.imshow("LEDNet", cv2.cvtColor(np.asarray(page), cv2.COLOR_RGB2BGR))
        except cv2.error:
            fail("this OpenCV has no windows: pip install opencv-python, or give --output DIR")
        if cv2.waitKey(1) == ord("q"):
            break


if __name__ == "__main__":
    main()
