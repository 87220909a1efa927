"""Measure LEDNet beside its peers on this machine, and write docs/benchmarks.md.

    pip install -r requirements-dev.txt
    python tools/benchmark.py                       on the CPU
    python tools/benchmark.py --device cuda         on a GPU; fills in the GPU's part of the page
    python tools/benchmark.py --page                write the page anew from what was measured

Peers are the networks of the package pytorchcv, untrained: the weights change nothing of the speed.
Each network runs beside a reference, pytorchcv's LEDNet in plain eager PyTorch. In a round all of
its forms, and the reference in each precision, take turns of two passes, of which the second one is
timed; every ratio is of medians in the same rounds. All forms of a table return the same output,
logits at full resolution or label maps.

What was measured is kept in docs/benchmarks/<device>.json, row by row: a run that was stopped goes
on where it was. The page is made from these files alone.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluation_speed
import training_speed
from benchmark_page import RESULTS, write_page

from datasets.drawn.streets import make_synthetic
from models.lednet import LEDNet
from utils.arguments import ArgumentParser, positive_float
from utils.errors import UserError
from utils.files import atomic_write
from utils.onnx import MissingExtra, OnnxNetwork, export_onnx
from utils.script import pick_amp_dtype, pick_device, run_script
from utils.speed import (
    InPrecision,
    compiled_for,
    count_multiply_adds,
    count_parameters,
    deploy,
)

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
# Forms of a network. "deployed" is utils.speed.deploy of ours, which a peer does not have.
FORMS = ("eager", "eager half", "compiled", "compiled half", "onnx")
QUICK = ("eager", "eager half", "compiled", "onnx", "deployed")
DEPLOYED = ("deployed", "deployed half", "deployed compiled", "deployed compiled half")
MATRIX = 2048
LEAST_ROUNDS = 4
BANDWIDTH_BYTES = 512 << 20

Size = tuple[int, int]
Runner = Callable[[Tensor], Any]


class Labels(nn.Module):
    """Any network, with the class of each pixel in place of its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).argmax(1).to(torch.uint8)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1; default cpu")
    parser.add_argument(
        "--seconds",
        type=positive_float,
        default=10,
        help="of the passes of one network at one size, warm-up left out; default 10",
    )
    parser.add_argument(
        "--networks", nargs="+", choices=[*OURS, *PEERS], metavar="NAME", help="these alone"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one image of 64x128: to see whether it all runs"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.page:
        write_page()
        return
    device = pick_device(args.device)
    torch.backends.cudnn.benchmark = True
    names = args.networks or [*OURS, *PEERS]
    if args.quick:
        for name in names:
            report(measure(name, device, (64, 128), 1, False, QUICK, args.seconds))
        return

    path = RESULTS / f"{device.type}.json"
    figures = started_figures(path, device)
    for name in names:
        figures["networks"].setdefault(name, size_of(name))
    if "training" not in figures:
        figures["training"] = training(device)
        keep(figures, path)
    if "evaluation" not in figures:
        figures["evaluation"] = evaluation(device)
        keep(figures, path)
    done = [(row["network"], row["size"], row["batch"], row["labels"]) for row in figures["speed"]]
    for size, batch, labels, forms in settings(device):
        # On a CPU batches take seconds, and say no more than single images do: fewer networks then.
        slow = device.type == "cpu" and batch > 1
        for name in names:
            if slow and name not in (*OURS, REFERENCE):
                continue
            if (name, list(size), batch, labels) in done:
                continue
            row = measure(name, device, size, batch, labels, forms, args.seconds)
            figures["speed"].append(row)
            report(row)
            keep(figures, path)
    write_page()


def started_figures(path: Path, device: torch.device) -> dict[str, Any]:
    """What an earlier run has measured on the same device, or a new beginning.

    Raises:
        UserError: it was another device, or another torch.
    """
    command = shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]])
    where = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if path.exists():
        figures = json.loads(path.read_text())
        if {key: figures[key] for key in where} != where:
            raise UserError(
                f"{path} was measured on {figures['device']} with torch {figures['torch']}: move "
                "it away to measure anew"
            )
        print(f"going on with {path}")
        figures["commands"].append(command)
        return figures
    return where | {
        "date": date.today().isoformat(),
        "commands": [command],
        "half": str(half_of(device)).removeprefix("torch."),
        "rates": rates(device),
        "networks": {},
        "speed": [],
    }


def keep(figures: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(figures, indent=1) + "\n")


def training(device: torch.device) -> dict[str, Any]:
    """Loading and training on drawn scenes of 2048x1024, with a cache and without."""
    on_gpu = device.type == "cuda"
    batch_size, workers = (16, os.cpu_count() or 1) if on_gpu else (5, 0)
    # Workers load whole batches: enough of them that the wait for the first ones weighs little.
    images = 4 * workers * batch_size if on_gpu else 2 * batch_size
    with tempfile.TemporaryDirectory() as folder:
        drawn = {"train": min(images, 64)}
        scenes = Path(folder, "scenes")
        make_synthetic(scenes, drawn, height=1024, workers=os.cpu_count() or 1)
        figures = training_speed.measure(
            str(scenes),
            device,
            pick_amp_dtype("auto", device),
            images=images,
            batch_size=batch_size,
            workers=workers,
        )
    print(training_speed.table(figures), flush=True)
    return figures


