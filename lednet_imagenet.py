"""Pretrain LEDNet's encoder as an image classifier, on ImageNet or any folder of classes.

python lednet_imagenet.py                             on drawn shapes, made once
python lednet_imagenet.py --datadir DIR               on DIR/train/<class>/ and DIR/val/<class>/
python lednet_imagenet.py --datadir DIR --recipe modern --savedir NAME
python lednet_imagenet.py --savedir NAME --resume     go on with an interrupted run
torchrun --nproc-per-node 4 lednet_imagenet.py --datadir DIR
python lednet_imagenet.py --savedir NAME --evaluate   one pass over val with its best network
python main.py --datadir CITYSCAPES --pretrained-encoder save/NAME/encoder.pth
"""

import argparse
import shlex
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from datasets.check import leave_out_broken
from datasets.imagenet import MEAN, STD, ImageFolder, open_images, validation_images
from datasets.loading import Batch, ShuffledSeeds, batch_loader
from datasets.segmentation import Classes
from models.lednet import Encoder, ImageClassifier
from utils import distributed
from utils.checkpoint import CheckpointError, Description, load_classifier, on_cpu
from utils.errors import UserError
from utils.evaluation import evaluate_classifier
from utils.metrics import TopKAccuracy
from utils.optim import PretrainingSchedule, average_of, build_optimizer, one_cycle
from utils.options import PRETRAINING, TRAINING_ADVICE, parse_options, settle_pretraining
from utils.run_folder import BEST, ENCODER, Run, open_run
from utils.script import device_name, pick_amp_dtype, run_script, start_device
from utils.speed import count_parameters
from utils.training import Stage, Validation, fit, seed_process
from utils.visualize import captioned

SGD_DECAY, ADAMW_DECAY = 1e-4, 0.05
PICTURES = 8  # of val for TensorBoard


def main() -> None:
    args = parse_options(__doc__, PRETRAINING, settle_pretraining)
    device = start_device(args)
    if args.evaluate:
        print_scores(args, device)
        return
    with open_run(args) as run:
        train, val = open_images(args, check=not run.on_same_data())
        check_resumable(args, run, train)
        torch.manual_seed(args.seed)
        model = ImageClassifier(Encoder(), len(train.classes))
        stage = build_stage(args, model, train, val, device)
        print_plan(args, stage, val)
        run.begin()
        seed_process(args.seed)
        best = fit(stage, run)
    cityscapes = "" if args.dataset == "shapes" else "--datadir CITYSCAPES "
    print(
        f"\nbest on val after epoch {best['epoch']}: top-1 {best['val_top1']:.2%}, top-5 "
        f"{best['val_top5']:.2%}\n\n"
        "next:\n"
        f"  python main.py {cityscapes}--pretrained-encoder "
        f"{shlex.quote(str(run.folder / ENCODER))}\n"
        f"  tensorboard --logdir {shlex.quote(str(run.folder))} --host localhost"
    )


def print_plan(args: argparse.Namespace, stage: Stage, val: ImageFolder) -> None:
    count = distributed.processes()
    each = f" in each of {count} processes" if count > 1 else ""
    print(
        f"LEDNet's encoder: {count_parameters(stage.network.encoder):,} parameters, under a linear "
        f"layer\non {device_name(stage.device)}, in {stage.amp_dtype or 'full precision'}\n"
        f"data: {args.datadir}: {stage.about.train_images} images of {len(val.classes)} classes to "
        f"train on, {len(val)} to validate\n"
        f"images: {args.size}x{args.size}, in batches of {args.batch_size}{each}, {args.workers} "
        f"workers; {args.epochs} epochs of the {args.recipe} recipe"
    )


