"""Segment your own pictures: a file, a folder, a glob or a video.

python predict.py --input photo.jpg                   into results/photo
python predict.py --input 'photos/*.jpg' --output out
python predict.py --input drive.mp4 --output out      needs PyAV: pip install av
python predict.py --input photos --checkpoint save/fine/best.pth --output out

The output folder gets overlays/, pictures painted in the colours of their classes with a legend;
colors/, the classes as colours alone; and labels/, the classes as numbers, the label ids of the
data set that the network was trained on. Everything has the size of its picture, turned upright;
overlays have the legend below. The overlays of a video are a video.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.images import DatasetError
from datasets.pictures import (
    Animation,
    Frame,
    Pictures,
    animation_frames,
    find_pictures,
    is_video,
    open_video,
    result_name,
    stack,
    video_frames,
)
from datasets.segmentation import Classes, write_label
from datasets.transforms import to_floats
from utils.arguments import ArgumentParser, file_path, natural_int, positive_int
from utils.checkpoint import load_network
from utils.errors import UserError
from utils.evaluation import label_map
from utils.files import ResultWriter, WriteError, make_results_folder, result_path, save_result
from utils.script import pick_device, run_script
from utils.speed import deploy
from utils.video import VideoWriter
from utils.visualize import overlay, paint

SHIPPED = Path(__file__).parent / "weights" / "lednet_d20_camvid.pth"
JPEG_MOST = 65_500  # pixels each way
FRAMES_PER_SECOND = 25  # of a video that does not say


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        type=file_path,
        metavar="PATH",
        help="pictures, videos, folders of them (at any depth), or globs",
    )
    parser.add_argument(
        "--checkpoint",
        type=file_path,
        metavar="FILE",
        default=str(SHIPPED),
        help="network to use; default weights/lednet_d20_camvid.pth, which comes with the code",
    )
    parser.add_argument(
        "--output",
        type=file_path,
        metavar="DIR",
        help="a new folder; default: results/ and the name of the first input",
    )
    parser.add_argument(
        "--height",
        type=positive_int,
        help="pictures are resized to this for the network, in proportion; default: as it was "
        "trained",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=4,
        help="most pictures of one size that run together; default 4",
    )
    parser.add_argument(
        "--workers",
        type=natural_int,
        default=min(4, os.cpu_count() or 1),
        help="processes that read, and threads that write; default %(default)s",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1; default auto")
    args = parser.parse_args()
    if args.output is None:
        name = result_name(Path(args.input[0]).resolve().name).strip("*")
        args.output = str(Path("results") / (name or "pictures"))
    if args.height is not None and args.height < 64:
        raise UserError(f"--height {args.height} is too small: LEDNet needs 64x64")
    return args


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    network, checkpoint = load_network(args.checkpoint)
    network = deploy(network.to(device), compiled=False)
    floats = to_floats(checkpoint["mean"], checkpoint["std"], device)
    classes = Classes.from_checkpoint(checkpoint)
    height = args.height or checkpoint["height"]
    files = find_pictures(args.input)
    output = Path(args.output)
    make_results_folder(output)

    stills = [file for file in files if not is_video(file[0])]
    videos = [file for file in files if is_video(file[0])]
    failures: list[str] = []
    started, done = time.perf_counter(), 0
    bar, saver = (
        tqdm(total=len(stills), unit="img", disable=None),
        ResultWriter(args.workers),
    )
    with bar, saver:

        def fail(message: str) -> None:
            failures.append(message)
            bar.write(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)

        def read_stills() -> Iterator[Frame]:
            pictures = Pictures(stills, height)
            for read in DataLoader(pictures, batch_size=None, num_workers=args.workers):
                try:
                    if isinstance(read, str):
                        fail(read)
                    elif isinstance(read, Animation):
                        yield from animation_frames(read, height)
                    else:
                        yield read
                except DatasetError as error:
                    fail(str(error))
                bar.update()

        for frame, labels in segment(network, read_stills(), floats, args.batch_size):
            saver.put(save, output, frame, labels, classes)
            saver.put(save_overlay, output, frame, labels, classes)
            done += 1
        for path, name in videos:
            try:
                with open_video(path) as video:
                    stream = video.streams.video[0]
                    bar.reset(stream.frames or None)
                    rate = stream.average_rate or FRAMES_PER_SECOND
                bar.set_description(Path(path).name)
                shown = result_path(output, f"overlays/{name}.mp4")
                frames = video_frames(path, name, height)
                with VideoWriter(shown, rate) as writer:
                    try:
                        for frame, labels in segment(network, frames, floats, args.batch_size):
                            saver.put(save, output, frame, labels, classes)
                            page = overlay(frame.image, labels, classes.names, classes.colors)
                            writer.add(page)
                            done += 1
                            bar.update()
                    except DatasetError as error:  # what was read until there is kept
                        fail(str(error))
            except DatasetError as error:
                fail(str(error))
            except OSError as error:
                raise WriteError(
                    f"{error.filename} cannot be written ({error.strerror})"
                ) from error
        saver.finish()
        for message in saver.failures:
            fail(message)
    seconds = time.perf_counter() - started
    print(
        f"{done} pictures of {len(files) - len(failures)} files in {seconds:.1f} s, "
        f"{done / seconds:.1f} images/s end to end, on {device} at a height of {height}: {output}"
    )
    if failures:
        print(f"{len(failures)} of {len(files)} files failed, as said above", file=sys.stderr)
        sys.exit(1)


@torch.inference_mode()
def segment(
    network: torch.nn.Module,
    frames: Iterable[Frame],
    floats: Callable[[Tensor], Tensor],
    batch_size: int,
) -> Iterator[tuple[Frame, Tensor]]:
    """Each frame with its classes, H x W, uint8, on the CPU, at the size of the picture."""
    for batch in batches(frames, batch_size):
        logits = network(floats(stack(batch)))
        for frame, planes in zip(batch, logits, strict=True):
            yield frame, label_map(planes, frame.image.shape[-2:]).cpu()


def batches(frames: Iterable[Frame], most: int) -> Iterator[list[Frame]]:
    """Neighbours of one size, at most so many together."""
    for _, same_size in groupby(frames, lambda frame: frame.resized.shape):
        batch: list[Frame] = []
        for frame in same_size:
            batch.append(frame)
            if len(batch) == most:
                yield batch
                batch = []
        if batch:
            yield batch


def save(output: Path, frame: Frame, labels: Tensor, classes: Classes) -> None:
    """Write the classes of a picture, as label ids and as colours."""
    path = result_path(output, f"labels/{frame.name}.png")
    save_result(path, lambda file: write_label(file, labels, classes))
    colors = paint(labels, classes.colors)
    path = result_path(output, f"colors/{frame.name}.png")
    save_result(path, lambda file: colors.save(file, "PNG"))


def save_overlay(output: Path, frame: Frame, labels: Tensor, classes: Classes) -> None:
    page = overlay(frame.image, labels, classes.names, classes.colors)
    suffix, kind = (".jpg", "JPEG") if max(page.size) <= JPEG_MOST else (".png", "PNG")
    path = result_path(output, f"overlays/{frame.name}{suffix}")
    save_result(path, lambda file: page.save(file, kind, quality=90))


if __name__ == "__main__":
    run_script(main)
