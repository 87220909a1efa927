"""Score a trained LEDNet on its data set, time it, and write label files for the server.

    python eval_cityscapes_server.py --checkpoint FILE --datadir DIR
    python eval_cityscapes_server.py --checkpoint FILE --datadir DIR --subset test \\
        --save-results results/test        # the PNGs that the benchmark server takes
    python eval_cityscapes_server.py --apn-channels 128    # size and speed only
    python eval_cityscapes_server.py --checkpoint FILE --datadir DIR --runtime onnx
    python eval_cityscapes_server.py --checkpoint FILE --datadir DIR --runtime openvino \\
        --precision bfloat16               # or with --model, the 8-bit one of tools/quantize.py
    torchrun --nproc-per-node 8 eval_cityscapes_server.py --checkpoint FILE --datadir DIR

The checkpoint states its data set and classes. IoU is measured at the full resolution of the
labels, without ignored pixels, and averaged as in the official evaluation of Cityscapes.
"""

import json
import os
import tempfile
import time
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets.check import check_files
from datasets.images import MIN_SIZE, Size
from datasets.loading import batch_loader
from datasets.segmentation import Classes, Segmentation, resized_size, write_label
from models.deployed import deploy
from models.lednet import LEDNet
from utils import distributed, files, speed
from utils.arguments import (
    INFERENCE_ADVICE,
    PRECISIONS,
    ArgumentParser,
    file_path,
    natural_int,
    new_file,
    positive_int,
)
from utils.checkpoint import Description, load_network
from utils.errors import UserError
from utils.evaluation import evaluate, memory_errors
from utils.metrics import ConfusionMatrix, mean_score
from utils.onnx import OnnxNetwork, export_onnx
from utils.openvino import in_openvino
from utils.script import device_name, run_script, start_inference
from utils.visualize import score_table


def parse_args() -> Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--checkpoint", type=file_path, metavar="FILE", help="best.pth of a run of main.py")
    add("--datadir", type=file_path, metavar="DIR",
        help="data set it was trained on; default: none, only size and speed are measured")
    add("--subset", "--split", default="val",
        help="train, val, test or another split; default %(default)s")
    add("--height", type=positive_int, help="of the input; default: as in training, or 512")
    add("--apn-channels", "--D", type=positive_int,
        help="width D of the decoder, without a checkpoint; default 20")
    add("--save-results", type=file_path, metavar="DIR",
        help="new folder for the predictions: PNGs of the data set's label ids, in full size")
    add("--json", type=new_file, metavar="FILE", help="new file for all figures")
    add("--batch-size", type=positive_int,
        help="images scored at once; default 1, with --runtime torch on a GPU 8")
    add("--workers", "--num-workers", type=natural_int,
        help="processes that load images, and threads that write results; default 0 on a CPU, "
        "where the network needs all cores, on a GPU one per core up to 8")
    # fmt: on
    parser.add_runtime(
        torch="as trained",
        compiled="fused, through torch.compile",
        onnx="in ONNX Runtime on the CPU",
    )  # fmt: skip
    parser.add_device()
    args = parser.parse_args()
    if args.save_results and not (args.checkpoint and args.datadir):
        raise UserError("--save-results needs --checkpoint and --datadir: there is nothing to save")
    if args.datadir and not args.checkpoint:
        raise UserError("--datadir needs --checkpoint: an untrained network has no score")
    return args


def main() -> None:
    args = parse_args()
    device = start_inference(args)
    distributed.start(device)
    torch.backends.cudnn.benchmark = True

    network, about, dataset = LEDNet(apn_channels=args.apn_channels or 20).eval(), None, None
    if args.checkpoint:
        network, about = load_network(args.checkpoint)
        if args.apn_channels not in (None, about.apn_channels):
            raise UserError(f"{args.checkpoint} has D = {about.apn_channels}: leave --D out")
    height = args.height or (about.height if about else 512)
    size = (height, 2 * height)
    if args.datadir:
        dataset, size = distributed.first(lambda: open_dataset(args, about, height))
    if min(size) < MIN_SIZE:
        raise UserError(f"--height {height} is too small: LEDNet needs {MIN_SIZE}x{MIN_SIZE}")
    if args.save_results:
        distributed.first(lambda: files.make_results_folder(Path(args.save_results)))

    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32 and args.precision == "float32"
    figures: dict[str, Any] = {
        "checkpoint": args.checkpoint,
        "torch": torch.__version__,
        "precision": args.precision + (" with TF32 in convolutions" if tf32 else ""),
        "runtime": f"{args.runtime} with {args.model}" if args.model else args.runtime,
        "device": device_name(device),
    }
    setting = "{precision}, {runtime}, on {device}".format_map(figures)
    distributed.first(lambda: print(f"running in {setting}", flush=True))
    model = on_runtime(network.to(device), args)
    if dataset:
        figures |= {"datadir": args.datadir, "subset": args.subset, "images": len(dataset)}
        figures |= score(model, dataset, size, about, args)
    if not distributed.is_first():
        return
    figures |= measure(network, model, size, setting)
    if args.save_results:
        print(f"\n{len(dataset)} label PNGs written into {args.save_results}")
    if args.json:
        # JSON has no NaN, the IoU of absent classes: they become null.
        figures = json.loads(json.dumps(figures), parse_constant=lambda _: None)
        with files.write_errors(args.json), files.atomic_write(args.json) as unfinished:
            unfinished.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def open_dataset(args: Namespace, about: Description, height: int) -> tuple[Segmentation, Size]:
    """Open and check the split; return it and the size that its first image is resized to."""
    dataset = about.open_split(args.datadir, args.subset, height, resize_labels=False)
    return dataset, resized_size(*check_files(dataset.pairs)[0], height)


