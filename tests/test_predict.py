import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT, full_disk, run_script
from PIL import Image

from datasets.cityscapes import Cityscapes
from datasets.images import DatasetError
from datasets.pictures import video_frames
from utils.video import VideoWriter

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def checkpoint(cityscapes, tmp_path_factory):
    """A network that tells a few classes of the drawn scenes apart."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    argv = ("--datadir", cityscapes, *QUICK, "--decoder", "--epochs", 40, "--lr", 5e-3, "--D", 8)
    assert run_script("main.py", *argv, "--val-every", 40, "--savedir", folder) == 0
    return folder / "last.pth"


@pytest.fixture
def predict(script, checkpoint, tmp_path):
    """Segment something into tmp_path/out, without worker processes."""

    def run(*inputs, argv=()):
        options = ("--checkpoint", checkpoint, "--output", "out", "--workers", 0)
        return script("predict.py", "--input", *inputs, *options, *argv)

    return run


def photo(cityscapes) -> Image.Image:
    return Image.open(Cityscapes(cityscapes, "val").pairs[0][0]).convert("RGB")


def results(folder, kind) -> dict[str, tuple[int, int]]:
    """Names and sizes of the results of a kind."""
    paths = sorted(path for path in (folder / kind).rglob("*") if path.is_file())
    return {str(path.relative_to(folder / kind)): Image.open(path).size for path in paths}


def test_every_kind_of_file_is_read_or_named(predict, cityscapes, tmp_path):
    folder, image = tmp_path / "in", photo(cityscapes)
    folder.mkdir()
    image.save(folder / "plain.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / "sixteen.png")
    image.quantize(32).save(folder / "palette.png")
    image.convert("LA").save(folder / "alpha.png")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("L", (66_000, 4), 90).save(folder / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif)
    image.save(folder / "moving.gif", save_all=True, append_images=[image.rotate(5)])
    (folder / "text.png").write_text("hello")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "palette.png").read_bytes()[:900])
    (folder / "notes.txt").write_text("no picture")

    result = predict(folder)
    assert result.status == 1
    lines = [line for line in result.err.splitlines() if "error:" in line]
    assert len(lines) == 3
    for name in ("text.png", "empty.jpg", "cut.png"):
        assert any(f"in/{name} cannot be read" in line for line in lines), name
    assert "3 of 12 files failed" in result.err
    assert re.search(r"10 pictures of 9 files in [\d.]+ s, [\d.]+ images/s", result.out)

    plain = dict.fromkeys(
        (
            *("alpha", "cmyk", "moving/000000", "moving/000001"),
            *("palette", "plain", "sixteen", "turned"),
        ),
        (128, 64),
    )
    expected = plain | {"one": (1, 1), "wide": (66_000, 4)}
    for kind in ("labels", "colors"):
        sizes = results(tmp_path / "out", kind)
        assert sizes == {f"{name}.png": size for name, size in expected.items()}
    overlays = results(tmp_path / "out", "overlays")
    suffixes = dict.fromkeys(expected, ".jpg") | {"wide": ".png"}  # no JPEG is that wide
    assert overlays.keys() == {name + suffix for name, suffix in suffixes.items()}
    assert overlays["plain.jpg"][0] >= 128 and overlays["plain.jpg"][1] > 64  # with its legend

    # Turned upright it is the same picture, but for what JPEG makes of it.
    labels = {
        name: np.asarray(Image.open(tmp_path / f"out/labels/{name}.png"))
        for name in ("plain", "turned")
    }
    assert (labels["plain"] == labels["turned"]).mean() > 0.9
    assert len(np.unique(labels["plain"])) > 2


def test_labels_are_those_of_the_evaluation(predict, script, checkpoint, cityscapes, tmp_path):
    """The data set's own ids, at the size of the picture, though the network works at another."""
    large = tmp_path / "large"
    for path, _ in Cityscapes(cityscapes, "val").pairs:
        (large / "leftImg8bit/val/city").mkdir(parents=True, exist_ok=True)
        (large / "gtFine/val/city").mkdir(parents=True, exist_ok=True)
        name = path.rsplit("/", 1)[1]
        Image.open(path).resize((300, 150)).save(large / "leftImg8bit/val/city" / name)
        label = large / "gtFine/val/city" / name.replace("leftImg8bit", "gtFine_labelIds")
        Image.new("L", (300, 150)).save(label)
    argv = ("--checkpoint", checkpoint, "--datadir", large, "--save-results", "scored")
    assert script("eval_cityscapes_server.py", *argv, "--workers", 0).status == 0
    assert predict(large / "leftImg8bit/val", argv=("--batch-size", 2)).status == 0
    scored = sorted((tmp_path / "scored").rglob("*.png"))
    ours = sorted((tmp_path / "out/labels").rglob("*.png"))
    assert len(scored) == len(ours) == 3
    seen = set()
    for theirs, mine in zip(scored, ours, strict=True):
        assert mine.parent.name == "city"
        expected, labels = np.asarray(Image.open(theirs)), np.asarray(Image.open(mine))
        assert labels.shape == (150, 300) and (expected == labels).mean() > 0.999
        seen |= set(np.unique(labels).tolist())
    assert len(seen) > 2 and seen <= set(Cityscapes.CLASSES.label_ids)


