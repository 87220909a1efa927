import csv
from pathlib import Path

import pytest

from utils.cli import UsageError
from utils.run import append_row, check_free, drop_rows_after, read_args, run_folder, start_run


def test_a_name_lies_under_save_and_a_path_where_it_says():
    assert run_folder("first", "cityscapes") == Path("save/first")
    assert run_folder("/tmp/first", "cityscapes") == Path("/tmp/first")
    assert run_folder("./first", "cityscapes") == Path("first")
    assert run_folder(None, "cityscapes").match("save/cityscapes-*-*")


def test_options_come_back(tmp_path):
    start_run(tmp_path / "deep/run", {"height": 64, "lr": 0.1, "init": None})
    assert read_args(tmp_path / "deep/run") == {"height": 64, "lr": 0.1, "init": None}


@pytest.mark.parametrize(
    "name", ["args.json", "log.csv", "last.pth", "best.pth", "encoder.pth", "stage2-epoch001.pth"]
)
def test_a_folder_in_use_is_refused(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UsageError, match="holds a run already"):
        check_free(tmp_path)
    with pytest.raises(UsageError, match="--resume or give another --savedir"):
        start_run(tmp_path, {})
    assert (tmp_path / name).read_text() == "precious"


def test_a_folder_with_other_files_is_free(tmp_path):
    (tmp_path / "slurm.log").write_text("")
    start_run(tmp_path, {})


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        start_run(tmp_path / "file" / "run", {})


@pytest.mark.parametrize("content", [None, "", "{"])
def test_no_run_to_resume(tmp_path, content):
    if content is not None:
        (tmp_path / "args.json").write_text(content)
    with pytest.raises(UsageError, match="holds no run to resume"):
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


def test_a_row_that_was_cut_short_is_dropped(tmp_path):
    log = tmp_path / "log.csv"
    append_row(log, {"stage": 1, "epoch": 1, "loss": 0.5})
    with log.open("a") as file:
        file.write("1,")
    drop_rows_after(log, stage=1, epoch=1)
    assert log.read_text().splitlines() == ["stage,epoch,loss", "1,1,0.5"]


def test_an_empty_log_is_begun_anew(tmp_path):
    (tmp_path / "log.csv").write_text("")
    drop_rows_after(tmp_path / "log.csv", epoch=1)
    assert not (tmp_path / "log.csv").exists()


def test_no_log_yet(tmp_path):
    drop_rows_after(tmp_path / "log.csv", epoch=0)
    assert not (tmp_path / "log.csv").exists()


def test_a_log_keeps_the_columns_it_was_begun_with(tmp_path):
    """A run is resumed with a version that logs more, or in another order."""
    log = tmp_path / "log.csv"
    append_row(log, {"epoch": 1, "loss": 0.5, "old": 7})
    append_row(log, {"new": 9, "loss": 0.25, "epoch": 2})
    assert log.read_text().splitlines() == ["epoch,loss,old", "1,0.5,7", "2,0.25,nan"]
