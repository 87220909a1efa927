import errno
import os
import signal
import stat
import threading
from pathlib import Path

import pytest
from conftest import Forked, full_disk
from PIL import Image

from utils.errors import UserError
from utils.files import (
    WAITING,
    ResultWriter,
    WriteError,
    atomic_write,
    make_results_folder,
    remove_unfinished,
    result_path,
    save_result,
    sync,
    unused_folder,
    write_errors,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_unused_folder_is_new_or_empty(tmp_path):
    assert unused_folder(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    assert unused_folder(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a/b").touch()
    (tmp_path / "a-2").touch()
    assert unused_folder(tmp_path / "a") == tmp_path / "a-3"


# atomic_write


@pytest.mark.parametrize("ending", ["exit", "kill"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_process_killed_while_writing_leaves_the_old_file(
    tmp_path, tmp_path_factory, ending, exists
):
    old = {"a.json": "old", "notes.txt": "mine"} if exists else {"notes.txt": "mine"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)

    def write() -> None:
        with atomic_write(tmp_path / "a.json") as path:
            path.write_text("new")
            if ending == "exit":
                os._exit(9)
            os.kill(os.getpid(), signal.SIGKILL)

    status = Forked(write, tmp_path_factory.mktemp("out")).finish().status
    assert status == {"exit": 9, "kill": -signal.SIGKILL}[ending]
    (left,) = set(names(tmp_path)) - old.keys()
    assert left.startswith(".a.json-") and left.endswith(".json")
    remove_unfinished(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == old


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_while_writing_leaves_the_old_file(tmp_path, error):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(error), atomic_write(tmp_path / "a.json") as path:
        path.write_text("new")
        raise error
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with full_disk(4000), pytest.raises(OSError) as caught, atomic_write(path) as unfinished:
        unfinished.write_bytes(bytes(5000))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert names(tmp_path) == ["a.txt"] and path.read_text() == "old"


def test_content_reaches_the_disk_before_the_name_and_then_the_folder(tmp_path, monkeypatch):
    done = []

    def fsync(handle: int, fsync=os.fsync) -> None:
        status = os.fstat(handle)
        done.append(("sync", status.st_ino, status.st_size))
        fsync(handle)

    def replace(old: Path, new: Path, replace=os.replace) -> None:
        done.append(("rename", new))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    path = tmp_path / "a.txt"
    with atomic_write(path) as unfinished:
        unfinished.write_text("12345")
    folder = tmp_path.stat()
    assert done == [
        ("sync", path.stat().st_ino, 5),
        ("rename", path),
        ("sync", folder.st_ino, folder.st_size),
    ]


def test_new_files_have_the_usual_permissions(tmp_path):
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
def test_files_of_any_name_can_be_written_twice(tmp_path, name):
    for content in ("old", "new"):
        with atomic_write(tmp_path / name) as path:
            assert path.name.endswith(Path(name).suffix) and path.parent == tmp_path
            path.write_text(content)
            assert path.name in names(tmp_path)
    assert names(tmp_path) == [name] and (tmp_path / name).read_text() == "new"


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "other.txt").write_text("theirs")
    (tmp_path / "a.txt").symlink_to("other.txt")
    with atomic_write(tmp_path / "a.txt") as path:
        path.write_text("new")
    assert not (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "other.txt").read_text() == "theirs"


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "no/a.txt"):
        pass
    assert caught.value.filename == str(tmp_path / "no/a.txt")


def test_an_error_about_another_file_keeps_its_name(tmp_path):
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


# sync and write_errors


@pytest.mark.parametrize(("number", "raised"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_need_not_support_sync_but_a_broken_disk_is_an_error(
    tmp_path, monkeypatch, number, raised
):
    def fsync(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if raised:
        with pytest.raises(OSError, match="Input/output error"):
            sync(tmp_path)
    else:
        sync(tmp_path)


def test_write_errors_say_which_file_and_why(tmp_path):
    with pytest.raises(WriteError, match=r"^log.csv cannot be written \(No space left on device\)"):
        with write_errors("log.csv"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(WriteError, match=r"no/a\.txt cannot be written"), write_errors("log.csv"):
        (tmp_path / "no/a.txt").write_text("")


# Folders of results


def test_results_go_into_a_new_or_empty_folder(tmp_path):
    for _ in range(2):
        make_results_folder(tmp_path / "a/b")
    (tmp_path / "a/b/mine.txt").write_text("")
    with pytest.raises(UserError, match="is not empty: name a new folder"):
        make_results_folder(tmp_path / "a/b")
    with pytest.raises(WriteError, match=r"mine.txt/c cannot be written \(Not a directory\)"):
        make_results_folder(tmp_path / "a/b/mine.txt/c")


@pytest.mark.parametrize(
    "name", ["a.png", "labels/...gif/a.png", "a\nb.png", "~/a.png", "x/ü ;.png"]
)
def test_results_may_have_any_name(tmp_path, name):
    result_path(tmp_path / "out", name).write_text("here")
    assert (tmp_path / "out" / name).read_text() == "here"


@pytest.mark.parametrize(
    "name",
    ["../a.png", "labels/../../a.png", "labels/../0.png", "/etc/a.png", "..", "", ".", "a/\0.png"],
)
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError, match="leads out of"):
        result_path(folder, name)
    assert names(folder) == [] and names(tmp_path) == ["out"]


def test_a_name_of_two_lines_is_refused_in_one(tmp_path):
    with pytest.raises(UserError) as caught:
        result_path(tmp_path, "../a\nb.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("link", ["labels", "labels/city", "labels/a.png"])
def test_links_that_lead_out_of_the_folder_are_refused(tmp_path, link):
    outside, place = tmp_path / "elsewhere", tmp_path / "out" / link
    outside.mkdir()
    place.parent.mkdir(parents=True)
    place.symlink_to(outside / "a.png" if link.endswith(".png") else outside)
    name = {"labels/city": "labels/city/a.png"}.get(link, "labels/a.png")
    with pytest.raises(UserError, match="leads out of"):
        result_path(tmp_path / "out", name)
    assert names(outside) == []


def test_the_folder_itself_may_be_a_link_or_relative(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    path = result_path(Path("out"), "labels/a.png")
    assert path == Path("out/labels/a.png")
    path.write_text("here")
    assert (tmp_path / "disk/labels/a.png").is_file()


# Writing results


@pytest.mark.parametrize("codec", ["PNG", "JPEG"])
def test_a_full_disk_keeps_the_old_picture_and_says_why(tmp_path, codec):
    """PIL itself only reports "encoder error -2" for a JPEG."""
    path, picture = tmp_path / "a.img", Image.effect_noise((64, 64), 50)
    path.write_text("old")
    with full_disk(500), pytest.raises(OSError) as caught:
        save_result(tmp_path, path.name, lambda file: picture.save(file, codec))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old" and names(tmp_path) == ["a.img"]
    save_result(tmp_path, path.name, lambda file: picture.save(file, codec))
    assert Image.open(path).format == codec


def test_results_are_all_written_at_the_end(tmp_path):
    with ResultWriter(2) as writer:
        for number in range(20):
            writer.put(Path.write_text, tmp_path / f"{number}.txt", str(number))
    assert {int(path.read_text()) for path in tmp_path.iterdir()} == set(range(20))


def test_the_queue_of_results_is_bounded():
    begin, submitted = threading.Event(), []

    def put_all() -> None:
        with ResultWriter(1) as writer:
            for number in range(2 * WAITING):
                writer.put(begin.wait)
                submitted.append(number)

    producer = threading.Thread(target=put_all)
    producer.start()
    producer.join(timeout=0.3)
    blocked_at = len(submitted)
    begin.set()
    producer.join()
    assert blocked_at == WAITING and len(submitted) == 2 * WAITING


def test_a_result_that_cannot_be_written_is_an_error(tmp_path):
    with ResultWriter(1) as writer:
        writer.put(Path.write_text, tmp_path / "no/a.txt", "")
        with pytest.raises(WriteError, match=r"no/a.txt cannot be written \(No such file"):
            writer.finish()


def test_a_result_that_cannot_be_encoded_is_counted_and_the_others_are_written(tmp_path):
    def encode() -> None:
        raise OSError("cannot write mode F as PNG")

    with ResultWriter(1) as writer:
        writer.put(encode)
        writer.put(Path.write_text, tmp_path / "a.txt", "here")
        writer.finish()
    assert writer.failures == ["a result cannot be saved (cannot write mode F as PNG)"]
    assert names(tmp_path) == ["a.txt"]


def test_an_error_cancels_results_that_have_not_begun(tmp_path):
    begin = threading.Event()
    with pytest.raises(ZeroDivisionError), ResultWriter(1) as writer:
        writer.put(begin.wait)
        writer.put(Path.write_text, tmp_path / "a.txt", "")
        threading.Timer(0.1, begin.set).start()
        raise ZeroDivisionError
    assert names(tmp_path) == []
