import re
import shutil

import numpy as np
import pytest
from conftest import CAMVID_WEIGHTS, full_disk
from PIL import Image
from test_listing import put_strays

from datasets.cityscapes import Cityscapes
from datasets.images import DatasetError
from datasets.pictures import video_frames
from models.deployed import Deployed
from utils.visualize import write_video

av = pytest.importorskip("av")


@pytest.fixture
def predict(script, street_network):
    """Segment something into the folder out, without worker processes."""

    def run(*inputs, argv=()):
        options = ("--checkpoint", street_network, "--output", "out", "--workers", 0)
        return script("predict.py", "--input", *inputs, *options, *argv)

    return run


@pytest.fixture
def refused(fails, street_network):
    """Segment something into the folder out, which ends in one line; return the line."""

    def run(*inputs, argv=()):
        options = ("--checkpoint", street_network, "--output", "out", "--workers", 0)
        return fails("predict.py", "--input", *inputs, *options, *argv)

    return run


@pytest.fixture(scope="session")
def photo(cityscapes) -> Image.Image:
    return Image.open(Cityscapes(cityscapes, "val").pairs[0][0]).convert("RGB")


@pytest.fixture
def film(photo, tmp_path):
    """A video of 7 frames, 5 a second."""
    write_video(tmp_path / "film.mp4", 5, (photo.rotate(angle) for angle in range(7)))
    return tmp_path / "film.mp4"


def sizes(folder) -> dict[str, tuple[int, int]]:
    """Names and sizes of the pictures in a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): Image.open(path).size for path in paths}


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_files_of_every_kind_are_read_or_reported(predict, photo, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    photo.save(folder / "plain.jpg")
    photo.save(folder / "bitmap.bmp")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    grey = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / "sixteen.png")
    photo.quantize(32).save(folder / "palette.png")
    photo.convert("LA").save(folder / "alpha.png")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("L", (66_000, 4), 90).save(folder / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    photo.save(folder / "moving.gif", save_all=True, append_images=[photo.rotate(5)])
    (folder / "text.png").write_text("hello")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "palette.png").read_bytes()[:900])
    (folder / "notes.txt").write_text("no picture")

    result = predict(folder)
    assert result.status == 1
    lines = [line for line in result.err.splitlines() if "predict.py: error:" in line]
    assert len(lines) == 3
    for name in ("text.png", "empty.jpg", "cut.png"):
        assert any(f"in/{name} cannot be read" in line for line in lines), name
    assert re.search(r"11 pictures of 13 files in [\d.]+ s, [\d.]+ images/s", result.out)
    assert "3 errors: out" in result.out

    usual = "alpha bitmap cmyk moving/000000 moving/000001 palette plain sixteen turned".split()
    expected = dict.fromkeys(usual, (128, 64)) | {"one": (1, 1), "wide": (66_000, 4)}
    for kind in ("labels", "colors"):
        assert sizes(tmp_path / "out" / kind) == {f"{n}.png": s for n, s in expected.items()}
    overlays = sizes(tmp_path / "out/overlays")
    suffixes = dict.fromkeys(expected, ".jpg") | {"wide": ".png"}  # no JPEG is that wide
    assert overlays.keys() == {name + suffix for name, suffix in suffixes.items()}
    assert overlays["plain.jpg"][0] >= 128 and overlays["plain.jpg"][1] > 64  # with its legend

    plain, turned = (pixels(tmp_path / f"out/labels/{name}.png") for name in ("bitmap", "turned"))
    assert (plain == turned).all() and len(np.unique(plain)) > 2


def test_openvino_gives_the_same_labels(script, quick_export, photo, tmp_path):
    photo.save(tmp_path / "a.png")
    for runtime in ("torch", "openvino"):
        argv = ("--input", "a.png", "--height", 72, "--workers", 0, "--runtime", runtime)
        argv += ("--checkpoint", CAMVID_WEIGHTS, "--output", runtime)
        assert script("predict.py", *argv).status == 0
    labels, expected = (pixels(tmp_path / f"{name}/labels/a.png") for name in ("openvino", "torch"))
    assert (labels == expected).mean() > 0.999 and len(np.unique(labels)) > 2


def test_strays_and_broken_pictures_end_no_run(predict, photo, tmp_path):
    put_strays(tmp_path / "in", tmp_path / "in/deeper")
    for name in ("a", "deeper/b"):
        photo.save(tmp_path / f"in/{name}.tif")
    assert predict("in").status == 0
    assert sizes(tmp_path / "out/labels").keys() == {"a.png", "deeper/b.png"}
    (tmp_path / "in/a0.webp").write_bytes(b"")
    (tmp_path / "in/a1.heic").write_bytes(b"")
    result = predict("in", argv=("--output", "more"))
    assert result.status == 1 and "in/a0.webp cannot be read" in result.err
    assert "note: 1 of 4 files of in are left out: .heic is not read" in result.err
    assert "2 pictures of 3 files" in result.out


def test_labels_are_those_of_the_evaluation(predict, script, street_network, cityscapes, tmp_path):
    """The data set's own ids at the size of the picture, though the network works at another."""
    large = tmp_path / "large"
    for folder in ("leftImg8bit/val/city", "gtFine/val/city"):
        (large / folder).mkdir(parents=True)
    for path, _ in Cityscapes(cityscapes, "val").pairs:
        name = path.rsplit("/", 1)[1]
        Image.open(path).resize((300, 150)).save(large / "leftImg8bit/val/city" / name)
        label = large / "gtFine/val/city" / name.replace("leftImg8bit", "gtFine_labelIds")
        Image.new("L", (300, 150)).save(label)
    argv = ("--checkpoint", street_network, "--datadir", large, "--save-results", "scored")
    assert script("eval_cityscapes_server.py", *argv).status == 0
    assert predict(large / "leftImg8bit/val", argv=("--batch-size", 2)).status == 0
    scored = sorted((tmp_path / "scored").rglob("*.png"))
    ours = sorted((tmp_path / "out/labels/city").iterdir())
    assert len(scored) == len(ours) == 3
    values = set()
    for theirs, mine in zip(scored, ours, strict=True):
        expected, labels = pixels(theirs), pixels(mine)
        assert labels.shape == (150, 300) and (expected == labels).mean() > 0.999
        values |= set(np.unique(labels).tolist())
    assert len(values) > 2 and values <= set(Cityscapes.CLASSES.label_ids)


