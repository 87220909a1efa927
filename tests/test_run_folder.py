import argparse
import errno
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compare import shown
from conftest import Forked, full_disk, read_log

from utils import distributed
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.errors import UserError
from utils.files import WriteError
from utils.run_folder import (
    FolderInUse,
    NoRun,
    Run,
    check_free,
    load_run,
    locked_folder,
    open_run,
    read_args,
    resume_command,
    run_path,
)

STATE = dict.fromkeys(("stage", "epoch", "optimizer", "processes"), 0)
STATE |= {"model": {"weight": torch.ones(3)}}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def options(folder: Path, **more: object) -> argparse.Namespace:
    return argparse.Namespace(savedir=str(folder), resume=False, encoder_epochs=0, **more)


@pytest.fixture
def run(tmp_path) -> Iterator[Run]:
    """A run in tmp_path, as open_run would make it."""
    run = Run(options(tmp_path), tmp_path, None)
    with run.opened:
        yield run


# Names and options


def test_a_name_means_a_folder_under_save_and_a_path_itself():
    assert run_path("first", "cityscapes") == Path("save/first")
    assert run_path("/tmp/first", "cityscapes") == Path("/tmp/first")
    assert run_path("./first", "cityscapes") == Path("first")
    assert run_path(None, "cityscapes").match("save/cityscapes-*-*")


def test_the_command_that_resumes(monkeypatch):
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


def test_options_are_stored_and_those_of_a_resume_hold_from_then_on(tmp_path):
    folder = tmp_path / "deep/run"
    begun = options(folder, batch_size=4, init=None)
    with open_run(begun) as run:
        run.begin()
    assert read_args(folder) == vars(begun)
    args = argparse.Namespace(**vars(begun) | {"batch_size": 2, "resume": True, "savedir": "b"})
    run = Run(args, folder, None)
    run.begin()
    run.close()
    assert read_args(folder) == vars(begun) | {"batch_size": 2}


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_a_folder_without_options_cannot_be_resumed(tmp_path, content):
    if content is not None:
        (tmp_path / "args.json").write_text(content)
    with pytest.raises(NoRun, match="holds no run to resume"):
        read_args(tmp_path)


def test_what_a_run_stored_is_used_again_for_the_same_option(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"datadir": "a"}))
    (tmp_path / "class_counts.json").write_text(json.dumps({"road": 7}))
    args = argparse.Namespace(resume=True, datadir="a")
    run = Run(args, tmp_path, None)
    assert run.stored("class_counts.json", "datadir") == {"road": 7}
    (tmp_path / "class_counts.json").write_text('{"road"')
    assert run.stored("class_counts.json", "datadir") is None
    args.datadir = "b"
    assert run.stored("args.json", "datadir") is None
    args.resume, args.datadir = False, "a"
    assert run.stored("args.json", "datadir") is None


# The lock


