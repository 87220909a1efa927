"""A file is the old one or the new one, whatever happens while it is written."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from utils.files import atomic_write, remove_unfinished

BROKEN = {
    "error": "raise ValueError('half way')",
    "interrupted": "raise KeyboardInterrupt",
    "exit": "os._exit(9)",
    "killed": "os.kill(os.getpid(), 9)",
}


def in_a_process(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run lines of Python in a folder, in a process of their own."""
    start = "import os, resource\nfrom pathlib import Path\nfrom utils.files import *\n"
    return subprocess.run(
        [sys.executable, "-c", start + code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("exists", [True, False])
def test_a_process_that_ends_half_way_leaves_the_old_file(tmp_path, how, exists):
    (tmp_path / "notes.txt").write_text("mine")
    if exists:
        (tmp_path / "a.json").write_text("old")
    end = in_a_process(
        f"with atomic_write('a.json') as path:\n"
        f"    file = path.open('w')\n    file.write('new')\n    file.flush()\n    {BROKEN[how]}",
        tmp_path,
    )
    assert end.returncode == {"exit": 9, "killed": -signal.SIGKILL}.get(how, end.returncode) != 0
    old = ["a.json"] * exists + ["notes.txt"]
    if how in ("exit", "killed"):
        (left,) = set(names(tmp_path)) - set(old)
        assert left.startswith(".a.json-") and left.endswith(".json")
        assert (tmp_path / left).read_text() == "new"
        remove_unfinished(tmp_path)
    assert names(tmp_path) == old
    assert not exists or (tmp_path / "a.json").read_text() == "old"


@pytest.mark.parametrize("writer", ["write_bytes(bytes(5000))", "write_text('x' * 5000)"])
def test_a_disk_that_takes_no_more_leaves_the_old_file(tmp_path, writer):
    (tmp_path / "a.txt").write_text("old")
    end = in_a_process(
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "try:\n"
        f"    with atomic_write('a.txt') as path:\n        path.{writer}\n"
        "except OSError as error:\n    print(error.errno, error)",
        tmp_path,
    )
    assert end.stdout == f"{errno.EFBIG} [Errno {errno.EFBIG}] File too large: 'a.txt'\n", end
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("limit", [1, 100, 5000, 100_000, 399_000, 401_000])
def test_a_checkpoint_on_a_full_disk_says_why(tmp_path, limit):
    """Wherever in its archive torch runs out of room."""
    (tmp_path / "last.pth").write_text("old")
    end = in_a_process(
        "import torch\nfrom utils.checkpoint import save_checkpoint\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n    save_checkpoint({'model': {'a': torch.zeros(100_000)}}, 'last.pth')\n"
        "except OSError as error:\n    print(error)",
        tmp_path,
    )
    assert end.stdout == f"[Errno {errno.EFBIG}] File too large: 'last.pth'\n", end.stderr
    assert names(tmp_path) == ["last.pth"] and (tmp_path / "last.pth").read_text() == "old"


def test_the_content_is_on_the_disk_before_the_name_and_then_the_folder(tmp_path, monkeypatch):
    done = []

    def fsync(handle):
        status = os.fstat(handle)
        done.append(("sync", stat.S_ISDIR(status.st_mode), status.st_ino, status.st_size))
        real_fsync(handle)

    def replace(old, new):
        done.append(("rename", str(new)))
        real_replace(old, new)

    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_write(tmp_path / "a.txt") as path:
        path.write_text("12345")
    file, folder = (tmp_path / "a.txt").stat(), tmp_path.stat()
    assert done == [
        ("sync", False, file.st_ino, 5),
        ("rename", str(tmp_path / "a.txt")),
        ("sync", True, folder.st_ino, folder.st_size),
    ]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch, number):
    """Some file systems cannot; a broken disk is another matter."""
    real_fsync = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    try:
        with atomic_write(tmp_path / "a.txt") as path:
            path.write_text("new")
    except OSError as error:
        assert error.errno == number == errno.EIO
    else:
        assert number == errno.EINVAL
    assert names(tmp_path) == ["a.txt"]


def test_a_new_file_may_be_read_by_whom_any_other_may(tmp_path):
    mask = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a.txt") as path:
            path.write_text("new")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "name", ["plain", "n" * 250 + ".json", "ü" * 120 + ".png", "...gif", "a\nb"]
)
def test_any_name(tmp_path, name):
    for content in ("old", "new"):
        with atomic_write(tmp_path / name) as path:
            assert path.name.endswith(Path(name).suffix) and path.parent == tmp_path
            path.write_text(content)
            assert path.name in names(tmp_path)
    assert names(tmp_path) == [name] and (tmp_path / name).read_text() == "new"


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "other.txt").write_text("theirs")
    (tmp_path / "a.txt").symlink_to("other.txt")
    with atomic_write(tmp_path / "a.txt") as path:
        path.write_text("new")
    assert not (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "other.txt").read_text() == "theirs"


def test_a_folder_that_is_missing_is_said_by_the_name_of_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "no/a.txt"):
        pass
    assert caught.value.filename == str(tmp_path / "no/a.txt")


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "a.txt"):
        open(str(tmp_path / "missing.txt"))
    assert caught.value.filename == str(tmp_path / "missing.txt")
    assert names(tmp_path) == []


def test_only_unfinished_files_are_removed(tmp_path):
    kept = (".notes-20240101.txt", ".last.pth", "a-12345678.unfinished.pth", ".lock", "last.pth")
    for name in (*kept, ".last.pth-0123abcd.unfinished.pth", ".x-0123abcd.unfinished"):
        (tmp_path / name).write_text("")
    remove_unfinished(tmp_path)
    assert names(tmp_path) == sorted(kept)
