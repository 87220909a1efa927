"""Score a trained LEDNet on its data set, time it, and write label files for the server.

    python eval_cityscapes_server.py --checkpoint FILE --datadir DIR
    python eval_cityscapes_server.py --checkpoint FILE --datadir DIR --subset test \\
        --save-results results/test        # the PNGs that the benchmark server takes
    python eval_cityscapes_server.py --apn-channels 128    # speed and size alone
    python eval_cityscapes_server.py --checkpoint FILE --datadir DIR --runtime onnx
    torchrun --nproc-per-node 8 eval_cityscapes_server.py --checkpoint FILE --datadir DIR

The checkpoint says which data set and classes it is of: Cityscapes, CamVid or your own. IoU is
measured at the full resolution of the labels, over all of their pixels that are not ignored, and
averaged as the official evaluation of Cityscapes does.
"""

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datasets import DATASETS
from datasets.check import LISTING, check_headers
from datasets.loading import as_lists
from datasets.segmentation import Classes, Segmentation, resized_size, write_label
from datasets.transforms import to_floats
from models.lednet import LEDNet
from utils import distributed
from utils.arguments import ArgumentParser, file_path, natural_int, positive_int
from utils.checkpoint import load_network
from utils.errors import UserError
from utils.evaluation import evaluate
from utils.files import (
    ResultWriter,
    WriteError,
    atomic_write,
    make_results_folder,
    result_path,
    save_result,
)
from utils.metrics import ConfusionMatrix, mean_score
from utils.onnx import OnnxNetwork, export_onnx
from utils.script import pick_device, run_script
from utils.speed import (
    InPrecision,
    count_multiply_adds,
    count_parameters,
    deploy,
    device_of,
    measure_latency,
)
from utils.visualize import score_table

