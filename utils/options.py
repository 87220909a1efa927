"""The options of the training programs: one table, settled once, before anything runs."""

import argparse
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DATASETS, ClassesError, MixedSizes
from datasets.cache import CacheError, CacheLost, CacheTooLarge
from datasets.drawn import DrawingError
from datasets.images import MIN_SIZE, BrokenFiles, FileError, NothingReadable
from datasets.workers import WorkerError
from utils.arguments import (
    THREADS_HELP,
    ArgumentParser,
    file_path,
    finite_float,
    natural_float,
    natural_int,
    positive_float,
    positive_int,
    probability,
    seed_int,
)
from utils.checkpoint import EncoderOnly, WrongWidth
from utils.errors import UserError
from utils.evaluation import OutOfMemory
from utils.files import WriteError
from utils.interrupts import Diverged
from utils.losses import LOSSES
from utils.optim import SCHEDULES
from utils.run_folder import BEST, FolderInUse, FolderLocked, NoRun, read_args, run_path

# Where the embedded data sets are drawn.
STREETS, SHAPES = Path("data/synthetic"), Path("data/shapes")

# Which options of the training programs mend an error.
TRAINING_ADVICE = {
    BrokenFiles: "python tools/check_dataset.py lists them all, --skip-broken leaves them out",
    FileError: "--skip-broken leaves it out",
    NothingReadable: "python tools/check_dataset.py lists what is broken",
    CacheError: "give --cache off, or another folder",
    CacheTooLarge: "give --cache off, another folder, or a smaller --height",
    CacheLost: "--resume makes it again",
    ClassesError: "see --classes",
    MixedSizes: "give --augment strong and --crop HEIGHT WIDTH, to train on crops of one size",
    DrawingError: "run in a folder that can be written, or give --datadir",
    OutOfMemory: "give a smaller --batch-size or, where graphs are on, --no-graphs, which may both "
    "change on --resume, or smaller images",
    WorkerError: "give fewer --workers",
    Diverged: "start another run with a smaller --lr",
    EncoderOnly: "give it as --pretrained-encoder",
    WrongWidth: "give --apn-channels as it was trained, or another file",
    FolderInUse: "continue it with --resume, or give another --savedir",
    FolderLocked: "wait for its end, or give another --savedir",
    NoRun: "give the --savedir of a run, or leave --resume out",
    WriteError: "make room, or give a --savedir that can be written",
}


@dataclass(frozen=True)
class Option:
    """A row of a table of options."""

    flags: str  # on the command line; the first one names the value
    type: Callable[[str], Any] | str  # or "flag": no value; "switch": a flag with a --no- form
    default: Any
    help: str  # to which the defaults are added
    by_preset: Mapping[str, Any] = field(default_factory=dict)  # defaults that differ
    may_change: bool = False  # when a run is resumed
    argparse_options: Mapping[str, Any] = field(default_factory=dict)  # for add_argument

    @property
    def name(self) -> str:
        return self.flags.split()[0].removeprefix("--").replace("-", "_")

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        actions = {"flag": "store_true", "switch": argparse.BooleanOptionalAction}
        how = {"action": actions[self.type]} if self.type in actions else {"type": self.type}
        shown = "; ".join(filter(None, [self.help, self._defaults()]))
        how |= self.argparse_options
        parser.add_argument(*self.flags.split(), default=None, help=shown, **how)

    def _defaults(self) -> str:
        if self.type == "flag" or "default" in self.help:
            return ""
        others = ", ".join(f"{preset} {_shown(value)}" for preset, value in self.by_preset.items())
        return f"default {_shown(self.default)}" + (f" ({others})" if others else "")

    def default_for(self, presets: Sequence[str]) -> Any:
        """Return the default of the first preset that has one, else that of all."""
        return next((self.by_preset[p] for p in presets if p in self.by_preset), self.default)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


Table = Mapping[str, Sequence[Option]]  # groups of options by title

