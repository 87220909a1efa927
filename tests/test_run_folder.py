import csv
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from utils import distributed
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.errors import UserError
from utils.run_folder import (
    RUN_STATE,
    append_row,
    check_free,
    claimed,
    drop_rows_after,
    keep_options,
    load_run,
    notes,
    read_args,
    resume_command,
    run_folder,
    save_run,
    start_run,
    told,
)


def test_a_name_lies_under_save_and_a_path_where_it_says():
    assert run_folder("first", "cityscapes") == Path("save/first")
    assert run_folder("/tmp/first", "cityscapes") == Path("/tmp/first")
    assert run_folder("./first", "cityscapes") == Path("first")
    assert run_folder(None, "cityscapes").match("save/cityscapes-*-*")


def test_options_come_back(tmp_path):
    with claimed(tmp_path / "deep/run"):
        start_run(tmp_path / "deep/run", {"height": 64, "lr": 0.1, "init": None})
    assert read_args(tmp_path / "deep/run") == {"height": 64, "lr": 0.1, "init": None}


@pytest.mark.parametrize(
    "name",
    [
        "args.json",
        "log.csv",
        "last.pth",
        "previous.pth",
        "best.pth",
        "encoder.pth",
        "stage2-epoch001.pth",
    ],
)
def test_a_folder_in_use_is_refused(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=r"holds a run already.* --resume or give another --sav"):
        check_free(tmp_path)
    assert (tmp_path / name).read_text() == "precious"


def test_a_folder_with_other_files_is_free(tmp_path):
    (tmp_path / "slurm.log").write_text("")
    check_free(tmp_path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written"),
        claimed(tmp_path / "file" / "run"),
    ):
        pass


def test_a_folder_is_one_runs_alone(tmp_path):
    """Also against another process, and free again when that was killed."""
    folder = tmp_path / "run"
    code = "import sys, time\nfrom pathlib import Path\nfrom utils.run_folder import claimed\n"
    code += "with claimed(Path(sys.argv[1])):\n    print('mine', flush=True)\n    time.sleep(60)"
    other = subprocess.Popen(
        [sys.executable, "-c", code, folder], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    try:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match="another run is writing into"), claimed(folder):
            pass
        assert folder.is_dir()
    finally:
        other.kill()
        other.wait()
    with claimed(folder):
        pass


def test_a_folder_that_nothing_was_written_into_is_removed(tmp_path):
    with pytest.raises(ValueError), claimed(tmp_path / "deep/run"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / "deep/run"):
        (tmp_path / "deep/run/log.csv").write_text("")
    with claimed(tmp_path / "deep/run"):
        (tmp_path / "deep/run/.log.csv-0123abcd.unfinished.csv").write_text("killed")
    with claimed(tmp_path / "deep/run"):
        names = {path.name for path in (tmp_path / "deep/run").iterdir()}
    assert names == {"log.csv", ".lock"}


def test_a_folder_that_is_gone_or_shared_by_now_changes_no_error(tmp_path):
    with pytest.raises(ValueError), claimed(tmp_path / "deep/run"):
        shutil.rmtree(tmp_path / "deep")
        raise ValueError
    with pytest.raises(ValueError), claimed(tmp_path / "deep/run"):
        (tmp_path / "deep/another").mkdir()
        raise ValueError
    assert [path.name for path in tmp_path.rglob("*")] == ["deep", "another"]


STATE = dict.fromkeys(RUN_STATE, 0) | {"model": {"weight": torch.ones(3)}}


