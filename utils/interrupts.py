"""What training checks between two steps: whether to save, to stop, or to fail.

All processes of a run decide together, after the same step, so that none waits for one that ended.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from datasets.workers import kill_workers
from utils import distributed, script
from utils.errors import UserError, few
from utils.script import Interrupted

SAME_SIGNAL = 1.0  # seconds within which a repeated signal counts as the same one
FILES_NAMED = 20  # files of a batch to name in a message


class Diverged(UserError):
    """A loss or a weight is not finite."""


class Action(IntEnum):
    """What a process needs; all do what the largest value among them says.

    Stopping on a signal has the number of that signal, which is more than SAVE and less than FAIL.
    """

    CONTINUE = 0
    SAVE = 1
    STOP_ON_SIGINT = signal.SIGINT
    STOP_ON_SIGTERM = signal.SIGTERM
    FAIL = 100
    FAIL_UNSAVED = 101


STOPS = (Action.STOP_ON_SIGINT, Action.STOP_ON_SIGTERM)


class StopSignals:
    """A context that notes SIGTERM and Ctrl-C; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None  # number of the signal that came

    def __enter__(self) -> "StopSignals":
        # An ignored signal stays ignored, such as Ctrl-C under nohup.
        handled = [n for n in STOPS if signal.getsignal(n) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._note) for number in handled}
        if script.received is not None:  # earlier, and Python dropped its exception
            self._note(script.received, None)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        name = os.path.basename(sys.argv[0])
        if self.received == number and distributed.local_rank() is not None:
            # torchrun forwards signals, and a cluster may send them to each process as well.
            if time.monotonic() - self.noted < SAME_SIGNAL:
                return
        if self.received is not None:
            # Not print, which this handler may have interrupted.
            os.write(2, f"{name}: stopped at once\n".encode())
            kill_workers()  # those that start would miss this process, each in a traceback
            os._exit(128 + number)
        self.received, self.noted = number, time.monotonic()
        if distributed.is_first():
            os.write(2, f"{name}: finishing the step to save; again to stop at once\n".encode())


