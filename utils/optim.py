"""Optimizers, learning rate schedules that step with each batch, and the average of weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, PolynomialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def poly(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Lower the learning rate to 0 over `steps` steps with power 0.9, as published."""
    return PolynomialLR(optimizer, total_iters=steps, power=0.9)


def one_cycle(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Raise the learning rate over the first twentieth of the steps; then lower it to 0."""
    total = steps + 1  # the schedule steps once more after the last batch
    rates = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(
        optimizer, rates, total, pct_start=max(0.05, 2 / total), div_factor=100,
        cycle_momentum=False,
    )  # fmt: skip


class PretrainingSchedule(LambdaLR):
    """Learning rate and weight decay of the published pretraining, with `steps` per epoch.

    Both are constant for 15 epochs. Then the rate falls by 5 % per epoch, and the decay is off.
    """

    CONSTANT_EPOCHS = 15

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        self.last_constant_step = self.CONSTANT_EPOCHS * steps - 1
        super().__init__(
            optimizer, lambda step: 0.95 ** max(0, step // steps + 1 - self.CONSTANT_EPOCHS)
        )

    def step(self) -> None:
        super().step()
        if self.last_epoch > self.last_constant_step:
            for group in self.optimizer.param_groups:
                group["weight_decay"] = 0.0


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
SCHEDULES = {"poly": poly, "onecycle": one_cycle}


def build_optimizer(name: str, model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """Build an optimizer of OPTIMIZERS; betas and eps of Adam are torch's defaults, as published.

    Its kernels are fused on a GPU. On a CPU that would gain 6 ms a step and round differently.
    """
    on_gpu = next(model.parameters()).is_cuda
    return OPTIMIZERS[name](model.parameters(), lr, fused=on_gpu or None, **options)


class Average(AveragedModel):
    """AveragedModel without copying the step count to the GPU, which would synchronise every step.

    Integer tensors keep their first values: they are batch counts, which nothing reads.
    """

    lists: tuple[list[Tensor], list[Tensor]] | None = None  # of the average and of the model

    def update_parameters(self, model: nn.Module) -> None:
        """Average the weights of a model, the same one in every call."""
        if self.lists is None:  # kept, as to collect them takes longer than to average them
            self.lists = _floats(self.module), _floats(model)
        if self.n_averaged == 0:
            self.module.load_state_dict(model.state_dict())
        else:
            self.multi_avg_fn(*self.lists, self.n_averaged)
        self.n_averaged += 1


def _floats(module: nn.Module) -> list[Tensor]:
    tensors = (*module.parameters(), *module.buffers())
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def average_of(model: nn.Module, steps: int) -> Average:
    """Average weights and running statistics (EMA) over 2 % of `steps`, from 10 to 10,000 steps."""
    horizon = min(10_000, max(10, steps // 50))
    average = get_ema_multi_avg_fn(1 - 1 / horizon)
    return Average(model, multi_avg_fn=average, use_buffers=True)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, but leave its kernels fused or not as they are here."""
    groups = [
        saved | {"fused": group["fused"]}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict(state | {"param_groups": groups})