# Presets: paper as published; the others train in one stage, quick on the drawn scenes.
PRESETS = ("paper", "cityscapes", "camvid", "quick")


def one_stage(value: Any) -> dict[str, Any]:
    """Return a default that the presets of one stage have in common."""
    return dict.fromkeys(PRESETS[1:], value)


MACHINE = (
    Option("--workers --num-workers", natural_int, min(4, os.cpu_count() or 1),
           "processes that load data", may_change=True),
    Option("--device", str, "auto", "device: auto, cpu, cuda or cuda:1", may_change=True),
    Option("--threads", positive_int, None, THREADS_HELP, may_change=True),
    Option("--amp", str, "auto", "mixed precision; auto: on a GPU only", may_change=True,
           argparse_options={"choices": ("auto", "off", "bf16", "fp16")}),
    Option("--compile", "flag", False, "train through torch.compile, which takes minutes to start "
           "and speeds up training on a GPU", may_change=True),
    Option("--graphs", "switch", True, "record the passes of a step on a GPU once, as CUDA graphs, "
           "and repeat them; not with --compile or several processes", may_change=True),
    Option("--seed", seed_int, 0, "seed of everything random"),
    Option("--sync-bn", "flag", False, "synchronise batch norm across processes; GPUs only"),
    Option("--skip-broken", "flag", False, "leave out images and labels that cannot be read, and "
           "count them, instead of ending the run", may_change=True),
)  # fmt: skip

OUTPUT = (
    Option("--savedir", file_path, None, "name of a folder under save/, or a path; default: data "
           "set and time", may_change=True),
    Option("--resume", "flag", False, "continue the run in --savedir", may_change=True),
    Option("--checkpoint-minutes", natural_float, 10.0, "maximum minutes between checkpoints, "
           "which are also written after each validation and a stage's first epoch",
           may_change=True),
    Option("--steps-loss", natural_int, 50, "steps between lines of progress in a log; 0: none",
           may_change=True),
    Option("--epochs-save", natural_int, 0, "keep the weights of every Nth epoch; 0: only the last "
           "and the best", may_change=True),
)  # fmt: skip

