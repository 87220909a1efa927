"""Plot the mIoU on val, and of every class, over the epochs of stage 2 of a run.

    python tools/plot_log.py --log save/NAME/log.csv --output curve.png

Needs matplotlib, which requirements-dev.txt installs.
"""

import csv
import math
import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils.arguments import ArgumentParser, file_path
from utils.errors import UserError
from utils.files import atomic_write
from utils.script import run_script

matplotlib.use("Agg")  # files, without a display

from matplotlib import pyplot as plt


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--log", type=file_path, metavar="FILE", required=True)
    parser.add_argument("--output", type=file_path, metavar="FILE", required=True)
    args = parser.parse_args()
    if Path(args.output).exists():
        raise UserError(f"--output {args.output} exists: give a new file, or move it away")
    try:
        with open(args.log, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["stage"] == "2"]
        rows = [row for row in rows if not math.isnan(float(row["val_miou"]))]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"--log {args.log} is not the log.csv of a run: {error!r}") from error
    if not rows:
        raise UserError(f"--log {args.log} holds no validation yet")

    epochs = [int(row["epoch"]) for row in rows]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for column in (name for name in rows[0] if name.startswith("iou ")):
        scores = [100 * float(row[column]) for row in rows]
        axes.plot(epochs, scores, linewidth=1, label=column.removeprefix("iou "))
    mean = [100 * float(row["val_miou"]) for row in rows]
    axes.plot(epochs, mean, "k", linewidth=2.5, label=f"mean, {mean[-1]:.1f} at the end")
    axes.set(xlabel="epoch", ylabel="IoU on val in %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    kind = Path(args.output).suffix[1:] or "png"
    try:
        with atomic_write(args.output) as unfinished:
            figure.savefig(unfinished, dpi=110, format=kind)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {args.output} cannot be written: {error}") from error


if __name__ == "__main__":
    run_script(main)
