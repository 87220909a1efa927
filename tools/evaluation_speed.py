"""Measure how fast images are scored and their label maps written, beside one image at a time.

    python tools/evaluation_speed.py --device cuda

On drawn scenes of 2048x1024, an untrained network: by eval_cityscapes_server.py, on a GPU compiled
and in half precision, and by a plain loop that reads an image, segments it, counts its pixels and
writes its PNG before it turns to the next.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets.cityscapes import Cityscapes
from datasets.drawn.streets import make_synthetic
from datasets.segmentation import write_label
from datasets.transforms import to_floats
from models.lednet import LEDNet
from utils.arguments import ArgumentParser, positive_int
from utils.checkpoint import save_checkpoint
from utils.metrics import ConfusionMatrix
from utils.script import pick_device, run_script

ROOT = Path(__file__).parent.parent
HEIGHT = 512
NOT_NORMALISED = ([0.0] * 3, [1.0] * 3)


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1; default auto")
    parser.add_argument(
        "--images", type=positive_int, default=48, help="to score; default %(default)s"
    )
    args = parser.parse_args()
    figures = measure(pick_device(args.device), args.images)
    print(
        f"{figures['plain']:.2f} images/s one at a time, {figures['ours']:.2f} by "
        f"{figures['command']}: {figures['ratio']:.2f} times as many"
    )


def measure(device: torch.device, images: int) -> dict[str, float | str]:
    """Images per second of both ways, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = {"train": 1, "val": images}
        make_synthetic(folder / "data", counts, height=1024, workers=os.cpu_count() or 1)
        network = LEDNet().eval()
        description = {
            **{"dataset": "cityscapes", "apn_channels": 20, "height": HEIGHT},
            **{"mean": NOT_NORMALISED[0], "std": NOT_NORMALISED[1]},
            **Cityscapes.CLASSES.to_checkpoint(),
        }
        save_checkpoint(description | {"model": network.state_dict()}, folder / "network.pth")
        plain = one_at_a_time(network.to(device), folder, device)
        fast = ["--runtime", "compiled", "--precision", "float16"] if device.type == "cuda" else []
        command = ["eval_cityscapes_server.py", *fast]
        options = ["--checkpoint", "network.pth", "--datadir", "data", "--device", str(device)]
        options += ["--save-results", "results", "--json", "figures.json"]
        subprocess.run(
            [sys.executable, ROOT / command[0], *command[1:], *options],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        ours = json.loads((folder / "figures.json").read_text())["scored_images_per_second"]
    return {"plain": plain, "ours": ours, "ratio": ours / plain, "command": " ".join(command)}


@torch.inference_mode()
def one_at_a_time(network: LEDNet, folder: Path, device: torch.device) -> float:
    """Images per second of the plain loop."""
    dataset = Cityscapes(folder / "data", "val", height=HEIGHT, resize_labels=False)
    floats = to_floats(*NOT_NORMALISED, device)
    confusion = ConfusionMatrix(len(dataset.classes), device)
    (folder / "plain").mkdir()
    network(floats(dataset[0][0][None]))  # chooses its kernels
    started = time.perf_counter()
    for index in range(len(dataset)):
        image, label = dataset[index]
        logits = network(floats(image[None]))
        logits = F.interpolate(logits, label.shape, mode="bilinear", align_corners=True)
        prediction = logits.argmax(1)[0]
        confusion.update(prediction, label.to(device).long())
        write_label(folder / "plain" / f"{index}.png", prediction, dataset.classes)
    return len(dataset) / (time.perf_counter() - started)


if __name__ == "__main__":
    run_script(main)
