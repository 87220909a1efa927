"""Data sets that are drawn by several processes, into folders that are whole or absent."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from datasets.images import DatasetError
from utils.files import sync


class DrawingError(DatasetError):
    """The embedded data set cannot be drawn."""


def draw_once(root: str, make: Callable[..., None], what: str) -> None:
    """Draw an embedded data set with every core, unless it exists.

    Args:
        make: function of the folder to make and the number of workers.
    """
    if Path(root).exists():
        return
    print(f"drawing {what} into {root}, this once", flush=True)
    try:
        make(Path(root), workers=os.cpu_count() or 1)
    except OSError as error:
        raise DrawingError(f"{root} cannot be made ({error.strerror or error})") from error


def make_folder(
    root: Path, write: Callable[..., None], jobs: Sequence[tuple], workers: int
) -> None:
    """Make a folder beside `root`, which must not exist, and rename it when every job is done.

    Args:
        write: function of the unfinished folder and the values of a job.
    """
    if root.exists():
        raise FileExistsError(f"{root} exists")
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        with ProcessPoolExecutor(max_workers=workers) as pool:
            written = pool.map(partial(write, unfinished), *zip(*jobs, strict=True), chunksize=4)
            for _ in tqdm(written, "drawing", total=len(jobs), disable=None):
                pass
        unfinished.chmod(0o755)
        # An existing folder is never drawn again: it must not lose files in a power cut.
        for path in (*unfinished.rglob("*"), unfinished):
            sync(path)
        unfinished.rename(root)
        sync(root.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
