import re
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import onnx
import pytest
import torch
from conftest import CAMVID_WEIGHTS, run_script, street_scenes
from onnx import numpy_helper
from PIL import Image
from torchvision.utils import save_image

from utils.checkpoint import load_network
from utils.onnx import METADATA, OnnxNetwork


@pytest.fixture(scope="module")
def quantized(camvid, tmp_path_factory):
    """The folder with the shipped network of CamVid in int8.onnx, and what the tool printed.

    It is calibrated on drawn streets, as the labels of one are compared below.
    """
    folder, out = tmp_path_factory.mktemp("quantized"), StringIO()
    data = Path(shutil.copytree(camvid, tmp_path_factory.mktemp("data") / "streets"))
    for part in ("train", "trainannot"):
        shutil.rmtree(data / part)
        (data / part).mkdir()
    for number, scene in enumerate(street_scenes(9, (180, 240))[1:]):
        save_image(scene, data / f"train/{number}.png")
        Image.new("L", (240, 180)).save(data / f"trainannot/{number}.png")
    with redirect_stdout(out):
        argv = ("--checkpoint", CAMVID_WEIGHTS, "--datadir", data, "--labels")
        assert run_script("tools/quantize.py", *argv, "--output", folder / "int8.onnx") == 0
    return folder, out.getvalue()


def test_integers_score_as_floats(quantized):
    folder, out = quantized
    rows = re.findall(r"^(\w+) +[\d.]+ ms, +([\d.]+) % mIoU on val", out, re.MULTILINE)
    assert [name for name, _ in rows] == ["float32", "int8"]
    scores = [float(score) for _, score in rows]
    assert scores[1] == pytest.approx(scores[0], abs=3)  # of images that no network has seen
    assert [path.name for path in folder.iterdir()] == ["int8.onnx"]


def test_integers_give_the_labels_of_floats(quantized):
    network, _ = load_network(CAMVID_WEIGHTS)
    images = street_scenes(1, (180, 240))
    with torch.inference_mode():
        truth = network(images).argmax(1)
    labels = OnnxNetwork(quantized[0] / "int8.onnx")(images)
    assert labels.dtype == torch.uint8 and 0.97 < (labels == truth).float().mean() < 1


def test_sums_of_two_products_fit_16_bits(quantized):
    """CPUs without VNNI add unsigned activations times signed weights in pairs, and saturate."""
    model = onnx.load(quantized[0] / "int8.onnx")
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) > 100
    arrays = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    weights = [array.astype(int) for array in arrays if array.dtype == "int8" and array.ndim == 4]
    assert len(weights) > 100
    assert 2 * 255 * max(abs(array).max() for array in weights) < 2**15


def test_the_model_explains_itself(quantized):
    model = onnx.load(quantized[0] / "int8.onnx")
    assert set(METADATA) <= {entry.key for entry in model.metadata_props}


def test_disagreement_is_reported(quantized):
    agreement = float(re.search(r"int8 gives ([\d.]+) % of the labels of float32", quantized[1])[1])
    assert 90 < agreement < 100
    assert ("warning: less than 99 %" in quantized[1]) == (agreement < 99)


def test_wrong_paths(fails, camvid, tmp_path):
    (tmp_path / "int8.onnx").touch()
    argv = ("tools/quantize.py", "--datadir", camvid, "--output")
    assert "int8.onnx exists: name a new file" in fails(*argv, "int8.onnx")
    assert "no is not a folder" in fails(*argv, "no/int8.onnx")
    assert "nowhere does not exist" in fails(*argv[:1], "--datadir", "nowhere", *argv[3:], "a.onnx")