def test_colors_and_overlay_show_the_labels(predict, cityscapes, tmp_path):
    image = photo(cityscapes)
    image.save(tmp_path / "a.png")
    assert predict(tmp_path / "a.png").status == 0
    labels = np.asarray(Image.open(tmp_path / "out/labels/a.png"))
    colors = np.asarray(Image.open(tmp_path / "out/colors/a.png").convert("RGB"))
    table = dict(zip(Cityscapes.CLASSES.label_ids, Cityscapes.CLASSES.colors, strict=True))
    for value in np.unique(labels):
        assert (colors[labels == value] == table[value]).all()
    overlay = np.asarray(Image.open(tmp_path / "out/overlays/a.jpg")).astype(float)
    mixed = (np.asarray(image).astype(float) + colors) / 2
    assert abs(overlay[:64, :128] - mixed).mean() < 12  # JPEG blurs colours
    assert (overlay[64:] > 250).mean() > 0.3  # the legend is on white


def test_height_changes_the_working_resolution(predict, cityscapes, tmp_path, monkeypatch):
    photo(cityscapes).save(tmp_path / "a.png")
    result = predict(tmp_path / "a.png", argv=("--height", 96))
    assert result.status == 0 and "at a height of 96" in result.out
    assert results(tmp_path / "out", "labels") == {"a.png": (128, 64)}


def test_a_video_becomes_a_video(predict, cityscapes, tmp_path):
    image = photo(cityscapes)
    with VideoWriter(tmp_path / "film.mp4", Fraction(5)) as writer:
        for angle in range(7):
            writer.add(image.rotate(angle))
    (tmp_path / "broken.mp4").write_text("no video")
    result = predict(tmp_path / "film.mp4", tmp_path / "broken.mp4")
    assert result.status == 1 and "broken.mp4 cannot be read as a video" in result.err
    names = {f"film/{number:06d}.png": (128, 64) for number in range(7)}
    for kind in ("labels", "colors"):
        assert results(tmp_path / "out", kind) == names
    with av.open(tmp_path / "out/overlays/film.mp4") as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 7 and stream.average_rate == 5
    assert frames[0].shape[0] > 64 and frames[0].shape[1] >= 128
    assert not (tmp_path / "out/overlays/broken.mp4").exists()


def test_a_missing_pyav_is_said_and_pictures_go_on(predict, cityscapes, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    photo(cityscapes).save(folder / "a.png")
    (folder / "film.mp4").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    result = predict(folder)
    assert result.status == 1 and "pip install av" in result.err
    assert results(tmp_path / "out", "labels") == {"a.png": (128, 64)}


def test_workers_change_nothing(script, checkpoint, cityscapes, tmp_path):
    folder = cityscapes / "leftImg8bit/train"
    for workers in (0, 2):
        argv = ("--checkpoint", checkpoint, "--output", f"w{workers}", "--workers", workers)
        assert script("predict.py", "--input", folder, *argv).status == 0
    first, second = (sorted((tmp_path / f"w{workers}").rglob("*.*")) for workers in (0, 2))
    assert len(first) == 3 * 6
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_what_cannot_be(fails, checkpoint, cityscapes, tmp_path):
    photo(cityscapes).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    argv = ("predict.py", "--checkpoint", checkpoint)
    assert "empty holds no picture" in fails(*argv, "--input", tmp_path / "empty")
    assert "nowhere is no file or folder" in fails(*argv, "--input", "nowhere")
    line = fails(*argv, "--input", "a.png", "--output", tmp_path)
    assert "is not empty: give --output a new folder" in line
    assert "--height 8 is too small" in fails(*argv, "--input", "a.png", "--height", 8)
    line = fails("predict.py", "--checkpoint", "none.pth", "--input", "a.png")
    assert "none.pth does not exist" in line
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("size", "first"), [(50, "labels/a.png"), (1500, "overlays/a.jpg")], ids=["png", "jpg"]
)
def test_a_full_disk_is_said(fails, checkpoint, cityscapes, tmp_path, size, first):
    photo(cityscapes).save(tmp_path / "a.png")
    argv = ("--checkpoint", checkpoint, "--workers", 0, "--output", "out")
    with full_disk(size):
        line = fails("predict.py", "--input", "a.png", *argv)
    assert f"out/{first} cannot be written (File too large): make room" in line
    left = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert all(path.stat().st_size < size for path in left)
    for path in left:  # those that fit are whole
        Image.open(path).load()
    assert not [path for path in left if path.name.startswith(".") or str(path).endswith(first)]


