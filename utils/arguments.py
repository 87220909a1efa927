"""What the command lines of all programs share: the parser, types of values, and advice."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from datasets.images import BrokenFiles
from datasets.workers import WorkerError
from utils.checkpoint import EncoderOnly
from utils.errors import UserError
from utils.evaluation import OutOfMemory
from utils.files import WriteError

SHIPPED = Path(__file__).parent.parent / "weights/lednet_d20_cityscapes.pth"

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

THREADS_HELP = "threads that compute on a CPU; default OMP_NUM_THREADS, or one for each core"

# Which options mend an error in the programs that use a trained network.
INFERENCE_ADVICE = {
    BrokenFiles: "python tools/check_dataset.py lists them all",
    EncoderOnly: "train stage 2 first, with main.py --pretrained-encoder",
    OutOfMemory: "give a smaller --batch-size or --height",
    WorkerError: "give fewer --workers",
    WriteError: "make room, or give another --output",
}


class ArgumentParser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, without the usage before it."""

    def __init__(self, description: str | None = None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def add_checkpoint(self) -> None:
        """Add --checkpoint, by default the weights that come with the code."""
        self.add_argument(
            "--checkpoint", type=file_path, metavar="FILE", default=str(SHIPPED),
            help=f"trained network; default weights/{SHIPPED.name}, which comes with the code",
        )  # fmt: skip

    def add_device(self) -> None:
        """Add --device and --threads."""
        self.add_argument(
            "--device", default="auto", help="auto, cpu, cuda or cuda:1; default %(default)s"
        )
        self.add_argument("--threads", type=positive_int, help=THREADS_HELP)

    def add_runtime(self, **runtimes: str) -> None:
        """Add --runtime, with an explanation of each, OpenVINO besides, --precision and --model."""
        runtimes["openvino"] = "in OpenVINO on the CPU"
        add = self.add_argument
        # fmt: off
        add("--runtime", choices=runtimes, default="torch",
            help="; ".join(map(": ".join, runtimes.items())) + "; default %(default)s")
        add("--precision", choices=PRECISIONS, default="float32",
            help="of the computation; default %(default)s")
        add("--model", type=file_path, metavar="FILE",
            help="model that tools/quantize.py made of the checkpoint, to run with --runtime "
            "openvino; default: the checkpoint itself, without integers")
        # fmt: on

    def error(self, message: str) -> NoReturn:
        if "--local-rank" in message.replace("_", "-"):  # of torch.distributed.launch
            message = "--local-rank is not needed: start with torchrun --nproc-per-node GPUS"
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _number(kind: type, expected: str, accepts: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Return an argparse type for accepted numbers; `expected` describes them in its error."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text} is not {expected}")
        return value

    return convert


positive_int = _number(int, "a positive whole number", lambda value: value > 0)
natural_int = _number(int, "a whole number from 0 on", lambda value: value >= 0)
seed_int = _number(int, "a whole number from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)
positive_float = _number(float, "a positive number", lambda value: 0 < value < math.inf)
natural_float = _number(float, "a number from 0 on", lambda value: 0 <= value < math.inf)
probability = _number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
finite_float = _number(float, "a number", math.isfinite)


def file_path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def new_file(text: str) -> str:
    """Refuse a file that could not be written later: it exists, or its folder is read-only."""
    path = Path(file_path(text))
    if path.exists():
        raise UserError(f"{path} exists: name a new file")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UserError(f"{path.parent} is not a folder that can be written to")
    return text
