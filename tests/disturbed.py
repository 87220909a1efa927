"""Run a script as torchrun does, and send a signal to one of its processes after a step.

python disturbed.py SIGNAL RANK PLACE SCRIPT ARGS     PLACE: "step 1 of epoch 1 of stage 2"
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import after_step, run_script, send

number, rank, place, *command = sys.argv[1:]
disturb = send(int(number)) if os.environ["RANK"] == rank else lambda: None
with after_step(place, disturb):
    sys.exit(run_script(*command))
