"""Draw image | prediction | truth strips of a trained network, one row an image.

    python tools/draw_strips.py --checkpoint save/NAME/best.pth --datadir data/synthetic \\
        --images 0 1 2 --output docs/strips.jpg
"""

import sys
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets.cityscapes import Cityscapes
from datasets.files import DatasetError
from datasets.transforms import eval_transforms
from utils.checkpoint import CheckpointError, load_network
from utils.cli import ArgumentParser, UsageError, file_path, natural_int, run
from utils.visualize import strip


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--checkpoint", type=file_path, metavar="FILE", required=True)
    parser.add_argument(
        "--datadir", type=file_path, required=True, help="folder with leftImg8bit and gtFine"
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
        raise UsageError(f"--output {args.output} exists: give a new file, or move it away")

    network, checkpoint = load_network(args.checkpoint)
    mean, std, colors = (checkpoint[name] for name in ("mean", "std", "colors"))
    transforms = eval_transforms(checkpoint["height"], mean, std)
    dataset = Cityscapes(args.datadir, args.subset, transforms=transforms)
    if max(args.images) >= len(dataset):
        raise UsageError(f"--images: {args.subset} holds the images 0 to {len(dataset) - 1}")
    strips = []
    for index in args.images:
        image, label = dataset[index]
        with torch.inference_mode():
            prediction = network(image[None]).argmax(1)[0]
        strips.append(strip(image, prediction, label, colors, mean, std))
    try:
        to_pil_image(torch.cat(strips, dim=1)).save(args.output, quality=90)
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {args.output} cannot be written: {error}") from error


if __name__ == "__main__":
    run(main, DatasetError, CheckpointError)
