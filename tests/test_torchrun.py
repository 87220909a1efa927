"""Both programs in two processes, as torchrun starts them."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, Result, read_log, run_script

from datasets.drawn.shapes import make_shapes
from datasets.drawn.streets import make_synthetic
from utils.checkpoint import load_checkpoint
from utils.run_folder import claimed

sys.path.insert(0, str(ROOT / "tools"))

from fault_compare import differences, records

SECONDS = 500  # that a run may take
ONE_LINE = re.compile(r"^(?:main|lednet_imagenet)\.py: .*$", re.MULTILINE)


def torchrun(*command: object, save: Path | None = None) -> Result:
    """Run a script in two processes; one that takes too long fails the test.

    Args:
        save: its --savedir.
    """
    output = ("--savedir", save) if save else ()
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    process = subprocess.Popen(
        [*map(str, (*start, *command, *output))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Result(process.returncode, out, err)


def lines_of(result: Result) -> list[str]:
    """What the processes themselves wrote on stderr: torchrun writes as well."""
    return ONE_LINE.findall(result.err)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Three steps an epoch of two processes with 2 images each; 3 images of val."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    make_synthetic(root, {"train": 12, "val": 3, "test": 1, "train_extra": 1}, 64, workers=2)
    return root


def recipe(scenes: Path) -> tuple:
    """Both stages, with all that a step of training changes."""
    return (
        *("main.py", "--datadir", scenes, "--height", 64, "--batch-size", 2, "--D", 4),
        *("--workers", 1, "--augment", "strong", "--ema", "--loss", "ohem", "--aux-weight", 0.4),
        *("--encoder-epochs", 1, "--epochs", 2, "--schedule", "onecycle", "--iouTrain"),
        *("--steps-loss", 1, "--device", "cpu"),
    )


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory) -> tuple[Path, Result]:
    """The folder of a run of main.py that was never stopped, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, torchrun(*recipe(scenes), save=folder)