SEGMENTATION: Table = {
    "recipe": (
        Option("--preset", str, None, "defaults of the other options: as published, stronger ones, "
               "or a quick run on the drawn scenes; default paper, without --datadir quick",
               argparse_options={"choices": PRESETS}),
        Option("--encoder-epochs", natural_int, 300, "epochs of stage 1", one_stage(0)),
        Option("--epochs", positive_int, 300, "epochs of stage 2",
               dict(cityscapes=800, camvid=80, quick=10)),
        Option("--num-epochs", positive_int, None, "epochs of each stage that the preset has"),
        Option("--batch-size", positive_int, 5, "images in a step of each process",
               dict(cityscapes=12, camvid=8, quick=4), may_change=True),
        Option("--optimizer", str, "adam", "optimizer", one_stage("adamw"),
               argparse_options={"choices": ("adam", "adamw")}),
        Option("--lr", positive_float, 5e-4, "highest learning rate",
               dict(cityscapes=1e-3, camvid=2e-3, quick=0.012)),
        Option("--weight-decay", natural_float, 1e-4, "weight decay", one_stage(0.01)),
        Option("--schedule", str, "poly", "schedule of the learning rate, by steps",
               one_stage("onecycle"), argparse_options={"choices": tuple(SCHEDULES)}),
        Option("--loss", str, "ce", "cross entropy over all pixels (ce) or the hard ones (ohem)",
               dict(cityscapes="ohem"), argparse_options={"choices": tuple(LOSSES)}),
        Option("--weight-c", natural_float, None, "c in the class weights 1 / ln(c + share of "
               "pixels); 0: equal weights; default 1.2 in stage 1 and 1.1 in stage 2",
               argparse_options={"metavar": "C"}),
        Option("--aux-weight", natural_float, 0.0, "loss weight of an auxiliary head on the "
               "encoder in stage 2; 0: no head", one_stage(0.4)),
        Option("--soft-labels", file_path, None, "folder that tools/write_soft_labels.py wrote, to "
               "learn from as well as from the labels in stage 2; default: none", may_change=True,
               argparse_options={"metavar": "DIR"}),
        Option("--ema", "switch", False, "score and save an exponential average of the weights in "
               "stage 2", dict(cityscapes=True, camvid=True)),
    ),
    "data": (
        Option("--dataset", str, None, "data set; folder: your own, see --classes; default "
               f"cityscapes, for {STREETS} synthetic", argparse_options={"choices": DATASETS}),
        Option("--datadir", file_path, None, "folder of the data set; default: street scenes are "
               f"drawn into {STREETS}", may_change=True),
        Option("--classes", file_path, None, "text or JSON file with the names and colours of the "
               "classes of --dataset folder; default: none", argparse_options={"metavar": "FILE"}),
        Option("--train-on --annotations", str, None, "splits to train on; "
               + "; ".join(f"{name}: {', '.join(d.TRAIN_ON)}" for name, d in DATASETS.items())
               + "; default: the first", argparse_options={"metavar": "SPLITS"}),
        Option("--height", positive_int, 512, "height that images are resized to, in proportion",
               dict(cityscapes=1024, camvid=360, quick=160)),
        Option("--cache", file_path, "off", "decode and resize each image once, and keep the "
               "result in memory (ram) or in a file in a folder", dict(camvid="ram", quick="ram"),
               may_change=True, argparse_options={"metavar": "DIR|ram|off"}),
        Option("--augment", str, "paper", "paper: flip and shift; strong: scale, crop, flip, "
               "colour, noise", dict(cityscapes="strong", camvid="strong"),
               argparse_options={"choices": ("paper", "strong")}),
        Option("--crop", positive_int, None, "size of the crops of --augment strong; none: that "
               "of the images", dict(cityscapes=[1024, 1024], camvid=[240, 320]),
               argparse_options={"nargs": 2, "metavar": ("HEIGHT", "WIDTH")}),
        Option("--scale", positive_float, [0.5, 2.0], "range of scales of --augment strong",
               dict(camvid=[0.67, 1.5]), argparse_options={"nargs": 2, "metavar": ("MIN", "MAX")}),
        Option("--jitter", probability, 0.4, "range of brightness, contrast and saturation of "
               "--augment strong"),
        Option("--noise", natural_float, 0.0, "largest standard deviation of the grey noise that "
               "--augment strong adds, of 255 levels; 0: none"),
    ),
    "network": (
        Option("--apn-channels --D", positive_int, None, "width D of the decoder; default 20, or "
               "that of --init"),
        Option("--dropout", probability, 0.3, "dropout of the encoder's last stage",
               dict(camvid=0.1, quick=0.0)),
        Option("--pretrained-encoder --pretrainedEncoder", file_path, None, "file to take the "
               "encoder from, skipping stage 1: a checkpoint of either program, or a state_dict of "
               "the original code; default: none", argparse_options={"metavar": "FILE"}),
        Option("--init --state", file_path, None, "whole network to start stage 2 from; "
               "classes that it does not have start anew; default: none",
               argparse_options={"metavar": "CHECKPOINT"}),
        Option("--decoder", "flag", False, "skip stage 1"),
        *(Option(f"--{name}", check, None, f"{name} to normalise images in [0, 1] with, by RGB "
                 "channel; default: that of the file to start from, or none",
                 argparse_options={"nargs": 3, "metavar": ("R", "G", "B")})
          for name, check in (("mean", finite_float), ("std", positive_float))),
    ),
    "machine": MACHINE,
    "output": (
        *OUTPUT,
        Option("--val-every", positive_int, 1, "epochs between validations", one_stage(5),
               may_change=True),
        Option("--iouTrain", "flag", False, "measure the mIoU on training images too"),
    ),
}  # fmt: skip

