import csv
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "tools"))

from fault_compare import broken_files, differences
from fault_runs import Lost, Try, marked
from fault_tries import ROWS, check_place, refused
from faults_page import FAULTS, PAGE, RESULTS, Outcome, page


def write_run(folder: Path, epochs: int = 3, first: int = 1) -> None:
    """What the comparison looks at of a run, or of its end from an epoch on."""
    folder.mkdir(exist_ok=True)
    state = {"model": {"weight": torch.arange(6.0)}, "args": {"savedir": str(folder), "lr": 0.1}}
    for name in ("last.pth", "best.pth"):
        torch.save(state, folder / name)
    with (folder / "log.csv").open("a", newline="") as file:
        writer = csv.writer(file)
        if first == 1:
            writer.writerow(["stage", "epoch", "train_loss", "seconds"])
        writer.writerows(
            [1, epoch, 1 / epoch, time.perf_counter()] for epoch in range(first, epochs + 1)
        )
    with SummaryWriter(folder, filename_suffix=f".{first}") as writer:
        for epoch in range(first, epochs + 1):
            writer.add_scalar("loss/train", 1 / epoch, epoch)
            writer.add_scalar("images per second/train", time.perf_counter(), epoch)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "reference"
    write_run(folder)
    return folder


@pytest.fixture
def copy(reference, tmp_path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "copy"))


def test_two_runs_of_the_same_end_do_not_differ(reference, tmp_path):
    write_run(tmp_path / "run")
    assert differences(tmp_path / "run", reference) == []


def test_a_run_in_two_parts_has_the_same_end(reference, tmp_path):
    write_run(tmp_path / "run", epochs=2)
    write_run(tmp_path / "run", first=3)
    (tmp_path / "run" / "previous.pth").write_text("the one before")
    assert len(list((tmp_path / "run").glob("events*"))) == 2
    assert differences(tmp_path / "run", reference) == []


def test_a_changed_weight_is_found(reference, copy):
    state = torch.load(copy / "last.pth", weights_only=True)
    state["model"]["weight"][3] += 1e-6
    torch.save(state, copy / "last.pth")
    assert differences(copy, reference) == ["last.pth: model: weight differs"]


def test_a_damaged_checkpoint_is_found(reference, copy):
    content = bytearray((copy / "best.pth").read_bytes())
    place = content.index(torch.tensor(5.0).numpy().tobytes())
    content[place] ^= 1
    (copy / "best.pth").write_bytes(content)
    (found,) = differences(copy, reference)
    assert found.startswith("best.pth cannot be read (best.pth is damaged (checksum of")
    assert broken_files(copy)[0].startswith("best.pth is not whole")


def test_missing_doubled_and_changed_rows_are_found(reference, copy):
    head, *rows = (copy / "log.csv").read_text().splitlines(keepends=True)
    (copy / "log.csv").write_text("".join([head, *rows[:2]]))
    assert differences(copy, reference) == ["log.csv has no row of stage 1 epoch 3"]
    (copy / "log.csv").write_text("".join([head, *rows, rows[1]]))
    assert differences(copy, reference) == ["log.csv has 2 rows of stage 1 epoch 2"]
    (copy / "log.csv").write_text("".join([head, rows[0].replace("1.0", "1.5"), *rows[1:]]))
    (found,) = differences(copy, reference)
    assert found == "log.csv, stage 1 epoch 1: train_loss is 1.5, not 1.0"
    (copy / "log.csv").write_text("".join([head, *rows])[:-3])
    assert broken_files(copy) == ["log.csv is not whole (a row is cut short)"]


def test_a_doubled_step_and_a_changed_value_of_tensorboard_are_found(reference, copy):
    with SummaryWriter(copy, filename_suffix=".again") as writer:
        writer.add_scalar("loss/train", 1 / 3, 3)
    assert differences(copy, reference) == [
        "the event files: loss/train at step 3 is there 2 times",
        "TensorBoard: loss/train at step 3 is there 2 times",
    ]
    shutil.rmtree(copy)
    write_run(copy, epochs=2)
    write_run(copy, first=4, epochs=4)
    found = differences(copy, reference)
    assert "the event files: loss/train at step 4 is new" in found
    assert "the event files: loss/train at step 3 is missing" in found


