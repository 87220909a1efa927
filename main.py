"""Train LEDNet: stage 1 the encoder, stage 2 the whole network; or everything in one stage.

python main.py                                        on drawn street scenes, made once
python main.py --datadir DIR                          on Cityscapes, as published
python main.py --datadir DIR --preset cityscapes      on Cityscapes, with a stronger recipe
python main.py --datadir DIR --pretrained-encoder save/imagenet/encoder.pth
python main.py --datadir DIR --train-on coarse --savedir coarse
python main.py --datadir DIR --init save/coarse/best.pth --savedir fine
python main.py --dataset camvid --datadir DIR --preset camvid
python main.py --dataset folder --classes FILE --datadir DIR --preset camvid \\
    --init weights/lednet_d20_cityscapes.pth          on your own classes
python main.py --savedir NAME --resume                go on with an interrupted run
torchrun --nproc-per-node 4 main.py --datadir DIR     one process for each of 4 GPUs
"""

import argparse
import shlex
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from datasets import Data, open_splits, read_classes_for
from datasets.loading import Batch, ShuffledSeeds, batch_loader
from datasets.segmentation import Classes
from datasets.transforms import Augment
from models.lednet import AuxiliaryHead, EncoderClassifier, LEDNet
from utils import distributed
from utils.checkpoint import (
    Description,
    apn_channels_of,
    init_network,
    load_checkpoint,
    load_encoder,
    normalisation,
    on_cpu,
)
from utils.errors import UserError, few
from utils.evaluation import evaluate
from utils.losses import LOSSES, class_weights, with_auxiliary, with_soft_labels
from utils.metrics import ConfusionMatrix, mean_score
from utils.optim import SCHEDULES, average_of, build_optimizer
from utils.options import SEGMENTATION, TRAINING_ADVICE, parse_options, settle_segmentation
from utils.run_folder import BEST, COUNTS, ENCODER, LAST, Run, open_run
from utils.script import device_name, pick_amp_dtype, run_script, start_device
from utils.speed import count_parameters
from utils.training import Stage, Validation, fit, seed_process
from utils.visualize import score_table, strip

WEIGHT_C = {1: 1.20, 2: 1.10}  # c of the class weights by stage, as published
LABEL_STRIDE = {1: 8, 2: 1}  # stage 1 has labels at the resolution of the encoder's output
NOT_NORMALISED = ([0.0] * 3, [1.0] * 3)
PICTURES = 3  # of val for TensorBoard


def main() -> None:
    args = parse_options(__doc__, SEGMENTATION, settle_segmentation)
    device = start_device(args)
    with open_run(args) as run:
        classes = Classes.from_checkpoint(run.resumed) if run.resumed else read_classes_for(args)
        network, mean, std = start_network(args, classes, run.resumed)
        data = open_splits(args, classes, device, distributed.first(run.class_counts))
        about = Description(
            args.dataset, classes, mean, std, args.height, len(data.train_files),
            args.apn_channels, vars(args),
        )  # fmt: skip
        print_plan(f"LEDNet, D = {args.apn_channels}", args, data, network, about, device)
        run.begin()
        distributed.first(lambda: run.write_json(COUNTS, data.counts))
        seed_process(args.seed)
        if args.encoder_epochs and not run.past_stage(1):
            fit(encoder_stage(network, data, about, args, device), run)
            encoder = {f"encoder.{name}": w for name, w in on_cpu(network.encoder).items()}
            checkpoint = about.to_checkpoint() | {"model": encoder, "stage": 1}
            distributed.first(lambda: run.save_network(checkpoint, ENCODER))
        best = fit(network_stage(network, data, about, args, device), run)
    report(best, classes, run)


