import ctypes
import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import reduction
from pathlib import Path

import pytest
import torch
from conftest import PRETRAIN_QUICK, QUICK, ROOT, Forked, run_script
from torch.utils.data import Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from datasets import workers
from datasets.loading import Batch, batch_loader, call_in_workers
from datasets.pictures import Frame
from datasets.workers import Loader, Parcel, WorkerError, WorkersStuck
from utils.script import run_script as run_main

CPU = torch.device("cpu")
CLONE_NEWNS = 0x20000
METHODS = ("fork", "spawn", "forkserver")


class Plain(Dataset):
    """Images as a data set gives them: 3 x H x W in channels_last format, and their labels."""

    def __init__(self, length: int, height: int, width: int, classes: bool = False) -> None:
        self.length, self.shape, self.classes = length, (height, width), classes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor | int]:
        image = torch.full((*self.shape, 3), index % 251, dtype=torch.uint8).permute(2, 0, 1)
        label = index if self.classes else torch.full(self.shape, index % 19, dtype=torch.uint8)
        return image, label


def small_shm(size: str) -> None:
    """Give this process a /dev/shm of its own, of so many bytes."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"]
    subprocess.run(["mount", *options], check=True)


def ended(program: Callable[[], object], folder: Path, shm: str | None = None, files: int = 0):
    """Run a program in a process with few resources, as `utils.script.run_script` runs it."""

    def limited() -> None:
        sys.argv = ["main.py"]
        try:
            if shm:
                small_shm(shm)
        except (OSError, subprocess.CalledProcessError):
            sys.exit(77)
        if files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        run_main(program)

    result = Forked(limited, folder).finish(60)
    if result.status == 77:
        pytest.skip("this machine does not allow another /dev/shm")
    return result


# What comes from a worker


def numbers(_index: int) -> tuple:
    grid = torch.arange(24).view(2, 3, 4)
    frame = Frame("a", grid.permute(2, 0, 1), grid.float()[:, ::2])
    tensors = [torch.tensor(7), torch.empty(0, 4), grid.bool()[:1], torch.ones(3, 1).expand(3, 5)]
    return Batch([grid.byte()], tensors, [2**62], [1], ["é"]), frame, "text", None


def test_a_value_comes_as_it_was():
    expected, (found,) = numbers(0), call_in_workers(numbers, 1, 1, "")
    assert isinstance(found[0], Batch) and isinstance(found[1], Frame)
    assert found[0][2:] == expected[0][2:] and found[1].name == "a" and found[2:] == expected[2:]

    def tensors(value: tuple) -> list[torch.Tensor]:
        return [*value[0].images, *value[0].labels, value[1].image, value[1].resized]

    for tensor, other in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype
    assert found[1].image.stride() == expected[1].image.stride() == (1, 12, 4)


@pytest.mark.parametrize("stacked", [False, True])
def test_batches_are_those_of_this_process(stacked):
    plain = Plain(7, 5, 9, classes=stacked)
    both = [batch_loader(plain, None, 3, count, stacked=stacked) for count in (0, 2)]
    for own, came in zip(*both, strict=True):
        assert own[2:] == came[2:]
        for a, b in zip([*own.images, *own.labels], [*came.images, *came.labels], strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()


def test_a_batch_comes_in_one_piece():
    (batch,) = batch_loader(Plain(6, 5, 9), None, 6, 1)
    storages = {tensor.untyped_storage().data_ptr() for tensor in batch.images + batch.labels}
    assert len(storages) == 1


def test_a_batch_is_pinned_in_one_piece(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.clone()) or pinned[0])
    found, *_ = pin_memory(Parcel(numbers(0)))
    assert found.images[0].tolist() == numbers(0)[0].images[0].tolist() and len(pinned) == 1
    assert found.images[0].untyped_storage().data_ptr() == pinned[0].untyped_storage().data_ptr()


# Few resources


CASES = {
    # As main.py trains by default; labels alone would fill it.
    "segmentation": lambda: batch_loader(Plain(60, 512, 1024), None, 5, 4),
    "classification": lambda: batch_loader(Plain(768, 224, 224, True), None, 256, 2, stacked=True),
    "photos": lambda: call_in_workers(Plain(3, 4000, 6000).__getitem__, 3, 2, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_batches_need_no_shared_memory(tmp_path, case):
    """64 MB are what Docker gives."""

    def program() -> None:
        loader = CASES[case]()
        for number, _ in enumerate(loader):
            if not number:
                time.sleep(1)  # while workers read ahead
        print("all came", number + 1)

    result = ended(program, tmp_path, shm="64m")
    count = {"segmentation": 12}.get(case, 3)
    assert (result.status, result.out, result.err) == (0, f"all came {count}\n", "")


PROGRAMS = {
    "main": f"main.py --datadir {{cityscapes}} {' '.join(map(str, QUICK))} --savedir run",
    "cached": f"main.py --datadir {{cityscapes}} {' '.join(map(str, QUICK))} --savedir run "
    "--cache cache --decoder",
    "imagenet": "lednet_imagenet.py --datadir {shapes} --lr 0.01 --savedir run "
    f"{' '.join(map(str, PRETRAIN_QUICK))}",
    "evaluation": "eval_cityscapes_server.py --checkpoint {network} --datadir {cityscapes}",
    "predict": "predict.py --input {cityscapes}/leftImg8bit --output out",
    "check": "tools/check_dataset.py --datadir {cityscapes}",
}


@pytest.fixture
def command(cityscapes, shapes, street_network, tmp_path, monkeypatch) -> Callable[[str], list]:
    """Return the command line of one of PROGRAMS, with two workers, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    places = {"cityscapes": cityscapes, "shapes": shapes, "network": street_network}
    options = ["--workers", "2"]

    def command(name: str) -> list[str]:
        program, *rest = PROGRAMS[name].format(**places).split()
        device = [] if name == "check" else ["--device", "cpu"]
        return [program, *rest, *options, *device]

    return command


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "check"])
def test_programs_need_no_shared_memory(command, tmp_path, name):
    """Only their locks lie there, a page each; the images take more."""
    argv = command(name)
    result = ended(lambda: sys.exit(run_script(*argv)), tmp_path, shm="128k")
    assert (result.status, result.err) == (0, "")


