"""The embedded default of pretraining: drawn shapes and textures, in a folder for each class.

    train/<class>/<number>.jpg
    val/<class>/<number>.jpg

Bright shapes on a dark ground. Colours, place, size, rotation, light and noise are random, and the
bright area is about the same in every class, so that only the shape tells the class. Shapes repeat,
so that every crop shows some.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.drawn import make_folder

COUNTS = {"train": 100, "val": 20}  # of each class
SIZE = (128, 128)
SEED = 0

# Where a pattern is bright, by coordinates that repeat from -1.25 to 1.25: about 42 % of the area.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "checks": lambda u, v: (u > 0.5) != (v > 0.5),
    "crosses": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.4) & (np.maximum(abs(u), abs(v)) < 1),
    "discs": lambda u, v: np.hypot(u, v) < 0.92,
    "rings": lambda u, v: abs(np.hypot(u, v) - 0.7) < 0.3,
    "stripes": lambda u, v: u > 0.2,
    "triangles": lambda u, v: (v < 0.85) & (abs(u) * 3**0.5 < v + 1.25),
}
CLASSES = sorted(PATTERNS)


def make_shapes(
    root: Path, counts: dict[str, int] = COUNTS, size: tuple[int, int] = SIZE, workers: int = 1
) -> None:
    """Draw images of a height and width into a new folder, `counts` of each class in each split.

    The same arguments give the same pictures, whatever the number of workers.
    """
    jobs = [
        (split, name, number)
        for split, count in counts.items()
        for name in CLASSES
        for number in range(count)
    ]
    make_folder(root, partial(_write, size=size), jobs, workers)


def draw_shape(rng: np.random.Generator, name: str, size: tuple[int, int]) -> np.ndarray:
    """Draw a picture of a class, H x W x 3, uint8, RGB."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width] / min(size) - 0.5
    turn, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.2)
    u = (np.cos(turn) * x + np.sin(turn) * y) / radius + rng.uniform(0, 2.5)
    v = (np.cos(turn) * y - np.sin(turn) * x) / radius + rng.uniform(0, 2.5)
    inside = PATTERNS[name](u % 2.5 - 1.25, v % 2.5 - 1.25)

    back, front = rng.uniform(0, 90, 3), rng.uniform(140, 255, 3)
    picture = np.where(inside[..., None], front, back)
    light = 1 + np.multiply.outer(y * rng.uniform(-0.5, 0.5) + x * rng.uniform(-0.5, 0.5), [1] * 3)
    noise = rng.normal(0, rng.uniform(3, 25), (height, width, 3))
    return (picture * light + noise).clip(0, 255).astype(np.uint8)


def _write(root: Path, split: str, name: str, number: int, size: tuple[int, int]) -> None:
    seed = [SEED, list(COUNTS).index(split), CLASSES.index(name), number]
    picture = draw_shape(np.random.default_rng(seed), name, size)
    path = root / split / name / f"{number:05d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=90)
