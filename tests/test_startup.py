"""Ctrl-C while a program still imports."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

# As torch does with a Ctrl-C in a part of its import, and the program goes on.
TORCH = """
import time

try:
    print("importing", flush=True)
    time.sleep(60)
except BaseException:
    pass
"""


CTRL_C = "import utils.startup, signal; {}print(signal.getsignal(signal.SIGINT))"


@pytest.mark.parametrize(
    "name",
    ["main.py", "lednet_imagenet.py", "eval_cityscapes_server.py", "predict.py", "export.py"],
)
def test_ctrl_c_while_torch_is_imported_ends_the_program_in_one_line(name, tmp_path):
    (tmp_path / "torch.py").write_text(TORCH)
    process = subprocess.Popen(
        [sys.executable, ROOT / name],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=50)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, f"\n{name}: interrupted\n")


def handler_of_ctrl_c(code: str, ignored: bool = False) -> str:
    """What Ctrl-C does after a program has begun with this code."""
    return subprocess.run(
        [sys.executable, "-c", CTRL_C.format(code)],
        cwd=ROOT,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_from_then_on_ctrl_c_is_an_exception_for_what_has_to_clean_up():
    assert "_interrupted" in handler_of_ctrl_c("")
    assert handler_of_ctrl_c("import utils.cli; utils.cli.run(int); ") == str(
        signal.default_int_handler
    )


def test_an_ignored_ctrl_c_stays_ignored():
    ignored = str(signal.SIG_IGN)
    assert handler_of_ctrl_c("", ignored=True) == ignored
    assert handler_of_ctrl_c("import utils.cli; utils.cli.run(int); ", ignored=True) == ignored