@pytest.mark.parametrize(("files", "size"), [(256, 100), (1024, 300)])
def test_few_file_handles_are_enough(tmp_path, files, size):
    def program() -> None:
        loader = batch_loader(Plain(2 * size, 8, 8), None, size, 2)
        assert [len(batch.images) for batch in loader] == [size, size]

    result = ended(program, tmp_path, files=files)
    assert (result.status, result.err) == (0, "")


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"files": 16}, "Too many open files: raise ulimit -n"),
        ({"shm": "12k"}, "No space left on device: is /dev/shm full?"),
    ],
)
def test_workers_that_cannot_start_are_one_line(tmp_path, limits, reason):
    result = ended(lambda: list(batch_loader(Plain(9, 8, 8), None, 1, 4)), tmp_path, **limits)
    expected = f"main.py: error: processes that load data cannot start ({reason})\n"
    assert (result.status, result.err) == (2, expected)


def test_what_cannot_be_handed_over_is_one_line(tmp_path, monkeypatch):
    def memfd_create(name: str) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "memfd_create", memfd_create)
    result = ended(lambda: list(batch_loader(Plain(9, 8, 8), None, 1, 2)), tmp_path)
    reason = "what a worker read cannot be handed over (Cannot allocate memory)"
    assert (result.status, result.err) == (2, f"main.py: error: {reason}\n")


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "x"), RuntimeError("received 0 items")])
def test_what_cannot_be_received_is_a_users_error(monkeypatch, error):
    def detach(_handle: object) -> None:
        raise error

    monkeypatch.setattr(reduction.DupFd(0).__class__, "detach", detach)
    with pytest.raises(WorkerError, match=r"too many files are open \(.*\): raise ulimit -n"):
        list(call_in_workers(numbers, 1, 1, ""))


# Workers that die, or do not answer


