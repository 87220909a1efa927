"""Whatever a run left behind, TensorBoard shows each of its steps once."""

import errno
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import (
    LegacyEventFileLoader,
    RawEventFileLoader,
)
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.errors import OutOfRangeError
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
from torch.utils.tensorboard import SummaryWriter

from utils import events
from utils.events import close_events, drop_events_after, flush_events, open_events


def write(folder: Path, name: str, steps: range, purge_step: int | None = None) -> Path:
    """A file of events, of two scalars and an image a step, by the name that it has later."""
    apart = folder / "apart"
    writer = SummaryWriter(str(apart), purge_step=purge_step)
    for step in steps:
        writer.add_scalar("loss/train", step / 10, step)
        writer.add_scalar("lr", 1 / (1 + step), step)
        writer.add_image("strips", torch.full((3, 8, 8), step, dtype=torch.uint8), step)
    writer.close()
    (path,) = apart.iterdir()
    path.rename(folder / f"events.out.tfevents.{name}")
    apart.rmdir()
    return folder / f"events.out.tfevents.{name}"


def raw(folder: Path) -> Counter[tuple[str, int]]:
    """How often each tag has each step, in the files as they are; every byte must be read."""
    found: Counter[tuple[str, int]] = Counter()
    for path in folder.glob("*tfevents*"):
        for event in LegacyEventFileLoader(str(path)).Load():
            assert event.HasField("file_version") or event.HasField("summary"), event
            found.update((value.tag, event.step) for value in event.summary.value)
        reader = PyRecordReader_New(str(path))
        with pytest.raises(OutOfRangeError):  # a torn end would be a DataLossError
            while True:
                reader.GetNext()
    return found


def shown(folder: Path) -> Counter[tuple[str, int]]:
    """How often TensorBoard shows each step of each tag."""
    run = EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0})
    run.Reload()
    tags = run.Tags()
    found = [(tag, event.step) for tag in tags["scalars"] for event in run.Scalars(tag)]
    found += [(tag, event.step) for tag in tags["images"] for event in run.Images(tag)]
    assert all(event.encoded_image_string for tag in tags["images"] for event in run.Images(tag))
    return Counter(found)


def once(steps: range) -> Counter[tuple[str, int]]:
    return Counter((tag, step) for tag in ("loss/train", "lr", "strips") for step in steps)


@pytest.mark.parametrize("names", [("100.a", "200.b", "300.c"), ("300.a", "100.b", "200.c")])
@pytest.mark.parametrize("marks", [False, True])
def test_every_step_once_whatever_the_clock_did(tmp_path, names, marks):
    """Stopped twice, after steps 9 and 7; gone on with from 5 and 3; then at the end, from 6."""
    write(tmp_path, names[0], range(1, 10))
    drop_events_after(tmp_path, 5)
    write(tmp_path, names[1], range(6, 8), purge_step=6 if marks else None)
    drop_events_after(tmp_path, 3)
    write(tmp_path, names[2], range(4, 9), purge_step=4 if marks else None)
    drop_events_after(tmp_path, 8)
    assert raw(tmp_path) == shown(tmp_path) == once(range(1, 9))
    drop_events_after(tmp_path, 6)
    assert raw(tmp_path) == shown(tmp_path) == once(range(1, 7))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_torn_end_is_cut_wherever_it_is(tmp_path):
    data = write(tmp_path, "1.a", range(1, 3)).read_bytes()
    (path,) = tmp_path.iterdir()
    with path.open("rb") as file:
        starts = [start for start, _, _ in events._records(file, len(data))]
    for cut in range(starts[-1] + 1, len(data)):  # every byte of the last record
        path.write_bytes(data[:cut])
        drop_events_after(tmp_path, 9)
        assert path.read_bytes() == data[: starts[-1]], cut
    assert raw(tmp_path) == once(range(1, 3)) - Counter({("strips", 2): 1})
    for cut in range(starts[1]):  # in the first, which says what kind of file it is
        path.write_bytes(data[:cut])
        drop_events_after(tmp_path, 9)
        assert path.read_bytes() == b""
    assert not raw(tmp_path) and not shown(tmp_path)


