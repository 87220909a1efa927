"""tools/gpu_visit.py, rehearsed on a CPU."""

import csv
import time
from pathlib import Path

import pytest
import torch

from tools import gpu_visit


def rehearse(monkeypatch, visit: str, output: Path, *options: object) -> None:
    argv = ["gpu_visit.py", visit, "--output", output, "--rehearse", "--minutes", 8, *options]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in argv])
    gpu_visit.main()


@pytest.mark.slow
def test_both_networks_are_trained_to_the_end(camvid, monkeypatch, capsys, tmp_path):
    rehearse(monkeypatch, "weights", tmp_path / "out", "--camvid", camvid)
    assert "an epoch: 4 epochs" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "out/weights").iterdir()}
    expected = {f"{s}.{kind}" for s in ("train", "trainval") for kind in ("csv", "log", "pth")}
    assert files == expected | {"probe-train.log", "probe-trainval.log"} and len(files) == 8
    for split in ("train", "trainval"):
        with (tmp_path / f"out/weights/{split}.csv").open(encoding="utf-8", newline="") as log:
            rows = list(csv.DictReader(log))
        assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"], "the run was cut"
        weights = torch.load(tmp_path / f"out/weights/{split}.pth", weights_only=True)
        assert weights["epoch"] == 4 and weights["args"]["train_on"] == split


@pytest.mark.slow
def test_tables_are_measured(monkeypatch, tmp_path):
    rehearse(monkeypatch, "tables", tmp_path / "out")
    for name in ("uncompiled", "sizes"):
        text = (tmp_path / f"out/tables/{name}.log").read_text(encoding="utf-8")
        assert "failed" not in text and text.count("| deployed half |") == 2


@pytest.mark.slow
def test_everything_ends_with_its_status(camvid, monkeypatch, tmp_path):
    rehearse(monkeypatch, "rates", tmp_path / "out", "--camvid", camvid)
    text = (tmp_path / "out/rates/rates.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in text.splitlines()[2:]]
    statuses = {name: int(status) for name, status, *_ in rows}
    assert statuses.pop("stopped") == statuses.pop("resumed") == 143, text
    assert set(statuses.values()) == {0} and len(statuses) == 8, text
    assert float(rows[0][3]) > 0, "no rate"


@pytest.fixture
def visit(tmp_path, monkeypatch) -> gpu_visit.Visit:
    """A visit of 4 seconds; its programs sleep, fail, or do not end when they are asked to."""
    monkeypatch.setattr(gpu_visit, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_visit, "GRACE", 0.5)
    (tmp_path / "sleep.py").write_text(
        "import signal, sys, time\nprint('begun', flush=True)\n"
        "if 'stubborn' in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if 'failing' in sys.argv: sys.exit('failed')\n"
        "time.sleep(60)\n",
        encoding="utf-8",
    )
    return gpu_visit.Visit(tmp_path, tmp_path, time.monotonic() + 4, True, tmp_path)


def test_programs_are_stopped_each_at_its_limit_and_all_at_the_deadline(visit, tmp_path):
    jobs = [
        gpu_visit.Job("stubborn", "sleep.py stubborn"),
        gpu_visit.Job("short", "sleep.py", limit=2),
        gpu_visit.Job("failing", "sleep.py failing"),
    ]
    stubborn, short, failing = visit.run(jobs, tmp_path)
    assert (stubborn.status, short.status, failing.status) == (-9, -15, 1)
    assert short.last_line == "begun" and failing.last_line == "failed"
    assert failing.seconds < 3 and 2 <= short.seconds < 4 <= stubborn.seconds < 15
    assert visit.run(jobs, tmp_path) == [], "started after the deadline"


def test_programs_end_with_the_visit(visit, tmp_path, monkeypatch):
    processes, start = [], visit._start

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        visit, "_start", lambda *job: processes.append(start(*job)) or processes[-1]
    )
    monkeypatch.setattr(gpu_visit, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        visit.run([gpu_visit.Job(name, "sleep.py") for name in ("one", "two")], tmp_path)
    assert [process.wait(10) for process in processes] == [-9, -9]


def test_what_has_trained_is_kept_if_the_other_run_fails(visit, tmp_path, monkeypatch, capsys):
    def run(self, jobs, logs, reserve=0):
        ran = [job for job in jobs if "trainval" not in job.name]
        for job in ran:
            folder = self.folder / "save" / job.name
            folder.mkdir(parents=True)
            (folder / "last.pth").touch()
            (folder / "log.csv").write_text("seconds\n9\n0.5\n0.5\n", encoding="utf-8")
            commands.append(job.command)
        return [gpu_visit.Result(job.name, 1 if job not in ran else 143, 1, "") for job in jobs]

    commands: list[str] = []
    monkeypatch.setattr(gpu_visit.Visit, "run", run)
    visit.deadline += 60
    gpu_visit.train_weights(visit, "")
    assert "0.50 s an epoch" in capsys.readouterr().out
    assert (tmp_path / "train.csv").exists() and not (tmp_path / "trainval.csv").exists()
    assert commands[-1].endswith("train-unfinished.pth"), "a run that was cut is told"


def test_results_are_not_overwritten(fails, tmp_path):
    (tmp_path / "out/tables").mkdir(parents=True)
    message = fails("tools/gpu_visit.py", "tables", "--output", tmp_path / "out")
    assert "out/tables exists: name another folder" in message


def test_camvid_is_needed_to_train(fails, tmp_path):
    message = fails("tools/gpu_visit.py", "weights", "--output", tmp_path / "out")
    assert "weights needs --camvid" in message and not (tmp_path / "out").exists()
