import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils.optim import OPTIMIZERS, SCHEDULES, ema_of, resume_optimizer


def rates(schedule: str, steps: int, lr: float = 0.1, optimizer: str = "adam") -> list[float]:
    """The learning rate of each step, and the one after the last."""
    made = OPTIMIZERS[optimizer]([torch.zeros(1, requires_grad=True)], lr)
    scheduler = SCHEDULES[schedule](made, steps)
    found = [made.param_groups[0]["lr"]]
    for _ in range(steps):
        made.step()
        scheduler.step()
        found.append(made.param_groups[0]["lr"])
    return found


def test_poly_falls_to_nothing_by_the_power_of_the_paper():
    found = rates("poly", 40)
    assert found == pytest.approx([0.1 * (1 - step / 40) ** 0.9 for step in range(41)])
    assert found[0] == 0.1 and found[20] == pytest.approx(0.0535887) and found[40] == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("error")
def test_one_cycle_rises_over_a_twentieth_and_falls_as_a_cosine(optimizer):
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


def test_one_cycle_leaves_the_momentum_alone():
    made = OPTIMIZERS["adamw"]([torch.zeros(1, requires_grad=True)], 0.1)
    scheduler = SCHEDULES["onecycle"](made, 10)
    made.step()
    scheduler.step()
    assert made.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize(("steps", "share"), [(36, 1 / 10), (5_000, 1 / 100), (5_000_000, 1e-4)])
def test_the_average_looks_back_over_a_fiftieth_of_the_run(steps, share):
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = ema_of(model, steps)
    ema.update_parameters(model)
    model.weight.data.fill_(1.0)
    ema.update_parameters(model)
    assert ema.module.weight.item() == pytest.approx(share, rel=1e-3)
    ema.update_parameters(model)
    assert ema.module.weight.item() == pytest.approx(1 - (1 - share) ** 2, rel=1e-3)


def test_running_statistics_are_averaged_and_the_model_left_alone():
    model = nn.BatchNorm1d(2)
    ema = ema_of(model, 100)
    ema.update_parameters(model)
    model.running_mean.fill_(1.0)
    ema.update_parameters(model)
    assert ema.module.running_mean.tolist() == pytest.approx([0.1, 0.1])
    assert model.running_mean.tolist() == [1, 1]
    assert ema.n_averaged == 2


def test_the_average_is_torchs_but_for_the_counts_of_batches(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    ours = ema_of(model, 100)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        model(torch.rand(2, 3, 4, 4)).sum().backward()
        for parameter in model.parameters():
            parameter.data.add_(torch.rand_like(parameter))
        theirs.update_parameters(model)
        with monkeypatch.context() as patch:  # to send a number to a GPU is to wait for it
            patch.setattr(torch.Tensor, "to", None)
            ours.update_parameters(model)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in ours.state_dict().items():
        if name != "module.1.num_batches_tracked":
            assert torch.equal(weight, theirs.state_dict()[name]), name
    assert ours.n_averaged == 3


@pytest.mark.parametrize("before", [None, True])
@pytest.mark.parametrize("now", [None, True])
def test_fused_kernels_are_of_the_machine_and_not_of_the_run(before, now):
    """A scaler of float16 hands its scale to a kernel that is fused, and to no other."""
    weight = torch.nn.Parameter(torch.ones(3))

    def step(fused, state=None):
        optimizer = torch.optim.Adam([weight], 0.1, fused=fused)
        if state:
            resume_optimizer(optimizer, state)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        return optimizer.state_dict()

    saved = step(before)
    resumed = step(now, saved)
    assert resumed["param_groups"][0]["fused"] is now
    assert saved["param_groups"][0]["fused"] is before
    assert resumed["state"][0]["step"] == 2