@pytest.mark.parametrize("end", [bytes(3000), b"\xff" * 3000, "flip length", "flip content"])
def test_an_end_that_a_power_cut_garbled_is_cut(tmp_path, end):
    path = write(tmp_path, "1.a", range(1, 3))
    data = bytearray(path.read_bytes())
    with path.open("rb") as file:
        *_, (start, _, _) = events._records(file, len(data))
    if isinstance(end, bytes):
        path.write_bytes(data + end)
        expected = bytes(data)
    else:
        data[start if end == "flip length" else start + 40] ^= 1
        path.write_bytes(data)
        expected = bytes(data[:start])
    drop_events_after(tmp_path, 9)
    assert path.read_bytes() == expected
    raw(tmp_path)


def test_files_without_anything_to_cut_are_left_alone(tmp_path):
    paths = [write(tmp_path, "1.a", range(1, 5)), write(tmp_path, "2.b", range(5, 9))]
    (tmp_path / "events.out.tfevents.3.c").write_bytes(b"")
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    drop_events_after(tmp_path, 8)
    drop_events_after(tmp_path, 6)
    after = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert after.keys() == before.keys() and len(before) == 3
    assert [after[path] == before[path] for path in paths] == [True, False]
    assert raw(tmp_path) == once(range(1, 7))


def test_what_is_kept_is_kept_bit_for_bit(tmp_path):
    """The record that says the version of the file, too."""
    path = write(tmp_path, "1.a", range(1, 9))
    before = list(RawEventFileLoader(str(path)).Load())
    drop_events_after(tmp_path, 4)
    kept = list(RawEventFileLoader(str(path)).Load())
    assert kept == before[: len(kept)] and len(kept) == 1 + 3 * 4
    assert Event.FromString(kept[0]).file_version == "brain.Event:2"


def test_a_run_without_events(tmp_path):
    drop_events_after(tmp_path, 3)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_rewriting_left_is_not_shown(tmp_path):
    path = write(tmp_path, "1.a", range(1, 4))
    (tmp_path / f".{path.name}-0123abcd.unfinished.a").write_bytes(path.read_bytes())
    drop_events_after(tmp_path, 3)
    assert raw(tmp_path) == shown(tmp_path) == once(range(1, 4))


def test_a_writer(tmp_path):
    writer = open_events(tmp_path)
    writer.add_scalar("lr", 1, 1)
    flush_events(writer)
    assert raw(tmp_path) == {("lr", 1): 1}
    writer.add_scalar("../../out", 1, 2)  # a name of a class; no path
    close_events(writer)
    assert raw(tmp_path) == {("lr", 1): 1, ("../../out", 2): 1}
    assert len(list(tmp_path.iterdir())) == 1 and not (tmp_path.parent.parent / "out").exists()


FULL = """
import resource, sys
from pathlib import Path
from utils.events import *
folder, queued, last = Path("run"), int(sys.argv[1]), sys.argv[2]
if last == "open":
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, -1))
writer = None
try:
    writer = open_events(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, -1))
    with naming_events(folder):
        for step in range(queued):
            writer.add_scalar("lr", 1, step)
    (flush_events if last == "flush" else close_events)(writer)
except OSError as error:
    print(error.errno, error.filename)
try:
    writer is None or close_events(writer)
except OSError as error:
    print("again", error.errno)
"""


@pytest.mark.parametrize(
    ("queued", "last"), [(9, "flush"), (9, "close"), (500, "flush"), (500, "close"), (0, "open")]
)
def test_a_full_disk_ends_neither_in_silence_nor_in_waiting(tmp_path, queued, last):
    """The thread that writes is dead then, and so is not there to be waited for."""
    end = subprocess.run(
        [sys.executable, "-c", FULL, str(queued), last],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = end.stdout.splitlines()
    assert lines[:1] == [f"{errno.EFBIG} run/events.out.tfevents.*"], end
    assert end.returncode == 0 and "Traceback" not in end.stderr, end.stderr


def test_other_threads_that_fail_are_printed(tmp_path, capsys):
    close_events(open_events(tmp_path))
    thread = events.threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    assert "ZeroDivisionError" in capsys.readouterr().err