def test_the_checkpoint_before_the_last_is_kept(tmp_path):
    assert load_run(tmp_path) is None
    for epoch in range(4):
        save_run(STATE | {"epoch": epoch}, tmp_path)
    assert load_run(tmp_path)["epoch"] == 3
    assert load_checkpoint(tmp_path / "previous.pth")["epoch"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"last.pth", "previous.pth"}


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "zero bytes":
        path.write_bytes(b"")
    elif how == "cut short":
        path.write_bytes(content[: len(content) // 2])
    else:
        place = content.index(torch.ones(3).numpy().tobytes())
        content[place] ^= 1
        path.write_bytes(content)


def test_checkpoints_that_were_removed_are_not_made_anew(tmp_path):
    row = {"epoch": 1, "loss": 0.5}
    append_row(tmp_path / "log.csv", row)
    assert load_run(tmp_path) is None  # killed before its first checkpoint
    append_row(tmp_path / "log.csv", row | {"epoch": 2})
    with pytest.raises(CheckpointError, match=r"last\.pth and .* are missing"):
        load_run(tmp_path)
    (tmp_path / "log.csv").unlink()
    (tmp_path / "damaged-last.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.pth and .* are missing"):
        load_run(tmp_path)


def test_a_full_disk_under_a_damaged_checkpoint_is_told(tmp_path, monkeypatch):
    for epoch in range(2):
        save_run(STATE | {"epoch": epoch}, tmp_path)
    damage(tmp_path / "last.pth", "cut short")

    def full(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(UserError, match=r"last\.pth cannot be written .*--resume"):
            load_run(tmp_path)
    assert load_run(tmp_path)["epoch"] == 0


@pytest.mark.parametrize("how", ["missing", "zero bytes", "cut short", "a flipped bit"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, how):
    for epoch in range(3):
        save_run(STATE | {"epoch": epoch}, tmp_path)
    damage(tmp_path / "last.pth", how)
    assert load_run(tmp_path)["epoch"] == 1
    said = capsys.readouterr().out
    assert "last.pth" in said and f"going on from {tmp_path / 'previous.pth'}" in said
    # The damaged one does not become the previous one of the next.
    save_run(STATE | {"epoch": 2}, tmp_path)
    assert load_checkpoint(tmp_path / "previous.pth")["epoch"] == 1
    damage(tmp_path / "last.pth", how)
    damage(tmp_path / "previous.pth", "a flipped bit")
    with pytest.raises(CheckpointError, match=r"previous\.pth is damaged"):
        load_run(tmp_path)


def test_a_full_disk_keeps_the_checkpoints(tmp_path):
    """Here a limit on the size of files, which a checkpoint of larger weights exceeds."""
    save_run(STATE | {"epoch": 1}, tmp_path)
    code = (
        "import resource, sys, torch\nfrom pathlib import Path\nfrom utils.script import run\n"
        "from utils.run_folder import save_run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "run(lambda: save_run({'model': {'w': torch.rand(9_000)}}, Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"{tmp_path / 'last.pth'} cannot be written (File too large)" in done.stderr
    assert "--resume" in done.stderr and len(done.stderr.splitlines()) == 1
    assert load_run(tmp_path)["epoch"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"last.pth", "previous.pth"}


def test_options_of_a_resume_hold_from_then_on(tmp_path):
    start_run(tmp_path, {"batch_size": 4, "savedir": "a", "resume": False})
    keep_options(tmp_path, {"batch_size": 2, "savedir": "b", "resume": True})
    assert read_args(tmp_path) == {"batch_size": 2, "savedir": "a", "resume": False}


@pytest.mark.parametrize("name", ["", "log.csv"])
def test_a_failure_to_write_names_the_folder_of_the_run(tmp_path, name):
    with pytest.raises(UserError, match=rf"--savedir {tmp_path} --resume"), told(tmp_path / name):
        raise OSError(28, "No space left on device")


def test_the_command_that_goes_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--savedir", "x"])
    assert resume_command(Path("save/my run")) == "python main.py --savedir 'my run' --resume"
    assert resume_command(Path("/runs/a")) == "python main.py --savedir /runs/a --resume"
    for path in ("./runs", "runs/", "./my run/"):
        command = shlex.split(resume_command(run_folder(path, "")))
        assert run_folder(command[3], "") == Path(path)
    monkeypatch.setattr(distributed, "processes", lambda: 4)
    monkeypatch.setattr(distributed, "local_processes", lambda: 4)
    start = "torchrun --nproc-per-node 4"
    assert resume_command(Path("save/a")) == f"{start} main.py --savedir a --resume"
    monkeypatch.setattr(distributed, "processes", lambda: 8)
    assert resume_command(Path("save/a")) == f"{start} ... main.py --savedir a --resume"


def test_what_was_left_out_is_told():
    assert notes({"skipped_steps": 0, "left_out": 0}) == ""
    assert notes({"skipped_steps": 2, "left_out": 1}) == (
        ", 2 steps skipped by the scaler, 1 broken images left out"
    )


@pytest.mark.parametrize("content", [None, "", "{"])
def test_no_run_to_resume(tmp_path, content):
    if content is not None:
        (tmp_path / "args.json").write_text(content)
    with pytest.raises(UserError, match="holds no run to resume"):
        read_args(tmp_path)


def test_the_log_is_cut_after_the_checkpoint(tmp_path):
    log = tmp_path / "log.csv"
    for stage, epoch in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 3)):
        append_row(log, {"stage": stage, "epoch": epoch, "loss": stage / epoch})
    drop_rows_after(log, stage=2, epoch=1)
    with log.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["epoch"]) for row in rows] == [("1", "1"), ("1", "2"), ("2", "1")]
    append_row(log, {"stage": 2, "epoch": 2, "loss": 1})
    assert len(log.read_text().splitlines()) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_no_log_yet(tmp_path):
    drop_rows_after(tmp_path / "log.csv", epoch=0)
    assert not (tmp_path / "log.csv").exists()


def test_a_log_keeps_the_columns_it_was_begun_with(tmp_path):
    """A run is resumed with a version that logs more, or in another order."""
    log = tmp_path / "log.csv"
    append_row(log, {"epoch": 1, "loss": 0.5, "old": 7})
    append_row(log, {"new": 9, "loss": 0.25, "epoch": 2})
    assert log.read_text().splitlines() == ["epoch,loss,old", "1,0.5,7", "2,0.25,nan"]
