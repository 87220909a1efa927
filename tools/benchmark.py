"""Measure LEDNet beside its peers on this machine; print markdown tables.

    pip install -r requirements-dev.txt
    python tools/benchmark.py | tee benchmarks.md           on the CPU
    python tools/benchmark.py --device cuda                 on a GPU
    python tools/benchmark.py --networks "LEDNet D = 20"    one network
    python tools/benchmark.py --sizes 1024x512 --forms eager "deployed half labels"

Each network runs in several forms, beside pytorchcv's LEDNet in eager PyTorch, the reference. All
take turns, two passes each, of which the second is timed, so that every ratio is of medians over
the same stretch of time. All return logits, or the class of each pixel if their form says labels.
Peers come from the package pytorchcv, with random weights, which do not change their speed.
"""

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets.images import Size
from models.deployed import compiled_for, deploy
from models.lednet import LEDNet
from utils.arguments import ArgumentParser, positive_float
from utils.errors import one_line
from utils.onnx import MissingExtra, OnnxNetwork, export_onnx, quantize
from utils.openvino import OpenVinoNetwork
from utils.script import device_name, pick_device, run_script
from utils.speed import InPrecision, count_multiply_adds, count_parameters, time_pass

REFERENCE = "LEDNet of pytorchcv"
PEERS = (REFERENCE, "ERFNet", "ENet", "ESNet", "EDANet", "DABNet", "CGNet", "Fast-SCNN")
OURS = {"LEDNet D = 20": 20, "LEDNet D = 128": 128}

MIN_ROUNDS = 4
WARMUP = 3  # passes; a compiled network records its CUDA graph in the second

Key = tuple[str, str]  # network and form
Runner = Callable[[Tensor], Any]


class Case(NamedTuple):
    """Input of the networks in one table, and the forms that are measured.

    A form is eager, compiled, onnx, openvino, deployed or deployed compiled, which half may follow,
    and int8 for openvino, and labels for the deployed ones.
    """

    size: Size
    batch: int
    forms: tuple[str, ...]


EAGER = ("eager", "eager half")
COMPILED = ("compiled", "compiled half")
DEPLOYED = ("deployed", "deployed half", "deployed compiled", "deployed compiled half")
OPENVINO = ("openvino", "openvino half", "openvino int8")
LABELS = tuple(f"{form} labels" for form in DEPLOYED)
FORMS = (*EAGER, *COMPILED, "onnx", *OPENVINO, *DEPLOYED, *LABELS)
# Each compiled form takes half a minute before its first pass.
FEW_ON_GPU = (*EAGER, "compiled half", "deployed compiled half")
FEW_ON_CPU = ("eager", "onnx", "deployed")
CASES = {
    "cuda": [
        Case((512, 1024), 1, (*EAGER, *COMPILED, *DEPLOYED)),
        Case((1024, 2048), 1, FEW_ON_GPU),
        Case((512, 1024), 8, FEW_ON_GPU),
        Case((1024, 2048), 8, FEW_ON_GPU),
    ],
    "cpu": [
        Case((512, 1024), 1, (*EAGER, "compiled", "onnx", *OPENVINO, *DEPLOYED[:3])),
        Case((512, 1024), 8, FEW_ON_CPU),
        Case((1024, 2048), 1, FEW_ON_CPU),
    ],
}


def main() -> None:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--device", default="cpu", help="cpu, cuda, cuda:1; default %(default)s")
    add("--networks", nargs="+", choices=[*OURS, *PEERS], metavar="NAME",
        help="networks to measure; default: all")
    add("--sizes", nargs="+", type=image_size, metavar="WIDTHxHEIGHT",
        help="sizes of single images; default: those of the published tables, and batches")
    add("--forms", nargs="+", choices=FORMS, metavar="FORM",
        help="forms of LEDNet, and those of them that peers have; default: what suits each table")
    add("--seconds", type=positive_float, default=10,
        help="time for each network in each table, without warm-up; default %(default)s")
    # fmt: on
    args = parser.parse_args()
    device = pick_device(args.device)
    torch.backends.cudnn.benchmark = True
    command = shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]])
    print(f"{device_name(device)}; torch {torch.__version__}; {date.today()}; `{command}`")
    cases = CASES[device.type]
    if args.sizes:
        cases = [Case(size, 1, cases[0].forms) for size in args.sizes]
    if args.forms:
        cases = [case._replace(forms=tuple(args.forms)) for case in cases]
    for case in cases:
        print_networks(args.networks or [*OURS, *PEERS], case, device, args.seconds)


