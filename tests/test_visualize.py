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
    image = torch.full((3, 32, 64), 0.5)
    mean, std = (0.25, 0.0, 0.5), (0.5, 1.0, 2.0)
    normalised = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    prediction, label = torch.zeros(64, 128).long(), torch.full((64, 128), 255)
    picture = strip(normalised, prediction, label, COLORS, mean, std, height=16)
    assert picture.shape == (3, 16, 96) and picture.dtype == torch.uint8
    assert (picture[:, :, :32] == 127).all()
    assert (picture[:, :, 32:64] == torch.tensor(COLORS[0]).view(3, 1, 1)).all()
    assert (picture[:, :, 64:] == 0).all()


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
