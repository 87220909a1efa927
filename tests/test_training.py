import io
import math
import os
import signal
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import differences, read, shown, value_differences
from conftest import same_weights
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from datasets.loading import Batch, ShuffledSeeds, training_loader, validation_loader
from datasets.segmentation import Classes
from utils import distributed
from utils.checkpoint import CheckpointError, Description, load_checkpoint, on_cpu
from utils.evaluation import OutOfMemory, evaluate_classifier
from utils.interrupts import Diverged, Guard, StopSignals
from utils.metrics import TopKAccuracy
from utils.optim import SCHEDULES, PretrainingSchedule, average_of, build_optimizer
from utils.run_folder import open_run
from utils.script import Interrupted
from utils.training import Stage, TrainState, Validation, fit, train_one_epoch

CPU = torch.device("cpu")
EPOCHS, IMAGES, LR = 4, 24, 0.01
STEPS = IMAGES // 4
PATH = Path("last.pth")
CLASSES = Classes(["red", "green", "blue"], [], [])
RECIPES = {
    f"{optimizer}, {schedule}": (optimizer, SCHEDULES[schedule])
    for optimizer, schedule in (("adam", "poly"), ("adamw", "onecycle"))
}
RECIPES["published classifier"] = ("sgd", None)


class Colors(Dataset):
    """Random images, 3 x 2 x 2, of which the strongest channel is the class."""

    def __init__(self, count: int = IMAGES) -> None:
        random = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (count, 3, 2, 2), generator=random).to(torch.uint8)
        self.labels = self.images.float().mean((2, 3)).argmax(1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]


