import numpy as np
import pytest
from PIL import Image

from datasets.files import DatasetError, check_headers, image_size, read_image, read_label


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
    check_headers([pair, (pair[0], None)])
    assert read_image(pair[0]).size == (40, 30)
    assert read_label(pair[1]).shape == (30, 40)
    assert image_size(pair[0]) == (30, 40)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    path = str(tmp_path / "image.png")
    Image.new(mode, (8, 8)).save(path)
    assert read_image(path).mode == "RGB"


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
    with pytest.raises(DatasetError, match=pair[1]):
        read_label(pair[1])


def test_a_missing_file_is_named(pair):
    with pytest.raises(DatasetError, match=r"gone\.png does not exist"):
        check_headers([(pair[0], "gone.png")])


def test_a_colour_label_is_refused(pair):
    with pytest.raises(DatasetError, match="mode RGB"):
        check_headers([(pair[0], pair[0])])
    with pytest.raises(DatasetError, match="mode RGB"):
        read_label(pair[0])


def test_sizes_must_agree(pair, tmp_path):
    other = str(tmp_path / "other.png")
    Image.new("L", (40, 31)).save(other)
    with pytest.raises(DatasetError, match=r"other.png is 40x31 but its image is 40x30"):
        check_headers([(pair[0], other)])
    with pytest.raises(DatasetError, match="must have one size"):
        check_headers([pair, (other, None)])


def test_an_absurd_size_is_refused_before_it_is_decoded(pair, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DatasetError, match=pair[0]):
        read_image(pair[0])
