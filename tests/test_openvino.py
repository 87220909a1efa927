"""The exported network in OpenVINO."""

import sys

import openvino
import pytest
import torch
from conftest import CAMVID_WEIGHTS, NEEDS_BFLOAT16, street_scenes

from utils.checkpoint import load_network
from utils.errors import UserError
from utils.onnx import MissingExtra, OnnxNetwork, quantize
from utils.openvino import OpenVinoNetwork, check_openvino, in_openvino

# With the logits upsampled in bfloat16, 97.9 % of the labels would be the same at 480x360.
HALF = pytest.param(torch.bfloat16, 0.99, marks=NEEDS_BFLOAT16)
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "agreement"), [pytest.param(torch.float32, 0.9999), HALF], ids=["float32", "bfloat16"]
)


@PRECISIONS
@pytest.mark.parametrize("size", [(1, 360, 480), (2, 97, 150)], ids=str)
def test_labels_are_those_of_the_network(exported, size, dtype, agreement):
    images = street_scenes(size[0], size[1:])
    with torch.inference_mode():
        logits = load_network(CAMVID_WEIGHTS)[0](images)
    result = OpenVinoNetwork(exported / "logits.onnx", dtype)(images)
    assert result.shape == logits.shape and result.dtype == torch.float32
    assert (result.argmax(1) == logits.argmax(1)).float().mean() > agreement
    labels = OpenVinoNetwork(exported / "labels.onnx", dtype)(images)
    assert labels.dtype == torch.uint8 and (labels == result.argmax(1)).float().mean() > 0.9999


@PRECISIONS
def test_integers_stay_integers(exported, tmp_path, dtype, agreement):
    """They are rounded elsewhere than in ONNX Runtime, since other steps are fused."""
    images = street_scenes(3, (180, 240))
    quantize(exported / "logits.onnx", tmp_path / "int8.onnx", images.split(1))
    model = in_openvino(load_network(CAMVID_WEIGHTS)[0], dtype, tmp_path / "int8.onnx")
    expected = OnnxNetwork(tmp_path / "int8.onnx")(images)
    assert 0.95 < (model(images).argmax(1) == expected.argmax(1)).float().mean() < 1
    steps = [op.get_rt_info()["runtimePrecision"].astype(str) for op in convolutions(model)]
    assert steps.count("i8") + steps.count("u8") > 100


@PRECISIONS
def test_convolutions_have_the_precision_asked_for(exported, dtype, agreement):
    model = OpenVinoNetwork(exported / "logits.onnx", dtype)
    name = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    steps = {op.get_rt_info()["runtimePrecision"].astype(str) for op in convolutions(model)}
    assert steps == {name}
    last = {op.get_rt_info()["runtimePrecision"].astype(str) for op in steps_of(model.parts[1])}
    assert "bf16" not in last


def steps_of(part):
    return part.get_runtime_model().get_ops()


def convolutions(model):
    return [
        op
        for op in steps_of(model.parts[0])
        if op.get_rt_info()["layerType"].astype(str) == "Convolution"
    ]


def test_it_takes_as_many_threads_as_torch(exported):
    model = OpenVinoNetwork(exported / "logits.onnx")
    for part in model.parts:
        assert part.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads() == 1


def test_what_cannot_be_computed_is_refused(monkeypatch):
    with pytest.raises(UserError, match="in float32 or bfloat16"):
        check_openvino(torch.float16)
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    check_openvino(torch.float32)
    with pytest.raises(UserError, match="this CPU has no bfloat16"):
        check_openvino(torch.bfloat16)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match="pip install openvino"):
        check_openvino(torch.float32)


def test_other_models_are_refused(exported, tmp_path):
    network, _ = load_network(CAMVID_WEIGHTS)
    (tmp_path / "text.onnx").write_text("hello")
    for path in (tmp_path / "text.onnx", tmp_path / "none.onnx"):
        with pytest.raises(UserError, match="cannot be read as an ONNX model"):
            in_openvino(network, torch.float32, path)
    for name in ("labels", "sized"):
        with pytest.raises(UserError, match="does not give logits of 11 classes"):
            in_openvino(network, torch.float32, exported / f"{name}.onnx")
