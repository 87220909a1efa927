import math
from unicodedata import normalize

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from utils import visualize
from utils.visualize import (
    captioned,
    drawable,
    legend,
    overlay,
    paint,
    score_table,
    strip,
    write_video,
)

COLORS = [(128, 64, 128), (0, 0, 142)]


def test_paint_shows_the_colours_of_classes():
    picture = paint(torch.tensor([[0, 1], [255, 1]], dtype=torch.uint8), COLORS)
    assert picture.mode == "P", "the classes themselves stay"
    colors = np.asarray(picture.convert("RGB")).tolist()
    assert colors == [[[128, 64, 128], [0, 0, 142]], [[0, 0, 0], [0, 0, 142]]]


def test_strip_shows_image_prediction_and_truth():
    image = torch.tensor([10, 127, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 64)
    prediction, label = torch.zeros(64, 128).long(), torch.full((64, 128), 255)
    picture = strip(image, prediction, label, COLORS, height=16)
    assert picture.shape == (3, 16, 96) and picture.dtype == torch.uint8
    assert torch.equal(picture[:, :, :32], image[:, :16, :32])
    assert (picture[:, :, 32:64] == torch.tensor(COLORS[0]).view(3, 1, 1)).all()
    assert (picture[:, :, 64:] == 0).all()


def test_a_strip_is_no_higher_than_its_image():
    image, label = torch.zeros(3, 20, 30, dtype=torch.uint8), torch.zeros(40, 60).long()
    assert strip(image, label, label, COLORS).shape == (3, 20, 90)


@pytest.mark.parametrize(("right", "color"), [(True, (0, 128, 0)), (False, (255, 0, 0))])
def test_a_caption_is_below_its_image(right, color):
    image = torch.randint(256, (3, 20, 60), dtype=torch.uint8)
    page = captioned(image, "a bird", right)
    assert page.shape == (3, 36, 60) and torch.equal(page[:, :20], image)
    below = page[:, 20:].flatten(1).int()
    assert (below == 255).all(0).any()  # white
    nearest = (below - torch.tensor(color)[:, None]).abs().sum(0).min()
    assert nearest < 60  # edges of the text are mixed with white


def test_an_overlay_is_half_colour_above_a_legend_of_all_classes():
    image = torch.full((3, 50, 300), 200, dtype=torch.uint8)
    page = overlay(image, torch.ones(50, 300, dtype=torch.uint8), ["road", "car"], COLORS)
    assert page.width == 300 and page.height > 50
    assert page.getpixel((10, 10)) == (100, 100, 171)
    below = {color for _, color in page.crop((0, 50, 300, page.height)).getcolors()}
    assert {*COLORS, (255, 255, 255)} <= below


def test_a_legend_is_wider_than_its_image_only_for_long_names():
    names = [f"class {number}" for number in range(12)]
    narrow, wide = (legend(tuple(names), tuple([(0, 0, 0)] * 12), width) for width in (10, 800))
    assert 10 < narrow.width < wide.width <= 800 and narrow.height > wide.height


def boxes(font, text: str) -> int:
    """Return how many letters of a text a font has no glyph for."""
    return sum(bytes(font.getmask(c)) == bytes(font.getmask("\U0010ffff")) for c in text)


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("road", "road"), ("Straße", "Strasse"), ("Bäume", "Baume"), ("Ba\u0308ume", "Baume"),
        ("señal écrite", "senal ecrite"), ("łąka Øst İ", "laka Ost I"), ("traffic\nlight", None),
        ("дорога", "class 3"), ("道路", "class 3"), ("도로 🚗", "class 3"), ("\udcc3", "class 3"),
    ],
)  # fmt: skip
def test_names_are_drawn_without_boxes(monkeypatch, name, plain, installed):
    """In a font that has their letters, or as what the own font of Pillow can draw."""
    if not installed:
        monkeypatch.setattr(visualize, "FONTS", ())
    text, font = drawable(name, "class 3", 20)
    assert boxes(font, text) == 0
    assert text == (plain or "traffic light") or (installed and text == normalize("NFC", name))
    legend.cache_clear()
    assert legend(("road", name), tuple(map(tuple, COLORS)), 300).height > 11


def test_plain_names_keep_the_font_of_pillow():
    text, font = drawable("traffic light", "class 3", 20)
    assert text == "traffic light" and font.getname() == ImageFont.load_default(20).getname()


def test_a_caption_in_another_script_has_no_boxes(monkeypatch):
    monkeypatch.setattr(visualize, "FONTS", ())
    image = torch.zeros(3, 20, 90, dtype=torch.uint8)
    for caption, shown in (("Straße, not Äcker", "Strasse, not Acker"), ("道路", "right")):
        assert torch.equal(captioned(image, caption, True), captioned(image, shown, True))


def test_score_table_reads_downwards():
    table = score_table(["road", "sky", "car"], [0.5, math.nan, 1.0])
    assert table.splitlines() == ["road   50.0    car   100.0", "sky       -"]


def test_videos_have_the_even_size_of_their_first_picture(tmp_path):
    av = pytest.importorskip("av")
    pictures = [Image.new("RGB", size, "red") for size in ((65, 49), (65, 49), (90, 80))]
    assert write_video(tmp_path / "a.mp4", 29.97, pictures) == 3
    with av.open(tmp_path / "a.mp4") as container:
        rate = container.streams.video[0].average_rate
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 3
    assert rate == pytest.approx(29.97, abs=1e-3) and (frames[0][..., 0] > 200).all()


def test_a_video_without_pictures_is_no_file(tmp_path):
    pytest.importorskip("av")
    assert write_video(tmp_path / "a.mp4", 5, []) == 0
    assert not list(tmp_path.iterdir())
