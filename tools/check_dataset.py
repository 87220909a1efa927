"""List all that is wrong with the files of a data set, a line each.

    python tools/check_dataset.py --datadir DIR                     Cityscapes
    python tools/check_dataset.py --dataset camvid --datadir DIR
    python tools/check_dataset.py --classes FILE --datadir DIR      your own data
    python tools/check_dataset.py --dataset imagenet --datadir DIR  DIR/{train,val}/<class>/

It decodes every image and label, verifies every checksum and looks up every label id. A line says
`kind: path: what`. The status is 0 where nothing is wrong, 1 where something is, 2 after a mistake
on the command line.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import DATASETS
from datasets.check import Problem, labels_without_image, look_through, summary
from datasets.folder import read_classes
from datasets.imagenet import ImageFolder
from datasets.images import DatasetError, read_image
from datasets.segmentation import Segmentation
from utils.arguments import ArgumentParser, file_path, natural_int
from utils.errors import UserError, one_line
from utils.script import run_script

IMAGENET = "imagenet"
# What every training needs: without them, it is no smaller data set, but a broken one.
NEEDED = ("train", "val")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--dataset",
        choices=[*DATASETS, IMAGENET],
        help="kind of data set; default folder with --classes, else cityscapes",
    )
    parser.add_argument("--datadir", type=file_path, required=True, help="folder of the data set")
    parser.add_argument(
        "--classes",
        metavar="FILE",
        type=file_path,
        help="names of the classes of --dataset folder, as main.py takes them",
    )
    parser.add_argument(
        "--split", nargs="+", metavar="SPLIT", help="to check; default: all that are there"
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="look at headers and ends alone, as main.py does before it trains; default: decode "
        "every image, verify checksums, look up every label id",
    )
    parser.add_argument(
        "--workers",
        type=natural_int,
        default=os.cpu_count(),
        help="processes that read; default %(default)s, one for each core",
    )
    args = parser.parse_args()
    args.dataset = args.dataset or ("folder" if args.classes else "cityscapes")
    own_classes = args.dataset != IMAGENET and DATASETS[args.dataset].CLASSES is None
    if own_classes and not args.classes:
        raise UserError(f"--dataset {args.dataset} needs --classes FILE, which names its classes")
    if args.classes and not own_classes:
        raise UserError(f"--dataset {args.dataset} has classes of its own: leave --classes out")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    started, images, labels = time.perf_counter(), 0, 0
    problems: list[Problem] = []

    def report(problem: Problem) -> None:
        problems.append(problem)
        tqdm.write(str(problem))

    for dataset in find_splits(args, report):
        for found in look_through(dataset, args.workers, args.fast):
            images += 1
            for problem in found:
                report(problem)
        if isinstance(dataset, Segmentation):
            labels += sum(label is not None for _, label in dataset.pairs)
            for problem in labels_without_image(dataset):
                report(problem)

    speed = images / (time.perf_counter() - started)
    how = "headers and ends" if args.fast else "all"
    print(f"checked {how} of {images} images and {labels} labels, {speed:.0f} images/s")
    print(f"problems: {len(problems)}" + (f" ({summary(problems)})" if problems else ""))
    sys.exit(1 if problems else 0)


def find_splits(
    args: argparse.Namespace, report: Callable[[Problem], None]
) -> Iterator[Segmentation | ImageFolder]:
    """The splits of a data set, but those that others make up: trainval holds train and val.

    Raises:
        DatasetError: a split that was asked for cannot be listed, or none can.
    """
    kind = None if args.dataset == IMAGENET else DATASETS[args.dataset]
    classes = read_classes(args.classes) if args.classes else None
    splits = args.split or (NEEDED if kind is None else kind.SPLITS)
    seen, errors = set(), {}
    names = None  # of ImageNet's classes, which train and val must have in common
    unknown = set(splits) - set(kind.SPLITS) if kind else None
    if unknown:
        raise UserError(f"--split {min(unknown)}: {args.dataset} has {', '.join(kind.SPLITS)}")
    for split in splits:
        try:
            if kind:
                dataset = kind(args.datadir, split, classes, need_labels=False)
            else:
                dataset = ImageFolder(args.datadir, split, read_image, classes=names)
                names = names or dataset.classes
        except DatasetError as error:
            if args.split:
                raise
            errors[split] = error
            continue
        files = dataset.pairs if kind else dataset.samples
        if not seen.issuperset(files):
            yield dataset
        seen.update(files)
    if len(errors) == len(splits):
        raise next(iter(errors.values()))
    for split, error in errors.items():
        if split in NEEDED:
            report(Problem("split not checked", args.datadir, one_line(error)))
        else:
            print(f"note: {split} is not there: {one_line(error)}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
