"""What colour alone tells: the mIoU of the most frequent training class of each RGB value.

    python tools/color_baseline.py --datadir data/synthetic

A data set whose classes could be read off their colours would say nothing about a network. The
colours are also grouped into fewer levels a channel, since exact values seldom repeat; a colour
that no training image has gets the most frequent class of all.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets.cityscapes import Cityscapes
from utils.arguments import ArgumentParser, file_path
from utils.metrics import ConfusionMatrix, mean_score
from utils.script import run_script

BITS = (8, 6, 5, 4)


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--datadir", type=file_path, default="data/synthetic", help="default %(default)s"
    )
    args = parser.parse_args()
    train, val = Cityscapes(args.datadir, "train"), Cityscapes(args.datadir, "val")
    count = len(train.classes)
    for bits in BITS:
        classes = most_frequent_classes(train, bits)
        confusion = ConfusionMatrix(count)
        for image, label in tqdm(val, f"val, {bits} bits", leave=False, disable=None):
            predictions = torch.from_numpy(classes[color_index(image.numpy(), bits)])
            confusion.update(predictions.long(), label.long())
        iou = confusion.class_iou()
        print(
            f"{2**bits:3d} levels a channel: class mIoU {100 * mean_score(iou):5.2f} %, over "
            f"{int((~iou.isnan()).sum())} classes, {int((confusion.counts.sum(1) > 0).sum())} of "
            "them in the truth"
        )


def color_index(image: np.ndarray, bits: int) -> np.ndarray:
    """3 x H x W colours as one number each, H x W, from `bits` of every channel."""
    r, g, b = image.astype(np.int64) >> (8 - bits)
    return (r << 2 * bits) | (g << bits) | b


def most_frequent_classes(dataset: Cityscapes, bits: int) -> np.ndarray:
    """The class that each colour most often has; 2 ** (3 * bits), uint8."""
    pairs = []  # colour and class of each labelled pixel, as one number
    for image, label in tqdm(dataset, f"train, {bits} bits", leave=False, disable=None):
        train_ids = label.numpy()
        valid = train_ids < len(dataset.classes)
        pairs.append(color_index(image.numpy(), bits)[valid] * 32 + train_ids[valid])
    pairs, counts = np.unique(np.concatenate(pairs), return_counts=True)
    frequent = np.bincount(pairs % 32, counts).argmax()
    classes = np.full(2 ** (3 * bits), frequent, np.uint8)
    order = counts.argsort(kind="stable")  # of several assignments to a colour the last one stays
    classes[pairs[order] // 32] = pairs[order] % 32
    return classes


if __name__ == "__main__":
    run_script(main)
