"""Data sets by name, and the opening of what a run trains and validates on.

To add a data set, write its module and add its line to DATASETS.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.data import ConcatDataset, Dataset

from datasets.cache import cached
from datasets.camvid import CamVid
from datasets.check import check_files, leave_out_broken
from datasets.cityscapes import Cityscapes
from datasets.drawn import draw_once
from datasets.drawn.streets import make_synthetic
from datasets.folder import Folder, read_classes
from datasets.images import MIN_SIZE
from datasets.loading import count_pixels
from datasets.segmentation import Classes, Segmentation, resized_size
from datasets.transforms import Paper, Strong
from utils.errors import UserError

DATASETS = {
    "cityscapes": Cityscapes,
    "synthetic": Cityscapes,  # the drawn scenes, in the same layout
    "camvid": CamVid,
    "folder": Folder,
}

T = TypeVar("T")
Size = tuple[int, int]  # height and width


@dataclass
class Data:
    """What a run trains and validates on.

    Attributes:
        classes: classes of the data set.
        train, val: data sets of (image, label), cached if the options ask for it.
        train_files: paths of the image and the label of each index of train.
        counts: training pixels by name of the class, then "ignored".
        size: height and width that is trained on.
        augment: recipe of augmentation, for `transforms.Augment`.
        summary: "6 of train to train on, 3 of val to validate, 19 classes".
        trains_on_val: images of val are trained on.
        workers: processes that are needed to load; 0 if everything is in memory.
        pin_memory: batches may be pinned; those that are on the GPU already may not.
    """

    classes: Classes
    train: Dataset
    val: Dataset
    train_files: list[tuple[str, str | None]]
    counts: dict[str, int]
    size: Size
    augment: Paper | Strong
    summary: str
    trains_on_val: bool
    workers: int
    pin_memory: bool


def read_classes_for(args: argparse.Namespace) -> Classes:
    """Return the classes of a data set, from its file of classes if it has no fixed ones.

    Args:
        args: `dataset` and `classes`.

    Raises:
        UserError: the file is missing, needless or wrong.
    """
    fixed = DATASETS[args.dataset].CLASSES
    if fixed is None and not args.classes:
        raise UserError(f"--dataset {args.dataset} needs --classes FILE, which names its classes")
    if fixed is not None and args.classes:
        raise UserError(f"--dataset {args.dataset} has classes of its own: leave --classes out")
    return fixed or read_classes(args.classes)


def open_splits(
    args: argparse.Namespace,
    classes: Classes,
    device: torch.device,
    counts: dict[str, int] | None = None,
    first: Callable[[Callable[[], T]], T] = lambda function: function(),
    processes: int = 1,
    local_processes: int | None = None,
) -> Data:
    """Open, check, count and cache what a run trains and validates on.

    Args:
        args: dataset, datadir, train_on, height, augment, crop, scale, cache, workers and
            skip_broken.
        classes: classes of the labels.
        device: device of the training.
        counts: training pixels by class, if a resumed run knows them.
        first: calls a function in the first process only and returns its result in all.
        processes: number of processes of the run.
        local_processes: number of them on this machine; all by default.

    Raises:
        UserError: the data cannot be trained on.
    """
    sizes = first(lambda: _find_splits(args, classes))
    *parts, val = sizes
    size = _training_size(args, {size for part in parts for size in sizes[part]})
    files = [pair for part in parts for pair in part.pairs]
    if len(files) < 2 * processes:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise UserError(f"{args.datadir} has too few training images, {len(files)}: give 2{each}")
    if counts is None:
        counts = first(lambda: _count_classes(parts, val, classes, args.workers))
    *train, val_items = _cache(sizes, args, device, first, local_processes or processes)
    sources = " + ".join(f"{len(part)} of {part.split}" for part in parts)
    return Data(
        classes=classes,
        train=ConcatDataset(train),
        val=val_items,
        train_files=files,
        counts=counts,
        size=size,
        augment=Strong(size, tuple(args.scale)) if args.augment == "strong" else Paper(),
        summary=f"{sources} to train on, {len(val)} of val to validate, {len(classes)} classes",
        trains_on_val=not set(files).isdisjoint(val.pairs),
        # A folder still has to be read: workers hide a slow disk.
        workers=0 if args.cache == "ram" else args.workers,
        pin_memory=args.cache != "ram" or not val_items[0][0].is_cuda,
    )


def _find_splits(args: argparse.Namespace, classes: Classes) -> dict[Segmentation, list[Size]]:
    """Return the parts to train on and, last, val, each with the sizes of its images."""
    if args.dataset == "synthetic":
        draw_once(args.datadir, make_synthetic, "street scenes")
    dataset_class = DATASETS[args.dataset]
    need_labels = not args.skip_broken
    splits = [
        dataset_class(args.datadir, split, classes, args.height, need_labels=need_labels)
        for split in dataset_class.TRAIN_ON[args.train_on]
    ]
    splits.append(dataset_class(args.datadir, "val", classes, args.height, False, need_labels))
    if args.skip_broken:
        for split in splits:
            leave_out_broken(split, args.workers, replace=split is not splits[-1])
    return {split: check_files(split.pairs) for split in splits}


def _training_size(args: argparse.Namespace, sizes: set[Size]) -> Size:
    """Return the height and width to train on; `sizes` are those of the training images."""
    resized = sorted({resized_size(*size, args.height) for size in sizes})
    cropped = args.augment == "strong" and args.crop
    if len(resized) > 1 and not cropped:
        raise UserError(
            f"at a height of {args.height}, the images of {args.datadir} are {resized[0][1]} to "
            f"{resized[-1][1]} wide: give --augment strong and --crop {args.height} "
            f"{resized[0][1]}, which train on crops of one size"
        )
    height, width = args.crop if cropped else resized[0]
    if width < MIN_SIZE:
        raise UserError(
            f"--height {args.height} makes images of {width}x{height}: LEDNet needs "
            f"{MIN_SIZE}x{MIN_SIZE}"
        )
    return height, width


def _count_classes(
    parts: Sequence[Segmentation], val: Segmentation, classes: Classes, workers: int
) -> dict[str, int]:
    """Count the training pixels of each class; also finds unknown label ids, in val as well."""
    print("class weights: counting the pixels of the labels", flush=True)
    counts = count_pixels(parts, len(classes), workers)
    count_pixels([val], len(classes), workers)
    return dict(zip([*classes.names, "ignored"], counts.tolist(), strict=True))


def _cache(
    sizes: dict[Segmentation, list[Size]],
    args: argparse.Namespace,
    device: torch.device,
    first: Callable[[Callable[[], T]], T],
    processes: int,
) -> list[Dataset]:
    """Return the splits as --cache says; `processes` are those on this machine."""
    if args.cache == "off":
        return list(sizes)

    def keep() -> list[Dataset]:
        return cached(sizes, args.cache, args.workers, device, processes)

    if args.cache != "ram":
        first(lambda: bool(keep()))  # the other processes find the files
    return keep()
