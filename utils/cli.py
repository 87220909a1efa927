"""What the command lines of the scripts share: options, errors in one line, the device."""

import argparse
import io
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from utils import distributed
from utils.startup import end_of_startup


class UsageError(Exception):
    """The command line asks for something that cannot be done; the message is one line."""


class Interrupted(Exception):
    """A signal ended the program in good order; the message says how to go on.

    Args:
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


class ArgumentParser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, without the usage before it."""

    def __init__(self, description: str = "", add_help: bool = True) -> None:
        super().__init__(
            description=description,
            add_help=add_help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class Obsolete(argparse.Action):
    """An option of the original training code that is accepted with a note, and ignored."""

    def __init__(self, option_strings, dest, reason="it means nothing any more", **kwargs):
        super().__init__(
            option_strings, dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **kwargs
        )
        self.reason = reason

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"note: {option_string} is ignored: {self.reason}", file=sys.stderr)


# The signal that the program has had, as long as it has not ended. Python drops an exception that a
# handler raises within some callbacks, such as those of a fork: then the Watch ends the run.
received: int | None = None


def run(main: Callable[[], None], *mistakes: type[Exception]) -> None:
    """Run a script; a UsageError or one of `mistakes` ends it in one line and status 2.

    Of several processes, one that ends because another did says what the other said.
    """
    global received
    name = os.path.basename(sys.argv[0])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be anything
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, _ended)}
    end_of_startup()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _ended)
    try:
        main()
        distributed.stop()
    except Interrupted as end:
        # torchrun sends one to the processes that end last: they still say what they have to.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if distributed.is_first():
            print(f"{name}: {end}", file=sys.stderr)
        sys.exit(end.status)
    except (UsageError, *mistakes) as error:
        distributed.announce(one_line(error))
        print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        reason = distributed.failure_elsewhere(error)
        if reason is None:
            reason = lost_output(error) or dead_worker(error)
            distributed.announce(reason or one_line(error))
        if reason is None:
            raise
        print(f"{name}: error: {reason}", file=sys.stderr)
        sys.exit(2)
    finally:
        received = None
        for number, handler in before.items():
            signal.signal(number, handler)


def one_line(error: Exception) -> str:
    """The message of an error; of one that a DataLoader's worker raised, without its traceback."""
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return last.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


def _ended(number: int, _frame: FrameType | None) -> NoReturn:
    """End by an exception: what is under way cleans up after itself."""
    global received
    received = number
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Interrupted("stopped by SIGTERM", number)


def lost_output(error: Exception) -> str | None:
    """What to say of an error that comes from a standard output that takes no more: the file that
    it goes to is on a full disk, or the program that read it has ended."""
    if not isinstance(error, OSError):
        return None
    try:
        print(flush=True)  # unbuffered output has nothing left to flush
    except OSError:
        # What is left of it cannot be written either, and Python would tell so at the end.
        sys.stdout = open(os.devnull, "w")
        return f"standard output cannot be written ({error.strerror})"
    return None


def dead_worker(error: Exception) -> str | None:
    """What to say of an error that comes from the death of a process that loads data."""
    # Of one that dies while it hands over a batch, the connection tells first.
    broken_off = isinstance(error, ConnectionResetError | ConnectionRefusedError | EOFError)
    if broken_off or str(error).startswith("DataLoader worker"):
        return (
            f"a process that loads data died ({one_line(error)}): if the machine ran out of "
            "memory, give fewer --workers"
        )
    return None


def positive_int(text: str) -> int:
    return _number(int, text, "a positive whole number", lambda value: value > 0)


def natural_int(text: str) -> int:
    return _number(int, text, "a whole number from 0 on", lambda value: value >= 0)


def seed_int(text: str) -> int:
    what = "a whole number from 0 to 2**63 - 1"
    return _number(int, text, what, lambda value: 0 <= value < 2**63)


def positive_float(text: str) -> float:
    return _number(float, text, "a positive number", lambda value: 0 < value < float("inf"))


def natural_float(text: str) -> float:
    what = "a number from 0 on"
    return _number(float, text, what, lambda value: 0 <= value < float("inf"))


def probability(text: str) -> float:
    return _number(float, text, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def finite_float(text: str) -> float:
    return _number(float, text, "a number", math.isfinite)


def file_path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def _number(kind: type, text: str, what: str, accepts: Callable[[float], bool]):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return value


def make_results_folder(folder: Path, option: str) -> None:
    """Make a folder for results that an option names; nothing may lie in it.

    Raises:
        UsageError: something does, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as error:
        raise UsageError(
            f"{option} {folder} cannot be made ({error.strerror}): give a new folder"
        ) from error
    if used:
        raise UsageError(f"{folder} is not empty: give {option} a new folder")


def pick_device(name: str) -> torch.device:
    """The device of that name, checked; "auto" is the GPU where there is one. Of the processes
    that torchrun starts on a machine each gets a GPU of its own.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    number = distributed.local_rank()
    if name.startswith("cuda:") and number is not None:
        raise UsageError(f"--device {name}: torchrun gives each process a GPU, leave it out")
    if name == "cuda" and number is not None:
        if number >= torch.cuda.device_count():
            raise UsageError(
                f"there are {torch.cuda.device_count()} GPUs for the processes of this machine: "
                "give torchrun --nproc-per-node no more, or --device cpu"
            )
        name = f"cuda:{number}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"--device {name} cannot be used here: give --device cpu, or auto to take a CUDA GPU "
            "where there is one"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what asks for "the" GPU means this one
    return device


def pick_amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The precision that --amp asks for; None is full precision.

    Raises:
        UsageError: the device cannot do it.
    """
    on_gpu = device.type == "cuda"
    if name == "fp16" and not on_gpu:
        raise UsageError("--amp fp16 needs a CUDA GPU: give --amp bf16 or off")
    # Older GPUs emulate bf16, which is slower than not to use it.
    bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16" and not bf16:
        raise UsageError("--amp bf16 is not supported by this GPU: give --amp fp16 or off")
    if name == "auto":
        name = "off" if not on_gpu else "bf16" if bf16 else "fp16"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
