"""Draw image | prediction | truth strips of a trained network, one row an image.

    python tools/draw_strips.py --checkpoint save/NAME/best.pth --datadir data/synthetic \\
        --images 0 1 2 --output docs/strips.jpg
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import DATASETS
from datasets.loading import as_lists
from datasets.segmentation import Classes
from datasets.transforms import to_floats
from utils.arguments import ArgumentParser, file_path, natural_int
from utils.checkpoint import load_network
from utils.errors import UserError
from utils.evaluation import evaluate
from utils.files import atomic_write
from utils.script import run_script
from utils.visualize import strip


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--checkpoint", type=file_path, metavar="FILE", required=True)
    parser.add_argument(
        "--datadir", type=file_path, required=True, help="folder of the data set it is of"
    )
    parser.add_argument("--subset", choices=("train", "val"), default="val", help="default val")
    parser.add_argument(
        "--images", type=natural_int, nargs="+", default=[0], help="their numbers; default 0"
    )
    parser.add_argument(
        "--output", type=file_path, metavar="FILE", required=True, help="the picture to write"
    )
    args = parser.parse_args()
    if Path(args.output).exists():
        raise UserError(f"--output {args.output} exists: give a new file, or move it away")

    network, checkpoint = load_network(args.checkpoint)
    kind, classes = DATASETS[checkpoint["dataset"]], Classes.from_checkpoint(checkpoint)
    dataset = kind(args.datadir, args.subset, classes, checkpoint["height"])
    if max(args.images) >= len(dataset):
        raise UserError(f"--images: {args.subset} holds the images 0 to {len(dataset) - 1}")
    floats = to_floats(checkpoint["mean"], checkpoint["std"], torch.device("cpu"))
    loader = DataLoader(Subset(dataset, args.images), collate_fn=as_lists)
    strips: list[torch.Tensor] = []
    evaluate(
        network,
        loader,
        floats,
        len(classes),
        "drawing",
        on_image=lambda *panels: strips.append(strip(*panels, classes.colors)),
    )
    try:
        with atomic_write(args.output) as unfinished:
            to_pil_image(torch.cat(strips, dim=1)).save(unfinished, quality=90)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {args.output} cannot be written: {error}") from error


if __name__ == "__main__":
    run_script(main)
