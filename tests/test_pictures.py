import sys

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.check import check_files
from datasets.images import DatasetError, read_image
from datasets.pictures import (
    DRAWABLE,
    animation_frames,
    find_pictures,
    open_video,
    read_picture,
    video_frames,
    working_size,
)


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_folders_are_searched_at_any_depth(tmp_path):
    make(tmp_path, "b/c.PNG", "a.jpg", "notes.txt", ".hidden.png", "film.mp4")
    found = [(path.removeprefix(f"{tmp_path}/"), name) for path, name in find_pictures([tmp_path])]
    assert found == [("a.jpg", "a"), ("b/c.PNG", "b/c"), ("film.mp4", "film")]


def test_globs_and_files_keep_their_names(tmp_path, monkeypatch):
    make(tmp_path, "x/a.png", "x/b.png", "x/odd.data")
    monkeypatch.chdir(tmp_path)
    assert [name for _, name in find_pictures(["x/*.png"])] == ["a", "b"]
    # A file is tried whatever its suffix.
    assert find_pictures(["x/odd.data"]) == [("x/odd.data", "odd")]
    assert find_pictures(["x/a.png", "x/a.png"]) == [("x/a.png", "a")]


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    make(tmp_path, "a[1].png")
    assert find_pictures([str(tmp_path / "a[1].png")])[0][1] == "a[1]"


def found_in(folder, *inputs):
    paths = [path for path, _ in find_pictures([str(folder / given) for given in inputs])]
    return [path.removeprefix(f"{folder}/") for path in paths]


@pytest.mark.parametrize("given", ["[2024] trip/*.jpg", "[2024] trip/[ab].jpg", "*[[]*/*.jpg"])
def test_a_glob_in_a_folder_with_brackets(tmp_path, given):
    make(tmp_path, "[2024] trip/a.jpg", "[2024] trip/b.jpg", "[2024] trip/c.txt", "2 trip/d.jpg")
    assert found_in(tmp_path, given) == ["[2024] trip/a.jpg", "[2024] trip/b.jpg"]


def test_results_of_earlier_runs_are_left_out(tmp_path, capsys):
    run = ("overlays/a.jpg", "labels/a.png", "colors/a.png")
    make(tmp_path, "a.jpg", "results/old.jpg", *(f"{out}/{name}" for out in "bc" for name in run))
    make(tmp_path, "b/mine.jpg", "mine/labels/a.png", "d/overlays/a.jpg", "d/labels/a.png")
    ours = ["a.jpg", "b/mine.jpg", "mine/labels/a.png"]
    for given in (".", "**/*.*", "**"):
        assert found_in(tmp_path, given) == ours
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("note: results of earlier runs, as in ")
    # They are found by their names.
    assert found_in(tmp_path, "results", "b/overlays", "c/labels/*.png") == [
        *("results/old.jpg", "b/overlays/a.jpg", "c/labels/a.png")
    ]
    assert not capsys.readouterr().err


def test_what_the_glob_of_a_shell_finds_is_sorted_out(tmp_path, capsys):
    """Results and files that are not read do not end the run, unless there is nothing else."""
    make(tmp_path, "a.jpg", "b.heic", "notes.txt", "noted/overlays/a.jpg", "noted/labels/a.png")
    assert found_in(tmp_path, *sorted(path.name for path in tmp_path.iterdir())) == ["a.jpg"]
    results, unread = capsys.readouterr().err.splitlines()
    assert "results of earlier runs" in results
    assert unread == "note: .heic is not read: such files are left out"
    with pytest.raises(DatasetError, match="noted holds nothing but results of earlier runs"):
        found_in(tmp_path, "noted")
    assert found_in(tmp_path, "b.heic") == ["b.heic"]  # to be tried, as it is asked for


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
def test_every_kind_that_pillow_reads_is_taken(tmp_path, capsys):
    modes = {"MSP": "1", "XBM": "1", "BLP": "P"}  # of those that cannot save RGB
    names = set()
    for suffix, kind in Image.registered_extensions().items():
        if suffix in DRAWABLE and kind in Image.SAVE:
            mode = "F" if suffix == ".pfm" else modes.get(kind, "RGB")
            Image.new("RGB", (80, 64)).convert(mode).save(tmp_path / f"a{suffix}", kind)
            names.add(f"a{suffix}")
    assert {"a.jfif", "a.jpe", "a.tga", "a.jp2", "a.pcx", "a.dds", "a.ico", "a.sgi"} <= names
    make(tmp_path, "a.heic", "b.svg", "c.eps", "notes.txt")
    assert {*found_in(tmp_path, ".")} == names
    assert not [name for name in names if isinstance(read(tmp_path / name), str)]
    told = f"note: 3 of {len(names) + 3} files of {tmp_path}"
    assert capsys.readouterr().err.startswith(told)


