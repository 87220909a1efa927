"""Segment your own pictures: a file, a folder, a glob or a video.

python predict.py --input photo.jpg                   into results/photo
python predict.py --input 'photos/*.jpg' --output out
python predict.py --input drive.mp4 --output out      needs PyAV: pip install av
python predict.py --input photos --checkpoint save/fine/best.pth --output out

The output folder gets overlays/, the pictures blended with the colours of their classes, with a
legend below; colors/, the colours alone; and labels/, the label ids of the data set that the
network was trained on. Results have the size of the upright picture. The overlays of a video are
a video.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.images import MIN_SIZE, DatasetError
from datasets.pictures import (
    Animation,
    Frame,
    Pictures,
    animation_frames,
    find_pictures,
    is_video,
    open_video,
    result_name,
    stack,
    video_frames,
)
from datasets.segmentation import Classes, write_label
from models.deployed import deploy
from utils.checkpoint import load_network
from utils.errors import UserError
from utils.evaluation import label_map
from utils.files import (
    ResultWriter,
    WriteError,
    make_results_folder,
    result_path,
    save_result,
    write_errors,
)
from utils.options import ArgumentParser, file_path, natural_int, positive_int
from utils.script import WorkerDied, pick_device, run
from utils.visualize import overlay, paint, write_video

SHIPPED = Path(__file__).parent / "weights" / "lednet_d20_camvid.pth"
JPEG_LIMIT = 65_500  # pixels each way
FRAMES_PER_SECOND = 25  # of videos that do not say
ADVICE = {
    WriteError: "make room, or give another --output",
    WorkerDied: "give fewer --workers if memory is short",
}


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, type=file_path, metavar="PATH",
        help="pictures, videos, folders that are searched for them, or globs")  # fmt: skip
    return parser.parse_args()
