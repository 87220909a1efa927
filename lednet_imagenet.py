"""Pretrain LEDNet's encoder as a classifier of images, on ImageNet or any folder of classes.

python lednet_imagenet.py                             on drawn shapes, made once
python lednet_imagenet.py --datadir DIR               on DIR/train/<class>/ and DIR/val/<class>/
python lednet_imagenet.py --datadir DIR --recipe modern --savedir NAME
python lednet_imagenet.py --savedir NAME --resume     go on with an interrupted run
python lednet_imagenet.py --savedir NAME --evaluate   one pass over val with its best network
python main.py --datadir CITYSCAPES --pretrained-encoder save/NAME/encoder.pth
"""

import argparse
import math
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from datasets.check import check_images
from datasets.drawn import draw_once
from datasets.files import DatasetError
from datasets.imagenet import MEAN, STD, ImageFolder, training_images, validation_images
from datasets.seeded import Seeded, loader_options, training_loader
from datasets.shapes import make_shapes
from datasets.transforms import to_floats
from models.lednet import Encoder, ImageClassifier
from utils.checkpoint import (
    CheckpointError,
    fill,
    load_classifier,
    load_run,
    on_cpu,
    restore_rng,
    rng_state,
    save_checkpoint,
)
from utils.cli import (
    ArgumentParser,
    UsageError,
    file_path,
    pick_amp_dtype,
    pick_device,
    positive_float,
    positive_int,
    run,
)
from utils.engine import evaluate_classifier, train_one_epoch
from utils.metrics import TopKAccuracy
from utils.recipe import ema_of, one_cycle, resume_optimizer
from utils.run import (
    BEST,
    ENCODER,
    LAST,
    LOG,
    add_run_options,
    append_row,
    check_free,
    drop_rows_after,
    parse_run_args,
    read_args,
    run_folder,
    start_run,
    write_scalars,
)
from utils.speed import count_parameters
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
    recipe.add_argument("--batch-size", type=positive_int, help=quick("batch_size"))
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
            raise UsageError("--evaluate and --resume exclude each other: give one of them")
        if args.evaluate is True and not args.savedir:
            raise UsageError("--evaluate needs a checkpoint, or --savedir, the folder of a run")
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
        raise UsageError(f"--size {size} is too small: the classifier needs 16x16")


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    amp_dtype = pick_amp_dtype(args.amp, device)
    torch.backends.cudnn.benchmark = True
    if args.evaluate:
        evaluate_checkpoint(args, device, amp_dtype)
        return
    folder = Path(args.savedir)
    resumed: dict[str, Any] | None = None
    if not args.resume:
        check_free(folder)
    elif (folder / LAST).exists():
        resumed = load_run(folder / LAST)

    if args.dataset == "shapes":
        draw_once(args.datadir, make_shapes, "shapes and textures")
    modern = args.recipe == "modern"
    train = training_images(args.datadir, args.size, augment=modern)
    val = validation_images(args.datadir, args.size, train.classes)
    if len(train.classes) < 2:
        raise UsageError(f"{args.datadir} has one class alone: there is nothing to tell apart")
    same_data = args.resume and read_args(folder)["datadir"] == args.datadir
    if resumed:
        check_same_run(args, resumed, train)
    elif args.resume and not same_data:
        raise UsageError(
            f"no epoch of the run in {folder} was finished: start another run for other data"
        )
    if not same_data:
        check_images([path for path, _ in train.samples + val.samples])

    torch.manual_seed(args.seed)
    model = ImageClassifier(Encoder(), len(train.classes))
    model.to(device, memory_format=torch.channels_last)
    shuffling = torch.Generator().manual_seed(args.seed)
    loading = loader_options(args.batch_size, args.workers, device)
    train_loader = training_loader(Seeded(train), shuffling, **loading)
    val_loader = DataLoader(val, **loading)

    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1 if modern else 0.0)
    optimizer = build_optimizer(args.recipe, model, args.lr)
    scheduler = build_schedule(args.recipe, optimizer, args.epochs, len(train_loader))
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    ema = ema_of(model, args.epochs * len(train_loader)) if modern else None
    network = ema.module if ema else model  # what is scored and kept
    epoch_done, best = 0, {"epoch": 0, "val_top1": math.nan, "val_top5": math.nan}
    if resumed:
        epoch_done, best = resumed["epoch"], resumed["best"]
        fill(network, resumed["model"], folder / LAST)
        if ema:
            fill(model, resumed["training_model"], folder / LAST)
            ema.n_averaged.fill_(resumed["ema_updates"])
        resume_optimizer(optimizer, resumed["optimizer"])
        scheduler.load_state_dict(resumed["scheduler"])
        if resumed["scaler"]:  # empty where the precision needed none
            scaler.load_state_dict(resumed["scaler"])
        restore_rng(resumed["rng"], shuffling, device)

    print(
        f"LEDNet's encoder: {count_parameters(model.encoder):,} parameters, under a linear layer, "
        f"on {device} in {amp_dtype or 'full precision'}\n"
        f"data: {args.datadir}: {len(train)} images of {len(train.classes)} classes to train on, "
        f"{len(val)} to validate\n"
        f"images: {args.size}x{args.size}, in batches of {args.batch_size}, by {args.workers} "
        f"workers; {args.epochs} epochs of the {args.recipe} recipe\n"
        f"output: {folder}",
        flush=True,
    )
    if args.resume:
        done = f"after epoch {epoch_done}" if resumed else "from the start: no epoch was finished"
        print(f"resuming {done}")

    # Nothing was written so far: a mistake found above leaves no folder behind.
    if not args.resume:
        start_run(folder, vars(args))
    drop_rows_after(folder / LOG, epoch=epoch_done)
    writer = SummaryWriter(folder, purge_step=epoch_done + 1)
    floats = to_floats(MEAN, STD, device)

    def prepare(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return floats(images), labels.to(device, non_blocking=True)

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
    for epoch in range(epoch_done + 1, args.epochs + 1):
        title = f"epoch {epoch}/{args.epochs}"
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["weight_decay"] = weight_decay(args.recipe, epoch)
        accuracy = TopKAccuracy(device=device)
        row = {"epoch": epoch, "lr": scheduler.get_last_lr()[0]}
        row |= train_one_epoch(
            model,
            train_loader,
            prepare=prepare,
            # Sums of half precision are coarse.
            loss_function=lambda logits, labels: loss_function(logits.float(), labels),
            optimizer=optimizer,
            scaler=scaler,
            amp_dtype=amp_dtype,
            title=title,
            steps_loss=args.steps_loss,
            scheduler=scheduler,
            on_step=(lambda: ema.update_parameters(model)) if ema else None,
            on_batch=accuracy.update,
            figures=accuracy.figures,
        )
        if not math.isfinite(row["train_loss"]):
            raise UsageError(
                f"the training loss is {row['train_loss']} in epoch {epoch}: training has "
                "diverged, start another run with a smaller --lr"
            )
        row["train_top1"], row["train_top5"] = accuracy.shares()
        pictures = Pictures(val.classes, len(val))
        row |= evaluate_classifier(
            network, val_loader, floats, f"{title}, validation", amp_dtype, pictures.keep
        )
        improved = best["epoch"] == 0 or row["val_top1"] > best["val_top1"]
        if improved:
            best = {"epoch": epoch} | {name: row[name] for name in ("val_top1", "val_top5")}
        row["seconds"] = time.perf_counter() - started

        append_row(folder / LOG, row)
        write_scalars(writer, row, epoch)
        # TensorBoard shows ten pictures of a kind: there is no point in keeping hundreds.
        if epoch == args.epochs or epoch % max(1, args.epochs // 10) == 0:
            for number, picture in enumerate(pictures.kept):
                writer.add_image(f"val/{number}", picture, epoch)
        writer.flush()
        print(
            f"{title}: train loss {row['train_loss']:.4f}, top-1 {100 * row['train_top1']:.2f} %, "
            f"top-5 {100 * row['train_top5']:.2f} %; val loss {row['val_loss']:.4f}, "
            f"top-1 {100 * row['val_top1']:.2f} % (best {100 * best['val_top1']:.2f}), "
            f"top-5 {100 * row['val_top5']:.2f} %; {row['images_per_second']:.1f} images/s, "
            f"{100 * row['data_wait']:.0f} % of the time waiting for data, {row['seconds']:.0f} s",
            flush=True,
        )

        checkpoint = description | {"model": on_cpu(network), "epoch": epoch, "best": best}
        if improved:
            save_checkpoint(checkpoint, folder / BEST)
            encoder = {f"encoder.{name}": w for name, w in on_cpu(network.encoder).items()}
            save_checkpoint(checkpoint | {"model": encoder}, folder / ENCODER)
        state = {
            "training_model": on_cpu(model) if ema else {},
            "ema_updates": ema.n_averaged.item() if ema else 0,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": scaler.state_dict(),
            "rng": rng_state(shuffling, device),
        }
        save_checkpoint(checkpoint | state, folder / LAST)
    writer.close()

    cityscapes = "" if args.dataset == "shapes" else "--datadir CITYSCAPES "
    print(
        f"\nbest on val after epoch {best['epoch']}: top-1 {100 * best['val_top1']:.2f} %, "
        f"top-5 {100 * best['val_top5']:.2f} %\n\n"
        "next:\n"
        f"  python main.py {cityscapes}--pretrained-encoder {shlex.quote(str(folder / ENCODER))}\n"
        f"  tensorboard --logdir {shlex.quote(str(folder))} --host localhost"
    )


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
        raise UsageError(f"{args.savedir}/{LAST} is of another run: put back the file it had")
    names = resumed.get("class_names", [])
    if len(names) != len(train.classes):
        raise UsageError(
            f"{args.datadir} has {len(train.classes)} classes, not the {len(names)} that the run "
            f"in {args.savedir} began with: give the --datadir that it had"
        )
    if names != train.classes:
        raise UsageError(
            f"{args.datadir} has other names of classes than the run in {args.savedir} began with: "
            "give the --datadir that it had"
        )
    if resumed.get("train_images") != len(train):
        raise UsageError(
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
        raise UsageError(f"{args.evaluate} does not say what it was trained on: give --datadir")
    check_size(size)
    val = validation_images(datadir, size, checkpoint["class_names"])
    loading = loader_options(args.batch_size or 64, args.workers, device)
    floats = to_floats(checkpoint["mean"], checkpoint["std"], device)
    scores = evaluate_classifier(
        model.to(device), DataLoader(val, **loading), floats, "val", amp_dtype
    )
    print(
        f"{args.evaluate} on the {len(val)} images of {datadir}/val at {size}x{size}: "
        f"loss {scores['val_loss']:.4f}, top-1 {100 * scores['val_top1']:.2f} %, "
        f"top-5 {100 * scores['val_top5']:.2f} %"
    )


if __name__ == "__main__":
    run(main, DatasetError, CheckpointError)
