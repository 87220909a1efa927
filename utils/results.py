"""Where results go: into their folder whatever their names are, and whole."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path, PurePath
from typing import BinaryIO

from utils.atomic import written_whole
from utils.cli import UsageError


def inside(folder: Path, name: str) -> Path:
    """The path of a result in a folder, with a folder to lie in.

    Args:
        folder: of the results.
        name: a relative path, which may come from the name of anyone's file.

    Raises:
        UsageError: it leads out of the folder, by its name or through a symbolic link.
        OSError: its folder cannot be made.
    """
    path, relative = folder / name, PurePath(name)
    parts = relative.parts
    leaves = relative.is_absolute() or ".." in parts or not parts or "\0" in name
    if leaves or not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{name!r} is no name for a result: it leads out of {folder}; rename it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save_result(path: Path, encode: Callable[[BinaryIO], None]) -> None:
    """Write what `encode` writes into a file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with written_whole(path) as unfinished:
        # In memory first: PIL and its codecs do not say why a file took no more.
        content = BytesIO()
        encode(content)
        unfinished.write_bytes(content.getbuffer())
