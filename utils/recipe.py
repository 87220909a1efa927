"""Optimizers, schedules and averages of weights, by the names of their options."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, PolynomialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def poly(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """The learning rate falls to 0 over so many steps, as published; steps with each batch."""
    return PolynomialLR(optimizer, total_iters=steps, power=0.9)


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """The learning rate rises over the first twentieth of so many steps and falls to 0 as a
    cosine; steps with each batch."""
    total = steps + 1  # with the step after the last batch
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=total,
        pct_start=max(0.05, 2 / total),
        div_factor=100,
        cycle_momentum=False,
    )


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = {"poly": poly, "onecycle": one_cycle}


def ema_of(model: nn.Module, steps: int) -> AveragedModel:
    """An exponential average of a model's weights and running statistics, over about the last
    fiftieth of a run of so many steps: over 10 steps at least, 10,000 at most."""
    horizon = min(10_000, max(10, steps // 50))
    average = get_ema_multi_avg_fn(1 - 1 / horizon)
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
