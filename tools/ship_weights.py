"""Turn a checkpoint of a run into a small file to publish: rounded weights for inference.

    python tools/ship_weights.py --checkpoint save/NAME/last.pth --output weights/NAME.pth

The file keeps what rebuilds the network and its preprocessing, and the options of the run. The
weights are used as float32, whatever they are stored as: score the file afterwards.
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

# Convolutions with at least this many weights are large; they hold nearly all weights. With small
# ones in 8 bits too, D = 128 loses 0.3 points of mIoU instead of 0.1.
LARGE = 10_000


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--checkpoint", type=file_path, metavar="FILE", required=True)
    parser.add_argument("--output", type=new_file, metavar="FILE", required=True)
    parser.add_argument("--bits", type=int, choices=(16, 8), default=16,
                        help="bits of a weight: 16 (float16), or 8 in large convolutions "
                        "(float8_e4m3fn); default: %(default)s")  # fmt: skip
    args = parser.parse_args()
    network, about = load_network(args.checkpoint)
    run = load_checkpoint(args.checkpoint)
    with write_errors(args.output):
        save_checkpoint(
            about.to_checkpoint()
            | {key: run[key] for key in ("stage", "epoch") if key in run}
            | {"args": {name: value for name, value in about.args.items() if name not in LOCAL}}
            | {"model": rounded(network, args.bits)},
            args.output,
        )
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB")


def rounded(network: torch.nn.Module, bits: int) -> dict[str, torch.Tensor]:
    """Return the weights in 16 bits each, those of large convolutions in `bits`."""
    weights = network.state_dict()
    for name, weight in weights.items():
        if weight.is_floating_point():
            in_8_bits = bits == 8 and weight.numel() >= LARGE
            dtype = torch.float8_e4m3fn if in_8_bits else torch.float16
            weights[name] = weight.to(dtype).contiguous()
    return weights


if __name__ == "__main__":
    run_script(main, INFERENCE_ADVICE)
