import csv
import errno
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ASCII, ROOT, Forked, full_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils import distributed
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.files import WriteError
from utils.run_folder import (
    FolderInUse,
    FolderLocked,
    NoRun,
    check_free,
    load_run,
    locked_folder,
    open_run,
    read_args,
    resume_command,
    run_path,
    tensorboard_tag,
)


def options(folder: Path, resume: bool = False, **others: object) -> Namespace:
    return Namespace(savedir=str(folder), resume=resume, encoder_epochs=1, **others)


def state(epoch: int, stage: int = 1) -> dict:
    """Return what a checkpoint needs to be resumed from."""
    weights = {"weight": torch.ones(3)}
    return {"stage": stage, "epoch": epoch, "optimizer": 0, "processes": 0, "model": weights}


def save_epochs(folder: Path, *epochs: int) -> None:
    with open_run(options(folder)) as run:
        for epoch in epochs:
            run.save(state(epoch))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


# What a run writes


RECORD = r"""
from argparse import Namespace
from utils.run_folder import open_run, read_log
with open_run(Namespace(savedir="run", resume=False, encoder_epochs=0)) as run:
    run.begin()
    run.record({"stage": 2, "epoch": 1, "iou Stra\u00dfe": 0.5}, 1, [])
    run.record({"stage": 2, "epoch": 2, "iou Stra\u00dfe": 0.5}, 2, [])
assert [row["iou Stra\u00dfe"] for row in read_log(run.folder / "log.csv")] == ["0.5"] * 2
"""


def test_the_log_is_utf_8_in_any_locale(tmp_path):
    """Without UTF-8 mode, too, as on Windows."""
    env = os.environ | ASCII | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", RECORD], cwd=tmp_path, env=env, check=True)
    assert "iou Straße" in (tmp_path / "run/log.csv").read_text(encoding="utf-8")


# Where a run writes


def test_a_name_lies_under_save_and_a_path_is_taken_as_it_is():
    assert run_path("first", "cityscapes") == Path("save/first")
    assert run_path("/tmp/first", "cityscapes") == Path("/tmp/first")
    assert run_path("./first", "cityscapes") == Path("first")
    assert run_path(None, "cityscapes").match("save/cityscapes-*-*")


def test_the_command_that_resumes_a_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--savedir", "x"])
    assert resume_command(Path("save/my run")) == "python main.py --savedir 'my run' --resume"
    assert resume_command(Path("/runs/a")) == "python main.py --savedir /runs/a --resume"
    for path in ("./runs", "runs/", "./my run/"):
        command = shlex.split(resume_command(run_path(path, "")))
        assert run_path(command[3], "") == Path(path)
    monkeypatch.setattr(distributed, "processes", lambda: 4)
    monkeypatch.setattr(distributed, "local_processes", lambda: 4)
    start = "torchrun --nproc-per-node 4"
    assert resume_command(Path("save/a")) == f"{start} main.py --savedir a --resume"
    monkeypatch.setattr(distributed, "processes", lambda: 8)
    assert resume_command(Path("save/a")) == f"{start} ... main.py --savedir a --resume"