def evaluation(device: torch.device) -> dict[str, Any]:
    """Scoring drawn scenes of 2048x1024 and writing their label maps."""
    figures = evaluation_speed.measure(device, 96 if device.type == "cuda" else 16)
    print(f"evaluation: {figures}", flush=True)
    return figures


def settings(device: torch.device) -> list[tuple[Size, int, bool, tuple[str, ...]]]:
    """What is measured: size, batch, whether label maps come out, and the forms of networks.

    Each form that is compiled takes half a minute before its first pass: so not all are measured
    everywhere. On a CPU eager passes of 8 images take 5 seconds at the smaller size, and 20 at the
    larger one, which is left out.
    """
    small, large = (512, 1024), (1024, 2048)
    if device.type == "cuda":
        fewer = ("eager", "eager half", "compiled half", "deployed compiled half")
        return [
            (small, 1, True, FORMS + DEPLOYED),
            (small, 1, False, FORMS + DEPLOYED),
            (large, 1, True, fewer),
            (small, 8, True, fewer),
            (large, 8, True, fewer),
        ]
    fewer = ("eager", "onnx", "deployed")
    return [
        (small, 1, False, ("eager", "eager half", "compiled", "onnx", "deployed", "deployed half",
                           "deployed compiled")),
        (small, 1, True, fewer),
        (small, 8, False, fewer),
        (large, 1, False, fewer),
    ]  # fmt: skip


def build(name: str, size: Size) -> nn.Module:
    """A network, untrained, in evaluation mode; Fast-SCNN is built for one size of image."""
    torch.manual_seed(0)
    if name in OURS:
        return LEDNet(apn_channels=OURS[name]).eval()
    try:
        from pytorchcv.model_provider import get_model
    except ImportError as error:
        raise MissingExtra(f"{error}: pip install pytorchcv") from error
    # Without its second head, which serves training alone.
    more = {"in_size": size, "aux": False} if name == "Fast-SCNN" else {}
    return get_model(f"{PEERS[name]}_cityscapes", pretrained=False, **more).eval()


def form_of(
    name: str, form: str, device: torch.device, size: Size, batch: int, labels: bool
) -> Runner:
    """A network in one of its forms, as a function of images on the device."""
    network = build(name, size).to(device)
    dtype = half_of(device) if "half" in form else torch.float32
    if form == "onnx":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "network.onnx")
            if name in OURS:
                export_onnx(network, {}, path, labels)
            else:
                images = torch.rand(batch, 3, *size)
                exported = Labels(network) if labels else network
                torch.onnx.export(exported, (images,), path, dynamo=True, verbose=False,
                                  input_names=["images"], external_data=False)  # fmt: skip
            return OnnxNetwork(path)
    if form.startswith("deployed"):
        return deploy(network, labels, dtype, compiled="compiled" in form)
    if labels:
        network = Labels(network)
    if dtype != torch.float32:
        network = InPrecision(network, dtype)
    if "compiled" in form:
        return compiled_for(network.to(memory_format=torch.channels_last), device)
    return network


def measure(
    name: str,
    device: torch.device,
    size: Size,
    batch: int,
    labels: bool,
    forms: tuple[str, ...],
    seconds: float,
) -> dict[str, Any]:
    """Time every form of a network in turns with the reference.

    Returns:
        What was measured, "forms" by name: "median_ms", "p5_ms" and "p95_ms" of a pass; "ratio",
        how many times faster than the reference in float32 in the same rounds, and "ratio_half"
        than the reference in half precision; "memory", the bytes that passes take; or "failed", why
        there is none.
    """
    row = {"network": name, "size": list(size), "batch": batch, "labels": labels, "forms": {}}
    images = torch.rand(batch, 3, *size, device=device)
    wanted = [form for form in forms if applies(form, name, device)]
    half = any("half" in form for form in wanted)
    references = {"eager": "reference_ms"} | ({"eager half": "reference_half_ms"} if half else {})
    runners: dict[tuple[str, str], Runner] = {}
    memory: dict[str, int] = {}
    for form in references:
        runners["reference", form] = form_of(REFERENCE, form, device, size, batch, labels)
        peak_memory(runners["reference", form], images, device)
    for form in wanted:
        try:
            runner = form_of(name, form, device, size, batch, labels)
            memory[form] = peak_memory(runner, images, device)
            runners["network", form] = runner
        except Exception as error:  # exporters and compilers raise what they please
            row["forms"][form] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runners}
    rounds, started = 0, time.perf_counter()
    while rounds < LEAST_ROUNDS or (time.perf_counter() - started < seconds and rounds < 200):
        for key, runner in runners.items():
            # Not after a pass of another one: its threads may still spin, its data fill the caches.
            timed(runner, images, device)
            times[key].append(timed(runner, images, device))
        rounds += 1
    row["rounds"] = rounds
    for form, title in references.items():
        row[title] = 1e3 * float(np.median(times["reference", form]))
    for (whose, form), taken in times.items():
        if whose == "network":
            median, p5, p95 = (1e3 * np.percentile(taken, [50, 5, 95])).tolist()
            found = {"median_ms": median, "p5_ms": p5, "p95_ms": p95, "memory": memory[form]}
            found["ratio"] = row["reference_ms"] / median
            if "half" in form:
                found["ratio_half"] = row["reference_half_ms"] / median
            row["forms"][form] = found
    torch._dynamo.reset()
    return row