PRETRAINING: Table = {
    "recipe": (
        Option("--recipe", str, "paper", "paper: SGD, as published; modern: AdamW, one cycle, "
               "label smoothing, RandAugment and an average of the weights",
               argparse_options={"choices": ("paper", "modern")}),
        Option("--epochs", positive_int, 150, "epochs", dict(shapes=18)),
        Option("--batch-size", positive_int, 256, "images in a step of each process",
               dict(shapes=16), may_change=True),
        Option("--lr", positive_float, 0.1, "highest learning rate",
               dict(modern=1e-3, shapes=0.005)),
        Option("--size", positive_int, 224, "side of the square crops of images", dict(shapes=64)),
    ),
    "data": (
        Option("--datadir", file_path, None, "folder with train/<class>/ and val/<class>/; "
               f"default: shapes and textures are drawn into {SHAPES}", may_change=True),
    ),
    "machine": MACHINE,
    "output": (
        *OUTPUT,
        Option("--val-every", positive_int, 1, "epochs between validations", may_change=True),
        Option("--evaluate", file_path, None, "score a checkpoint on val, and do not train; "
               f"default: {BEST} of --savedir", may_change=True,
               argparse_options={"nargs": "?", "const": True, "metavar": "FILE"}),
    ),
}  # fmt: skip


def parse_options(
    description: str | None, table: Table, settle: Callable[[argparse.Namespace], None]
) -> argparse.Namespace:
    """Parse the command line; a resumed run keeps the options that it was started with.

    Args:
        table: all options, by group.
        settle: fills in what is still open, and refuses what cannot be done.

    Raises:
        UserError: options are impossible, or differ from those of the run to resume.
    """
    parser = ArgumentParser(description)
    for title, rows in table.items():
        group = parser.add_argument_group(title)
        for row in rows:
            row.add_to(group)
    # Pretraining has no --dataset; settle_pretraining fills it in.
    parser.set_defaults(dataset=None)
    may_change = {row.name: row.may_change for rows in table.values() for row in rows}
    args = parser.parse_args()
    stored = _stored_options(args.savedir, may_change.keys()) if args.resume else {}
    parser.set_defaults(**stored)
    args = parser.parse_args()  # with those of the run to resume where none are given
    settle(args)
    for name, value in stored.items():
        if not may_change.get(name) and getattr(args, name) != value:
            if name == "num_epochs":  # has set another option
                name, value = "epochs", stored["epochs"]
            message = (
                f"the run in {args.savedir} has --{name.replace('_', '-')} {_shown(value)}: leave "
                "the option out to resume, or start another run"
            )
            if "epochs" in name:
                message += "; a schedule cannot be lengthened once it has begun"
            if "epochs" in name and "init" in may_change:
                message += f": to train on, give the other run --init {Path(args.savedir, BEST)}"
            raise UserError(message)
    return args


def _stored_options(savedir: str | None, names: Collection[str]) -> dict[str, Any]:
    """Return the options of the run to resume, which are among these names."""
    if savedir is None:
        raise UserError("--resume needs --savedir, the folder of the run to continue")
    folder = run_path(savedir, "")
    stored = read_args(folder)
    if not stored.keys() <= {*names, "dataset"}:
        raise UserError(f"{folder} holds a run of another program: resume it with that")
    return {name: stored[name] for name in stored if name not in ("savedir", "resume")}


def fill_defaults(args: argparse.Namespace, table: Table, presets: Sequence[str]) -> None:
    """Give the options that the command line leaves open the defaults of the presets."""
    for row in (row for rows in table.values() for row in rows):
        if getattr(args, row.name) is None:
            setattr(args, row.name, row.default_for(presets))


