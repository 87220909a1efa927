import re

import onnx
import pytest
import torch
from conftest import street_scenes

from utils.onnx import METADATA, OnnxNetwork


def test_integers_say_what_floats_say(script, fails, camvid, tmp_path):
    """Over the drawn CamVid, with the shipped network, as labels."""
    argv = ("tools/quantize.py", "--datadir", camvid, "--output")
    result = script(*argv, "int8.onnx", "--labels")
    assert result.status == 0, result.err
    rows = re.findall(r"ONNX Runtime, (\w+) +([\d.]+) ms, +([\d.]+) % mIoU on val", result.out)
    assert [name for name, _, _ in rows] == ["float32", "int8"]
    scores = [float(score) for _, _, score in rows]
    assert scores[1] == pytest.approx(scores[0], abs=3)
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]

    model = onnx.load(tmp_path / "int8.onnx")
    assert set(METADATA) <= {entry.key for entry in model.metadata_props}
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) > 100
    assert script("export.py", "--labels", "--output", "float32.onnx").status == 0
    images = street_scenes(1, (180, 240))
    labels, truth = (OnnxNetwork(tmp_path / f"{name}.onnx")(images) for name in ("int8", "float32"))
    assert labels.dtype == torch.uint8 and 0.9 < (labels == truth).float().mean() < 1

    assert "int8.onnx must be a new file" in fails(*argv, "int8.onnx")
    assert "in a folder that exists" in fails(*argv, "no/int8.onnx")
    assert "nowhere does not exist" in fails(*argv[:1], "--datadir", "nowhere", *argv[3:], "a.onnx")
