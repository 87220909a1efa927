"""Export a trained network with 8-bit integers, and measure what that gains and what it costs.

    python tools/quantize.py --datadir camvid --output lednet_int8.onnx
    python tools/quantize.py --datadir DIR --checkpoint save/NAME/best.pth --output robot_int8.onnx

Weights and activations become integers, scaled to the ranges that images of train show. The model
is otherwise that of export.py. Both are scored on val, at the size that the network works at, and
take turns to be timed in ONNX Runtime and, where it is installed, in OpenVINO, on the CPU cores
that OMP_NUM_THREADS says. Needs onnx, onnxscript and onnxruntime, which requirements-dev.txt
installs.
"""

import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import DATASETS
from datasets.segmentation import Classes, Segmentation
from datasets.transforms import to_floats
from utils.arguments import ArgumentParser, file_path
from utils.checkpoint import load_network
from utils.errors import UserError
from utils.files import atomic_write, cannot_write
from utils.metrics import ConfusionMatrix, mean_score
from utils.onnx import OnnxNetwork, export_onnx
from utils.script import run_script

SHIPPED = Path(__file__).parent.parent / "weights" / "lednet_d20_camvid.pth"
IMAGES = 32  # of train, that ranges are measured on; 128 score the same on CamVid
TURNS, PASSES = 10, 5  # of the timing; passes in a turn
IDLE = 2  # passes of a turn that are not timed: threads of the network before still spin

Network = Callable[[Tensor], Tensor]  # of images, N x 3 x H x W


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        type=file_path,
        metavar="FILE",
        default=str(SHIPPED),
        help="default weights/lednet_d20_camvid.pth, which comes with the code",
    )
    parser.add_argument("--datadir", type=file_path, metavar="DIR", required=True)
    parser.add_argument("--output", type=file_path, metavar="FILE", required=True)
    parser.add_argument("--labels", action="store_true", help="as of export.py")
    args = parser.parse_args()
    output = Path(args.output)
    if output.exists() or not output.parent.is_dir():
        raise UserError(f"--output {output} must be a new file in a folder that exists")
    network, checkpoint = load_network(args.checkpoint)
    kind = DATASETS.get(checkpoint["dataset"])
    if kind is None:
        raise UserError(
            f"{args.checkpoint} was trained on {checkpoint['dataset']}, which is none of "
            f"{', '.join(DATASETS)}: use another checkpoint, or add the data set to datasets/"
        )
    classes = Classes.from_checkpoint(checkpoint)
    train, val = (
        kind(args.datadir, split, classes, checkpoint["height"]) for split in ("train", "val")
    )
    floats = to_floats(checkpoint["mean"], checkpoint["std"], torch.device("cpu"))

    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=output.parent) as folder:
        exported, quantized = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        export_onnx(network, checkpoint, exported, args.labels)
        quantize(exported, quantized, (floats(image[None]) for image, _ in sample(train)))
        networks = {
            "ONNX Runtime, float32": OnnxNetwork(exported),
            "ONNX Runtime, int8": OnnxNetwork(quantized),
        }
        if importlib.util.find_spec("openvino"):
            networks["OpenVINO, float32"] = openvino_network(exported, "f32")
            networks["OpenVINO, bfloat16"] = openvino_network(exported, "bf16")
            networks["OpenVINO, int8"] = openvino_network(quantized, "f32")
        compare(networks, val, floats)
        try:
            with atomic_write(output) as unfinished:
                quantized.replace(unfinished)
        except OSError as error:
            raise cannot_write(error, "--output") from error
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def sample(dataset: Segmentation) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels from the whole of a data set, evenly."""
    return (dataset[round(i)] for i in np.linspace(0, len(dataset) - 1, IMAGES))


def quantize(exported: Path, quantized: Path, images: Iterator[Tensor]) -> None:
    """Write a model in integers, its ranges those that it shows on some images."""

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(images, None)
            return None if image is None else {"images": image.contiguous().numpy()}

    prepared = quantized.with_name("prepared.onnx")
    # Batch norms are folded already; what is left to prepare are the shapes.
    quant_pre_process(exported, prepared, skip_optimization=True, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        quantized,
        Reader(),
        per_channel=True,
        # Unsigned: most activations come after a ReLU. Signed ones cost OpenVINO 1.6 points.
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def openvino_network(path: Path, precision: str) -> Network:
    """A model in OpenVINO, what is not in integers in a precision, "f32" or "bf16"."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda images: torch.from_numpy(compiled(images.contiguous().numpy())[0])


def compare(networks: dict[str, Network], val: Segmentation, floats: Network) -> None:
    """Print the latency of each network, measured in turns, and its mIoU."""
    image = floats(val[0][0][None])
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(TURNS):
        for name, network in networks.items():
            for number in range(PASSES):
                started = time.perf_counter()
                network(image)
                if number >= IDLE:
                    seconds[name].append(time.perf_counter() - started)
    print(f"images of {image.shape[3]}x{image.shape[2]} on {torch.get_num_threads()} CPU cores")
    for name, network in networks.items():
        median = 1e3 * np.median(seconds[name])
        print(f"{name:22} {median:6.1f} ms, {100 * miou(network, val, floats):5.2f} % mIoU on val")


def miou(network: Network, val: Segmentation, floats: Network) -> float:
    confusion = ConfusionMatrix(len(val.classes))
    for image, label in tqdm(val, "scoring val", leave=False, disable=None):
        result = network(floats(image[None]))
        confusion.update(result if result.ndim == 3 else result.argmax(1), label[None].long())
    return mean_score(confusion.class_iou())


if __name__ == "__main__":
    run_script(main)
