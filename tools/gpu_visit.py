"""Use a few minutes on a GPU for what no CPU can do: train, measure, and try everything once.

    python3 tools/gpu_visit.py weights --camvid DIR --output out --init FILE    9 minutes
    python3 tools/gpu_visit.py tables --output out                              3 minutes
    python3 tools/gpu_visit.py rates --camvid DIR --output out                  3 minutes

weights: D = 20 on CamVid's train and val, and beside it on train alone, scored on val. Two short
runs tell how many epochs fit into the time, so that both runs end with their schedule.
tables: latency of LEDNet in all its forms beside pytorchcv's, then other sizes and peers.
rates: images per second of training, then everything that users run, with its exit status.

Each ends in time and leaves at most 8 small files in its output folder, whatever becomes of its
parts. --rehearse does the same on a CPU with tiny settings.
"""

import csv
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils.arguments import SHIPPED, ArgumentParser, file_path, new_file, positive_float
from utils.errors import UserError
from utils.script import run_script

ROOT = Path(__file__).parent.parent
MINUTES = {"weights": 9, "tables": 3, "rates": 3}
RESERVE = 45  # seconds for starting the programs, validation and writing weights
GRACE = 15  # seconds that a program has to save after SIGTERM


class Job(NamedTuple):
    """A command line of this repository, and the seconds after which it is stopped."""

    name: str
    command: str
    limit: float = math.inf


class Result(NamedTuple):
    name: str
    status: int
    seconds: float
    last_line: str


@dataclass
class Visit:
    """What all three have in common."""

    output: Path
    folder: Path  # for what is not kept; programs run in it
    deadline: float  # of time.monotonic()
    rehearse: bool
    camvid: str  # command line that trains on CamVid, up to --savedir
    camvid_dir: Path

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, jobs: Sequence[Job], logs: Path, more: float = 0) -> list[Result]:
        """Run programs side by side, each with a log, until `more` seconds after the deadline."""
        started = time.monotonic()
        processes = []
        for job in jobs:
            script, *arguments = shlex.split(job.command)
            with (logs / f"{job.name}.log").open("w", encoding="utf-8") as log:
                command = [sys.executable, ROOT / script, *arguments]
                processes.append(subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log))
        results = []
        for job, process in zip(jobs, processes, strict=True):
            stop(process, min(started + job.limit, self.deadline + more))
            text = (logs / f"{job.name}.log").read_text("utf-8").replace("\r", "\n").strip()
            seconds, last_line = time.monotonic() - started, text.rpartition("\n")[2]
            results.append(Result(job.name, process.returncode, seconds, last_line))
            print(
                f"{job.name}: status {process.returncode}, {seconds:.0f} s: {last_line}", flush=True
            )
        return results


def main() -> None:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("visit", choices=MINUTES, help="what to do")
    add("--output", type=new_file, required=True, metavar="DIR", help="new folder for the results")
    add("--camvid", type=file_path, metavar="DIR", help="CamVid, for weights and rates")
    add("--init", type=file_path, metavar="FILE",
        help="network that weights start from; none that has seen val; default: none")
    add("--minutes", type=positive_float, help="time for all of it; default 9, 3 and 3")
    add("--rehearse", action="store_true", help="on a CPU, with tiny settings")
    # fmt: on
    args = parser.parse_args()
    if args.camvid is None and args.visit != "tables":
        raise UserError(f"{args.visit} needs --camvid")
    deadline = time.monotonic() + 60 * (args.minutes or MINUTES[args.visit])
    output, camvid_dir = Path(args.output).resolve(), Path(args.camvid or "").resolve()
    output.mkdir()
    camvid = f"main.py --dataset camvid --preset camvid --datadir {quoted(camvid_dir)} --device "
    camvid += "cpu --crop 64 64" if args.rehearse else "cuda"
    with tempfile.TemporaryDirectory() as folder:
        visit = Visit(output, Path(folder), deadline, args.rehearse, camvid, camvid_dir)
        if args.visit == "weights":
            train_weights(visit, f"--init {quoted(Path(args.init).resolve())}" if args.init else "")
        elif args.visit == "tables":
            measure_tables(visit)
        else:
            try_everything(visit)