@pytest.mark.parametrize(
    "name",
    [
        *("args.json", "log.csv", "class_counts.json", "last.pth", "previous.pth", "best.pth"),
        *("encoder.pth", "stage2-epoch001.pth", "events.out.tfevents.1.a"),
    ],
)
def test_a_folder_that_holds_a_run_is_refused_and_kept(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(FolderInUse, match="holds a run already"):
        check_free(tmp_path)
    assert (tmp_path / name).read_text() == "precious"


def test_a_folder_with_other_files_is_free(tmp_path):
    (tmp_path / "slurm.log").write_text("")
    check_free(tmp_path)


def test_only_one_run_writes_into_a_folder_which_is_free_again_when_it_is_killed(tmp_path):
    folder = tmp_path / "run"

    def other() -> None:
        with locked_folder(folder):
            print("locked", flush=True)
            time.sleep(60)

    process = Forked(other, tmp_path)
    process.wait_for("locked")
    with pytest.raises(FolderInUse, match="another run is writing into"), locked_folder(folder):
        pass
    assert folder.is_dir()
    process.signal(signal.SIGKILL)
    process.finish()
    with locked_folder(folder):
        pass


def test_a_folder_that_nothing_was_written_into_is_removed(tmp_path):
    folder = tmp_path / "deep/run"
    with pytest.raises(ValueError), locked_folder(folder):
        raise ValueError
    assert names(tmp_path) == set()
    with locked_folder(folder):
        (folder / "log.csv").write_text("")
    with locked_folder(folder):
        (folder / ".log.csv-0123abcd.unfinished.csv").write_text("killed")
    with locked_folder(folder):
        assert names(folder) == {"log.csv", ".lock"}


def test_a_folder_that_is_gone_or_shared_by_now_hides_no_error(tmp_path):
    with pytest.raises(ValueError), locked_folder(tmp_path / "deep/run"):
        shutil.rmtree(tmp_path / "deep")
        raise ValueError
    with pytest.raises(ValueError), locked_folder(tmp_path / "deep/run"):
        (tmp_path / "deep/another").mkdir()
        raise ValueError
    assert {path.name for path in tmp_path.rglob("*")} == {"deep", "another"}


# The checkpoints


def test_the_checkpoint_before_the_last_is_kept(run, tmp_path):
    assert load_run(tmp_path) is None
    for epoch in range(4):
        run.save(STATE | {"epoch": epoch})
    assert load_run(tmp_path)["epoch"] == 3
    assert load_checkpoint(tmp_path / "previous.pth")["epoch"] == 2
    assert names(tmp_path) == {"last.pth", "previous.pth"}


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
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(run, tmp_path, capsys, how):
    for epoch in range(3):
        run.save(STATE | {"epoch": epoch})
    damage(tmp_path / "last.pth", how)
    assert load_run(tmp_path)["epoch"] == 1
    out = capsys.readouterr().out
    assert "last.pth" in out and f"going on from {tmp_path / 'previous.pth'}" in out
    # The next save must not copy the damaged file over the good one.
    run.save(STATE | {"epoch": 2})
    assert load_checkpoint(tmp_path / "previous.pth")["epoch"] == 1


def test_two_damaged_checkpoints_are_refused_and_kept(run, tmp_path):
    for epoch in range(2):
        run.save(STATE | {"epoch": epoch})
    for name in ("last.pth", "previous.pth"):
        damage(tmp_path / name, "a flipped bit")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"previous\.pth is damaged"):
        load_run(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_removed_checkpoints_are_not_silently_begun_anew(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("epoch\n1\n")
    assert load_run(tmp_path) is None  # killed before its first checkpoint
    log.write_text("epoch\n1\n2\n")
    with pytest.raises(CheckpointError, match=r"last\.pth and .* are missing"):
        load_run(tmp_path)
    log.unlink()
    (tmp_path / "damaged-last.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.pth and .* are missing"):
        load_run(tmp_path)


def test_a_network_is_not_the_state_of_a_run(run, tmp_path):
    run.save_network({"model": STATE["model"], "stage": 2}, "last.pth")
    with pytest.raises(CheckpointError, match="is not the state of a run"):
        load_run(tmp_path)


# Writing fails


def test_a_full_disk_keeps_the_checkpoints(run, tmp_path):
    run.save(STATE | {"epoch": 1})
    with full_disk(20_000), pytest.raises(WriteError) as caught:
        run.save(STATE | {"model": {"weight": torch.rand(9_000)}})
    assert str(caught.value) == f"{tmp_path / 'last.pth'} cannot be written (File too large)"
    assert caught.value.__notes__ == [f"then go on with: {run.command}"]
    assert load_run(tmp_path)["epoch"] == 1
    assert names(tmp_path) == {"last.pth", "previous.pth"}


def test_a_full_disk_keeps_a_damaged_checkpoint(run, tmp_path, monkeypatch):
    for epoch in range(2):
        run.save(STATE | {"epoch": epoch})
    damage(tmp_path / "last.pth", "cut short")

    def full(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(WriteError, match="cannot be written"):
        patch.setattr("shutil.copyfile", full)
        load_run(tmp_path)
    assert load_run(tmp_path)["epoch"] == 0


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be written"), locked_folder(tmp_path / "file/run"):
        pass

    def read_only(*args: object, **kwargs: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # Root may write everywhere, so the call fails as it would for others.
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
        with locked_folder(tmp_path / "run"):
            pass


@pytest.mark.parametrize("classes", [None, 9, 500])
def test_a_full_disk_under_tensorboard_is_reported(tmp_path, classes):
    """The thread that writes the events is dead by then, and must not be waited for."""

    def program() -> int:
        run = Run(options(tmp_path), tmp_path, None)
        run.write_json = run._write_log = lambda *_: None
        try:
            with full_disk(10 if classes is None else 300):
                run.begin()
                run.record({f"iou {number}": 1.0 for number in range(classes)}, 1, [])
                run.close()
        except WriteError as error:
            print(error)
            return 2
        return 0

    result = Forked(program, tmp_path).finish(60)
    assert result.status == 2, result
    assert result.out == f"{tmp_path}/events.out.tfevents.* cannot be written (File too large)\n"
    assert "Traceback" not in result.err


def test_errors_of_other_threads_are_still_printed(run, capsys):
    run.begin()
    run.close()
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    assert "ZeroDivisionError" in capsys.readouterr().err


# The log and TensorBoard


def recorded(folder: Path, rows: list[dict], resumed: dict | None = None) -> None:
    args = argparse.Namespace(savedir=str(folder), resume=resumed is not None, encoder_epochs=2)
    run = Run(args, folder, resumed)
    run.begin()
    for row in rows:
        run.record(row, row["epoch"] + (2 if row["stage"] == 2 else 0), [])
    run.close()


def test_the_log_and_tensorboard_are_cut_after_the_checkpoint(tmp_path):
    """The stages have two epochs and three; the run was killed before it saved the last two."""
    places = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)]
    rows = [{"stage": s, "epoch": e, "train_loss": s / e} for s, e in places]
    recorded(tmp_path, rows)
    new = {"stage": 2, "epoch": 2, "train_loss": 9.0}
    recorded(tmp_path, [new], resumed={"stage": 2, "epoch": 1})
    log = [(int(row["stage"]), int(row["epoch"])) for row in read_log(tmp_path)]
    assert log == places[:4]
    assert shown(tmp_path)["loss/train"] == {1: [1], 2: [0.5], 3: [2], 4: [9]}
    recorded(tmp_path, [], resumed={"stage": 1, "epoch": 1})
    assert len(read_log(tmp_path)) == 1
    assert shown(tmp_path)["loss/train"] == {1: [1]}
    recorded(tmp_path, rows[:1], resumed=None)


def test_a_resumed_run_without_a_checkpoint_begins_its_log_anew(tmp_path):
    recorded(tmp_path, [{"stage": 1, "epoch": 1, "train_loss": 1.0}])
    run = Run(argparse.Namespace(savedir=str(tmp_path), resume=True), tmp_path, None)
    run.begin()
    run.close()
    assert read_log(tmp_path) == [] and shown(tmp_path) == {}


def test_a_log_can_get_other_columns(run, tmp_path):
    """A run is resumed with a version that logs more, or in another order."""
    run.begin()
    run.record({"epoch": 1, "loss": 0.5, "old": 7.0}, 1, [])
    run.record({"new": 9.0, "loss": 0.25, "epoch": 2}, 2, [])
    run.close()
    assert read_log(tmp_path) == [
        {"epoch": "1", "loss": "0.5", "old": "7.0", "new": "nan"},
        {"epoch": "2", "loss": "0.25", "old": "nan", "new": "9.0"},
    ]


def test_tensorboard_shows_columns_by_score_and_split(run, tmp_path):
    run.begin()
    row = {"stage": 2, "epoch": 1, "train_loss": 1.0, "val_miou": 0.5, "iou traffic light": 0.25}
    row |= {"lr": 0.125, "iou road": float("nan"), "seconds": 3.0}
    run.record(row, 1, [torch.zeros(3, 4, 6, dtype=torch.uint8)])
    run.close()
    found = shown(tmp_path)
    assert found.keys() == {"loss/train", "miou/val", "iou/traffic light", "lr", "val/0"}
    assert found["iou/traffic light"] == {1: [0.25]}


def test_names_of_classes_are_no_paths(run, tmp_path):
    run.begin()
    run.record({"epoch": 1, "iou ../../out": 1.0}, 1, [])
    run.close()
    assert list(shown(tmp_path)) == ["iou/../../out"]
    assert not (tmp_path.parent.parent / "out").exists()
