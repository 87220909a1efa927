"""Read fuzzed files through the loaders, for tools/faults.py, which sees whether this survives it.

    python tools/read_fuzzed.py SEED NUMBER FIRST LAST FOLDER

Before each file it prints what the file is, then whether it was "read", "refused" by its name, or
what else happened.
"""

import resource
import sys
from pathlib import Path
from random import Random

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from fuzzing import Fuzzed, fuzzed_file
from test_fuzz import OneLabel, check_every_pixel, only_found_by_reading_twice, same_pixels

from datasets.imagenet import CropLoader
from datasets.images import DatasetError, read_image

KINDS = ("png", "jpeg", "label")
MOST_MEMORY = 2 << 30  # bytes; an image of the largest size that is read takes 0.3 GB


def main() -> None:
    seed, number, first, last = map(int, sys.argv[1:5])
    folder = Path(sys.argv[5])
    folder.mkdir(exist_ok=True)
    for place in range(first, last):
        kind = KINDS[place % len(KINDS)]
        fuzzed = fuzzed_file(Random(f"{seed} {number} {place}"), folder, kind)
        print(f"{place} {kind}, {fuzzed.how}", flush=True)
        print(result(fuzzed, kind), flush=True)
        fuzzed.path.unlink()


def result(fuzzed: Fuzzed, kind: str) -> str:
    """What came of a file: "read", "refused", or something else."""
    try:
        wrong = read_label(fuzzed) if kind == "label" else read_picture(fuzzed)
    except DatasetError as error:
        if not str(error).startswith(str(fuzzed.path)) or "\n" in str(error):
            return f"refused without its name: {error}"
        return "refused, a sound file" if fuzzed.how.endswith(", nothing") else "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MOST_MEMORY:
        return "took more than 2 GB of memory"
    return wrong or "read"


def read_label(fuzzed: Fuzzed) -> str:
    """What is wrong with the classes that were read, if anything."""
    dataset = OneLabel(fuzzed.path.parent)
    found = dataset.read_train_ids(0)
    if not ((found < 19) | (found == 255)).all():
        return "a label outside the classes"
    if fuzzed.pixels is None:
        return ""
    if only_found_by_reading_twice(fuzzed):
        check_every_pixel(str(fuzzed.path))
    wanted = dataset.classes.to_train_ids()[fuzzed.pixels]
    return "" if np.array_equal(found, wanted) else "read otherwise than it was"


def read_picture(fuzzed: Fuzzed) -> str:
    """What is wrong with the image that was read, if anything."""
    image = np.asarray(read_image(str(fuzzed.path)))
    if "flip" not in fuzzed.how and not same_pixels(image, fuzzed):
        if only_found_by_reading_twice(fuzzed):
            check_every_pixel(str(fuzzed.path))
        return "read otherwise than it was"
    for augment in (False, True):
        crop = CropLoader(16, augment)(str(fuzzed.path))
        if crop.shape != (3, 16, 16) or crop.dtype != torch.uint8:
            return f"a crop of {tuple(crop.shape)}"
    return ""


if __name__ == "__main__":
    main()
