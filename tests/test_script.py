import argparse
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import PRETRAIN_QUICK, Forked
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datasets.images import DatasetError, open_image
from utils import distributed, script
from utils.errors import UserError, one_line
from utils.files import WriteError
from utils.script import (
    Interrupted,
    device_name,
    pick_amp_dtype,
    pick_device,
    run_script,
    start_device,
    start_inference,
    use_threads,
    with_advice,
)


@pytest.fixture
def ended(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Run a main function that must end the program; returns its status and what it printed."""
    monkeypatch.setattr(sys, "argv", ["main.py"])

    def end_of(main: Callable[[], None], **options: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            run_script(main, **options)
        return end.value.code, capsys.readouterr().err

    return end_of


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


# Errors


@pytest.mark.parametrize("error", [UserError, DatasetError, WriteError])
def test_a_users_mistake_ends_in_one_line_and_status_2(ended, error):
    assert ended(raising(error("no\tway"))) == (2, "main.py: error: no\tway\n")


def test_more_workers_than_cores_are_taken_without_a_word():
    """torch warns in four lines, whatever the workers wait for."""
    workers = (os.cpu_count() or 1) + 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_script(lambda: DataLoader(range(3), num_workers=workers))
    assert caught == []


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(raising(ZeroDivisionError()))


def test_the_script_adds_which_option_mends_an_error(ended):
    advice = {UserError: "read the help", DatasetError: "give --skip-broken"}
    assert ended(raising(DatasetError("a.png is broken")), advice=advice)[1] == (
        "main.py: error: a.png is broken; give --skip-broken\n"
    )
    assert with_advice(WriteError("log.csv cannot be written"), advice) == (
        "log.csv cannot be written; read the help"
    )
    assert with_advice(UserError("no way"), {DatasetError: "give --skip-broken"}) == "no way"
    noted = DatasetError("a.png is broken")
    noted.add_note("saved after step 3")
    assert with_advice(noted, advice) == "a.png is broken; give --skip-broken; saved after step 3"


class Broken(Dataset):
    """Every image is broken."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> None:
        raise DatasetError(f"file {index}.png: is broken")


def test_an_error_in_a_worker_is_one_line_too():
    batches = iter(DataLoader(Broken(), num_workers=1))
    with pytest.raises(DatasetError) as error:
        next(batches)
    batches._shutdown_workers()  # the garbage collector would wait for them for 5 s
    assert "Traceback" in str(error.value)
    assert one_line(error.value) == "file 0.png: is broken"


@pytest.mark.parametrize("reason", ["No space left on device", "Broken pipe"])
def test_lost_standard_output_ends_the_program_in_one_line(tmp_path, monkeypatch, reason):
    monkeypatch.setattr(sys, "argv", ["main.py"])

    def program() -> None:
        if reason == "Broken pipe":
            end, output = os.pipe()
            os.close(end)
        else:
            output = os.open("/dev/full", os.O_WRONLY)
        sys.stdout = open(output, "w")
        run_script(lambda: [print("text", flush=True) for _ in range(9)])

    result = Forked(program, tmp_path).finish()
    assert result.status == 2
    assert result.err == f"main.py: error: standard output cannot be written ({reason})\n"


def test_file_names_of_any_kind_can_be_printed(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    run_script(lambda: print("ava\udcfflon.png"))
    out.flush()
    assert out.buffer.getvalue() == b"ava\\udcfflon.png\n"


# Signals


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGINT, 130, "\nmain.py: interrupted\n"), (signal.SIGTERM, 143, "stopped by SIGTERM")],
)
def test_a_signal_ends_the_program_in_one_line_after_it_has_cleaned_up(
    ended, number, status, message
):
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    cleaned = []

    def main() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            cleaned.append(True)

    code, err = ended(main)
    assert code == status and message in err and err.strip().count("\n") == 0
    assert cleaned == [True]
    assert {name: signal.getsignal(name) for name in handlers} == handlers


def test_a_signal_while_an_image_is_read_is_not_taken_for_a_broken_file(ended, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)

    def main() -> None:
        with open_image(str(path)):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    code, err = ended(main)
    assert code == 143 and "stopped by SIGTERM" in err and "a.png" not in err


