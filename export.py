"""Write a trained network as an ONNX model, and check it against PyTorch.

python export.py                                      the weights that come with the code
python export.py --checkpoint save/fine/best.pth --output robot.onnx --labels

Input "images": N x 3 x H x W, float32, RGB in [0, 1], normalised with the mean and std of the
model's metadata. Batch, height and width are free, from 64x64 on. Output "logits":
N x C x H x W, float32; with --labels "labels": N x H x W, uint8, the class of each pixel. The
metadata say classes, colours, label ids, normalisation, and the height of the images that it
was trained on, each as JSON. The script takes `pip install onnx onnxscript onnxruntime`;
examples/onnx_camera.py shows how to use the model without torch.
"""

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.lednet import LEDNet
from utils.arguments import ArgumentParser, file_path
from utils.checkpoint import load_network
from utils.errors import UserError
from utils.files import WriteError, atomic_write
from utils.onnx import LEAST, OnnxNetwork, export_onnx
from utils.script import run_script

SHIPPED = Path(__file__).parent / "weights" / "lednet_d20_camvid.pth"
TOLERANCE = 1e-4  # of logits, relative to the largest
AGREEMENT = 0.999  # of labels: near a tie, rounding decides


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        type=file_path,
        metavar="FILE",
        default=str(SHIPPED),
        help="network to export; default weights/lednet_d20_camvid.pth, which comes with the code",
    )
    parser.add_argument(
        "--output",
        type=file_path,
        metavar="FILE",
        help="a new file; default: the name of the checkpoint with .onnx, here",
    )
    parser.add_argument(
        "--labels", action="store_true", help="return the class of each pixel in place of logits"
    )
    args = parser.parse_args()
    args.output = Path(args.output or Path(args.checkpoint).with_suffix(".onnx").name)
    if args.output.exists():
        raise UserError(f"{args.output} exists: give --output a new file")
    folder = args.output.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"--output {args.output}: {folder} is no folder to write into")
    return args


def main() -> None:
    args = parse_args()
    network, checkpoint = load_network(args.checkpoint)
    print(f"exporting {args.checkpoint}", flush=True)
    # A model that fails the check must not be found where the good one was to be.
    try:
        with atomic_write(args.output) as unchecked:
            export_onnx(network, checkpoint, unchecked, args.labels)
            compare(network, OnnxNetwork(unchecked), args.labels, checkpoint["height"])
    except OSError as error:
        raise WriteError(f"{error.filename} cannot be written ({error.strerror})") from error
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


@torch.inference_mode()
def compare(network: LEDNet, exported: OnnxNetwork, labels: bool, height: int) -> None:
    """Run both on images of several sizes, and print how far they differ.

    Raises:
        UserError: it is more than rounding.
    """
    for count, *size in ((1, height, 2 * height), (2, height, 4 * height // 3), (3, 65, 150)):
        size = [max(LEAST, length) for length in size]
        images = blurred_noise(count, size)
        truth, result = network(images), exported(images)
        if labels:
            same = (result == truth.argmax(1)).float().mean().item()
            good, figure = same >= AGREEMENT, f"{100 * same:.3f} % of labels agree with PyTorch"
        else:
            worst = ((result - truth).abs().max() / truth.abs().max()).item()
            good, figure = worst <= TOLERANCE, f"logits differ from PyTorch by {worst:.1e}"
        print(f"{count} x {size[1]}x{size[0]}: {figure}")
        if not good:
            raise UserError(f"the exported model is not the network: {figure}; it is not kept")


def blurred_noise(count: int, size: list[int]) -> Tensor:
    """Images, N x 3 x H x W, of patches of many colours, which look like many classes."""
    noise = torch.rand(count, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, size, mode="bicubic").clamp(0, 1)


if __name__ == "__main__":
    run_script(main)
