"""Measure LEDNet beside its peers on this machine; print markdown tables.

    pip install -r requirements-dev.txt
    python tools/benchmark.py | tee benchmarks.md           on the CPU
    python tools/benchmark.py --device cuda                 on a GPU
    python tools/benchmark.py --networks "LEDNet D = 20"    one network

Each network runs in several forms, beside pytorchcv's LEDNet in eager PyTorch, the reference. All
take turns, two passes each, of which the second is timed, so that every ratio is of medians over
the same stretch of time. Within a table all forms return the same output. Peers come from the
package pytorchcv, with random weights, which do not change their speed. Rows are printed as they
are measured. The programs report their own rates of training and scoring.
"""

import argparse
import ctypes
import gc
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from models.deployed import compiled_for, deploy
from models.lednet import LEDNet
from utils.arguments import ArgumentParser, positive_float
from utils.errors import one_line
from utils.onnx import MissingExtra, OnnxNetwork, export_onnx
from utils.script import pick_device, run_script
from utils.speed import InPrecision, count_multiply_adds, count_parameters

ROOT = Path(__file__).parent.parent
REFERENCE = "LEDNet of pytorchcv"
PEERS = {
    REFERENCE: "lednet",
    "ERFNet": "erfnet",
    "ENet": "enet",
    "ESNet": "esnet",
    "EDANet": "edanet",
    "DABNet": "dabnet",
    "CGNet": "cgnet",
    "Fast-SCNN": "fastscnn",
}
OURS = {"LEDNet D = 20": 20, "LEDNet D = 128": 128}

MIN_ROUNDS, MAX_ROUNDS = 4, 200
WARMUP = 10  # passes on a GPU

Size = tuple[int, int]  # height, width
Runner = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Case:
    """Input and output of the networks in one table, and the forms that are measured.

    A form is eager, compiled, onnx, deployed or deployed compiled, and may end in half.
    """

    size: Size
    batch: int
    labels: bool
    forms: tuple[str, ...]

    def __str__(self) -> str:
        output = "label maps" if self.labels else "logits"
        return f"{self.size[1]}x{self.size[0]}, batch {self.batch}, {output} out"


EAGER = ("eager", "eager half")
COMPILED = ("compiled", "compiled half")
DEPLOYED = ("deployed", "deployed half", "deployed compiled", "deployed compiled half")
# Each compiled form takes half a minute before its first pass.
FEW_ON_GPU = (*EAGER, "compiled half", "deployed compiled half")
FEW_ON_CPU = ("eager", "onnx", "deployed")
CASES = {
    "cuda": [
        Case((512, 1024), 1, True, (*EAGER, *COMPILED, *DEPLOYED)),
        Case((512, 1024), 1, False, (*EAGER, *COMPILED, *DEPLOYED)),
        Case((1024, 2048), 1, True, FEW_ON_GPU),
        Case((512, 1024), 8, True, FEW_ON_GPU),
        Case((1024, 2048), 8, True, FEW_ON_GPU),
    ],
    "cpu": [
        Case((512, 1024), 1, False, (*EAGER, "compiled", "onnx", *DEPLOYED[:3])),
        Case((512, 1024), 1, True, FEW_ON_CPU),
        Case((512, 1024), 8, False, FEW_ON_CPU),
        Case((1024, 2048), 1, False, FEW_ON_CPU),
    ],
    "quick": [Case((64, 128), 1, False, (*EAGER, "compiled", "onnx", "deployed"))],
}


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--device", default="cpu", help="cpu, cuda, cuda:1; default %(default)s")
    add("--networks", nargs="+", choices=[*OURS, *PEERS], metavar="NAME",
        help="networks to measure; default: all")
    add("--seconds", type=positive_float, default=10,
        help="time for each network in each table, without warm-up; default %(default)s")
    add("--quick", action="store_true", help="small images, to check that everything runs")
    # fmt: on
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    torch.backends.cudnn.benchmark = True
    command = shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]])
    print(f"{device_title(device)}; torch {torch.__version__}; {date.today()}; `{command}`")
    for case in CASES["quick" if args.quick else device.type]:
        print_networks(args.networks or [*OURS, *PEERS], case, device, args.seconds)