def settle_segmentation(args: argparse.Namespace) -> None:
    """Settle the options of main.py; raise a UserError if they contradict each other."""
    embedded = args.datadir is None or Path(args.datadir).resolve() == STREETS.resolve()
    if args.datadir is None and args.dataset not in (None, "synthetic"):
        raise UserError(f"--dataset {args.dataset} needs --datadir, the folder of the data set")
    skips_stage_1 = args.init or args.pretrained_encoder or args.decoder
    if skips_stage_1 and args.encoder_epochs and not args.resume:
        raise UserError("--encoder-epochs: --init, --pretrained-encoder and --decoder skip stage 1")
    args.epochs = args.epochs or args.num_epochs
    of_strong = ("crop", "scale", "jitter", "noise")
    needs_strong = [name for name in of_strong if getattr(args, name) is not None]
    args.preset = args.preset or ("quick" if args.datadir is None else "paper")
    if args.encoder_epochs is None and args.preset == "paper":  # the others have one stage
        args.encoder_epochs = args.num_epochs
    fill_defaults(args, SEGMENTATION, [args.preset])
    args.dataset = args.dataset or (
        "folder" if args.classes else "synthetic" if embedded else "cityscapes"
    )
    args.datadir = args.datadir or str(STREETS)
    args.savedir = str(run_path(args.savedir, args.dataset))
    train_on = DATASETS[args.dataset].TRAIN_ON
    args.train_on = args.train_on or next(iter(train_on))
    if skips_stage_1:
        args.encoder_epochs = 0

    if needs_strong and args.augment == "paper" and not args.resume:
        raise UserError(f"--{needs_strong[0]} needs --augment strong")
    if args.train_on not in train_on:
        raise UserError(f"--train-on {args.train_on}: {args.dataset} has {' and '.join(train_on)}")
    for flag, size in (("--height", [args.height]), ("--crop", args.crop or [MIN_SIZE])):
        if min(size) < MIN_SIZE:
            raise UserError(
                f"{flag} {_shown(size)} is too small: LEDNet needs {MIN_SIZE}x{MIN_SIZE} pixels"
            )
    if args.scale[0] > args.scale[1]:
        raise UserError(f"--scale {_shown(args.scale)}: give the smaller one first")
    if args.weight_c is not None and 0 < args.weight_c <= 1:
        raise UserError(f"--weight-c {args.weight_c}: give a number above 1, or 0")
    if args.batch_size == 1:
        raise UserError("--batch-size 1 cannot train: batch norm on a 1x1 plane needs 2 images")
    if (args.mean is None) != (args.std is None):
        raise UserError("--mean and --std belong together: give both or none")
    if args.init and args.pretrained_encoder:
        raise UserError("--init and --pretrained-encoder exclude each other: give one of them")


def settle_pretraining(args: argparse.Namespace) -> None:
    """Settle the options of lednet_imagenet.py; raise a UserError if they contradict each other."""
    if args.evaluate:
        if args.resume:
            raise UserError("--evaluate and --resume exclude each other: give one of them")
        if args.evaluate is True:
            if not args.savedir:
                raise UserError("--evaluate needs a checkpoint, or --savedir, the folder of a run")
            args.evaluate = str(run_path(args.savedir, "") / BEST)
        args.batch_size = args.batch_size or 64
        size, datadir = args.size, args.datadir
        fill_defaults(args, PRETRAINING, [])
        args.size, args.datadir = size, datadir  # if not given, the checkpoint states them
    else:
        embedded = args.datadir is None or Path(args.datadir).resolve() == SHAPES.resolve()
        presets = [args.recipe or "paper", *(["shapes"] if args.datadir is None else [])]
        fill_defaults(args, PRETRAINING, presets)
        args.dataset = args.dataset or ("shapes" if embedded else "imagenet")
        args.datadir = args.datadir or str(SHAPES)
        args.savedir = str(run_path(args.savedir, args.dataset))
    if args.size is not None and args.size < 16:
        raise UserError(f"--size {args.size} is too small: the classifier needs 16x16 pixels")
