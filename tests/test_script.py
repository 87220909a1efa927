import argparse
import io
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from datasets.images import DatasetError
from utils.arguments import ArgumentParser, natural_int, positive_float, positive_int
from utils.errors import UserError, one_line
from utils.script import Interrupted, dead_worker, pick_amp_dtype, pick_device, run


def test_numbers():
    assert positive_int("3") == 3 and natural_int("0") == 0 and positive_float("1e-3") == 1e-3


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (positive_int, "0"),
        (positive_int, "-4"),
        (positive_int, "1.5"),
        (positive_int, "many"),
        (natural_int, "-1"),
        (positive_float, "0"),
        (positive_float, "nan"),
        (positive_float, "inf"),
    ],
)
def test_other_numbers_are_refused_by_name(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not a"):
        kind(text)


def test_a_mistake_on_the_command_line_is_one_line(capsys):
    parser = ArgumentParser("description")
    parser.add_argument("--height", type=positive_int)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--height", "-5"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--height: -5 is not a positive whole number" in error


@pytest.mark.parametrize("error", [UserError("no\tway"), DatasetError("no\tway")])
def test_run_ends_in_one_line_and_status_2(capsys, monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["main.py"])

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "main.py: error: no\tway\n"


def test_run_lets_a_bug_through():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise DatasetError(f"file {index}.png: is broken")


def test_an_error_in_a_worker_is_one_line_too():
    with pytest.raises(DatasetError) as error:
        list(torch.utils.data.DataLoader(Broken(), num_workers=1))
    assert "Traceback" in str(error.value)
    assert one_line(error.value) == "file 0.png: is broken"


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99", "meta"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used here"):
            pick_device(name)


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


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
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
    with pytest.raises(UserError, match="there are 1 GPUs for the processes of this machine"):
        pick_device("auto")


class Deadly(torch.utils.data.Dataset):
    """Kills the worker that reads it."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_said_in_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        run(lambda: list(torch.utils.data.DataLoader(Deadly(), num_workers=1)))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a process that loads data died (" in line and "give fewer --workers" in line
    assert dead_worker(ConnectionResetError(104, "Connection reset by peer")) is not None
    assert dead_worker(RuntimeError("something else")) is None


def test_another_sigterm_does_not_keep_an_interrupted_program_from_saying_its_line(monkeypatch):
    """As torchrun sends it to the process that ends last."""
    before = signal.getsignal(signal.SIGTERM)
    said = []

    class Stderr(io.StringIO):
        def write(self, text: str) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            said.append(text)
            return len(text)

    def interrupted() -> None:
        raise Interrupted("to go on: python main.py", signal.SIGTERM)

    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setattr(sys, "stderr", Stderr())
    with pytest.raises(SystemExit) as end:
        run(interrupted)
    assert end.value.code == 143 and "".join(said) == "main.py: to go on: python main.py\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("what", ["a full disk", "a closed pipe"])
def test_a_standard_output_that_is_gone_ends_the_program_in_one_line(what):
    code = (
        "from utils.script import run; run(lambda: [print('text', flush=True) for _ in range(9)])"
    )
    if what == "a full disk":
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        end, output = os.pipe()
        os.close(end)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True
    )
    os.close(output)
    reason = "No space left on device" if what == "a full disk" else "Broken pipe"
    assert done.stderr == f"-c: error: standard output cannot be written ({reason})\n"
    assert done.returncode == 2


def test_file_names_of_any_kind_can_be_printed(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    run(lambda: print("ava\udcfflon.png"))
    out.flush()
    assert out.buffer.getvalue() == b"ava\\udcfflon.png\n"