@pytest.mark.parametrize(
    "given", ["0", "camera:0", "/dev/video9", "rtsp://10.0.0.8/a", "https://example.org/a.jpg"]
)
def test_cameras_and_streams_are_sent_to_the_example(given):
    with pytest.raises(DatasetError, match=f"{given} is no file: examples/onnx_camera.py takes"):
        find_pictures([given])


def test_files_and_folders_may_be_called_like_a_camera(tmp_path, monkeypatch):
    make(tmp_path, "0", "2024/a.png")
    (tmp_path / "2025").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_pictures(["0", "2024"]) == [("0", "0"), ("2024/a.png", "a")]
    with pytest.raises(DatasetError, match="2025 holds no picture or video"):
        find_pictures(["2025"])


def test_results_have_unique_names(tmp_path):
    make(tmp_path, "a.png", "a.jpg", "b/a.png")
    inputs = [str(tmp_path / name) for name in ("a.png", "a.jpg", "b/a.png")]
    assert [name for _, name in find_pictures(inputs)] == ["a", "a-2", "a-3"]


@pytest.mark.parametrize("given", ["nowhere", "no*.png", "empty"])
def test_inputs_without_a_picture(tmp_path, given):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=given.replace("*", r"\*")):
        find_pictures([str(tmp_path / given)])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((360, 480), (128, 171)),
        ((1, 1), (128, 128)),
        ((5000, 20), (128, 64)),  # high and narrow: the least that the network takes
        ((20, 50_000), (128, 1024)),  # eight times as wide as high
    ],
)
def test_the_working_size_keeps_the_proportions_within_limits(size, expected):
    assert working_size(*size, 128) == expected


def read(path, height=64):
    return read_picture([(str(path), "name")], height, 0)


def test_a_picture_comes_at_two_sizes(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    frame = read(tmp_path / "a.png")
    assert torch.equal(frame.image, torch.from_numpy(pixels).permute(2, 0, 1))
    expected = Image.fromarray(pixels).resize((85, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(frame.resized.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_every_frame_of_an_animation_is_a_picture(tmp_path):
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    read_frames = list(animation_frames(read(tmp_path / "a.gif"), 64))
    assert [frame.name for frame in read_frames] == ["name/000000", "name/000001", "name/000002"]
    assert [frame.image[:, 0, 0].argmax().item() for frame in read_frames] == [0, 1, 2]


def test_the_preview_of_a_photo_is_passed_over(tmp_path):
    photo = Image.new("RGB", (40, 30), "red")
    photo.save(tmp_path / "a.mpo", save_all=True, append_images=[Image.new("RGB", (8, 6))])
    frame = read(tmp_path / "a.mpo")
    assert frame.image.shape == (3, 30, 40)


def test_the_reason_is_given_for_other_files(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    assert f"{tmp_path}/a.png cannot be read as an image" in read(tmp_path / "a.png")


def test_an_animation_that_breaks_is_named(tmp_path, monkeypatch):
    """PIL raises an IndexError on some damaged GIFs."""
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    animation = read(tmp_path / "a.gif")

    def broken(*_):
        raise IndexError("index out of range")

    monkeypatch.setattr(Image.Image, "copy", broken)
    with pytest.raises(DatasetError, match=r"a\.gif cannot be read as an image"):
        list(animation_frames(animation, 64))
    monkeypatch.setattr(Image, "open", broken)
    assert "a.gif cannot be read as an image (index out of range)" in read(tmp_path / "a.gif")


def test_without_pyav_a_video_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DatasetError, match="pip install av"), open_video("film.mp4"):
        pass


def test_a_video_is_turned_upright(tmp_path):
    """Phones store frames as the sensor lies, and the angle to turn them by."""
    av = pytest.importorskip("av")
    upright = Image.new("RGB", (64, 96), "red")
    upright.paste("blue", (0, 48, 64, 96))
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", 5)
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write such a video")
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_rotation(90)
        lying = upright.rotate(-90, expand=True)  # to be turned back, counter-clockwise
        for frame in (av.VideoFrame.from_image(lying), None):
            container.mux(stream.encode(frame))
    (frame,) = video_frames(str(tmp_path / "film.mp4"), "film", 64)
    assert frame.name == "film/000000" and frame.image.shape == (3, 96, 64)
    assert frame.image[0, 10, 32] > 200 and frame.image[2, 80, 32] > 200


def test_a_photo_of_a_data_set_is_turned_upright(tmp_path):
    upright = Image.new("RGB", (64, 96), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(str(tmp_path / "a.jpg")).size == (64, 96)
    assert check_files([(str(tmp_path / "a.jpg"), None)]) == [(96, 64)]
