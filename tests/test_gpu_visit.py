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
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {f"{s}.{kind}" for s in ("train", "trainval") for kind in ("csv", "log", "pth")}
    for split in ("train", "trainval"):
        with (tmp_path / f"out/{split}.csv").open(encoding="utf-8", newline="") as log:
            rows = list(csv.DictReader(log))
        assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"], "the run was cut"
        weights = torch.load(tmp_path / f"out/{split}.pth", weights_only=True)
        assert weights["epoch"] == 4 and weights["args"]["train_on"] == split


@pytest.mark.slow
def test_tables_are_measured(monkeypatch, tmp_path):
    rehearse(monkeypatch, "tables", tmp_path / "out")
    for name in ("tables", "sizes", "peers"):
        text = (tmp_path / f"out/{name}.log").read_text(encoding="utf-8")
        assert "failed" not in text and text.count("| deployed half |") == 2


@pytest.mark.slow
def test_everything_ends_with_its_status(camvid, monkeypatch, tmp_path):
    rehearse(monkeypatch, "rates", tmp_path / "out", "--camvid", camvid)
    text = (tmp_path / "out/rates.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in text.splitlines()[2:]]
    statuses = {name: int(status) for name, status, *_ in rows}
    assert statuses.pop("stopped") == statuses.pop("resumed") == 143, text
    assert set(statuses.values()) == {0} and len(statuses) == 8, text
    assert float(rows[0][3]) > 0, "no rate"


def test_a_program_that_does_not_end_is_stopped(tmp_path, monkeypatch):
    """After its limit, or at the deadline."""
    monkeypatch.setattr(gpu_visit, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_visit, "GRACE", 0.5)
    (tmp_path / "sleep.py").write_text(
        "import signal, sys, time\nprint('begun', flush=True)\n"
        "if 'stubborn' in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(60)\n",
        encoding="utf-8",
    )
    visit = gpu_visit.Visit(tmp_path, tmp_path, time.monotonic() + 4, True, "", tmp_path)
    jobs = [
        gpu_visit.Job("a", "sleep.py", limit=2), gpu_visit.Job("b", "sleep.py stubborn"),
    ]  # fmt: skip
    started = time.monotonic()
    first, second = visit.run(jobs, tmp_path)
    assert (first.status, second.status) == (-15, -9) and first.last_line == "begun"
    assert first.seconds < 4 and time.monotonic() - started < 20


def test_camvid_is_needed_to_train(fails, tmp_path):
    message = fails("tools/gpu_visit.py", "weights", "--output", tmp_path / "out")
    assert "weights needs --camvid" in message and not (tmp_path / "out").exists()
