"""Score a trained LEDNet on Cityscapes, time it, and write label files for the server.

    python eval_cityscapes_server.py --checkpoint FILE --datadir DIR
    python eval_cityscapes_server.py --checkpoint FILE --datadir DIR --subset test \\
        --save-results results/test        # the PNGs that the benchmark server takes
    python eval_cityscapes_server.py --apn-channels 128    # speed and size alone

IoU is measured at the full resolution of the labels, over all of their pixels that are not
ignored, and averaged as the official evaluation does.
"""

import argparse
import json
import math
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.cityscapes import (
    CATEGORIES,
    CLASS_NAMES,
    TRAIN_ID_TO_LABEL_ID,
    Cityscapes,
    check_files,
)
from datasets.files import DatasetError, image_size
from datasets.transforms import eval_transforms, resized_size
from models.lednet import LEDNet
from utils.checkpoint import CheckpointError, load_network
from utils.cli import (
    ArgumentParser,
    UsageError,
    file_path,
    natural_int,
    pick_device,
    positive_int,
    run,
)
from utils.engine import evaluate
from utils.metrics import ConfusionMatrix, mean_score
from utils.speed import count_multiply_adds, count_parameters, measure_latency
from utils.visualize import score_table


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--checkpoint", type=file_path, metavar="FILE", help="best.pth of a run of main.py"
    )
    parser.add_argument(
        "--datadir",
        type=file_path,
        help="folder with leftImg8bit and gtFine; without it: speed and size alone",
    )
    parser.add_argument(
        "--subset", choices=("train", "val", "test"), default="val", help="default val"
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
        help="write labelIds PNGs of full size into this new folder",
    )
    parser.add_argument(
        "--json", type=file_path, metavar="FILE", help="write every figure into this file"
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=1, help="of the scoring; default 1"
    )
    parser.add_argument(
        "--workers",
        type=natural_int,
        default=min(4, os.cpu_count() or 1),
        help="processes that load images; default %(default)s",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1; default auto")
    args = parser.parse_args()
    if args.save_results and not (args.checkpoint and args.datadir):
        raise UsageError(
            "--save-results needs --checkpoint and --datadir: there is nothing to save"
        )
    if args.datadir and not args.checkpoint:
        raise UsageError("--datadir needs --checkpoint: an untrained network has no score")
    if args.json and Path(args.json).exists():
        raise UsageError(f"--json {args.json} exists: give a new file, or move the old one away")
    if args.json:
        folder = Path(args.json).parent
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UsageError(f"--json {args.json}: {folder} is no folder to write into")
    return args


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    torch.backends.cudnn.benchmark = True
    figures: dict[str, Any] = {"checkpoint": args.checkpoint, "torch": torch.__version__}
    figures["device"] = device_name(device)

    if args.checkpoint:
        network, checkpoint = load_network(args.checkpoint)
        check_fit(args, checkpoint)
    else:
        network, checkpoint = LEDNet(apn_channels=args.apn_channels or 20).eval(), {}
    network.to(device)
    height = args.height or checkpoint.get("height", 512)
    size = (height, 2 * height)

    if args.datadir:
        transforms = eval_transforms(height, checkpoint["mean"], checkpoint["std"])
        dataset = Cityscapes(args.datadir, args.subset, transforms=transforms)
        check_files(dataset)
        size = resized_size(*image_size(dataset.images[0]), height)
    if min(size) < 64:
        raise UsageError(
            f"--height {height} makes images of {size[1]}x{size[0]}: LEDNet needs 64x64"
        )
    if args.save_results:
        make_results_folder(Path(args.save_results))

    if args.datadir:
        figures |= {"datadir": args.datadir, "subset": args.subset, "images": len(dataset)}
        figures |= score(network, dataset, args)
    figures |= measure(network, size)
    print_size_and_speed(figures)
    if args.save_results:
        print(f"\n{len(dataset)} label PNGs for the server written into {args.save_results}")
    if args.json:
        write_json(Path(args.json), figures)


def check_fit(args: argparse.Namespace, checkpoint: dict[str, Any]) -> None:
    """See that the checkpoint is of the network and the classes that are asked for."""
    width = checkpoint["apn_channels"]
    if args.apn_channels not in (None, width):
        raise UsageError(
            f"{args.checkpoint} was trained with --apn-channels {width}, not {args.apn_channels}: "
            "leave the option out"
        )
    if checkpoint["class_names"] != CLASS_NAMES:
        raise UsageError(
            f"{args.checkpoint} was trained on {checkpoint['num_classes']} classes of "
            f"{checkpoint['dataset']}, not on the 19 of Cityscapes: use another checkpoint, or "
            f"train from this one with main.py --init {args.checkpoint}"
        )


def score(network: LEDNet, dataset: Cityscapes, args: argparse.Namespace) -> dict[str, Any]:
    """Run the network over a subset, write its label PNGs if asked, and print the scores."""
    loader = DataLoader(
        dataset,
        batch_size=args.batch_size,
        num_workers=args.workers,
        pin_memory=next(network.parameters()).device.type == "cuda",
    )
    paths = iter(dataset.images)

    def save(_image: Tensor, prediction: Tensor, _label: Tensor) -> None:
        if args.save_results:
            save_label_ids(Path(args.save_results), next(paths), prediction)

    print(f"scoring {len(dataset)} images of {args.subset}", flush=True)
    _, confusion = evaluate(
        network, loader, len(CLASS_NAMES), f"scoring {args.subset}", on_image=save
    )
    if args.subset == "test":
        print("test: the labels are not public, so there are no scores here")
        return {}
    return print_scores(confusion)


def print_scores(confusion: ConfusionMatrix) -> dict[str, Any]:
    """Print class and category IoU; return every score, None where there is none."""
    class_iou = confusion.class_iou().tolist()
    category_iou = confusion.category_iou(CATEGORIES)
    scores = {
        "class_miou": mean_score(class_iou),
        "category_miou": mean_score(list(category_iou.values())),
        "pixel_accuracy": confusion.pixel_accuracy(),
        "mean_accuracy": confusion.mean_accuracy(),
    }
    print("IoU of the 19 classes in %")
    print(score_table(CLASS_NAMES, class_iou))
    print("\nIoU of the 7 categories in %")
    print(score_table(list(category_iou), list(category_iou.values())))
    print(f"\nclass mIoU      {100 * scores['class_miou']:6.2f} %")
    print(f"category mIoU   {100 * scores['category_miou']:6.2f} %")
    print(f"pixel accuracy  {100 * scores['pixel_accuracy']:6.2f} %")
    print(f"mean accuracy   {100 * scores['mean_accuracy']:6.2f} %\n")
    by_name = dict(zip(CLASS_NAMES, class_iou, strict=True))
    scores |= {"class_iou": by_name, "category_iou": category_iou}
    return scores


def save_label_ids(folder: Path, image_path: str, prediction: Tensor) -> None:
    """Write a prediction, H x W of trainIds, as a labelIds PNG that the official script finds."""
    name = Path(image_path).name.replace("_leftImg8bit.png", "_pred_labelIds.png")
    path = folder / Path(image_path).parent.name / name
    path.parent.mkdir(exist_ok=True)
    label_ids = TRAIN_ID_TO_LABEL_ID[prediction.to("cpu", torch.uint8).numpy()]
    Image.fromarray(label_ids).save(path)


def measure(network: LEDNet, size: tuple[int, int]) -> dict[str, Any]:
    """Parameters, multiply-adds and latency of the network at its input size."""
    tf32 = torch.backends.cudnn.allow_tf32 and next(network.parameters()).is_cuda
    return {
        "precision": "float32, TF32 in convolutions where the GPU has it" if tf32 else "float32",
        "input_height": size[0],
        "input_width": size[1],
        "parameters": count_parameters(network),
        "encoder_parameters": count_parameters(network.encoder),
        "decoder_parameters": count_parameters(network.decoder),
        "multiply_adds": count_multiply_adds(network, size),
        **asdict(measure_latency(network, size)),
    }


def print_size_and_speed(figures: dict[str, Any]) -> None:
    size = f"{figures['input_width']}x{figures['input_height']}"
    print(
        f"parameters      {figures['parameters']:,} (encoder {figures['encoder_parameters']:,}, "
        f"decoder {figures['decoder_parameters']:,})\n"
        f"multiply-adds   {figures['multiply_adds'] / 1e9:.2f} G at {size}, of the convolutions "
        "(as floating point operations: twice that)\n"
        f"speed           {figures['fps']:.1f} FPS at {size}, batch 1, image to logits, "
        f"{figures['precision']}\n"
        f"latency         median {figures['median_ms']:.2f} ms, p95 {figures['p95_ms']:.2f} ms, "
        f"over {figures['passes']} passes on {figures['device']}"
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def make_results_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as error:
        raise UsageError(
            f"--save-results {folder} cannot be made ({error.strerror}): give a new folder"
        ) from error
    if used:
        raise UsageError(f"{folder} is not empty: give --save-results a new folder")


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures; NaN, which JSON does not have, becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    path.write_text(json.dumps(plain(figures), indent=2) + "\n")


if __name__ == "__main__":
    run(main, DatasetError, CheckpointError)
