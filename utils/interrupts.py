"""What is looked up between two steps of training: whether to save, and whether to end."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from utils import distributed
from utils import script as cli
from utils.errors import UserError, one_line
from utils.script import Interrupted, worker_death
from utils.training import Training

SAME_SIGNAL = 1.0  # seconds in which a signal that comes again is the same one
FILES_NAMED = 20  # of a batch, in a message


class Diverged(UserError):
    """A loss or a weight is not finite."""


class Wish(IntEnum):
    """What a process wants to happen now; of several, the largest happens to all."""

    GO_ON = 0
    SAVE = 1
    STOP_BY_SIGINT = 2
    STOP_BY_SIGTERM = 3
    FAIL = 4
    FAIL_UNSAVED = 5


STOPPED_BY = {Wish.STOP_BY_SIGINT: signal.SIGINT, Wish.STOP_BY_SIGTERM: signal.SIGTERM}


class Watch:
    """Saves a run from time to time and when it has to end, always between two steps.

    As a context, it takes SIGTERM and Ctrl-C: the first is noted, the second ends the process.

    Args:
        checkpoint: the file that is saved.
        minutes: between checkpoints within an epoch.
        command: that goes on with the run.
        files: the files that the item of an index was read from.
        mistakes: errors of reading that are the user's to mend, to be told in one line.
    """

    def __init__(
        self,
        checkpoint: Path,
        minutes: float,
        command: str,
        files: Callable[[int], Sequence[str]],
        mistakes: tuple[type[Exception], ...],
    ) -> None:
        self.checkpoint, self.minutes, self.command = checkpoint, minutes, command
        self.files, self.mistakes = files, mistakes
        self.received: int | None = None
        self.losses: list[tuple[str, Tensor, Sequence[int], torch.cuda.Event | None]] = []

    def __enter__(self) -> "Watch":
        # What is ignored stays so: Ctrl-C under nohup, or in the background of a shell script.
        heard = [n for n in STOPPED_BY.values() if signal.getsignal(n) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._note) for number in heard}
        if cli.received is not None:  # before there was a watch, and it was dropped
            self._note(cli.received, None)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def begin(self, training: Training, save: Callable[[], None], stage: str = "") -> None:
        """Watch over a stage.

        Args:
            save: writes the checkpoint.
            stage: its name, for messages.
        """
        self.training, self._save, self.stage = training, save, stage
        self.saved = time.monotonic()
        if training.epoch or training.step:
            self.kept = self._kept()
        elif self.checkpoint.exists():  # of the stage before
            self.kept = f"the last good checkpoint is {self.checkpoint}"
        else:
            self.kept = "no checkpoint was written yet"

    @property
    def stopping(self) -> bool:
        """Whether a signal has come: what takes long is to be broken off."""
        return self.received is not None

    @property
    def place(self) -> str:
        """How far the run has come."""
        training = self.training
        if training.step:
            return f"step {training.step} of epoch {training.epoch + 1}{self.stage}"
        return f"epoch {training.epoch}{self.stage}"

    def save(self) -> None:
        """Write the checkpoint, if all is well.

        Raises:
            Diverged: it is not, and the checkpoint before stays.
        """
        self.check()
        self._save()
        self.kept = self._kept()
        self.saved = time.monotonic()

    def check(self) -> None:
        """See that all losses so far, and the weights, are finite; it waits for a GPU.

        Raises:
            Diverged: one is not.
        """
        diverged = self._diverged(all_losses=True) or self._broken_weights()
        self._end_together(Wish.FAIL_UNSAVED if diverged else Wish.GO_ON, diverged)

    def _kept(self) -> str:
        return f"the last good checkpoint is {self.checkpoint}, after {self.place}"

    def note_loss(self, loss: Tensor, indices: Sequence[int]) -> None:
        """Have the loss of this step looked at, when a GPU has come that far.

        Args:
            indices: of the items of its batch.
        """
        event = None
        if loss.is_cuda:
            # A copy that is asked for now is made when the GPU gets to it, and waited for a step
            # later, while it works on the next.
            host = torch.empty((), dtype=loss.dtype, pin_memory=True)
            loss, event = host.copy_(loss.detach(), non_blocking=True), torch.cuda.Event()
            event.record()
        self.losses.append((self.place, loss.detach(), indices, event))

    def look_up(self, failure: Exception | None = None) -> None:
        """Save, if it is time; or save and end, if a signal came or a process failed.

        All processes must look up after the same step, each with its own failure.

        Raises:
            Interrupted: a signal came.
            Diverged: a loss is not finite; nothing was saved.
            UserError: the failure, if it is a mistake, and how to go on.
            SystemExit: another process failed.
        """
        diverged = self._diverged()
        if diverged:
            wish = Wish.FAIL_UNSAVED
        elif failure is not None:
            wish = Wish.FAIL
        elif self.received is not None:
            wish = next(wish for wish, number in STOPPED_BY.items() if number == self.received)
        elif time.monotonic() - self.saved > 60 * self.minutes and distributed.is_first():
            wish = Wish.SAVE
        else:
            wish = Wish.GO_ON
        self._end_together(wish, diverged or failure)

    def _end_together(self, wish: Wish, failure: Exception | None) -> None:
        """Do what the process with the strongest wish wants."""
        wish = Wish(distributed.agree(wish))
        if wish == Wish.GO_ON:
            return
        if wish != Wish.FAIL_UNSAVED:
            self.save()
        if wish == Wish.SAVE:
            return
        how = f"saved after {self.place}, to go on: {self.command}"
        if wish in STOPPED_BY:
            name = "Ctrl-C" if wish == Wish.STOP_BY_SIGINT else "SIGTERM"
            raise Interrupted(f"stopped by {name}, {how}", STOPPED_BY[wish])
        # Each process tells its own failure; one that has none ends without a word.
        if failure is None:
            sys.exit(2)
        if isinstance(failure, Diverged):
            raise failure
        if isinstance(failure, UserError):
            raise UserError(f"{failure}; {how}") from failure
        if isinstance(failure, self.mistakes):
            raise UserError(
                f"{one_line(failure)}, or leave it out with --skip-broken; {how}"
            ) from failure
        died = worker_death(failure)
        if died is not None:
            raise UserError(f"{died}; {how}") from failure
        print(how, flush=True)
        raise failure

    def _diverged(self, all_losses: bool = False) -> Diverged | None:
        """The first loss that is not finite, of those that a GPU has computed by now."""
        behind = 1 if self.training.device.type == "cuda" and not all_losses else 0
        while len(self.losses) > behind:
            place, loss, indices, event = self.losses.pop(0)
            if event is not None:
                event.synchronize()
            if not math.isfinite(loss.item()):
                self.losses.clear()
                paths = [path for index in indices for path in self.files(int(index))]
                more = f" and {len(paths) - FILES_NAMED} more" if len(paths) > FILES_NAMED else ""
                files = ", ".join(paths[:FILES_NAMED]) + more
                return Diverged(
                    f"the loss is {loss.item()} in {place}, of {files}: training has diverged, or "
                    f"these files are wrong; {self.kept}: look at them, or start another run with "
                    "a smaller --lr"
                )
        return None

    def _broken_weights(self) -> Diverged | None:
        states = (self.training.model.state_dict(), self.training.scored.state_dict())
        weights = [w for state in states for w in state.values() if w.is_floating_point()]
        if torch.nn.utils.get_total_norm(weights).isfinite():
            return None
        return Diverged(
            f"a weight is not finite after {self.place}: training has diverged; {self.kept}: start "
            "another run with a smaller --lr"
        )

    def _note(self, number: int, _frame: FrameType | None) -> None:
        name = os.path.basename(sys.argv[0])
        # Not by print, which may be at work at this very moment.
        if self.received == number and distributed.local_rank() is not None:
            # torchrun passes on what a cluster may have sent to its processes as well.
            if time.monotonic() - self.noted < SAME_SIGNAL:
                return
        if self.received is not None:
            os.write(2, f"{name}: stopped at once\n".encode())
            os._exit(128 + number)
        self.received, self.noted = number, time.monotonic()
        if distributed.is_first():
            os.write(2, f"{name}: finishing the step to save; again to stop at once\n".encode())
