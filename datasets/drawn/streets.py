"""The embedded default: drawn street scenes in the layout of the Cityscapes download.

    leftImg8bit/<split>/<city>/<name>_leftImg8bit.png   train, val, test, train_extra
    gtFine/<split>/<city>/<name>_gtFine_labelIds.png    train, val, test (blank, as published)
    gtCoarse/<split>/<city>/<name>_gtCoarse_labelIds.png    train, val, train_extra

and `_instanceIds.png` beside every `_labelIds.png`, which the official evaluation reads.
"""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from datasets.drawn import make_folder
from datasets.drawn.scene import draw_scene

COUNTS = {"train": 240, "val": 40, "test": 8, "train_extra": 80}
CITIES = ("avalon", "brigadoon", "camelot", "zenda")
HEIGHT = 256
SEED = 0


def make_synthetic(
    root: Path, counts: dict[str, int] = COUNTS, height: int = HEIGHT, workers: int = 1
) -> None:
    """Draw `height` x 2 `height` images into a new folder, `counts` in each split.

    The same arguments give the same bytes, whatever the number of workers.
    """
    jobs = [(split, number) for split, count in counts.items() for number in range(count)]
    make_folder(root, partial(_write_scene, height=height), jobs, workers)


def coarsen(ids: np.ndarray, cell: int) -> np.ndarray:
    """Reduce each region of a label map, H x W, uint8, to a rough polygon; 0, unlabelled, remains.

    Args:
        cell: grid of the corners in pixels; half as much along every border stays unlabelled.
    """
    height, width = ids.shape
    grid = (max(1, width // cell), max(1, height // cell))
    image, reach = Image.fromarray(ids), 2 * (cell // 4) + 1
    lowest = image.filter(ImageFilter.MinFilter(reach))
    highest = image.filter(ImageFilter.MaxFilter(reach))
    inside = np.asarray(lowest) == np.asarray(highest)  # all neighbours have one value
    coarse = np.zeros_like(ids)
    for value in np.unique(ids[inside]):
        region = inside & (ids == value)
        # Sampled on the grid and interpolated: straight edges between rough corners.
        rough = Image.fromarray(region.astype(np.uint8) * 255).resize(grid, Image.Resampling.BOX)
        rough = rough.resize((width, height), Image.Resampling.BILINEAR)
        coarse[region & (np.asarray(rough) > 140)] = value
    return coarse


def _write_scene(root: Path, split: str, number: int, height: int) -> None:
    split_index = list(COUNTS).index(split)
    scene = draw_scene(np.random.default_rng([SEED, split_index, number]), height)
    city = CITIES[split_index]

    def save(folder: str, kind: str, pixels: np.ndarray, compress_level: int = 6) -> None:
        path = root / folder / split / city / f"{city}_{number:06d}_000019_{kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=compress_level)

    def save_labels(mode: str, label_ids: np.ndarray, instance_ids: np.ndarray) -> None:
        save(mode, f"{mode}_labelIds", label_ids)
        save(mode, f"{mode}_instanceIds", instance_ids)

    # Noisy pictures hardly compress: level 1 saves most of the time.
    save("leftImg8bit", "leftImg8bit", scene.image, compress_level=1)
    if split == "test":
        save_labels("gtFine", scene.label_ids * 0, scene.instance_ids * 0)
        return
    if split != "train_extra":
        save_labels("gtFine", scene.label_ids, scene.instance_ids)
    coarse = coarsen(scene.label_ids, cell=max(4, height // 21))
    save_labels("gtCoarse", coarse, scene.instance_ids * (coarse > 0))