def test_colors_and_overlay_show_the_labels(predict, photo, tmp_path):
    photo.save(tmp_path / "a.png")
    assert predict("a.png").status == 0
    labels = pixels(tmp_path / "out/labels/a.png")
    colors = np.asarray(Image.open(tmp_path / "out/colors/a.png").convert("RGB"))
    table = dict(zip(Cityscapes.CLASSES.label_ids, Cityscapes.CLASSES.colors, strict=True))
    for value in np.unique(labels):
        assert (colors[labels == value] == table[value]).all()
    overlay = pixels(tmp_path / "out/overlays/a.jpg").astype(float)
    mixed = (np.asarray(photo).astype(float) + colors) / 2
    assert abs(overlay[:64, :128] - mixed).mean() < 12  # JPEG blurs colours
    assert (overlay[64:] > 250).mean() > 0.3  # the legend is on white


def test_batches_have_the_size_asked_for(predict, cityscapes, monkeypatch):
    shapes, forward = [], Deployed.forward
    monkeypatch.setattr(
        Deployed,
        "forward",
        lambda self, images: shapes.append(images.shape) or forward(self, images),
    )
    folder = cityscapes / "leftImg8bit/val"
    result = predict(folder, argv=("--height", 96, "--batch-size", 2))
    assert result.status == 0 and "at a height of 96" in result.out
    assert shapes == [(2, 3, 96, 192), (1, 3, 96, 192)]


def test_a_large_photo(predict, photo, tmp_path):
    photo.resize((6400, 4800)).save(tmp_path / "large.jpg")
    assert predict("large.jpg").status == 0
    for kind in ("labels", "colors"):
        assert sizes(tmp_path / "out" / kind) == {"large.png": (6400, 4800)}


def test_workers_change_nothing(script, street_network, cityscapes, tmp_path):
    folder = cityscapes / "leftImg8bit/train"
    argv = ("predict.py", "--input", folder, "--checkpoint", street_network)
    assert script(*argv, "--output", "a", "--workers", 0).status == 0
    assert script(*argv, "--output", "b", "--num-workers", 2).status == 0
    first, second = (sorted((tmp_path / name).rglob("*.*")) for name in "ab")
    assert len(first) == 3 * 6
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_video_becomes_a_video(predict, film, tmp_path):
    (tmp_path / "broken.mp4").write_text("no video")
    result = predict(film, "broken.mp4")
    assert result.status == 1 and "broken.mp4 cannot be read as a video" in result.err
    assert "7 pictures of 2 files" in result.out
    names = {f"film/{number:06d}.png": (128, 64) for number in range(7)}
    for kind in ("labels", "colors"):
        assert sizes(tmp_path / "out" / kind) == names
    with av.open(tmp_path / "out/overlays/film.mp4") as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 7 and stream.average_rate == 5
    assert frames[0].shape[0] > 64 and frames[0].shape[1] >= 128
    assert not (tmp_path / "out/overlays/broken.mp4").exists()


