import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from datasets.check import check_headers, check_images
from datasets.images import (
    DatasetError,
    orientation,
    read_image,
    read_label,
    to_stored,
    upright,
)


@pytest.fixture
def pair(tmp_path):
    rng = np.random.default_rng(0)
    image, label = str(tmp_path / "image.png"), str(tmp_path / "label.png")
    Image.fromarray(rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)).save(image)
    Image.fromarray(rng.integers(0, 34, (30, 40)).astype(np.uint8)).save(label)
    return image, label


def cut_short(path: str) -> None:
    data = open(path, "rb").read()
    open(path, "wb").write(data[: len(data) // 2])


def test_a_good_pair_passes(pair):
    assert check_headers([pair, (pair[0], None)]) == [(30, 40), (30, 40)]
    assert read_image(pair[0]).size == (40, 30)
    assert read_label(pair[1]).shape == (30, 40)
    assert check_headers([(pair[0], None)]) == [(30, 40)]


# What each mode stores, and the grey, red, green and blue that it is.
MODES = {
    "1": (1, (255, 255, 255)),
    "L": (100, (100, 100, 100)),
    "LA": ((100, 7), (100, 100, 100)),
    "RGB": ((10, 20, 30), (10, 20, 30)),
    "RGBA": ((10, 20, 30, 7), (10, 20, 30)),
    "I;16": (100 * 256 + 99, (100, 100, 100)),
}


@pytest.mark.parametrize("mode", MODES)
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    path = str(tmp_path / "image.png")
    stored, expected = MODES[mode]
    Image.new(mode, (8, 6), stored).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (8, 6)
    assert (np.array(image) == expected).all()


@pytest.mark.parametrize("transparency", [None, 1, b"\xff\x00"])
@pytest.mark.filterwarnings("error")
def test_a_palette_becomes_rgb(tmp_path, transparency):
    path, image = str(tmp_path / "image.png"), Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(path, **({} if transparency is None else {"transparency": transparency}))
    assert (np.array(read_image(path)) == (10, 20, 30)).all()


def test_cmyk_becomes_rgb(tmp_path):
    path = str(tmp_path / "image.jpg")
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(path, quality=100)
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
    red, green, blue = np.array(read_image(path)).reshape(-1, 3).mean(0)
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize("turned", range(1, 9))
def test_an_image_that_was_turned_is_made_upright(tmp_path, turned):
    rng, path = np.random.default_rng(0), str(tmp_path / "image.png")
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    image.save(path, exif=exif)
    with Image.open(path) as stored:
        assert orientation(stored) == turned
        expected = np.array(ImageOps.exif_transpose(stored))
    assert (np.array(upright(image, turned)) == expected).all()

    left, top, width, height = to_stored((1, 2, 3, 4), expected.shape[1::-1], turned)
    part = image.crop((left, top, left + width, top + height))
    assert (np.array(upright(part, turned)) == expected[2:6, 1:4]).all()


@pytest.mark.parametrize("turned", [1, 3, 6])
def test_a_photo_is_read_as_it_is_to_be_seen(tmp_path, turned):
    """Its label is drawn on what is seen."""
    path, label = str(tmp_path / "photo.png"), str(tmp_path / "label.png")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    Image.fromarray(pixels).save(path, exif=exif)
    seen = {1: pixels, 3: pixels[::-1, ::-1], 6: np.rot90(pixels, -1)}[turned]
    assert (np.array(read_image(path)) == seen).all()
    Image.new("L", seen.shape[1::-1]).save(label)
    assert check_headers([(path, label)]) == [seen.shape[:2]]


@pytest.mark.parametrize("error", [SyntaxError, KeyError, ZeroDivisionError])
def test_broken_exif_counts_as_upright(monkeypatch, error):
    def getexif(_image):
        raise error("broken")

    image = Image.new("RGB", (8, 6))
    image.info["exif"] = b"broken"
    monkeypatch.setattr(Image.Image, "getexif", getexif)
    assert orientation(image) == 1


def test_an_orientation_that_does_not_exist_counts_as_upright():
    image, exif = Image.new("RGB", (8, 6)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 9
    image.info["exif"] = exif.tobytes()
    assert orientation(image) == 1


def test_a_palette_label_holds_its_indices(tmp_path):
    path = str(tmp_path / "label.png")
    label = Image.fromarray(np.array([[0, 7], [33, 7]], np.uint8))
    label.putpalette(list(range(256)) * 3)
    label.save(path)
    assert Image.open(path).mode == "P"
    assert read_label(path).tolist() == [[0, 7], [33, 7]]


@pytest.mark.parametrize("which", [0, 1])
def test_a_truncated_file_is_named(pair, which):
    cut_short(pair[which])
    with pytest.raises(DatasetError, match=pair[which]):
        check_headers([pair])
    with pytest.raises(DatasetError, match=pair[which]):
        (read_image, read_label)[which](pair[which])


@pytest.mark.parametrize("content", [b"", b"this is no picture", b"\x89PNG\r\n\x1a\n"])
def test_something_else_is_named(pair, content):
    open(pair[1], "wb").write(content)
    with pytest.raises(DatasetError, match=pair[1]):
        check_headers([pair])
    with pytest.raises(DatasetError, match=pair[1]) as error:
        read_label(pair[1])
    assert "object at" not in str(error.value)


def test_a_missing_file_is_named(pair):
    with pytest.raises(DatasetError, match=r"gone\.png does not exist"):
        check_headers([(pair[0], "gone.png")])


def test_a_colour_label_is_refused(pair):
    with pytest.raises(DatasetError, match="mode RGB"):
        check_headers([(pair[0], pair[0])])
    with pytest.raises(DatasetError, match="mode RGB"):
        read_label(pair[0])


def test_a_label_has_the_size_of_its_image(pair, tmp_path):
    other = str(tmp_path / "other.png")
    Image.new("L", (40, 31)).save(other)
    with pytest.raises(DatasetError, match=r"other.png is 40x31 but its image is 40x30"):
        check_headers([(pair[0], other)])


def test_the_size_of_each_image_is_found(pair, tmp_path):
    other = str(tmp_path / "other.jpg")
    Image.new("RGB", (50, 31)).save(other)
    assert check_headers([pair, (other, None), pair]) == [(30, 40), (31, 50), (30, 40)]


def test_an_absurd_size_is_refused_before_it_is_decoded(pair, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DatasetError, match=pair[0]):
        read_image(pair[0])


def test_headers_of_images_are_checked(pair, tmp_path):
    text = tmp_path / "text.jpg"
    check_images([pair[0], pair[1]])
    text.write_text("no picture")
    for path in (str(text), str(tmp_path / "none.jpg")):
        with pytest.raises(DatasetError, match=path):
            check_images([pair[0], path, pair[1]])


def test_a_jpeg_may_have_more_after_its_end(tmp_path):
    path, noise = tmp_path / "long.jpg", np.random.default_rng(0).integers(0, 256, (90, 90, 3))
    Image.fromarray(noise.astype(np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(5000))
    check_images([str(path)])
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match="cannot be read"):
        check_images([str(path)])
