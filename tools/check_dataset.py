"""List everything that is wrong with the files of a data set, one problem per line.

    python tools/check_dataset.py --datadir DIR                     Cityscapes
    python tools/check_dataset.py --dataset camvid --datadir DIR
    python tools/check_dataset.py --classes FILE --datadir DIR      your own data
    python tools/check_dataset.py --dataset imagenet --datadir DIR  DIR/{train,val}/<class>/

It decodes every image and label, verifies every checksum and looks up every label id. A line reads
`problem: path: details`. The exit status is 0 if nothing is wrong, 1 if something is, 2 after a
mistake on the command line.
"""

import argparse
import os
import sys
import time
from itertools import chain
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import DATASETS, ClassesError, read_classes_for
from datasets.check import Problem, find_problems, labels_without_image, summary
from datasets.imagenet import ImageFolder
from datasets.images import DatasetError, read_image
from datasets.workers import WorkerError
from utils.arguments import ArgumentParser, file_path, natural_int
from utils.errors import UserError
from utils.script import run_script

IMAGENET = "imagenet"
# Splits that every training needs; a download without one of the others is complete.
NEEDED = ("train", "val")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--dataset",
        choices=[*DATASETS, IMAGENET],
        help="type of the data set; default: folder with --classes, else cityscapes",
    )
    parser.add_argument("--datadir", type=file_path, required=True, help="folder of the data set")
    what = "names of the classes of --dataset folder, as for main.py"
    parser.add_argument("--classes", metavar="FILE", type=file_path, help=what)
    parser.add_argument("--split", nargs="+", help="splits to check; default: all that exist")
    what = "check headers, checksums and ends only, as main.py does before it trains"
    parser.add_argument("--fast", action="store_true", help=what)
    parser.add_argument(
        "--workers",
        type=natural_int,
        default=os.cpu_count(),
        help="processes that read; default: %(default)s, one for each core",
    )
    args = parser.parse_args()
    args.dataset = args.dataset or ("folder" if args.classes else "cityscapes")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    datasets, missing = open_splits(args)
    started, problems = time.perf_counter(), []
    for dataset in datasets:
        found = chain.from_iterable(find_problems(dataset, args.workers, args.fast))
        for problem in chain(found, labels_without_image(dataset)):
            problems.append(problem)
            tqdm.write(str(problem))
    for split, error in missing.items():
        if split in NEEDED:
            problems.append(Problem("split not checked", args.datadir, str(error)))
            print(problems[-1])
        else:
            print(f"note: {split} is not there: {error}", file=sys.stderr)

    pairs = [pair for dataset in datasets for pair in dataset.pairs]
    labels = sum(label is not None for _, label in pairs)
    speed = len(pairs) / (time.perf_counter() - started)
    what = "headers and ends" if args.fast else "all"
    print(f"checked {what} of {len(pairs)} images and {labels} labels, {speed:.0f} images/s")
    print(f"problems: {len(problems)}" + (f" ({summary(problems)})" if problems else ""))
    sys.exit(1 if problems else 0)


def open_splits(args: argparse.Namespace) -> tuple[list[Dataset], dict[str, DatasetError]]:
    """Return the splits, without those that consist of others, and why some cannot be opened."""
    if args.dataset == IMAGENET:
        known, classes = NEEDED, None
    else:
        known, classes = DATASETS[args.dataset].SPLITS, read_classes_for(args)
    unknown = set(args.split or ()) - set(known)
    if unknown:
        raise UserError(f"--split {min(unknown)}: {args.dataset} has {', '.join(known)}")
    datasets: list[Dataset] = []
    seen: set[tuple[str, str | None]] = set()
    missing: dict[str, DatasetError] = {}
    for split in args.split or known:
        try:
            if args.dataset == IMAGENET:
                names = datasets[0].classes if datasets else None  # train and val share them
                dataset = ImageFolder(args.datadir, split, read_image, classes=names)
            else:
                dataset = DATASETS[args.dataset](args.datadir, split, classes, need_labels=False)
        except DatasetError as error:
            missing[split] = error
            continue
        if not seen.issuperset(dataset.pairs):  # CamVid's trainval is train and val
            datasets.append(dataset)
        seen.update(dataset.pairs)
    if missing and (args.split or not datasets):
        raise next(iter(missing.values()))
    return datasets, missing


if __name__ == "__main__":
    advice = {WorkerError: "give fewer --workers", ClassesError: "see --classes"}
    run_script(main, advice)
