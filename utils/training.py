"""Training: a stage, how far it has come, and the one loop for every program."""

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from datasets.images import Size
from datasets.loading import Batch
from utils import distributed
from utils.checkpoint import CheckpointError, Description, fill, on_cpu
from utils.evaluation import memory_errors
from utils.graphs import Graphed
from utils.interrupts import Guard
from utils.metrics import ConfusionMatrix, TopKAccuracy
from utils.optim import Average, load_optimizer
from utils.progress import Progress, Waiting, describe
from utils.run_folder import Run
from utils.speed import kernel_search

Meter = ConfusionMatrix | TopKAccuracy  # of the predictions in training
Forward = Callable[[Tensor], Any]  # images to logits, or to a tuple that begins with them


class Validation(NamedTuple):
    """What validation found."""

    columns: dict[str, float]  # of the log
    best: dict[str, Any]  # scores to remember if this epoch is the best one
    pictures: list[Tensor]  # for TensorBoard, 3 x H x W, uint8


@dataclass
class Stage:
    """One stage of training: what is trained, on what, how, and how it is scored."""

    number: int  # in checkpoints; 0 for pretraining
    epochs: int
    about: Description  # for the checkpoints
    model: nn.Module  # what is trained, training heads included
    network: nn.Module  # the part of the model, or all of it, that is scored and saved
    loader: DataLoader  # its sampler is a ShuffledSeeds
    image_size: Size  # height and width of the prepared images
    prepare: Callable[[Batch], tuple[Tensor, ...]]  # returns images and targets on the device
    loss: Callable[..., Tensor]  # of the model's outputs and the targets, of which labels are first
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    val_loader: DataLoader
    validate: Callable[[nn.Module, Iterable[Batch], str], Validation]  # given a title for its bar
    score: str  # name in `Validation.best` of the score that decides which epoch is the best
    files: Callable[[int], Sequence[str]]  # returns the paths of a training item, for messages
    # Files that the best epoch is saved to, each with a function that returns its weights.
    best_files: Mapping[str, Callable[[nn.Module], dict[str, Tensor]]] = field(default_factory=dict)
    average: Average | None = None  # of the network's weights, scored and saved in its place
    meter: Callable[[], Meter] | None = None  # makes the meter of an epoch's training predictions
    amp_dtype: torch.dtype | None = None  # of mixed precision; None for full precision
    epochs_before: int = 0  # of earlier stages of the run

    def __post_init__(self) -> None:
        self.steps = len(self.loader)  # of a whole epoch; the loader shrinks on resume
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.amp_dtype == torch.float16
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass: mixed precision, if the stage has it."""
        # Without its cache, which CUDA graphs cannot record; no weight is used twice in a pass.
        mixed = self.amp_dtype is not None
        return torch.autocast(self.device.type, self.amp_dtype, mixed, cache_enabled=False)

    @property
    def scored(self) -> nn.Module:
        """The network that is scored and saved."""
        return self.average.module if self.average else self.network


@dataclass
class TrainState:
    """How far a stage has come."""

    stage: Stage
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the next epoch
    lr: float = 0.0  # learning rate at the start of that epoch
    totals: dict[str, Tensor] = field(default_factory=dict)  # over these steps, in this process
    meter: Meter | None = None  # scores of the training predictions in these steps
    best: dict[str, Any] = field(default_factory=lambda: {"epoch": 0})  # epoch, and its scores

    def place(self) -> str:
        """Return how far training has come, in words."""
        suffix = f" of stage {self.stage.number}" if self.stage.number else ""
        if self.step:
            return f"step {self.step} of epoch {self.epoch + 1}{suffix}"
        return f"epoch {self.epoch}{suffix}"

    def begin_epoch(self) -> None:
        """Start the sums of an epoch, or go on with those that were restored within one."""
        self.meter = self.stage.meter() if self.stage.meter else None
        if not self.step:
            self.totals, self.lr = {}, self.stage.scheduler.get_last_lr()[0]
        start = {"loss": torch.zeros((), dtype=torch.float64)}
        start |= {name: torch.tensor(0) for name in ("images", "skipped_steps", "left_out")}
        if self.meter:
            start["meter"] = self.meter.counts
        sums = start | self.totals
        self.totals = {name: value.to(self.stage.device) for name, value in sums.items()}
        if self.meter:
            self.meter.counts = self.totals["meter"]

    def scores(self) -> dict[str, Any]:
        """Return the log's columns that come from the sums; this waits for a GPU."""
        totals = self.totals
        scores = {"train_loss": (totals["loss"] / totals["images"]).item()}
        if self.meter:
            self.meter.counts = totals["meter"]
            scores |= {f"train_{name}": value for name, value in self.meter.summary().items()}
        return scores | {name: totals[name].item() for name in ("skipped_steps", "left_out")}

    def end_epoch(self) -> dict[str, Any]:
        """Return the scores of the epoch over all processes."""
        self.totals = {name: distributed.total(value) for name, value in self.totals.items()}
        scores = self.scores()
        self.totals, self.epoch, self.step = {}, self.epoch + 1, 0
        return scores

    def checkpoint(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        """Return the checkpoint of a network with these weights."""
        return self.stage.about.to_checkpoint() | {
            "model": weights,
            "stage": self.stage.number,
            "epoch": self.epoch,
            "best": self.best,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs; every process must call this after the same step."""
        stage = self.stage
        rng = {"torch": torch.get_rng_state()}
        if stage.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(stage.device)
        totals = {name: value.cpu() for name, value in self.totals.items()}
        return self.checkpoint(on_cpu(stage.scored)) | {
            "training_model": on_cpu(stage.model),
            "ema_updates": stage.average.n_averaged.item() if stage.average else 0,
            "optimizer": stage.optimizer.state_dict(),
            "scheduler": stage.scheduler.state_dict(),
            "scaler": stage.scaler.state_dict(),
            "step": self.step,
            "steps": stage.steps,
            "lr": self.lr,
            "batch_size": stage.loader.batch_size,
            "computed_by": computed_by(stage.device, stage.amp_dtype),
            "processes": distributed.gather({"rng": rng, "totals": totals}),
        }

    def load_state_dict(self, state: Mapping[str, Any], path: Path) -> list[str]:
        """Restore what `state_dict` returned, read from `path`.

        Returns:
            What cannot be as in a run that was never stopped, one sentence each.

        Raises:
            CheckpointError: the weights do not fit, or the data set has changed.
        """
        stage = self.stage
        images, images_before = stage.about.train_images, state.get("train_images")
        if images != images_before:
            raise CheckpointError(
                f"the data set has {images} training images now, and {images_before} when the run "
                "began: resume with the same data, or start another run"
            )
        fill(stage.model, state["training_model"], path)
        if stage.average:
            fill(stage.average.module, state["model"], path)
            stage.average.n_averaged.fill_(state["ema_updates"])
        load_optimizer(stage.optimizer, state["optimizer"])
        if state["scaler"]:  # empty if the precision needed none
            stage.scaler.load_state_dict(state["scaler"])
        self.epoch, self.lr, self.best = state["epoch"], state["lr"], state["best"]
        now, before = computed_by(stage.device, stage.amp_dtype), state["computed_by"]
        differences = [] if now == before else [f"this is {now}, it was {before}: rounding differs"]
        return differences + self._restore_place(state) + self._restore_process(state["processes"])

    def _restore_place(self, state: Mapping[str, Any]) -> list[str]:
        """Restore the step and the schedule, even if the batch size has changed."""
        stage = self.stage
        batch = distributed.processes() * stage.loader.batch_size
        batch_before = len(state["processes"]) * state["batch_size"]
        # Rounded down: a few images may be used twice in this epoch.
        self.step = min(stage.steps, state["step"] * batch_before // batch)
        if state["step"] == state["steps"]:
            self.step = stage.steps
        if batch == batch_before and stage.steps == state["steps"]:
            stage.scheduler.load_state_dict(state["scheduler"])
        else:
            done = self.epoch * stage.steps + self.step
            rates = [group["lr"] for group in stage.optimizer.param_groups]
            place = {"last_epoch": done, "_step_count": done + 1, "_last_lr": rates}
            stage.scheduler.load_state_dict(stage.scheduler.state_dict() | place)
        if batch == batch_before:
            return []
        return [
            f"steps are of {batch} images now, not {batch_before}, and the schedule has as many "
            "fewer or more: the weights will differ from those of a run without the stop"
        ]

    def _restore_process(self, processes: list[dict[str, Any]]) -> list[str]:
        """Restore the random states and sums of this process."""
        device = self.stage.device
        if len(processes) == distributed.processes():
            self.totals, rng = (processes[distributed.rank()][key] for key in ("totals", "rng"))
            torch.set_rng_state(rng["torch"])
            if device.type == "cuda" and "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"], device)
            return []
        self.totals = {}
        if distributed.is_first():
            names = processes[0]["totals"]
            self.totals = {name: sum(p["totals"][name] for p in processes) for name in names}
        seed_process(self.epoch * self.stage.steps + self.step)
        return [
            f"the number of processes is {distributed.processes()}, not {len(processes)}: images "
            "keep their order and augmentation, but dropout, batch statistics and rounding differ"
        ]


def fit(stage: Stage, run: Run) -> dict[str, Any]:
    """Train a stage to its end, from where it stopped; return its best epoch and its scores."""
    state = TrainState(stage)
    if run.resumed and run.resumed["stage"] == stage.number:
        differences = state.load_state_dict(run.resumed, run.last)
        print(f"resuming after {state.place()}")
        for difference in differences:
            print(f"note: {difference}")
    guard = Guard(run, state)
    forward = forward_of(stage, run.args.compile, run.args.graphs)
    while state.epoch < stage.epochs:
        train_and_validate(state, run, guard, forward)
    # The next stage needs the memory of this one's graphs. Gradients lie in it, and the collector
    # must find what holds it, as torch makes a class for each recording, and classes are cycles.
    del forward
    stage.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    return state.best


def forward_of(stage: Stage, compiled: bool, graphs: bool) -> Forward:
    """Return what to call in training: the model, compiled, in graphs on a GPU, or in parallel.

    This is apart from the model, since wrappers rename its weights.
    """
    forward = distributed.parallel(stage.model, stage.device)
    if compiled:
        # A smaller last batch is compiled on its own: one graph for all sizes would be slower.
        return torch.compile(forward, dynamic=False)
    if graphs and stage.device.type == "cuda" and distributed.processes() == 1:
        return record_graphs(stage)
    return forward


def record_graphs(stage: Stage) -> Graphed:
    """Return the model of a stage in CUDA graphs for full batches; no loader may run meanwhile.

    Raises:
        OutOfMemory: the GPU has too little memory for a batch.
    """
    images = torch.zeros(stage.loader.batch_size, 3, *stage.image_size)
    # With a search, whose kernels the graphs then repeat in every step.
    with memory_errors(images), kernel_search(True), stage.autocast():
        images = images.to(stage.device, memory_format=torch.channels_last)
        return Graphed(stage.model.train(), images)


def train_and_validate(state: TrainState, run: Run, guard: Guard, forward: Forward) -> None:
    """Train an epoch, validate if it is due, record both, and save what was validated."""
    stage, args = state.stage, run.args
    epoch, started = state.epoch + 1, time.perf_counter()
    title = f"epoch {epoch}/{stage.epochs}"
    if stage.number:
        title = f"stage {stage.number} {title}"
    rates = train_one_epoch(state, guard, forward, title, args.steps_loss)
    found = None
    if epoch % args.val_every == 0 or epoch == stage.epochs:
        distributed.share_buffers(stage.scored)
        batches = guard.validation_batches(stage.val_loader, state.totals["left_out"])
        found = stage.validate(stage.scored, batches, f"{title}, validation")
    row = {"stage": stage.number} if stage.number else {}
    row |= {"epoch": epoch, "lr": state.lr} | state.end_epoch() | rates
    files, pictures = {}, []
    if found:
        row |= found.columns
        if state.best["epoch"] == 0 or found.best[stage.score] > state.best[stage.score]:
            state.best = {"epoch": epoch} | found.best
            files |= stage.best_files
        # About ten times in a stage: TensorBoard shows no more, and they would fill the disk.
        every = max(1, stage.epochs // args.val_every // 10)
        if epoch == stage.epochs or epoch // args.val_every % every == 0:
            pictures = found.pictures
    row["seconds"] = time.perf_counter() - started
    if args.epochs_save and epoch % args.epochs_save == 0:
        prefix = f"stage{stage.number}-" if stage.number else ""
        files[f"{prefix}epoch{epoch:03d}.pth"] = on_cpu

    def record() -> None:
        for name, weights in files.items():
            run.save_network(state.checkpoint(weights(stage.scored)), name)
        run.record(row, stage.epochs_before + epoch, pictures)

    distributed.first(record)
    print(f"{title}: {describe(row)}", flush=True)
    # Not after each epoch, as a save may take longer than a short epoch: the guard's clock bounds
    # what can be lost. But after the first, so that a log of more than one row has a checkpoint.
    if found or epoch == 1:
        # Last of all: a run that is killed before this writes the epoch's results again.
        guard.save()


def train_one_epoch(
    state: TrainState, guard: Guard, forward: Forward, title: str, steps_loss: int
) -> dict[str, float]:
    """Train on every batch once, from the step that `state` has reached.

    Args:
        forward: the model, as `forward_of` returns it.
        steps_loss: steps between lines of progress in a log; 0 for none.

    Returns:
        "images_per_second" over all processes, and "data_wait", the share of the time in which the
        device waited for data.
    """
    stage, loader = state.stage, state.stage.loader
    stage.model.train()
    # Counted over all stages, so that no two epochs have the same order of images.
    epoch = stage.epochs_before + state.epoch + 1
    loader.sampler.begin(epoch, state.step * loader.batch_size)
    state.begin_epoch()
    waiting = Waiting(stage.device)

    # Without `progress`, which would make a cycle. The workers of a loader end at once if it is
    # freed with the last reference to it, but not if the garbage collector frees it.
    def scores() -> dict[str, Any]:
        return state.scores() | {"data_wait": waiting.share()}

    progress = Progress(title, stage.steps, state.step, steps_loss, scores)
    with progress.bar:
        batches = waiting.measured(loader)
        for batch in guard.training_batches(batches, state.totals["left_out"]):
            with memory_errors(batch.images, guard.last_good):
                loss = train_step(state, forward, batch)
            guard.note_loss(loss, batch.indices)
            progress.step(distributed.processes() * len(batch.images))
    guard.check_finite()  # before anything is scored or saved
    return {"images_per_second": progress.images_per_second, "data_wait": waiting.share()}


def train_step(state: TrainState, forward: Forward, batch: Batch) -> Tensor:
    """Take one step of the optimizer, the schedule and the average; return the loss."""
    stage, totals, scaler = state.stage, state.totals, state.stage.scaler
    images, *targets = stage.prepare(batch)
    device = images.device
    with kernel_search(len(images) == stage.loader.batch_size):  # not for a smaller last batch
        with stage.autocast():
            outputs = forward(images)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        loss = stage.loss(outputs, *targets)
        stage.optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
    scale = scaler.scale(torch.ones((), device=device))  # unlike get_scale(), this does not wait
    scaler.step(stage.optimizer)
    scaler.update()
    if scaler.is_enabled() and distributed.is_first():
        # The scale falls if gradients were not finite, and then all processes skip the step.
        totals["skipped_steps"] += scaler.scale(torch.ones((), device=device)) < scale
    stage.scheduler.step()
    if stage.average:
        stage.average.update_parameters(stage.network)
    state.step += 1
    # The mean over the processes is the loss of the whole batch: see utils/losses.py.
    totals["loss"] += loss.detach() * len(images)
    totals["images"] += len(images)
    if state.meter:
        state.meter.update_from_logits(logits.detach(), targets[0])
    return loss


def computed_by(device: torch.device, amp_dtype: torch.dtype | None) -> str:
    """Return what rounding depends on: results repeat bit for bit only where this is equal."""
    what = f"torch {torch.__version__} in {amp_dtype or 'full precision'} on "
    if device.type == "cuda":
        return what + torch.cuda.get_device_name(device)
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return what + f"CPU with {capability}, OMP_NUM_THREADS {threads}"


def seed_process(seed: int) -> None:
    """Give each process random numbers of its own; the first has those of a single process."""
    torch.manual_seed(seed + 1_000_003 * distributed.rank())
