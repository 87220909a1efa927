"""Turn a checkpoint of a run into a file to publish: weights for inference, in half precision.

    python tools/ship_weights.py --checkpoint save/NAME/last.pth --output weights/NAME.pth

The file keeps what rebuilds the network and its preprocessing, and the options of the run. The
weights are stored as float16 and used as float32: score the file afterwards.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils.arguments import INFERENCE_ADVICE, ArgumentParser, file_path, new_file
from utils.checkpoint import load_checkpoint, load_network, save_checkpoint
from utils.files import write_errors
from utils.script import run_script

# Options with paths and other details of the machine of the run.
LOCAL = {"datadir", "savedir", "cache", "classes", "init", "pretrained_encoder", "soft_labels"}
LOCAL |= {"device", "workers", "resume"}


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--checkpoint", type=file_path, metavar="FILE", required=True)
    parser.add_argument("--output", type=new_file, metavar="FILE", required=True)
    args = parser.parse_args()
    network, about = load_network(args.checkpoint)
    run = load_checkpoint(args.checkpoint)
    with write_errors(args.output):
        save_checkpoint(
            about.to_checkpoint()
            | {key: run[key] for key in ("stage", "epoch") if key in run}
            | {"args": {name: value for name, value in about.args.items() if name not in LOCAL}}
            | {"model": in_half_precision(network)},
            args.output,
        )
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB")


def in_half_precision(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (weight.half() if weight.is_floating_point() else weight).contiguous()
        for name, weight in network.state_dict().items()
    }


if __name__ == "__main__":
    run_script(main, INFERENCE_ADVICE)
