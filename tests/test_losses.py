import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from utils.losses import (
    LOSSES,
    class_weights,
    cross_entropy,
    ohem_cross_entropy,
    with_auxiliary,
)


def test_class_weights_of_cityscapes():
    """Known values of road, sidewalk and building; 11.5 % of pixels are ignored."""
    shares = [0.3265, 0.0539, 0.2020]
    rest = 1 - sum(shares) - 0.115
    counts = torch.tensor([round(1e9 * share) for share in (*shares, rest, 0.115)])
    assert class_weights(counts, 1.10)[:3].tolist() == pytest.approx(
        [2.815, 6.985, 3.789], abs=2e-3
    )
    # Those of stage 1 were computed on labels at 1/8 resolution, where building has 0.2005.
    stage_1 = class_weights(counts, 1.20)[:3].tolist()
    assert stage_1 == pytest.approx([2.365, 4.424, 2.969], rel=4e-3)
    shrunk = torch.tensor([3263, 536, 2005, 10000 - 3263 - 536 - 2005 - 1150, 1150])
    assert class_weights(shrunk, 1.20)[:3].tolist() == pytest.approx(
        [2.365, 4.424, 2.969], abs=2e-3
    )


def test_class_weights_of_an_absent_class_are_finite():
    weights = class_weights(torch.tensor([100, 0, 0]), 1.1)
    assert weights.tolist() == pytest.approx([1 / math.log(2.1), 1 / math.log(1.1)])


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 6, 5, requires_grad=True)
    labels = torch.randint(0, 4, (2, 6, 5))
    labels[0, :2] = 255
    return logits, labels, torch.tensor([1.0, 2.0, 3.0, 0.5])


def test_cross_entropy_is_torchs_weighted_mean(batch):
    logits, labels, weight = batch
    expected = F.cross_entropy(logits, labels, weight, ignore_index=255)
    assert torch.allclose(cross_entropy(logits, labels, weight), expected)


@pytest.mark.parametrize("name", ["ce", "ohem"])
def test_a_batch_without_labels_has_no_loss(batch, name):
    logits, labels, weight = batch
    loss = partial(LOSSES[name], weight=weight)(logits, torch.full_like(labels, 255))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_ohem_takes_pixels_below_the_threshold():
    # Probabilities of the true class: 0.9, 0.6, 0.2, and an ignored pixel.
    truth = torch.tensor([0.9, 0.6, 0.2, 0.1]).view(1, 1, 4)
    logits = torch.stack([truth.log(), (1 - truth).log()], dim=1)
    labels = torch.tensor([[[0, 0, 0, 255]]])
    loss = ohem_cross_entropy(logits, labels, torch.ones(2), threshold=0.7)
    assert loss.item() == pytest.approx(-(math.log(0.6) + math.log(0.2)) / 2)


def test_ohem_keeps_the_hardest_if_all_pixels_are_easy():
    truth = torch.tensor([0.99, 0.9, 0.95, 0.98]).view(1, 1, 4)
    logits = torch.stack([truth.log(), (1 - truth).log()], dim=1)
    labels = torch.zeros(1, 1, 4, dtype=torch.int64)
    loss = ohem_cross_entropy(logits, labels, torch.ones(2), threshold=0.7, min_kept=0.5)
    assert loss.item() == pytest.approx(-(math.log(0.9) + math.log(0.95)) / 2)


@pytest.mark.parametrize("ease", [0.0, 3.0, 8.0])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 0.95])
def test_ohem_follows_its_definition(ease, ignored):
    """All pixels below the threshold, but at least a share of the labelled ones."""
    torch.manual_seed(0)
    labels = torch.randint(0, 5, (2, 16, 24))
    logits = torch.randn(2, 5, 16, 24).scatter_add_(
        1, labels[:, None], torch.full((2, 1, 16, 24), ease)
    )
    labels[torch.rand(labels.shape) < ignored] = 255
    weight = torch.rand(5) + 0.5
    losses = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")[labels != 255]
    hard = (losses > -math.log(0.7)).sum().item()
    fewest = int(len(losses) / 16)
    assert (hard < fewest) == (ease == 8)
    kept = losses.sort(descending=True).indices[: max(hard, fewest)]
    weights = weight[labels[labels != 255]][kept]
    expected = (losses[kept] * weights).sum() / weights.sum()
    assert torch.allclose(ohem_cross_entropy(logits, labels, weight), expected)


@pytest.mark.parametrize("name", ["ce", "ohem"])
def test_losses_do_not_wait_for_a_gpu(batch, name):
    """Reading a value would wait, and fails for tensors on the device "meta"."""
    logits, labels, weight = (tensor.detach().to("meta") for tensor in batch)
    outputs = logits, logits[..., ::2, ::2]
    assert with_auxiliary(partial(LOSSES[name], weight=weight), 0.4)(outputs, labels).shape == ()


def test_ohem_weights_the_classes():
    truth = torch.tensor([0.5, 0.5]).view(1, 1, 2)
    logits = torch.stack([truth.log() + 1, (1 - truth).log()], dim=1)
    labels = torch.tensor([[[0, 1]]])
    weight = torch.tensor([1.0, 3.0])
    loss = ohem_cross_entropy(logits, labels, weight, threshold=1.0)
    assert torch.allclose(loss, F.cross_entropy(logits, labels, weight))


@pytest.mark.parametrize("name", ["ce", "ohem"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_full_precision(batch, name, dtype):
    logits, labels, weight = batch
    coarse, loss = logits.detach().to(dtype), partial(LOSSES[name], weight=weight)
    assert loss(coarse, labels).dtype == torch.float32
    assert torch.equal(loss(coarse, labels), loss(coarse.float(), labels))


@pytest.mark.parametrize("name", ["ce", "ohem"])
def test_an_auxiliary_head_adds_a_share_of_its_loss(batch, name):
    logits, labels, weight = batch
    auxiliary = torch.randn(2, 4, 3, 3, requires_grad=True)
    loss = partial(LOSSES[name], weight=weight)
    total = with_auxiliary(loss, 0.4)((logits, auxiliary), labels)
    # The centres of 3 x 3 blocks of 6 x 5 pixels: rows 1, 3, 5 and columns 0, 2, 4.
    smaller = labels[:, 1::2, ::2]
    assert smaller.shape == (2, 3, 3) and (smaller == 255).any()
    assert torch.allclose(total, loss(logits, labels) + 0.4 * loss(auxiliary, smaller))
    total.backward()
    assert logits.grad.abs().sum() > 0 and auxiliary.grad.abs().sum() > 0
    assert (auxiliary.grad[(smaller == 255)[:, None].expand_as(auxiliary)] == 0).all()


def test_an_auxiliary_head_of_weight_0_adds_nothing(batch):
    logits, labels, weight = batch
    loss = partial(cross_entropy, weight=weight)
    total = with_auxiliary(loss, 0.0)((logits, torch.randn(2, 4, 3, 3)), labels)
    assert torch.equal(total, loss(logits, labels))
