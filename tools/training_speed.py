"""Measure how many images a second training is fed with, and trains on, with --cache and without.

    python tools/training_speed.py
    python tools/training_speed.py --datadir cityscapes --device cuda --workers 4 --json FILE

First the loader alone, with the published augmentation, on one core and without workers: decoding
the PNGs of each image, from --cache ram and from --cache DIR. Then whole steps of training as
main.py takes them, beside the plain way: float32, contiguous tensors and torch's Adam as it comes,
without a cache. All have the same --workers, but --cache ram, which needs none. What is compared
takes turns, and each gets its fastest. Without --datadir, scenes are drawn in Cityscapes' size.
"""

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets.cache import keep_decoded
from datasets.check import LISTING, check_headers
from datasets.cityscapes import Cityscapes
from datasets.drawn.streets import make_synthetic
from datasets.loading import ShuffledSeeds, WithSeed, as_lists, loader_options, training_loader
from datasets.transforms import Augment, Paper, to_floats
from eval_cityscapes_server import device_name
from models.lednet import LEDNet
from utils.arguments import ArgumentParser, file_path, natural_int, positive_int
from utils.errors import UserError
from utils.evaluation import train_one_epoch
from utils.files import atomic_write
from utils.interrupts import Watch
from utils.losses import build_loss
from utils.optim import OPTIMIZERS, PAPER
from utils.script import pick_amp_dtype, pick_device, run_script
from utils.training import Training

CPU = torch.device("cpu")


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--datadir", type=file_path, help="folder of Cityscapes")
    for name, default, what in (
        ("images", 20, "of train; files are read again where there are fewer"),
        ("height", PAPER["height"], "that images are resized to"),
        ("batch-size", PAPER["batch_size"], "of both measurements"),
        ("turns", 3, "of each way"),
    ):
        parser.add_argument(
            f"--{name}", type=positive_int, default=default, help=f"{what}; default {default}"
        )
    parser.add_argument(
        "--workers", type=natural_int, default=0, help="of the training steps; default 0"
    )
    parser.add_argument("--device", default="auto", help="of the training steps; default auto")
    parser.add_argument(
        "--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="default auto"
    )
    parser.add_argument("--json", type=file_path, metavar="FILE", help="write every figure there")
    args = parser.parse_args()
    if args.json and Path(args.json).exists():
        raise UserError(f"--json {args.json} exists: give a new file, or move the old one away")
    device = pick_device(args.device)
    amp_dtype = pick_amp_dtype(args.amp, device)
    with tempfile.TemporaryDirectory() as folder:
        datadir = args.datadir or f"{folder}/scenes"
        if not args.datadir:
            make_synthetic(datadir, {"train": args.images}, 1024, workers=os.cpu_count() or 1)
        figures = measure(
            datadir, device, amp_dtype, args.images, args.height, args.batch_size, args.workers,
            args.turns,
        )  # fmt: skip
    print(table(figures))
    if args.json:
        with atomic_write(args.json) as unfinished:
            unfinished.write_text(json.dumps(figures, indent=2) + "\n")


def measure(
    datadir: str,
    device: torch.device = CPU,
    amp_dtype: torch.dtype | None = None,
    images: int = 20,
    height: int = PAPER["height"],
    batch_size: int = PAPER["batch_size"],
    workers: int = 0,
    turns: int = 3,
) -> dict[str, Any]:
    """Compare loading and training with a cache and without.

    Args:
        datadir: of Cityscapes.
        device, amp_dtype, workers: of the training steps; the loader alone runs on one core.
        images: of train that are used; where there are fewer, files are read again.
        turns: of each way.

    Returns:
        "loader" and "training", images per second of each way, by its name, the one that the
        others are compared with first; and what was measured where.

    Raises:
        DatasetError: the data set is not usable.
    """
    torch.backends.cudnn.benchmark = True  # as in main.py
    train = Cityscapes(datadir, "train", height=height)
    # The same files again, where there are fewer.
    train.pairs = (train.pairs * math.ceil(images / len(train)))[:images]
    if len(train) < batch_size:
        raise UserError(f"--images {images} is less than a batch: give more, or --batch-size")
    sizes = {train: check_headers(train.pairs, LISTING)}
    with tempfile.TemporaryDirectory() as folder:
        (in_file,) = keep_decoded(sizes, folder, workers)
        (in_memory,) = keep_decoded(sizes, "ram", workers)
        sources = {"decoding": train, "--cache ram": in_memory, "--cache DIR": in_file}
        ways = {name: loading(source, batch_size) for name, source in sources.items()}
        loader = compare(ways, turns)

        (on_device,) = keep_decoded(sizes, "ram", workers, device)
        options = loader_options(batch_size, workers, device)
        without_workers = loader_options(batch_size, 0, CPU)  # as in main.py
        ways = {
            "plain, decoding": training(train, options, device, plain=True),
            "decoding": training(train, options, device, amp_dtype),
            "--cache ram": training(on_device, without_workers, device, amp_dtype),
            "--cache DIR": training(in_file, options, device, amp_dtype),
        }
        if device.type == "cuda":
            ways["--cache ram --compile"] = training(
                on_device, without_workers, device, amp_dtype, compiled=True
            )
        trained = compare(ways, turns)
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "amp": str(amp_dtype or "off").removeprefix("torch."),
        "images": len(train),
        "size": list(in_memory[0][0].shape[-2:]),
        "batch_size": batch_size,
        "workers": workers,
        "loader": loader,
        "training": trained,
    }


