import argparse
import gc
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compare import shown, value_differences
from conftest import fork_two, pretend_processes, read_log, same_weights
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from datasets.loading import Batch, ShuffledSeeds, batch_loader
from datasets.segmentation import Classes
from models.lednet import AuxiliaryHead, LEDNet
from utils import distributed, training
from utils.checkpoint import CheckpointError, Description, load_checkpoint, on_cpu, save_checkpoint
from utils.evaluation import OutOfMemory
from utils.interrupts import Diverged, Guard, StopSignals
from utils.losses import ohem_cross_entropy, with_auxiliary
from utils.metrics import ConfusionMatrix, TopKAccuracy
from utils.optim import PretrainingSchedule, average_of, build_optimizer, one_cycle, poly
from utils.run_folder import Run, open_run
from utils.training import (
    Stage,
    TrainState,
    Validation,
    fit,
    forward_of,
    record_graphs,
    train_one_epoch,
    train_step,
)

CPU, PATH = torch.device("cpu"), Path("last.pth")
ABOUT = Description(
    "fields", Classes(["a", "b"], [[0] * 3] * 2, [0, 1]), [0.0] * 3, [1.0] * 3, 8, 24
)
EPOCHS, STEPS, LR = 4, 6, 0.01


class ShortPretraining(PretrainingSchedule):
    CONSTANT_EPOCHS = 2


# Optimizer and schedule by name of the recipe; the schedule takes the steps of an epoch.
RECIPES = {
    "adam, poly": ("adam", lambda optimizer, steps: poly(optimizer, EPOCHS * steps)),
    "adamw, one cycle": ("adamw", lambda optimizer, steps: one_cycle(optimizer, EPOCHS * steps)),
    "sgd, pretraining": ("sgd", ShortPretraining),
}


