"""What the tests share: a small drawn Cityscapes, and a way to run the scripts."""

import os
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# On the CPU, where results are exact: tools/measure_gpu.sh is what tries a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

from datasets.synthetic import make_synthetic

ROOT = Path(__file__).parent.parent
COUNTS = {"train": 6, "val": 3, "test": 2, "train_extra": 3}
# The images of the tests are so small that a second thread costs more than it gives.
torch.set_num_threads(1)

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


@pytest.fixture(scope="session")
def trained(cityscapes, tmp_path_factory) -> Path:
    """The folder of a short run of main.py, one epoch of each stage; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run_script("main.py", "--datadir", cityscapes, *QUICK, "--savedir", folder) == 0
    return folder