class Guard:
    """Saves a stage from time to time, and ends it cleanly, always between two steps."""

    # A Run and a TrainState, whose modules import this one.
    def __init__(self, run: Any, state: Any) -> None:
        self.run, self.state, self.signals = run, state, run.signals
        self.saved_at = time.monotonic()  # or begun
        # Those to check: place, loss, indices of the batch, and event at which the loss is known.
        self.losses: list[tuple[str, Tensor, Sequence[int], torch.cuda.Event | None]] = []
        self.last_good = "no checkpoint was written yet"
        if state.epoch or state.step:
            self._note_saved()
        elif run.last.exists():  # from the stage before
            self.last_good = f"the last good checkpoint is {run.last}"

    @property
    def stopping(self) -> bool:
        """Whether a signal has come."""
        return self.signals.received is not None

    def training_batches(self, loader: Iterable[Any], left_out: Tensor) -> Iterator[Any]:
        """Yield batches, poll before each one and at the end, and count images left out."""
        batches = iter(loader)
        while True:
            batch = failure = None
            try:
                if not self.stopping:
                    batch = next(batches, None)
            except Exception as error:
                failure = error
            self.poll(failure)
            if batch is None:
                return
            self._report(batch.left_out, left_out)
            yield batch

    def validation_batches(self, loader: Any, left_out: Tensor) -> Iterator[Any]:
        """Yield batches until a signal comes, and poll only at the end.

        Processes may have different numbers of batches, and so cannot agree in between.
        """
        failure, missing = None, 0
        try:
            for batch in loader:
                if self.stopping:
                    break
                self._report(batch.left_out, left_out)
                missing += len(batch.left_out)
                if len(batch.images):
                    yield batch
            if missing and missing == len(loader.dataset):
                raise UserError("none of the images to validate on can be read: is the disk gone?")
        except Exception as error:
            failure = error
        self.poll(failure)

    def _report(self, reasons: Sequence[str], left_out: Tensor) -> None:
        for reason in reasons:
            tqdm.write(f"left out: {reason}", file=sys.stderr)
            left_out += 1

    def save(self) -> None:
        """Write the checkpoint, unless a loss or a weight is not finite."""
        self.check_finite()
        checkpoint = self.state.state_dict()
        distributed.first(lambda: self.run.save(checkpoint))
        self._note_saved()

    def _note_saved(self) -> None:
        self.saved_at, place = time.monotonic(), self.state.place()
        self.last_good = f"the last good checkpoint is {self.run.last}, after {place}"

    def check_finite(self) -> None:
        """Raise Diverged if a loss so far, or a weight, is not finite; this waits for a GPU."""
        diverged = self._first_bad_loss(all_losses=True) or self._bad_weights()
        self._act(Action.FAIL_UNSAVED if diverged else Action.CONTINUE, diverged)

    def note_loss(self, loss: Tensor, indices: Sequence[int]) -> None:
        """Note the loss of a step on the items of these indices, to be checked later."""
        event = None
        if loss.is_cuda:
            # Nothing waits for this copy, which is read one step later.
            host = torch.empty((), dtype=loss.dtype, pin_memory=True)
            loss, event = host.copy_(loss.detach(), non_blocking=True), torch.cuda.Event()
            event.record()
        self.losses.append((self.state.place(), loss.detach(), indices, event))

    def poll(self, failure: Exception | None = None) -> None:
        """Save if it is time; save and end if a signal came or a process failed.

        All processes must poll after the same step, each with its own failure.

        Raises:
            Interrupted: a signal came.
            Diverged: a loss is not finite; nothing was saved.
            Exception: the failure of this process, with a note on how to resume.
            SystemExit: another process failed.
        """
        diverged = self._first_bad_loss()
        due = time.monotonic() - self.saved_at > 60 * self.run.args.checkpoint_minutes
        if diverged:
            action = Action.FAIL_UNSAVED
        elif failure is not None:
            action = Action.FAIL
        elif self.stopping:
            action = Action(self.signals.received)
        elif due and distributed.is_first():
            action = Action.SAVE
        else:
            action = Action.CONTINUE
        self._act(action, diverged or failure)

    def _act(self, action: Action, failure: Exception | None) -> None:
        """Agree with the other processes on an action, and take it."""
        action = Action(distributed.agree(action))
        if action == Action.CONTINUE:
            return
        if action != Action.FAIL_UNSAVED:
            self.save()
        if action == Action.SAVE:
            return
        how = f"saved after {self.state.place()}; resume with: {self.run.command}"
        if action in STOPS:
            name = "Ctrl-C" if action == Action.STOP_ON_SIGINT else "SIGTERM"
            raise Interrupted(f"stopped by {name}, {how}", action)
        if failure is None:  # another process failed, and says why
            sys.exit(2)
        if isinstance(failure, Diverged):
            raise failure
        if not isinstance(failure, UserError):
            print(how, flush=True)  # a traceback follows
        failure.add_note(how)
        raise failure

    def _first_bad_loss(self, all_losses: bool = False) -> Diverged | None:
        """Return the error for the first loss that is not finite, or None."""
        # A GPU is still computing the newest one.
        while self.losses and (all_losses or len(self.losses) > 1 or self.losses[0][3] is None):
            place, loss, indices, event = self.losses.pop(0)
            if event is not None:
                event.synchronize()
            if not math.isfinite(loss.item()):
                self.losses.clear()
                files = self.state.stage.files
                paths = [path for index in indices for path in files(int(index)) if path]
                return Diverged(
                    f"the loss is {loss.item()} in {place}, with {few(paths, FILES_NAMED)}: "
                    f"training has diverged, or these files are wrong; {self.last_good}"
                )
        return None

    def _bad_weights(self) -> Diverged | None:
        stage = self.state.stage
        states = (stage.model.state_dict(), stage.scored.state_dict())
        weights = [w for state in states for w in state.values() if w.is_floating_point()]
        if torch.nn.utils.get_total_norm(weights).isfinite():
            return None
        return Diverged(
            f"a weight is not finite after {self.state.place()}: training has diverged; "
            f"{self.last_good}"
        )
