import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils.optim import (
    OPTIMIZERS,
    SCHEDULES,
    PretrainingSchedule,
    average_of,
    build_optimizer,
    load_optimizer,
)


def rates(schedule: str, steps: int, optimizer: str = "adam") -> list[float]:
    """Return the learning rate of each step, and the one after the last."""
    made = build_optimizer(optimizer, nn.Linear(1, 1), 0.1)
    scheduler = SCHEDULES[schedule](made, steps)
    found = [made.param_groups[0]["lr"]]
    for _ in range(steps):
        made.step()
        scheduler.step()
        found.append(made.param_groups[0]["lr"])
    return found


def test_adam_has_the_published_options():
    (group,) = build_optimizer("adam", nn.Linear(1, 1), 5e-4, weight_decay=1e-4).param_groups
    expected = {"lr": 5e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}
    assert expected.items() <= group.items()


def test_poly_falls_to_0_with_the_published_power():
    found = rates("poly", 40)
    assert found == pytest.approx([0.1 * (1 - step / 40) ** 0.9 for step in range(41)])
    assert found[0] == 0.1 and found[20] == pytest.approx(0.0535887) and found[40] == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("error")
def test_one_cycle_rises_over_a_twentieth_and_falls_as_a_cosine(optimizer):
    found = rates("onecycle", 199, optimizer)
    assert found[0] == pytest.approx(0.001)
    assert found[9] == pytest.approx(0.1) == max(found)
    for step, rate in enumerate(found[10:], 10):
        share = (step - 9) / 190
        assert rate == pytest.approx(0.1 * (1 + math.cos(math.pi * share)) / 2, abs=1e-6), step
    assert found[104] == pytest.approx(0.05, rel=1e-5)
    assert 0 < found[198] < 1e-4 and found[199] < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 20, 40])
@pytest.mark.filterwarnings("error")
def test_one_cycle_fits_a_short_run(steps):
    found = rates("onecycle", steps)[:-1]
    assert all(0 < rate <= 0.1 for rate in found)
    assert steps == 1 or max(found) == pytest.approx(0.1, rel=0.01)


def test_one_cycle_leaves_momentum_alone():
    made = build_optimizer("adamw", nn.Linear(1, 1), 0.1)
    scheduler = SCHEDULES["onecycle"](made, 10)
    made.step()
    scheduler.step()
    assert made.param_groups[0]["betas"] == (0.9, 0.999)


def test_published_pretraining_lowers_the_rate_and_drops_the_decay_after_15_epochs():
    """The rate is 0.1 up to epoch 15; from then on, each epoch has 5 % less."""
    optimizer = build_optimizer("sgd", nn.Linear(1, 1), 0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = PretrainingSchedule(optimizer, steps=3)
    found = []
    for _ in range(150 * 3):
        found.append([optimizer.param_groups[0][name] for name in ("lr", "weight_decay")])
        optimizer.step()
        scheduler.step()
    assert found[: 15 * 3] == [[0.1, 1e-4]] * 15 * 3
    by_hand = {16: 0.095, 17: 0.09025, 18: 0.0857375, 25: 0.0598737, 150: 9.8330e-05}
    for epoch, rate in by_hand.items():
        for lr, weight_decay in found[3 * (epoch - 1) : 3 * epoch]:
            assert lr == pytest.approx(rate, rel=1e-4) and weight_decay == 0, epoch


@pytest.mark.parametrize(("steps", "share"), [(36, 1 / 10), (5_000, 1 / 100), (5_000_000, 1e-4)])
def test_the_average_spans_a_fiftieth_of_the_steps(steps, share):
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = average_of(model, steps)
    average.update_parameters(model)
    model.weight.data.fill_(1.0)
    average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(share, rel=1e-3)
    average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(1 - (1 - share) ** 2, rel=1e-3)


def test_running_statistics_are_averaged_and_the_model_is_left_alone():
    model = nn.BatchNorm1d(2)
    average = average_of(model, 100)
    average.update_parameters(model)
    model.running_mean.fill_(1.0)
    average.update_parameters(model)
    assert average.module.running_mean.tolist() == pytest.approx([0.1, 0.1])
    assert model.running_mean.tolist() == [1, 1]
    assert average.n_averaged == 2


def test_the_average_equals_that_of_torch_without_waiting_for_a_gpu(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    ours = average_of(model, 100)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        model(torch.rand(2, 3, 4, 4))
        for parameter in model.parameters():
            parameter.data.add_(torch.rand_like(parameter))
        theirs.update_parameters(model)
        with monkeypatch.context() as patch:  # sending a number to a GPU waits for it
            patch.setattr(torch.Tensor, "to", None)
            ours.update_parameters(model)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in ours.state_dict().items():
        if name != "module.1.num_batches_tracked":
            assert torch.equal(weight, theirs.state_dict()[name]), name
    assert ours.n_averaged == 3


def test_the_average_goes_on_after_weights_are_loaded():
    """Into the model and the average, as when a run is resumed."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    average = average_of(model, 100)
    for value in (0.0, 1.0):
        for loaded in (model, average.module):
            loaded.load_state_dict(
                {n: torch.full_like(w, value) for n, w in model.state_dict().items()}
            )
        average.n_averaged.fill_(5)
        for weight in model.state_dict().values():
            weight.add_(1)
        average.update_parameters(model)
        for name, weight in average.module.state_dict().items():
            if weight.is_floating_point():
                assert torch.allclose(weight, torch.tensor(value + 0.1)), name


@pytest.mark.parametrize("before", [None, True])
@pytest.mark.parametrize("now", [None, True])
def test_whether_kernels_are_fused_depends_on_this_machine_alone(before, now):
    """A gradient scaler gives its scale to fused kernels only."""
    weight = nn.Parameter(torch.ones(3))

    def step(fused, state=None):
        optimizer = torch.optim.Adam([weight], 0.1, fused=fused)
        if state:
            load_optimizer(optimizer, state)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        return optimizer.state_dict()

    saved = step(before)
    resumed = step(now, saved)
    assert resumed["param_groups"][0]["fused"] is now
    assert saved["param_groups"][0]["fused"] is before
    assert resumed["state"][0]["step"] == 2
