"""Train LEDNet: stage 1 the encoder, stage 2 the whole network; or both in one stage.

python main.py                                        on drawn street scenes, made once
python main.py --datadir DIR                          on Cityscapes, as published
python main.py --datadir DIR --preset cityscapes      on Cityscapes, by a stronger recipe
python main.py --datadir DIR --pretrained-encoder save/imagenet/encoder.pth
python main.py --datadir DIR --train-on coarse --savedir coarse
python main.py --datadir DIR --init save/coarse/best.pth --savedir fine
python main.py --dataset camvid --datadir DIR --preset camvid
python main.py --dataset folder --classes FILE --datadir DIR --preset camvid \\
    --init weights/lednet_d20_camvid.pth              on your own classes
python main.py --savedir NAME --resume                go on with an interrupted run
torchrun --nproc-per-node 4 main.py --datadir DIR     in a process for each of 4 GPUs
"""

import argparse
import math
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter

from datasets import DATASETS
from datasets.cache import keep_decoded
from datasets.check import check_headers, told_left_out, without_broken
from datasets.drawn import draw_once
from datasets.drawn.streets import make_synthetic
from datasets.folder import read_classes
from datasets.images import DatasetError
from datasets.loading import ShuffledSeeds, WithSeed, as_lists, loader_options, training_loader
from datasets.readable import validation_loader
from datasets.segmentation import Classes, Segmentation, resized_size
from datasets.statistics import count_pixels
from datasets.transforms import Augment, Paper, Strong, to_floats
from models.lednet import AuxiliaryHead, EncoderClassifier, LEDNet
from utils import distributed
from utils.checkpoint import (
    apn_channels_of,
    init_network,
    load_checkpoint,
    load_encoder,
    normalisation,
    on_cpu,
)
from utils.errors import UserError
from utils.evaluation import evaluate, train_one_epoch
from utils.events import close_events
from utils.interrupts import Watch
from utils.losses import LOSSES, build_loss, class_weights, with_auxiliary
from utils.metrics import ConfusionMatrix, mean_score
from utils.optim import (
    OPTIMIZERS,
    PAPER,
    PRESETS,
    SCHEDULES,
    WEIGHT_C,
    ema_of,
)
from utils.options import (
    ArgumentParser,
    file_path,
    finite_float,
    natural_float,
    natural_int,
    positive_float,
    positive_int,
    probability,
)
from utils.run_folder import (
    BEST,
    COUNTS,
    ENCODER,
    LAST,
    LOG,
    add_run_options,
    append_row,
    check_free,
    claimed,
    go_on_after,
    keep_options,
    load_run,
    notes,
    parse_run_args,
    read_args,
    read_json,
    resume_command,
    run_folder,
    save_network,
    save_run,
    start_run,
    told,
    write_events,
    write_json,
)
from utils.script import pick_amp_dtype, pick_device, run
from utils.speed import count_parameters
from utils.training import Training, seed_process
from utils.visualize import score_table, strip

EMBEDDED = Path("data/synthetic")

# Mean and std of images that are trained on as they are, in [0, 1].
NOT_NORMALISED = ([0.0] * 3, [1.0] * 3)

# Labels of stage 1 have the encoder's resolution.
LABEL_STRIDE = {1: 8, 2: 1}


class Obsolete(argparse.Action):
    def __init__(self, option_strings, dest, reason="it means nothing any more", **kwargs):
        super().__init__(
            option_strings, dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **kwargs
        )

    def __call__(self, parser, namespace, values, option_string=None):
        pass


