"""Loading data in worker processes: each result in one file, and no endless wait.

torch sends each tensor as a file of its own in /dev/shm, of which Docker gives 64 MB, and with a
file handle of its own. Where either runs out, the tensor is lost, and its receiver waits forever.
"""

import atexit
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from functools import partial
from multiprocessing import (
    active_children,
    get_start_method,
    reduction,
    resource_tracker,
    synchronize,
)
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.errors import UserError, one_line

MAX_WAIT = 600  # seconds to wait for one batch: storage may be slow
ALIGNMENT = 64  # bytes
DEATH_MESSAGES = ("DataLoader worker", "Pin memory thread")  # as torch reports them
HINTS = {errno.EMFILE: ": raise ulimit -n", errno.ENOSPC: ": is /dev/shm full?"}


class WorkerError(UserError):
    """A process that loads data died, cannot start, or cannot hand over what it read."""


class WorkersStuck(UserError):
    """No process that loads data has answered for a long time."""


class Loader(DataLoader):
    """A DataLoader that raises a UserError if its workers die, do not answer, or cannot start.

    The error comes when the next batch is asked for, not at any moment, such as within a step.
    Options are further arguments of DataLoader.
    """

    def __init__(
        self, dataset: Dataset | range, workers: int, collate_fn: Callable, **options: Any
    ) -> None:
        super().__init__(
            dataset,
            num_workers=workers,
            collate_fn=partial(_packed, collate_fn) if workers else collate_fn,
            # Forking in every epoch would copy much of the memory that training on a CPU holds.
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_parent,
            # A DataLoader draws a number whenever it starts. From the global generator, a resumed
            # run, which starts its loaders again, would train on other random numbers.
            generator=torch.Generator(),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        if not self.num_workers:
            return super().__iter__()
        with _signals_held_back():
            watch = _Watch()  # a signal would break the start of its thread
        with _system_errors("processes that load data cannot start"), watch, _signals_held_back():
            batches = super().__iter__()  # starts workers, the first time
        if not isinstance(batches._workers_done_event, _DoneEvent):
            batches._workers_done_event = _DoneEvent(batches._workers_done_event)
        return _watched_batches(batches, watch)


class _DoneEvent:
    """The event by which a DataLoader tells its workers to end, without an endless wait.

    A worker that is killed as it looks at the event keeps the event's lock for ever. So the loader,
    which alone sets it, looks at a copy, and sets it only if the lock comes soon.
    """

    def __init__(self, shared: synchronize.Event) -> None:
        self.shared, self.done = shared, False

    def is_set(self) -> bool:
        return self.done

    def set(self) -> None:
        self.done = True
        if self.shared._cond.acquire(timeout=1):
            self.shared._cond.release()
            self.shared.set()


@contextmanager
def _system_errors(what: str) -> Iterator[None]:
    """Turn errors of the system into a WorkerError."""
    try:
        yield
    except OSError as error:
        hint = HINTS.get(error.errno, "")
        # torch cannot free a half-made iterator without complaint.
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        traceback.clear_frames(error.__traceback__)
        sys.unraisablehook = hook
        raise WorkerError(f"{what} ({error.strerror or error}{hint})") from error


def _watched_batches(batches: Iterator[Any], watch: "_Watch") -> Iterator[Any]:
    end = object()
    try:
        while True:
            with watch:
                batch = next(batches, end)
                if isinstance(batch, Parcel):
                    batch = batch.unpack()
            if batch is end:
                return
            yield batch
    finally:
        watch.stopped.set()


class _Watch:
    """A context in which workers have MAX_WAIT to answer; an error within it kills them.

    The `timeout` of a DataLoader will not do: it would pass before a dead worker is noticed.
    """

    def __init__(self) -> None:
        self.wait_number, self.waiting, self.stuck = 0, False, False
        self.stopped = threading.Event()
        threading.Thread(target=self._kill_if_stuck, daemon=True).start()

    def __enter__(self) -> None:
        self.wait_number, self.waiting = self.wait_number + 1, True

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        self.waiting = False
        if error is None:
            return
        self.stopped.set()
        kill_workers()  # or the end of the program waits for what they still read
        if self.stuck:
            raise WorkersStuck(
                f"no data came for {MAX_WAIT // 60} minutes: is the disk or the network gone?"
            ) from error
        # A worker that dies while handing over a batch breaks the connection first.
        if isinstance(error, ConnectionError | EOFError) or str(error).startswith(DEATH_MESSAGES):
            raise WorkerError(
                f"a process that loads data died ({one_line(error)}), perhaps for want of memory"
            ) from error

    def _kill_if_stuck(self) -> None:
        wait_number, seconds = 0, 0
        # Counted, as time in which the whole program is suspended must not matter.
        while not self.stopped.wait(1):
            seconds = seconds + 1 if self.waiting and self.wait_number == wait_number else 0
            wait_number = self.wait_number
            if seconds >= MAX_WAIT:
                self.stuck = True
                kill_workers()  # which the DataLoader notices
                return


@atexit.register  # after importing torch, so that this runs before Python's own handler
def kill_workers() -> None:
    """Kill workers, which ignore SIGTERM; at exit, Python would wait for those left by an error."""
    for process in active_children():
        if process.daemon:
            process.kill()


# Signals


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM, which come to all processes of a run, while workers start.

    Workers inherit that they are blocked, until they can ignore them.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    if get_start_method() != "fork":
        resource_tracker.ensure_running()  # its start unblocks signals
    numbers, came, handlers = (signal.SIGINT, signal.SIGTERM), [], {}
    if threading.current_thread() is threading.main_thread():
        # Other threads may get signals that this one blocks.
        handlers = {n: signal.signal(n, lambda n, _: came.append(n)) for n in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if handlers:
            # torch's handler would raise the error of a dead worker at any moment, even in a step.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in came:
            signal.raise_signal(number)


def _leave_signals_to_parent(_worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which a terminal or cluster sends to all processes of a run.

    The training process needs its workers to finish its step, and reports their errors itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *_: None


# Handing over


class _Place(NamedTuple):
    """Where a tensor lies in a parcel."""

    start: int
    end: int
    dtype: torch.dtype
    shape: Sequence[int]  # of its dimensions in the order of their strides
    order: Sequence[int]


class Parcel:
    """A value of a worker with all its tensors in one file in memory, on its way to its receiver.

    That file lies in no folder, and so is not limited by /dev/shm; it needs one handle. All that
    can fail happens here and in `unpack`, where the error is raised.
    """

    def __init__(self, value: Any) -> None:
        with os.fdopen(os.memfd_create("parcel"), "wb") as file:

            def write(tensor: Tensor) -> _Place:
                order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
                dense = tensor.permute(order).contiguous()
                start = file.tell() + -file.tell() % ALIGNMENT
                file.seek(start)
                file.write(dense.numpy())
                return _Place(start, file.tell(), dense.dtype, tuple(dense.shape), order)

            rest = _map_instances(Tensor, write, value)
            self.rest = file.tell()
            # Not left to the queue: a long message can be cut short if this process is killed.
            file.write(reduction.ForkingPickler.dumps(rest))
            file.flush()
            self.handle = reduction.DupFd(file.fileno())

    def unpack(self, pin: bool = False) -> Any:
        """Return the value, its tensors with the strides they had; call this once."""
        try:
            handle = self.handle.detach()
        except (OSError, RuntimeError) as error:
            if isinstance(error, ConnectionError):  # the worker died
                raise
            # RuntimeError is "received 0 items of ancdata", for want of a handle.
            raise WorkerError(
                f"too many files are open ({one_line(error)}): raise ulimit -n"
            ) from error
        with os.fdopen(handle):
            length = os.fstat(handle).st_size
            memory = torch.from_file(f"/proc/self/fd/{handle}", True, length, dtype=torch.uint8)
        if pin:
            memory = memory.pin_memory()

        def read(place: _Place) -> Tensor:
            dense = memory[place.start : place.end].view(place.dtype).view(place.shape)
            return dense.permute(sorted(range(dense.dim()), key=place.order.__getitem__))

        rest = reduction.ForkingPickler.loads(memory[self.rest :].numpy())
        return _map_instances(_Place, read, rest)

    def pin_memory(self) -> Any:
        return self.unpack(pin=True)


def _packed(function: Callable[[Any], Any], argument: Any) -> Any:
    """Call a function in a worker, and pack its result if it holds tensors."""
    value, tensors = function(argument), []
    _map_instances(Tensor, tensors.append, value)
    # Elsewhere than on Linux, torch does not need /dev/shm.
    if not tensors or not hasattr(os, "memfd_create"):
        return value
    with _system_errors("what a worker read cannot be handed over"):
        return Parcel(value)


def _map_instances(kind: type, change: Callable[[Any], Any], value: Any) -> Any:
    """Return lists, tuples and dataclasses of any depth with each object of a kind changed."""
    if isinstance(value, kind):
        return change(value)
    again = partial(_map_instances, kind, change)
    if isinstance(value, list):
        return [again(item) for item in value]
    if isinstance(value, tuple):
        items = [again(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if is_dataclass(value):
        return replace(value, **{name: again(item) for name, item in vars(value).items()})
    return value
