"""Run a script as `torchrun SCRIPT ARGS` would, and disturb one of its processes at a given moment.

python disturbed.py MOMENT RANK SCRIPT ARGS     MOMENT: signal 15 after step 1 of epoch 1 of stage 2
"""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import distributed
from utils.interrupts import Watch

moment, rank, *sys.argv = sys.argv[1:]
number, _, place = moment.removeprefix("signal ").partition(" after ")
note_loss = Watch.note_loss


def disturb(self: Watch, *step: object) -> None:
    note_loss(self, *step)
    if self.place == place and distributed.rank() == int(rank):
        os.kill(os.getpid(), int(number))


Watch.note_loss = disturb
sys.argv[0] = str(Path(__file__).parent.parent / sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