def train_weights(visit: Visit, init: str) -> None:
    """Train on trainval and on train side by side, to the end of their schedules."""
    splits = ("trainval", "train")

    def train(name: str, epochs: int, val_every: int) -> None:
        options = f"--batch-size 26 --lr 3e-3 {init} --epochs {epochs} --val-every {val_every}"
        command = f"{visit.camvid} {options} --train-on {{0}} --savedir {name}/{{0}}"
        (visit.folder / name).mkdir()
        jobs = [Job(split, command.format(split)) for split in splits]
        visit.run(jobs, visit.folder / name, more=-GRACE)

    train("probe", 3, 3)
    # The first epoch starts everything, and the last one is followed by validation.
    seconds = max(float(read_log(visit.folder / "probe" / split)[1]["seconds"]) for split in splits)
    epochs = max(1, int((visit.seconds_left() - RESERVE) / seconds))
    epochs = min(epochs, 4) if visit.rehearse else epochs
    print(f"{seconds:.2f} s an epoch: {epochs} epochs", flush=True)
    train("runs", epochs, max(1, epochs // 4))
    for split in splits:
        run = visit.folder / "runs" / split
        shutil.copy(f"{run}.log", visit.output)
        shutil.copy(run / "log.csv", visit.output / f"{split}.csv")
        weights = quoted(visit.output / f"{split}.pth")
        ship = f"tools/ship_weights.py --checkpoint {run}/last.pth --output {weights}"
        visit.run([Job(f"ship-{split}", ship)], visit.folder, more=GRACE)


def measure_tables(visit: Visit) -> None:
    """Measure the most wanted rows first; each is written as soon as it is there."""
    ours = "--networks 'LEDNet D = 20' 'LEDNet D = 128' 'LEDNet of pytorchcv'"
    forms = "--forms eager 'eager half' deployed 'deployed half'"
    compiled = "'deployed compiled' 'deployed compiled half' 'deployed labels'"
    compiled += " 'deployed compiled labels' 'deployed compiled half labels'"
    tables = {
        "tables": f"--seconds 4 --sizes 1024x512 {ours} {forms} {compiled}",
        "sizes": f"--seconds 4 --sizes 2048x1024 640x360 {ours} {forms}",
        "peers": "--seconds 4 --sizes 1024x512 --forms eager 'eager half'",
    }
    if visit.rehearse:
        tables = dict.fromkeys(tables, f"--seconds 0.1 --sizes 128x64 {ours} {forms}")
    for name, options in tables.items():
        command = f"tools/benchmark.py --device {visit.device} {options}"
        visit.run([Job(name, command)], visit.output)


def try_everything(visit: Visit) -> None:
    """Measure the rates of training one by one, then run the programs three at a time."""
    train, device = visit.camvid, f"--device {visit.device}"
    rates = {
        "320x240": "--batch-size 8 --epochs 2",
        "480x360": "--batch-size 16 --epochs 2 --crop 360 480",
        "1024x1024": "--batch-size 12 --epochs 1 --crop 1024 1024 --height 1024",
    }
    half, compiled = "--amp fp16", "--precision float16 --runtime compiled"
    if visit.rehearse:
        rates = {"64x64": "--batch-size 2 --epochs 1"}
        half, compiled = "--amp bf16", "--precision bfloat16"
    jobs = {
        "half": f"{train} --epochs 1 --savedir half {half} --iouTrain --cache off",
        "ohem": f"{train} --epochs 1 --savedir ohem --loss ohem",
        "wide": f"{train} --epochs 1 --savedir wide --apn-channels 128",
        "cached": f"{train} --epochs 1 --savedir cached --cache pixels",
        "stopped": f"{train} --epochs 500 --savedir stopped",
        "evaluate": f"eval_cityscapes_server.py --checkpoint {quoted(SHIPPED)} --datadir "
        f"{quoted(visit.camvid_dir)} --save-results labels {compiled} {device}",
        "predict": f"predict.py --input {quoted(visit.camvid_dir / 'val')} --output out {device}",
        "pretrain": f"lednet_imagenet.py --epochs 1 --savedir imagenet {device}",
    }
    results = []
    for size, options in rates.items():
        results += visit.run([Job(size, f"{train} --savedir {size} {options}", 40)], visit.folder)
    limits = {"stopped": 15, "evaluate": 90}
    listed = [Job(name, command, limits.get(name, 60)) for name, command in jobs.items()]
    for first in range(0, len(listed), 3):
        results += visit.run(listed[first : first + 3], visit.folder)
    resume = Job("resumed", "main.py --savedir stopped --resume", limit=15)
    results += visit.run([resume], visit.folder)
    with (visit.output / "rates.md").open("w", encoding="utf-8") as file:
        file.write("| run | status | s | images/s | last line |\n| --- | --- | --- | --- | --- |\n")
        for name, status, seconds, last_line in results:
            rows = read_log(visit.folder / "save" / name)
            rate = f"{float(rows[-1]['images_per_second']):.0f}" if rows else ""
            file.write(f"| {name} | {status} | {seconds:.0f} | {rate} | {last_line[:100]} |\n")


def stop(process: subprocess.Popen, limit: float) -> None:
    """Wait for the end of a process, at most until `limit`; then ask it to end, then kill it."""
    try:
        process.wait(max(0, limit - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()  # a run of training saves, and ends with status 143
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def read_log(run: Path) -> list[dict[str, str]]:
    """Return the rows of a run's log, if it has any."""
    path = run / "log.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    run_script(main)
