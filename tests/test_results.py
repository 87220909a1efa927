"""Results stay in their folder, and are whole."""

import errno
from pathlib import Path

import pytest
from conftest import full_disk
from PIL import Image

from utils.errors import UserError
from utils.files import result_path, save_result

OUTSIDE = (
    "../a.png",
    "labels/../../a.png",
    "labels/../000000.png",
    "/etc/a.png",
    "..",
    "",
    ".",
    "/",
)


@pytest.mark.parametrize(
    "name", ["a.png", "labels/...gif/a.png", "a\nb.png", "~/a.png", "x/ü ;.png"]
)
def test_a_name_inside(tmp_path, name):
    path = result_path(tmp_path / "out", name)
    path.write_text("here")
    assert (tmp_path / "out" / name).read_text() == "here"


@pytest.mark.parametrize("name", [*OUTSIDE, "a/\0.png"])
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError, match="leads out of"):
        result_path(folder, name)
    assert not list(folder.iterdir()) and [*tmp_path.iterdir()] == [folder]


def test_one_line_for_a_name_of_two(tmp_path):
    with pytest.raises(UserError) as caught:
        result_path(tmp_path, "../a\nb.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("link", ["labels", "labels/city", "labels/a.png"])
def test_links_that_lead_out_are_refused(tmp_path, link):
    outside, place = tmp_path / "elsewhere", tmp_path / "out" / link
    outside.mkdir()
    place.parent.mkdir(parents=True)
    place.symlink_to(outside / "a.png" if link.endswith(".png") else outside)
    name = {"labels/city": "labels/city/a.png"}.get(link, "labels/a.png")
    with pytest.raises(UserError, match="leads out of"):
        result_path(tmp_path / "out", name)
    assert not list(outside.iterdir())


def test_a_folder_of_results_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    result_path(tmp_path / "out", "labels/a.png").write_text("here")
    assert (tmp_path / "disk/labels/a.png").is_file()


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert result_path(Path("out"), "a.png") == Path("out/a.png") and Path("out").is_dir()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_full_disk_keeps_the_old_picture_and_says_why(tmp_path, kind):
    """PIL itself says "encoder error -2" of a JPEG."""
    path, picture = tmp_path / "a.img", Image.effect_noise((64, 64), 50)
    path.write_text("old")
    with full_disk(500), pytest.raises(OSError) as caught:
        save_result(path.parent, path.name, lambda file: picture.save(file, kind))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    save_result(path.parent, path.name, lambda file: picture.save(file, kind))
    assert Image.open(path).format == kind