def on_runtime(network: LEDNet, args: Namespace) -> nn.Module:
    """Return the network as it is scored and timed, from images to logits in float32."""
    dtype = PRECISIONS[args.precision]
    if args.runtime == "openvino":
        return in_openvino(network, dtype, args.model)
    if args.runtime == "onnx":
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(network, None, Path(folder, "network.onnx"))
            return OnnxNetwork(Path(folder, "network.onnx"))
    if args.runtime == "compiled":
        # By default, sizes beyond the eighth are not compiled.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
        return deploy(network, dtype=dtype)
    network = network.to(memory_format=torch.channels_last)
    return network if dtype == torch.float32 else speed.InPrecision(network, dtype)


@torch.inference_mode()
def score(
    model: nn.Module, dataset: Segmentation, size: Size, about: Description, args: Namespace
) -> dict[str, Any]:
    """Run the network over a split, write its label PNGs if asked for, and print the scores.

    Each of several processes takes its share of the images, and writes their PNGs.
    """
    device, workers = speed.device_of(model), args.workers
    on_gpu = device.type == "cuda"
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if on_gpu else 0
    compiled = args.runtime == "compiled"
    # What is compiled has the batch that is timed: another one would be compiled anew.
    batch_size = args.batch_size or (8 if on_gpu and not compiled else 1)
    normalize = about.normalizer(device)
    indices = range(distributed.rank(), len(dataset), distributed.processes())
    share, names = distributed.share(dataset), map(dataset.result_name, indices)
    print(f"scoring {len(dataset)} images of {args.subset}", flush=True)
    # Before the clock starts, since torch.compile starts anew for the size of the last batch, and
    # records its CUDA graph in the third pass.
    counts = {min(batch_size, len(share)), len(share) % batch_size if compiled else 0} - {0}
    for count in sorted(3 * list(counts)):
        images = torch.zeros(count, 3, *size, dtype=torch.uint8)
        with memory_errors(images):
            model(normalize(images))
    started = time.perf_counter()
    with files.ResultWriter(workers) as writer:

        def save(_image: Tensor, prediction: Tensor, _label: Tensor) -> None:
            encode = partial(write_label, prediction=prediction.cpu(), classes=about.classes)
            writer.put(files.save_result, Path(args.save_results), next(names), encode)

        loader = batch_loader(share, None, batch_size, workers, on_gpu)
        _, confusion = evaluate(
            model, loader, normalize, len(about.classes), f"scoring {args.subset}", len(share),
            on_image=save if args.save_results else None,
        )  # fmt: skip
        writer.finish()
    failures = [failure for each in distributed.gather(writer.failures) for failure in each]
    if failures:
        raise UserError(f"{len(failures)} label PNGs are missing: {failures[0]}")
    rate = len(dataset) / (time.perf_counter() - started)
    print(f"{rate:.1f} images/s, from files to scores")
    figures = {"processes": distributed.processes(), "scored_images_per_second": rate}
    if confusion.counts.any():
        return figures | print_scores(confusion, about.classes)
    print(f"{args.subset} has no labels, so there are no scores")
    return figures


def print_scores(confusion: ConfusionMatrix, classes: Classes) -> dict[str, Any]:
    """Print and return all scores; the categories only if the data set has some."""
    tables = {"class_iou": dict(zip(classes.names, confusion.class_iou().tolist(), strict=True))}
    if classes.categories:
        tables["category_iou"] = confusion.category_iou(classes.categories)
    scores = {}
    for name, iou in tables.items():
        print(f"{name.replace('_iou', ' IoU')} in %\n{score_table(iou, iou.values())}\n")
        scores[name.replace("iou", "miou")] = mean_score(list(iou.values()))
    scores["pixel_accuracy"] = confusion.pixel_accuracy()
    scores["mean_accuracy"] = confusion.mean_accuracy()
    for name, value in scores.items():
        print(f"{name.replace('miou', 'mIoU').replace('_', ' '):15} {100 * value:6.2f} %")
    print()
    return scores | tables


def measure(network: LEDNet, model: nn.Module, size: Size, setting: str) -> dict[str, Any]:
    """Measure and print the size of the network, and the latency of the model in its setting."""
    with memory_errors([torch.empty(3, *size)]):
        latency = speed.measure_latency(model, size)
    total, encoder = speed.count_parameters(network), speed.count_parameters(network.encoder)
    multiply_adds = speed.count_multiply_adds(network, size)
    print(
        f"parameters      {total:,} (encoder {encoder:,}, decoder {total - encoder:,})\n"
        f"multiply-adds   {multiply_adds / 1e9:.2f} G at {size[1]}x{size[0]}, of the convolutions\n"
        f"speed           {latency.fps:.1f} FPS at {size[1]}x{size[0]}, batch 1, image to logits\n"
        f"latency         median {latency.median_ms:.2f} ms, p95 {latency.p95_ms:.2f} ms, over "
        f"{latency.passes} passes in {setting}"
    )
    counts = {"parameters": total, "encoder_parameters": encoder}
    counts |= {"decoder_parameters": total - encoder, "multiply_adds": multiply_adds}
    return {"input_height": size[0], "input_width": size[1]} | counts | asdict(latency)


if __name__ == "__main__":
    own_advice = {files.WriteError: "make room, or give another --save-results or --json"}
    run_script(main, INFERENCE_ADVICE | own_advice)
