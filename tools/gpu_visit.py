"""Use a few minutes on a GPU for what no CPU can do: train, measure, and try everything once.

    python3 tools/gpu_visit.py weights --camvid DIR --output out --init FILE    9 minutes
    python3 tools/gpu_visit.py tables --output out                              3 minutes
    python3 tools/gpu_visit.py rates --camvid DIR --output out                  3 minutes

weights: D = 20 on CamVid's train and val, and beside it on train alone, scored on val. Two short
runs tell how many epochs fit into the time, so that both runs end with their schedule.
tables: latency of LEDNet in all its forms beside pytorchcv's, then other sizes and peers.
rates: images per second of training, then everything that users run, with its exit status.

Each ends in time and leaves at most 8 small files in out/weights, out/tables or out/rates,
whatever becomes of its parts. --rehearse does the same on a CPU with tiny settings.
"""

import math
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils.arguments import ArgumentParser, file_path, positive_float
from utils.errors import UserError
from utils.files import write_errors
from utils.run_folder import read_log
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
    camvid: Path

    @property
    def device(self) -> str:
        return "--device cpu" if self.rehearse else "--device cuda"

    @property
    def train(self) -> str:
        """Command line that trains on CamVid."""
        crop = "--crop 64 64" if self.rehearse else ""
        data = f"--dataset camvid --preset camvid --datadir {quoted(self.camvid)}"
        return f"main.py {data} {self.device} {crop}"

    def run(self, jobs: Sequence[Job], logs: Path, reserve: float = 0) -> list[Result]:
        """Run programs side by side, each with a log, until `reserve` seconds before the end."""
        end = self.deadline - reserve
        if time.monotonic() > end:
            return []
        processes: list[subprocess.Popen] = []
        with ThreadPoolExecutor(len(jobs)) as threads:
            try:
                for job in jobs:
                    processes.append(self._start(job, logs))
                return list(threads.map(partial(finish, logs=logs, end=end), jobs, processes))
            finally:  # if this program is stopped, none goes on
                for process in processes:
                    process.kill()

    def _start(self, job: Job, logs: Path) -> subprocess.Popen:
        script, *arguments = shlex.split(job.command)
        command = [sys.executable, ROOT / script, *arguments]
        with (logs / f"{job.name}.log").open("w", encoding="utf-8") as log:
            return subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)


def finish(job: Job, process: subprocess.Popen, logs: Path, end: float) -> Result:
    """Wait for the end of a program, at most to its limit or until `end`, and print how it was."""
    started = time.monotonic()
    # After SIGTERM, a run of training saves, and ends with status 143.
    limit = min(job.limit, end - started)
    for seconds, stop in ((limit, process.terminate), (GRACE, process.kill)):
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            stop()
    status, seconds = process.wait(), time.monotonic() - started
    lines = (logs / f"{job.name}.log").read_text("utf-8").replace("\r", "\n").strip()
    result = Result(job.name, status, seconds, lines.rpartition("\n")[2])
    print(f"{job.name}: status {status} after {seconds:.0f} s: {result.last_line}", flush=True)
    return result


def main() -> None:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("visit", choices=MINUTES, help="what to do")
    add("--output", type=file_path, required=True, metavar="DIR", help="folder for the results")
    add("--camvid", type=file_path, metavar="DIR", help="CamVid, for weights and rates")
    add("--init", type=file_path, metavar="FILE",
        help="network that weights start from; none that has seen val; default: random weights")
    add("--minutes", type=positive_float, help="time for all of it; default 9, 3 and 3")
    add("--rehearse", action="store_true", help="on a CPU, with tiny settings")
    # fmt: on
    args = parser.parse_args()
    if args.camvid is None and args.visit != "tables":
        raise UserError(f"{args.visit} needs --camvid")
    output = Path(args.output, args.visit).resolve()
    if output.exists():
        raise UserError(f"{output} exists: name another folder")
    deadline = time.monotonic() + 60 * (args.minutes or MINUTES[args.visit])
    with write_errors(output):
        output.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        camvid = Path(args.camvid or "").resolve()
        visit = Visit(output, Path(folder), deadline, args.rehearse, camvid)
        if args.visit == "weights":
            train_weights(visit, f"--init {quoted(Path(args.init).resolve())}" if args.init else "")
        elif args.visit == "tables":
            measure_tables(visit)
        else:
            try_everything(visit)


