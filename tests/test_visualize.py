import math

import pytest
import torch

from utils.visualize import captioned, colorize, score_table, strip

COLORS = [(128, 64, 128), (0, 0, 142)]


def test_colorize():
    picture = colorize(torch.tensor([[0, 1], [255, 1]]), COLORS)
    assert picture.shape == (3, 2, 2) and picture.dtype == torch.uint8
    assert picture[:, 0, 0].tolist() == [128, 64, 128]
    assert picture[:, 1, 1].tolist() == [0, 0, 142]
    assert picture[:, 1, 0].tolist() == [0, 0, 0]


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


def test_score_table_reads_downwards():
    table = score_table(["road", "sky", "car"], [0.5, math.nan, 1.0])
    assert table.splitlines() == ["road   50.0    car   100.0", "sky       -"]


@pytest.mark.parametrize(("right", "color"), [(True, (0, 128, 0)), (False, (255, 0, 0))])
def test_a_caption_stands_below_its_picture(right, color):
    image = torch.randint(256, (3, 20, 60), dtype=torch.uint8)
    page = captioned(image, "a bird", right)
    assert page.shape == (3, 36, 60) and torch.equal(page[:, :20], image)
    below = page[:, 20:].flatten(1).int()
    assert (below == 255).all(0).any()  # white
    # The text, whose edges may be mixed with the white around it.
    nearest = (below - torch.tensor(color)[:, None]).abs().sum(0).min()
    assert nearest < 60
