"""Do real damage to short real runs, and see whether anything is lost; writes docs/reliability.md.

    python tools/faults.py                          every fault: about an hour on two cores
    python tools/faults.py --quick                  two tries of each
    python tools/faults.py --only kill disk         these alone
    python tools/faults.py --only kill --number 7 --seed 0     one try again, as a failure says
    python tools/faults.py --page                   keep what was found in docs/reliability.json,
                                                    and write the page of it

The scripts run as processes of their own on drawn images, on the CPU, where the end of a run is the
same bit for bit. First each is run undisturbed, as many times as there are jobs: all have to come
to the same end, which is what every disturbed run is compared with. In a try, chance decides the
moment and the victim; its numbers come from the seed, the fault and the number of the try alone.

For Linux. What fills a disk or makes a folder read-only needs mounts, in a namespace that vanishes
with this program: `unshare -m` as root, or `unshare -rm`. Exit status 0: nothing was lost; 1:
something was; 2: nothing could be tried.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from fault_compare import differences, hashes
from fault_runs import Lost, Stopped, Try, end_everything, namespace, shown
from fault_tries import (
    IMAGENET,
    MAIN,
    ROWS,
    SCENES,
    SHAPES,
    TORCHRUN,
    Lab,
    Program,
    Row,
    enlarge,
    results_command,
    wait_for_a_file,
)
from faults_page import FAULTS, PAGE, RESULTS, Outcome, page, table

from datasets.drawn.shapes import make_shapes
from datasets.drawn.streets import make_synthetic
from utils.arguments import ArgumentParser, file_path, natural_int, positive_int
from utils.errors import UserError
from utils.script import run_script


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="FAULT", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--quick", action="store_true", help="two tries of each fault")
    parser.add_argument(
        "--number", type=natural_int, help="this try of the one fault that --only names"
    )
    parser.add_argument("--seed", type=natural_int, default=0, help="default 0")
    parser.add_argument(
        "--jobs", type=positive_int, default=2, help="tries at the same time; default 2"
    )
    parser.add_argument(
        "--folder",
        type=file_path,
        help="a new folder for the runs, in which those that lost something are kept; default: a "
        "temporary one, which is removed",
    )
    parser.add_argument(
        "--json", type=file_path, metavar="FILE", help="write what was found into this file"
    )
    parser.add_argument(
        "--page",
        action="store_true",
        help="put what was found into docs/reliability.json, in place of what was there of the "
        "same faults, and write docs/reliability.md of it",
    )
    args = parser.parse_args()
    for name in args.only or []:
        if name not in FAULTS:
            raise UserError(f"--only {name} is no fault: give some of {', '.join(FAULTS)}")
    if args.number is not None and len(args.only or []) != 1:
        raise UserError("--number needs --only with one fault")
    if args.page and (args.quick or args.number is not None):
        raise UserError("--page is for all tries: leave --quick and --number out")
    return args


def main() -> None:
    args = parse_args()
    signal.signal(SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C
    # Where it was started with Ctrl-C ignored, as by nohup, the runs would ignore theirs as well.
    signal.signal(SIGINT, signal.default_int_handler)
    if not sys.platform.startswith("linux"):
        raise UserError("faults are tried on Linux: this is " + platform.system())
    if "LEDNET_NAMESPACE" not in os.environ:
        prefix = namespace()
        os.environ["LEDNET_NAMESPACE"] = "yes" if prefix else "no"
        if prefix:
            os.execvp(prefix[0], [*prefix, sys.executable, *sys.argv])
    torch.set_num_threads(1)

    rows = [row for row in ROWS if not args.only or row.name in args.only]
    cannot = {row.name: unable(row) for row in rows}
    tried = [row for row in rows if not cannot[row.name]]
    for name, why in cannot.items():
        if why:
            print(f"{name} cannot be tried: {why}")
    if not tried:
        raise UserError("none of these faults can be tried on this machine")

    command = shlex.join(["python", "tools/faults.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = new_folder(args.folder) if args.folder else Path(temporary)
        try:
            lab = prepare(folder, tried, args.jobs)
            outcomes = try_all(tried, lab, args)
        finally:
            end_everything()
    for name, why in cannot.items():
        if why:
            outcomes[name] = Outcome(unable=why)
    figures = {
        "machine": machine(),
        "rows": {
            name: vars(outcome) | {"date": date.today().isoformat(), "command": command}
            for name, outcome in outcomes.items()
        },
    }
    print("\n" + table(figures["rows"]))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    if args.page:
        keep(figures)
    if any(outcome.lost for outcome in outcomes.values()):
        sys.exit(1)


def new_folder(path: str) -> Path:
    folder = Path(path).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--folder {path} is not empty: give a new one")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def unable(row: Row) -> str:
    """Why a fault cannot be tried on this machine; empty where it can."""
    if row.mounts and os.environ["LEDNET_NAMESPACE"] == "no":
        return "nothing may be mounted here, neither by unshare -m nor by unshare -rm"
    needed = {"fuzzed": ["hypothesis", "pytest"], "export": ["onnx", "onnxscript", "onnxruntime"]}
    missing = [name for name in needed.get(row.name, []) if find_spec(name) is None]
    return f"{', '.join(missing)} not installed: see requirements-dev.txt" if missing else ""


def machine() -> dict[str, str]:
    """The hardware and versions that the tries ran on."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    cores = len(os.sched_getaffinity(0))
    return {
        "hardware": f"{models[0] if models else platform.machine()}, {cores} cores",
        "system": f"Linux {platform.release()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }


def keep(figures: dict[str, Any]) -> None:
    """Put the figures beside those of other faults of the same machine, and write the page."""
    if RESULTS.exists():
        before = json.loads(RESULTS.read_text())
        if before["machine"] != figures["machine"]:
            print(f"{RESULTS} was of another machine: what it held is dropped")
        else:
            figures["rows"] = before["rows"] | figures["rows"]
    figures["rows"] = {name: figures["rows"][name] for name in FAULTS if name in figures["rows"]}
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    PAGE.write_text(page(figures))
    print(f"{PAGE} is written")


def prepare(folder: Path, rows: list[Row], jobs: int) -> Lab:
    """Draw the data, and run each program to its end undisturbed.

    Raises:
        UserError: one fails, or two of the same end differently.
    """
    make_synthetic(folder / "scenes", SCENES, height=64)
    make_shapes(folder / "shapes", SHAPES, size=(40, 48))
    scenes, shapes = str(folder / "scenes"), str(folder / "shapes")
    lab = Lab(
        folder,
        {
            "main": Program("main.py", ["--datadir", scenes, *MAIN]),
            "imagenet": Program("lednet_imagenet.py", ["--datadir", shapes, *IMAGENET]),
            "torchrun": Program("main.py", ["--datadir", scenes, *MAIN], before=TORCHRUN),
        },
    )
    for name in dict.fromkeys(name for row in rows for name in row.programs):
        program = lab.programs[name]
        print(f"undisturbed: {shown(program.begin(Path('FOLDER')))}", flush=True)
        tries = [Try(f"undisturbed-{name}", number, 0, folder) for number in range(max(2, jobs))]
        with ThreadPoolExecutor(len(tries)) as pool:
            began = time.monotonic()
            try:
                ends = list(pool.map(lambda t, p=program: t.run(p.begin(t.run_folder)), tries))
            except BaseException:
                end_everything()  # or the pool would wait for them
                raise
            program.seconds = time.monotonic() - began
        for t, end in zip(tries, ends, strict=True):
            if end.status != 0:
                raise UserError(f"{program.script} fails undisturbed: {end.says()}")
            found = differences(t.run_folder, tries[0].run_folder)
            if found:
                raise UserError(
                    f"two undisturbed runs of {program.script} differ, so that there is nothing to "
                    f"compare with: {'; '.join(found[:3])}"
                )
        program.reference = tries[0].run_folder
        print(f"  {program.seconds:.1f} s, {len(tries)} at the same time, the same end", flush=True)
    for kind in dict.fromkeys(row.results for row in rows if row.results):
        t = Try(f"undisturbed-{kind}", 0, 0, folder)
        if kind == "predict":
            enlarge(folder)
        started = t.start(results_command(kind, t, lab))
        wait_for_a_file(t, started)
        first = time.monotonic()
        end = started.wait()
        if end.status != 0:
            raise UserError(f"{kind} fails undisturbed: {end.says()}")
        lab.results[kind] = hashes(t.run_folder), time.monotonic() - first
        print(f"undisturbed: {kind}, {len(lab.results[kind][0])} files", flush=True)
    return lab


def try_all(rows: list[Row], lab: Lab, args: argparse.Namespace) -> dict[str, Outcome]:
    """Every try of every fault, as many at the same time as there are jobs."""
    outcomes = {row.name: Outcome() for row in rows}
    numbers = {row.name: range(2 if args.quick else row.tries) for row in rows}
    if args.number is not None:
        numbers = {row.name: [args.number] for row in rows}
    total = sum(map(len, numbers.values()))
    pool = ThreadPoolExecutor(args.jobs)
    try:
        waiting = {
            pool.submit(attempt, row, number, lab, args.seed): row.name
            for row in rows
            for number in numbers[row.name]
        }
        with tqdm(total=total, unit="try", disable=None, dynamic_ncols=True) as bar:
            for done in as_completed(waiting):
                name, t = waiting[done], done.result()
                outcome = outcomes[name]
                outcome.tries += t.tries
                story = "; ".join(t.story)
                outcome.moments.append(f"{t.number}: {story}")
                for part in t.struck:
                    outcome.struck[part] = outcome.struck.get(part, 0) + 1
                for place, lost in enumerate(t.lost):
                    outcome.lost[f"{t.number}{f'.{place}' if place else ''}"] = lost
                tqdm.write(f"{name} {t.number}: {story}: {'; '.join(t.lost) or 'nothing lost'}")
                if t.lost:
                    tqdm.write(
                        f"  again: python tools/faults.py --only {name} --number {t.number} "
                        f"--seed {args.seed}"
                    )
                bar.update()
    except BaseException:
        end_everything()
        pool.shutdown(cancel_futures=True)
        if any(outcome.tries for outcome in outcomes.values()):
            print("\n" + table({name: vars(o) for name, o in outcomes.items() if o.tries}))
        raise
    pool.shutdown()
    for outcome in outcomes.values():
        outcome.moments.sort(key=lambda text: int(text.partition(":")[0]))
    return outcomes


def attempt(row: Row, number: int, lab: Lab, seed: int) -> Try:
    """One try, which then says what was lost in it."""
    t = Try(row.name, number, seed, lab.folder)
    try:
        row.attempt(t, lab)
        t.end()
    except Lost as error:
        t.lost.append(str(error))
    except Stopped:
        t.lost.append("the tool was interrupted")
    except Exception as error:  # a mistake of this tool must not look like a promise kept
        traceback.print_exc()
        t.lost.append(f"the tool itself failed: {type(error).__name__}: {error}")
    finally:
        t.kill_all()
    if not t.lost:
        shutil.rmtree(t.folder, ignore_errors=True)
    return t


if __name__ == "__main__":
    run_script(main)