def image_size(text: str) -> Size:
    """Read 1024x512 as a height and a width of at least 64."""
    width, height = map(int, text.split("x"))
    if min(width, height) < 64:
        raise ValueError
    return height, width


def print_networks(names: list[str], case: Case, device: torch.device, seconds: float) -> None:
    """Measure networks and print a table of them."""
    print(f"\n### {case.size[1]}x{case.size[0]}, batch {case.batch}\n")
    print("| network | parameters | multiply-adds | form | ms | FPS | x | x float32 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
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
            first = "| |"


def measure(name: str, case: Case, device: torch.device, seconds: float) -> Iterator[str]:
    """Time all forms of a network in turns with the reference; yield a row of the table for each.

    Rows end with the speed relative to the reference in the same precision and in float32.
    """
    images = torch.rand(case.batch, 3, *case.size, device=device)
    own = ("deployed", "openvino int8")  # of this repository's networks alone
    forms = [form for form in case.forms if name in OURS or not form.startswith(own)]
    halves = any("half" in form for form in forms)
    references = [(REFERENCE, form) for form in (EAGER if halves else EAGER[:1])]
    runners = {key: build_runner(*key, case, device) for key in references}
    for form in list(forms):
        try:
            runner = build_runner(name, form, case, device)
            for _ in range(WARMUP):
                time_pass(runner, images)
            runners[name, form] = runner
        except Exception as error:  # exporters and compilers raise anything
            forms.remove(form)
            yield f"{form} | failed: {type(error).__name__}: {one_line(error)[:100]} | | |"
    times = take_turns(runners, images, seconds)
    torch._dynamo.reset()
    reference = {form: np.median(times[peer, form]) for peer, form in references}
    for form in forms:
        p5, median, p95 = np.percentile(times[name, form], [5, 50, 95])
        same_precision = reference["eager half" if "half" in form else "eager"] / median
        yield (
            f"{form} | {milliseconds(median)} ({milliseconds(p5)} to {milliseconds(p95)}) | "
            f"{case.batch / median:.1f} | {same_precision:.2f} | {reference['eager'] / median:.2f}"
        )


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.{1 if seconds >= 0.01 else 2}f}"


def take_turns(runners: dict[Key, Runner], images: Tensor, seconds: float) -> dict[Key, list]:
    """Return the seconds of each runner's passes, all over the same stretch of time."""
    times: dict[Key, list[float]] = {key: [] for key in runners}
    started, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or time.perf_counter() - started < seconds:
        for key, runner in runners.items():
            # The first pass follows one of another network, whose threads may still spin and whose
            # data fill the caches.
            time_pass(runner, images)
            times[key].append(time_pass(runner, images))
        rounds += 1
    return times


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
    model = name.split()[0].lower().replace("-", "")  # its name in pytorchcv
    return get_model(f"{model}_cityscapes", pretrained=False, **more).eval()


def build_runner(name: str, form: str, case: Case, device: torch.device) -> Runner:
    """Return a network in one of its forms, as a function of images on the device."""
    network = build(name, case.size).to(device)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    dtype = half if "half" in form else torch.float32
    if form == "onnx":
        return exported(network, case, OnnxNetwork)
    if form == "openvino int8":
        return exported(network, case, in_integers)
    if form.startswith("openvino"):
        return exported(network, case, partial(OpenVinoNetwork, dtype=dtype))
    if form.startswith("deployed"):
        return deploy(network, "labels" in form, dtype, compiled="compiled" in form)
    if dtype != torch.float32:
        network = InPrecision(network, dtype)
    if "compiled" in form:
        return compiled_for(network.to(memory_format=torch.channels_last), device)
    return network


def exported(network: nn.Module, case: Case, opened: Callable[[Path], Runner]) -> Runner:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        if isinstance(network, LEDNet):
            export_onnx(network, None, path)
        else:
            images = torch.rand(case.batch, 3, *case.size)
            torch.onnx.export(
                network, (images,), path, dynamo=True, verbose=False, input_names=["images"],
                external_data=False,
            )  # fmt: skip
        return opened(path)


def in_integers(path: Path) -> OpenVinoNetwork:
    images = [torch.rand(1, 3, 256, 512)]  # random weights, so that their ranges mean nothing
    quantize(path, path.with_name("int8.onnx"), images)
    return OpenVinoNetwork(path.with_name("int8.onnx"))


if __name__ == "__main__":
    run_script(main)
