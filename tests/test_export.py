"""The exported model computes what the network computes, and says what a program must know."""

import json
import sys

import onnx
import pytest
import torch
from conftest import ROOT, full_disk, street_scenes

from utils.checkpoint import load_checkpoint, load_network, save_checkpoint
from utils.onnx import METADATA, OnnxNetwork, export_onnx

SHIPPED = ROOT / "weights/lednet_d20_camvid.pth"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Both models of the shipped network."""
    folder = tmp_path_factory.mktemp("onnx")
    network, checkpoint = load_network(SHIPPED)
    for labels, name in ((False, "logits.onnx"), (True, "labels.onnx")):
        export_onnx(network, checkpoint, folder / name, labels)
    return folder


@pytest.mark.parametrize("size", [(1, 360, 480), (3, 64, 64), (2, 97, 150), (1, 256, 512)], ids=str)
def test_any_size_and_batch(exported, size):
    network, _ = load_network(SHIPPED)
    images = street_scenes(size[0], size[1:])
    with torch.inference_mode():
        logits = network(images)
    result = OnnxNetwork(exported / "logits.onnx")(images)
    assert result.shape == logits.shape and result.dtype == torch.float32
    assert (result - logits).abs().max() <= 1e-4 * logits.abs().max()
    labels = OnnxNetwork(exported / "labels.onnx", threads=2)(images)
    assert labels.shape == logits[:, 0].shape and labels.dtype == torch.uint8
    assert (labels == logits.argmax(1)).float().mean() > 0.9999


def test_the_file_explains_itself(exported):
    checkpoint = load_checkpoint(SHIPPED)
    for name in ("logits", "labels"):
        model = onnx.load(exported / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        said = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
        assert said == {key: checkpoint[key] for key in METADATA}
        assert [node.name for node in model.graph.input] == ["images"]
        assert [node.name for node in model.graph.output] == [name]
        assert not {"BatchNormalization", "Split"} & {node.op_type for node in model.graph.node}


def test_script_exports_and_checks(script, fails, tmp_path):
    result = script("export.py", "--labels")
    assert result.status == 0, result.err
    assert result.out.count("of labels agree with PyTorch") == 3
    path = tmp_path / "lednet_d20_camvid.onnx"
    assert path.is_file() and len(list(tmp_path.iterdir())) == 1
    before = path.read_bytes()
    assert "lednet_d20_camvid.onnx exists" in fails("export.py")
    assert path.read_bytes() == before
    assert "is no folder to write into" in fails("export.py", "--output", "no/such/l.onnx")
    assert "does not exist" in fails("export.py", "--checkpoint", "none.pth")


def test_what_differs_is_not_kept(fails, monkeypatch, tmp_path):
    forward = OnnxNetwork.forward
    monkeypatch.setattr(OnnxNetwork, "forward", lambda self, images: 1.01 * forward(self, images))
    assert "is not the network: logits differ" in fails("export.py", "--output", "l.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_a_full_disk_is_said(fails, tmp_path, size):
    with full_disk(size):
        line = fails("export.py", "--output", "l.onnx")
    assert "l.onnx cannot be written (File too large): make room, or give another --output" in line
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "l.onnx").write_text("old")
    network, checkpoint = load_network(SHIPPED)
    with full_disk(3_000_000), pytest.raises(OSError, match=r"l\.onnx"):
        export_onnx(network, checkpoint, tmp_path / "l.onnx")
    assert (tmp_path / "l.onnx").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_without_its_extras(fails, monkeypatch, tmp_path):
    def export(*args, **kwargs):
        raise ImportError("No module named 'onnxscript'")

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnxruntime" in fails("export.py", "--output", "l.onnx")
    monkeypatch.setattr(torch.onnx, "export", export)
    assert "pip install onnx onnxscript onnxruntime" in fails("export.py", "--output", "l.onnx")
    assert not list(tmp_path.iterdir())


def test_encoders_alone_cannot_be_exported(fails, trained):
    assert "encoder alone" in fails("export.py", "--checkpoint", trained / "encoder.pth")


def test_metadata_of_another_data_set(tmp_path):
    content = load_checkpoint(SHIPPED) | {"mean": [0.5, 0.4, 0.3], "height": 200}
    save_checkpoint(content, tmp_path / "other.pth")
    export_onnx(*load_network(tmp_path / "other.pth"), tmp_path / "other.onnx")
    session = OnnxNetwork(tmp_path / "other.onnx").session
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["mean"]) == [0.5, 0.4, 0.3] and json.loads(said["height"]) == 200
