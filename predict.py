"""Segment your own pictures: a file, a folder, a glob or a video.

python predict.py --input photo.jpg                   into results/photo
python predict.py --input 'photos/*.jpg' --output out
python predict.py --input drive.mp4 --output out      needs PyAV: pip install av
python predict.py --input photos --checkpoint save/fine/best.pth --output out
python predict.py --input photos --runtime openvino --precision bfloat16

The output folder gets overlays/, the pictures blended with the colours of their classes, with a
legend below; colors/, the colours alone; and labels/, the label ids of the data set that the
network was trained on. All have the size of the upright picture. The overlays of a video are a
video.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby, islice, starmap
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from datasets import pictures
from datasets.images import MIN_SIZE, DatasetError
from datasets.loading import call_in_workers
from datasets.segmentation import Classes, write_label
from models.deployed import deploy
from utils import files
from utils.arguments import (
    INFERENCE_ADVICE,
    PRECISIONS,
    ArgumentParser,
    file_path,
    natural_int,
    positive_int,
)
from utils.checkpoint import load_network
from utils.errors import UserError
from utils.evaluation import Normalize, label_map, memory_errors
from utils.openvino import in_openvino
from utils.script import device_name, run_script, start_inference
from utils.visualize import overlay, paint, write_video

JPEG_LIMIT = 65_500  # pixels each way
FRAMES_PER_SECOND = 25  # of videos that do not say


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_checkpoint()
    add = parser.add_argument
    # fmt: off
    add("--input", nargs="+", required=True, type=file_path, metavar="PATH",
        help="pictures, videos, globs, or folders (searched recursively)")
    add("--output", type=file_path, metavar="DIR",
        help="new folder for the results; default: results/ and the name of the first input")
    add("--height", type=positive_int, help="height of the input; default: as in training")
    add("--batch-size", type=positive_int, default=4,
        help="pictures of one size that run together, at most; default %(default)s")
    add("--workers", "--num-workers", type=natural_int, default=min(4, os.cpu_count() or 1),
        help="processes that read, and threads that write; default %(default)s")
    # fmt: on
    parser.add_device()
    parser.add_runtime(torch="fused, not compiled")
    args = parser.parse_args()
    if args.height is not None and args.height < MIN_SIZE:
        raise UserError(f"--height {args.height} is too small: LEDNet needs {MIN_SIZE}x{MIN_SIZE}")
    return args


def main() -> None:
    args = parse_args()
    device, dtype = start_inference(args), PRECISIONS[args.precision]
    network, about = load_network(args.checkpoint)
    if args.runtime == "openvino":
        model = in_openvino(network, dtype, args.model)
    else:
        model = deploy(network.to(device), dtype=dtype, compiled=False)
    segment = partial(segment_frames, model, about.normalizer(device), args.batch_size)
    classes, height = about.classes, args.height or about.height
    inputs = pictures.find_pictures(args.input)
    videos = [file for file in inputs if pictures.is_video(file[0])]
    stills = [file for file in inputs if file not in videos]
    output = Path(args.output) if args.output else default_output(args.input[0])
    files.make_results_folder(output)
    print(f"segmenting {len(inputs)} files on {device_name(device)}", flush=True)

    failures: list[str] = []

    def fail(message: str) -> None:
        failures.append(message)
        tqdm.write(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)

    started, done = time.perf_counter(), 0
    with files.ResultWriter(args.workers) as writer:

        def draw(frame: pictures.Frame, labels: Tensor) -> Image.Image:
            writer.put(save_maps, output, frame, labels, classes)
            return overlay(frame.image, labels, classes.names, classes.colors)

        for frame, labels in segment(read_stills(stills, height, args.workers, fail)):
            writer.put(save_maps, output, frame, labels, classes)
            writer.put(save_overlay, output, frame, labels, classes)
            done += 1
        for path, name in videos:
            try:
                with pictures.open_video(path) as video:
                    stream = video.streams.video[0]
                    rate, total = stream.average_rate or FRAMES_PER_SECOND, stream.frames or None
            except DatasetError as error:
                fail(str(error))
                continue
            frames = until_error(pictures.video_frames(path, name, height), fail)
            segmented = tqdm(segment(frames), name, total, False, unit="img", disable=None)
            with files.write_errors(output):
                film = files.result_path(output, f"overlays/{name}.mp4")
                done += write_video(film, rate, starmap(draw, segmented))
        writer.finish()
    for message in writer.failures:
        fail(message)
    seconds = time.perf_counter() - started
    print(
        f"{done} pictures of {len(inputs)} files in {seconds:.1f} s, {done / seconds:.1f} images/s "
        f"end to end, at a height of {height}, {len(failures)} errors: {output}"
    )
    sys.exit(1 if failures else 0)


def default_output(first: str) -> Path:
    """Return results/ and the name of the first input, with a number if there are such already."""
    name = pictures.result_name(Path(first).resolve().name).strip("*")
    wanted = Path("results") / (name or "pictures")
    output = files.unused_folder(wanted)
    if output != wanted:
        print(f"note: {wanted} holds results: these go to {output}", file=sys.stderr)
    return output


def read_stills(
    stills: list[tuple[str, str]], height: int, workers: int, fail: Callable[[str], None]
) -> Iterator[pictures.Frame]:
    """Read picture files in worker processes, and report those that cannot be read."""
    read = partial(pictures.read_picture, stills, height)
    for item in call_in_workers(read, len(stills), workers, "pictures"):
        if isinstance(item, str):
            fail(item)
        elif isinstance(item, pictures.Animation):
            yield from until_error(pictures.animation_frames(item, height), fail)
        else:
            yield item


def until_error(
    frames: Iterable[pictures.Frame], fail: Callable[[str], None]
) -> Iterator[pictures.Frame]:
    """Yield frames until one cannot be read, and report that; those before it count."""
    try:
        yield from frames
    except DatasetError as error:
        fail(str(error))


@torch.inference_mode()
def segment_frames(
    model: nn.Module, normalize: Normalize, batch_size: int, frames: Iterable[pictures.Frame]
) -> Iterator[tuple[pictures.Frame, Tensor]]:
    """Yield each frame with its classes, H x W, uint8, on the CPU, at the size of the picture."""
    for _, same_size in groupby(frames, lambda frame: frame.resized.shape):
        while batch := list(islice(same_size, batch_size)):
            images = torch.stack([frame.resized for frame in batch])
            with memory_errors(images):
                logits = model(normalize(images))
            for frame, planes in zip(batch, logits, strict=True):
                yield frame, label_map(planes, frame.image.shape[-2:]).cpu()


def save_maps(output: Path, frame: pictures.Frame, labels: Tensor, classes: Classes) -> None:
    """Save the classes of a picture, as label ids and as colours."""
    colors = paint(labels, classes.colors)
    files.save_result(
        output, f"labels/{frame.name}.png", lambda file: write_label(file, labels, classes)
    )
    files.save_result(output, f"colors/{frame.name}.png", lambda file: colors.save(file, "PNG"))


def save_overlay(output: Path, frame: pictures.Frame, labels: Tensor, classes: Classes) -> None:
    page = overlay(frame.image, labels, classes.names, classes.colors)
    suffix, kind = (".jpg", "JPEG") if max(page.size) <= JPEG_LIMIT else (".png", "PNG")
    name = f"overlays/{frame.name}{suffix}"
    files.save_result(output, name, lambda file: page.save(file, kind, quality=90))


if __name__ == "__main__":
    run_script(main, INFERENCE_ADVICE)