def train_weights(visit: Visit, init: str) -> None:
    """Train on trainval and on train side by side, to the end of their schedules."""
    splits = ("trainval", "train")
    command = (
        f"{visit.train} --batch-size 26 --lr 3e-3 {init} --train-on {{0}} --savedir {{1}}{{0}}"
    )

    probes = command + " --epochs 1000 --val-every 1000"
    jobs = [Job(f"probe-{s}", probes.format(s, "probe-"), limit=30) for s in splits]
    visit.run(jobs, visit.output)
    # The first epoch starts everything; the second program starts a little later than the first.
    seconds = [mean_of(visit.folder / f"save/probe-{split}", "seconds") for split in splits]
    slowest = max(seconds)
    if not slowest:
        raise UserError(f"no probe has trained two epochs: see its log in {visit.output}")
    epochs = max(1, int((visit.deadline - time.monotonic() - RESERVE) / (1.1 * slowest)))
    epochs = min(epochs, 4) if visit.rehearse else epochs
    print(f"{slowest:.2f} s an epoch: {epochs} epochs", flush=True)

    runs = command + f" --epochs {epochs} --val-every {max(1, epochs // 4)}"
    jobs = [Job(split, runs.format(split, "")) for split in splits]
    for result in visit.run(jobs, visit.output, reserve=2 * GRACE):
        run, split = visit.folder / "save" / result.name, result.name
        if not (run / "last.pth").exists():
            continue
        shutil.copy(run / "log.csv", visit.output / f"{split}.csv")
        name = f"{split}.pth" if result.status == 0 else f"{split}-unfinished.pth"
        ship = f"tools/ship_weights.py --checkpoint {run}/last.pth --output"
        visit.run([Job("ship", f"{ship} {quoted(visit.output / name)}")], visit.folder)


def measure_tables(visit: Visit) -> None:
    """Measure the most wanted rows first; a form takes half a minute to compile."""
    ours = "--networks 'LEDNet D = 20' 'LEDNet D = 128' 'LEDNet of pytorchcv'"
    forms = "--forms eager 'eager half' deployed 'deployed half'"
    best = "'deployed compiled half'"
    size = "--seconds 4 --sizes 1024x512"
    tables = {
        "uncompiled": f"{size} {ours} {forms} 'deployed labels'",
        "compiled-20": f"{size} --networks 'LEDNet D = 20' --forms {best}",
        "compiled-128": f"{size} --networks 'LEDNet D = 128' --forms {best}",
        "labels": f"{size} --networks 'LEDNet D = 20' --forms 'deployed compiled half labels'",
        "float32": f"{size} --networks 'LEDNet D = 20' --forms 'deployed compiled'",
        "sizes": f"--seconds 4 --sizes 2048x1024 640x360 {ours} {forms}",
        "peers": f"{size} --networks ERFNet ENet DABNet Fast-SCNN --forms eager 'eager half'",
    }
    if visit.rehearse:
        small = f"--seconds 0.1 --sizes 128x64 {ours} {forms}"
        tables = {"uncompiled": small, "sizes": small}
    for name, options in tables.items():
        visit.run([Job(name, f"tools/benchmark.py {visit.device} {options}")], visit.output)


def try_everything(visit: Visit) -> None:
    """Measure the rates of training one by one, then run the programs three at a time."""
    train, device = visit.train, visit.device
    rates = {
        "320x240": "--batch-size 8 --epochs 10",
        "480x360": "--batch-size 16 --epochs 15 --crop 360 480",
        "1024x1024": "--batch-size 12 --epochs 6 --crop 1024 1024 --height 1024",
    }
    half, compiled = "--amp fp16", "--precision float16 --runtime compiled"
    weights = ROOT / "weights/lednet_d20_camvid.pth"
    if visit.rehearse:
        rates = {"64x64": "--batch-size 2 --epochs 2"}
        half, compiled = "--amp bf16", "--precision bfloat16"
    jobs = {
        "half": f"{train} --epochs 1 --savedir half {half} --iouTrain --cache off",
        "ohem": f"{train} --epochs 1 --savedir ohem --loss ohem",
        "wide": f"{train} --epochs 1 --savedir wide --apn-channels 128",
        "cached": f"{train} --epochs 1 --savedir cached --cache pixels",
        "stopped": f"{train} --epochs 500 --savedir stopped",
        "evaluate": f"eval_cityscapes_server.py --checkpoint {quoted(weights)} --datadir "
        f"{quoted(visit.camvid)} --save-results labels {compiled} {device}",
        "predict": f"predict.py --input {quoted(visit.camvid / 'val')} --output out {device}",
        "pretrain": f"lednet_imagenet.py --epochs 1 --savedir imagenet {device}",
    }
    results = []
    for size, options in rates.items():
        job = Job(size, f"{train} --val-every 100 --savedir {size} {options}", limit=40)
        results += visit.run([job], visit.folder)
    limits = {"stopped": 25, "evaluate": 90}
    listed = [Job(name, command, limits.get(name, 60)) for name, command in jobs.items()]
    for first in range(0, len(listed), 3):
        results += visit.run(listed[first : first + 3], visit.folder)
    resume = Job("resumed", "main.py --savedir stopped --resume", limit=15)
    results += visit.run([resume], visit.folder)
    with (visit.output / "rates.md").open("w", encoding="utf-8") as file:
        file.write("| run | status | s | images/s | last line |\n| --- | --- | --- | --- | --- |\n")
        for name, status, seconds, last_line in results:
            rate = mean_of(visit.folder / "save" / name, "images_per_second")
            rate = f"{rate:.1f}" if rate else ""
            last_line = last_line[:100].replace("|", "/")
            file.write(f"| {name} | {status} | {seconds:.0f} | {rate} | {last_line} |\n")


def mean_of(run: Path, column: str) -> float:
    """Return the mean of a column of a run's log, without the first epoch; 0 without others."""
    values = [float(row[column]) for row in read_log(run / "log.csv")[1:]]
    return fmean(values) if values else 0.0


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


if __name__ == "__main__":
    run_script(main)
