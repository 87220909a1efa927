"""Train a teacher on a data set: ESPNetv2, which begins with its authors' Cityscapes weights.

    git clone https://github.com/sacmehta/EdgeNets
    python tools/train_teacher.py --edgenets EdgeNets --dataset camvid --datadir data/camvid \\
        --preset camvid --lr 5e-4 --crop 256 320 --epochs 10 --savedir teacher
    python tools/write_soft_labels.py --edgenets EdgeNets --checkpoint save/teacher/last.pth \\
        --datadir data/camvid --output soft
    python main.py --dataset camvid --datadir data/camvid --preset camvid \\
        --soft-labels soft --savedir taught

This runs code from the clone. The options are those of main.py, except --apn-channels, --init,
--pretrained-encoder, --decoder, --encoder-epochs, --dropout, --aux-weight, --soft-labels, --mean
and --std, which only LEDNet has. Crops are best multiples of 32, since ESPNetv2 takes no others:
they are resized for it.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import open_splits, read_classes_for
from datasets.segmentation import Classes
from main import network_stage, print_plan
from utils import distributed
from utils.arguments import file_path
from utils.checkpoint import Description
from utils.errors import UserError
from utils.options import SEGMENTATION, TRAINING_ADVICE, Option, parse_options, settle_segmentation
from utils.run_folder import COUNTS, LAST, open_run
from utils.script import run_script, start_device
from utils.teacher import MEAN, STD, build_teacher
from utils.training import fit, seed_process
from utils.visualize import score_table

# Options of LEDNet, and their values for a teacher. A width of 0 marks the run and its checkpoints.
LEDNET = {
    "apn_channels": 0,
    "init": None,
    "pretrained_encoder": None,
    "decoder": False,
    "encoder_epochs": 0,
    "dropout": 0.0,
    "aux_weight": 0.0,
    "soft_labels": None,
    "mean": None,
    "std": None,
}

OPTIONS = {
    "teacher": (
        Option("--edgenets", file_path, None, "clone of https://github.com/sacmehta/EdgeNets; no "
               "default", may_change=True, argparse_options={"metavar": "DIR"}),
    ),
    **SEGMENTATION,
}  # fmt: skip


def main() -> None:
    args = parse_options(__doc__, OPTIONS, settle_teaching)
    device = start_device(args)
    with open_run(args) as run:
        classes = Classes.from_checkpoint(run.resumed) if run.resumed else read_classes_for(args)
        seed_process(args.seed)
        network = build_teacher(args.edgenets, args.dataset, classes)
        data = open_splits(args, classes, device, distributed.first(run.class_counts))
        about = Description(
            args.dataset, classes, MEAN, STD, args.height, len(data.train_files), 0, vars(args)
        )
        print_plan("teacher", args, data, network, about, device)
        run.begin()
        distributed.first(lambda: run.write_json(COUNTS, data.counts))
        best = fit(network_stage(network, data, about, args, device), run)
    command = ["python", "tools/write_soft_labels.py", "--edgenets", args.edgenets]
    command += ["--checkpoint", run.folder / LAST, "--datadir", args.datadir]
    print(
        f"\nclass IoU in % on val after epoch {best['epoch']}, the best:\n"
        f"{score_table(classes.names, best['class_iou'])}\n"
        f"mIoU {100 * best['miou']:.2f}\n\n"
        f"next: {shlex.join(map(str, command))} --output SOFT"
    )


def settle_teaching(args: argparse.Namespace) -> None:
    if args.resume and args.apn_channels:
        raise UserError(f"{args.savedir} holds a run of main.py: resume it by that program")
    for name in LEDNET:
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} is for main.py alone")
    if not args.edgenets:
        raise UserError("give --edgenets, a clone of https://github.com/sacmehta/EdgeNets")
    settle_segmentation(args)
    vars(args).update(LEDNET)


if __name__ == "__main__":
    run_script(main, TRAINING_ADVICE)
