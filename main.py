"""Train LEDNet on Cityscapes: stage 1 the encoder, stage 2 the whole network.

python main.py                                        on drawn street scenes, made once
python main.py --datadir DIR                          on Cityscapes, as published
python main.py --datadir DIR --pretrained-encoder save/imagenet/encoder.pth
python main.py --datadir DIR --annotations coarse --savedir coarse
python main.py --datadir DIR --init save/coarse/best.pth --savedir fine
python main.py --savedir NAME --resume                go on with an interrupted run
"""

import argparse
import json
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import ConcatDataset, DataLoader
from torch.utils.tensorboard import SummaryWriter

from datasets.cityscapes import (
    ANNOTATIONS,
    CATEGORIES,
    CLASS_NAMES,
    COLORS,
    Cityscapes,
    check_files,
    training_parts,
)
from datasets.drawn import draw_once
from datasets.files import DatasetError, image_size
from datasets.seeded import loader_options, training_loader
from datasets.statistics import count_pixels
from datasets.synthetic import make_synthetic
from datasets.transforms import eval_transforms, resized_size, train_transforms
from models.lednet import EncoderClassifier, LEDNet
from utils.checkpoint import (
    CheckpointError,
    apn_channels_of,
    fill,
    init_network,
    load_checkpoint,
    load_encoder,
    load_run,
    normalisation,
    on_cpu,
    restore_rng,
    rng_state,
    save_checkpoint,
)
from utils.cli import (
    ArgumentParser,
    Obsolete,
    UsageError,
    file_path,
    finite_float,
    natural_int,
    pick_amp_dtype,
    pick_device,
    positive_float,
    positive_int,
    run,
)
from utils.engine import evaluate, train_one_epoch
from utils.losses import LOSSES, build_loss, class_weights
from utils.metrics import ConfusionMatrix, mean_score
from utils.run import (
    BEST,
    COUNTS,
    ENCODER,
    LAST,
    LOG,
    add_run_options,
    append_row,
    check_free,
    drop_rows_after,
    parse_run_args,
    read_args,
    read_json,
    run_folder,
    start_run,
    write_scalars,
)
from utils.speed import count_parameters
from utils.visualize import score_table, strip

EMBEDDED = Path("data/synthetic")

# What an option is when the command line does not say, as published and on the embedded scenes.
PUBLISHED = {
    "height": 512,
    "encoder_epochs": 300,
    "epochs": 300,
    "batch_size": 5,
    "lr": 5e-4,
    "val_every": 1,
}
QUICK = {
    "height": 160,
    "encoder_epochs": 3,
    "epochs": 13,
    "batch_size": 4,
    "lr": 2e-3,
    "val_every": 5,
}

# Mean and std of images that are trained on as they are, in [0, 1].
NOT_NORMALISED = ([0.0] * 3, [1.0] * 3)

# Of the class weights 1 / ln(c + p), by stage.
WEIGHT_C = {1: 1.20, 2: 1.10}
# Labels of stage 1 have the encoder's resolution.
LABEL_STRIDE = {1: 8, 2: 1}

# The columns of the log that validation fills.
NOT_VALIDATED = dict.fromkeys(
    ("val_loss", "val_miou", "val_pixel_accuracy", *(f"iou {name}" for name in CLASS_NAMES)),
    math.nan,
)


