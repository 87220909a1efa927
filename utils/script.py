"""What every script shares: errors in one line, exit statuses, the device and its precision."""

import argparse
import io
import os
import platform
import re
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from utils import distributed
from utils.arguments import PRECISIONS
from utils.errors import UserError, one_line
from utils.openvino import check_openvino

Advice = Mapping[type[Exception], str]


class Interrupted(BaseException):
    """A signal ended the program cleanly; the message says how to resume.

    Like KeyboardInterrupt, it is not an Exception: what reads files turns those into their errors.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


# Signal received. Python drops an exception raised by a handler during a destructor; training
# checks this instead.
received: int | None = None


def run_script(main: Callable[[], None], advice: Advice | None = None) -> None:
    """Run a script; a UserError ends it with one line on stderr and status 2.

    When one of several processes fails, the others print its message.

    Args:
        advice: text to add to the message of each class of errors, such as the option that helps.
    """
    global received
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        # Several libraries take names of files for UTF-8 in any locale: let Python do so too.
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    # The number of workers is the user's choice: it may be meant for slow disks.
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    name = os.path.basename(sys.argv[0])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, _end)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored: nohup
        handlers[signal.SIGINT] = signal.signal(signal.SIGINT, _end)
    try:
        main()
        distributed.stop()
    except Interrupted as end:
        # torchrun sends SIGTERM to the processes that end last, which must not lose this line.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if distributed.is_first():
            print(f"{name}: {end}", file=sys.stderr)
        sys.exit(end.status)
    except UserError as error:
        message = with_advice(error, advice or {})
        distributed.announce(message)
        print(f"{name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        reason = distributed.failure_elsewhere(error)
        if reason is None:
            reason = lost_output(error)
            distributed.announce(reason or one_line(error))
        if reason is None:
            raise
        print(f"{name}: error: {reason}", file=sys.stderr)
        sys.exit(2)
    finally:
        received = None
        for number, handler in handlers.items():
            signal.signal(number, handler)


def with_advice(error: Exception, advice: Advice) -> str:
    """Return the message of an error, the advice for its most specific class, and its notes."""
    found = [advice[kind] for kind in type(error).__mro__ if kind in advice]
    return "; ".join([one_line(error), *found[:1], *getattr(error, "__notes__", [])])


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    """Raise an exception, so that whatever is under way cleans up."""
    global received
    received = number
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Interrupted("stopped by SIGTERM", number)


def lost_output(error: Exception) -> str | None:
    """Return the message if standard output caused the error: a full disk or a closed pipe."""
    if not isinstance(error, OSError):
        return None
    try:
        print(flush=True)  # something, since unbuffered output has nothing left to flush
    except OSError:
        # Or Python would try to flush the rest at exit, and complain.
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="ignore")
        return f"standard output cannot be written ({error.strerror})"
    return None


def start_device(args: argparse.Namespace) -> torch.device:
    """Return the device that the options ask for, checked, and join the processes of torchrun."""
    device = pick_device(args.device)
    use_threads(args.threads)
    if args.sync_bn and device.type == "cpu":
        raise UserError("--sync-bn needs GPUs: leave it out")
    pick_amp_dtype(args.amp, device)
    torch.backends.cudnn.benchmark = True
    distributed.start(device)
    return device


def start_inference(args: argparse.Namespace) -> torch.device:
    """Return the device that the options ask for, after a check that it has their --runtime."""
    device = pick_device(args.device)
    use_threads(args.threads)
    if args.runtime in ("onnx", "openvino") and device.type != "cpu":
        raise UserError(f"--runtime {args.runtime} needs --device cpu")
    if args.runtime == "onnx" and args.precision != "float32":
        raise UserError("--runtime onnx computes in float32")
    if args.runtime == "openvino":
        check_openvino(PRECISIONS[args.precision])
    elif args.model:
        raise UserError("--model needs --runtime openvino")
    return device


def use_threads(count: int | None) -> None:
    """Let all that runs on the CPU take so many threads from now on; None: as many as before."""
    if count:
        torch.set_num_threads(count)


def pick_device(name: str) -> torch.device:
    """Return the device of that name, or raise a UserError; "auto" is a GPU where there is one.

    Each process that torchrun starts on a machine gets a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    number = distributed.local_rank()
    if name.startswith("cuda:") and number is not None:
        raise UserError(f"--device {name}: torchrun gives each process a GPU, leave it out")
    if name == "cuda" and number is not None:
        if number >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs, fewer than its processes: "
                "lower torchrun's --nproc-per-node, or give --device cpu"
            )
        name = f"cuda:{number}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} cannot be used here: give cpu, cuda or auto")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def pick_amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of mixed precision for a value of --amp; None is full precision.

    Raises:
        UserError: the device does not support it.
    """
    on_gpu = device.type == "cuda"
    if name == "fp16" and not on_gpu:
        raise UserError("--amp fp16 needs a CUDA GPU: give --amp bf16 or off")
    # Older GPUs emulate bf16, which is slower than float32.
    bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16" and not bf16:
        raise UserError("--amp bf16 is not supported by this GPU: give --amp fp16 or off")
    if name == "auto":
        name = "off" if not on_gpu else "bf16" if bf16 else "fp16"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the model and threads of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # on Linux
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    models = re.findall(r"model name\s*: (.+)", text)
    return f"{[*models, platform.machine()][0]}, {torch.get_num_threads()} threads"
