"""Folders of files that are drawn by several processes: whole or absent."""

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


def draw_once(root: str | os.PathLike, make: Callable[..., None], what: str) -> None:
    """Make an embedded data set, with every core, where it does not exist yet.

    Args:
        make: is called with the folder to make and the number of workers.
        what: is drawn, to say so.

    Raises:
        DrawingError: the folder cannot be written.
    """
    if Path(root).exists():
        return
    print(f"drawing {what} into {root}, this once", flush=True)
    try:
        make(root, workers=os.cpu_count() or 1)
    except OSError as error:
        raise DrawingError(f"{root} cannot be made ({error.strerror or error})") from error


def make_folder(
    root: str | os.PathLike,
    write: Callable[..., None],
    jobs: Sequence[tuple],
    title: str,
    workers: int = 1,
) -> None:
    """Make a folder beside `root`, and rename it when every job is done.

    Args:
        root: folder to make; must not exist.
        write: is called with the unfinished folder and the values of each job.
        title: of the progress bar.
        workers: processes that draw.

    Raises:
        FileExistsError: `root` exists.
    """
    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root} exists")
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        with ProcessPoolExecutor(max_workers=workers) as pool:
            written = pool.map(partial(write, unfinished), *zip(*jobs, strict=True), chunksize=4)
            for _ in tqdm(written, title, total=len(jobs), disable=None):
                pass
        unfinished.chmod(0o755)
        # A folder that is there is never drawn again: its files must not be lost from it.
        for folder, _, files in os.walk(unfinished):
            for path in (*(os.path.join(folder, name) for name in files), folder):
                sync(path)
        unfinished.rename(root)
        sync(root.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