@pytest.mark.parametrize(
    "name",
    ["args.json", "log.csv", "last.pth", "previous.pth", "best.pth", "encoder.pth",
     "stage2-epoch001.pth", "class_counts.json", "events.out.tfevents.1"],
)  # fmt: skip
def test_a_folder_that_holds_a_run_is_refused(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(FolderInUse, match=rf"holds a run already \({name}\)"):
        with open_run(options(tmp_path)):
            pass
    assert (tmp_path / name).read_text() == "precious" and names_in(tmp_path) == {name}


def test_a_folder_with_other_files_is_free(tmp_path):
    (tmp_path / "slurm.log").write_text("")
    check_free(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file/run cannot be written"):
        with locked_folder(tmp_path / "file" / "run"):
            pass


def test_a_folder_belongs_to_one_run_until_its_process_ends(tmp_path):
    """Also if the process is killed."""
    folder = tmp_path / "run"

    def hold() -> None:
        with locked_folder(folder):
            print("locked")
            time.sleep(60)

    other = Forked(hold, tmp_path)
    other.wait_for("locked")
    with pytest.raises(FolderLocked, match="another run is writing into"):
        with open_run(options(folder)):
            pass
    assert folder.is_dir()
    other.kill()
    other.finish()
    with locked_folder(folder):
        pass


def test_a_folder_that_nothing_was_written_into_is_removed(tmp_path):
    folder = tmp_path / "deep/run"
    with pytest.raises(ValueError), open_run(options(folder)):
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with locked_folder(folder):
        (folder / "log.csv").write_text("")
    with locked_folder(folder):
        (folder / ".log.csv-0123abcd.unfinished.csv").write_text("killed")
    with locked_folder(folder):
        assert names_in(folder) == {"log.csv"}


def test_a_folder_that_is_gone_or_shared_at_the_end_hides_no_error(tmp_path):
    with pytest.raises(ValueError), locked_folder(tmp_path / "deep/run"):
        shutil.rmtree(tmp_path / "deep")
        raise ValueError
    with pytest.raises(ValueError), locked_folder(tmp_path / "deep/run"):
        (tmp_path / "deep/another").mkdir()
        raise ValueError
    assert [path.name for path in tmp_path.rglob("*")] == ["deep", "another"]


# Options


def test_a_resume_keeps_the_options_and_changes_to_them(tmp_path):
    with open_run(options(tmp_path / "a", batch_size=4)) as run:
        run.begin()
    (tmp_path / "a").rename(tmp_path / "b")
    with open_run(options(tmp_path / "b", resume=True, batch_size=2)) as run:
        run.begin()
    expected = options(tmp_path / "a", batch_size=2)
    assert read_args(tmp_path / "b") == vars(expected)


def test_options_that_stay_the_same_are_not_written_again(tmp_path):
    written = []
    for resume in (False, True):
        with open_run(options(tmp_path, resume)) as run:
            run.begin()
        found = (tmp_path / "args.json").stat()
        written.append((found.st_ino, found.st_mtime_ns))
    assert written[0] == written[1]


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_without_options_there_is_no_run_to_resume(tmp_path, content):
    if content is not None:
        (tmp_path / "args.json").write_text(content)
    with pytest.raises(NoRun, match=r"holds no run to resume: args\.json"):
        read_args(tmp_path)


def test_stored_results_count_only_for_the_same_data(tmp_path):
    with open_run(options(tmp_path, datadir="a")) as run:
        assert run.class_counts() is None
        run.begin()
        run.write_json("class_counts.json", {"road": 3})
    with open_run(options(tmp_path, resume=True, datadir="a")) as run:
        assert run.class_counts() == {"road": 3}
        (tmp_path / "class_counts.json").write_text('{"road":')
        assert run.class_counts() is None
        run.write_json("class_counts.json", {"road": 3})
    assert json.loads((tmp_path / "class_counts.json").read_text()) == {"road": 3}
    with open_run(options(tmp_path, resume=True, datadir="b")) as run:
        assert run.class_counts() is None


# Checkpoints


def test_the_checkpoint_before_the_last_is_kept(tmp_path):
    assert load_run(tmp_path) is None
    save_epochs(tmp_path, 0, 1, 2, 3)
    assert load_run(tmp_path)["epoch"] == 3
    assert load_checkpoint(tmp_path / "previous.pth")["epoch"] == 2
    assert names_in(tmp_path) == {"last.pth", "previous.pth"}


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut short":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[content.index(torch.ones(3).numpy().tobytes())] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "empty", "cut short", "a flipped bit"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tmp_path, capsys, how):
    save_epochs(tmp_path, 0, 1, 2)
    damage(tmp_path / "last.pth", how)
    with open_run(options(tmp_path, resume=True)) as run:
        assert run.resumed["epoch"] == 1
        out = capsys.readouterr().out
        assert "last.pth" in out and f"resuming from {tmp_path / 'previous.pth'}" in out
        assert (tmp_path / "damaged-last.pth").exists() == (how != "missing")
        # The damaged file is not copied over the good one.
        run.save(state(2))
    assert load_checkpoint(tmp_path / "previous.pth")["epoch"] == 1
    damage(tmp_path / "last.pth", how)
    damage(tmp_path / "previous.pth", "a flipped bit")
    with pytest.raises(CheckpointError, match=r"previous\.pth is damaged"):
        load_run(tmp_path)


def test_checkpoints_that_were_removed_are_missed(tmp_path):
    with open_run(options(tmp_path)) as run:
        run.begin()
        run.record({"epoch": 1}, 1, [])
        assert load_run(tmp_path) is None  # killed before its first checkpoint
        run.record({"epoch": 2}, 2, [])
    with pytest.raises(CheckpointError, match=r"last\.pth and .* are missing"):
        load_run(tmp_path)
    (tmp_path / "log.csv").unlink()
    (tmp_path / "damaged-last.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.pth and .* are missing"):
        load_run(tmp_path)


def test_the_best_network_is_not_the_state_of_a_run(tmp_path):
    with open_run(options(tmp_path)) as run:
        run.save_network({"stage": 2, "model": {"w": torch.zeros(1)}}, "last.pth")
    with pytest.raises(CheckpointError, match=r"last\.pth is not the state of a run"):
        load_run(tmp_path)


def test_finished_stages_and_epochs_are_those_of_the_checkpoint(tmp_path):
    found = []
    for resumed in (None, state(3, stage=1), state(2, stage=2), state(4, stage=0)):
        with open_run(options(tmp_path)) as run:
            run.resumed = resumed
            found.append((run.past_stage(1), run.epochs_done()))
    assert found == [(False, 0), (False, 3), (True, 1 + 2), (False, 4)]


# Disks that are full


def test_a_full_disk_keeps_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    save_epochs(tmp_path, 1)
    large = state(2) | {"model": {"weight": torch.rand(9_000)}}
    with open_run(options(tmp_path, resume=True)) as run, pytest.raises(WriteError) as raised:
        with full_disk(20_000):
            run.save(large)
    assert str(raised.value) == f"{tmp_path / 'last.pth'} cannot be written (File too large)"
    how = f"then resume with: python main.py --savedir {tmp_path} --resume"
    assert raised.value.__notes__ == [how]
    assert load_run(tmp_path)["epoch"] == 1
    assert names_in(tmp_path) == {"last.pth", "previous.pth"}


def test_a_full_disk_keeps_a_checkpoint_that_replaces_a_damaged_one(tmp_path, monkeypatch):
    save_epochs(tmp_path, 0, 1)
    damage(tmp_path / "last.pth", "cut short")

    def full(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(WriteError, match=r"last\.pth cannot be"):
        patch.setattr("shutil.copyfile", full)
        load_run(tmp_path)
    assert load_run(tmp_path)["epoch"] == 0


@pytest.mark.parametrize(("records", "room"), [(1, 10), (1, 150), (500, 3000)])
def test_a_full_disk_under_tensorboard_is_neither_silent_nor_endless(tmp_path, records, room):
    """TensorBoard writes in a thread, which then is dead."""

    def fill() -> None:
        with open_run(options(tmp_path / "run")) as run:
            run._write_log = lambda rows: None  # the log is not at issue here
            run.write_json = lambda name, content: None
            run.begin()
            with full_disk(room):
                for step in range(records):
                    run.record({"lr": 1.0, "train_loss": 2.0, "val_loss": 3.0}, step, [])
                run.close()

    def main() -> None:
        try:
            fill()
        except WriteError as error:
            print(f"{error}; {error.__notes__[0]}")

    end = Forked(main, tmp_path).finish(60)
    assert (end.status, end.err) == (0, "")
    message = f"{tmp_path}/run/events.out.tfevents.* cannot be written (File too large)"
    _, line = end.out.splitlines()  # after the folder of the run
    assert line.startswith(f"{message}; then resume with: ")


def test_errors_of_other_threads_are_printed(tmp_path, capsys):
    with open_run(options(tmp_path)) as run:
        run.begin()
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    assert "ZeroDivisionError" in capsys.readouterr().err


# The log and TensorBoard


def train(folder: Path, *epochs: tuple[int, int], saved: tuple[int, int] | None = None) -> None:
    """Start or resume a run, and record these epochs of stages.

    Args:
        saved: epoch after which the last checkpoint is written.
    """
    with open_run(options(folder, resume=(folder / "args.json").exists())) as run:
        run.begin()
        for stage, epoch in epochs:
            step = (stage - 1) * run.args.encoder_epochs + epoch
            row = {"stage": stage, "epoch": epoch, "train_loss": stage / epoch, "iou sky": math.nan}
            run.record(row, step, [torch.full((3, 8, 8), step, dtype=torch.uint8)])
            if (stage, epoch) == saved:
                run.save(state(epoch, stage))


def logged(folder: Path) -> list[tuple[int, int]]:
    with (folder / "log.csv").open() as file:
        return [(int(row["stage"]), int(row["epoch"])) for row in csv.DictReader(file)]


def shown(folder: Path) -> dict[str, list[int]]:
    """Return the steps that TensorBoard shows of each tag, as often as it shows them."""
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    found = {tag: [event.step for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return found | {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}


def test_a_resumed_run_shows_each_epoch_once(tmp_path):
    """Stopped twice after more epochs than it had saved."""
    train(tmp_path, (1, 1), (2, 1), (2, 2), (2, 3), saved=(2, 1))
    train(tmp_path, (2, 2), (2, 3), (2, 4), saved=(2, 3))
    train(tmp_path, (2, 4), saved=(2, 4))
    assert logged(tmp_path) == [(1, 1), (2, 1), (2, 2), (2, 3), (2, 4)]
    assert shown(tmp_path) == {"loss/train": [1, 2, 3, 4, 5], "val/0": [1, 2, 3, 4, 5]}
    assert len(list(tmp_path.glob("events.*"))) == 3
    before = (tmp_path / "log.csv").read_bytes()
    train(tmp_path)  # it is finished
    assert (tmp_path / "log.csv").read_bytes() == before
    assert shown(tmp_path) == {"loss/train": [1, 2, 3, 4, 5], "val/0": [1, 2, 3, 4, 5]}


def test_a_run_that_saved_nothing_begins_anew(tmp_path):
    train(tmp_path, (1, 1))
    train(tmp_path, (1, 1), (2, 1))
    assert logged(tmp_path) == [(1, 1), (2, 1)]
    assert shown(tmp_path) == {"loss/train": [1, 2], "val/0": [1, 2]}


def test_events_that_a_kill_cut_short_hide_no_later_ones(tmp_path):
    train(tmp_path, (1, 1), (2, 1), saved=(1, 1))
    (path,) = tmp_path.glob("events.*")
    path.write_bytes(path.read_bytes()[:-10])  # of the picture of step 2
    train(tmp_path, (2, 1), (2, 2))
    assert shown(tmp_path) == {"loss/train": [1, 2, 3], "val/0": [1, 2, 3]}


def test_tags_of_tensorboard_follow_from_the_columns(tmp_path):
    tags = {
        "train_loss": "loss/train",
        "val_top1": "top1/val",
        "iou traffic light": "iou/traffic light",
    }
    assert [tensorboard_tag(column) for column in tags] == list(tags.values())
    assert tensorboard_tag("images_per_second") == "images_per_second"
    with open_run(options(tmp_path)) as run:
        run.begin()
        run.record({"stage": 1, "epoch": 1, "seconds": 9.0, "lr": 0.5, "../../out": 1.0}, 1, [])
    assert shown(tmp_path) == {"lr": [1], "../../out": [1]}
    assert not (tmp_path.parent.parent / "out").exists()


def test_a_newer_version_may_log_more_columns(tmp_path):
    with open_run(options(tmp_path)) as run:
        run.begin()
        run.record({"epoch": 1, "loss": 0.5, "old": 7}, 1, [])
        run.record({"new": 9, "loss": 0.25, "epoch": 2}, 2, [])
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines == ["epoch,loss,old,new", "1,0.5,7,nan", "2,0.25,nan,9"]