def device_title(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def print_networks(names: list[str], case: Case, device: torch.device, seconds: float) -> None:
    """Measure networks and print a table of them."""
    print(f"\n### {case}\n")
    print("| network | parameters | multiply-adds | form | ms | FPS | x | x float32 | memory |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name in names:
        # On a CPU, batches of peers would take long and show nothing new.
        if device.type == "cpu" and case.batch > 1 and name not in (*OURS, REFERENCE):
            continue
        network = build(name, case.size)
        first = (
            f"{name} | {count_parameters(network) / 1e6:.2f} M | "
            f"{count_multiply_adds(network, case.size) / 1e9:.1f} G"
        )
        for row in measure(name, case, device, seconds):
            print(f"| {first} | {row} |", flush=True)
            first = " | | "


def measure(name: str, case: Case, device: torch.device, seconds: float) -> Iterator[str]:
    """Time all forms of a network in turns with the reference; yield a row of the table for each.

    Rows end with the speed relative to the reference in the same precision and in float32, and the
    memory of a pass.
    """
    images = torch.rand(case.batch, 3, *case.size, device=device)
    forms = [form for form in case.forms if exists(form, name, device)]
    keys = [(REFERENCE, "eager"), *((name, form) for form in forms)]
    if any("half" in form for form in forms):
        keys.insert(0, (REFERENCE, "eager half"))
    runners: dict[tuple[str, str], Runner] = {}
    memory: dict[tuple[str, str], int] = {}
    failures: dict[str, str] = {}
    for key in keys:
        try:
            runner = build_runner(*key, case, device)
            memory[key] = peak_memory(runner, images, device)
            runners[key] = runner
        except MissingExtra:
            raise
        except Exception as error:  # exporters and compilers raise anything
            failures[key[1]] = f"{type(error).__name__}: {one_line(error)}"
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runners}
    started, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() - started < seconds):
        for key, runner in runners.items():
            # The first pass follows one of another network, whose threads may still spin and whose
            # data fill the caches.
            timed(runner, images, device)
            times[key].append(timed(runner, images, device))
        rounds += 1
    torch._dynamo.reset()
    for form in forms:
        if (name, form) not in runners:
            yield f"{form} | failed: {failures[form][:100]} | | | |"
            continue
        median, p5, p95 = (1e3 * np.percentile(times[name, form], [50, 5, 95])).tolist()
        full = 1e3 * np.median(times[REFERENCE, "eager"]) / median
        same = 1e3 * np.median(times[REFERENCE, "eager half"]) / median if "half" in form else full
        yield (
            f"{form} | {median:.1f} ({p5:.1f} to {p95:.1f}) | {1e3 * case.batch / median:.1f} | "
            f"{same:.2f} | {full:.2f} | {memory[name, form] / 1e6:.0f} MB"
        )


def exists(form: str, name: str, device: torch.device) -> bool:
    if form.startswith("deployed"):
        return name in OURS
    return form != "onnx" or device.type == "cpu"


def build(name: str, size: Size) -> nn.Module:
    """Return a network with random weights in evaluation mode."""
    torch.manual_seed(0)
    if name in OURS:
        return LEDNet(apn_channels=OURS[name]).eval()
    try:
        from pytorchcv.model_provider import get_model
    except ImportError as error:
        raise MissingExtra(f"{error}: pip install pytorchcv") from error
    # Built for one size of image, and without the head that only training needs.
    more = {"in_size": size, "aux": False} if name == "Fast-SCNN" else {}
    return get_model(f"{PEERS[name]}_cityscapes", pretrained=False, **more).eval()


def build_runner(name: str, form: str, case: Case, device: torch.device) -> Runner:
    """Return a network in one of its forms, as a function of images on the device."""
    network = build(name, case.size).to(device)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    dtype = half if "half" in form else torch.float32
    if form == "onnx":
        return exported(network, case)
    if form.startswith("deployed"):
        return deploy(network, case.labels, dtype, compiled="compiled" in form)
    if case.labels:
        network = Labels(network)
    if dtype != torch.float32:
        network = InPrecision(network, dtype)
    if "compiled" in form:
        return compiled_for(network.to(memory_format=torch.channels_last), device)
    return network


def exported(network: nn.Module, case: Case) -> OnnxNetwork:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        if isinstance(network, LEDNet):
            export_onnx(network, None, path, case.labels)
        else:
            images = torch.rand(case.batch, 3, *case.size)
            torch.onnx.export(
                Labels(network) if case.labels else network, (images,), path, dynamo=True,
                verbose=False, input_names=["images"], external_data=False,
            )  # fmt: skip
        return OnnxNetwork(path)


class Labels(nn.Module):
    """A network that returns the class of each pixel instead of logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).argmax(1).to(torch.uint8)


@torch.inference_mode()
def timed(runner: Runner, images: Tensor, device: torch.device) -> float:
    """Return the seconds of one pass, until the device has finished it."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    runner(images)
    synchronize()
    return time.perf_counter() - started


@torch.inference_mode()
def peak_memory(runner: Runner, images: Tensor, device: torch.device) -> int:
    """Warm up and return the peak memory of a pass in bytes, above what was held before.

    On a GPU it is what torch reserves, on a CPU what the process holds.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for _ in range(WARMUP):
            runner(images)
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved() - before
    if not isinstance(runner, OnnxNetwork):  # which keeps the memory of its first pass
        runner(images)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = process_memory("VmRSS")
    runner(images)
    return max(0, process_memory("VmHWM") - before)


def process_memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes: VmRSS, memory held, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    run_script(main)
