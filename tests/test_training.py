from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from datasets.loading import ShuffledSeeds
from lednet_imagenet import build_optimizer, build_schedule
from utils import distributed
from utils.checkpoint import on_cpu
from utils.optim import OPTIMIZERS, SCHEDULES, ema_of
from utils.training import Training

EPOCHS, STEPS, LR = 4, 6, 0.01
PATH = Path("last.pth")


def of_main(optimizer: str, schedule: str, model: nn.Module, steps: int) -> tuple:
    made = OPTIMIZERS[optimizer](model.parameters(), lr=LR, weight_decay=0.1)
    return made, SCHEDULES[schedule](made, EPOCHS * steps)


def of_the_classifier(recipe: str, model: nn.Module, steps: int) -> tuple:
    made = build_optimizer(recipe, model, LR)
    return made, build_schedule(recipe, made, EPOCHS, steps)


RECIPES = {
    f"{optimizer}, {schedule}": partial(of_main, optimizer, schedule)
    for optimizer in OPTIMIZERS
    for schedule in SCHEDULES
} | {f"classifier, {name}": partial(of_the_classifier, name) for name in ("paper", "modern")}


def begin(recipe: str, ema: bool = True, batch_size: int = 4, steps: int = STEPS) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    optimizer, scheduler = RECIPES[recipe](model, steps)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    average = ema_of(model, EPOCHS * steps) if ema else None
    return Training(model, model, optimizer, scheduler, scaler, batch_size, steps, average)


def train(training: Training, steps: int, rates: list[float] | None = None) -> list[dict]:
    """So many steps, of as many epochs as they take, as the programs make them; returns the sums
    of each epoch that ended."""
    ended = []
    for _ in range(steps):
        if training.step == 0 or not training.totals:
            training.begin_epoch(right=torch.tensor(0))
        if rates is not None:
            rates.append(training.optimizer.param_groups[0]["lr"])
        loss = training.model(torch.rand(training.batch_size, 3)).square().mean()
        training.optimizer.zero_grad()
        training.scaler.scale(loss).backward()
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.scheduler.step()
        if training.ema:
            training.ema.update_parameters(training.network)
        training.step += 1
        training.totals["loss"] += loss.detach()
        training.totals["images"] += training.batch_size
        training.totals["right"] += 1
        if training.step == training.steps:
            ended.append(training.end_epoch())
    return ended


