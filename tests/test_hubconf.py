import pytest
import torch
from conftest import ROOT


def load(**options):
    return torch.hub.load(str(ROOT), "lednet", source="local", **options)


def test_the_shipped_network():
    network = load(pretrained=True)
    assert not network.training
    assert network(torch.rand(1, 3, 64, 96)).shape == (1, 11, 64, 96)


def test_an_untrained_network():
    assert sum(p.numel() for p in load(apn_channels=128).parameters()) == 2_358_751
    assert load(num_classes=5)(torch.rand(2, 3, 64, 64)).shape == (2, 5, 64, 64)


def test_weights_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"apn_channels=7, only lednet_d20_camvid\.pth"):
        load(pretrained=True, apn_channels=7)
    with pytest.raises(ValueError, match="for 11 classes, not 3"):
        load(pretrained=True, num_classes=3)