def start_network(
    args: argparse.Namespace, classes: Classes, resumed: dict[str, Any] | None
) -> tuple[LEDNet, list[float], list[float]]:
    """Build the network with the weights that training starts from.

    Settles `args.apn_channels`. A resumed run gets its weights with the rest of its state.

    Returns:
        The network, and the mean and std to normalise images with.
    """
    torch.manual_seed(args.seed)
    start = resumed or (load_checkpoint(args.init) if args.init else {})
    file = args.init or args.pretrained_encoder or LAST
    if args.apn_channels is None:
        args.apn_channels = apn_channels_of(start.get("model", {})) or 20
    network = LEDNet(len(classes), args.apn_channels, args.dropout)
    others: list[str] = []
    if args.init and not resumed:
        fresh, others = init_network(network, start, file, classes)
        known = len(classes) - len(fresh)
        print(f"{file}: the network is loaded; it knows {known} of the {len(classes)} classes")
        if fresh:
            print(f"these classes start from random weights: {few(fresh)}")
    elif args.pretrained_encoder and not resumed:
        start, loaded, others = load_encoder(network.encoder, file)
        total = len(network.encoder.state_dict())
        print(f"{file}: {loaded} of {total} tensors of the encoder loaded")
        if loaded < total:
            print("the file has no counts of batches, which nothing reads: they start at 0")
    if others:
        print(f"ignored, as the network has no such tensors: {few(others)}")
    stated = normalisation(start, file)
    if stated and args.mean and stated != (args.mean, args.std):
        raise UserError(
            f"{file} was trained on images normalised with mean {stated[0]} and std {stated[1]}: "
            "leave --mean and --std out"
        )
    mean, std = stated or ((args.mean, args.std) if args.mean else NOT_NORMALISED)
    return network, mean, std


def print_plan(
    name: str, args: argparse.Namespace, data: Data, network: nn.Module, about: Description,
    device: torch.device,
) -> None:  # fmt: skip
    count = distributed.processes()
    each = f" in each of {count} processes" if count > 1 else ""
    print(
        f"{name}: {count_parameters(network):,} parameters\n"
        f"on {device_name(device)}, in {pick_amp_dtype(args.amp, device) or 'full precision'}\n"
        f"data: {args.datadir}: {data.summary}\n"
        f"images: {data.size[1]}x{data.size[0]}, in batches of {args.batch_size}{each}, "
        f"{data.workers} workers; {args.encoder_epochs} epochs of stage 1, {args.epochs} of stage "
        f"2, preset {args.preset}"
    )
    if (about.mean, about.std) != NOT_NORMALISED:
        print(f"images are normalised with mean {about.mean} and std {about.std}")
    if data.soft_labels:
        count, total = data.soft_labels.count(), len(data.train_files)
        print(f"soft labels: of {count} of the {total} images, {args.soft_labels}")
    if data.trains_on_val:
        print("val is trained on: its scores say nothing about new images")


def encoder_stage(
    network: LEDNet, data: Data, about: Description, args: argparse.Namespace, device: torch.device
) -> Stage:
    """Return stage 1: the encoder under a 1x1 head, on labels at 1/8 of the resolution."""
    model = EncoderClassifier(network.encoder, len(data.classes))
    return build_stage(1, args.encoder_epochs, model, model, data, about, args, device)


def network_stage(
    network: nn.Module, data: Data, about: Description, args: argparse.Namespace,
    device: torch.device,
) -> Stage:  # fmt: skip
    """Return stage 2: the whole network, with an auxiliary head on the encoder if asked for."""
    model = AuxiliaryHead(network, len(data.classes)) if args.aux_weight else network
    stage = build_stage(2, args.epochs, model, network, data, about, args, device)
    stage.best_files, stage.epochs_before = {BEST: on_cpu}, args.encoder_epochs
    if args.aux_weight:
        stage.loss = with_auxiliary(stage.loss, args.aux_weight)
    if data.soft_labels:
        stage.loss = with_soft_labels(stage.loss)
    if args.ema:
        stage.average = average_of(network, args.epochs * stage.steps)
    return stage


