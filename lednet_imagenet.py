"""Pretrain LEDNet's encoder as a classifier of images, on ImageNet or any folder of classes.

python lednet_imagenet.py                             on drawn shapes, made once
python lednet_imagenet.py --datadir DIR               on DIR/train/<class>/ and DIR/val/<class>/
python lednet_imagenet.py --datadir DIR --recipe modern --savedir NAME
python lednet_imagenet.py --savedir NAME --resume     go on with an interrupted run
torchrun --nproc-per-node 4 lednet_imagenet.py --datadir DIR
python lednet_imagenet.py --savedir NAME --evaluate   one pass over val with its best network
python main.py --datadir CITYSCAPES --pretrained-encoder save/NAME/encoder.pth
"""

import argparse
import math
import shlex
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from datasets.check import check_images, told_left_out, without_broken
from datasets.drawn import draw_once
from datasets.drawn.shapes import make_shapes
from datasets.imagenet import MEAN, STD, ImageFolder, training_images, validation_images
from datasets.images import DatasetError
from datasets.loading import Seeded, ShuffledSeeds, loader_options, training_loader
from datasets.readable import validation_loader
from datasets.transforms import to_floats
from models.lednet import Encoder, ImageClassifier
from utils import distributed
from utils.checkpoint import load_classifier, on_cpu
from utils.errors import UserError
from utils.evaluation import evaluate_classifier, train_one_epoch
from utils.events import close_events
from utils.interrupts import Watch
from utils.metrics import TopKAccuracy
from utils.optim import ema_of, one_cycle
from utils.options import ArgumentParser, file_path, positive_float, positive_int
from utils.run_folder import (
    BEST,
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
    resume_command,
    run_folder,
    save_network,
    save_run,
    start_run,
    told,
    write_events,
)
from utils.script import pick_amp_dtype, pick_device, run
from utils.speed import count_parameters
from utils.training import Training, seed_process
from utils.visualize import captioned

EMBEDDED = Path("data/shapes")

# What an option is when the command line does not say, as published and on the embedded shapes.
PUBLISHED = {"size": 224, "epochs": 150, "batch_size": 256, "lr": 0.1}
QUICK = {"size": 64, "epochs": 18, "batch_size": 16, "lr": 0.005}

# The published recipe is SGD, whose learning rate and weight decay hold up to this epoch; then the
# rate falls by 5 % with each epoch and the decay is off.
CONSTANT_EPOCHS = 15
SGD_DECAY = 1e-4
# The modern one is AdamW in one cycle.
ADAMW_LR, ADAMW_DECAY = 1e-3, 0.05

PICTURES = 8  # of val that TensorBoard shows


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)

    def quick(name: str) -> str:
        return f"default {PUBLISHED[name]}, without --datadir {QUICK[name]}"

    data = parser.add_argument_group("data")
    data.add_argument(
        "--datadir",
        type=file_path,
        help="folder with train/<class>/ and val/<class>/; without it, shapes and textures are "
        f"drawn into {EMBEDDED}",
    )
    data.add_argument(
        "--size", type=positive_int, help=f"images are cropped to this square; {quick('size')}"
    )

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--recipe",
        choices=("paper", "modern"),
        default="paper",
        help="paper: SGD, as published; modern: AdamW, cosine with warm-up, label smoothing, "
        "RandAugment and an average of the weights; default paper",
    )
    recipe.add_argument("--epochs", type=positive_int, help=quick("epochs"))
    recipe.add_argument(
        "--batch-size", type=positive_int, help=f"of each process; {quick('batch_size')}"
    )
    recipe.add_argument(
        "--lr",
        type=positive_float,
        help=f"learning rate; paper: {quick('lr')}; modern: default {ADAMW_LR}",
    )

    output = add_run_options(parser)
    output.add_argument(
        "--evaluate",
        nargs="?",
        const=True,
        type=file_path,
        metavar="FILE",
        help=f"one pass over val with this checkpoint, by default {BEST} of --savedir, and no "
        "training",
    )
    return parse_run_args(parser, settle, free=("evaluate",))