def stage_of(
    recipe: str = "adam, poly",
    batch_size: int = 4,
    average: bool = False,
    model: nn.Module | None = None,
    items: list[tuple[Tensor, int]] | None = None,
    **options: Any,
) -> Stage:
    """Return a stage that classifies 24 points, 4 in a step by default."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
    model = model or nn.Sequential(*layers)
    if items is None:
        points = torch.rand(24, 3, generator=torch.Generator().manual_seed(1))
        items = [(point, int(point.sum() > 1.5)) for point in points]
    sampler = ShuffledSeeds(len(items), 7, distributed.rank(), distributed.processes())
    loader = batch_loader(items, sampler, batch_size, 0, stacked=True)
    name, schedule = RECIPES[recipe]
    optimizer = build_optimizer(name, model, LR, weight_decay=0.1)
    defaults = {
        "number": 0,
        "epochs": EPOCHS,
        "about": ABOUT,
        "model": model,
        "network": model,
        "loader": loader,
        "image_size": (8, 12),
        "prepare": lambda batch: (batch.images, batch.labels),
        "loss": nn.CrossEntropyLoss(),
        "optimizer": optimizer,
        "scheduler": schedule(optimizer, len(loader)),
        "val_loader": [],
        "validate": lambda network, batches, title: Validation({}, {"score": 0.5}, []),
        "score": "score",
        "files": lambda index: [f"{index}.png"],
        "best_files": {"best.pth": on_cpu},
        "average": average_of(model, EPOCHS * len(loader)) if average else None,
        "meter": partial(TopKAccuracy, (1,)),
    }
    return Stage(**defaults | options)


# The state


def train(state: TrainState, steps: int, rates: list[float] | None = None) -> list[dict]:
    """Take steps on random points, over the ends of epochs; returns the scores of each epoch."""
    stage, ended = state.stage, []
    for number in range(steps):
        if number == 0 or not state.totals:
            state.begin_epoch()
        if rates is not None:
            rates.append(stage.optimizer.param_groups[0]["lr"])
        size = stage.loader.batch_size
        batch = Batch(torch.rand(size, 3), torch.randint(2, (size,)), [], [], [])
        train_step(state, stage.model, batch)
        if state.step == stage.steps:
            ended.append(state.end_epoch())
    return ended


def written(state: TrainState, folder: Path) -> dict[str, Any]:
    """Return the state as it comes back from a file."""
    save_checkpoint(state.state_dict(), folder / "state.pth")
    return load_checkpoint(folder / "state.pth")


def assert_same(value: Any, expected: Any) -> None:
    assert list(value_differences(value, expected, "state")) == []


@pytest.mark.parametrize(
    ("recipe", "average"), [*((recipe, True) for recipe in RECIPES), ("adam, poly", False)]
)
@pytest.mark.parametrize("done", [1, STEPS - 1, STEPS, 2 * STEPS + 2])
def test_resuming_from_a_file_is_like_never_stopping(recipe, average, done, tmp_path):
    unbroken = TrainState(stage_of(recipe, average=average))
    scores = train(unbroken, 3 * STEPS + 1)
    stopped = TrainState(stage_of(recipe, average=average))
    train(stopped, done)
    state = written(stopped, tmp_path)
    resumed = TrainState(stage_of(recipe, average=average))
    train(resumed, 3)  # whatever state it had before
    torch.rand(5)
    assert resumed.load_state_dict(state, PATH) == []
    assert (resumed.epoch, resumed.step) == divmod(done, STEPS)
    assert resumed.lr == stopped.lr
    assert_same(train(resumed, 3 * STEPS + 1 - done), scores[done // STEPS :])
    assert_same(written(resumed, tmp_path), written(unbroken, tmp_path))


def test_the_best_epoch_comes_back(tmp_path):
    stopped = TrainState(stage_of(), best={"epoch": 1, "score": 0.7})
    resumed = TrainState(stage_of())
    resumed.load_state_dict(written(stopped, tmp_path), PATH)
    assert resumed.best == {"epoch": 1, "score": 0.7}


def test_another_number_of_threads_is_reported(tmp_path):
    state = written(TrainState(stage_of()), tmp_path)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        (difference,) = TrainState(stage_of()).load_state_dict(state, PATH)
    finally:
        torch.set_num_threads(threads)
    assert f"OMP_NUM_THREADS {threads + 1}, it was torch" in difference
    assert difference.endswith(f"OMP_NUM_THREADS {threads}: rounding differs")


def test_another_precision_is_reported(tmp_path):
    state = written(TrainState(stage_of()), tmp_path)
    resumed = TrainState(stage_of(amp_dtype=torch.bfloat16))
    (difference,) = resumed.load_state_dict(state, PATH)
    assert "in torch.bfloat16 on" in difference and "in full precision on" in difference


def test_a_scaler_without_a_stored_state_starts_anew(tmp_path):
    """The precision, which needed none before, may change."""
    state = written(TrainState(stage_of()), tmp_path)
    resumed = TrainState(stage_of())
    resumed.stage.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    resumed.load_state_dict(state, PATH)
    assert resumed.stage.scaler.get_scale() == 4.0


def test_another_number_of_training_images_is_refused(tmp_path):
    state = written(TrainState(stage_of()), tmp_path)
    with pytest.raises(CheckpointError, match="has 24 training images now, and 23 when"):
        TrainState(stage_of()).load_state_dict(state | {"train_images": 23}, PATH)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("batch_size", "steps", "done"),
    [(2, 12, STEPS - 1), (3, 8, 1), (5, 5, STEPS + 3), (8, 3, STEPS - 1), (24, 1, STEPS + 3)],
)
def test_another_batch_size_goes_on_at_the_same_place_of_the_schedule(
    recipe, batch_size, steps, done, tmp_path
):
    """Each schedule ends where it would have ended."""
    stopped = TrainState(stage_of(recipe))
    train(stopped, done)
    resumed = TrainState(stage_of(recipe, batch_size))
    assert resumed.stage.steps == steps
    (difference,) = resumed.load_state_dict(written(stopped, tmp_path), PATH)
    assert f"steps are of {batch_size} images now, not 4" in difference
    epoch, step = divmod(done, STEPS)
    assert resumed.epoch == epoch
    images = resumed.step * batch_size
    assert images <= step * 4 < images + batch_size or resumed.step == steps
    expected, rates = [], []
    train(TrainState(stage_of(recipe, batch_size)), EPOCHS * steps, expected)
    place = resumed.epoch * steps + resumed.step
    train(resumed, EPOCHS * steps - place, rates)
    # A schedule that derives each rate from the one before keeps the rest of a broken step.
    least = min(expected[min(place + 1, len(expected) - 1)] / expected[min(place, 3 * steps)], 1)
    for rate, at_place in zip(rates[1:], expected[place + 1 :], strict=True):
        assert 0.999 * least * at_place <= rate <= 1.001 * at_place
    at_end = TrainState(stage_of(recipe))
    train(at_end, EPOCHS * STEPS)
    assert resumed.stage.scheduler.get_last_lr()[0] == pytest.approx(
        at_end.stage.scheduler.get_last_lr()[0], abs=1e-9
    )
    assert (resumed.epoch, resumed.step) == (EPOCHS, 0)


def test_a_finished_epoch_is_not_begun_again_with_another_batch_size(tmp_path):
    """Its last step is done, its validation is not."""
    stopped = TrainState(stage_of())
    train(stopped, 5)
    stopped.step = 6
    resumed = TrainState(stage_of(batch_size=9))
    resumed.load_state_dict(written(stopped, tmp_path), PATH)
    assert resumed.step == resumed.stage.steps == 3


def state_of_two(folder: Path) -> dict[str, Any]:
    """Return what two processes would save, each with sums of its own, after 4 of 6 steps."""
    processes = []
    for seed in range(2):
        state = TrainState(stage_of("adamw, one cycle", batch_size=2))
        state.stage.steps = STEPS
        torch.manual_seed(seed)
        train(state, 4)
        processes += state.state_dict()["processes"]
    return written(state, folder) | {"processes": processes}


def test_each_process_gets_its_own_sums_and_random_state_back(tmp_path, monkeypatch):
    state = state_of_two(tmp_path)
    for rank in range(2):
        pretend_processes(monkeypatch, 2, rank)
        resumed = TrainState(stage_of("adamw, one cycle", batch_size=2))
        assert resumed.load_state_dict(state, PATH) == []
        own = state["processes"][rank]
        assert_same(resumed.totals, own["totals"])
        assert torch.equal(torch.get_rng_state(), own["rng"]["torch"])


@pytest.mark.parametrize("count", [1, 3, 4])
def test_sums_are_kept_for_any_number_of_processes(tmp_path, monkeypatch, count):
    state = state_of_two(tmp_path)
    sums, drawn = Counter(), set()
    for rank in range(count):
        pretend_processes(monkeypatch, count, rank)
        resumed = TrainState(stage_of("adamw, one cycle", batch_size=2))
        *_, difference = resumed.load_state_dict(state, PATH)
        assert f"the number of processes is {count}, not 2" in difference
        assert resumed.step == 16 // (2 * count)
        drawn.add(torch.rand(()).item())
        resumed.begin_epoch()
        for name, value in resumed.totals.items():
            sums[name] += value
    assert sums["images"] == 16 and sums["meter"][-1] == 16
    expected = sum(process["totals"]["loss"] for process in state["processes"])
    assert torch.isclose(sums["loss"], expected)
    assert len(drawn) == count  # no two drop the same channels


def test_other_processes_with_the_same_batches_go_on_exactly(tmp_path, monkeypatch):
    """One process takes 4 images a step, where two took 2 each."""
    resumed = TrainState(stage_of("adamw, one cycle", batch_size=4))
    (difference,) = resumed.load_state_dict(state_of_two(tmp_path), PATH)
    assert "the number of processes is 1, not 2" in difference
    assert resumed.step == 4 and resumed.stage.scheduler.last_epoch == 4


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 4), (2, 2), (2, 3), (4, 1), (3, 2)])
def test_the_rest_of_an_epoch_is_what_was_not_seen(processes, batch_size):
    """Each image of the epoch once, except in batches that are begun again."""
    order = [item for item, _ in ShuffledSeeds(24, 7)]
    seen = 4 * 4  # by two processes with 2 images each
    step = seen // (processes * batch_size)
    rest = []
    for rank in range(processes):
        sampler = ShuffledSeeds(24, 7, rank, processes)
        sampler.begin(0, step * batch_size)
        rest += [item for item, _ in sampler]
    assert set(order[seen:]) <= set(rest)
    assert len(rest) == len(set(rest)) < 24 - seen + processes * batch_size
    assert len(DataLoader(range(24), sampler=sampler)) == len(rest) // processes


# An epoch


# What a guard needs of a run that neither saves nor stops.
RUN = SimpleNamespace(
    args=SimpleNamespace(checkpoint_minutes=math.inf),
    signals=StopSignals(),
    last=PATH,
    command="python main.py",
)


def train_epoch(stage: Stage, steps_loss: int = 0, forward: Callable | None = None) -> TrainState:
    """Train an epoch up to its end."""
    state = TrainState(stage)
    forward = forward or stage.model
    state.rates = train_one_epoch(state, Guard(RUN, state), forward, "epoch", steps_loss)
    state.epoch_scores = state.scores()
    return state


def test_an_epoch_lowers_the_loss_and_steps_the_schedule_with_each_batch():
    stage = stage_of(model=nn.Linear(3, 2))
    first = train_epoch(stage)
    assert first.step == 6 and first.totals["images"] == 24
    assert stage.scheduler.last_epoch == 6
    assert stage.scheduler.get_last_lr()[0] == pytest.approx(LR * 0.75**0.9)
    second = train_epoch(stage)
    assert second.epoch_scores["train_loss"] < first.epoch_scores["train_loss"]
    assert first.rates["images_per_second"] > 0 and 0 <= first.rates["data_wait"] <= 1
    assert stage.model.training


def test_the_training_loss_is_the_mean_over_images():
    """A smaller last batch counts less."""
    items = [(torch.tensor([float(n)]), 0) for n in range(5)]
    stage = stage_of(model=nn.Linear(1, 2), items=items, meter=None)
    stage.prepare = lambda batch: (batch.images, batch.images)
    stage.loss = lambda outputs, points: points.mean() + 0 * outputs.sum()
    assert train_epoch(stage).epoch_scores["train_loss"] == pytest.approx(2.0)


def test_kernels_are_not_searched_for_a_smaller_last_batch(monkeypatch):
    """A search takes seconds, for each pass."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    searched = []

    def note(*_: object) -> None:
        searched.append(torch.backends.cudnn.benchmark)

    stage = stage_of(model=nn.Linear(3, 2), batch_size=10)  # of 24 points
    stage.model.register_forward_hook(note)
    stage.model.weight.register_hook(note)
    train_epoch(stage)
    assert searched == [True] * 4 + [False] * 2
    assert torch.backends.cudnn.benchmark


