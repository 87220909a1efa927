"""What the tests share: small drawn data sets, short runs, and ways to run programs."""

import csv
import fcntl
import itertools
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir
import pytest
from PIL import Image

# On the CPU, where results are exact, and with one thread: a second one rounds differently, and is
# of no use on such small images. Programs that a test starts inherit this.
os.environ["OMP_NUM_THREADS"] = "1"
if "TEST_CUDA" not in os.environ:  # tests/test_cuda.py
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# On one core, torch adds this line to those that tests count.
os.environ["PYTHONWARNINGS"] = "ignore:This DataLoader will create:UserWarning"

import torch
from tensorboard.summary.writer import event_file_writer

from datasets.drawn.scene import draw_scene
from datasets.drawn.shapes import make_shapes
from datasets.drawn.streets import make_synthetic
from models.deployed import Deployed
from utils import distributed
from utils.checkpoint import load_checkpoint, load_network, save_checkpoint
from utils.interrupts import Guard

# Ctrl-C is ignored in the background of a shell script, and programs leave it so.
signal.signal(signal.SIGINT, signal.default_int_handler)
# TensorBoard reads the event files of one second in the order of this number, compared as text.
event_numbers = itertools.count()
event_file_writer._global_uid = SimpleNamespace(get=lambda: f"{next(event_numbers):06d}")

ROOT = Path(__file__).parent.parent
CITYSCAPES_WEIGHTS = ROOT / "weights/lednet_d20_cityscapes.pth"
CAMVID_WEIGHTS = ROOT / "weights/lednet_d20_camvid.pth"
FOLDERS = ("datasets", "docs", "examples", "models", "tests", "tools", "utils", "weights")
COUNTS = {"train": 6, "val": 3, "test": 2, "train_extra": 3}

# A locale without letters beyond ASCII, and Python as it was before it took UTF-8 instead.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

CPUINFO = Path("/proc/cpuinfo")  # on Linux
NEEDS_BFLOAT16 = pytest.mark.skipif(
    not CPUINFO.exists() or "avx512_bf16" not in CPUINFO.read_text(),
    reason="this CPU has no bfloat16, or the system does not say so",
)

PRETRAIN_QUICK = ("--size", 32, "--epochs", 1, "--batch-size", 4, "--workers", 0)
QUICK = ("--height", 64, "--num-epochs", 1, "--batch-size", 2, "--workers", 0)


@pytest.fixture(scope="session")
def cityscapes(tmp_path_factory) -> Path:
    """A drawn data set of 128x64 images in the Cityscapes layout; not to be changed."""
    root = tmp_path_factory.mktemp("data") / "cityscapes"
    make_synthetic(root, COUNTS, height=64, workers=2)
    return root


@pytest.fixture
def cityscapes_copy(cityscapes, tmp_path) -> Path:
    """A copy of the drawn data set, to be damaged."""
    return Path(shutil.copytree(cityscapes, tmp_path / "cityscapes"))


