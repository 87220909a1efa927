"""What is to be on the disk before a power cut: files, and the names in folders."""

import contextlib
import os


def sync(path: str | os.PathLike) -> None:
    """Have a file, or the names in a folder, reach the disk, where the system can do that."""
    with contextlib.suppress(OSError):  # Windows and some network file systems cannot
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
