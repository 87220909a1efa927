"""Options and fixtures of the trials of faults; docs/reliability.md says how to run them."""

import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from datasets.drawn.shapes import make_shapes
from datasets.drawn.streets import make_synthetic
from faults.trials import PROGRAMS, SCENES, SHAPES, Program, Programs, Trial

SHARE = "0.1"  # of the trials in docs/reliability.md


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--fault-seed", type=int, default=0, help="seed of the trials; default 0")
    group.addoption("--fault-tries", default=SHARE, help=f"share, or full; default {SHARE}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("trials")
    if marker:
        # pytest reads these options only if tests/faults is named on its command line.
        option = metafunc.config.getoption("fault_tries", SHARE)
        share = 1.0 if option == "full" else float(option)
        trials = [
            pytest.param((case, number), id=f"{case}-{number}", marks=pytest.mark.slow)
            for case, count in marker.kwargs.items()
            for number in range(max(1, math.ceil(share * count)))
        ]
        metafunc.parametrize("trial", trials, indirect=True)


@pytest.fixture
def trial(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Trial]:
    """A trial of a fault; nothing that it starts may be left running."""
    seed = request.config.getoption("fault_seed", 0)
    trial = Trial(*request.param, Random(f"{seed} {request.node.name}"), tmp_path)
    yield trial
    trial.assert_ended()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with drawn scenes and shapes, and pictures that take a while to write."""
    folder = tmp_path_factory.mktemp("data")
    make_synthetic(folder / "scenes", SCENES, height=64)
    make_shapes(folder / "shapes", SHAPES, size=(40, 48))
    (folder / "pictures").mkdir()
    for path in folder.glob("scenes/leftImg8bit/train/*/*.png"):
        with Image.open(path) as image:
            image.resize((1024, 512)).save(folder / "pictures" / path.name)
    return folder


@pytest.fixture(scope="session")
def program(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Return one of PROGRAMS after an undisturbed run."""

    @cache
    def after_a_run(name: str) -> Program:
        folder = tmp_path_factory.mktemp(name)
        images = data / ("shapes" if name == "imagenet" else "scenes")
        begin = [sys.executable, *PROGRAMS[name].split(), "--datadir", images]
        program = Program(begin, folder / "run")
        program.run_undisturbed()
        return program

    return after_a_run