def build_stage(
    number: int, epochs: int, model: nn.Module, network: nn.Module, data: Data,
    about: Description, args: argparse.Namespace, device: torch.device,
) -> Stage:  # fmt: skip
    """Put together what both stages have in common; `network` is the part of the model to score."""
    if args.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last)

    sampler = ShuffledSeeds(len(data.train), args.seed, distributed.rank(), distributed.processes())
    loading = (args.batch_size, data.workers, data.pin_memory, args.skip_broken)
    # A last batch of one image cannot train the batch norm on the pooled plane.
    drop_last = len(sampler) % args.batch_size == 1
    soft_labels = data.soft_labels if number == 2 else None
    loader = batch_loader(
        data.train, sampler, *loading, drop_last=drop_last, soft_labels=soft_labels
    )
    normalize = about.normalizer(device)
    strong = args.augment == "strong"
    jitter, noise = (args.jitter, args.noise) if strong else (0.0, 0.0)

    c = WEIGHT_C[number] if args.weight_c is None else args.weight_c
    counts = torch.tensor(list(data.counts.values()))
    weights = (class_weights(counts, c) if c else torch.ones(len(counts) - 1)).to(device)
    optimizer = build_optimizer(args.optimizer, model, args.lr, weight_decay=args.weight_decay)
    amp_dtype = pick_amp_dtype(args.amp, device)
    val = distributed.share(data.val)
    return Stage(
        number=number,
        epochs=epochs,
        about=about,
        model=model,
        network=network,
        loader=loader,
        image_size=data.size,
        prepare=Augment(data.augment, normalize, device, jitter, noise, LABEL_STRIDE[number]),
        loss=partial(LOSSES[args.loss], weight=weights),
        optimizer=optimizer,
        scheduler=SCHEDULES[args.schedule](optimizer, epochs * len(loader)),
        val_loader=batch_loader(val, None, *loading),
        validate=partial(
            validate, normalize=normalize, classes=data.classes, total=len(val),
            class_weights=weights, amp_dtype=amp_dtype,
        ),
        score="miou",
        files=data.train_files.__getitem__,
        meter=partial(ConfusionMatrix, len(data.classes), device) if args.iouTrain else None,
        amp_dtype=amp_dtype,
    )  # fmt: skip


def validate(
    network: nn.Module, batches: Iterable[Batch], title: str, classes: Classes, **options: Any
) -> Validation:
    """Score a network; `options` are those of `evaluate`."""
    pictures: list[Tensor] = []

    def keep(image: Tensor, prediction: Tensor, label: Tensor) -> None:
        if len(pictures) < PICTURES:
            pictures.append(strip(image, prediction, label, classes.colors))

    loss, confusion = evaluate(
        network, batches, num_classes=len(classes), title=title, on_image=keep, **options
    )
    class_iou = confusion.class_iou().tolist()
    miou = mean_score(class_iou)
    accuracy = confusion.pixel_accuracy()
    columns = {"val_loss": loss, "val_miou": miou, "val_pixel_accuracy": accuracy}
    columns |= {f"iou {name}": iou for name, iou in zip(classes.names, class_iou, strict=True)}
    return Validation(columns, {"miou": miou, "class_iou": class_iou}, pictures)


def report(best: dict[str, Any], classes: Classes, run: Run) -> None:
    """Print the scores of the best epoch, and what to do next."""
    folder, datadir = shlex.quote(str(run.folder)), shlex.quote(run.args.datadir)
    print(
        f"\nclass IoU in % on val after epoch {best['epoch']}, the best:\n"
        f"{score_table(classes.names, best['class_iou'])}\n"
        f"mIoU {100 * best['miou']:.2f}\n\n"
        "next:\n"
        f"  python eval_cityscapes_server.py --checkpoint {folder}/{BEST} --datadir {datadir}\n"
        f"  python predict.py --checkpoint {folder}/{BEST} --input PICTURES\n"
        f"  tensorboard --logdir {folder} --host localhost"
    )


if __name__ == "__main__":
    run_script(main, TRAINING_ADVICE)