def prepare(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.images.float() / 255, batch.labels


def validate(network: nn.Module, batches, title: str) -> Validation:
    columns = evaluate_classifier(network, batches, lambda images: images.float() / 255, title, 6)
    return Validation(columns, {"val_top1": columns["val_top1"]}, [torch.zeros(3, 4, 4).byte()])


def make_stage(
    recipe: str = "adam, poly",
    batch_size: int = 4,
    average: bool = True,
    processes: int = 1,
    data: Dataset | None = None,
    **changes: Any,
) -> Stage:
    """Return a stage that trains a small classifier with dropout for four epochs of 24 images."""
    torch.manual_seed(0)
    data = data or Colors()
    hidden = (nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model = changes.pop("model", None) or nn.Sequential(nn.Flatten(), *hidden, nn.Linear(4, 3))
    sampler = ShuffledSeeds(len(data), 0, distributed.rank(), processes)
    loader = training_loader(data, sampler, batch_size, 0, CPU, stacked=True)
    name, schedule = RECIPES[recipe]
    optimizer = build_optimizer(name, model, LR, weight_decay=0.1)
    steps = EPOCHS * len(loader)
    scheduler = (
        schedule(optimizer, steps) if schedule else PretrainingSchedule(optimizer, len(loader))
    )
    options: dict[str, Any] = {
        "number": 0,
        "epochs": EPOCHS,
        "about": Description("shapes", CLASSES, [0.0] * 3, [1.0] * 3, 2, len(data)),
        "model": model,
        "network": model,
        "loader": loader,
        "prepare": prepare,
        "loss": nn.CrossEntropyLoss(),
        "optimizer": optimizer,
        "scheduler": scheduler,
        "val_loader": validation_loader(Colors(6), 4, 0, CPU, stacked=True),
        "validate": validate,
        "score": "val_top1",
        "files": lambda index: [f"{index}.png"],
        "average": average_of(model, steps) if average else None,
        "meter": partial(TopKAccuracy, (1,)),
    }
    return Stage(**options | changes)


class Stopped(Exception):
    pass


def train(
    state: TrainState, steps: int, forward: Callable | None = None, steps_loss: int = 0
) -> list[dict[str, Any]]:
    """Train so many steps, over as many epochs as they take; return the scores of each epoch."""
    stage, ended, left = state.stage, [], steps
    guard = Guard(StopSignals(), state, lambda: None, PATH, math.inf, "python main.py")

    def prepare_or_stop(batch: Batch, prepare: Callable = stage.prepare) -> Any:
        nonlocal left
        if left == 0:
            raise Stopped
        left -= 1
        return prepare(batch)

    with pytest.MonkeyPatch.context() as patch, suppress(Stopped):
        patch.setattr(stage, "prepare", prepare_or_stop)
        while left or state.step == stage.steps:
            meter = stage.meter() if stage.meter else None
            rates = train_one_epoch(
                state, guard, forward or stage.model, meter, "epoch", steps_loss
            )
            ended.append(state.end_epoch(meter) | rates)
    return ended


def reloaded(state: TrainState) -> dict[str, Any]:
    """Return the state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(ours: Any, theirs: Any) -> None:
    assert list(value_differences(ours, theirs, "state")) == []


# Resuming


@pytest.mark.parametrize("done", [1, STEPS - 1, STEPS, STEPS + 2])
@pytest.mark.parametrize(
    ("recipe", "average"), [*((recipe, True) for recipe in RECIPES), ("adam, poly", False)]
)
def test_a_resumed_stage_ends_as_if_it_had_never_stopped(recipe, average, done):
    unbroken = TrainState(make_stage(recipe, average=average))
    scores = train(unbroken, 3 * STEPS + 1)
    stopped = TrainState(make_stage(recipe, average=average))
    train(stopped, done)
    state = reloaded(stopped)
    resumed = TrainState(make_stage(recipe, average=average))
    train(resumed, 3)  # whatever it was before
    torch.rand(5)
    assert resumed.load_state_dict(state, PATH) == []
    assert (resumed.epoch, resumed.step) == divmod(done, STEPS)
    assert resumed.lr == stopped.lr
    assert_same(train(resumed, 3 * STEPS + 1 - done), scores[done // STEPS :])
    assert_same(reloaded(resumed), reloaded(unbroken))


def test_an_epoch_without_its_validation_is_not_trained_again():
    """All of its steps are done; 21 images are no whole number of batches."""
    stopped = TrainState(make_stage(data=Colors(21)))
    train(stopped, STEPS - 1)
    stopped.step = STEPS
    resumed = TrainState(make_stage(data=Colors(21), batch_size=8))
    resumed.load_state_dict(reloaded(stopped), PATH)
    assert resumed.step == 3
    assert len(train(resumed, 0)) == 1 and (resumed.epoch, resumed.step) == (1, 0)


def test_other_rounding_is_reported():
    """Of another number of threads, or precision."""
    stopped, resumed = TrainState(make_stage()), TrainState(make_stage())
    state, threads = reloaded(stopped), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        (difference,) = resumed.load_state_dict(state, PATH)
    finally:
        torch.set_num_threads(threads)
    assert f"OMP_NUM_THREADS {threads + 1}, it was torch" in difference
    assert difference.endswith(f"OMP_NUM_THREADS {threads}: rounding differs")
    resumed = TrainState(make_stage(amp_dtype=torch.bfloat16))
    (difference,) = resumed.load_state_dict(state, PATH)
    assert "in torch.bfloat16 on" in difference and "in full precision on" in difference


def test_a_scaler_without_a_state_starts_anew():
    """The run was in another precision before."""
    resumed = TrainState(make_stage())
    resumed.stage.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    resumed.load_state_dict(reloaded(TrainState(make_stage())), PATH)
    assert resumed.stage.scaler.get_scale() == 4.0


def test_another_number_of_images_is_refused():
    state = reloaded(TrainState(make_stage()))
    resumed = TrainState(make_stage(data=Colors(23)))
    with pytest.raises(CheckpointError, match="has 23 training images now, and 24 when"):
        resumed.load_state_dict(state, PATH)


def rates_of(state: TrainState, steps: int) -> list[float]:
    """Train so many steps; return the learning rate of each."""
    rates, stage = [], state.stage

    def forward(images: torch.Tensor) -> torch.Tensor:
        rates.append(stage.optimizer.param_groups[0]["lr"])
        return stage.model(images)

    train(state, steps, forward)
    return rates


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("batch_size", "steps", "done"),
    [(2, 12, 1), (2, 12, STEPS - 1), (3, 8, 4), (5, 5, STEPS), (8, 3, STEPS + 3), (24, 1, 4)],
)
def test_with_another_batch_size_the_schedule_goes_on_at_the_same_place(
    recipe, batch_size, steps, done
):
    """An epoch has 24 images, and each schedule ends where it would have ended."""
    stopped = TrainState(make_stage(recipe))
    train(stopped, done)
    resumed = TrainState(make_stage(recipe, batch_size))
    assert resumed.stage.steps == steps
    (difference,) = resumed.load_state_dict(reloaded(stopped), PATH)
    assert f"steps are of {batch_size} images now, not 4" in difference
    epoch, step = divmod(done, STEPS)
    images = resumed.step * batch_size
    assert resumed.epoch == epoch and images <= step * 4 < images + batch_size
    whole = TrainState(make_stage(recipe, batch_size))
    expected = rates_of(whole, EPOCHS * steps)
    place = resumed.epoch * steps + resumed.step
    rates = rates_of(resumed, EPOCHS * steps - place)
    # Rates that each follow from the one before keep what is left of a step that was not whole.
    least = min(expected[min(place + 1, len(expected) - 1)] / expected[min(place, 3 * steps)], 1)
    for rate, at_place in zip(rates[1:], expected[place + 1 :], strict=True):
        assert 0.999 * least * at_place <= rate <= 1.001 * at_place
    last = whole.stage.scheduler.get_last_lr()
    assert resumed.stage.scheduler.get_last_lr() == pytest.approx(last, abs=1e-9)
    assert (resumed.epoch, resumed.step) == (EPOCHS, 0)


# Several processes


def pretend(monkeypatch, rank: int, count: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "processes", lambda: count)


@pytest.fixture
def of_two_processes() -> dict[str, Any]:
    """What two processes with batches of two save after 4 of 6 steps."""
    states = []
    for seed in range(2):
        state = TrainState(make_stage("adamw, onecycle", 2, processes=2))
        torch.manual_seed(seed)
        train(state, 4)
        states.append(reloaded(state))
    return states[0] | {"processes": [state["processes"][0] for state in states]}


def test_each_process_gets_its_own_sums_and_random_state_back(of_two_processes, monkeypatch):
    for rank in range(2):
        pretend(monkeypatch, rank, 2)
        resumed = TrainState(make_stage("adamw, onecycle", 2, processes=2))
        assert resumed.load_state_dict(of_two_processes, PATH) == []
        own = of_two_processes["processes"][rank]
        assert_same(resumed.totals, own["totals"])
        assert torch.equal(torch.get_rng_state(), own["rng"]["torch"])


@pytest.mark.parametrize("count", [1, 3, 4])
def test_sums_are_kept_with_any_number_of_processes(of_two_processes, monkeypatch, count):
    sums = dict.fromkeys(of_two_processes["processes"][0]["totals"], 0)
    drawn = set()
    for rank in range(count):
        pretend(monkeypatch, rank, count)
        resumed = TrainState(make_stage("adamw, onecycle", 2, processes=count))
        *_, difference = resumed.load_state_dict(of_two_processes, PATH)
        assert f"the number of processes is {count}, not 2" in difference
        assert resumed.step == 16 // (2 * count)
        drawn.add(torch.rand(()).item())
        resumed.begin_epoch(resumed.stage.meter())
        for name in sums:
            sums[name] += resumed.totals[name]
    assert sums["images"] == 16 and sums["meter"][-1] == 16
    expected = sum(process["totals"]["loss"] for process in of_two_processes["processes"])
    assert torch.isclose(sums["loss"], expected)
    assert len(drawn) == count  # each has random numbers of its own


def test_the_same_batches_go_on_exactly_with_fewer_processes(of_two_processes):
    """One process has four images a step, where two had two each."""
    resumed = TrainState(make_stage("adamw, onecycle", 4))
    (difference,) = resumed.load_state_dict(of_two_processes, PATH)
    assert "the number of processes is 1, not 2" in difference
    assert resumed.step == 4 and resumed.stage.scheduler.last_epoch == 4


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 4), (2, 2), (2, 3), (4, 1), (3, 2)])
def test_other_processes_train_on_the_images_that_are_left(processes, batch_size):
    """On each image of the epoch once, but for whole batches that begin again."""
    order = [item for item, _ in ShuffledSeeds(24, 7)]
    seen = 4 * 4  # by two processes with two images a step
    step = seen // (processes * batch_size)
    rest = []
    for rank in range(processes):
        sampler = ShuffledSeeds(24, 7, rank, processes)
        sampler.begin(0, step * batch_size)
        rest += [item for item, _ in sampler]
    assert set(order[16:]) <= set(rest)
    assert len(rest) == len(set(rest)) < 24 - 16 + processes * batch_size
    assert len(DataLoader(range(24), sampler=sampler)) == len(rest) // processes


# An epoch


def test_training_lowers_the_loss_and_steps_the_schedule_with_each_batch():
    state = TrainState(make_stage(average=False))
    first, *_, last = train(state, EPOCHS * STEPS)
    assert last["train_loss"] < first["train_loss"] and first["images_per_second"] > 0
    assert state.stage.scheduler.last_epoch == EPOCHS * STEPS and state.stage.model.training
    assert state.stage.scheduler.get_last_lr() == [0]


def constant(*logits: float) -> nn.Module:
    """Return a model that has the same logits for every image, and does not learn."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, len(logits)))
    model[1].weight.data.zero_()
    model[1].bias.data = torch.tensor(logits)
    for parameter in model.parameters():
        parameter.register_hook(torch.zeros_like)
    return model


def test_the_scores_of_an_epoch_are_means_over_images():
    data = Colors(5)  # a batch of four and one of one
    stage = make_stage(data=data, model=constant(2.0, 0.0, 0.0), average=False)
    stage.optimizer.param_groups[0]["weight_decay"] = 0.0
    (row,) = train(TrainState(stage), 2)
    losses = -torch.tensor([2.0, 0.0, 0.0]).log_softmax(0)[data.labels]
    assert row["train_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert row["train_top1"] == (data.labels == 0).float().mean()
    assert row["skipped_steps"] == row["left_out"] == 0


def test_a_meter_is_optional():
    (row,) = train(TrainState(make_stage(meter=None)), STEPS)
    assert "train_loss" in row and "train_top1" not in row


def test_a_model_may_return_more_than_logits():
    """The loss gets all of it, the meter the first part."""

    class TwoHeads(nn.Linear):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(images.flatten(1)), images.mean()

    stage = make_stage(model=TwoHeads(12, 3), loss=lambda outputs, _: outputs[0].mean() ** 2 + 3)
    (row,) = train(TrainState(stage), STEPS)
    assert row["train_loss"] >= 3 and 0 <= row["train_top1"] <= 1


def test_loss_and_meter_get_what_was_prepared():
    data, seen = Colors(4), []
    stage = make_stage(
        data=data,
        prepare=lambda batch: (batch.images.float(), 2 - batch.labels),
        loss=lambda logits, labels: (
            seen.append(labels) or nn.functional.cross_entropy(logits, labels)
        ),
        model=constant(2.0, 0.0, 0.0),
    )
    (row,) = train(TrainState(stage), 1)
    assert seen[0].sort().values.equal((2 - data.labels).sort().values)
    assert row["train_top1"] == (data.labels == 2).float().mean()


def test_the_average_follows_after_each_step():
    stage, weights = make_stage(average=False), []
    stage.average = AveragedModel(stage.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    assert stage.scored is stage.average.module
    state = TrainState(stage)
    for _ in range(2):
        train(state, 1)
        weights.append(stage.model[1].weight.detach().clone())
    assert not torch.equal(*weights)
    assert torch.allclose(stage.average.module[1].weight, (weights[0] + weights[1]) / 2)


def test_mixed_precision_keeps_float32_weights():
    dtypes = []
    stage = make_stage(amp_dtype=torch.bfloat16)
    stage.model[1].register_forward_hook(lambda *seen: dtypes.append(seen[2].dtype))
    (row,) = train(TrainState(stage), STEPS)
    assert 0 < row["train_loss"] < 10 and set(dtypes) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in stage.model.parameters())


def test_scaled_gradients_train_as_plain_ones():
    """As with the gradient scaler of fp16, here on the CPU."""
    found = []
    for enabled in (True, False):
        state = TrainState(make_stage())
        state.stage.scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        (row,) = train(state, STEPS)
        assert row["skipped_steps"] == 0
        found.append((state.stage.model[1].weight, state.stage.scaler.state_dict()))
    (scaled, state), (plain, nothing) = found
    assert torch.allclose(scaled, plain, atol=1e-6)
    assert state["_growth_tracker"] == STEPS and nothing == {}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("first", [True, False])
def test_steps_that_the_scaler_skips_are_counted_in_one_process(monkeypatch, capsys, first):
    """The gradients are not finite, but the loss is; all processes skip the same steps."""
    monkeypatch.setattr(distributed, "is_first", lambda: first)
    stage = make_stage()
    stage.scaler = torch.amp.GradScaler("cpu")
    before = stage.model[1].weight.detach().clone()
    stage.model[1].weight.register_hook(lambda gradient: gradient * math.inf)
    state = TrainState(stage)
    (row,) = train(state, STEPS, steps_loss=1)
    assert torch.equal(stage.model[1].weight, before)
    assert row["skipped_steps"] == (STEPS if first else 0)
    shown = f"{STEPS} steps skipped by the scaler" in capsys.readouterr().out.splitlines()[-1]
    assert shown == first


def test_a_loss_that_is_not_finite_is_reported_with_its_files():
    def prepare_badly(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.where(torch.tensor(batch.indices) == 7, math.nan, 1.0)[:, None, None, None]
        return batch.images * images, batch.labels

    state = TrainState(make_stage(prepare=prepare_badly))
    order = [index for index, _ in ShuffledSeeds(IMAGES, 0)]
    with pytest.raises(Diverged) as raised:
        train(state, STEPS)
    assert "7.png" in str(raised.value) and "no checkpoint was written yet" in str(raised.value)
    assert f"the loss is nan in step {state.step} of epoch 1, with " in str(raised.value)
    assert str(raised.value).count(".png") == 4 and len(order) == IMAGES


@pytest.mark.parametrize("part", ["forward", "prepare"])
def test_a_gpu_without_memory_is_told_with_the_size_of_the_batch(part):
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    stage = make_stage(prepare=full) if part == "prepare" else make_stage()
    with pytest.raises(OutOfMemory, match="with a batch of 4 images of 2x2") as raised:
        train(TrainState(stage), 1, full if part == "forward" else None)
    assert raised.value.__notes__ == ["no checkpoint was written yet"]


# A whole stage


def open_folder(folder: Path, resume: bool = False, **changes: Any) -> Any:
    """Open the run of a folder as the programs do."""
    options = {
        "savedir": str(folder), "resume": resume, "checkpoint_minutes": 10.0, "compile": False,
        "steps_loss": 0, "val_every": 1, "epochs_save": 0, "encoder_epochs": 0,
    }  # fmt: skip
    return open_run(Namespace(**options | changes))


def fit_in(folder: Path, stage: Stage, resume: bool = False, **changes: Any) -> dict[str, Any]:
    with open_folder(folder, resume, **changes) as run:
        run.begin()
        return fit(stage, run)


def log_of(folder: Path) -> list[dict[str, str]]:
    return read(folder / "log.csv")


def test_a_stage_that_a_signal_stopped_goes_on_to_the_same_end(tmp_path, capsys):
    fit_in(tmp_path / "whole", make_stage())
    left = iter(range(9))

    def prepare_or_signal(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if next(left) == STEPS + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(batch)

    with pytest.raises(Interrupted, match="saved after step 2 of epoch 2, to go on: python "):
        fit_in(tmp_path / "stopped", make_stage(prepare=prepare_or_signal))
    fit_in(tmp_path / "stopped", make_stage(), resume=True)
    assert "resuming after step 2 of epoch 2\n" in capsys.readouterr().out
    assert differences(tmp_path / "stopped", tmp_path / "whole") == []


def scripted(*scores: float) -> Callable[..., Validation]:
    """Return a validation that finds these scores, one after the other."""
    left = iter(scores)

    def validate(network: nn.Module, batches, title: str) -> Validation:
        list(batches)
        score = next(left)
        return Validation({"val_top1": score}, {"val_top1": score}, [])

    return validate


def test_the_best_epoch_is_kept(tmp_path):
    """And every second one, and the last."""
    head = lambda model: {"head": on_cpu(model)["4.weight"]}  # noqa: E731
    files = {"best.pth": on_cpu, "head.pth": head}
    stage = make_stage(validate=scripted(0.4, 0.8, 0.6, 0.8), best_files=files)
    best = fit_in(tmp_path, stage, epochs_save=2)
    assert best == {"epoch": 2, "val_top1": 0.8}
    stored = {path.name: load_checkpoint(path) for path in tmp_path.glob("*.pth")}
    assert stored.keys() == {
        "best.pth", "head.pth", "last.pth", "previous.pth",
        "stage0-epoch002.pth", "stage0-epoch004.pth",
    }  # fmt: skip
    assert stored["best.pth"]["epoch"] == 2 and stored["best.pth"]["best"] == best
    assert same_weights(stored["best.pth"]["model"], stored["stage0-epoch002.pth"]["model"])
    weight = stored["best.pth"]["model"]["4.weight"]
    assert torch.equal(stored["head.pth"]["model"]["head"], weight)
    assert stored["last.pth"]["epoch"] == 4
    assert same_weights(stored["last.pth"]["model"], stored["stage0-epoch004.pth"]["model"])
    # The average is scored and saved; what is trained is in last.pth alone.
    assert same_weights(stored["last.pth"]["model"], on_cpu(stage.average.module))
    assert same_weights(stored["last.pth"]["training_model"], on_cpu(stage.model))
    assert not same_weights(stored["last.pth"]["model"], on_cpu(stage.model))
    assert "training_model" not in stored["best.pth"]


def test_validation_may_skip_epochs_but_not_the_last(tmp_path):
    best = fit_in(tmp_path, make_stage(epochs=3, validate=scripted(0.4, 0.3)), val_every=2)
    assert [row["val_top1"] for row in log_of(tmp_path)] == ["nan", "0.4", "0.3"]
    assert best == {"epoch": 2, "val_top1": 0.4}


def test_an_epoch_of_scores_that_are_not_numbers_is_still_the_best_so_far(tmp_path):
    """Such as the mIoU of labels that are ignored."""
    best = fit_in(tmp_path, make_stage(epochs=1, validate=scripted(math.nan)))
    assert best["epoch"] == 1 and (tmp_path / "best.pth").exists()


def test_the_log_has_a_row_for_each_epoch(tmp_path, capsys):
    stage = make_stage(number=2, epochs_before=3, epochs=2)
    with open_folder(tmp_path, steps_loss=3) as run:
        run.begin()
        fit(stage, run)
    rows = log_of(tmp_path)
    assert list(rows[0]) == [
        "stage", "epoch", "lr", "train_loss", "train_top1", "skipped_steps", "left_out",
        "images_per_second", "data_wait", "val_loss", "val_top1", "val_top5", "seconds",
    ]  # fmt: skip
    assert [(row["stage"], row["epoch"]) for row in rows] == [("2", "1"), ("2", "2")]
    assert float(rows[0]["lr"]) == LR > float(rows[1]["lr"]) > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "stage 2 epoch 1/2: step 3/6", "stage 2 epoch 1/2: step 6/6",
        "stage 2 epoch 1/2: train loss " + f"{float(rows[0]['train_loss']):.4f}",
        "stage 2 epoch 2/2: step 3/6", "stage 2 epoch 2/2: step 6/6",
        "stage 2 epoch 2/2: train loss " + f"{float(rows[1]['train_loss']):.4f}",
    ]  # fmt: skip
    # TensorBoard counts epochs over all stages.
    assert shown(tmp_path)["loss/train"].keys() == {4, 5}


def test_tensorboard_gets_pictures_of_about_ten_epochs_and_the_last(tmp_path):
    fit_in(tmp_path, make_stage(epochs=25, data=Colors(8)))
    found = shown(tmp_path)
    assert found["val/0"].keys() == {*range(2, 25, 2), 25}
    assert found["loss/train"].keys() == set(range(1, 26))


def test_a_diverged_epoch_leaves_no_trace(tmp_path):
    """Its losses are checked before anything is scored or saved, those of the last step too."""
    losses = iter([1.0, 1.0, math.nan])
    loss = lambda logits, labels: logits.mean() * next(losses)  # noqa: E731
    stage = make_stage(data=Colors(8), loss=loss, batch_size=8)
    with pytest.raises(Diverged, match=r"step 1 of epoch 3, .* last\.pth, after epoch 2"):
        fit_in(tmp_path, stage)
    assert len(log_of(tmp_path)) == 2
    assert load_checkpoint(tmp_path / "last.pth")["epoch"] == 2


def test_a_run_resumes_only_the_stage_of_its_checkpoint(tmp_path):
    """Stage 2 begins anew after the end of stage 1, with files of stage 1 in the folder."""
    fit_in(tmp_path, make_stage(number=1, epochs=1))
    with open_folder(tmp_path, resume=True) as run:
        run.begin()
        fit(make_stage(number=1, epochs=1), run)
        fit(make_stage(number=2, epochs=1, epochs_before=1), run)
    assert [row["stage"] for row in log_of(tmp_path)] == ["1", "2"]
    assert load_checkpoint(tmp_path / "last.pth")["stage"] == 2


def test_the_compiled_model_trains_the_same(tmp_path, monkeypatch):
    """By a backend that leaves all operations as they are: the default one takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    fit_in(tmp_path / "plain", make_stage(epochs=1))
    fit_in(tmp_path / "compiled", make_stage(epochs=1), compile=True)
    found = differences(tmp_path / "compiled", tmp_path / "plain")
    assert found == ["args.json: compile is True, not False"]