def test_steps_that_tensorboard_would_not_show_are_found(reference, copy):
    """A later file that says to begin anew takes from TensorBoard what an earlier one holds."""
    with SummaryWriter(copy, purge_step=2, filename_suffix=".again"):
        pass
    assert set(differences(copy, reference)) == {
        f"TensorBoard: {tag} at step {step} is missing"
        for tag in ("loss/train", "images per second/train")
        for step in (2, 3)
    }


def test_missing_and_left_files_are_found(reference, copy):
    (copy / "best.pth").unlink()
    (copy / ".last.pth-0123abcd.unfinished.pth").write_text("half of it")
    assert differences(copy, reference) == [
        "best.pth is missing",
        ".last.pth-0123abcd.unfinished.pth was left behind",
    ]


def test_steps_that_are_repeated_or_left_out_are_found():
    line = "stage 1 epoch {}/9: step {}/4, loss 1.0\n"
    check_place((1, 2, 3), line.format(3, 4))
    check_place((1, 2, 4), line.format(4, 1))  # after a validation
    check_place((1, 9, 0), "stage 2 epoch 1/9: step 1/4\n")
    for epoch, step in ((3, 3), (3, 1), (4, 1), (2, 4)):
        with pytest.raises(Lost, match="with a checkpoint of step 3 after epoch 2 of stage 1"):
            check_place((1, 2, 3), line.format(epoch, step))


def test_processes_are_found_by_their_mark_and_ended(tmp_path):
    t = Try("row", 0, 0, tmp_path)
    script = "import os, time; os.fork() or os.setsid(); print(1, flush=True); time.sleep(60)"
    started = t.start([sys.executable, "-c", script])
    assert t.sleep(20, lambda: started.out().count("1") == 2)
    assert len(marked(t.mark)) == 2
    os.kill(started.pid, 9)
    assert started.wait().status == -9
    assert len(marked(t.mark)) == 1
    t.kill_all()
    assert not marked(t.mark)


def test_a_refusal_is_one_line_with_status_2(tmp_path):
    t = Try("row", 0, 0, tmp_path)

    def ends(status: int, text: str):
        script = f"import sys; sys.stderr.write({text!r}); sys.exit({status})"
        return t.run([sys.executable, "-c", script])

    refused(ends(2, "main.py: error: no room\n"), "no room")
    with pytest.raises(Lost, match="no status 2, but status 1: main"):
        refused(ends(1, "main.py: error: no room\n"))
    with pytest.raises(Lost, match="not one line on stderr but 2"):
        refused(ends(2, "Traceback\nerror"))
    with pytest.raises(Lost, match="says nothing of it"):
        refused(ends(2, "error"), "no room")


def test_the_page_has_a_row_for_each_fault_and_none_without_tries():
    assert list(FAULTS) == [row.name for row in ROWS]
    ran = {"date": "2025-01-01", "command": "python tools/faults.py --page"}
    rows = {name: vars(Outcome(tries=5, struck={"start-up": 5})) | ran for name in FAULTS}
    rows["kill"]["lost"] = {"3": "another end:\nlast.pth | differs"}
    rows["disk"] = vars(Outcome(unable="nothing may be mounted here")) | ran
    machine = {"hardware": "a CPU, 2 cores", "system": "Linux 6", "versions": "torch 2"}
    text = page({"machine": machine, "rows": rows})
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    titles = [line[0] for line in cells[2:-1]]
    assert titles == [FAULTS[name][0] for name in FAULTS if name != "disk"]
    assert cells[2][1:] == ["5", "4", r"try 3: another end: last.pth \| differs"]
    assert cells[-1][:3] == ["all", str(5 * len(titles)), str(5 * len(titles) - 1)]
    assert f"Not tried: {FAULTS['disk'][0]}: nothing may be mounted here." in text
    assert "a CPU, 2 cores; Linux 6; torch 2; `python tools/faults.py --page` on 2025" in text


def test_the_page_is_that_of_its_figures():
    if RESULTS.exists():
        assert PAGE.read_text() == page(json.loads(RESULTS.read_text()))
