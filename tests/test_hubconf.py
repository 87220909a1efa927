import copy
import io
import subprocess
import sys

import pytest
import torch
from conftest import CAMVID_WEIGHTS, CITYSCAPES_WEIGHTS, ROOT

from utils.checkpoint import load_network


def load(**options):
    return torch.hub.load(str(ROOT), "lednet", source="local", **options)


def test_the_shipped_network():
    network = load(pretrained=True)
    image = torch.rand(1, 3, 64, 96)
    assert not network.training
    assert torch.equal(network(image), load_network(CITYSCAPES_WEIGHTS)[0](image))
    assert network(image).shape == (1, 19, 64, 96)


@pytest.mark.parametrize("width", [20, 128])
def test_the_networks_of_camvid(width):
    network, image = load(pretrained="camvid", apn_channels=width), torch.rand(1, 3, 64, 96)
    path = CAMVID_WEIGHTS.with_name(f"lednet_d{width}_camvid.pth")
    assert torch.equal(network(image), load_network(path)[0](image))
    assert network(image).shape == (1, 11, 64, 96)


def test_an_untrained_network():
    assert sum(p.numel() for p in load(apn_channels=128).parameters()) == 2_358_751
    assert load(num_classes=5)(torch.rand(2, 3, 64, 64)).shape == (2, 5, 64, 64)


def test_weights_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"lednet_d7_cityscapes\.pth, only lednet_d128_camvid"):
        load(pretrained=True, apn_channels=7)
    with pytest.raises(ValueError, match=r"weights lednet_d20_kitti\.pth, only"):
        load(pretrained="kitti")
    with pytest.raises(ValueError, match="for 19 classes, not 3"):
        load(pretrained=True, num_classes=3)


# In a process of its own: this one has imported our packages. The callers' are in their folder.
CALLER = """
import sys, torch
before = {before}
path = list(sys.path)
network = torch.hub.load({root!r}, "lednet", source="local", pretrained=True)
assert sys.path == path
left = [name for name in sys.modules if name.split(".")[0] in ("utils", "models", "datasets")]
assert sorted(left) == sorted(before), left
import datasets, models, utils.mine
assert (datasets.OWNER, models.OWNER, utils.mine.OWNER) == ("caller",) * 3
second = torch.hub.load("second", "unet", source="local")
assert second == "caller"
network(torch.rand(1, 3, 64, 64))
"""


@pytest.mark.parametrize("before", [(), ("utils", "models", "datasets")])
def test_packages_of_the_same_names_stay_the_callers_own(tmp_path, before):
    owner = "OWNER = 'caller'\n"
    for package in ("datasets", "models", "utils", "second"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(owner)
    (tmp_path / "utils/mine.py").write_text(owner)
    code = "from utils.mine import OWNER\ndef unet():\n    return OWNER\n"
    (tmp_path / "second/hubconf.py").write_text(code)
    imports = "".join(f"import {name}\n" for name in before)
    caller = imports + CALLER.format(root=str(ROOT), before=before)
    subprocess.run([sys.executable, "-c", caller], cwd=tmp_path, check=True)


def test_a_network_can_be_copied_and_pickled_where_it_was_loaded():
    network, image = load(pretrained=True), torch.rand(1, 3, 64, 96)
    assert type(load()) is type(network), "loading once more makes no other class"
    torch.save(network, io.BytesIO())
    assert torch.equal(copy.deepcopy(network)(image), network(image))