def build_stage(
    args: argparse.Namespace, model: ImageClassifier, train: ImageFolder, val: ImageFolder,
    device: torch.device,
) -> Stage:  # fmt: skip
    """Put together the training of a recipe."""
    modern = args.recipe == "modern"
    about = Description(
        args.dataset, Classes(train.classes, [], []), list(MEAN), list(STD), args.size, len(train),
        args=vars(args),
    )  # fmt: skip
    if args.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last)
    sampler = ShuffledSeeds(len(train), args.seed, distributed.rank(), distributed.processes())
    loading = (args.batch_size, args.workers, device.type == "cuda", args.skip_broken)
    loader = batch_loader(train, sampler, *loading, stacked=True)
    if not loader:
        raise UserError(f"{args.datadir} has fewer training images than there are processes")
    steps = args.epochs * len(loader)
    if modern:
        optimizer = build_optimizer("adamw", model, args.lr, weight_decay=ADAMW_DECAY)
        scheduler = one_cycle(optimizer, steps)
    else:
        optimizer = build_optimizer("sgd", model, args.lr, momentum=0.9, weight_decay=SGD_DECAY)
        scheduler = PretrainingSchedule(optimizer, len(loader))
    normalize, amp_dtype = about.normalizer(device), pick_amp_dtype(args.amp, device)
    cross_entropy = nn.CrossEntropyLoss(label_smoothing=0.1 if modern else 0.0)
    shared = distributed.share(val)
    return Stage(
        number=0,
        epochs=args.epochs,
        about=about,
        model=model,
        network=model,
        loader=loader,
        image_size=(args.size, args.size),
        prepare=lambda batch: (
            normalize(batch.images), batch.labels.to(device, non_blocking=True)
        ),
        # In float32: sums in half precision are coarse.
        loss=lambda logits, labels: cross_entropy(logits.float(), labels),
        optimizer=optimizer,
        scheduler=scheduler,
        val_loader=batch_loader(shared, None, *loading, stacked=True),
        validate=partial(
            validate, normalize=normalize, classes=val.classes, total=len(shared),
            amp_dtype=amp_dtype,
        ),
        score="val_top1",
        files=lambda index: train.samples[index][:1],
        best_files={BEST: on_cpu, ENCODER: encoder_weights},
        average=average_of(model, steps) if modern else None,
        meter=partial(TopKAccuracy, device=device),
        amp_dtype=amp_dtype,
    )  # fmt: skip


def encoder_weights(model: ImageClassifier) -> dict[str, Tensor]:
    return {f"encoder.{name}": weight for name, weight in on_cpu(model.encoder).items()}


def validate(
    network: nn.Module, batches: Iterable[Batch], title: str, classes: list[str], total: int,
    normalize: Callable[[Tensor], Tensor], amp_dtype: torch.dtype | None,
) -> Validation:  # fmt: skip
    """Score a classifier, and keep evenly spread images with what it takes them for."""
    wanted = {total * n // PICTURES for n in range(PICTURES)}
    pictures: list[Tensor] = []

    def keep(batch: Batch, logits: Tensor) -> None:
        for place, index in enumerate(batch.indices):
            if index in wanted:
                found, truth = logits[place].argmax().item(), batch.labels[place].item()
                suffix = "" if found == truth else f", not {classes[truth]}"
                caption = classes[found] + suffix
                pictures.append(captioned(batch.images[place], caption, found == truth))

    columns = evaluate_classifier(network, batches, normalize, title, total, amp_dtype, keep)
    best = {name: columns[name] for name in ("val_top1", "val_top5")}
    return Validation(columns, best, pictures)


def check_resumable(args: argparse.Namespace, run: Run, train: ImageFolder) -> None:
    """Raise UserError if the checkpoint to resume from is of another recipe or other classes."""
    resumed = run.resumed
    if resumed is None:
        return
    if resumed["stage"] != 0 or resumed.get("args", {}).get("recipe") != args.recipe:
        raise CheckpointError(f"{run.folder} has the checkpoint of another run: put its own back")
    if resumed.get("class_names") != train.classes:
        raise UserError(
            f"{args.datadir} has other classes than those that the run in {run.folder} began with: "
            "give the --datadir that it had"
        )


def print_scores(args: argparse.Namespace, device: torch.device) -> None:
    """Print the scores of a trained classifier on val; its checkpoint says what is not given."""
    print(f"scoring {args.evaluate} on {device_name(device)}", flush=True)
    model, about = load_classifier(args.evaluate)
    datadir, size = args.datadir or about.args.get("datadir"), args.size or about.height
    if not isinstance(datadir, str):
        raise UserError(f"{args.evaluate} does not state its data set: give --datadir")

    def open_val() -> ImageFolder:
        val = validation_images(datadir, size, list(about.classes.names))
        if args.skip_broken:
            leave_out_broken(val, args.workers)
        return val

    val = distributed.first(open_val)
    shared = distributed.share(val)
    pinned = device.type == "cuda"
    loader = batch_loader(shared, None, args.batch_size, args.workers, pinned, stacked=True)
    scores = evaluate_classifier(
        model.to(device), loader, about.normalizer(device), "val", len(shared),
        pick_amp_dtype(args.amp, device),
    )  # fmt: skip
    print(
        f"{args.evaluate} on the {len(val)} images of {datadir}/val at {size}x{size}: loss "
        f"{scores['val_loss']:.4f}, top-1 {scores['val_top1']:.2%}, top-5 {scores['val_top5']:.2%}"
    )


if __name__ == "__main__":
    run_script(main, TRAINING_ADVICE)
