"""Export a trained network as an ONNX model, and check it against PyTorch.

python export.py                                      the weights that come with the code
python export.py --checkpoint save/fine/best.pth --output robot.onnx --labels
python export.py --size 360 480                       for OpenCV's dnn, ncnn, RKNN, TensorRT 8

Input "images": N x 3 x H x W, float32, RGB in [0, 1], normalised with the mean and std of the
model's metadata. Batch, height and width are free, from 64x64 up, or fixed by --size to one image
of that size. Output "logits": N x C x H x W, float32; with --labels "labels": N x H x W, uint8, the
class of each pixel. The metadata hold classes, colours, label ids, normalisation, and the height of
the training images, each as JSON. The script needs `pip install onnx onnxscript onnxruntime`;
examples/onnx_camera.py shows how to use the model without torch.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from datasets.images import MIN_SIZE
from models.lednet import LEDNet
from utils.arguments import INFERENCE_ADVICE, ArgumentParser, new_file, positive_int
from utils.checkpoint import load_network
from utils.errors import UserError
from utils.files import atomic_write, write_errors
from utils.onnx import OnnxNetwork, export_onnx
from utils.script import run_script

TOLERANCE = 1e-4  # of logits, relative to the largest
AGREEMENT = 0.999  # of labels: near a tie, rounding decides


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_checkpoint()
    add = parser.add_argument
    # fmt: off
    add("--output", type=new_file, metavar="FILE",
        help="new file; default: the name of the checkpoint with .onnx, in this folder")
    add("--labels", action="store_true", help="output the class of each pixel instead of logits")
    add("--size", nargs=2, type=positive_int, metavar=("HEIGHT", "WIDTH"),
        help="fix the input to one image of this size, for runtimes that need it; default: free")
    # fmt: on
    args = parser.parse_args()
    if args.size is not None and min(args.size) < MIN_SIZE:
        raise UserError(f"--size is too small: LEDNet needs {MIN_SIZE}x{MIN_SIZE}")
    args.output = args.output or new_file(Path(args.checkpoint).with_suffix(".onnx").name)
    return args


def main() -> None:
    args = parse_args()
    network, about = load_network(args.checkpoint)
    print(f"exporting {args.checkpoint}", flush=True)
    # Compared before it gets its name: a model that fails is not kept.
    with write_errors(args.output), atomic_write(args.output) as unchecked:
        export_onnx(network, about, unchecked, args.labels, args.size)
        sizes = sample_sizes(about.height) if args.size is None else [(1, *args.size)]
        compare(network, OnnxNetwork(unchecked), args.labels, sizes)
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB")


def sample_sizes(height: int) -> list[tuple[int, int, int]]:
    """Return batches, heights and widths to try a model of free size with."""
    height = max(MIN_SIZE, height)
    return [(1, height, 2 * height), (2, height, 4 * height // 3), (3, 65, 150)]


@torch.inference_mode()
def compare(
    network: LEDNet, exported: OnnxNetwork, labels: bool, sizes: Sequence[tuple[int, int, int]]
) -> None:
    """Run both on images, and print how far they differ.

    Args:
        sizes: batch, height and width of each comparison.

    Raises:
        UserError: they differ by more than rounding.
    """
    for count, *size in sizes:
        images = blurred_noise(count, size)
        expected, result = network(images), exported(images)
        if labels:
            same = (result == expected.argmax(1)).float().mean().item()
            good, figure = same >= AGREEMENT, f"{100 * same:.3f} % of labels agree with PyTorch"
        else:
            worst = ((result - expected).abs().max() / expected.abs().max()).item()
            good, figure = worst <= TOLERANCE, f"logits differ from PyTorch by {worst:.1e}"
        print(f"{count} x {size[1]}x{size[0]}: {figure}")
        if not good:
            raise UserError(f"the exported model is not the network: {figure}; it is not kept")


def blurred_noise(count: int, size: list[int]) -> Tensor:
    """Return images, N x 3 x H x W, of coloured patches, which are taken for many classes."""
    noise = torch.rand(count, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, size, mode="bicubic").clamp(0, 1)


if __name__ == "__main__":
    run_script(main, INFERENCE_ADVICE)