def killed(_index: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_reported_in_one_line(tmp_path):
    result = ended(lambda: list(call_in_workers(killed, 3, 1, "")), tmp_path)
    (line,) = result.err.splitlines()
    assert result.status == 2
    assert line.startswith("main.py: error: a process that loads data died (")
    assert line.endswith("), perhaps for want of memory")


def test_a_worker_killed_while_it_hands_over_a_batch_is_recognised(monkeypatch):
    def detach(_handle: object) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr(reduction.DupFd(0).__class__, "detach", detach)
    with pytest.raises(WorkerError, match="a process that loads data died"):
        list(call_in_workers(numbers, 1, 1, ""))


def test_a_dying_worker_does_not_interrupt_a_step():
    """The loader notices when it waits for the next batch, not by a signal at any moment."""
    batches = iter(Loader(range(40), 1, int, batch_size=None, prefetch_factor=1))
    assert next(batches) == 0
    (worker,) = multiprocessing.active_children()
    worker.kill()
    time.sleep(0.5)  # a step
    with pytest.raises(WorkerError):
        list(batches)


def test_a_worker_killed_with_a_lock_of_its_loader_does_not_hold_up_the_end():
    """A loader tells its workers to end by an event, whose lock a killed one may have kept."""
    loader = Loader(range(40), 1, int, batch_size=None, prefetch_factor=1)
    batches = iter(loader)
    assert next(batches) == 0
    event = loader._iterator._workers_done_event
    getattr(event, "shared", event)._cond.acquire()  # as by a worker that looks at it
    (worker,) = multiprocessing.active_children()
    worker.kill()
    ended = []

    def end() -> None:
        with pytest.raises(WorkerError):
            list(batches)
        loader._iterator._shutdown_workers()
        ended.append(True)

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(30)
    assert ended


def slow(index: int) -> int:
    time.sleep(1.6 if index < 3 else 60)
    return index


@pytest.mark.slow
def test_workers_that_do_not_answer_end_the_run(monkeypatch):
    """Those that answer in time do not, and neither does a program that does not ask."""
    monkeypatch.setattr(workers, "MAX_WAIT", 4)
    values = call_in_workers(slow, 4, 1, "")
    assert next(values) == 0
    time.sleep(6)
    assert [next(values), next(values)] == [1, 2]
    started = time.monotonic()
    with pytest.raises(WorkersStuck, match="no data came for"):
        next(values)
    assert time.monotonic() - started < 20 and not multiprocessing.active_children()


# Signals and start methods


def ignores_signals(_index: int) -> bool:
    numbers = (signal.SIGINT, signal.SIGTERM)
    return all(signal.getsignal(number) == signal.SIG_IGN for number in numbers)


def fails_silently(_index: int) -> None:
    # As a thread of multiprocessing does that hands over batches, when nobody takes them.
    sys.excepthook(EOFError, EOFError(), None)


def test_workers_leave_signals_and_errors_to_the_training_process(capfd):
    assert list(call_in_workers(ignores_signals, 2, 1, "")) == [True, True]
    list(call_in_workers(fails_silently, 1, 1, ""))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("method", METHODS)
def test_signals_wait_until_workers_have_started(monkeypatch, method):
    """Processes that start meanwhile never get them."""
    monkeypatch.setattr(workers, "get_start_method", lambda: method)
    came, numbers = [], {signal.SIGINT, signal.SIGTERM}
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in numbers}
    try:
        with workers._signals_held_back():
            assert numbers <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
            for number in numbers:
                os.kill(os.getpid(), number)
            assert came == []
        assert set(came) == numbers
        assert not numbers & signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_waits_until_the_watch_has_started(monkeypatch):
    """In the start of its thread, it would leave a traceback."""
    started = []

    def watch(start=workers._Watch) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        started.append(start())
        return started[-1]

    monkeypatch.setattr(workers, "_Watch", watch)
    with pytest.raises(KeyboardInterrupt):
        iter(Loader(range(2), 1, int, batch_size=None))
    started[0].stopped.set()


@pytest.mark.parametrize("name", PROGRAMS)
def test_all_that_workers_get_can_be_sent(command, monkeypatch, name):
    """As it is with the start methods spawn and forkserver."""
    sent = []

    def start(loader: Loader, start=Loader.__iter__):
        parts = loader.dataset, loader.collate_fn, loader.worker_init_fn
        sent.append(reduction.ForkingPickler.dumps(parts))
        return start(loader)

    monkeypatch.setattr(Loader, "__iter__", start)
    program, *options = command(name)
    assert run_script(program, *options, "--workers", 0) == 0 and sent


def started_by(method: str, argv: list[str]) -> subprocess.Popen:
    """Start a program whose workers are started in that way; it prints a line before they are."""
    code = f"""
import multiprocessing, runpy, sys
multiprocessing.set_start_method({method!r})
sys.path.insert(0, {str(ROOT)!r})
from datasets.workers import Loader
def start(loader, start=Loader.__iter__):
    print("workers start", flush=True)
    return start(loader)
Loader.__iter__ = start
sys.argv = {argv!r}
runpy.run_path({str(ROOT / argv[0])!r}, run_name="__main__")
"""
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_run_with_other_start_methods(command, method, name):
    process = started_by(method, command(name))
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "") and "workers start" in out


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0, 0.5])
def test_a_signal_while_workers_start_is_one_line(command, method, number, seconds):
    process = started_by(method, command("evaluation"))
    assert any("workers start" in line for line in process.stdout)
    time.sleep(seconds)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert err.strip() in (
        "eval_cityscapes_server.py: interrupted",
        "eval_cityscapes_server.py: stopped by SIGTERM",
    )