def write_pair(
    image: Path, label: Path, size: tuple[int, int], values: Sequence[int], seed: int
) -> None:
    """Draw blocks of some label values, each value in a colour of its own, under noise."""
    rng = np.random.default_rng(seed)
    blocks = rng.choice(values, [-(-length // 24) for length in size])
    ids = np.kron(blocks, np.ones((24, 24), int))[: size[0], : size[1]]
    colors = np.random.default_rng(0).integers(40, 216, (256, 3))
    pixels = (colors[ids] + rng.normal(0, 8, (*size, 3))).clip(0, 255)
    for path, array in ((image, pixels), (label, ids)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.astype(np.uint8)).save(path)


@pytest.fixture(scope="session")
def camvid(tmp_path_factory) -> Path:
    """Drawn images of 96x72, PNGs and JPEGs, in the layout of CamVid; not to be changed."""
    root = tmp_path_factory.mktemp("data") / "camvid"
    for place, (split, count) in enumerate({"train": 6, "val": 3, "test": 2}.items()):
        for number in range(count):
            stem = f"000{place}TP_{number:06d}"
            image = root / split / (stem + (".jpg" if number == 1 else ".png"))
            label = root / f"{split}annot" / f"{stem}.png"
            write_pair(image, label, (72, 96), range(12), seed=10 * place + number)
    return root


@pytest.fixture
def camvid_copy(camvid, tmp_path) -> Path:
    """A copy of the drawn CamVid, to be damaged."""
    return Path(shutil.copytree(camvid, tmp_path / "camvid"))


FIELDS = """# what grows, and what does not
grass 90 160 60
water, 0, 80, 200   # ponds too
ignore

dirt road
"""
FIELD_SIZES = {"train": [(72, 96), (90, 80), (100, 160), (64, 64)], "val": [(72, 96), (96, 72)]}


@pytest.fixture(scope="session")
def fields(tmp_path_factory) -> Path:
    """A folder of images of several sizes, with its classes.txt; not to be changed."""
    root = tmp_path_factory.mktemp("data") / "fields"
    for place, (split, sizes) in enumerate(FIELD_SIZES.items()):
        for number, size in enumerate(sizes):
            image = root / "images" / split / f"{number}{'.jpg' if number == 1 else '.png'}"
            label = root / "labels" / split / f"{number}.png"
            write_pair(image, label, size, range(4), seed=10 * place + number)
    (root / "classes.txt").write_text(FIELDS)
    return root


@pytest.fixture
def fields_copy(fields, tmp_path) -> Path:
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(fields, tmp_path / "fields"))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """Two drawn images of each of six classes in train, one in val; not to be changed."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(root, {"train": 2, "val": 1}, size=(40, 48), workers=2)
    return root


@pytest.fixture
def shapes_copy(shapes, tmp_path) -> Path:
    """A copy of the drawn images, to be damaged."""
    return Path(shutil.copytree(shapes, tmp_path / "shapes"))


def run_script(name: str, *args: object) -> int:
    """Run a script as `python NAME ARGS` would, but in this process; returns its status."""
    argv, sys.argv = sys.argv, [name, *map(str, args)]
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = argv
    return 0


@dataclass
class Result:
    status: int
    out: str
    err: str


class Forked(multiprocessing.get_context("fork").Process):
    """A process of its own that calls a function, without importing everything again.

    Args:
        function: function to call; what it returns is the status of the process.
        folder: existing folder for the files that take what the process prints.
        env: environment variables to set.
    """

    def __init__(self, function: Callable[[], int | None], folder: Path, **env: object) -> None:
        super().__init__(daemon=False)
        self.function, self.env = function, {name: str(value) for name, value in env.items()}
        number = next(event_numbers)
        self.out, self.err = folder / f"out-{number}.txt", folder / f"err-{number}.txt"
        self.start()

    def run(self) -> None:
        os.environ |= self.env
        for number, path in ((1, self.out), (2, self.err)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
        try:
            sys.exit(self.function())
        finally:  # this end would wait for the workers of a loader, and runs no atexit functions
            for child in multiprocessing.active_children():
                child.kill()

    def wait_for(self, text: str, path: Path | None = None, seconds: float = 120) -> None:
        """Wait until the process has printed a text, on stdout or into the file `path`."""
        path, end = path or self.out, time.monotonic() + seconds
        while not path.exists() or text not in path.read_text():
            assert self.is_alive() and time.monotonic() < end, self.err.read_text()
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def finish(self, seconds: float = 120) -> Result:
        """Wait for the end of the process; one that takes too long is killed, and fails."""
        self.join(seconds)
        if self.exitcode is None:
            self.kill()
            self.join()
        return Result(self.exitcode, self.out.read_text(), self.err.read_text())


@pytest.fixture
def script(capsys, monkeypatch, tmp_path) -> Callable[..., Result]:
    """Run a script in tmp_path; returns its status and what it printed."""

    def run(name: str, *args: object) -> Result:
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        status = run_script(name, *args)
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture
def fails(script) -> Callable[..., str]:
    """Run a script that must end in one line on stderr and status 2; returns the line."""

    def run(name: str, *args: object) -> str:
        result = script(name, *args)
        assert result.status == 2, result
        lines = result.err.strip().splitlines()
        assert len(lines) == 1, result.err
        assert lines[0].startswith(f"{Path(name).name}: error: ")
        return lines[0]

    return run


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: writing fails with "File too large"."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="session")
def trained(cityscapes, tmp_path_factory) -> Path:
    """The folder of a short run of main.py, one epoch of each stage; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run_script("main.py", "--datadir", cityscapes, *QUICK, "--savedir", folder) == 0
    return folder


@pytest.fixture(scope="session")
def pretrained(shapes, tmp_path_factory) -> Path:
    """The folder of one epoch of lednet_imagenet.py; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    argv = ("--datadir", shapes, *PRETRAIN_QUICK, "--lr", 0.01, "--savedir", folder)
    assert run_script("lednet_imagenet.py", *argv) == 0
    return folder


@pytest.fixture(scope="session")
def street_network(tmp_path_factory) -> Path:
    """The shipped network of Cityscapes, for images of height 64; not to be changed.

    On the drawn scenes it gets some pixels right of several classes; it never says "train".
    """
    checkpoint = load_checkpoint(CITYSCAPES_WEIGHTS) | {"height": 64}
    train = checkpoint["class_names"].index("train")
    checkpoint["model"]["decoder.classifier.bias"][train] = -100
    path = tmp_path_factory.mktemp("checkpoints") / "streets.pth"
    save_checkpoint(checkpoint, path)
    return path


EXPORTS = {
    "logits": (),
    "labels": ("--labels",),
    "sized": ("--labels", "--size", 96, 192),
}


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A folder of the shipped network of CamVid as logits.onnx and so on, and of what export.py
    printed as logits.txt and so on; not to be changed.

    All workers of pytest-xdist share it: an export takes 10 seconds and more.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, options in EXPORTS.items():
            path = folder / f"{name}.onnx"
            if not path.exists():
                with path.with_suffix(".txt").open("w") as printed, redirect_stdout(printed):
                    argv = ("--checkpoint", CAMVID_WEIGHTS, "--output", path, *options)
                    assert run_script("export.py", *argv) == 0
    return folder


@pytest.fixture
def quick_export(exported, monkeypatch) -> None:
    """Let torch.onnx.export return the network of `exported`, which it must be given, at once."""
    weights = Deployed(load_network(CAMVID_WEIGHTS)[0]).state_dict()

    def export(model, *args, output_names, **options):
        assert same_weights(model.state_dict(), weights)
        program = torch.onnx.ONNXProgram(onnx_ir.load(exported / f"{output_names[0]}.onnx"), None)
        program.model.metadata_props.clear()
        return program

    monkeypatch.setattr(torch.onnx, "export", export)


def wait_for_the_next_second() -> None:
    """TensorBoard reads event files in the order of their names, which begin with the second they
    were opened in; those of one second, and one process, can change places."""
    time.sleep(1 - time.time() % 1)


def fork_two(function: Callable[[], int | None], folder: Path) -> list[Result]:
    """Call a function in two processes that find each other as those of torchrun do.

    Args:
        folder: existing folder for the files that take what the processes print.
    """
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    env = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_USE_AGENT_STORE": True}
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    both = [Forked(function, folder, RANK=rank, LOCAL_RANK=rank, **env) for rank in range(2)]
    return [process.finish() for process in both]


def pretend_processes(
    monkeypatch: pytest.MonkeyPatch, count: int, rank: int = 0, local_processes: int = 1
) -> list[Callable]:
    """Pretend to be one of several processes; return what the first one alone is asked to do."""
    calls = []
    monkeypatch.setattr(distributed, "processes", lambda: count)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "local_processes", lambda: local_processes)
    monkeypatch.setattr(distributed, "first", lambda call: calls.append(call) or call())
    return calls


@contextmanager
def after_step(place: str, action: Callable[[], object]) -> Iterator[None]:
    """Call a function when training has taken a step, before it checks whether to save or stop.

    Args:
        place: the step, such as "step 2 of epoch 1 of stage 2".
        action: function to call, the first time only.
    """
    done: list[str] = []

    def note_loss(guard: Guard, *args: object, note_loss=Guard.note_loss) -> None:
        note_loss(guard, *args)
        if guard.state.place() == place and not done:
            done.append(place)
            action()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "note_loss", note_loss)
        yield


def send(number: int) -> Callable[[], None]:
    """Return a function that sends a signal to the process that calls it."""
    return lambda: os.kill(os.getpid(), number)


def tracked_files(*suffixes: str) -> list[Path]:
    """Return the files of the repository with these suffixes.

    Environments that lie in the clone are none of ours: git knows what is, and without git the
    names of our folders do.
    """
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    if not paths:
        paths = [*ROOT.iterdir(), *(path for name in FOLDERS for path in (ROOT / name).rglob("*"))]
    return sorted(path for path in paths if path.suffix in suffixes and path.is_file())


def street_scenes(count: int, size: tuple[int, int]) -> torch.Tensor:
    """Drawn images, N x 3 x H x W, RGB in [0, 1], of any height and width."""
    scenes = [draw_scene(np.random.default_rng(7 + n), 256).image for n in range(count)]
    images = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)


def read_log(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's log."""
    with (folder / "log.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