def test_without_pyav_pictures_are_still_segmented(predict, photo, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    photo.save(tmp_path / "in/a.png")
    (tmp_path / "in/film.mp4").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    result = predict("in")
    assert result.status == 1 and "pip install av" in result.err
    assert sizes(tmp_path / "out/labels") == {"a.png": (128, 64)}


@pytest.mark.parametrize(
    ("error", "status", "kept"), [(DatasetError, 1, 5), (KeyboardInterrupt, 130, 0)]
)
def test_a_video_that_breaks_off(predict, film, tmp_path, monkeypatch, error, status, kept):
    """What could be read of it is kept; of a run that was interrupted, only finished files."""

    def broken(*args):
        for number, frame in enumerate(video_frames(*args)):
            if number == 5:
                raise error("film.mp4 breaks off")
            yield frame

    monkeypatch.setattr("datasets.pictures.video_frames", broken)
    result = predict(film, argv=("--batch-size", 2))
    assert result.status == status
    films = list((tmp_path / "out/overlays").iterdir())
    assert len(films) == (kept > 0)
    for path in films:
        with av.open(path) as container:
            assert sum(1 for _ in container.decode(video=0)) == kept


def test_impossible_requests_are_refused(refused, fails, photo, tmp_path):
    photo.save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.png").write_text("precious")
    assert "empty holds no picture" in refused("empty")
    assert "nowhere is no file or folder" in refused("nowhere")
    assert "out is not empty: name a new folder" in refused("a.png")
    assert "--height 8 is too small" in refused("a.png", argv=("--height", 8))
    line = fails("predict.py", "--checkpoint", "none.pth", "--input", "a.png")
    assert "none.pth does not exist" in line
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("size", "first"), [(50, "labels/a.png"), (1500, "overlays/a.jpg")], ids=["png", "jpg"]
)
def test_a_full_disk_is_reported(refused, photo, tmp_path, size, first):
    photo.save(tmp_path / "a.png")
    with full_disk(size):
        line = refused("a.png")
    assert f"out/{first} cannot be written (File too large); make room, or give another" in line
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    for path in left:  # those that fit are whole
        assert path.stat().st_size < size
        Image.open(path).load()
    assert not [path for path in left if path.name.startswith(".") or str(path).endswith(first)]


def test_pictures_that_cannot_be_encoded_are_reported(predict, photo, tmp_path, monkeypatch):
    def broken(file, prediction, classes):
        raise OSError("encoder error -2 when writing image file")

    monkeypatch.setattr("datasets.segmentation.write_label", broken)
    photo.save(tmp_path / "a.png")
    result = predict("a.png")
    assert result.status == 1 and "a result cannot be saved (encoder error" in result.err


@pytest.mark.parametrize("size", [40, 4000, "the end"])
def test_a_full_disk_while_a_video_is_written(refused, predict, film, tmp_path, size):
    if size == "the end":
        assert predict(film).status == 0
        size = (tmp_path / "out/overlays/film.mp4").stat().st_size - 1
        shutil.rmtree(tmp_path / "out")
    with full_disk(size):
        line = refused(film)
    assert "film" in line and "cannot be written (File too large)" in line
    assert not list((tmp_path / "out/overlays").iterdir())
    for path in (tmp_path / "out").rglob("*.png"):
        Image.open(path).load()
    assert not list((tmp_path / "out").rglob(".*"))


def test_results_stay_in_their_folder_whatever_files_are_called(predict, photo, tmp_path):
    names = [
        "...gif",
        "..gif",
        "....gif",
        "a\nb.png",
        "-rf.png",
        "a b;c.png",
        "c:d.png",
        "e\\f.png",
    ]
    folder = tmp_path / "in"
    folder.mkdir()
    for name in names:
        moving = {"save_all": True, "append_images": [photo.rotate(5)]} if name[0] == "." else {}
        photo.save(folder / name, name[-3:], **moving)
    before = set(tmp_path.rglob("*"))
    assert predict(*(folder / name for name in names)).status == 0
    assert all(path.is_relative_to(tmp_path / "out") for path in {*tmp_path.rglob("*")} - before)
    stills = ("a_b", "-rf", "a b;c", "c:d", "e\\f")
    moving = (f"{name}/00000{number}" for name in ("_", "__", "___") for number in range(2))
    assert {*sizes(tmp_path / "out/labels")} == {f"{name}.png" for name in (*stills, *moving)}


def test_the_same_command_again_segments_the_same_and_writes_beside(script, photo, tmp_path):
    photo.save(tmp_path / "a.png")
    argv = ("predict.py", "--input", ".", "--workers", 0, "--height", 64)
    expected = f"results/{tmp_path.name}"
    for number in (1, 2, 3):
        folder = expected if number == 1 else f"{expected}-{number}"
        result = script(*argv)
        assert result.status == 0 and "1 pictures of 1 files" in result.out, result
        assert sizes(tmp_path / folder / "labels") == {"a.png": (128, 64)}
        assert (f"{expected} holds results: these go to {folder}" in result.err) == (number > 1)


@pytest.mark.parametrize(
    ("name", "given", "folder"),
    [("...png", "...png", "__"), ("a.png", "*.png", "pictures"), ("b.png", "b.png", "b")],
)
def test_results_are_by_default_under_results(script, photo, tmp_path, name, given, folder):
    """And the shipped weights are used, as in a fresh clone."""
    photo.resize((333, 222)).save(tmp_path / name, "PNG")
    result = script("predict.py", "--input", given, "--workers", 0, "--height", 64)
    assert result.status == 0 and f"results/{folder}" in result.out
    (path,) = (tmp_path / "results" / folder / "labels").iterdir()
    assert pixels(path).shape == (222, 333)
    assert set(np.unique(pixels(path))) <= set(Cityscapes.CLASSES.label_ids)
