"""docs/reliability.md, out of what tools/faults.py found."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"

# Every fault that is tried: what happens, and what counts as nothing lost.
FAULTS = {
    "kill": (
        "kill -9 at a random moment, `main.py`",
        "The process alone, or it and its workers at once, in start-up, either stage, between "
        "them, in validation, every third time while a checkpoint is written; in some tries up to "
        "three times in a row. Each file under its final name is whole; `--resume`, at once, goes "
        "on from the step of the last checkpoint and comes to the same end.",
    ),
    "kill-imagenet": ("kill -9 at a random moment, `lednet_imagenet.py`", "The same."),
    "kill-rank": (
        "kill -9 of one of 2 processes under `torchrun`",
        "The other one ends as well, nothing stays behind, `torchrun ... --resume` comes to the "
        "same end.",
    ),
    "sigterm": (
        "SIGTERM, `main.py`",
        "To the process, or to all of its processes as from Slurm. Status 143; the command that "
        "is printed, run as it is printed, goes on from the same step to the same end.",
    ),
    "sigterm-imagenet": ("SIGTERM, `lednet_imagenet.py`", "The same."),
    "sigterm-torchrun": ("SIGTERM to `torchrun`", "The same, but for the status."),
    "ctrl-c": (
        "Ctrl-C",
        "To all processes, as in a terminal. Status 130, the rest as above.",
    ),
    "ctrl-c-twice": (
        "Ctrl-C twice",
        "The second one within 0.2 s; `--resume` comes to the same end.",
    ),
    "truncated": (
        "`last.pth` cut short at a random place",
        "`--resume` says that it goes on from `previous.pth`, to the same end.",
    ),
    "empty": ("`last.pth` of no bytes", "The same."),
    "flipped": (
        "a random bit of `last.pth` flipped",
        "The same; where the bit lies between the records of the archive, and so means nothing, "
        "from `last.pth` itself.",
    ),
    "removed": ("`last.pth` removed", "From `previous.pth` to the same end."),
    "both": (
        "`last.pth` and `previous.pth` damaged",
        "Refused in one line, status 2, and neither is touched.",
    ),
    "disk": (
        "a disk that another program fills",
        "At a random moment, but for a random rest. One line says what could not be written, "
        "status 2; the checkpoint before stays, nothing unfinished is left; with room again, "
        "`--resume` comes to the same end.",
    ),
    "read-only": (
        "an output folder that cannot be written",
        "From the start, on resuming, or from a random moment on. One line, status 2, no file "
        "changed; writable again, the same end.",
    ),
    "fuzzed": (
        "fuzzed image and label files",
        "Each is read, or refused by name: no crash, no hang, no label outside the classes.",
    ),
    "worker": (
        "kill -9 of a process that loads data, `main.py`",
        "One line, status 2, a checkpoint; `--resume` comes to the same end. Of one that has "
        "nothing to do any more, nobody need notice the death.",
    ),
    "worker-imagenet": (
        "kill -9 of a process that loads data, `lednet_imagenet.py`",
        "The same.",
    ),
    "clock": (
        "a wall clock that jumps",
        "By up to 50 years back and 20 forth, three times a second, in the run and after it was "
        "killed or terminated; `--resume` comes to the same end.",
    ),
    "broken-image": (
        "an image or label cut short during training",
        "Its name in one line, status 2, a checkpoint; with the file mended, `--resume` comes to "
        "the same end.",
    ),
    "skip-broken": ("the same with `--skip-broken`", "The run names it and comes to an end."),
    "two-runs": (
        "two runs on one folder",
        "New ones or two `--resume`, at the same moment or up to a second apart: one comes to the "
        "same end, the other is refused in one line.",
    ),
    "cache": (
        "kill -9 while `--cache DIR` is filled",
        "Files under a final name hold the same bytes as undisturbed; the next run fills the rest "
        "and comes to the same end.",
    ),
    "export": (
        "kill -9 of `export.py`",
        "There is no model, or the same bytes as undisturbed.",
    ),
    "predict": (
        "kill -9 of `predict.py`",
        "Each picture under its final name has the same bytes as undisturbed.",
    ),
    "evaluation": ("kill -9 of `eval_cityscapes_server.py --save-results`", "The same."),
}

INTRODUCTION = """# Reliability

What runs survive. This page is written by `tools/faults.py`, which does real damage to short real
runs, from [what it found](reliability.json); nothing in it was typed.

The runs train on 14 drawn images of 128x64: `main.py` both stages, 2 and 3 epochs, with strong
augmentation, dropout and an average of the weights, two workers, a validation each epoch;
`lednet_imagenet.py` 4 epochs of the modern recipe. They write a checkpoint about every tenth of a
second (`--checkpoint-minutes 0.002`). Chance picks the moment, uniformly over the run's time from
its very start. **The same end** is that of a run which was never stopped, on the CPU, bit for bit:
`best.pth`, `last.pth` and `encoder.pth` with weights, average, optimizer, schedule, scores and
random states; the rows of `log.csv` but for the columns of the clock; every scalar and picture of
TensorBoard, once; no other file left.
"""


@dataclass
class Outcome:
    """What the tries of a fault came to.

    Attributes:
        lost: what was lost, by the number of the try.
        struck: how often which part of the run was struck.
        moments: what was done in each try.
        unable: why it could not be tried; then there are no tries.
    """

    tries: int = 0
    lost: dict[str, str] = field(default_factory=dict)
    struck: dict[str, int] = field(default_factory=dict)
    moments: list[str] = field(default_factory=list)
    unable: str = ""


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The faults that were tried, and below those that could not be."""
    lines = [
        "| fault | tries | lost nothing | what happened otherwise |",
        "| --- | --- | --- | --- |",
    ]
    tried = {name: row for name, row in rows.items() if row["tries"]}
    for name, row in tried.items():
        lost = row["lost"]
        told = "; ".join(f"try {number}: {one_line(why)}" for number, why in lost.items())
        lines.append(
            f"| {FAULTS[name][0]} | {row['tries']} | {row['tries'] - len(lost)} | {told} |"
        )
    tries, lost = (sum(counts) for counts in zip(
        *((row["tries"], len(row["lost"])) for row in tried.values()), strict=True
    )) if tried else (0, 0)  # fmt: skip
    lines.append(f"| all | {tries} | {tries - lost} | |")
    for name, row in rows.items():
        if not row["tries"]:
            lines.append(f"\nNot tried: {FAULTS[name][0]}: {row['unable']}.")
    return "\n".join(lines)


def one_line(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def page(figures: dict[str, Any]) -> str:
    """The whole page."""
    rows, where = figures["rows"], figures["machine"]
    commands = dict.fromkeys((row["date"], row["command"]) for row in rows.values())
    ran = "; ".join(f"`{command}` on {day}" for day, command in commands)
    lines = [
        INTRODUCTION,
        f"{where['hardware']}; {where['system']}; {where['versions']}; {ran}.\n",
        table(rows),
        "\n## What was done, and what counts\n",
    ]
    for name, row in rows.items():
        title, promise = FAULTS[name]
        struck = ", ".join(f"{part} {count}" for part, count in sorted(row["struck"].items()))
        lines.append(
            f"- **{title}** (`{name}`). {promise}" + (f" It struck in: {struck}." if struck else "")
        )
    lines.append(
        "\n`python tools/faults.py --only NAME --number TRY --seed 0` does one try again; the "
        "moments of all of them are in the file named above."
    )
    return "\n".join(lines) + "\n"
