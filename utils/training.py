"""What a step of training changes: all of it goes into a checkpoint, to go on from any step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from utils import distributed
from utils.checkpoint import fill, on_cpu
from utils.optim import Average, resume_optimizer


@dataclass
class Training:
    """A model in training, and how far it has come.

    Attributes:
        model: what is trained.
        network: the part of it, or all, that is scored and kept, by its average where there is one.
        batch_size: images of a step in this process.
        steps: of an epoch.
        epoch: epochs that are done.
        step: steps that are done of the epoch after them.
        amp_dtype: of mixed precision, None for full precision.
        lr: the learning rate that this epoch began with.
        totals: sums over these steps in this process, from which the epoch's figures come.
    """

    model: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    batch_size: int
    steps: int
    ema: Average | None = None
    amp_dtype: torch.dtype | None = None
    epoch: int = 0
    step: int = 0
    lr: float = 0.0
    totals: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scored(self) -> nn.Module:
        """What is scored and kept."""
        return self.ema.module if self.ema else self.network

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def begin_epoch(self, **totals: Tensor) -> None:
        """Begin the sums of an epoch, with these beside the loss; within one, go on with those
        that were restored."""
        kept = self.totals if self.step else {}
        if not self.step:
            self.lr = self.scheduler.get_last_lr()[0]
        start = {"loss": torch.zeros((), dtype=torch.float64), "images": torch.tensor(0)}
        start |= {"skipped_steps": torch.tensor(0), "left_out": torch.tensor(0)}
        self.totals = {
            name: kept.get(name, value).to(self.device) for name, value in (start | totals).items()
        }

    def end_epoch(self) -> dict[str, Tensor]:
        """The sums of the epoch over all processes; those of the next one begin at 0."""
        totals = {name: distributed.total(value) for name, value in self.totals.items()}
        self.totals, self.epoch, self.step = {}, self.epoch + 1, 0
        return totals

    def state(self) -> dict[str, Any]:
        """All of it as plain values, for a checkpoint; every process must ask at the same step."""
        process = {
            "rng": rng_state(self.device),
            "totals": {name: value.cpu() for name, value in self.totals.items()},
        }
        return {
            "training_model": on_cpu(self.model),
            "ema_updates": self.ema.n_averaged.item() if self.ema else 0,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "steps": self.steps,
            "lr": self.lr,
            "batch_size": self.batch_size,
            "computed_by": computed_by(self.device, self.amp_dtype),
            "processes": distributed.gather(process),
        }

    def restore(self, state: Mapping[str, Any], path: Path) -> list[str]:
        """Put back what `state` returned.

        Args:
            path: of the checkpoint that holds it.

        Returns:
            What cannot be as in the run that was not stopped, a sentence each.

        Raises:
            CheckpointError: the weights do not fit.
        """
        fill(self.model, state["training_model"], path)
        if self.ema:
            fill(self.ema.module, state["model"], path)
            self.ema.n_averaged.fill_(state["ema_updates"])
        resume_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"]:  # empty where the precision needed none
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.lr = state["epoch"], state["lr"]
        batch = distributed.processes() * self.batch_size
        batch_before = len(state["processes"]) * state["batch_size"]
        # Whole batches: of those that are new to it, a few images of the epoch may come again.
        self.step = min(self.steps, state["step"] * batch_before // batch)
        if state["step"] == state["steps"]:
            self.step = self.steps
        if batch == batch_before and self.steps == state["steps"]:
            self.scheduler.load_state_dict(state["scheduler"])
        else:
            done = self.epoch * self.steps + self.step
            rates = [group["lr"] for group in self.optimizer.param_groups]
            place = {"last_epoch": done, "_step_count": done + 1, "_last_lr": rates}
            self.scheduler.load_state_dict(self.scheduler.state_dict() | place)
        now, before = computed_by(self.device, self.amp_dtype), state["computed_by"]
        differs = [] if now == before else [f"this is {now}, it was {before}: rounding differs"]
        return differs + self._restore_processes(state["processes"], batch, batch_before)

    def _restore_processes(
        self, processes: list[dict[str, Any]], batch: int, batch_before: int
    ) -> list[str]:
        """Put back what each process had of its own."""
        differs = []
        if batch != batch_before:
            differs.append(
                f"steps are of {batch} images, not {batch_before}, and the learning rate follows "
                "the new number of steps: other weights than without the stop"
            )
        if len(processes) == distributed.processes():
            own = processes[distributed.rank()]
            self.totals = own["totals"]
            restore_rng(own["rng"], self.device)
            return differs
        differs.append(
            f"the number of processes is {distributed.processes()}, not {len(processes)}: images "
            "keep their order and augmentation, but dropout, batch statistics and rounding differ"
        )
        if distributed.is_first():
            names = processes[0]["totals"]
            sums = {name: sum(p["totals"][name] for p in processes) for name in names}
            self.totals = sums
        else:
            self.totals = {}
        seed_process(self.epoch * self.steps + self.step)
        return differs


def computed_by(device: torch.device, amp_dtype: torch.dtype | None) -> str:
    """What rounds the sums: only the same gives the same results, bit for bit."""
    what = f"torch {torch.__version__} in {amp_dtype or 'full precision'} on "
    if device.type == "cuda":
        return what + torch.cuda.get_device_name(device)
    kind, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return what + f"CPU with {kind}, OMP_NUM_THREADS {threads}"


def seed_process(seed: int) -> None:
    """Give each process random numbers of its own, those of the first as with one process."""
    torch.manual_seed(seed + 1_000_003 * distributed.rank())


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Every random state that training on a device draws from."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_state` returned; on another kind of device, what applies to it."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
