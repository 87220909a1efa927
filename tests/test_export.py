"""The exported model computes what the network computes, and describes itself."""

import json
import sys

import onnx
import pytest
import torch
from conftest import CAMVID_WEIGHTS, full_disk, street_scenes

from utils.checkpoint import load_checkpoint, load_network, save_checkpoint
from utils.onnx import METADATA, OnnxNetwork, export_onnx

EXPORT = ("export.py", "--checkpoint", CAMVID_WEIGHTS)


@pytest.fixture(scope="module")
def networks(exported):
    """The shipped network in PyTorch, and its exported logits and labels in ONNX Runtime."""
    models = [OnnxNetwork(exported / f"{name}.onnx") for name in ("logits", "labels")]
    return load_network(CAMVID_WEIGHTS)[0], *models


@pytest.mark.parametrize("size", [(1, 360, 480), (3, 64, 64), (2, 97, 150), (1, 256, 512)], ids=str)
def test_any_size_and_batch(networks, size):
    network, exported_logits, exported_labels = networks
    images = street_scenes(size[0], size[1:])
    with torch.inference_mode():
        logits = network(images)
    result = exported_logits(images)
    assert result.shape == logits.shape and result.dtype == torch.float32
    assert (result - logits).abs().max() <= 1e-4 * logits.abs().max()
    labels = exported_labels(images)
    assert labels.shape == logits[:, 0].shape and labels.dtype == torch.uint8
    assert (labels == logits.argmax(1)).float().mean() > 0.9999


def test_one_size_computes_what_a_free_size_does(networks, exported):
    images = street_scenes(1, (96, 192))
    labels = OnnxNetwork(exported / "sized.onnx")(images)
    assert labels.dtype == torch.uint8 and (labels == networks[2](images)).float().mean() > 0.9999


def test_a_model_of_one_size_has_only_nodes_that_every_runtime_knows(exported):
    """OpenCV 4, ncnn, RKNN and TensorRT 8 fail on shapes that are computed, or on opset 18."""
    model = onnx.load(exported / "sized.onnx")
    assert {node.op_type for node in model.graph.node} == {
        *("Conv", "Relu", "Add", "Mul", "Concat", "MaxPool", "GlobalAveragePool", "MatMul"),
        *("Resize", "ArgMax", "Cast"),
    }
    shape = model.graph.input[0].type.tensor_type.shape
    assert [axis.dim_value for axis in shape.dim] == [1, 3, 96, 192]
    assert model.opset_import[0].version == 17 and model.ir_version == 8


def test_opencv_runs_a_model_of_one_size(networks, tmp_path):
    cv2 = pytest.importorskip("cv2")
    path, images = tmp_path / "sized.onnx", street_scenes(1, (97, 150))
    export_onnx(*load_network(CAMVID_WEIGHTS), path, size=(97, 150))
    network = cv2.dnn.readNetFromONNX(str(path))
    network.setInput(images.numpy())
    expected = networks[1](images)
    for result in (OnnxNetwork(path)(images), torch.from_numpy(network.forward())):
        assert (result - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["logits", "labels", "sized"])
def test_the_model_describes_itself(exported, name):
    checkpoint, model = load_checkpoint(CAMVID_WEIGHTS), onnx.load(exported / f"{name}.onnx")
    onnx.checker.check_model(model, full_check=True)
    stated = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert stated == {key: checkpoint[key] for key in METADATA}
    assert [node.name for node in model.graph.input] == ["images"]
    assert [node.name for node in model.graph.output] == [name.replace("sized", "labels")]
    assert not {"BatchNormalization", "Split"} & {node.op_type for node in model.graph.node}


def test_metadata_come_from_the_checkpoint(quick_export, tmp_path):
    content = load_checkpoint(CAMVID_WEIGHTS) | {"mean": [0.5, 0.4, 0.3], "height": 200}
    save_checkpoint(content, tmp_path / "other.pth")
    export_onnx(*load_network(tmp_path / "other.pth"), tmp_path / "other.onnx")
    model = OnnxNetwork(tmp_path / "other.onnx").session.get_modelmeta().custom_metadata_map
    assert json.loads(model["mean"]) == [0.5, 0.4, 0.3] and json.loads(model["height"]) == 200


def test_export_compares_the_model_with_pytorch(exported):
    for name, text in (("logits", "logits differ from"), ("labels", "of labels agree with")):
        printed = (exported / f"{name}.txt").read_text()
        assert printed.count(f"{text} PyTorch") == 3 and f"{name}.onnx: 4.5 MB" in printed
    assert (exported / "sized.txt").read_text().count("1 x 192x96: 100.000 % of labels") == 1
    assert len([path for path in exported.iterdir() if path.suffix == ".onnx"]) == 3


@pytest.mark.parametrize("options", [(), ("--labels",)])
def test_a_model_that_differs_is_not_kept(fails, quick_export, monkeypatch, tmp_path, options):
    forward = OnnxNetwork.forward
    monkeypatch.setattr(
        OnnxNetwork, "forward", lambda self, images: forward(self, images.flip(3) * 1.01)
    )
    assert "is not the network" in fails(*EXPORT, "--output", "l.onnx", *options)
    assert not list(tmp_path.iterdir())


def test_the_default_output_is_not_overwritten(script, fails, quick_export, tmp_path):
    assert script(*EXPORT, "--labels").status == 0
    path = tmp_path / "lednet_d20_camvid.onnx"
    before = path.read_bytes()
    assert "lednet_d20_camvid.onnx exists: name a new file" in fails(*EXPORT)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_impossible_requests_are_refused(fails, trained):
    assert "is not a folder" in fails("export.py", "--output", "no/such/l.onnx")
    assert "does not exist" in fails("export.py", "--checkpoint", "none.pth")
    assert "needs 64x64" in fails("export.py", "--size", 360, 63)
    assert "encoder alone" in fails("export.py", "--checkpoint", trained / "encoder.pth")


@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_a_full_disk_is_reported(fails, quick_export, tmp_path, size):
    with full_disk(size):
        line = fails(*EXPORT, "--output", "l.onnx")
    assert "l.onnx cannot be written (File too large); make room, or give another --output" in line
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_model(quick_export, tmp_path):
    (tmp_path / "l.onnx").write_text("old")
    with full_disk(3_000_000), pytest.raises(OSError, match=r"l\.onnx"):
        export_onnx(*load_network(CAMVID_WEIGHTS), tmp_path / "l.onnx")
    assert (tmp_path / "l.onnx").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_missing_extras_are_named(fails, quick_export, monkeypatch, tmp_path):
    def export(*args, **kwargs):
        raise ImportError("No module named 'onnxscript'")

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnxruntime" in fails(*EXPORT, "--output", "l.onnx")
    monkeypatch.setattr(torch.onnx, "export", export)
    assert "pip install onnx onnxscript onnxruntime" in fails(*EXPORT, "--output", "l.onnx")
    assert not list(tmp_path.iterdir())
