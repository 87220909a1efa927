"""Export a trained network with 8-bit integers, and measure what that gains and costs.

    python tools/quantize.py --datadir cityscapes --output lednet_int8.onnx
    python tools/quantize.py --datadir DIR --checkpoint save/NAME/best.pth --output robot_int8.onnx

The ranges of the activations are taken from images of train; then both models, float32 and int8,
are scored on val at the network's working height and timed in ONNX Runtime, on as many CPU cores
as OMP_NUM_THREADS says. Needs onnx, onnxscript and onnxruntime (requirements-dev.txt).

Weights use 7 of the 8 bits. CPUs without VNNI instructions add pairs of products of an unsigned
activation and a signed weight in 16 bits, with saturation: 2 x 255 x 127 does not fit, but
2 x 255 x 64 does. So a model means the same on every CPU.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets.segmentation import Segmentation
from utils.arguments import INFERENCE_ADVICE, ArgumentParser, file_path, new_file
from utils.checkpoint import load_network
from utils.evaluation import Normalize
from utils.files import atomic_write, write_errors
from utils.metrics import ConfusionMatrix, mean_score
from utils.onnx import OnnxNetwork, export_onnx, quantize
from utils.script import run_script
from utils.speed import measure_latency

LEAST_AGREEMENT = 0.99
IMAGES = 32  # for calibration; 128 give the same score on CamVid


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_checkpoint()
    add = parser.add_argument
    # fmt: off
    add("--datadir", type=file_path, metavar="DIR", required=True, help="data set of the network")
    add("--output", type=new_file, metavar="FILE", required=True, help="new file for the model")
    add("--labels", action="store_true", help="output label maps, as export.py does")
    # fmt: on
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    network, about = load_network(args.checkpoint)
    train, val = (about.open_split(args.datadir, split) for split in ("train", "val"))
    normalize = about.normalizer(torch.device("cpu"))
    chosen = np.unique(np.linspace(0, len(train) - 1, IMAGES).round())  # of the whole of train
    images = [normalize(train[int(index)][0][None]) for index in chosen]

    output = Path(args.output)
    with tempfile.TemporaryDirectory() as folder, write_errors(output):
        exported = Path(folder, "float32.onnx")
        export_onnx(network, about, exported, args.labels)
        with atomic_write(output) as unfinished:
            quantize(exported, unfinished, images)
        networks = {"float32": OnnxNetwork(exported), "int8": OnnxNetwork(output)}
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
    size = images[0].shape[2:]
    print(f"images of {size[1]}x{size[0]} on {torch.get_num_threads()} CPU cores, ONNX Runtime")
    for name, model in networks.items():
        latency = measure_latency(model, size, seconds=4)
        miou = score(model, val, normalize)
        print(f"{name:8} {latency.median_ms:6.1f} ms, {100 * miou:5.2f} % mIoU on val")
    labels = [[labels_of(model(image)) for image in images] for model in networks.values()]
    same = [(a == b).float().mean().item() for a, b in zip(*labels, strict=True)]
    print(f"int8 gives {100 * np.mean(same):.2f} % of the labels of float32, on images of train")
    if np.mean(same) < LEAST_AGREEMENT:
        print(f"warning: less than {100 * LEAST_AGREEMENT:.0f} %: compare the scores on val")


def labels_of(outputs: Tensor) -> Tensor:
    """Return label maps, N x H x W, for the outputs of a model with or without --labels."""
    return outputs if outputs.ndim == 3 else outputs.argmax(1).to(torch.uint8)


def score(network: OnnxNetwork, val: Segmentation, normalize: Normalize) -> float:
    """Return the mIoU on a data set."""
    confusion = ConfusionMatrix(len(val.classes))
    for image, label in tqdm(val, "scoring val", leave=False, disable=None):
        confusion.update(labels_of(network(normalize(image[None]))), label[None].long())
    return mean_score(confusion.class_iou())


if __name__ == "__main__":
    run_script(main, INFERENCE_ADVICE)