class BothStages(argparse.Action):
    """The original code's --num-epochs: as many epochs in each stage."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.encoder_epochs = namespace.epochs = values


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)

    def by_preset(name: str) -> str:
        """The default of an option, which its preset says."""

        def shown(value: Any) -> str:
            if isinstance(value, bool):
                return "on" if value else "off"
            if isinstance(value, list):
                return " ".join(map(str, value))
            return "none" if value is None else str(value)

        default = shown(PAPER[name])
        others = ", ".join(
            f"{preset} {shown(values[name])}"
            for preset, values in PRESETS.items()
            if values[name] != PAPER[name]
        )
        return f"default {default}" + (f", by preset: {others}" if others else "")

    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="recipe that the other options change; paper: as published; cityscapes, camvid: "
        "stronger ones; quick: for the drawn scenes; default paper, without --datadir quick",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=DATASETS,
        help="kind of data set; folder: your own, as --classes says; default cityscapes, and "
        f"synthetic for {EMBEDDED}",
    )
    data.add_argument(
        "--datadir",
        type=file_path,
        help=f"folder of the data set; without it, street scenes are drawn into {EMBEDDED}",
    )
    data.add_argument(
        "--classes",
        metavar="FILE",
        type=file_path,
        help="names and colours of the classes of --dataset folder: a text file with a line for "
        "each value of the labels (`road 128 64 128`), or JSON",
    )
    data.add_argument(
        "--train-on",
        "--annotations",
        metavar="PART",
        help="; ".join(f"{name}: {', '.join(kind.TRAIN_ON)}" for name, kind in DATASETS.items())
        + "; default: the first",
    )
    data.add_argument(
        "--height", type=positive_int, help=f"images are resized to this; {by_preset('height')}"
    )
    data.add_argument(
        "--cache",
        metavar="DIR|ram|off",
        type=file_path,
        help="read and resize each image once; ram: keep its bytes in memory, on the GPU where "
        "there is room; a folder: in a file there, which later runs find; "
        f"{by_preset('cache')}",
    )
    data.add_argument(
        "--augment",
        choices=("paper", "strong"),
        help=f"paper: flip and shift; strong: scale, crop, flip, colour; {by_preset('augment')}",
    )
    data.add_argument(
        "--crop",
        type=positive_int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the parts that --augment strong trains on, none: that of the images; "
        f"{by_preset('crop')}",
    )
    data.add_argument(
        "--scale",
        type=positive_float,
        nargs=2,
        metavar=("LEAST", "MOST"),
        help=f"of --augment strong; {by_preset('scale')}",
    )
    data.add_argument(
        "--jitter",
        type=probability,
        help="of brightness, contrast and saturation in --augment strong; " + by_preset("jitter"),
    )

    start = parser.add_argument_group("network and where it starts")
    start.add_argument(
        "--apn-channels", "--D", type=positive_int, help="width of the decoder; default 20"
    )
    start.add_argument(
        "--dropout",
        type=probability,
        help=f"of the encoder's last stage; {by_preset('dropout')}",
    )
    start.add_argument(
        "--pretrained-encoder",
        "--pretrainedEncoder",
        metavar="FILE",
        type=file_path,
        help="take the encoder from this file and skip stage 1: encoder.pth or another checkpoint "
        "of lednet_imagenet.py or main.py, or a state_dict of the original code",
    )
    for name in ("mean", "std"):
        start.add_argument(
            f"--{name}",
            type=positive_float if name == "std" else finite_float,
            nargs=3,
            metavar=("R", "G", "B"),
            help=f"normalise images in [0, 1] with this {name}; default: as the file to start from "
            "says, else not at all",
        )
    start.add_argument("--decoder", action="store_true", help="go straight to stage 2")
    start.add_argument(
        "--init",
        "--state",
        metavar="CHECKPOINT",
        type=file_path,
        help="start stage 2 from this whole network; its classifier is replaced where the "
        "classes differ",
    )

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--encoder-epochs", type=natural_int, help=f"of stage 1; {by_preset('encoder_epochs')}"
    )
    recipe.add_argument("--epochs", type=positive_int, help=f"of stage 2; {by_preset('epochs')}")
    recipe.add_argument(
        "--num-epochs", type=positive_int, action=BothStages, help="of each stage, in one option"
    )
    recipe.add_argument(
        "--batch-size", type=positive_int, help=f"of each process; {by_preset('batch_size')}"
    )
    recipe.add_argument("--optimizer", choices=OPTIMIZERS, help=by_preset("optimizer"))
    recipe.add_argument(
        "--lr", type=positive_float, help=f"learning rate, at its highest; {by_preset('lr')}"
    )
    recipe.add_argument("--weight-decay", type=natural_float, help=by_preset("weight_decay"))
    recipe.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help=f"of the learning rate, by steps; {by_preset('schedule')}",
    )
    recipe.add_argument(
        "--loss",
        choices=LOSSES,
        help=f"cross entropy, over all pixels or the hard ones; {by_preset('loss')}",
    )
    recipe.add_argument(
        "--weight-c",
        type=natural_float,
        metavar="C",
        help="rare classes weigh more, by 1 / ln(C + share of pixels), the smaller the stronger; "
        f"0: all weigh the same; default "
        f"{WEIGHT_C[1]} in stage 1 and {WEIGHT_C[2]} in stage 2, as published",
    )
    recipe.add_argument(
        "--aux-weight",
        type=natural_float,
        help="of the loss of a second head on the encoder in stage 2, 0: none; "
        + by_preset("aux_weight"),
    )
    recipe.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="score and keep an exponential average of the weights in stage 2; " + by_preset("ema"),
    )
    recipe.add_argument(
        "--compile",
        action="store_true",
        help="train through torch.compile, which takes minutes to begin with; for long runs on a "
        "GPU: on a CPU the steps get slower",
    )
    output = add_run_options(parser)
    output.add_argument(
        "--val-every",
        type=positive_int,
        help=f"epochs between validations; {by_preset('val_every')}",
    )
    output.add_argument(
        "--iouTrain", action="store_true", help="measure the mIoU on the training images too"
    )
    output.add_argument(
        "--epochs-save",
        type=natural_int,
        default=0,
        help="keep the weights of every so many epochs; default 0: last and best alone",
    )
    for name, values in (
        ("model", 1),
        ("port", 1),
        ("steps-plot", 1),
        ("visualize", 0),
        ("cuda", 0),
    ):
        parser.add_argument(f"--{name}", action=Obsolete, nargs=values)
    parser.add_argument(
        "--iouVal", action=Obsolete, nargs=0, reason="every validation measures the mIoU"
    )

    return parse_run_args(parser, settle, free=("val_every", "epochs_save", "cache", "compile"))


def settle(args: argparse.Namespace) -> None:
    """Fill in what the command line leaves open, and refuse what cannot be."""
    embedded = args.datadir is None or Path(args.datadir).resolve() == EMBEDDED.resolve()
    if args.datadir is None and args.dataset not in (None, "synthetic"):
        raise UserError(f"--dataset {args.dataset} needs --datadir, the folder of the data set")
    args.preset = args.preset or ("quick" if args.datadir is None else "paper")
    args.dataset = args.dataset or (
        "folder" if args.classes else "synthetic" if embedded else "cityscapes"
    )
    args.datadir = args.datadir or str(EMBEDDED)
    given = [name for name in ("crop", "scale", "jitter") if getattr(args, name) is not None]
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if given and args.augment == "paper" and not args.resume:
        raise UserError(f"--{given[0]} is of --augment strong: give that as well")
    args.savedir = str(run_folder(args.savedir, args.dataset))
    kind = DATASETS[args.dataset]
    if (kind.CLASSES is None) != (args.classes is not None):
        raise UserError(
            f"--dataset {args.dataset} has classes of its own: leave --classes out"
            if args.classes
            else f"--dataset {args.dataset} needs --classes FILE, which names its classes"
        )
    args.train_on = args.train_on or next(iter(kind.TRAIN_ON))
    if args.train_on not in kind.TRAIN_ON:
        raise UserError(
            f"--train-on {args.train_on} is no part of {args.dataset}: give "
            + " or ".join(kind.TRAIN_ON)
        )
    if args.height < 64:
        raise UserError(f"--height {args.height} is too small: LEDNet needs 64x64")
    if args.crop and min(args.crop) < 64:
        raise UserError(f"--crop {args.crop[0]} {args.crop[1]} is too small: LEDNet needs 64x64")
    if args.scale[0] > args.scale[1]:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: give the smaller one first")
    if args.weight_c is not None and 0 < args.weight_c <= 1:
        raise UserError(f"--weight-c {args.weight_c}: give a number above 1, or 0")
    if args.batch_size == 1:
        raise UserError(
            "--batch-size 1 cannot train: batch norm on the pooled 1x1 plane needs 2 images"
        )
    if (args.mean is None) != (args.std is None):
        raise UserError("--mean and --std belong together: give both or none")
    if args.init and args.pretrained_encoder:
        raise UserError("--init and --pretrained-encoder exclude each other: give one of them")
    if args.init or args.pretrained_encoder or args.decoder:
        args.encoder_epochs = 0


@dataclass
class Run:
    """What both stages of a run share."""

    args: argparse.Namespace
    folder: Path
    device: torch.device
    amp_dtype: torch.dtype | None
    classes: Classes
    train: Dataset
    val: Dataset
    loading: dict[str, Any]  # options of both loaders
    augment: Paper | Strong
    floats: Callable[[Tensor], Tensor]
    counts: Tensor  # training pixels of each class, then of the ignored ones
    watch: Watch
    writer: SummaryWriter | None  # of the first process
    description: dict[str, Any]  # what every checkpoint says of the network
    resumed: dict[str, Any] | None  # the checkpoint to go on from


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    if args.sync_bn and device.type == "cpu":
        raise UserError("--sync-bn needs GPUs: leave it out")
    distributed.start(device)
    folder = Path(distributed.first(lambda: args.savedir))  # which may say the time
    with claimed(folder) if distributed.is_first() else nullcontext():
        train(args, folder, device)


def train(args: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """The run, from what lies on the disk to the trained network."""
    amp_dtype = pick_amp_dtype(args.amp, device)
    torch.backends.cudnn.benchmark = True
    resumed = distributed.first(lambda: load_run(folder) if args.resume else check_free(folder))
    stage_done, epoch_done = (resumed["stage"], resumed["epoch"]) if resumed else (0, 0)

    kind = DATASETS[args.dataset]
    if resumed:
        classes = Classes.from_checkpoint(resumed)  # as the run began, whatever --classes says now
    else:
        classes = read_classes(args.classes) if args.classes else kind.CLASSES
    torch.manual_seed(args.seed)
    network, mean, std = build_network(args, classes, resumed)

    # The first process looks at the files, and all go on with what it found.
    sizes = distributed.first(lambda: find_data(args, classes))
    *parts, val = sizes
    size, augment = pick_augment(args, [size for part in parts for size in sizes[part]])
    count = distributed.processes()
    each = f" in each of {count} processes" if count > 1 else ""
    images = sum(map(len, parts))
    if images < 2 * count:
        raise UserError(f"{args.datadir} has too few training images, {images}: give 2{each}")
    sources = " + ".join(f"{len(part)} of {part.split}" for part in parts)
    print(
        f"LEDNet, D = {args.apn_channels}: {count_parameters(network):,} parameters, on {device} "
        f"in {amp_dtype or 'full precision'}\n"
        f"data: {args.datadir}: {sources} to train on, {len(val)} of val to validate, "
        f"{len(classes)} classes\n"
        f"images: {size[1]}x{size[0]}, in batches of {args.batch_size}{each}, by {args.workers} "
        f"workers; {args.encoder_epochs} epochs of stage 1, {args.epochs} of stage 2, preset "
        f"{args.preset}\n"
        f"output: {folder}",
        flush=True,
    )
    if (mean, std) != NOT_NORMALISED:
        print(f"images are normalised with mean {mean} and std {std}")
    if {pair for part in parts for pair in part.pairs} & set(val.pairs):
        print("val is trained on: its scores say nothing of images that are new to the network")
    if args.resume and not resumed:
        print("resuming from the start: nothing had been saved")

    named = distributed.first(lambda: count_classes(args, folder, parts, val, classes))
    workers = args.workers
    if args.cache != "off":
        caching = (sizes, args.cache, args.workers, device, distributed.local_processes())
        if args.cache != "ram":
            distributed.first(lambda: bool(keep_decoded(*caching)))  # the others find the files
        *cached, cached_val = keep_decoded(*caching)
    else:
        cached, cached_val = parts, val
    if args.cache == "ram":
        # There is nothing left to read. From a folder there is: workers hide a slow disk, and cost
        # 2 ms of a core an image where it is not.
        workers = 0

    # Nothing was written so far: a mistake found above leaves no folder behind.
    steps_done = epoch_done + (args.encoder_epochs if stage_done == 2 else 0)
    writer = None

    def begin() -> None:
        nonlocal writer
        keep_options(folder, vars(args)) if args.resume else start_run(folder, vars(args))
        write_json(folder / COUNTS, named)
        writer = go_on_after(folder, steps_done, stage=stage_done, epoch=epoch_done)

    distributed.first(begin)
    pairs = [pair for part in parts for pair in part.pairs]
    watch = Watch(
        folder / LAST,
        args.checkpoint_minutes,
        resume_command(folder),
        files=lambda index: pairs[index],
        mistakes=(DatasetError,),
    )
    this = Run(
        args=args,
        folder=folder,
        device=device,
        amp_dtype=amp_dtype,
        classes=classes,
        train=ConcatDataset(cached),
        val=distributed.share(cached_val),
        loading=loader_options(args.batch_size, workers, device) | {"collate_fn": as_lists},
        augment=augment,
        floats=to_floats(mean, std, device),
        counts=torch.tensor(list(named.values())),
        watch=watch,
        writer=writer,
        description={
            "dataset": args.dataset,
            **classes.to_checkpoint(),
            "train_images": len(pairs),
            "apn_channels": args.apn_channels,
            "mean": list(mean),
            "std": list(std),
            "height": args.height,
            "args": vars(args),
        },
        resumed=resumed,
    )
    if args.cache == "ram" and cached_val[0][0].is_cuda:
        this.loading["pin_memory"] = False  # what lies on the GPU cannot be pinned
    seed_process(args.seed)
    with watch:
        if args.encoder_epochs and stage_done < 2:
            encoder = EncoderClassifier(network.encoder, len(classes))
            train_stage(this, 1, encoder, encoder)
            weights = {f"encoder.{name}": w for name, w in on_cpu(network.encoder).items()}
            checkpoint = this.description | {"model": weights, "stage": 1}
            distributed.first(lambda: save_network(checkpoint, folder / ENCODER))
        training = AuxiliaryHead(network, len(classes)) if args.aux_weight else network
        best = train_stage(this, 2, training, network)
    if writer:
        with told(folder):
            close_events(writer)

    print(f"\nclass IoU in % on val after epoch {best['epoch']}, the best:")
    print(score_table(classes.names, best["class_iou"]))
    print(
        f"mIoU {100 * best['miou']:.2f}\n\n"
        "next:\n"
        f"  python eval_cityscapes_server.py --checkpoint {shlex.quote(str(folder / BEST))} "
        f"--datadir {shlex.quote(args.datadir)}\n"
        f"  python predict.py --checkpoint {shlex.quote(str(folder / BEST))} --input PICTURES\n"
        f"  tensorboard --logdir {shlex.quote(str(folder))} --host localhost"
    )


def find_data(args: argparse.Namespace, classes: Classes) -> dict[Segmentation, list]:
    """The parts of the data set to train on and, last, val, each with the sizes of its images."""
    if args.dataset == "synthetic":
        draw_once(args.datadir, make_synthetic, "street scenes")
    kind = DATASETS[args.dataset]
    need_labels = not args.skip_broken
    parts = [
        kind(args.datadir, split, classes, args.height, need_labels=need_labels)
        for split in kind.TRAIN_ON[args.train_on]
    ]
    val = kind(args.datadir, "val", classes, args.height, False, need_labels)
    if args.skip_broken:
        for dataset in (*parts, val):
            told_left_out(without_broken(dataset, args.workers, replace=dataset is not val))
    return {part: check_headers(part.pairs) for part in (*parts, val)}


def count_classes(
    args: argparse.Namespace,
    folder: Path,
    parts: list[Segmentation],
    val: Segmentation,
    classes: Classes,
) -> dict[str, int]:
    """The pixels of each class in the training labels, and of what is ignored, by name."""
    if args.resume and read_args(folder)["datadir"] == args.datadir:
        named = read_json(folder / COUNTS)
        if named is not None:
            return named
    print("class weights: counting the pixels of the labels", flush=True)
    counts = count_pixels(parts, len(classes), args.workers)
    count_pixels([val], len(classes), args.workers)  # finds unknown ids before training
    return dict(zip([*classes.names, "ignored"], counts.tolist(), strict=True))


def pick_augment(
    args: argparse.Namespace, files: list[tuple[int, int]]
) -> tuple[tuple[int, int], Paper | Strong]:
    """The size that is trained on, and what makes images of it.

    Args:
        files: height and width of each image to train on, as it is stored.
    """
    resized = sorted({resized_size(*size, args.height) for size in set(files)})
    cropped = args.augment == "strong" and args.crop
    if len(resized) > 1 and not cropped:
        widths = f"{resized[0][1]} to {resized[-1][1]}"
        raise UserError(
            f"at a height of {args.height}, the images of {args.datadir} are {widths} wide: give "
            f"--augment strong and --crop {args.height} {resized[0][1]}, which make them of one "
            "size"
        )
    size = tuple(args.crop) if cropped else resized[0]
    if size[1] < 64:
        raise UserError(
            f"--height {args.height} makes images of {size[1]}x{size[0]}: LEDNet needs 64x64"
        )
    return size, Strong(size, tuple(args.scale)) if args.augment == "strong" else Paper()


def build_network(
    args: argparse.Namespace, classes: Classes, resumed: dict[str, Any] | None
) -> tuple[LEDNet, Sequence[float], Sequence[float]]:
    """The network as it starts, and the mean and std that its images are normalised with.

    What --apn-channels leaves open is settled in `args`. A resumed run gets its weights later,
    with the rest of its state.
    """
    start: dict[str, Any] = resumed or {}
    if args.init and not resumed:
        start = load_checkpoint(args.init)
    if args.apn_channels is None:
        args.apn_channels = apn_channels_of(start.get("model", {})) or 20
    network = LEDNet(len(classes), args.apn_channels, args.dropout)
    if args.init and not resumed:
        fresh = init_network(network, start, args.init, list(classes.names))
        total = len(network.state_dict())
        print(f"{args.init}: {total - len(fresh)} of {total} tensors loaded")
        if fresh:
            print(f"starting anew, since the classes differ: {', '.join(fresh)}")
    elif args.pretrained_encoder and not resumed:
        start, loaded = load_encoder(network.encoder, args.pretrained_encoder)
        total = len(network.encoder.state_dict())
        print(f"{args.pretrained_encoder}: {loaded} of {total} tensors of the encoder loaded")
        if loaded < total:
            print("the file has no counts of batches, which nothing reads: they start at 0")
    return network, *pick_normalisation(args, start)


def pick_normalisation(
    args: argparse.Namespace, start: dict[str, Any]
) -> tuple[Sequence[float], Sequence[float]]:
    """The mean and std that images are normalised with: as the checkpoint that training starts
    from says, else as the options do, else 0 and 1, which is not at all."""
    file = args.init or args.pretrained_encoder or Path(args.savedir) / LAST
    stated = normalisation(start, file)
    if stated and args.mean and stated != (args.mean, args.std):
        raise UserError(
            f"{file} was trained on images normalised with mean {stated[0]} and std {stated[1]}: "
            "leave --mean and --std out"
        )
    return stated or ((args.mean, args.std) if args.mean else NOT_NORMALISED)


def train_stage(
    this: Run, stage: int, model: torch.nn.Module, network: torch.nn.Module
) -> dict[str, Any]:
    """Train one stage to its end, from where it stopped if it was begun before.

    Args:
        model: what is trained.
        network: the part of it, or all, that is scored and kept.

    Returns:
        "epoch", "miou" and "class_iou" of the epoch with the best mIoU on val.
    """
    args, folder = this.args, this.folder
    epochs = args.encoder_epochs if stage == 1 else args.epochs
    names = this.classes.names
    if args.sync_bn:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(this.device, memory_format=torch.channels_last)
    sampler = ShuffledSeeds(len(this.train), args.seed, distributed.rank(), distributed.processes())
    # A last batch of one image cannot train the batch norm on the pooled plane.
    drop_last = len(sampler) % args.batch_size == 1
    train_loader = training_loader(
        WithSeed(this.train, args.skip_broken), sampler, drop_last=drop_last, **this.loading
    )
    val_loader = validation_loader(this.val, args.skip_broken, **this.loading)
    jitter = args.jitter if args.augment == "strong" else 0.0
    prepare = Augment(this.augment, this.floats, this.device, jitter, LABEL_STRIDE[stage])

    c = WEIGHT_C[stage] if args.weight_c is None else args.weight_c
    weights = class_weights(this.counts, c) if c else torch.ones(len(names))
    weights = weights.to(this.device)
    loss_function: Callable = build_loss(args.loss, weights)
    if model is not network and stage == 2:
        loss_function = with_auxiliary(loss_function, args.aux_weight)
    # Both optimizers' betas, 0.9 and 0.999, and eps, 1e-8, are the published ones. In one kernel on
    # a GPU; on a CPU that would save 6 ms a step, and round otherwise.
    fused = this.device.type == "cuda" or None
    optimizer = OPTIMIZERS[args.optimizer](
        model.parameters(), args.lr, weight_decay=args.weight_decay, fused=fused
    )
    steps = len(train_loader)
    training = Training(
        model,
        network,
        optimizer,
        scheduler=SCHEDULES[args.schedule](optimizer, epochs * steps),
        scaler=torch.amp.GradScaler(this.device.type, enabled=this.amp_dtype == torch.float16),
        batch_size=args.batch_size,
        steps=steps,
        ema=ema_of(network, epochs * steps) if args.ema and stage == 2 else None,
        amp_dtype=this.amp_dtype,
    )
    best = {"epoch": 0, "miou": math.nan, "class_iou": []}

    def checkpoint() -> dict[str, Any]:
        return this.description | {
            "model": on_cpu(training.scored),
            "stage": stage,
            "epoch": training.epoch,
            "best": best,
        }

    def save() -> None:
        state = checkpoint() | training.state()
        distributed.first(lambda: save_run(state, folder))

    resumed = this.resumed if this.resumed and this.resumed["stage"] == stage else None
    if resumed and resumed.get("train_images") != len(this.train):
        raise UserError(
            f"{args.datadir} holds another number of training images than the run in {folder} "
            "began with: give the --datadir that it had, or start another run"
        )
    differences = training.restore(resumed, folder / LAST) if resumed else []
    this.watch.begin(training, save, f" of stage {stage}")
    if resumed:
        best = resumed["best"]
        print(f"resuming after {this.watch.place}")
    for difference in differences:
        print(f"note: {difference}")

    # Beside the model, whose weights keep their names. A smaller last batch has a graph of its own:
    # one graph for any size would make all steps slower.
    trained = distributed.parallel(model, this.device)
    trained = torch.compile(trained, dynamic=False) if args.compile else trained
    pictures_every = max(1, epochs // args.val_every // 10)  # validations
    while training.epoch < epochs:
        epoch = training.epoch + 1
        title = f"stage {stage} epoch {epoch}/{epochs}"
        started = time.perf_counter()
        step = epoch + (args.encoder_epochs if stage == 2 else 0)  # of the log, over both stages
        sampler.begin(step, training.step * args.batch_size)
        confusion = ConfusionMatrix(len(names), this.device)
        training.begin_epoch(**({"confusion": confusion.counts} if args.iouTrain else {}))
        confusion.counts = training.totals.get("confusion", confusion.counts)

        def count(outputs: Any, labels: Tensor, confusion: ConfusionMatrix = confusion) -> None:
            logits = outputs[0] if isinstance(outputs, tuple) else outputs
            confusion.update_from_logits(logits.detach(), labels)

        figures = train_one_epoch(
            training,
            trained,
            train_loader,
            prepare=prepare,
            loss_function=loss_function,
            watch=this.watch,
            title=title,
            steps_loss=args.steps_loss,
            count=count if args.iouTrain else None,
            size_option="--crop" if args.augment == "strong" and args.crop else "--height",
        )
        validated = epoch % args.val_every == 0 or epoch == epochs
        left_out: list[str] = []
        scores, strips = (
            validate(this, training.scored, val_loader, weights, title, left_out)
            if validated
            else (dict.fromkeys(val_columns(names), math.nan), [])
        )
        training.totals["left_out"] += len(left_out)
        totals = training.end_epoch()
        confusion.counts = totals.get("confusion", confusion.counts)
        row = {"stage": stage, "epoch": epoch, "lr": training.lr}
        row |= {"train_loss": (totals["loss"] / totals["images"]).item()}
        row |= figures | {name: totals[name].item() for name in ("skipped_steps", "left_out")}
        row |= {"train_miou": mean_score(confusion.class_iou()) if args.iouTrain else math.nan}
        row |= scores
        improved = validated and (best["epoch"] == 0 or row["val_miou"] > best["miou"])
        if improved:
            class_iou = [row[f"iou {name}"] for name in names]
            best = {"epoch": epoch, "miou": row["val_miou"], "class_iou": class_iou}
        row["seconds"] = time.perf_counter() - started

        report = f"{title}: train loss {row['train_loss']:.4f}"
        if validated:
            report += (
                f", val loss {row['val_loss']:.4f}, val mIoU {100 * row['val_miou']:.2f} % "
                f"(best {100 * best['miou']:.2f})"
            )
        report += f", {row['images_per_second']:.1f} images/s, {row['seconds']:.0f} s"
        # TensorBoard shows ten pictures of a kind: there is no point in keeping hundreds.
        shown = validated and (epoch == epochs or epoch // args.val_every % pictures_every == 0)
        kept = [BEST] if improved and stage == 2 else []
        if args.epochs_save and epoch % args.epochs_save == 0:
            kept.append(f"stage{stage}-epoch{epoch:03d}.pth")

        def write(row=row, step=step, strips=strips if shown else [], kept=kept) -> None:
            for name in kept:
                save_network(checkpoint(), folder / name)
            append_row(folder / LOG, row)
            write_events(this.writer, row, step, strips)

        distributed.first(write)
        # Last of all: what is written above by a run that is killed here is written again.
        this.watch.save()
        print(report + notes(row), flush=True)
    return best


def validate(
    this: Run,
    model: torch.nn.Module,
    loader: DataLoader,
    weights: Tensor,
    title: str,
    left_out: list[str],
) -> tuple[dict[str, float], list[Tensor]]:
    """Score the network on val; returns the columns of the log and the first few pictures.

    Why images are left out, with --skip-broken, is added to `left_out`.
    """
    strips: list[Tensor] = []
    names = this.classes.names

    def keep_strip(image: Tensor, prediction: Tensor, label: Tensor) -> None:
        if len(strips) < 3:
            strips.append(strip(image, prediction, label, this.classes.colors))

    distributed.share_buffers(model)
    loss, confusion = evaluate(
        model,
        loader,
        this.floats,
        len(names),
        f"{title}, validation",
        class_weights=weights,
        amp_dtype=this.amp_dtype,
        on_image=keep_strip,
        watch=this.watch,
        left_out=left_out if this.args.skip_broken else None,
    )
    class_iou = confusion.class_iou().tolist()
    scores = [loss, mean_score(class_iou), confusion.pixel_accuracy(), *class_iou]
    return dict(zip(val_columns(names), scores, strict=True)), strips


def val_columns(names: Sequence[str]) -> list[str]:
    """The columns of the log that validation fills."""
    return ["val_loss", "val_miou", "val_pixel_accuracy", *(f"iou {name}" for name in names)]


if __name__ == "__main__":
    run(main)
