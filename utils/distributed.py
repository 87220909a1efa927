"""The processes of one run, as torchrun starts them. Without it there is one, and nothing to do.

The first process alone writes and prints. What all of them must know, whether to stop above all,
they agree on between two steps, so that none waits for another that has ended.
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

FAILURE = "failure"  # where the store says why a process ended

_store: dist.Store | None = None
# For objects and agreements: by gloo, on the CPU, without waiting for a GPU. The first process may
# check a data set for hours meanwhile.
_control: dist.ProcessGroup | None = None


def local_rank() -> int | None:
    """The number of this process among those that torchrun started on this machine; else None."""
    number = os.environ.get("LOCAL_RANK")
    return int(number) if number is not None and "WORLD_SIZE" in os.environ else None


def local_processes() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if processes() > 1 else 1


def start(device: torch.device) -> None:
    """Join the other processes, by NCCL on GPUs and gloo on CPUs; the first alone prints on."""
    global _store, _control
    if local_rank() is None or int(os.environ["WORLD_SIZE"]) == 1:
        return
    _store, number, count = next(dist.rendezvous("env://"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("run", _store), rank=number, world_size=count
    )
    _control = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if number > 0:
        sys.stdout = open(os.devnull, "w")


def stop() -> None:
    """Leave the other processes, at the end of the program."""
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
    """Have the first process alone call a function, and give its result to all.

    Raises:
        SystemExit: in the other processes, where the function fails in the first.
    """
    if processes() == 1:
        return function()
    outcome: list[Any] = [None, False]
    if is_first():
        try:
            outcome = [function(), True]
        finally:
            dist.broadcast_object_list(outcome, group=_control)
    else:
        dist.broadcast_object_list(outcome, group=_control)
    result, done = outcome
    if not done:
        sys.exit(2)
    return result


def agree(number: int) -> int:
    """The largest of the numbers that each process has."""
    if processes() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_control)
    return int(largest)


def gather(item: Any) -> list[Any]:
    """The item of each process, in their order, in all of them."""
    items = [item] * processes()
    if processes() > 1:
        dist.all_gather_object(items, item, group=_control)
    return items


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes, in all of them."""
    if processes() == 1:
        return tensor
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


def joined(tensor: Tensor) -> Tensor:
    """The tensors of all processes, of one shape, one after the other in the first dimension."""
    if processes() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(processes())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def share(dataset: Dataset) -> Dataset:
    """The items of a data set that this process is to score: every one is some process's, once."""
    if processes() == 1:
        return dataset
    return Subset(dataset, range(rank(), len(dataset), processes()))


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as it is to be called in training: its gradients are averaged over processes."""
    if processes() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def share_buffers(module: nn.Module) -> None:
    """Give all processes the first one's running statistics, which each has of its own images."""
    if processes() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def announce(message: str) -> None:
    """Leave word of why this process ends, for those that wait for it."""
    if _store is not None:
        with suppress(dist.DistError):  # where torchrun itself is gone
            # The names of files may be no UTF-8.
            message = message.encode(errors="backslashreplace").decode()
            _store.set(FAILURE, message if is_first() else f"process {rank()}: {message}")


def failure_elsewhere(error: Exception) -> str | None:
    """Why another process ended, where that is what an error here comes from."""
    if _store is None:
        return None
    with suppress(dist.DistError):
        if _store.check([FAILURE]):
            return _store.get(FAILURE).decode()
    if isinstance(error, dist.DistError) or "gloo/" in str(error):
        return "another process ended without a word: was it killed, or out of memory?"
    return None
