"""Recipes of training: presets of options, and the optimizers and schedules that they name."""

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, PolynomialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# Of the class weights 1 / ln(c + p), by stage.
WEIGHT_C = {1: 1.20, 2: 1.10}

# What an option is when the command line does not say: the recipes, by name.
PAPER = {
    "height": 512,
    "augment": "paper",
    "crop": None,
    "scale": [0.5, 2.0],
    "jitter": 0.4,
    "cache": "off",
    "encoder_epochs": 300,
    "epochs": 300,
    "batch_size": 5,
    "optimizer": "adam",
    "lr": 5e-4,
    "weight_decay": 1e-4,
    "schedule": "poly",
    "loss": "ce",
    "weight_c": None,  # WEIGHT_C
    "aux_weight": 0.0,
    "dropout": 0.3,
    "ema": False,
    "val_every": 1,
}
# In one stage, with a loss on the encoder beside that on the whole network.
ONE_STAGE = {
    "encoder_epochs": 0,
    "augment": "strong",
    "cache": "ram",
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "schedule": "onecycle",
    "aux_weight": 0.4,
    "ema": True,
}
PRESETS = {
    "paper": PAPER,
    "quick": PAPER
    | {
        "height": 160,
        "encoder_epochs": 3,
        "epochs": 13,
        "batch_size": 4,
        "lr": 2e-3,
        "val_every": 5,
    },
    "cityscapes": PAPER
    | ONE_STAGE
    | {
        "height": 1024,
        "crop": [1024, 1024],
        "cache": "off",  # 29 GB at this height: give a folder that has the room
        "epochs": 800,
        "batch_size": 12,
        "lr": 1e-3,
        "loss": "ohem",
        "val_every": 5,
    },
    "camvid": PAPER
    | ONE_STAGE
    | {
        "height": 360,
        "crop": [240, 320],
        "scale": [0.67, 1.5],
        "epochs": 80,
        "batch_size": 8,
        "lr": 2e-3,
        "dropout": 0.1,
        "val_every": 5,
    },
}


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


class Average(AveragedModel):
    """AveragedModel, whose own step sends the number of steps to the GPU and waits for that.

    What is not a float, the counts of batches that nothing reads, stays as it was first.
    """

    def update_parameters(self, model: nn.Module) -> None:
        ours, theirs = self.module.state_dict(), model.state_dict()
        if self.n_averaged == 0:
            self.module.load_state_dict(theirs)
        else:
            names = [name for name, weight in ours.items() if weight.is_floating_point()]
            lists = ([weights[name] for name in names] for weights in (ours, theirs))
            self.multi_avg_fn(*lists, self.n_averaged)
        self.n_averaged += 1


def ema_of(model: nn.Module, steps: int) -> Average:
    """An exponential average of a model's weights and running statistics, over about the last
    fiftieth of a run of so many steps: over 10 steps at least, 10,000 at most."""
    horizon = min(10_000, max(10, steps // 50))
    average = get_ema_multi_avg_fn(1 - 1 / horizon)
    return Average(model, multi_avg_fn=average, use_buffers=True)


def resume_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state that an optimizer was saved with; whether its kernels are fused is up to the
    machine that it runs on now."""
    groups = [
        saved | {"fused": group["fused"]}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict(state | {"param_groups": groups})
