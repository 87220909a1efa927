"""Make of a run's checkpoint the file that ships: inference weights alone, in half precision.

    python tools/ship_weights.py --checkpoint save/NAME/last.pth --output weights/NAME.pth

What only resuming needs is left out; what rebuilds the network and its preprocessing stays, with
the options of the run, which say what it was trained on. The weights are stored as float16 and
used as float32; score the file afterwards.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils.arguments import ArgumentParser, file_path
from utils.checkpoint import (
    DESCRIPTION,
    load_network,
    on_cpu,
    save_checkpoint,
)
from utils.errors import UserError
from utils.script import run_script

# What a description says beside what `load_network` needs.
KEPT = ("categories", "train_images", "stage", "epoch", "args")
# Of the machine that it ran on: of no use to others.
LOCAL = ("datadir", "savedir", "init", "pretrained_encoder", "device", "workers", "resume")


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--checkpoint", type=file_path, metavar="FILE", required=True)
    parser.add_argument("--output", type=file_path, metavar="FILE", required=True)
    args = parser.parse_args()
    if Path(args.output).exists():
        raise UserError(f"--output {args.output} exists: give a new file, or move it away")
    network, checkpoint = load_network(args.checkpoint)
    stored = ship(network, checkpoint)
    try:
        save_checkpoint(stored, args.output)
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written: {error}") from error
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB")


def ship(network: torch.nn.Module, checkpoint: dict) -> dict:
    """What is stored of a network and the rest of its checkpoint."""
    kept = {key: checkpoint[key] for key in (*DESCRIPTION, *KEPT) if key in checkpoint}
    kept["args"] = {k: v for k, v in checkpoint.get("args", {}).items() if k not in LOCAL}
    weights = {
        name: weight.half() if weight.is_floating_point() else weight
        for name, weight in on_cpu(network).items()
    }
    return kept | {"model": {name: weight.contiguous() for name, weight in weights.items()}}


if __name__ == "__main__":
    run_script(main)
