"""Files that are whole or absent, whatever stops the program that writes them."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of a file that is being written: .last.pth-1f0c9ab2.unfinished.pth for last.pth.
UNFINISHED = re.compile(r"\..*-[0-9a-f]{8}\.unfinished(\.[^.]+)?", re.DOTALL)


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file beside `path`, sync it and rename it when the block ends.

    What was at the path before stays until then, and for good where the block fails; the
    unfinished file is removed. A symbolic link at the path is replaced, not followed.

    Yields:
        The path of an empty file in the same folder, of the same suffix, to be written and closed.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`.
    """
    path = Path(path)
    # Names may have 255 bytes; the first hundred say enough.
    name = os.fsencode(path.name)[:100].decode(errors="ignore")
    unfinished = path.with_name(f".{name}-{secrets.token_hex(4)}.unfinished{path.suffix}")
    try:
        # Readable to whom any new file is, unlike those of tempfile.
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        # A failed write names no file, or the unfinished one, which nobody knows.
        if isinstance(error, OSError) and error.errno is not None:
            if error.filename in (None, unfinished, os.fspath(unfinished)):
                raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def sync_folder(folder: str | os.PathLike) -> None:
    """Have the names in a folder reach the disk, where the system can do that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows, and folders that may be written but not listed
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # of some network file systems
            raise
    finally:
        os.close(handle)


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove the files that `written_whole` left in a folder when its process was killed.

    No other process may be writing into the folder.
    """
    for path in Path(folder).iterdir():
        if UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)
