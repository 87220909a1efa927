"""The first import of each program: from here on a Ctrl-C ends it in one line.

`import torch` takes seconds. In part of them it swallows a KeyboardInterrupt, and the program goes
on as if nobody had pressed a key; in the rest a long traceback tells where it was.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def _interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    """End at once: there is nothing to clean up yet."""
    os.write(2, f"\n{os.path.basename(sys.argv[0])}: interrupted\n".encode())
    os._exit(130)


def end_of_startup() -> None:
    """From now on a Ctrl-C is a KeyboardInterrupt, after which files are closed and removed."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Where torch was imported already it is no program that starts, but a test that imports one; where
# Ctrl-C is ignored, as by nohup or in the background of a shell script, it stays so.
if "torch" not in sys.modules and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)