@pytest.fixture(scope="module")
def stopped(scenes, tmp_path_factory) -> tuple[Path, Result]:
    """The folder of one whose second process got a SIGTERM in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    moment = "signal 15 after step 2 of epoch 1 of stage 2"
    return folder, torchrun("tests/disturbed.py", moment, 1, *recipe(scenes), save=folder)


def assert_written_once(folder: Path, result: Result, rows: int, steps: int) -> None:
    log = read_log(folder)
    assert len(log) == rows
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert all(len(values) == 1 for values in records(folder).values())
    printed = Counter(result.out.splitlines())
    assert sum("steps of" not in line and "step " in line for line in printed) == steps
    assert max(count for line, count in printed.items() if line.strip()) == 1
    assert not [path for path in folder.iterdir() if "unfinished" in path.name]


def test_two_processes_train_both_stages_and_the_first_writes(whole):
    folder, result = whole
    assert result.status == 0, result.err
    assert lines_of(result) == []
    assert_written_once(folder, result, rows=3, steps=9)
    assert "in batches of 2 in each of 2 processes" in result.out
    names = {path.name for path in folder.glob("*.pth")}
    assert names == {"last.pth", "previous.pth", "best.pth", "encoder.pth"}
    assert len(load_checkpoint(folder / "last.pth")["processes"]) == 2


def test_a_signal_to_one_process_stops_both_and_says_how_to_go_on(stopped):
    folder, result = stopped
    assert result.status != 0
    (line,) = [line for line in lines_of(result) if "stopped" in line]
    assert line == (
        "main.py: stopped by SIGTERM, saved after step 2 of epoch 1 of stage 2, to go on: torchrun "
        f"--nproc-per-node 2 {shlex.quote(str(ROOT / 'main.py'))} --savedir {folder} --resume"
    )
    # Where torchrun sees the end of one first, it sends the other, which is ending, a SIGTERM.
    exit_codes = set(re.findall(r"exitcode  : (-?\d+)", result.err))
    assert "143" in exit_codes and exit_codes <= {"143", "-15"}


def test_two_processes_that_go_on_end_as_those_that_never_stopped(whole, stopped, tmp_path):
    folder = shutil.copytree(stopped[0], tmp_path / "again")
    result = torchrun("main.py", "--resume", save=folder)
    assert result.status == 0, result.err
    assert "resuming after step 2 of epoch 1 of stage 2" in result.out
    assert "note: " not in result.out
    assert differences(folder, whole[0]) == []


def test_one_process_goes_on_and_says_what_differs(stopped, tmp_path, capsys):
    folder = shutil.copytree(stopped[0], tmp_path / "again")
    assert run_script("main.py", "--savedir", folder, "--resume") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: steps are of 2 images, not 4, and the learning rate follows the new number of "
        "steps: other weights than without the stop",
        "note: the number of processes is 1, not 2: images keep their order and augmentation, but "
        "dropout, batch statistics and rounding differ",
    ]
    log = read_log(folder)
    assert [(row["stage"], row["epoch"]) for row in log] == [("1", "1"), ("2", "1"), ("2", "2")]
    assert load_checkpoint(folder / "last.pth")["processes"][0]["totals"] == {}


def test_two_processes_score_as_one(whole, scenes, tmp_path):
    """3 images: one process has two of them, and none counts twice."""
    script = ("eval_cityscapes_server.py", "--datadir", scenes, "--device", "cpu")
    found, written = [], []
    for name, start in (("one", run_script), ("two", lambda *argv: torchrun(*argv).status)):
        folder, figures = tmp_path / name, tmp_path / f"{name}.json"
        options = ("--checkpoint", whole[0] / "best.pth", "--save-results", folder)
        assert start(*script, *options, "--json", figures) == 0
        written.append({path.name: path.read_bytes() for path in folder.rglob("*.png")})
        found.append(json.loads(figures.read_text()))
    scores = ("class_iou", "category_iou", "class_miou", "pixel_accuracy", "images")
    assert [found[0][name] for name in scores] == [found[1][name] for name in scores]
    assert [figures["processes"] for figures in found] == [1, 2]
    assert len(written[0]) == 3 and written[0] == written[1]


def test_a_folder_in_use_is_refused_to_both_processes(scenes, tmp_path):
    with claimed(tmp_path / "run"):
        result = torchrun(*recipe(scenes), save=tmp_path / "run")
    assert result.status != 0
    lines = lines_of(result)
    assert lines and all("another run is writing into" in line for line in lines), result.err
    assert not list((tmp_path / "run").glob("*.*"))


def test_a_process_that_is_killed_ends_the_other_with_a_word(scenes, tmp_path):
    moment = "signal 9 after step 2 of epoch 1 of stage 1"
    started = time.monotonic()
    result = torchrun("tests/disturbed.py", moment, 1, *recipe(scenes), save=tmp_path / "run")
    assert result.status != 0 and time.monotonic() - started < 250
    (line,) = [line for line in lines_of(result) if "error: " in line]
    assert "another process ended without a word: was it killed" in line


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Three steps an epoch; 6 images of val."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(root, {"train": 2, "val": 1}, size=(40, 48), workers=2)
    return root


CLASSIFIER = ("--size", 32, "--batch-size", 2, "--epochs", 2, "--workers", 1, "--lr", 0.01)


def test_the_other_program_trains_in_two_processes_too(drawn, tmp_path):
    result = torchrun(
        *("lednet_imagenet.py", "--datadir", drawn, *CLASSIFIER, "--recipe", "modern"),
        *("--steps-loss", 1, "--device", "cpu"),
        save=tmp_path / "run",
    )
    assert result.status == 0, result.err
    assert lines_of(result) == []
    assert_written_once(tmp_path / "run", result, rows=2, steps=6)
    assert len(load_checkpoint(tmp_path / "run/last.pth")["processes"]) == 2


def test_an_image_that_one_process_cannot_read_ends_both_in_one_line(drawn, tmp_path):
    folder = Path(shutil.copytree(drawn, tmp_path / "broken"))
    image = sorted(folder.glob("train/*/*"))[5]
    good = image.read_bytes()
    middle = len(good) // 2
    image.write_bytes(good[:middle] + bytes(len(good) - middle - 4) + good[-4:])
    argv = ("lednet_imagenet.py", "--datadir", folder, *CLASSIFIER, "--device", "cpu")
    result = torchrun(*argv, save=tmp_path / "run")
    assert result.status != 0
    (line,) = lines_of(result)
    assert image.name in line and "to go on: torchrun --nproc-per-node 2" in line, line
    assert "step" in load_checkpoint(tmp_path / "run/last.pth")
