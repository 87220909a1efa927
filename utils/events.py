"""TensorBoard events of a run: no step twice after it is resumed, and no failure in silence."""

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch.utils.tensorboard import SummaryWriter

from utils.files import atomic_write, remove_unfinished

FILES = "events.out.tfevents.*"
# A record: the length of its event and the checksum of that, the event, and its checksum.
HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
# Bytes at the end of a file whose events are checked as well: tensorboard's checksums are computed
# in Python, 10 MB a second, and it is the end that a process or machine that stops leaves broken.
TAIL = 1 << 20

Part = tuple[int, int]  # of a file, from and to


def open_events(folder: Path) -> SummaryWriter:
    """A writer of events into a new file of a run's folder.

    Raises:
        OSError: the file cannot be written.
    """
    threading.excepthook = _without_the_writer
    with naming_events(folder):
        return SummaryWriter(os.fspath(folder))


def flush_events(writer: SummaryWriter) -> None:
    """Have all events reach the disk.

    Raises:
        OSError: one could not be written, now or before.
    """
    folder = Path(writer.log_dir)
    with naming_events(folder):
        writer.flush()
        for path in folder.glob(FILES):
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def close_events(writer: SummaryWriter) -> None:
    """Write what is left of the events, and end the file.

    Raises:
        OSError: one could not be written, now or before.
    """
    with naming_events(Path(writer.log_dir)):
        writer.close()


@contextmanager
def naming_events(folder: Path) -> Iterator[None]:
    """Have an OSError in the block name the files of events, if it names none.

    A writer writes in a thread. Where that fails the thread ends, and the next call of the writer,
    whichever it is, raises what it died of, which says nothing of a file.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(folder / FILES)) from error


def _without_the_writer(failed: threading.ExceptHookArgs) -> None:
    """Print what a thread died of, but not what a writer's did: that is raised where it is used."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)


def drop_events_after(folder: Path, step: int) -> None:
    """Cut from a run's events those of later steps, and what was not written to its end.

    Nothing is left to readers then, which go by the names of the files and so by the clock. Marks
    of a restart go too: they make readers forget steps that were read before. Files that hold
    nothing of this are not touched, others are rewritten, whole. No process may be writing events.

    Raises:
        OSError: a file cannot be read or written.
    """
    remove_unfinished(folder)  # TensorBoard would read those, too
    for path in sorted(folder.glob(FILES)):
        with path.open("rb") as file:
            kept, dropped = _split(file, step)
            if not dropped:
                continue
            with atomic_write(path) as unfinished, unfinished.open("wb") as new:
                for start, end in kept:
                    file.seek(start)
                    while start < end:
                        start += new.write(file.read(min(end - start, TAIL)))


def _split(file: BinaryIO, step: int) -> tuple[list[Part], bool]:
    """The parts of a file of events that are kept, and whether there are others."""
    kept: list[Part] = []
    size, position = os.fstat(file.fileno()).st_size, 0
    whole = True
    for start, end, event in _records(file, size):
        position = end
        restart = event.session_log.status == SessionLog.START
        if not event.HasField("file_version") and (restart or event.step > step):
            whole = False
        elif kept and kept[-1][1] == start:
            kept[-1] = kept[-1][0], end
        else:
            kept.append((start, end))
    return kept, not whole or position < size


def _records(file: BinaryIO, size: int) -> Iterator[tuple[int, int, Event]]:
    """Where each event of a file begins and ends, and itself, up to the first that is broken."""
    start = 0
    while start < size:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            return
        length, checksum = HEADER.unpack(header)
        end = start + HEADER.size + length + FOOTER.size
        if masked_crc32c(header[:8]) != checksum or end > size:
            return
        content = file.read(length)
        (checksum,) = FOOTER.unpack(file.read(FOOTER.size))
        if end > size - TAIL and masked_crc32c(content) != checksum:
            return
        try:
            event = Event.FromString(content)
        except DecodeError:
            return
        yield start, end, event
        start = end
