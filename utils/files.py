"""Files that are whole or absent, whatever stops the program that writes them."""

import errno
import os
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import chain, count
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from utils.errors import UserError

# A file that is being written: .last.pth-1f0c9ab2.unfinished.pth for last.pth.
UNFINISHED = re.compile(r"\..*-[0-9a-f]{8}\.unfinished(\.[^.]+)?", re.DOTALL)

# Results that may wait for each thread of a ResultWriter.
WAITING = 4


class WriteError(UserError):
    """A file or folder cannot be written."""


@contextmanager
def write_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError into a WriteError, which names `path` if the error itself names no file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise WriteError(f"{error.filename or path} cannot be written ({reason})") from error


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file beside `path`, then sync and rename it when the block ends.

    The old file stays until then, and for good if the block fails. A symbolic link at `path` is
    replaced, not followed. If the file cannot be written, an OSError names `path`.

    Yields:
        Path of an empty file in the same folder, with the same suffix, to write and close.
    """
    path = Path(path)
    name = path.name.encode("ascii", "ignore")[:100].decode()  # names have at most 255 bytes
    unfinished = path.with_name(f".{name}-{secrets.token_hex(4)}.unfinished{path.suffix}")
    try:
        # With the permissions of any new file; tempfile would make it private.
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        # A failed write names no file, or the temporary one, which means nothing to the user.
        if isinstance(error, OSError) and error.errno is not None:
            if error.filename in (None, unfinished, os.fspath(unfinished)):
                raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def sync(path: str | os.PathLike) -> None:
    """Flush a file, or the names in a folder, to the disk where the system supports it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows, and folders that can be written but not listed
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network file systems
            raise
    finally:
        os.close(handle)


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove what killed processes left in a folder that nobody else is writing into now."""
    for path in Path(folder).iterdir():
        if UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


def make_results_folder(folder: Path) -> None:
    """Make a folder for results, or take an empty one; raise a UserError if neither is possible."""
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    if used:
        raise UserError(f"{folder} is not empty: name a new folder")


def unused_folder(folder: Path) -> Path:
    """Return a folder that holds nothing yet: this one, or one beside it with a number."""
    beside = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    with write_errors(folder):
        for path in chain([folder], beside):
            if not path.exists() or (path.is_dir() and not any(path.iterdir())):
                return path


def result_path(folder: Path, name: str) -> Path:
    """Return the path of a result in a folder, and make the subfolder that it needs.

    Raises:
        UserError: `name`, which may be that of a user's file, leads out of the folder, by ".."
            or through a symbolic link.
        OSError: the subfolder cannot be made.
    """
    path, parts = folder / name, PurePath(name).parts
    leaves = ".." in parts or not parts or "\0" in name
    if leaves or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{name!r} leads out of {folder}: rename the file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save_result(folder: Path, name: str, encode: Callable[[BinaryIO], None]) -> None:
    """Let `encode` write the file at `result_path(folder, name)`, whole or not at all."""
    with atomic_write(result_path(folder, name)) as unfinished:
        # In memory first, since PIL hides why a file could not be written.
        content = BytesIO()
        encode(content)
        unfinished.write_bytes(content.getbuffer())


class ResultWriter:
    """Threads that write results while the network goes on; a full queue blocks."""

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(max(1, threads))
        self.limit = WAITING * max(1, threads)
        self.waiting: deque[Future] = deque()
        self.failures: list[str] = []  # why results could not be encoded, a sentence each

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.shutdown(cancel_futures=exception[0] is not None)

    def put(self, write: Callable[..., None], *args: Any) -> None:
        """Call `write` with the arguments in one of the threads."""
        self.waiting.append(self.pool.submit(write, *args))
        self.finish(self.limit)

    def finish(self, limit: int = 0) -> None:
        """Wait until at most `limit` results are left; raise a WriteError if one failed."""
        while len(self.waiting) > limit:
            try:
                with write_errors("a result"):
                    self.waiting.popleft().result()
            except WriteError as error:
                if error.__cause__.errno is not None:
                    raise
                # PIL's own OSError: this picture cannot be encoded, others can.
                self.failures.append(f"a result cannot be saved ({error.__cause__})")
