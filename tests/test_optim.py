import math
from collections.abc import Callable

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


def groups(schedule: Callable, steps: int, optimizer: str = "adam") -> list[dict]:
    """Return the options of the optimizer in each step, and after the last."""
    made = OPTIMIZERS[optimizer]([torch.zeros(1, requires_grad=True)], 0.1, weight_decay=1e-4)
    scheduler = schedule(made, steps)
    found = [dict(made.param_groups[0])]
    for _ in range(steps):
        made.step()
        scheduler.step()
        found.append(dict(made.param_groups[0]))
    return found


def rates(schedule: str, steps: int, optimizer: str = "adam") -> list[float]:
    """Return the learning rate of each step, and after the last."""
    return [group["lr"] for group in groups(SCHEDULES[schedule], steps, optimizer)]


def test_poly_falls_to_0_with_the_published_power():
    found = rates("poly", 40)
    assert found == pytest.approx([0.1 * (1 - step / 40) ** 0.9 for step in range(41)])
    assert found[0] == 0.1 and found[20] == pytest.approx(0.0535887) and found[40] == 0


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.filterwarnings("error")
def test_one_cycle_rises_over_a_twentieth_and_falls_like_a_cosine(optimizer):
    found = rates("onecycle", 199, optimizer=optimizer)
    assert found[0] == pytest.approx(0.001)
    assert found[9] == pytest.approx(0.1) == max(found)
    for step, rate in enumerate(found[10:], 10):
        share = (step - 9) / 190
        assert rate == pytest.approx(0.1 * (1 + math.cos(math.pi * share)) / 2, abs=1e-6), step
    assert found[104] == pytest.approx(0.05, rel=1e-5)
    assert 0 < found[198] < 1e-4 and found[199] < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.filterwarnings("error")
def test_one_cycle_of_a_short_run(steps):
    found = rates("onecycle", steps)[:-1]
    assert all(0 < rate <= 0.1 for rate in found)
    assert steps == 1 or max(found) == pytest.approx(0.1, rel=0.01)


def test_one_cycle_keeps_the_momentum():
    assert {group["betas"] for group in groups(SCHEDULES["onecycle"], 10, "adamw")} == {
        (0.9, 0.999)
    }


def test_pretraining_follows_the_published_schedule():
    """0.1 up to epoch 15, then 5 % less in each epoch, and no weight decay."""
    found = groups(lambda optimizer, _: PretrainingSchedule(optimizer, 3), 150 * 3, "sgd")
    assert {group["lr"] for group in found[: 15 * 3]} == {0.1}
    by_hand = {16: 0.095, 17: 0.09025, 18: 0.0857375, 25: 0.0598737, 150: 9.8330e-05}
    for epoch, rate in by_hand.items():
        shown = [group["lr"] for group in found[3 * (epoch - 1) : 3 * epoch]]
        assert shown == pytest.approx([rate] * 3, rel=1e-4), epoch
    assert [group["weight_decay"] for group in found] == [1e-4] * 45 + [0.0] * 406


def test_adam_is_the_published_one():
    optimizer = build_optimizer("adam", nn.Linear(1, 1), 5e-4, weight_decay=1e-4)
    expected = {"lr": 5e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "fused": None}
    assert expected.items() <= optimizer.param_groups[0].items()


@pytest.mark.parametrize(("steps", "share"), [(36, 1 / 10), (5_000, 1 / 100), (5_000_000, 1e-4)])
def test_the_average_spans_a_fiftieth_of_the_run(steps, share):
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


def test_the_average_is_torchs_except_for_the_counts_of_batches(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    ours = average_of(model, 100)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        model(torch.rand(2, 3, 4, 4)).sum().backward()
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


@pytest.mark.parametrize("before", [None, True])
@pytest.mark.parametrize("now", [None, True])
def test_fused_kernels_depend_on_the_machine_and_not_on_the_run(before, now):
    """A gradient scaler works with both."""
    weight = torch.nn.Parameter(torch.ones(3))

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
