"""The served forms of the network compute what the network computes."""

import copy

import pytest
import torch
from conftest import ROOT, street_scenes
from torch import nn
from torch.nn import functional as F

from models.deployed import Deployed, interpolation
from models.lednet import LEDNet, upsample
from utils.checkpoint import load_network
from utils.speed import InPrecision, deploy

SIZES = [(1, 256, 512), (2, 97, 150), (2, 64, 64), (1, 120, 73)]


@pytest.fixture(scope="module")
def network():
    """A trained one: on random weights all pixels would be of one class."""
    return load_network(ROOT / "weights/lednet_d20_camvid.pth")[0].requires_grad_(False)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("products", [False, True])
def test_same_logits_and_labels(network, size, products):
    images = street_scenes(size[0], size[1:])
    logits = network(images)
    served = Deployed(network, products=products)(images)
    assert served.dtype == torch.float32 and served.shape == logits.shape
    assert relative(served, logits) < 1e-5
    labels = Deployed(network, labels=True, products=products)(images)
    assert labels.dtype == torch.uint8 and labels.shape == logits[:, 0].shape
    assert (labels == logits.argmax(1)).float().mean() > 0.9999


@pytest.mark.parametrize("width", [4, 128])
@pytest.mark.parametrize("products", [False, True])
def test_same_logits_of_any_statistics(width, products):
    """Batch norms that are far from what they start as, of both signs."""
    torch.manual_seed(0)
    network = LEDNet(5, width).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.weight, -1.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.3, 3),
            ):
                nn.init.uniform_(values, low, high)
    images = torch.rand(2, 3, 72, 100)
    logits = network(images)
    assert logits.std() > 1e-3
    assert relative(Deployed(network, products=products)(images), logits) < 1e-4


@pytest.mark.parametrize(("dtype", "share"), [(torch.float16, 0.999), (torch.bfloat16, 0.99)])
@pytest.mark.parametrize("products", [False, True])
def test_half_precision_agrees_on_labels(network, dtype, share, products):
    images = street_scenes(2, (256, 512))
    labels = network(images).argmax(1)
    assert len(labels.unique()) >= 5
    served = Deployed(network, products=products).to(dtype)(images)
    assert served.dtype == torch.float32
    assert (served.argmax(1) == labels).float().mean() >= share
    inside = Deployed(network, labels=True, products=products).to(dtype)(images)
    assert inside.dtype == torch.uint8 and (inside == labels).float().mean() >= share
    plain = InPrecision(network, dtype)(images)
    assert plain.dtype == torch.float32
    assert (plain.argmax(1) == labels).float().mean() >= share
    assert next(network.parameters()).dtype == torch.float32, "the network stays as it is"


def test_nothing_of_training_is_left(network):
    before = copy.deepcopy(network.state_dict())
    served = deploy(network, compiled=False)
    assert not any(isinstance(m, nn.BatchNorm2d | nn.Dropout2d) for m in served.modules())
    assert not served.training and not any(p.requires_grad for p in served.parameters())
    for weight in served.parameters():
        weight.zero_()
    assert all(torch.equal(before[name], w) for name, w in network.state_dict().items())


def test_compiled_is_the_same_network(network):
    with torch.inference_mode():
        served = deploy(network)
        for size in SIZES[1:3]:
            images = street_scenes(size[0], size[1:])
            assert relative(served(images), network(images)) < 1e-4


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 5), (9, 65), (64, 512)])
def test_interpolation_is_a_matrix(old, new):
    x = torch.randn(2, 3, old, 7)
    matrix = interpolation(old, new, x)
    assert torch.allclose(matrix.sum(1), torch.ones(new), atol=1e-4)
    expected = F.interpolate(x, (new, 7), mode="bilinear", align_corners=True)
    assert torch.allclose(matrix @ x, expected, atol=1e-4)
    assert torch.equal(upsample(x, expected), expected)
