"""The processes of one run, as torchrun starts them; without torchrun there is only one.

The first process alone writes and prints. Between two steps all of them agree on what comes next,
so that none waits for one that has ended.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Subset

T = TypeVar("T")

FAILURE = "failure"  # key in the store under which a process says why it ends

_store: dist.Store | None = None
# For objects and decisions: gloo, which does not wait for a GPU. Its timeout is long, since the
# first process may check a data set for hours.
_control: dist.ProcessGroup | None = None


def local_rank() -> int | None:
    """Return the number of this process on its machine; None without torchrun."""
    number = os.environ.get("LOCAL_RANK")
    return int(number) if number is not None and "WORLD_SIZE" in os.environ else None


def local_processes() -> int:
    """Return the number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if processes() > 1 else 1


def start(device: torch.device) -> None:
    """Join the other processes, by NCCL on GPUs and gloo on CPUs, and silence all but the first."""
    global _store, _control
    if local_rank() is None or int(os.environ["WORLD_SIZE"]) == 1:
        return
    _store, number, count = next(dist.rendezvous("env://"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.PrefixStore("run", _store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    _control = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if number > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="ignore")


def stop() -> None:
    """Leave the other processes at the end of the program."""
    global _store, _control
    if dist.is_initialized():
        dist.destroy_process_group()
        _store = _control = None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


def first(function: Callable[[], T]) -> T:
    """Call a function in the first process only, and return its result in all of them.

    If the function fails, the other processes end by SystemExit.
    """
    if processes() == 1:
        return function()
    outcome: list[Any] = [None, False]  # the result, and whether there is one
    try:
        if is_first():
            outcome = [function(), True]
    finally:
        dist.broadcast_object_list(outcome, group=_control)
    if not outcome[1]:
        sys.exit(2)
    return outcome[0]


def agree(number: int) -> int:
    """Return the largest number that a process has."""
    if processes() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_control)
    return int(largest)


def gather(item: Any) -> list[Any]:
    """Return the items of all processes, in the order of their ranks."""
    items = [item] * processes()
    if processes() > 1:
        dist.all_gather_object(items, item, group=_control)
    return items


def total(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes."""
    if processes() == 1:
        return tensor
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


def joined(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all processes, which have one shape, in the first dimension."""
    if processes() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(processes())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def share(dataset: Dataset) -> Dataset:
    """Return this process's share of a data set; together, they hold every item once."""
    if processes() == 1:
        return dataset
    return Subset(dataset, range(rank(), len(dataset), processes()))


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a module to call in training, which averages gradients over the processes."""
    if processes() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def share_buffers(module: nn.Module) -> None:
    """Copy the first process's running statistics to all; each has those of its own images."""
    if processes() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def announce(message: str) -> None:
    """Tell the other processes why this one ends."""
    if _store is not None:
        with suppress(dist.DistError):  # torchrun itself may be gone
            message = message.encode(errors="backslashreplace").decode()  # file names: any bytes
            _store.set(FAILURE, message if is_first() else f"process {rank()}: {message}")


def failure_elsewhere(error: Exception) -> str | None:
    """Return why another process ended, if that is what caused an error here."""
    if _store is None:
        return None
    with suppress(dist.DistError):
        if _store.check([FAILURE]):
            return _store.get(FAILURE).decode()
    if isinstance(error, dist.DistError) or "gloo/" in str(error):
        return "another process ended without reporting an error: was it killed, or out of memory?"
    return None
