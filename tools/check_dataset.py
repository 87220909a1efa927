"""List everything that is wrong with the files of a data set, one problem per line.

    python tools/check_dataset.py --datadir DIR                     Cityscapes
    python tools/check_dataset.py --dataset camvid --datadir DIR
    python tools/check_dataset.py --classes FILE --datadir DIR      your own data
    python tools/check_dataset.py --dataset imagenet --datadir DIR  DIR/{train,val}/<class>/

It decodes every image and label, verifies every checksum, looks up every label id and names classes
without a pixel. A line reads `problem: path: details`. The exit status is 0 if nothing is wrong, 1
if something is, 2 after a mistake on the command line.
"""

import argparse
import os
import sys
from itertools import chain
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import DATASETS, ClassesError, read_classes_for
from datasets.check import Problem, find_problems, labels_without_image, summary
from datasets.counts import LabelCounts, absent_classes, label_problems, palette_note
from datasets.imagenet import ImageFolder
from datasets.images import DatasetError, FilePair, read_image
from datasets.segmentation import Classes
from datasets.workers import WorkerError
from utils.arguments import ArgumentParser, file_path, natural_int
from utils.errors import UserError
from utils.script import run_script

IMAGENET = "imagenet"
# Splits that every training needs; a download without one of the others is complete.
NEEDED = ("train", "val")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--dataset", choices=[*DATASETS, IMAGENET],
        help="type of the data set; default: folder with --classes, else cityscapes")
    add("--datadir", type=file_path, required=True, help="folder of the data set")
    add("--classes", type=file_path, metavar="FILE",
        help="names of the classes of --dataset folder, as for main.py")
    add("--split", "--subset", nargs="+", help="splits to check; default: all that exist")
    add("--fast", action="store_true",
        help="check headers, checksums and ends only, as main.py does before it trains")
    add("--workers", "--num-workers", type=natural_int, default=os.cpu_count(),
        help="processes that read; default: %(default)s, one for each core")
    # fmt: on
    args = parser.parse_args()
    args.dataset = args.dataset or ("folder" if args.classes else "cityscapes")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    datasets, missing = open_splits(args)
    problems: list[Problem] = []
    counts: dict[str, LabelCounts] = {}
    for dataset in datasets:
        counted = LabelCounts()
        found = chain.from_iterable(find_problems(dataset, args.workers, args.fast, counted))
        for problem in chain(found, labels_without_image(dataset)):
            problems.append(problem)
            tqdm.write(str(problem))
        if counted.pixels.any() and dataset.split in NEEDED:
            counts[dataset.split] = counted
    if counts:
        for problem in problems_of_labels(counts, datasets[0].classes, args):
            problems.append(problem)
            print(problem)
    for split, error in missing.items():
        if split in NEEDED:
            problems.append(Problem("split not checked", args.datadir, str(error)))
            print(problems[-1])
        else:
            print(f"note: {split} is not there: {error}", file=sys.stderr)

    pairs = [pair for dataset in datasets for pair in dataset.pairs]
    labels = sum(label is not None for _, label in pairs)
    what = "headers and ends" if args.fast else "all"
    print(f"checked {what} of {len(pairs)} images and {labels} labels")
    print(f"problems: {len(problems)}" + (f" ({summary(problems)})" if problems else ""))
    sys.exit(1 if problems else 0)


def problems_of_labels(
    counts: dict[str, LabelCounts], classes: Classes, args: argparse.Namespace
) -> list[Problem]:
    """Return what is wrong with the labels of train and val as a whole, and print notes."""
    problems = label_problems(counts, classes, args.classes)
    notes = [palette_note(counts, classes)]
    for split, found in counts.items():
        if absent := absent_classes(found, classes):
            # Classes of its own file can be left out of it; a drawn Cityscapes is a part of it.
            what = problems if args.classes and split == "train" and not problems else notes
            what.append(f"classes without a pixel in {split}: {', '.join(absent)}")
    for note in filter(None, notes):
        print(f"note: {note}", file=sys.stderr)
    return [Problem("labels", args.datadir, problem) for problem in problems]


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
    seen: set[FilePair] = set()
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
