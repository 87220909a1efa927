"""Data sets by name, and opening what a run trains and validates on.

To add a data set, write its module and add its line to DATASETS.
"""

import argparse
import os
from dataclasses import dataclass

import torch
from torch.utils.data import ConcatDataset, Dataset

from datasets.cache import cached
from datasets.camvid import CamVid
from datasets.check import check_files, leave_out_broken
from datasets.cityscapes import Cityscapes
from datasets.class_file import read_classes
from datasets.counts import absent_classes, count_labels, label_problems, palette_note
from datasets.drawn import draw_once
from datasets.drawn.streets import make_synthetic
from datasets.folder import Folder
from datasets.images import MIN_SIZE, DatasetError, FilePair, Size
from datasets.segmentation import Classes, Segmentation, resized_size
from datasets.soft_labels import SoftLabels
from datasets.transforms import Paper, Strong
from utils import distributed

DATASETS = {
    "cityscapes": Cityscapes,
    "synthetic": Cityscapes,  # the drawn scenes, in the same layout
    "camvid": CamVid,
    "folder": Folder,
}


class ClassesError(DatasetError):
    """A file of classes is missing, or given to a data set that has classes of its own."""


class MixedSizes(DatasetError):
    """The training images have different sizes, and are not cropped to one."""


@dataclass
class Data:
    """What a run trains and validates on."""

    classes: Classes
    train: Dataset  # of (image, label), cached if the options say so
    val: Dataset
    train_files: list[FilePair]  # image and label of each index of train
    soft_labels: SoftLabels | None  # of each index of train
    counts: dict[str, int]  # training pixels by name of the class, then "ignored"
    size: Size  # height and width that is trained on
    augment: Paper | Strong  # recipe of transforms.Augment
    summary: str  # "6 of train to train on, 3 of val to validate, 19 classes"
    trains_on_val: bool
    workers: int  # processes to load with: none if all is in memory
    pin_memory: bool  # for a GPU, unless all is there already


def read_classes_for(args: argparse.Namespace) -> Classes:
    """Return the classes of `args.dataset`: its own, or those of the file `args.classes`.

    Raises:
        ClassesError: the file is missing, or needless.
        DatasetError: the file is wrong.
    """
    fixed = DATASETS[args.dataset].CLASSES
    if fixed is None and not args.classes:
        raise ClassesError(f"the data set {args.dataset} needs a file that names its classes")
    if fixed is not None and args.classes:
        raise ClassesError(f"the data set {args.dataset} has classes of its own")
    return fixed or read_classes(args.classes)


def open_splits(
    args: argparse.Namespace,
    classes: Classes,
    device: torch.device,
    counts: dict[str, int] | None = None,
) -> Data:
    """Open, check, count and cache what a run trains and validates on, in all its processes.

    Args:
        args: dataset, datadir, train_on, soft_labels, height, augment, crop, scale, cache, workers,
            skip_broken.
        counts: training pixels by class, if a resumed run knows them.

    Raises:
        DatasetError: the data cannot be trained on; see its subclasses.
    """
    splits = distributed.first(lambda: _find_splits(args, classes))
    *parts, val = splits
    size = _training_size(args, {size for part in parts for size in splits[part]})
    files = [pair for part in parts for pair in part.pairs]
    processes = distributed.processes()
    if len(files) < 2 * processes:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise DatasetError(
            f"{args.datadir} has too few training images, {len(files)}: give 2{each}"
        )
    soft_labels = None
    if args.soft_labels:
        images = [image for image, _ in files]
        soft_labels = distributed.first(
            lambda: SoftLabels(args.soft_labels, args.datadir, images, classes.names)
        )
    if counts is None:
        counts = distributed.first(lambda: _count_classes(parts, val, classes, args))

    def items() -> list[Dataset]:
        if args.cache == "off":
            return [*parts, val]
        return cached(splits, args.cache, args.workers, device, distributed.local_processes())

    if args.cache not in ("off", "ram"):
        distributed.first(lambda: bool(items()))  # the other processes find the files
    *train_items, val_items = items()
    sources = " + ".join(f"{len(part)} of {part.split}" for part in parts)
    return Data(
        classes=classes,
        train=ConcatDataset(train_items),
        val=val_items,
        train_files=files,
        soft_labels=soft_labels,
        counts=counts,
        size=size,
        augment=Strong(size, tuple(args.scale)) if args.augment == "strong" else Paper(),
        summary=f"{sources} to train on, {len(val)} of val to validate, {len(classes)} classes",
        trains_on_val=not _real_images(files).isdisjoint(_real_images(val.pairs)),
        workers=0 if args.cache == "ram" else args.workers,
        pin_memory=device.type == "cuda" and not (args.cache == "ram" and val_items[0][0].is_cuda),
    )


def _real_images(pairs: list[FilePair]) -> set[str]:
    """Return the paths of images without symbolic links."""
    return {os.path.realpath(image) for image, _ in pairs}


def _find_splits(args: argparse.Namespace, classes: Classes) -> dict[Segmentation, list[Size]]:
    """Return the parts to train on and, last, val, each with the sizes of its images."""
    if args.dataset == "synthetic":
        draw_once(args.datadir, make_synthetic, "street scenes")
    dataset_class = DATASETS[args.dataset]
    options = {"classes": classes, "height": args.height, "need_labels": not args.skip_broken}
    parts = dataset_class.TRAIN_ON[args.train_on]
    splits = [dataset_class(args.datadir, part, **options) for part in parts]
    splits.append(dataset_class(args.datadir, "val", resize_labels=False, **options))
    if args.skip_broken:
        for split in splits:
            leave_out_broken(split, args.workers, replace=split is not splits[-1])
    return {split: check_files(split.pairs) for split in splits}


def _training_size(args: argparse.Namespace, sizes: set[Size]) -> Size:
    """Return the height and width to train on; `sizes` are those of the training images."""
    resized = sorted({resized_size(*size, args.height) for size in sizes})
    cropped = args.augment == "strong" and args.crop
    if len(resized) > 1 and not cropped:
        raise MixedSizes(
            f"at a height of {args.height}, the images of {args.datadir} are {resized[0][1]} to "
            f"{resized[-1][1]} wide"
        )
    height, width = args.crop if cropped else resized[0]
    if width < MIN_SIZE:
        raise DatasetError(
            f"the images of {args.datadir} become {width}x{height} at a height of {args.height}: "
            f"LEDNet needs {MIN_SIZE}x{MIN_SIZE}"
        )
    return height, width


def _count_classes(
    parts: list[Segmentation], val: Segmentation, classes: Classes, args: argparse.Namespace
) -> dict[str, int]:
    """Count the training pixels of each class, and check the labels, those of val as well."""
    print("class weights: counting the pixels of the labels", flush=True)
    train = count_labels(parts, args.workers)
    counts = {" + ".join(part.split for part in parts): train}
    counts["val"] = count_labels([val], args.workers)
    if problems := label_problems(counts, classes, args.classes):
        raise DatasetError(problems[0])
    notes = [palette_note(counts, classes)]
    for split, found in counts.items():
        if absent := absent_classes(found, classes):
            notes.append(f"classes without a pixel in {split}: {', '.join(absent)}")
    for note in filter(None, notes):
        print(f"note: {note}", flush=True)
    return dict(zip([*classes.names, "ignored"], train.by_class(classes).tolist(), strict=True))