def test_every_epoch_of_all_stages_has_its_own_order():
    """An epoch that is resumed leaves out the images that were seen."""

    def order_of(epochs_before: int, epoch: int, step: int = 0) -> list[int]:
        seen = []
        stage = stage_of(epochs_before=epochs_before, meter=None)
        stage.prepare = lambda batch: seen.extend(batch.indices) or (batch.images, batch.labels)
        state = TrainState(stage, epoch, step)
        train_one_epoch(state, Guard(RUN, state), stage.model, "epoch", 0)
        assert state.step == STEPS
        return seen

    orders = [order_of(0, 0), order_of(0, 1), order_of(2, 0), order_of(2, 1)]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert order_of(2, 1, step=4) == orders[3][16:]


def test_what_is_prepared_is_trained_on_and_counted():
    stage = stage_of(model=nn.Linear(3, 2))
    plain = train_epoch(stage)
    prepared = stage_of(model=nn.Linear(3, 2))
    prepared.prepare = lambda batch: (batch.images, 1 - batch.labels)
    wrong = train_epoch(prepared)
    assert plain.epoch_scores["train_top1"] != wrong.epoch_scores["train_top1"]
    assert plain.totals["meter"][-1] == 24


def test_the_average_follows_each_step():
    stage = stage_of(model=nn.Linear(3, 2), batch_size=12)
    stage.average = AveragedModel(stage.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    weights = []

    def keep(images: Tensor) -> Tensor:
        weights.append(stage.model.weight.detach().clone())
        return stage.model(images)

    train_epoch(stage, forward=keep)
    first, second = weights[1], stage.model.weight
    assert not torch.equal(first, second)
    assert torch.allclose(stage.average.module.weight, (first + second) / 2)
    assert stage.scored is stage.average.module


def test_the_average_changes_nothing_of_the_training():
    plain, averaged = stage_of(), stage_of(average=True)
    for stage in (plain, averaged):
        torch.manual_seed(1)
        train_epoch(stage)
    assert same_weights(plain.model.state_dict(), averaged.model.state_dict())
    assert not same_weights(averaged.scored.state_dict(), averaged.model.state_dict())


def test_a_step_does_not_wait_for_a_gpu(monkeypatch):
    """Reading a value would wait, and fails for tensors on the device "meta"."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which "meta" has not
    model = AuxiliaryHead(LEDNet(num_classes=5, apn_channels=4), 5).to("meta")
    loss = with_auxiliary(partial(ohem_cross_entropy, weight=torch.ones(5, device="meta")), 0.4)
    stage = stage_of(
        "adamw, one cycle", average=True, model=model, loss=loss,
        prepare=lambda batch: (torch.rand(2, 3, 64, 64, device="meta"), batch.labels),
        meter=partial(ConfusionMatrix, 5, "meta"),
    )  # fmt: skip
    state = TrainState(stage)
    state.begin_epoch()
    for _ in range(2):
        labels = torch.zeros(2, 64, 64, dtype=torch.int64, device="meta")
        train_step(state, model, Batch([], labels, [], [], []))
    assert state.step == 2 and stage.average.n_averaged == 2


def test_the_loss_gets_all_outputs_and_the_meter_the_first():
    class TwoHeads(nn.Linear):
        def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(points), points.mean()

    stage = stage_of(
        model=TwoHeads(3, 2), loss=lambda outputs, labels: outputs[0].square().mean() + 3
    )
    state = train_epoch(stage)
    assert state.epoch_scores["train_loss"] > 3 and state.totals["meter"][-1] == 24


def test_mixed_precision_keeps_the_weights_in_full_precision():
    stage, outputs = stage_of(amp_dtype=torch.bfloat16), set()
    stage.model.register_forward_hook(lambda model, inputs, output: outputs.add(output.dtype))
    assert 0 < train_epoch(stage).epoch_scores["train_loss"] < 10
    assert outputs == {torch.bfloat16}
    assert {weight.dtype for weight in stage.model.parameters()} == {torch.float32}


def scaled(stage: Stage) -> Stage:
    """Scale gradients as float16 needs it, here on the CPU."""
    stage.scaler = torch.amp.GradScaler("cpu")
    return stage


def test_scaled_gradients_train_like_plain_ones():
    plain, with_scale = (stage_of(model=nn.Linear(3, 2)) for _ in range(2))
    with_scale.model.load_state_dict(plain.model.state_dict())
    scaled(with_scale)
    assert train_epoch(plain).totals["skipped_steps"] == 0
    assert train_epoch(with_scale).totals["skipped_steps"] == 0
    for ours, theirs in zip(with_scale.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert with_scale.scaler.state_dict()["_growth_tracker"] == 6


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(("rank", "counted"), [(0, 6), (1, 0)])
def test_steps_that_the_scaler_skips_are_counted_once_and_shown(monkeypatch, capsys, rank, counted):
    """A gradient is not finite although the loss is: the weights stay, and the run goes on.

    All processes skip the same steps, and sums are taken over the processes.
    """
    stage = scaled(stage_of(model=nn.Linear(3, 2)))
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    before = stage.model.weight.detach().clone()
    stage.model.weight.register_hook(lambda gradient: gradient * math.inf)
    assert train_epoch(stage, steps_loss=6).totals["skipped_steps"] == counted
    assert torch.equal(stage.model.weight, before)
    assert ("6 steps skipped by the scaler" in capsys.readouterr().out) == (counted > 0)


def test_a_log_gets_a_line_of_progress_every_few_steps(capsys):
    train_epoch(stage_of(), steps_loss=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch: step 3/6", "epoch: step 6/6"]
    assert "train loss" in lines[0] and "train top-1" in lines[0] and "waiting for" in lines[0]


def test_a_loss_that_is_not_finite_is_reported_with_its_files():
    items = [(torch.full((3,), math.nan if n == 3 else 1.0), 0) for n in range(24)]
    with pytest.raises(Diverged, match=r"the loss is nan in step \d of epoch 1, with .*\b3\.png"):
        train_epoch(stage_of(items=items))


@pytest.mark.parametrize("part", ["forward", "prepare"])
def test_a_gpu_without_memory_says_what_it_was_given_and_what_is_saved(part):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    stage = stage_of(items=[(torch.zeros(3, 16, 24), 0)] * 4)
    if part == "prepare":
        stage.prepare = full
    with pytest.raises(OutOfMemory, match="4 images of 24x16; no checkpoint was written yet"):
        train_epoch(stage, forward=full)


# A whole stage


@pytest.fixture
def opened(tmp_path) -> Iterator[Callable[..., Run]]:
    """Open a run in a folder of tmp_path and close the one before; arguments are options."""
    with ExitStack() as stack:

        def start(savedir: str = "run", **options: object) -> Run:
            stack.pop_all().close()
            defaults = {"resume": False, "compile": False, "graphs": True, "encoder_epochs": 0}
            defaults |= {"checkpoint_minutes": 10.0, "steps_loss": 0, "epochs_save": 0}
            defaults |= {"val_every": 1}
            args = argparse.Namespace(**defaults | options, savedir=str(tmp_path / savedir))
            run = stack.enter_context(open_run(args))
            run.begin()
            return run

        yield start


def scoring(*scores: float) -> Callable[..., Validation]:
    """Return a validation that finds these scores, and paints pictures of them."""
    left = iter(scores)

    def validate(network: nn.Module, batches: object, title: str) -> Validation:
        score = next(left)
        picture = torch.full((3, 4, 4), round(255 * score), dtype=torch.uint8)
        return Validation({"val_score": score}, {"score": score}, [picture])

    return validate


def test_the_best_epoch_is_kept(opened, tmp_path):
    """In each file that the stage asks for, such as one with the encoder alone."""
    best_files = {"best.pth": on_cpu, "part.pth": lambda model: {"bias": model[0].bias.detach()}}
    stage = stage_of(epochs=3, validate=scoring(0.4, 0.8, 0.6), best_files=best_files)
    assert fit(stage, opened(epochs_save=1)) == {"epoch": 2, "score": 0.8}
    files = {path.name: load_checkpoint(path) for path in (tmp_path / "run").glob("*.pth")}
    numbered = {f"epoch00{number}.pth" for number in (1, 2, 3)}
    assert files.keys() == {"last.pth", "previous.pth", "best.pth", "part.pth", *numbered}
    best = files["best.pth"]
    assert best["epoch"] == 2 and best["best"] == {"epoch": 2, "score": 0.8}
    assert same_weights(best["model"], files["epoch002.pth"]["model"])
    assert not same_weights(best["model"], files["last.pth"]["model"])
    assert files["part.pth"]["epoch"] == 2
    assert torch.equal(files["part.pth"]["model"]["bias"], best["model"]["0.bias"])
    assert files["last.pth"]["epoch"] == 3 and files["previous.pth"]["epoch"] == 2
    resumable = {"optimizer", "scheduler", "scaler", "processes", "training_model"}
    assert resumable < files["last.pth"].keys() and not resumable & best.keys()
    assert ABOUT.to_checkpoint().items() <= best.items()


def test_the_average_is_scored_and_saved(opened, tmp_path):
    """What is trained is in last.pth alone."""
    scored = []
    stage = stage_of(epochs=1, average=True)
    stage.validate = lambda network, *_: scored.append(network) or Validation({}, {"score": 1}, [])
    stage.best_files = {"best.pth": on_cpu, "bias.pth": lambda network: {"b": network[0].bias}}
    fit(stage, opened())
    average = stage.average.module.state_dict()
    assert scored == [stage.average.module]
    files = {name: load_checkpoint(tmp_path / f"run/{name}.pth") for name in ("last", "best")}
    for file in files.values():
        assert same_weights(file["model"], average)
    assert not same_weights(average, stage.model.state_dict())
    assert same_weights(files["last"]["training_model"], stage.model.state_dict())
    assert files["last"]["ema_updates"] == STEPS
    bias = load_checkpoint(tmp_path / "run/bias.pth")["model"]
    assert torch.equal(bias["b"], average["0.bias"])


def test_the_first_of_equal_epochs_is_the_best(opened):
    assert fit(stage_of(epochs=2, validate=scoring(0.0, 0.0)), opened())["epoch"] == 1


def test_validations_can_be_skipped_but_for_the_last(opened, tmp_path, capsys):
    stage = stage_of(epochs=3, validate=scoring(0.4, 0.3))
    assert fit(stage, opened(val_every=2))["epoch"] == 2
    rows = read_log(tmp_path / "run")
    assert [row["val_score"] for row in rows] == ["nan", "0.4", "0.3"]
    assert set(shown(tmp_path / "run")["score/val"]) == {2, 3}


def test_checkpoints_follow_validations_and_the_first_epoch(opened, tmp_path, monkeypatch):
    """And nothing else while it is not time."""
    run, saved = opened(val_every=3), []
    save = run.save
    monkeypatch.setattr(run, "save", lambda state: saved.append(state["epoch"]) or save(state))
    fit(stage_of(epochs=5, validate=scoring(0.4, 0.3)), run)
    assert saved == [1, 3, 5]
    assert load_checkpoint(tmp_path / "run/last.pth")["epoch"] == 5


def test_the_log_has_a_row_for_each_epoch(opened, tmp_path, capsys):
    fit(stage_of(number=2, epochs=2, epochs_before=3, validate=scoring(0.4, 0.8)), opened())
    rows = read_log(tmp_path / "run")
    assert [(row["stage"], row["epoch"]) for row in rows] == [("2", "1"), ("2", "2")]
    assert [float(row["lr"]) for row in rows] == pytest.approx([LR, LR * 0.75**0.9])
    assert rows[0].keys() > {"train_loss", "train_top1", "skipped_steps", "left_out", "data_wait"}
    assert set(shown(tmp_path / "run")["loss/train"]) == {4, 5}
    assert "stage 2 epoch 2/2: train loss " in capsys.readouterr().out


def test_tensorboard_gets_about_ten_pictures_of_a_kind_and_the_last(opened, tmp_path):
    small = [(torch.zeros(3), 0)] * 4
    fit(stage_of(epochs=25, items=small, validate=scoring(*[0.5] * 25)), opened())
    assert list(shown(tmp_path / "run")["val/0"]) == [*range(2, 25, 2), 25]


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_what_is_not_finite_leaves_no_trace_of_its_epoch(opened, tmp_path, what):
    """There is one step in an epoch: all is checked before anything is scored or saved."""
    stage = stage_of(batch_size=24, validate=scoring())
    if what == "loss":
        stage.loss = lambda logits, labels: logits.sum() * math.nan
    else:
        stage.model[0].weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(Diverged, match=rf"{what} is .* epoch 1.* no checkpoint was written yet"):
        fit(stage, opened())
    assert not list((tmp_path / "run").glob("*.pth"))
    assert not (tmp_path / "run/log.csv").exists()


def test_the_last_good_checkpoint_may_be_that_of_the_stage_before(opened, tmp_path):
    run = opened()
    fit(stage_of(number=1, epochs=1), run)
    with pytest.raises(Diverged) as caught:
        fit(stage_of(number=2, loss=lambda logits, labels: logits.sum() * math.nan), run)
    assert "in step 1 of epoch 1 of stage 2" in str(caught.value)
    assert f"the last good checkpoint is {tmp_path / 'run/last.pth'}" in str(caught.value)
    assert load_checkpoint(tmp_path / "run/last.pth")["stage"] == 1


def test_two_processes_train_like_one(opened, tmp_path):
    def train(folder: str, batch_size: int) -> None:
        torch.manual_seed(0)
        stage = stage_of(batch_size=batch_size, model=nn.Linear(3, 2), epochs=2)
        fit(stage, opened(folder))
        torch.save(stage.model.state_dict(), tmp_path / f"{folder}-{distributed.rank()}")

    def train_in_two() -> None:
        distributed.start(CPU)
        train("two", 2)
        distributed.stop()

    train("one", 4)
    assert [result.status for result in fork_two(train_in_two, tmp_path)] == [0, 0]
    one, first, second = (
        torch.load(tmp_path / name, weights_only=True) for name in ("one-0", "two-0", "two-1")
    )
    assert same_weights(first, second)
    assert all(torch.allclose(first[name], one[name], atol=1e-6) for name in one)
    for ours, expected in zip(read_log(tmp_path / "two"), read_log(tmp_path / "one"), strict=True):
        assert float(ours["train_loss"]) == pytest.approx(float(expected["train_loss"]), rel=1e-5)
        assert ours["train_top1"] == expected["train_top1"]


def test_processes_are_scored_with_the_same_running_statistics(opened, tmp_path):
    """Those of the first: each process has its own, of its own images."""

    def train_in_two() -> None:
        distributed.start(CPU)
        trained = []

        def validate(network: nn.Module, *_: object) -> Validation:
            file = tmp_path / f"scored-{distributed.rank()}"
            torch.save([trained[-1], network[1].running_mean], file)
            return Validation({}, {"score": 0.5}, [])

        stage = stage_of(batch_size=2, epochs=1, validate=validate)
        stage.model[1].register_forward_hook(
            lambda layer, *_: trained.append(layer.running_mean.clone())
        )
        fit(stage, opened())
        distributed.stop()

    assert [result.status for result in fork_two(train_in_two, tmp_path)] == [0, 0]
    (before, scored), (other_before, other_scored) = (
        torch.load(tmp_path / f"scored-{rank}", weights_only=True) for rank in range(2)
    )
    assert not torch.equal(before, other_before)
    assert torch.equal(scored, before) and torch.equal(other_scored, before)


def test_a_resumed_run_prints_what_differs(opened, capsys):
    fit(stage_of(epochs=1), opened())
    fit(stage_of(epochs=2, batch_size=8), opened(resume=True))
    out = capsys.readouterr().out
    assert "resuming after epoch 1\nnote: steps are of 8 images now, not 4, " in out


def test_a_finished_stage_is_left_as_it_is(opened, tmp_path):
    fit(stage_of(epochs=1, validate=scoring(0.7)), opened())
    names = ("log.csv", "best.pth", "last.pth")
    before = [(tmp_path / "run" / name).read_bytes() for name in names]
    assert fit(stage_of(epochs=1), opened(resume=True)) == {"epoch": 1, "score": 0.7}
    assert [(tmp_path / "run" / name).read_bytes() for name in names] == before


def test_a_compiled_model_ends_with_the_same_weights(opened, monkeypatch):
    """With a backend that changes no operation: the default one compiles for minutes."""
    compiled = []

    def compile_eagerly(model: nn.Module, compile=torch.compile, **options: Any) -> nn.Module:
        compiled.append((model, options))
        return compile(model, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    plain = stage_of(epochs=1)
    fit(plain, opened())
    stage = stage_of(epochs=1)
    fit(stage, opened("compiled", compile=True))
    assert compiled == [(stage.model, {"dynamic": False})]
    assert same_weights(stage.model.state_dict(), plain.model.state_dict())


def test_one_gpu_trains_in_graphs(monkeypatch):
    """A CPU, several processes and a compiled model do not."""
    stage, graphed = SimpleNamespace(device=torch.device("cuda"), model=nn.Linear(3, 2)), object()
    monkeypatch.setattr(training, "record_graphs", lambda recorded: recorded is stage and graphed)
    assert forward_of(stage, compiled=False, graphs=True) is graphed
    assert forward_of(stage, compiled=False, graphs=False) is stage.model
    assert forward_of(stage, compiled=True, graphs=True) is not graphed
    stage.device = CPU
    assert forward_of(stage, compiled=False, graphs=True) is stage.model
    stage.device = torch.device("cuda")
    pretend_processes(monkeypatch, 2)
    monkeypatch.setattr(distributed, "parallel", lambda model, device: model)
    assert forward_of(stage, compiled=False, graphs=True) is stage.model


def test_a_step_is_recorded_with_a_full_batch(monkeypatch):
    """In training and mixed precision, as it will be repeated."""
    stage, given = stage_of(model=nn.Conv2d(3, 2, 1).eval(), amp_dtype=torch.bfloat16), []

    def make_graphed_callables(model: nn.Module, samples: tuple[Tensor]) -> nn.Module:
        given.append((model, *samples, model(*samples).dtype, model.training))
        assert not torch.is_autocast_cache_enabled()
        assert torch.backends.cudnn.benchmark, "slow kernels would be repeated in every step"
        model.forward = model.forward
        return model

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    record_graphs(stage)
    ((model, images, dtype, in_training),) = given
    assert model is stage.model and in_training and dtype == torch.bfloat16
    assert images.shape == (4, 3, 8, 12) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_gpu_without_memory_for_graphs_says_which_batch_was_too_large(monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", full)
    with pytest.raises(OutOfMemory, match=r"with a batch of 4 images of 12x8$"):
        record_graphs(stage_of())


def test_a_stage_ends_without_graphs_and_gradients(opened, monkeypatch):
    """The next one needs their memory, and the collector might come too late."""
    stage, freed = stage_of(epochs=1), []

    class Forward:
        def __init__(self, *_: object) -> None:
            self.cycle = self
            weakref.finalize(self, freed.append, "graphs")

        def __call__(self, points: Tensor) -> Tensor:
            return stage.model(points)

    monkeypatch.setattr(training, "forward_of", Forward)
    gc.disable()
    try:
        fit(stage, opened())
        assert freed == ["graphs"]
    finally:
        gc.enable()
    assert all(weight.grad is None for weight in stage.model.parameters())


def test_loaders_are_freed_with_their_stage(opened):
    """Not by the garbage collector, which would not end their workers properly."""
    stage, run = stage_of(epochs=1), opened()
    loader = weakref.ref(stage.loader)
    gc.disable()
    try:
        fit(stage, run)
        del stage
        assert loader() is None
    finally:
        gc.enable()