@pytest.mark.parametrize("size", [40, 4000, "the end"])
def test_a_full_disk_while_a_video_is_written(
    fails, predict, checkpoint, tmp_path, size, cityscapes
):
    image = photo(cityscapes)
    with VideoWriter(tmp_path / "film.mp4", Fraction(5)) as writer:
        for angle in range(7):
            writer.add(image.rotate(angle))
    if size == "the end":
        assert predict(tmp_path / "film.mp4").status == 0
        size = (tmp_path / "out/overlays/film.mp4").stat().st_size - 1
        shutil.rmtree(tmp_path / "out")
    argv = ("--checkpoint", checkpoint, "--workers", 0, "--output", "out")
    with full_disk(size):
        line = fails("predict.py", "--input", "film.mp4", *argv)
    assert "film" in line and "cannot be written (File too large)" in line
    assert not list((tmp_path / "out/overlays").iterdir())
    for path in (tmp_path / "out").rglob("*.png"):
        Image.open(path).load()
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.parametrize(
    ("end", "status", "kept"), [(DatasetError, 1, 5), (KeyboardInterrupt, 130, 0)]
)
def test_a_video_that_breaks_off(predict, cityscapes, tmp_path, monkeypatch, end, status, kept):
    """What could be read of it is kept; of a run that was interrupted, only what was done."""
    image = photo(cityscapes)
    with VideoWriter(tmp_path / "film.mp4", Fraction(5)) as writer:
        for angle in range(7):
            writer.add(image.rotate(angle))

    def broken(*args):
        for number, frame in enumerate(video_frames(*args)):
            if number == 5:
                raise end("film.mp4 breaks off")
            yield frame

    monkeypatch.setattr("datasets.pictures.video_frames", broken)
    result = predict(tmp_path / "film.mp4", argv=("--batch-size", 1))
    assert result.status == status
    films = list((tmp_path / "out/overlays").iterdir())
    assert len(films) == (kept > 0)
    for film in films:
        with av.open(film) as container:
            assert sum(1 for _ in container.decode(video=0)) == kept


def test_a_video_without_a_picture_is_no_file(tmp_path):
    with VideoWriter(tmp_path / "film.mp4", Fraction(5)):
        pass
    assert not list(tmp_path.iterdir())


def test_results_lie_in_their_folder_whatever_files_are_called(predict, cityscapes, tmp_path):
    folder, image = tmp_path / "in", photo(cityscapes)
    names = (
        "...gif",
        "..gif",
        "....gif",
        "a\nb.png",
        "-rf.png",
        "a b;c.png",
        "c:d.png",
        "e\\f.png",
    )
    folder.mkdir()
    for name in names:
        image.save(
            folder / name, name[-3:], save_all=name[0] == ".", append_images=[image.rotate(5)]
        )
    before = sorted(tmp_path.rglob("*"))
    assert predict(*(folder / name for name in names)).status == 0
    new = set(tmp_path.rglob("*")) - set(before)
    assert all(path.is_relative_to(tmp_path / "out") for path in new)
    stills = ("a_b", "-rf", "a b;c", "c:d", "e\\f")
    moving = (f"{name}/00000{number}" for name in ("_", "__", "___") for number in range(2))
    assert {*results(tmp_path / "out", "labels")} == {f"{name}.png" for name in (*stills, *moving)}


def test_a_default_folder_of_results_lies_under_results(script, cityscapes, tmp_path, monkeypatch):
    photo(cityscapes).save(tmp_path / "...png", "PNG")
    assert script("predict.py", "--input", "...png", "--workers", 0).status == 0
    assert (tmp_path / "results/__/labels/__.png").is_file()


def test_a_fresh_clone_segments_a_photo_with_the_shipped_weights(script, cityscapes, tmp_path):
    photo(cityscapes).resize((333, 222)).save(tmp_path / "a.jpg")
    result = script("predict.py", "--input", "a.jpg", "--workers", 0)
    assert result.status == 0 and "results/a" in result.out
    labels = np.asarray(Image.open(tmp_path / "results/a/labels/a.png"))
    assert labels.shape == (222, 333) and labels.max() <= 10


def test_hub_loads_the_network():
    load = torch.hub.load
    network = load(str(ROOT), "lednet", source="local", pretrained=True)
    assert not network.training
    assert network(torch.rand(1, 3, 64, 96)).shape == (1, 11, 64, 96)
    plain = load(str(ROOT), "lednet", source="local", apn_channels=128)
    assert sum(p.numel() for p in plain.parameters()) == 2_358_751
    with pytest.raises(ValueError, match="apn_channels=7"):
        load(str(ROOT), "lednet", source="local", pretrained=True, apn_channels=7)
    with pytest.raises(ValueError, match="of 11 classes, not 3"):
        load(str(ROOT), "lednet", source="local", pretrained=True, num_classes=3)


def test_a_photo_of_thirty_megapixels(predict, cityscapes, tmp_path):
    photo(cityscapes).resize((6400, 4800)).save(tmp_path / "large.jpg")
    assert predict(tmp_path / "large.jpg").status == 0
    for kind in ("labels", "colors"):
        assert results(tmp_path / "out", kind) == {"large.png": (6400, 4800)}
