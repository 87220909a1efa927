"""Damaged checkpoints, and images that are cut short during training.

Fuzzed images and labels: tests/test_fuzz.py.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from compare import read

from faults.trials import LAST, PREVIOUS, PROGRESS, Programs, Trial, assert_refused, assert_whole


def damage(random: Random, path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[random.randrange(1, len(content)) :]
    elif how == "emptied":
        content.clear()
    elif how in ("flipped", "scrambled"):
        for bit in random.sample(range(8 * len(content)), 1000 if how == "scrambled" else 1):
            content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    if how == "removed":
        path.unlink()


@pytest.mark.trials(cut=6, emptied=2, flipped=6, removed=2)
def test_the_checkpoint_before_replaces_a_damaged_one(trial: Trial, program: Programs):
    run, last = program("main"), trial.folder / LAST
    trial.interrupt(run)
    damage(trial.random, last, trial.case)
    # A bit between the records of the archive means nothing.
    good = trial.case == "flipped" and isinstance(read(last), dict)
    result = trial.finish(run, left=f"damaged-{LAST}")
    assert (PREVIOUS in result.out) != good, result.out


@pytest.mark.trials(main=4)
def test_two_damaged_checkpoints_are_refused_and_kept(trial: Trial, program: Programs):
    run, both = program(trial.case), [trial.folder / LAST, trial.folder / PREVIOUS]
    trial.interrupt(run)
    for path in both:
        damage(trial.random, path, trial.random.choice(["cut", "emptied", "scrambled"]))
    before = [path.read_bytes() for path in both]
    assert_refused(trial.run(run.command(trial.folder)), LAST, PREVIOUS)
    assert [path.read_bytes() for path in both] == before


@pytest.mark.trials(refused=6, skipped=4)
def test_image_cut_short(trial: Trial, program: Programs, data: Path):
    run, random = program("main"), trial.random
    copy = Path(shutil.copytree(data / "scenes", trial.output / "scenes"))
    split = random.choice(["train", "val"])
    images = sorted(copy.glob(f"leftImg8bit/{split}/*/*.png"))
    victim = random.choice(images + sorted(copy.glob(f"gtFine/{split}/*/*_labelIds.png")))
    content = victim.read_bytes()
    length = int(random.uniform(0.1, 0.8) * len(content))
    options = ["--datadir", str(copy), *(["--skip-broken"] if trial.case == "skipped" else [])]
    early = replace(run, seconds=run.seconds / 2)  # later, nothing reads it any more
    result = trial.disturb(
        early, lambda _: victim.write_bytes(content[:length]), *options,
        when=lambda process: PROGRESS.search(process.out()),
    )  # fmt: skip
    assert_whole(trial.folder)
    if trial.case == "refused":
        assert_refused(result, victim.name)
        assert (trial.folder / LAST).exists()
        victim.write_bytes(content)
        trial.finish(run)
    else:
        assert result.status == 0, result.err
        assert victim.name in result.err
        logs = [read(folder / "log.csv") for folder in (trial.folder, run.reference)]
        rows, expected = ([(row["stage"], row["epoch"]) for row in log] for log in logs)
        assert rows == expected