class BothStages(argparse.Action):
    """The original code's --num-epochs: as many epochs in each stage."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.encoder_epochs = namespace.epochs = values


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)

    def quick(name: str) -> str:
        return f"default {PUBLISHED[name]}, without --datadir {QUICK[name]}"

    data = parser.add_argument_group("data")
    data.add_argument(
        "--datadir",
        type=file_path,
        help="folder with leftImg8bit and gtFine or gtCoarse; "
        f"without it, street scenes are drawn into {EMBEDDED}",
    )
    data.add_argument("--annotations", choices=ANNOTATIONS, default="fine", help="default fine")
    data.add_argument(
        "--height", type=positive_int, help=f"images are resized to this; {quick('height')}"
    )
    data.add_argument(
        "--augment",
        choices=("paper", "strong"),
        default="paper",
        help="paper: flip and shift; strong: scale, crop, flip, colour; default paper",
    )

    start = parser.add_argument_group("network and where it starts")
    start.add_argument(
        "--apn-channels", "--D", type=positive_int, help="width of the decoder; default 20"
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
        "--encoder-epochs", type=natural_int, help=f"of stage 1; {quick('encoder_epochs')}"
    )
    recipe.add_argument("--epochs", type=positive_int, help=f"of stage 2; {quick('epochs')}")
    recipe.add_argument(
        "--num-epochs", type=positive_int, action=BothStages, help="of each stage, in one option"
    )
    recipe.add_argument("--batch-size", type=positive_int, help=quick("batch_size"))
    recipe.add_argument("--lr", type=positive_float, help=f"learning rate; {quick('lr')}")
    recipe.add_argument(
        "--loss",
        choices=LOSSES,
        default="ce",
        help="weighted cross entropy, over all pixels or the hard ones; default ce",
    )
    output = add_run_options(parser)
    output.add_argument(
        "--val-every", type=positive_int, help=f"epochs between validations; {quick('val_every')}"
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

    return parse_run_args(parser, settle, free=("val_every", "epochs_save"))


def settle(args: argparse.Namespace) -> None:
    """Fill in what the command line leaves open, and refuse what cannot be."""
    embedded = args.datadir is None or Path(args.datadir).resolve() == EMBEDDED.resolve()
    args.dataset = "synthetic" if embedded else "cityscapes"
    for name, value in (QUICK if args.datadir is None else PUBLISHED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.datadir = args.datadir or str(EMBEDDED)
    args.savedir = str(run_folder(args.savedir, args.dataset))
    if args.height < 64:
        raise UsageError(f"--height {args.height} is too small: LEDNet needs 64x64")
    if args.batch_size == 1:
        raise UsageError(
            "--batch-size 1 cannot train: batch norm on the pooled 1x1 plane needs 2 images"
        )
    if (args.mean is None) != (args.std is None):
        raise UsageError("--mean and --std belong together: give both or none")
    if args.init and args.pretrained_encoder:
        raise UsageError("--init and --pretrained-encoder exclude each other: give one of them")
    if args.init or args.pretrained_encoder or args.decoder:
        args.encoder_epochs = 0


@dataclass
class Run:
    """What both stages of a run share."""

    args: argparse.Namespace
    folder: Path
    device: torch.device
    amp_dtype: torch.dtype | None
    parts: list[Cityscapes]
    val: Cityscapes
    size: tuple[int, int]  # height and width that the network is trained on
    mean: Sequence[float]
    std: Sequence[float]
    counts: Tensor  # training pixels of each class, then of the ignored ones
    shuffling: torch.Generator
    writer: SummaryWriter
    description: dict[str, Any]  # what every checkpoint says of the network
    resumed: dict[str, Any] | None  # the checkpoint to go on from


def main() -> None:
    args = parse_args()
    folder = Path(args.savedir)
    device = pick_device(args.device)
    amp_dtype = pick_amp_dtype(args.amp, device)
    torch.backends.cudnn.benchmark = True
    resumed = None
    if not args.resume:
        check_free(folder)
    elif (folder / LAST).exists():
        resumed = load_run(folder / LAST)
    stage_done, epoch_done = (resumed["stage"], resumed["epoch"]) if resumed else (0, 0)

    torch.manual_seed(args.seed)
    network, mean, std = build_network(args, resumed)

    if args.dataset == "synthetic":
        draw_once(args.datadir, make_synthetic, "street scenes")
    parts = training_parts(args.datadir, args.annotations)
    val = Cityscapes(args.datadir, "val", transforms=eval_transforms(args.height, mean, std))
    check_files(*parts)
    check_files(val)
    size = resized_size(*image_size(parts[0].images[0]), args.height)
    if size[1] < 64:
        raise UsageError(
            f"--height {args.height} makes images of {size[1]}x{size[0]}: LEDNet needs 64x64"
        )
    if sum(map(len, parts)) < 2:
        raise UsageError(f"{args.datadir} has one training image: training needs 2")
    sources = " + ".join(f"{len(part)} {part.mode}/{part.split}" for part in parts)
    print(
        f"LEDNet, D = {args.apn_channels}: {count_parameters(network):,} parameters, on {device} "
        f"in {amp_dtype or 'full precision'}\n"
        f"data: {args.datadir}: {sources} images to train on, {len(val)} to validate\n"
        f"images: {size[1]}x{size[0]}, in batches of {args.batch_size}, by {args.workers} workers; "
        f"{args.encoder_epochs} epochs of stage 1, {args.epochs} of stage 2\n"
        f"output: {folder}",
        flush=True,
    )
    if (mean, std) != NOT_NORMALISED:
        print(f"images are normalised with mean {mean} and std {std}")
    if args.resume:
        print(
            f"resuming after epoch {epoch_done} of stage {stage_done}"
            if resumed
            else "resuming from the start: no epoch had been finished"
        )

    same_data = args.resume and read_args(folder)["datadir"] == args.datadir
    named = read_json(folder / COUNTS) if same_data else None
    if named is None:
        print("class weights: counting the pixels of the labels", flush=True)
        counts = count_pixels(parts, len(CLASS_NAMES), args.workers)
        count_pixels([val], len(CLASS_NAMES), args.workers)  # finds unknown ids before training
        named = dict(zip([*CLASS_NAMES, "ignored"], counts.tolist(), strict=True))

    # Nothing was written so far: a mistake found above leaves no folder behind.
    if not args.resume:
        start_run(folder, vars(args))
    (folder / COUNTS).write_text(json.dumps(named, indent=2))
    drop_rows_after(folder / LOG, stage=stage_done, epoch=epoch_done)
    steps_done = epoch_done + (args.encoder_epochs if stage_done == 2 else 0)
    this = Run(
        args=args,
        folder=folder,
        device=device,
        amp_dtype=amp_dtype,
        parts=parts,
        val=val,
        size=size,
        mean=mean,
        std=std,
        counts=torch.tensor(list(named.values())),
        shuffling=torch.Generator().manual_seed(args.seed),
        writer=SummaryWriter(folder, purge_step=steps_done + 1),
        description={
            "dataset": args.dataset,
            "num_classes": len(CLASS_NAMES),
            "class_names": CLASS_NAMES,
            "colors": [list(color) for color in COLORS],
            "categories": CATEGORIES,
            "apn_channels": args.apn_channels,
            "mean": list(mean),
            "std": list(std),
            "height": args.height,
            "args": vars(args),
        },
        resumed=resumed,
    )
    if args.encoder_epochs and stage_done < 2:
        train_stage(this, 1, EncoderClassifier(network.encoder, len(CLASS_NAMES)))
        encoder = {f"encoder.{name}": w for name, w in on_cpu(network.encoder).items()}
        save_checkpoint(this.description | {"model": encoder, "stage": 1}, folder / ENCODER)
    best = train_stage(this, 2, network)
    this.writer.close()

    print(f"\nclass IoU in % on val after epoch {best['epoch']}, the best:")
    print(score_table(CLASS_NAMES, best["class_iou"]))
    print(
        f"mIoU {100 * best['miou']:.2f}\n\n"
        "next:\n"
        f"  python eval_cityscapes_server.py --checkpoint {shlex.quote(str(folder / BEST))} "
        f"--datadir {shlex.quote(args.datadir)}\n"
        f"  tensorboard --logdir {shlex.quote(str(folder))} --host localhost"
    )


def build_network(
    args: argparse.Namespace, resumed: dict[str, Any] | None
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
    network = LEDNet(len(CLASS_NAMES), args.apn_channels)
    if args.init and not resumed:
        fresh = init_network(network, start, args.init, CLASS_NAMES)
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
        raise UsageError(
            f"{file} was trained on images normalised with mean {stated[0]} and std {stated[1]}: "
            "leave --mean and --std out"
        )
    return stated or ((args.mean, args.std) if args.mean else NOT_NORMALISED)


def train_stage(this: Run, stage: int, model: torch.nn.Module) -> dict[str, Any]:
    """Train one stage to its end, from where it stopped if it was begun before.

    Returns:
        "epoch", "miou" and "class_iou" of the epoch with the best mIoU on val.
    """
    args, folder = this.args, this.folder
    epochs = args.encoder_epochs if stage == 1 else args.epochs
    model.to(this.device)
    for part in this.parts:
        part.transforms = train_transforms(
            args.augment, this.size, LABEL_STRIDE[stage], this.mean, this.std
        )
    train = ConcatDataset(this.parts)
    loading = loader_options(args.batch_size, args.workers, this.device)
    # A last batch of one image cannot train the batch norm on the pooled plane.
    drop_last = len(train) % args.batch_size == 1
    train_loader = training_loader(train, this.shuffling, drop_last=drop_last, **loading)
    val_loader = DataLoader(this.val, **loading)

    weights = class_weights(this.counts, WEIGHT_C[stage]).to(this.device)
    loss_function = build_loss(args.loss, weights)
    optimizer = torch.optim.Adam(
        model.parameters(), args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4
    )
    scheduler = PolynomialLR(optimizer, total_iters=epochs * len(train_loader), power=0.9)
    scaler = torch.amp.GradScaler(this.device.type, enabled=this.amp_dtype == torch.float16)
    epoch_done, best = 0, {"epoch": 0, "miou": math.nan, "class_iou": []}
    if this.resumed and this.resumed["stage"] == stage:
        fill(model, this.resumed["model"], folder / LAST)
        optimizer.load_state_dict(this.resumed["optimizer"])
        if this.resumed["scheduler"]["total_iters"] != scheduler.total_iters:
            raise UsageError(
                f"{args.datadir} holds another number of training images than the run in "
                f"{folder} began with: give the --datadir that it had, or start another run"
            )
        scheduler.load_state_dict(this.resumed["scheduler"])
        if this.resumed["scaler"]:  # empty where the precision needed none
            scaler.load_state_dict(this.resumed["scaler"])
        restore_rng(this.resumed["rng"], this.shuffling, this.device)
        epoch_done, best = this.resumed["epoch"], this.resumed["best"]

    pictures_every = max(1, epochs // args.val_every // 10)  # validations
    for epoch in range(epoch_done + 1, epochs + 1):
        title = f"stage {stage} epoch {epoch}/{epochs}"
        started, lr = time.perf_counter(), scheduler.get_last_lr()[0]
        confusion = ConfusionMatrix(len(CLASS_NAMES), this.device) if args.iouTrain else None
        row = {"stage": stage, "epoch": epoch, "lr": lr}
        row |= train_one_epoch(
            model,
            train_loader,
            loss_function=loss_function,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=scaler,
            amp_dtype=this.amp_dtype,
            title=title,
            steps_loss=args.steps_loss,
            on_batch=confusion.update_from_logits if confusion else None,
        )
        row["train_miou"] = mean_score(confusion.class_iou()) if confusion else math.nan
        validated = epoch % args.val_every == 0 or epoch == epochs
        scores, strips = (
            validate(this, model, val_loader, weights, title) if validated else (NOT_VALIDATED, [])
        )
        row |= scores
        improved = validated and (best["epoch"] == 0 or row["val_miou"] > best["miou"])
        if improved:
            class_iou = [row[f"iou {name}"] for name in CLASS_NAMES]
            best = {"epoch": epoch, "miou": row["val_miou"], "class_iou": class_iou}
        row["seconds"] = time.perf_counter() - started

        append_row(folder / LOG, row)
        step = epoch + (args.encoder_epochs if stage == 2 else 0)
        write_scalars(this.writer, row, step)
        # TensorBoard shows ten pictures of a kind: there is no point in keeping hundreds.
        if validated and (epoch == epochs or epoch // args.val_every % pictures_every == 0):
            for number, picture in enumerate(strips):
                this.writer.add_image(f"val/{number}", picture, step)
        this.writer.flush()
        report = f"{title}: train loss {row['train_loss']:.4f}"
        if validated:
            report += (
                f", val loss {row['val_loss']:.4f}, val mIoU {100 * row['val_miou']:.2f} % "
                f"(best {100 * best['miou']:.2f})"
            )
        print(
            f"{report}, {row['images_per_second']:.1f} images/s, {row['seconds']:.0f} s", flush=True
        )

        checkpoint = this.description | {
            "model": on_cpu(model),
            "stage": stage,
            "epoch": epoch,
            "best": best,
        }
        if improved and stage == 2:
            save_checkpoint(checkpoint, folder / BEST)
        if args.epochs_save and epoch % args.epochs_save == 0:
            save_checkpoint(checkpoint, folder / f"stage{stage}-epoch{epoch:03d}.pth")
        state = {
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": scaler.state_dict(),
            "rng": rng_state(this.shuffling, this.device),
        }
        save_checkpoint(checkpoint | state, folder / LAST)
    return best


def validate(
    this: Run, model: torch.nn.Module, loader: DataLoader, weights: Tensor, title: str
) -> tuple[dict[str, float], list[Tensor]]:
    """Score the network on val; returns the columns of the log and the first few pictures."""
    strips: list[Tensor] = []

    def keep_strip(image: Tensor, prediction: Tensor, label: Tensor) -> None:
        if len(strips) < 3:
            strips.append(strip(image, prediction, label, COLORS, this.mean, this.std))

    loss, confusion = evaluate(
        model,
        loader,
        len(CLASS_NAMES),
        f"{title}, validation",
        class_weights=weights,
        amp_dtype=this.amp_dtype,
        on_image=keep_strip,
    )
    class_iou = confusion.class_iou().tolist()
    scores = {"val_loss": loss, "val_miou": mean_score(class_iou)}
    scores["val_pixel_accuracy"] = confusion.pixel_accuracy()
    scores |= {f"iou {name}": iou for name, iou in zip(CLASS_NAMES, class_iou, strict=True)}
    return scores, strips


if __name__ == "__main__":
    run(main, DatasetError, CheckpointError)