PRECISIONS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--checkpoint", type=file_path, metavar="FILE", help="best.pth of a run of main.py"
    )
    parser.add_argument(
        "--datadir",
        type=file_path,
        help="folder of the data set that it was trained on; without it: speed and size alone",
    )
    parser.add_argument(
        "--subset", default="val", help="train, val, test or another split; default val"
    )
    parser.add_argument(
        "--height",
        type=positive_int,
        help="images are resized to this for the network; default: as it was trained, or 512",
    )
    parser.add_argument(
        "--apn-channels",
        "--D",
        type=positive_int,
        help="width of the decoder where there is no checkpoint; default 20",
    )
    parser.add_argument(
        "--save-results",
        type=file_path,
        metavar="DIR",
        help="write the data set's own label ids as PNGs of full size into this new folder",
    )
    parser.add_argument(
        "--json", type=file_path, metavar="FILE", help="write every figure into this file"
    )
    parser.add_argument(
        "--runtime",
        choices=("torch", "compiled", "onnx"),
        default="torch",
        help="torch: the network as it was trained; compiled: folded and by torch.compile; onnx: "
        "exported, by ONNX Runtime on the CPU; default torch",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="that the network computes in; default float32",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        help="of the scoring; default 1, on a GPU 8",
    )
    parser.add_argument(
        "--workers",
        type=natural_int,
        help="processes that load images, and threads that write results; default 0 on a CPU, "
        "where the network needs all cores, on a GPU one for each core up to 8",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1; default auto")
    args = parser.parse_args()
    if args.save_results and not (args.checkpoint and args.datadir):
        raise UserError("--save-results needs --checkpoint and --datadir: there is nothing to save")
    if args.datadir and not args.checkpoint:
        raise UserError("--datadir needs --checkpoint: an untrained network has no score")
    if args.json and Path(args.json).exists():
        raise UserError(f"--json {args.json} exists: give a new file, or move the old one away")
    if args.json:
        folder = Path(args.json).parent
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UserError(f"--json {args.json}: {folder} is no folder to write into")
    if args.runtime == "onnx" and args.precision != "float32":
        raise UserError("--runtime onnx computes in float32: leave --precision out")
    return args


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    distributed.start(device)
    torch.backends.cudnn.benchmark = True
    figures: dict[str, Any] = {"checkpoint": args.checkpoint, "torch": torch.__version__}
    figures["device"] = device_name(device)

    if args.checkpoint:
        network, checkpoint = load_network(args.checkpoint)
        check_fit(args, checkpoint)
    else:
        network, checkpoint = LEDNet(apn_channels=args.apn_channels or 20).eval(), {}
    height = args.height or checkpoint.get("height", 512)
    size = (height, 2 * height)

    if args.datadir:
        dataset, size = distributed.first(lambda: find_data(args, checkpoint, height))
    if min(size) < 64:
        raise UserError(
            f"--height {height} makes images of {size[1]}x{size[0]}: LEDNet needs 64x64"
        )
    if args.save_results:
        folder = Path(args.save_results)
        distributed.first(lambda: make_results_folder(folder))

    with tempfile.TemporaryDirectory() as folder:
        running = on_runtime(network.to(device), args.runtime, PRECISIONS[args.precision], folder)
        if args.datadir:
            figures |= {"datadir": args.datadir, "subset": args.subset, "images": len(dataset)}
            floats = to_floats(checkpoint["mean"], checkpoint["std"], device)
            figures |= score(running, dataset, size, floats, device, args)
        if not distributed.is_first():
            return
        tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
        with_tf32 = args.precision == "float32" and tf32
        figures["precision"] = args.precision + (" with TF32 in convolutions" if with_tf32 else "")
        figures["runtime"] = args.runtime
        figures |= measure(network, running, size)
    print_size_and_speed(figures)
    if args.save_results:
        print(f"\n{len(dataset)} label PNGs written into {args.save_results}")
    if args.json:
        write_json(Path(args.json), figures)


def find_data(
    args: argparse.Namespace, checkpoint: dict[str, Any], height: int
) -> tuple[Segmentation, tuple[int, int]]:
    """The data set that a checkpoint says, and the height and width of its first image."""
    kind, classes = DATASETS[checkpoint["dataset"]], Classes.from_checkpoint(checkpoint)
    dataset = kind(args.datadir, args.subset, classes, height, resize_labels=False)
    return dataset, resized_size(*check_headers(dataset.pairs, LISTING)[0], height)


def check_fit(args: argparse.Namespace, checkpoint: dict[str, Any]) -> None:
    """See that the checkpoint is of the network and the classes that are asked for."""
    width = checkpoint["apn_channels"]
    if args.apn_channels not in (None, width):
        raise UserError(
            f"{args.checkpoint} was trained with --apn-channels {width}, not {args.apn_channels}: "
            "leave the option out"
        )
    kind = DATASETS.get(checkpoint["dataset"])
    if kind is None:
        raise UserError(
            f"{args.checkpoint} was trained on {checkpoint['dataset']}, which is none of "
            f"{', '.join(DATASETS)}: use another checkpoint, or add the data set to datasets/"
        )
    if args.subset not in kind.SPLITS:
        raise UserError(
            f"--subset {args.subset}: {checkpoint['dataset']} has {', '.join(kind.SPLITS)}"
        )


def on_runtime(network: LEDNet, runtime: str, dtype: torch.dtype, folder: str) -> nn.Module:
    """The network as it is to be scored and timed, images to logits in float32.

    Args:
        folder: for files that the runtime needs, as long as it runs.
    """
    if runtime == "onnx":
        if device_of(network).type != "cpu":
            raise UserError("--runtime onnx runs on the CPU here: give --device cpu as well")
        path = Path(folder, "network.onnx")
        export_onnx(network, {}, path)
        return OnnxNetwork(path)
    if runtime == "compiled":
        return deploy(network, dtype=dtype)
    network = network.to(memory_format=torch.channels_last)
    return network if dtype == torch.float32 else InPrecision(network, dtype)


@torch.inference_mode()
def score(
    network: nn.Module,
    dataset: Segmentation,
    size: tuple[int, int],
    floats: Callable[[Tensor], Tensor],
    device: torch.device,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Run the network over a subset, write its label PNGs if asked, and print the scores.

    Of several processes each has a part of the images, and writes the PNGs of those.
    """
    on_gpu = device.type == "cuda"
    batch_size = args.batch_size or (8 if on_gpu else 1)
    workers = args.workers
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if on_gpu else 0
    part = distributed.share(dataset)
    loader = DataLoader(
        part,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=as_lists,
        pin_memory=on_gpu,
    )
    own = range(distributed.rank(), len(dataset), distributed.processes())
    names = map(dataset.result_name, own)
    print(f"scoring {len(dataset)} images of {args.subset}", flush=True)
    # What compiles does so before the time is taken, for the last batch too.
    for count in sorted({min(batch_size, len(part)), len(part) % batch_size} - {0}):
        for _ in range(3):
            network(floats(torch.zeros(count, 3, *size, dtype=torch.uint8)))
    started = time.perf_counter()
    with ResultWriter(workers) as saver:

        def write(name: str, prediction: Tensor) -> None:
            path = result_path(Path(args.save_results), name)
            save_result(path, lambda file: write_label(file, prediction, dataset.classes))

        def save(_image: Tensor, prediction: Tensor, _label: Tensor) -> None:
            saver.put(write, next(names), prediction.cpu())

        title = f"scoring {args.subset}"
        on_image = save if args.save_results else None
        _, confusion = evaluate(
            network, loader, floats, len(dataset.classes), title, on_image=on_image
        )
        saver.finish()
    failures = [failure for of_one in distributed.gather(saver.failures) for failure in of_one]
    if failures:
        raise UserError(f"{len(failures)} label PNGs are missing: {failures[0]}")
    rate = {"processes": distributed.processes()}
    rate |= {"scored_images_per_second": len(dataset) / (time.perf_counter() - started)}
    print(f"{rate['scored_images_per_second']:.1f} images/s, files to scores")
    if not confusion.counts.any():
        print(f"{args.subset}: there are no labels, and so no scores")
        return rate
    return rate | print_scores(confusion, dataset.classes)


def print_scores(confusion: ConfusionMatrix, classes: Classes) -> dict[str, Any]:
    """Print the IoU of classes, and of categories where there are some; return every score."""
    class_iou = confusion.class_iou().tolist()
    scores = {"class_miou": mean_score(class_iou)}
    print(f"IoU of the {len(classes)} classes in %")
    print(score_table(classes.names, class_iou))
    by_name: dict[str, Any] = {"class_iou": dict(zip(classes.names, class_iou, strict=True))}
    if classes.categories:
        category_iou = confusion.category_iou(classes.categories)
        scores["category_miou"] = mean_score(list(category_iou.values()))
        print(f"\nIoU of the {len(category_iou)} categories in %")
        print(score_table(list(category_iou), list(category_iou.values())))
        by_name["category_iou"] = category_iou
    scores["pixel_accuracy"] = confusion.pixel_accuracy()
    scores["mean_accuracy"] = confusion.mean_accuracy()
    print()
    for name, value in scores.items():
        print(f"{name.replace('miou', 'mIoU').replace('_', ' '):15} {100 * value:6.2f} %")
    print()
    return scores | by_name


def measure(network: LEDNet, running: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """Parameters and multiply-adds of the network at its input size, latency as it runs."""
    return {
        "input_height": size[0],
        "input_width": size[1],
        "parameters": count_parameters(network),
        "encoder_parameters": count_parameters(network.encoder),
        "decoder_parameters": count_parameters(network.decoder),
        "multiply_adds": count_multiply_adds(network.float(), size),
        **asdict(measure_latency(running, size)),
    }


def print_size_and_speed(figures: dict[str, Any]) -> None:
    size = f"{figures['input_width']}x{figures['input_height']}"
    print(
        f"parameters      {figures['parameters']:,} (encoder {figures['encoder_parameters']:,}, "
        f"decoder {figures['decoder_parameters']:,})\n"
        f"multiply-adds   {figures['multiply_adds'] / 1e9:.2f} G at {size}, of the convolutions "
        "(as floating point operations: twice that)\n"
        f"speed           {figures['fps']:.1f} FPS at {size}, batch 1, image to logits, "
        f"{figures['precision']}, {figures['runtime']}\n"
        f"latency         median {figures['median_ms']:.2f} ms, p95 {figures['p95_ms']:.2f} ms, "
        f"over {figures['passes']} passes on {figures['device']}"
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures; NaN, which JSON does not have, becomes null.

    Raises:
        UserError: the file cannot be written.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    try:
        with atomic_write(path) as unfinished:
            unfinished.write_text(json.dumps(plain(figures), indent=2) + "\n")
    except OSError as error:
        raise WriteError(f"{error.filename} cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    run_script(main)