def test_an_ignored_ctrl_c_stays_ignored(monkeypatch):
    """As for a program that nohup starts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run_script(lambda: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_sigterm_does_not_keep_the_last_line_from_being_printed(monkeypatch):
    """As torchrun sends it to the processes that end last."""
    monkeypatch.setattr(sys, "argv", ["main.py"])
    printed, before = [], signal.getsignal(signal.SIGTERM)

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            printed.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(SystemExit) as end:
        run_script(raising(Interrupted("resume with: python main.py", signal.SIGTERM)))
    assert end.value.code == 143 and "".join(printed) == "main.py: resume with: python main.py\n"
    assert signal.getsignal(signal.SIGTERM) == before


# Several processes


def test_an_error_elsewhere_is_what_a_process_prints(ended, monkeypatch):
    announced = []
    monkeypatch.setattr(distributed, "announce", announced.append)
    assert ended(raising(UserError("the disk is full")))[0] == 2
    assert announced == ["the disk is full"]
    monkeypatch.setattr(distributed, "failure_elsewhere", lambda error: "process 1: no memory")
    assert ended(raising(RuntimeError("gloo"))) == (2, "main.py: error: process 1: no memory\n")


# Device and precision


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99", "meta"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used here"):
            pick_device(name)


def test_threads():
    before = torch.get_num_threads()
    try:
        use_threads(before + 1)
        assert torch.get_num_threads() == before + 1
        assert device_name(torch.device("cpu")).endswith(f", {before + 1} threads")
        use_threads(None)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("main.py", ("--height", 64, "--epochs", 1, "--decoder", "--savedir", "run")),
        ("lednet_imagenet.py", (*PRETRAIN_QUICK, "--savedir", "run")),
        ("lednet_imagenet.py", ("--evaluate", "none.pth")),
        ("eval_cityscapes_server.py", ("--height", 64)),
        ("predict.py", ("--input", "a.png", "--workers", 0)),
    ],
)
def test_programs_say_at_the_start_how_many_threads_they_use(
    script, cityscapes, shapes, monkeypatch, tmp_path, name, argv
):
    """Before the work begins, which is left out."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for work in ("utils.training.fit", "utils.speed.measure_latency"):
        monkeypatch.setattr(work, lambda *args, **options: sys.exit(7))
    data = {"main.py": cityscapes, "lednet_imagenet.py": shapes}.get(name)
    before = torch.get_num_threads()
    try:
        result = script(name, *argv, *(("--datadir", data) if data else ()), "--threads", 3)
    finally:
        torch.set_num_threads(before)
    assert ", 3 threads" in result.out, result


def test_runtimes_for_cpus_refuse_a_gpu(monkeypatch):
    """As `--device auto` picks one where there is one."""
    monkeypatch.setattr(script, "pick_device", lambda *_: torch.device("cuda"))
    for runtime in ("onnx", "openvino"):
        args = argparse.Namespace(
            device="auto", threads=None, runtime=runtime, precision="float32", model=None
        )
        with pytest.raises(UserError, match=f"--runtime {runtime} needs --device cpu"):
            start_inference(args)


def test_precision(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_amp_dtype("auto", cpu) is None and pick_amp_dtype("off", cuda) is None
    assert pick_amp_dtype("bf16", cpu) == torch.bfloat16
    assert pick_amp_dtype("fp16", cuda) == torch.float16
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        pick_amp_dtype("fp16", cpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert pick_amp_dtype("auto", cuda) == torch.float16
    with pytest.raises(UserError, match="not supported by this GPU"):
        pick_amp_dtype("bf16", cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert pick_amp_dtype("auto", cuda) == torch.bfloat16


def test_synchronised_batch_norm_needs_gpus():
    with pytest.raises(UserError, match="--sync-bn needs GPUs"):
        start_device(argparse.Namespace(device="cpu", threads=None, amp="auto", sync_bn=True))
    args = argparse.Namespace(device="cpu", threads=None, amp="auto", sync_bn=False)
    assert start_device(args).type == "cpu"


def test_each_process_of_torchrun_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert taken == [torch.device("cuda:1")] * 2
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="torchrun gives each process a GPU"):
        pick_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="1 GPUs, fewer than its processes"):
        pick_device("auto")
