"""What training shows while it runs: a bar, lines in a log, and how long it waits for data."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from utils import distributed

SECONDS_BETWEEN_UPDATES = 0.5

# How columns of the log are shown; counts of what went wrong only if there are any.
SHOWN = {
    "train_loss": "train loss {:.4f}",
    "train_miou": "train mIoU {:.2%}",
    "train_top1": "train top-1 {:.2%}",
    "val_loss": "val loss {:.4f}",
    "val_miou": "val mIoU {:.2%}",
    "val_top1": "val top-1 {:.2%}",
    "val_top5": "val top-5 {:.2%}",
    "images_per_second": "{:.1f} images/s",
    "data_wait": "waiting for data {:.0%}",
    "seconds": "{:.0f} s",
    "skipped_steps": "{} steps skipped by the scaler",
    "left_out": "{} broken images left out",
}
COUNTS = ("skipped_steps", "left_out")

T = TypeVar("T")


def describe(row: Mapping[str, Any]) -> str:
    """Return columns of the log as text."""
    shown = (name for name in SHOWN if name in row and (row[name] or name not in COUNTS))
    return ", ".join(SHOWN[name].format(row[name]) for name in shown)


def progress_bar(title: str, total: int, unit: str = "img", done: int = 0) -> tqdm:
    """Return a bar on the terminal of the first process only."""
    disable = None if distributed.is_first() else True
    return tqdm(desc=title, total=total, initial=done, unit=unit, leave=False, disable=disable)


class Progress:
    """The progress of an epoch: a bar on a terminal, lines in a log.

    Args:
        steps, done: steps of the epoch, and how many of them were done before.
        interval: steps between lines in a log; 0 for none.
        scores: returns the scores to show; called now and then only, as it waits for a GPU.
    """

    def __init__(
        self, title: str, steps: int, done: int, interval: int, scores: Callable[[], dict[str, Any]]
    ) -> None:
        self.title, self.steps, self.done, self.interval = title, steps, done, interval
        self.scores, self.images, self.before = scores, 0, done
        self.started = self.updated = time.perf_counter()
        self.bar = progress_bar(title, steps, "step", done)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    def step(self, images: int) -> None:
        """Count a step of so many images, and show it if it is time."""
        self.images, self.done = self.images + images, self.done + 1
        self.bar.update()
        if not self.bar.disable:
            if time.perf_counter() - self.updated > SECONDS_BETWEEN_UPDATES:
                self.bar.set_postfix_str(self.text())
                self.updated = time.perf_counter()
        elif self.interval and self.done % self.interval == 0:
            left = (self.steps - self.done) * self.seconds / (self.done - self.before)
            place = f"{self.title}: step {self.done}/{self.steps}"
            print(f"{place}, {self.text()}, {left:.0f} s left", flush=True)

    def text(self) -> str:
        return describe(self.scores() | {"images_per_second": self.images_per_second})


class Waiting:
    """The time that a device is idle because the loader has no batch ready.

    A program runs ahead of its GPU, and may wait while the GPU still works. So the GPU's own clock
    measures, from the end of its last work to the next batch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.started = device, time.perf_counter()
        self.total = 0.0
        self.gaps: list[tuple] = []  # start and end of each one that is not in the total yet

    def measured(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the same batches, and measure the time until each one."""
        start = self._now()
        iterator = iter(batches)  # may start workers
        for batch in iterator:
            self.gaps.append((start, self._now()))
            yield batch
            start = self._now()

    def seconds(self) -> float:
        """Return the time so far; on a GPU, call it once the GPU has finished its work."""
        if self.device.type == "cuda":
            self.total += sum(start.elapsed_time(end) for start, end in self.gaps) / 1000
        else:
            self.total += sum(end - start for start, end in self.gaps)
        self.gaps.clear()
        return self.total

    def share(self) -> float:
        """Return the share of the time since the start that was spent waiting."""
        return min(1.0, self.seconds() / (time.perf_counter() - self.started))

    def _now(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