def applies(form: str, name: str, device: torch.device) -> bool:
    if form in DEPLOYED:
        return name in OURS
    return form != "onnx" or device.type == "cpu"


@torch.inference_mode()
def timed(runner: Runner, images: Tensor, device: torch.device) -> float:
    """Seconds of one pass, until the device has finished it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    runner(images)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.inference_mode()
def peak_memory(runner: Runner, images: Tensor, device: torch.device) -> int:
    """Warm up, and return the most bytes that the passes take above what is held before: on a GPU
    what torch reserves, workspaces and graphs included; on a CPU what the process holds, whose
    freed memory goes back to the system first."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for _ in range(10):
            runner(images)
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved() - before
    runner = runner if isinstance(runner, OnnxNetwork) else warm(runner, images)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = process_memory("VmRSS")
    runner(images)
    return max(0, process_memory("VmHWM") - before)


def warm(runner: Runner, images: Tensor) -> Runner:
    """A runner after its first pass, which may compile; ONNX Runtime keeps the memory of that."""
    runner(images)
    return runner


def process_memory(what: str) -> int:
    """Bytes: VmRSS, what the process holds, or VmHWM, the most that it held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(what)


def rates(device: torch.device) -> dict[str, float]:
    """The best rates that this device shows: FLOP/s of products of matrices of 2048 x 2048 in
    float32, by each library at hand (on a GPU with TF32, as its convolutions compute), and in half
    precision; bytes/s of a copy, read and written."""
    a, b = torch.rand(2, MATRIX, MATRIX, device=device)
    operations = 2 * MATRIX**3

    def best(work: Runner, x: Tensor = a) -> float:
        for _ in range(3):
            work(x)
        return min(timed(work, x, device) for _ in range(20))

    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    found = {"float32_torch": operations / best(lambda x: torch.mm(x, b))}
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if device.type == "cpu":
        found["float32_numpy"] = operations / best(lambda x: x.numpy() @ b.numpy())
        found["float32_onnx"] = operations / best(onnx_product(b))
    half = half_of(device)
    product = b.to(half)
    found["half_torch"] = operations / best(lambda x: torch.mm(x, product), a.to(half))
    source = torch.empty(BANDWIDTH_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["bytes"] = 2 * BANDWIDTH_BYTES / best(lambda x: target.copy_(source))
    return found


def onnx_product(b: Tensor) -> Runner:
    """A product with a matrix in ONNX Runtime."""
    product = nn.Linear(MATRIX, MATRIX, bias=False)
    with torch.no_grad():
        product.weight.copy_(b)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "product.onnx")
        torch.onnx.export(product, (b,), path, dynamo=True, verbose=False,
                          input_names=["images"], external_data=False)  # fmt: skip
        return OnnxNetwork(path)


def size_of(name: str) -> dict[str, int]:
    """Parameters, and for one image of 1024x512 the multiply-adds of the convolutions and the bytes
    that they read and write in float32, each once."""
    size = (512, 1024)
    network = build(name, size)
    counted = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        counted += 4 * (inputs[0].numel() + output.numel() + module.weight.numel())

    hooks = [
        module.register_forward_hook(count)
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.inference_mode():
        network(torch.zeros(1, 3, *size))
    for hook in hooks:
        hook.remove()
    return {
        "parameters": count_parameters(network),
        "multiply_adds": count_multiply_adds(network, size),
        "bytes": counted,
    }


def half_of(device: torch.device) -> torch.dtype:
    """CPUs compute in bfloat16, if in any half precision."""
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:120] if lines else ""


def report(row: dict[str, Any]) -> None:
    height, width = row["size"]
    forms = ", ".join(
        f"{form} {found['median_ms']:.1f}" if "median_ms" in found else f"{form} failed"
        for form, found in row["forms"].items()
    )
    print(
        f"{row['network']}, {row['batch']} x {width}x{height}, "
        f"{'labels' if row['labels'] else 'logits'}, ms: {forms} (reference "
        f"{row['reference_ms']:.1f}, {row['rounds']} rounds)",
        flush=True,
    )


if __name__ == "__main__":
    run_script(main)
