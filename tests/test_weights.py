"""The weights that ship with the code, and the tool that makes such files."""

import re

import pytest
import torch
from conftest import ROOT, same_weights

from datasets import DATASETS
from datasets.drawn.scene import draw_scene
from utils.checkpoint import load_checkpoint, load_network

SHIPPED = sorted((ROOT / "weights").glob("*.pth"))


def test_there_are_weights():
    names = {path.name for path in SHIPPED}
    expected = "lednet_d20_camvid.pth", "lednet_d20_cityscapes.pth", "lednet_d128_camvid.pth"
    assert names >= set(expected)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_weights_explain_themselves(path):
    assert path.stat().st_size < 3e6
    content = torch.load(path, map_location="cpu", weights_only=True)
    width, dataset = re.fullmatch(r"lednet_d(\d+)_(\w+)\.pth", path.name).groups()
    assert content["apn_channels"] == int(width) and content["dataset"] == dataset
    stated = DATASETS[dataset].CLASSES.to_checkpoint()
    assert {key: content.get(key) for key in stated} == stated
    assert content["mean"] == [0, 0, 0] and content["std"] == [1, 1, 1]  # as torch.hub promises
    assert not {"optimizer", "training_model", "processes"} & content.keys()
    assert "/" not in str(content["args"]), "a path of the machine that it was trained on"
    cards = (ROOT / "weights/README.md").read_text()
    card = cards.split(f"\n## {path.name}\n")[1].split("\n## ")[0]
    assert re.search(rf"(?<![\d.]){content['epoch']} epochs?\b", card)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_weights_segment_a_drawn_street(path):
    import numpy as np

    scene = draw_scene(np.random.default_rng(7), 256)
    image = torch.from_numpy(scene.image).permute(2, 0, 1)[None].float() / 255
    maps = []
    for _ in range(2):
        network, _ = load_network(path)
        with torch.inference_mode():
            maps.append(network(image).argmax(1)[0])
    assert torch.equal(*maps)
    assert len(maps[0].unique()) >= 4


@pytest.mark.parametrize("bits", [16, 8])
def test_a_run_becomes_a_file_that_ships(script, fails, trained, tmp_path, bits):
    argv = ("tools/ship_weights.py", "--checkpoint", trained / "last.pth", "--output", "w.pth")
    assert script(*argv, "--bits", bits).status == 0
    stored, whole = load_checkpoint(tmp_path / "w.pth"), load_checkpoint(trained / "last.pth")
    assert not {"optimizer", "processes", "training_model"} & stored.keys()
    whole_size = (trained / "last.pth").stat().st_size
    assert (tmp_path / "w.pth").stat().st_size < bits / 16 * 0.3 * whole_size
    assert "/" not in str(stored["args"]) and stored["args"]["epochs"] == 1
    large = torch.float16 if bits == 16 else torch.float8_e4m3fn
    expected = {
        name: weight.to(large if weight.numel() >= 10_000 else torch.float16)
        if weight.is_floating_point()
        else weight
        for name, weight in whole["model"].items()
    }
    assert same_weights(stored["model"], expected)
    network, _ = load_network(tmp_path / "w.pth")
    assert all(weight.dtype == torch.float32 for weight in network.parameters())
    assert "w.pth exists" in fails(*argv)