def written(training: Training, tmp_path: Path) -> dict[str, Any]:
    """The state as it comes back from a file, with what the programs save beside it."""
    torch.save(training.state() | {"model": on_cpu(training.scored)}, tmp_path / "state")
    return torch.load(tmp_path / "state", weights_only=True)


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where} {key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for place, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where} {place}")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("done", [1, STEPS - 1, STEPS, STEPS + 2])
def test_going_on_from_a_file_is_never_having_stopped(recipe, ema, done, tmp_path):
    unbroken = begin(recipe, ema)
    sums = train(unbroken, 3 * STEPS + 1)
    stopped = begin(recipe, ema)
    train(stopped, done)
    state = written(stopped, tmp_path)
    resumed = begin(recipe, ema)
    train(resumed, 3)  # whatever it was before
    torch.rand(5)
    assert resumed.restore(state, PATH) == []
    assert (resumed.epoch, resumed.step) == divmod(done, STEPS)
    assert resumed.lr == stopped.lr
    assert_same(train(resumed, 3 * STEPS + 1 - done), sums[done // STEPS :])
    assert_same(written(resumed, tmp_path), written(unbroken, tmp_path))


def test_another_number_of_threads_is_told(tmp_path):
    stopped, resumed = begin("adam, poly"), begin("adam, poly")
    state = written(stopped, tmp_path)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        (difference,) = resumed.restore(state, PATH)
    finally:
        torch.set_num_threads(threads)
    assert f"OMP_NUM_THREADS {threads + 1}, it was torch" in difference
    assert difference.endswith(f"OMP_NUM_THREADS {threads}: rounding differs")


def test_another_precision_is_told(tmp_path):
    stopped, resumed = begin("adam, poly"), begin("adam, poly")
    resumed.amp_dtype = torch.bfloat16
    (difference,) = resumed.restore(written(stopped, tmp_path), PATH)
    assert "in torch.bfloat16 on" in difference and "in full precision on" in difference


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("batch_size", "steps"), [(2, 12), (3, 8), (5, 5), (8, 3), (24, 1)])
@pytest.mark.parametrize("done", [1, 4, STEPS - 1, STEPS, STEPS + 3])
def test_another_batch_size_goes_on_at_the_same_place_of_the_schedule(
    recipe, batch_size, steps, done, tmp_path
):
    """An epoch is of 24 images, and each schedule ends where it would have ended."""
    stopped = begin(recipe)
    train(stopped, done)
    resumed = begin(recipe, batch_size=batch_size, steps=steps)
    (difference,) = resumed.restore(written(stopped, tmp_path), PATH)
    assert f"steps are of {batch_size} images, not 4" in difference
    epoch, step = divmod(done, STEPS)
    assert resumed.epoch == epoch
    images = resumed.step * batch_size
    assert images <= step * 4 < images + batch_size or resumed.step == steps
    expected, rates = [], []
    train(begin(recipe, batch_size=batch_size, steps=steps), EPOCHS * steps, expected)
    place = resumed.epoch * steps + resumed.step
    train(resumed, EPOCHS * steps - place, rates)
    # Rates that each follow from the one before keep what is left of a step that was not whole.
    least = min(expected[min(place + 1, len(expected) - 1)] / expected[min(place, 3 * steps)], 1)
    for rate, at_place in zip(rates[1:], expected[place + 1 :], strict=True):
        assert 0.999 * least * at_place <= rate <= 1.001 * at_place
    assert resumed.scheduler.get_last_lr()[0] == pytest.approx(rate_at_the_end(recipe), abs=1e-9)
    assert (resumed.epoch, resumed.step) == (EPOCHS, 0)


def rate_at_the_end(recipe: str) -> float:
    training = begin(recipe)
    train(training, EPOCHS * STEPS)
    return training.scheduler.get_last_lr()[0]


def test_an_epoch_that_was_done_is_not_begun_again_with_another_batch_size(tmp_path):
    """Its last step is done, its validation is not; 21 images are no whole number of batches."""
    stopped = begin("adam, poly", steps=6)
    train(stopped, 5)
    stopped.step = 6
    resumed = begin("adam, poly", batch_size=8, steps=3)
    resumed.restore(written(stopped, tmp_path), PATH)
    assert resumed.step == 3


def pretend(monkeypatch, rank: int, count: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "processes", lambda: count)


def state_of_two(tmp_path: Path, monkeypatch) -> dict[str, Any]:
    """What two processes would save, each with sums of its own, after 4 of 6 steps."""
    trainings = [begin("adamw, onecycle", batch_size=2) for _ in range(2)]
    for rank, training in enumerate(trainings):
        torch.manual_seed(rank)
        train(training, 4)
    own = [training.state()["processes"][0] for training in trainings]
    return written(trainings[0], tmp_path) | {"processes": own}


def test_each_process_gets_its_own_sums_and_random_state_back(tmp_path, monkeypatch):
    state = state_of_two(tmp_path, monkeypatch)
    for rank in range(2):
        pretend(monkeypatch, rank, 2)
        resumed = begin("adamw, onecycle", batch_size=2)
        assert resumed.restore(state, PATH) == []
        own = state["processes"][rank]
        assert_same(resumed.totals, own["totals"])
        assert torch.equal(torch.get_rng_state(), own["rng"]["torch"])


@pytest.mark.parametrize("count", [1, 3, 4])
def test_sums_are_kept_whatever_the_number_of_processes(tmp_path, monkeypatch, count):
    state = state_of_two(tmp_path, monkeypatch)
    sums = {name: 0 for name in state["processes"][0]["totals"]}
    drawn = set()
    for rank in range(count):
        pretend(monkeypatch, rank, count)
        steps = {1: 12, 3: 4, 4: 3}[count]  # of 24 images, 2 in each process
        resumed = begin("adamw, onecycle", batch_size=2, steps=steps)
        *_, difference = resumed.restore(state, PATH)
        assert f"the number of processes is {count}, not 2" in difference
        assert resumed.step == 16 // (2 * count)
        drawn.add(torch.rand(()).item())
        resumed.begin_epoch(right=torch.tensor(0))
        for name in sums:
            sums[name] += resumed.totals[name]
    assert sums["images"] == 16 and sums["right"] == 8
    expected = sum(process["totals"]["loss"] for process in state["processes"])
    assert torch.isclose(sums["loss"], expected)
    assert len(drawn) == count  # no two drop the same


def test_the_same_batches_in_as_many_steps_go_on_exactly_with_other_processes(
    tmp_path, monkeypatch
):
    """Four images a step from one process with 4, where two had 2 each."""
    state = state_of_two(tmp_path, monkeypatch)
    resumed = begin("adamw, onecycle", batch_size=4)
    (difference,) = resumed.restore(state, PATH)
    assert "the number of processes is 1, not 2" in difference
    assert resumed.step == 4 and resumed.scheduler.last_epoch == 4


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 4), (2, 2), (2, 3), (4, 1), (3, 2)])
def test_the_rest_of_an_epoch_is_what_others_had_not_seen(processes, batch_size, tmp_path):
    """Each image of the epoch once, but for whole batches that are begun again."""
    order = [item for item, _ in ShuffledSeeds(24, 7)]
    state = 4 * 4  # images that were seen, of two processes with 2 each
    step = state // (processes * batch_size)
    rest = []
    for rank in range(processes):
        sampler = ShuffledSeeds(24, 7, rank, processes)
        sampler.begin(0, step * batch_size)
        rest += [item for item, _ in sampler]
    assert set(order[16:]) <= set(rest)
    assert len(rest) == len(set(rest)) < 24 - 16 + processes * batch_size
    assert len(DataLoader(range(24), sampler=sampler)) == len(rest) // processes
