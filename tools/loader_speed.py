"""Measure how fast images are read for pretraining, beside the plain way, on one core.

    python tools/loader_speed.py --datadir imagenet

Both read the same files in the same order with the same random crops, in batches: the plain way
is Image.open, convert("RGB"), RandomResizedCrop and ToTensor; ours is what lednet_imagenet.py
trains on. They take turns, and each gets its fastest turn. Wide images are those of train that have
more than 1,000 pixels across, and others enlarged to that where there are few.
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets.imagenet import CropLoader, training_images
from datasets.images import orientation, upright
from utils.arguments import ArgumentParser, file_path, positive_int
from utils.script import run_script

WIDE, FEW = 1000, 40


class Files(torch.utils.data.Dataset):
    """Each file, read by some function with random numbers of its own."""

    def __init__(self, paths: list[str], read: Callable[[str], Any]) -> None:
        self.paths, self.read = paths, read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        torch.manual_seed(index)
        return self.read(self.paths[index])


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--datadir", type=file_path, required=True, help="folder with train/<class>/ of images"
    )
    parser.add_argument("--size", type=positive_int, default=224, help="default %(default)s")
    parser.add_argument(
        "--images", type=positive_int, default=500, help="at most so many; default %(default)s"
    )
    parser.add_argument(
        "--turns", type=positive_int, default=5, help="of each; default %(default)s"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)

    paths = [path for path, _ in training_images(args.datadir, args.size, augment=False).samples]
    random.Random(0).shuffle(paths)
    paths = paths[: args.images]
    wide = [path for path in paths if width_of(path) > WIDE]
    compare(f"{len(paths)} images of train", paths, args.size, args.turns)
    with tempfile.TemporaryDirectory() as folder:
        enlarged = [enlarge(path, folder) for path in paths[: max(0, FEW - len(wide))]]
        title = f"{len(wide)} wide images and {len(enlarged)} enlarged ones"
        compare(title, wide + enlarged, args.size, args.turns)


def width_of(path: str) -> int:
    with Image.open(path) as image:
        return image.size[0]


def enlarge(path: str, folder: str) -> str:
    """A JPEG of 1,600 pixels across of an image."""
    with Image.open(path) as image:
        size = 1600, round(1600 * image.size[1] / image.size[0])
        large = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    new_path = f"{folder}/{len(list(Path(folder).iterdir()))}.jpg"
    large.save(new_path, quality=90)
    return new_path


def compare(title: str, paths: list[str], size: int, turns: int) -> None:
    """Print images per second of both ways, their ratio, and how far their pixels differ."""
    crop = CropLoader(size, random=True)
    flip = v2.RandomHorizontalFlip()
    chain = v1.Compose([v1.RandomResizedCrop(size), v1.ToTensor()])

    def plain(path: str) -> torch.Tensor:
        with Image.open(path) as image:
            return chain(image.convert("RGB"))

    def ours(path: str) -> torch.Tensor:
        return flip(crop(path))

    ways = {"plain": plain, "ours": ours}
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(turns):
        for name, read in ways.items():
            started = time.perf_counter()
            for _batch in DataLoader(Files(paths, read), batch_size=64):
                pass
            seconds[name] = min(seconds[name], time.perf_counter() - started)

    same = np.mean([difference(crop, path, seed) for seed, path in enumerate(paths)])
    pairs = zip(Files(paths, crop), Files(paths, plain), strict=True)
    own = np.mean([(a.float() - 255 * b).abs().mean().item() for a, b in pairs])
    speed = {name: len(paths) / taken for name, taken in seconds.items()}
    print(
        f"{title}: plain {speed['plain']:.0f} images/s, ours {speed['ours']:.0f} images/s, "
        f"{speed['ours'] / speed['plain']:.2f} times as many; mean difference of the pixels from "
        f"the same crop decoded in full: {same:.2f} of 255, from the plain crop, which is not "
        f"rounded to decoded pixels: {own:.2f} of 255"
    )


def difference(crop: CropLoader, path: str, seed: int) -> float:
    """The mean difference of a crop's pixels from those of the image decoded in full size."""
    torch.manual_seed(seed)
    ours = crop(path)
    torch.manual_seed(seed)
    with Image.open(path) as image:
        box, smaller = crop.choose(image)
    with Image.open(path) as image:
        whole = upright(image.convert("RGB").crop([smaller * e for e in box]), orientation(image))
    size = (crop.size, crop.size)
    plain = v2.functional.pil_to_tensor(whole.resize(size, Image.Resampling.BILINEAR))
    return (ours.float() - plain.float()).abs().mean().item()


if __name__ == "__main__":
    run_script(main)
