"""The programs in two processes. Two tests start torchrun itself; in the others the processes are
forked, which spares them the imports."""

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
from compare import differences
from conftest import ROOT, Result, after_step, fork_two, read_log, run_script, send

from datasets.drawn.streets import make_synthetic
from utils.checkpoint import load_checkpoint
from utils.run_folder import locked_folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Drawn scenes: three steps an epoch for two processes with 2 images each, and 3 of val."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    make_synthetic(root, {"train": 12, "val": 3, "test": 1, "train_extra": 1}, 64, workers=2)
    return root


def recipe(scenes: Path, folder: Path) -> tuple:
    """Return the command of both stages, with everything that a step of training can change."""
    return (
        *("main.py", "--datadir", scenes, "--height", 64, "--batch-size", 2, "--D", 4),
        *("--workers", 0, "--augment", "strong", "--ema", "--loss", "ohem", "--aux-weight", 0.4),
        *("--encoder-epochs", 1, "--epochs", 2, "--schedule", "onecycle", "--iouTrain"),
        *("--steps-loss", 1, "--device", "cpu", "--savedir", folder),
    )


def run_two(folder: Path, *command: object) -> list[Result]:
    """Run a script in two processes."""
    return fork_two(lambda: run_script(*command), folder)


def torchrun(*command: object) -> Result:
    """Run a script with torchrun; one that takes too long fails the test."""
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    process = subprocess.Popen(
        [*map(str, (*start, *command))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Result(process.returncode, out, err)


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory) -> tuple[Path, list[Result]]:
    """The folder of a run that was never stopped, and what its processes printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run_two(folder.parent, *recipe(scenes, folder))


@pytest.fixture(scope="module")
def stopped(scenes, tmp_path_factory) -> tuple[Path, Result]:
    """The folder of a run whose second process got a SIGTERM in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    disturbed = ("tests/disturbed.py", signal.SIGTERM.value, 1, "step 2 of epoch 1 of stage 2")
    return folder, torchrun(*disturbed, *recipe(scenes, folder))


def assert_written_once(folder: Path, out: str, rows: int, steps: int) -> None:
    assert len(read_log(folder)) == rows
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    printed = Counter(line for line in out.splitlines() if line)
    assert sum(": step " in line for line in printed) == steps
    assert max(printed.values()) == 1
    assert not list(folder.glob(".*.unfinished.*"))


def test_two_processes_train_both_stages_and_the_first_one_writes(whole):
    folder, (first, second) = whole
    assert (first.status, first.err) == (second.status, second.err) == (0, "")
    assert second.out == ""
    assert_written_once(folder, first.out, rows=3, steps=9)
    assert "in batches of 2 in each of 2 processes" in first.out
    names = {path.name for path in folder.glob("*.pth")}
    assert names == {"last.pth", "previous.pth", "best.pth", "encoder.pth"}
    assert len(load_checkpoint(folder / "last.pth")["processes"]) == 2


def test_a_signal_to_one_process_stops_both_and_prints_how_to_go_on(stopped):
    folder, result = stopped
    assert result.status != 0
    (line,) = re.findall(r"^main\.py: stopped.*$", result.err, re.MULTILINE)
    assert line == (
        "main.py: stopped by SIGTERM, saved after step 2 of epoch 1 of stage 2; resume with: "
        f"torchrun --nproc-per-node 2 {shlex.quote(str(ROOT / 'main.py'))} "
        f"--savedir {folder} --resume"
    )
    # torchrun sends a SIGTERM to the process that ends last.
    exit_codes = set(re.findall(r"exitcode  : (-?\d+)", result.err))
    assert "143" in exit_codes and exit_codes <= {"143", "-15"}


def test_two_processes_that_resume_end_like_those_that_never_stopped(whole, stopped, tmp_path):
    folder = shutil.copytree(stopped[0], tmp_path / "again")
    result = torchrun("main.py", "--savedir", folder, "--resume")
    assert result.status == 0, result.err
    assert "resuming after step 2 of epoch 1 of stage 2" in result.out
    assert "note: " not in result.out
    assert differences(folder, whole[0]) == []


def test_one_process_resumes_the_run_of_two_and_says_what_differs(stopped, tmp_path, capsys):
    folder = shutil.copytree(stopped[0], tmp_path / "again")
    assert run_script("main.py", "--savedir", folder, "--resume") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert notes[0].startswith("note: steps are of 2 images now, not 4, ")
    assert notes[1].startswith("note: the number of processes is 1, not 2: images keep their order")
    log = read_log(folder)
    assert [(row["stage"], row["epoch"]) for row in log] == [("1", "1"), ("2", "1"), ("2", "2")]
    assert load_checkpoint(folder / "last.pth")["processes"][0]["totals"] == {}


def test_a_killed_process_ends_the_other_and_the_run_can_be_resumed(scenes, whole, tmp_path):
    folder, started = tmp_path / "run", time.monotonic()

    def kill_second() -> None:
        if os.environ["RANK"] == "1":
            send(signal.SIGKILL)()

    with after_step("step 2 of epoch 1 of stage 1", kill_second):
        command = (*recipe(scenes, folder), "--checkpoint-minutes", 0)
        first, second = run_two(tmp_path, *command)
    assert second.status == -signal.SIGKILL and time.monotonic() - started < 100
    assert first.status == 2
    (line,) = first.err.splitlines()
    assert "another process ended without reporting an error: was it killed" in line
    first, second = run_two(tmp_path, "main.py", "--savedir", folder, "--resume")
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "resuming after step 1 of epoch 1 of stage 1" in first.out
    assert differences(folder, whole[0]) == []


def test_a_folder_in_use_is_refused_to_both_processes(scenes, tmp_path):
    with locked_folder(tmp_path / "run"):
        first, second = run_two(tmp_path, *recipe(scenes, tmp_path / "run"))
    assert (first.status, second.status) == (2, 2)
    assert "another run is writing into" in first.err and first.err.count("\n") == 1
    assert second.err == first.err
    assert not list((tmp_path / "run").glob("*.*"))


def test_two_processes_score_like_one(whole, scenes, tmp_path):
    """Of 3 images one process gets two, and none counts twice."""
    command = ("eval_cityscapes_server.py", "--datadir", scenes, "--device", "cpu")
    command = (*command, "--checkpoint", whole[0] / "best.pth")
    found, written = [], []
    for name in ("one", "two"):
        folder, figures = tmp_path / name, tmp_path / f"{name}.json"
        argv = (*command, "--save-results", folder, "--json", figures)
        if name == "one":
            assert run_script(*argv) == 0
        else:
            results = run_two(tmp_path, *argv)
            assert [result.status for result in results] == [0, 0], results
        written.append({path.name: path.read_bytes() for path in folder.rglob("*.png")})
        found.append(json.loads(figures.read_text()))
    scores = ("class_iou", "category_iou", "class_miou", "pixel_accuracy", "images")
    assert [found[0][name] for name in scores] == [found[1][name] for name in scores]
    assert [figures["processes"] for figures in found] == [1, 2]
    assert len(written[0]) == 3 and written[0] == written[1]


CLASSIFIER = ("--size", 32, "--batch-size", 2, "--epochs", 2, "--workers", 0, "--lr", 0.01)


def test_two_processes_pretrain_too(shapes, tmp_path):
    argv = ("lednet_imagenet.py", "--datadir", shapes, *CLASSIFIER, "--recipe", "modern")
    more = ("--steps-loss", 1, "--device", "cpu", "--savedir", tmp_path / "run")
    first, second = run_two(tmp_path, *argv, *more)
    assert (first.status, first.err) == (second.status, second.err) == (0, "")
    assert_written_once(tmp_path / "run", first.out, rows=2, steps=6)
    assert len(load_checkpoint(tmp_path / "run/last.pth")["processes"]) == 2


def test_an_image_that_one_process_cannot_read_ends_both_in_one_line(shapes_copy, tmp_path):
    image = sorted(shapes_copy.glob("train/*/*"))[5]

    def cut() -> None:
        image.write_bytes(image.read_bytes()[:300])

    argv = ("lednet_imagenet.py", "--datadir", shapes_copy, *CLASSIFIER, "--device", "cpu")
    with after_step("step 1 of epoch 1", cut):
        first, second = run_two(tmp_path, *argv, "--savedir", tmp_path / "run")
    assert (first.status, second.status) == (2, 2)
    (line,) = (first.err + second.err).splitlines()
    assert image.name in line and "resume with: torchrun --nproc-per-node 2" in line, line
    assert "step" in load_checkpoint(tmp_path / "run/last.pth")