def settle(args: argparse.Namespace) -> None:
    """Fill in what the command line leaves open, and refuse what cannot be."""
    if args.evaluate:
        if args.resume:
            raise UserError("--evaluate and --resume exclude each other: give one of them")
        if args.evaluate is True and not args.savedir:
            raise UserError("--evaluate needs a checkpoint, or --savedir, the folder of a run")
        if args.evaluate is True:
            args.evaluate = str(run_folder(args.savedir, "") / BEST)
        return  # the checkpoint says the rest
    if args.recipe == "modern" and args.lr is None:
        args.lr = ADAMW_LR
    for name, value in (QUICK if args.datadir is None else PUBLISHED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    embedded = args.datadir is None or Path(args.datadir).resolve() == EMBEDDED.resolve()
    args.dataset = "shapes" if embedded else "imagenet"
    args.datadir = args.datadir or str(EMBEDDED)
    args.savedir = str(run_folder(args.savedir, args.dataset))
    check_size(args.size)


def check_size(size: int) -> None:
    if size < 16:
        raise UserError(f"--size {size} is too small: the classifier needs 16x16")


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    if args.sync_bn and device.type == "cpu":
        raise UserError("--sync-bn needs GPUs: leave it out")
    amp_dtype = pick_amp_dtype(args.amp, device)
    torch.backends.cudnn.benchmark = True
    distributed.start(device)
    if args.evaluate:
        evaluate_checkpoint(args, device, amp_dtype)
        return
    folder = Path(distributed.first(lambda: args.savedir))  # which may say the time
    with claimed(folder) if distributed.is_first() else nullcontext():
        pretrain(args, folder, device, amp_dtype)


def pretrain(
    args: argparse.Namespace, folder: Path, device: torch.device, amp_dtype: torch.dtype | None
) -> None:
    """The run, from what lies on the disk to the trained encoder."""
    resumed = distributed.first(lambda: load_run(folder) if args.resume else check_free(folder))
    same_data = args.resume and read_args(folder)["datadir"] == args.datadir
    # The first process looks at the files, and all go on with what it found.
    train, val = distributed.first(lambda: find_data(args, check=not same_data))
    if len(train.classes) < 2:
        raise UserError(f"{args.datadir} has one class alone: there is nothing to tell apart")
    if resumed:
        check_same_run(args, resumed, train)
    elif args.resume and not same_data:
        raise UserError(
            f"nothing was saved of the run in {folder}: start another run for other data"
        )

    modern = args.recipe == "modern"
    torch.manual_seed(args.seed)
    model = ImageClassifier(Encoder(), len(train.classes))
    if args.sync_bn:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last)
    sampler = ShuffledSeeds(len(train), args.seed, distributed.rank(), distributed.processes())
    loading = loader_options(args.batch_size, args.workers, device)
    train_loader = training_loader(Seeded(train, args.skip_broken), sampler, **loading)
    val_loader = validation_loader(distributed.share(val), args.skip_broken, **loading)
    if not train_loader:
        raise UserError(f"{args.datadir} has fewer training images than there are processes")

    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1 if modern else 0.0)
    steps = len(train_loader)
    optimizer = build_optimizer(args.recipe, model, args.lr)
    training = Training(
        model,
        model,
        optimizer,
        scheduler=build_schedule(args.recipe, optimizer, args.epochs, steps),
        scaler=torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16),
        batch_size=args.batch_size,
        steps=steps,
        ema=ema_of(model, args.epochs * steps) if modern else None,
        amp_dtype=amp_dtype,
    )
    best = {"epoch": 0, "val_top1": math.nan, "val_top5": math.nan}

    count = distributed.processes()
    each = f" in each of {count} processes" if count > 1 else ""
    print(
        f"LEDNet's encoder: {count_parameters(model.encoder):,} parameters, under a linear layer, "
        f"on {device} in {amp_dtype or 'full precision'}\n"
        f"data: {args.datadir}: {len(train)} images of {len(train.classes)} classes to train on, "
        f"{len(val)} to validate\n"
        f"images: {args.size}x{args.size}, in batches of {args.batch_size}{each}, by "
        f"{args.workers} workers; {args.epochs} epochs of the {args.recipe} recipe\n"
        f"output: {folder}",
        flush=True,
    )
    watch = Watch(
        folder / LAST,
        args.checkpoint_minutes,
        resume_command(folder),
        files=lambda index: train.samples[index][:1],
        mistakes=(DatasetError,),
    )

    description = {
        "dataset": args.dataset,
        "stage": 0,
        "num_classes": len(train.classes),
        "class_names": train.classes,
        "train_images": len(train),
        "mean": list(MEAN),
        "std": list(STD),
        "height": args.size,
        "args": vars(args),
    }

    def checkpoint() -> dict[str, Any]:
        weights = on_cpu(training.scored)
        return description | {"model": weights, "epoch": training.epoch, "best": best}

    def save() -> None:
        state = checkpoint() | training.state()
        distributed.first(lambda: save_run(state, folder))

    seed_process(args.seed)
    differences = training.restore(resumed, folder / LAST) if resumed else []
    watch.begin(training, save)
    if resumed:
        best = resumed["best"]
        print(f"resuming after {watch.place}")
    elif args.resume:
        print("resuming from the start: nothing had been saved")
    for difference in differences:
        print(f"note: {difference}")

    # Nothing was written so far: a mistake found above leaves no folder behind.
    writer = None

    def begin() -> None:
        nonlocal writer
        keep_options(folder, vars(args)) if args.resume else start_run(folder, vars(args))
        writer = go_on_after(folder, training.epoch, epoch=training.epoch)

    distributed.first(begin)
    floats = to_floats(MEAN, STD, device)

    def prepare(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return floats(images), labels.to(device, non_blocking=True)

    trained = distributed.parallel(model, device)
    with watch:
        while training.epoch < args.epochs:
            epoch = training.epoch + 1
            title = f"epoch {epoch}/{args.epochs}"
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["weight_decay"] = weight_decay(args.recipe, epoch)
            sampler.begin(epoch, training.step * args.batch_size)
            accuracy = TopKAccuracy(device=device)
            training.begin_epoch(accuracy=accuracy.counts)
            accuracy.counts = training.totals["accuracy"]
            figures = train_one_epoch(
                training,
                trained,
                train_loader,
                prepare=prepare,
                # Sums of half precision are coarse.
                loss_function=lambda logits, labels: loss_function(logits.float(), labels),
                watch=watch,
                title=title,
                steps_loss=args.steps_loss,
                count=accuracy.update,
                figures=accuracy.figures,
                size_option="--size",
            )
            pictures = Pictures(val.classes, len(val_loader.dataset))
            distributed.share_buffers(training.scored)
            left_out: list[str] = []
            scores = evaluate_classifier(
                training.scored,
                val_loader,
                floats,
                f"{title}, validation",
                amp_dtype,
                pictures.keep,
                watch,
                left_out if args.skip_broken else None,
            )
            training.totals["left_out"] += len(left_out)
            totals = training.end_epoch()
            accuracy.counts = totals["accuracy"]
            row = {"epoch": epoch, "lr": training.lr}
            row |= {"train_loss": (totals["loss"] / totals["images"]).item()}
            row |= figures | {name: totals[name].item() for name in ("skipped_steps", "left_out")}
            row["train_top1"], row["train_top5"] = accuracy.shares()
            row |= scores
            improved = best["epoch"] == 0 or row["val_top1"] > best["val_top1"]
            if improved:
                best = {"epoch": epoch} | {name: row[name] for name in ("val_top1", "val_top5")}
            row["seconds"] = time.perf_counter() - started
            # TensorBoard shows ten pictures of a kind: there is no point in keeping hundreds.
            shown = epoch == args.epochs or epoch % max(1, args.epochs // 10) == 0

            def write(row=row, improved=improved, shown=pictures.kept if shown else []) -> None:
                if improved:
                    network = training.scored
                    encoder = {f"encoder.{name}": w for name, w in on_cpu(network.encoder).items()}
                    save_network(checkpoint(), folder / BEST)
                    save_network(checkpoint() | {"model": encoder}, folder / ENCODER)
                append_row(folder / LOG, row)
                write_events(writer, row, row["epoch"], shown)

            distributed.first(write)
            # Last of all: what is written above by a run that is killed here is written again.
            watch.save()
            print(
                f"{title}: train loss {row['train_loss']:.4f}, top-1 "
                f"{100 * row['train_top1']:.2f} %, top-5 {100 * row['train_top5']:.2f} %; val loss "
                f"{row['val_loss']:.4f}, top-1 {100 * row['val_top1']:.2f} % (best "
                f"{100 * best['val_top1']:.2f}), top-5 {100 * row['val_top5']:.2f} %; "
                f"{row['images_per_second']:.1f} images/s, {100 * row['data_wait']:.0f} % of the "
                f"time waiting for data, {row['seconds']:.0f} s{notes(row)}",
                flush=True,
            )
    if writer:
        with told(folder):
            close_events(writer)

    cityscapes = "" if args.dataset == "shapes" else "--datadir CITYSCAPES "
    print(
        f"\nbest on val after epoch {best['epoch']}: top-1 {100 * best['val_top1']:.2f} %, "
        f"top-5 {100 * best['val_top5']:.2f} %\n\n"
        "next:\n"
        f"  python main.py {cityscapes}--pretrained-encoder {shlex.quote(str(folder / ENCODER))}\n"
        f"  tensorboard --logdir {shlex.quote(str(folder))} --host localhost"
    )


def find_data(args: argparse.Namespace, check: bool) -> tuple[ImageFolder, ImageFolder]:
    """The images of train and of val.

    Args:
        check: look at the header and the end of every file.
    """
    if args.dataset == "shapes":
        draw_once(args.datadir, make_shapes, "shapes and textures")
    train = training_images(args.datadir, args.size, augment=args.recipe == "modern")
    val = validation_images(args.datadir, args.size, train.classes)
    if args.skip_broken:
        for dataset in (train, val):
            told_left_out(without_broken(dataset, args.workers, replace=dataset is train))
    elif check:
        check_images([path for path, _ in train.samples + val.samples])
    return train, val


def build_optimizer(recipe: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    # In one kernel on a GPU; on a CPU that would gain next to nothing, and round otherwise.
    options = {"lr": lr, "fused": next(model.parameters()).is_cuda or None}
    if recipe == "paper":
        return torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=SGD_DECAY, **options)
    return torch.optim.AdamW(model.parameters(), weight_decay=ADAMW_DECAY, **options)


def build_schedule(
    recipe: str, optimizer: torch.optim.Optimizer, epochs: int, steps: int
) -> LRScheduler:
    """The learning rate of a recipe; steps with each batch, `steps` of which are an epoch."""
    if recipe == "paper":
        return LambdaLR(optimizer, lambda step: 0.95 ** max(0, step // steps + 1 - CONSTANT_EPOCHS))
    return one_cycle(optimizer, epochs * steps)


def weight_decay(recipe: str, epoch: int) -> float:
    """The weight decay of an epoch, counted from 1."""
    if recipe == "paper":
        return SGD_DECAY if epoch <= CONSTANT_EPOCHS else 0.0
    return ADAMW_DECAY


def check_same_run(args: argparse.Namespace, resumed: dict[str, Any], train: ImageFolder) -> None:
    """See that a checkpoint is of the run that is to be resumed, and of the same classes."""
    if resumed["stage"] != 0 or resumed.get("args", {}).get("recipe") != args.recipe:
        raise UserError(f"{args.savedir}/{LAST} is of another run: put back the file it had")
    names = resumed.get("class_names", [])
    if len(names) != len(train.classes):
        raise UserError(
            f"{args.datadir} has {len(train.classes)} classes, not the {len(names)} that the run "
            f"in {args.savedir} began with: give the --datadir that it had"
        )
    if names != train.classes:
        raise UserError(
            f"{args.datadir} has other names of classes than the run in {args.savedir} began with: "
            "give the --datadir that it had"
        )
    if resumed.get("train_images") != len(train):
        raise UserError(
            f"{args.datadir} holds another number of training images than the run in "
            f"{args.savedir} began with: give the --datadir that it had, or start another run"
        )


class Pictures:
    """A few images of val, evenly spread, with what the network takes them for."""

    def __init__(self, classes: list[str], count: int) -> None:
        self.classes, self.seen = classes, 0
        self.wanted = {count * n // PICTURES for n in range(PICTURES)}
        self.kept: list[Tensor] = []

    def keep(self, images: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take from a batch those that are wanted."""
        for place in range(len(images)):
            if self.seen + place in self.wanted:
                found, truth = logits[place].argmax().item(), labels[place].item()
                caption = self.classes[found]
                if found != truth:
                    caption += f", not {self.classes[truth]}"
                self.kept.append(captioned(images[place], caption, found == truth))
        self.seen += len(images)


def evaluate_checkpoint(
    args: argparse.Namespace, device: torch.device, amp_dtype: torch.dtype | None
) -> None:
    """Print the scores of a trained classifier on val; what is not given, the checkpoint says."""
    model, checkpoint = load_classifier(args.evaluate)
    begun_with = checkpoint.get("args")
    datadir = args.datadir or (begun_with.get("datadir") if isinstance(begun_with, dict) else None)
    size = args.size or checkpoint["height"]
    if not isinstance(datadir, str):
        raise UserError(f"{args.evaluate} does not say what it was trained on: give --datadir")
    check_size(size)
    val = validation_images(datadir, size, checkpoint["class_names"])
    loading = loader_options(args.batch_size or 64, args.workers, device)
    floats = to_floats(checkpoint["mean"], checkpoint["std"], device)
    shared = DataLoader(distributed.share(val), **loading)
    scores = evaluate_classifier(model.to(device), shared, floats, "val", amp_dtype)
    print(
        f"{args.evaluate} on the {len(val)} images of {datadir}/val at {size}x{size}: "
        f"loss {scores['val_loss']:.4f}, top-1 {100 * scores['val_top1']:.2f} %, "
        f"top-5 {100 * scores['val_top5']:.2f} %"
    )


if __name__ == "__main__":
    run(main)
