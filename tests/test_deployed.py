"""The network for inference computes what the network computes."""

import copy
from itertools import pairwise

import pytest
import torch
from conftest import CAMVID_WEIGHTS, street_scenes
from torch import nn
from torch.nn import functional as F

from models.deployed import Deployed, Shuffle, deploy, interpolation
from models.lednet import Downsampler, LEDNet, upsample
from utils.checkpoint import load_network
from utils.speed import InPrecision


@pytest.fixture(scope="module")
def network():
    """A trained one: random weights would give all pixels one class."""
    return load_network(CAMVID_WEIGHTS)[0].requires_grad_(False)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("size", [(1, 256, 512), (2, 97, 150), (2, 64, 64), (1, 120, 73)], ids=str)
@pytest.mark.parametrize("products", [False, True])
def test_logits_and_labels_are_the_same(network, size, products):
    images = street_scenes(size[0], size[1:])
    logits = network(images)
    deployed = Deployed(network, products=products)(images)
    assert deployed.dtype == torch.float32 and deployed.shape == logits.shape
    assert relative(deployed, logits) < 1e-5
    labels = Deployed(network, labels=True, products=products)(images)
    assert labels.dtype == torch.uint8 and labels.shape == logits[:, 0].shape
    assert (labels == logits.argmax(1)).float().mean() > 0.9999


@pytest.mark.parametrize("width", [4, 128])
@pytest.mark.parametrize("products", [False, True])
def test_logits_are_the_same_with_any_statistics(width, products):
    """Batch norms that are far from their start, of both signs."""
    torch.manual_seed(0)
    network = LEDNet(5, width).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.3, 3)
    images = torch.rand(2, 3, 72, 100)
    logits = network(images)
    assert logits.std() > 1e-3
    assert relative(Deployed(network, products=products)(images), logits) < 1e-4


@pytest.mark.parametrize(("dtype", "share"), [(torch.float16, 0.999), (torch.bfloat16, 0.99)])
@pytest.mark.parametrize("form", ["copies", "products", "labels", "plain"])
def test_half_precision_agrees_on_labels(network, form, dtype, share):
    images = street_scenes(2, (256, 512))
    labels = network(images).argmax(1)
    assert len(labels.unique()) >= 5
    if form == "plain":
        outputs = InPrecision(network, dtype)(images)
    else:
        half = Deployed(network, labels=form == "labels", products=form != "copies").to(dtype)
        outputs = half(images)
    assert outputs.dtype == (torch.uint8 if form == "labels" else torch.float32)
    predicted = outputs if form == "labels" else outputs.argmax(1)
    assert (predicted == labels).float().mean() >= share
    assert next(network.parameters()).dtype == torch.float32, "the network stays as it is"


def test_nothing_of_training_is_left(network):
    before = copy.deepcopy(network.state_dict())
    deployed = deploy(network, compiled=False)
    assert not any(isinstance(m, nn.BatchNorm2d | nn.Dropout2d) for m in deployed.modules())
    assert not deployed.training and not any(p.requires_grad for p in deployed.parameters())
    for weight in deployed.parameters():
        weight.zero_()
    assert all(torch.equal(before[name], w) for name, w in network.state_dict().items())


def test_compiled_is_the_same_network():
    """With one block in each stage: more only take longer to compile."""
    network, layers = LEDNet(5, 4).eval(), []
    for layer, block in pairwise(network.encoder):
        layers += [layer, block] if isinstance(layer, Downsampler) else []
    network.encoder = nn.Sequential(*layers)
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = network(images)
    logits = deploy(network)(images)
    assert relative(logits, expected) < 1e-4
    assert logits.is_inference(), "without inference mode, the weights are not frozen"


def test_shuffling_halves_by_copying_keeps_channels_last():
    halves = [torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last) for _ in "lr"]
    shuffled = Shuffle()(*halves)
    assert torch.equal(torch.cat(shuffled, 1), F.channel_shuffle(torch.cat(halves, 1), groups=2))
    assert all(half.is_contiguous(memory_format=torch.channels_last) for half in shuffled)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 5), (9, 65), (64, 512)])
def test_interpolation_is_a_matrix(old, new):
    x = torch.randn(2, 3, old, 7)
    matrix = interpolation(old, new, x)
    assert torch.allclose(matrix.sum(1), torch.ones(new), atol=1e-4)
    expected = F.interpolate(x, (new, 7), mode="bilinear", align_corners=True)
    assert torch.allclose(matrix @ x, expected, atol=1e-4)
    assert torch.equal(upsample(x, expected), expected)