def compare(ways: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """The images per second of each way, medians of turns that they take; the first warms up."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, images_per_second in ways.items():
            rate = images_per_second()
            if turn:
                rates[name].append(rate)
    return {name: statistics.median(of_turns) for name, of_turns in rates.items()}


def loading(dataset: Dataset, batch_size: int) -> Callable[[], float]:
    """What loads and augments a data set for a second, on one core; returns images per second."""
    loader = batches_of(dataset, loader_options(batch_size, 0, CPU))
    augment = Augment(Paper(), to_floats([0.0] * 3, [1.0] * 3, CPU), CPU)

    def epochs() -> float:
        threads, seen = torch.get_num_threads(), 0
        torch.set_num_threads(1)
        started = time.perf_counter()
        while (seconds := time.perf_counter() - started) < 1:
            for images, labels, seeds, _, _ in loader:
                augment(images, labels, seeds)
                seen += len(images)
        torch.set_num_threads(threads)
        return seen / seconds

    return epochs


def training(
    dataset: Dataset,
    options: dict[str, Any],
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    plain: bool = False,
    compiled: bool = False,
) -> Callable[[], float]:
    """What trains on a data set once, as main.py or the plain way; returns images per second."""
    loader = batches_of(dataset, options)
    memory_format = torch.contiguous_format if plain else torch.channels_last
    network = LEDNet().to(device, memory_format=memory_format)
    augment = Augment(Paper(), to_floats([0.0] * 3, [1.0] * 3, device), device)
    fused = (device.type == "cuda" and not plain) or None
    optimizer = OPTIMIZERS[PAPER["optimizer"]](network.parameters(), PAPER["lr"], fused=fused)
    state = Training(
        network,
        network,
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1),
        torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16),
        options["batch_size"],
        len(loader),
        amp_dtype=amp_dtype,
    )
    forward = torch.compile(network, dynamic=False) if compiled else network
    watch = Watch(Path(), math.inf, "", lambda index: (str(index),), ())
    watch.begin(state, save=lambda: None)

    def prepare(*batch: list) -> tuple[Tensor, Tensor]:
        images, labels = augment(*batch)
        return images.contiguous(memory_format=memory_format), labels

    def epoch() -> float:
        state.begin_epoch()
        figures = train_one_epoch(
            state,
            forward,
            loader,
            prepare,
            build_loss(PAPER["loss"], torch.ones(19, device=device)),
            watch,
            title="training",
            steps_loss=0,
        )
        state.end_epoch()
        return figures["images_per_second"]

    return epoch


def batches_of(dataset: Dataset, options: dict[str, Any]) -> DataLoader:
    """Full batches of a data set, in random order."""
    sampler = ShuffledSeeds(len(dataset), seed=0)
    return training_loader(
        WithSeed(dataset), sampler, drop_last=True, collate_fn=as_lists, **options
    )


def table(figures: dict[str, Any]) -> str:
    """The figures as lines of text, each with its ratio to the first of its kind."""
    height, width = figures["size"]
    lines = [
        f"{figures['images']} images of {width}x{height} in batches of {figures['batch_size']}, "
        f"{figures['device']}, torch {figures['torch']}"
    ]
    for kind, title in (
        ("loader", "loader, one core"),
        ("training", f"training, {figures['workers']} workers, amp {figures['amp']}"),
    ):
        rates = figures[kind]
        first = next(iter(rates.values()))
        lines += [f"{title:40}  images/s     ratio"]
        lines += [f"  {way:38} {rate:9.2f} {rate / first:9.2f}" for way, rate in rates.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
