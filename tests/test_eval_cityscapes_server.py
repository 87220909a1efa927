import argparse
import json
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
from conftest import CAMVID_WEIGHTS, full_disk, run_script
from PIL import Image

import eval_cityscapes_server
from datasets.cityscapes import Cityscapes
from models.lednet import LEDNet
from utils import speed
from utils.checkpoint import load_checkpoint, save_checkpoint

EVAL = "eval_cityscapes_server.py"


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    timing = partial(speed.measure_latency, passes=2, warmup=0)
    monkeypatch.setattr(speed, "measure_latency", timing)


@pytest.fixture
def evaluate(script, street_network, cityscapes, tmp_path):
    """Score a network; return what it printed, its figures and its label maps by name."""

    def run(*options, checkpoint=street_network, datadir=cityscapes, name="results"):
        folder, file = tmp_path / name, tmp_path / f"{name}.json"
        argv = ("--checkpoint", checkpoint, "--datadir", datadir, *options)
        result = script(EVAL, *argv, "--save-results", folder, "--json", file)
        assert result.status == 0, result.err
        maps = {path.name: np.array(Image.open(path)) for path in folder.rglob("*.png")}
        return result.out, json.loads(file.read_text()), maps

    return run


@pytest.fixture
def refused(fails, street_network, cityscapes):
    """Score a network with something that ends it in one line; return the line."""

    def run(*options, checkpoint=street_network, datadir=cityscapes):
        return fails(EVAL, "--checkpoint", checkpoint, "--datadir", datadir, *options)

    return run


@pytest.mark.parametrize("height", [64, 80])
def test_scores_agree_with_the_official_evaluation(
    evaluate, cityscapes_copy, tmp_path, monkeypatch, height
):
    truths = sorted(map(str, (cityscapes_copy / "gtFine/val").rglob("*_gtFine_labelIds.png")))
    for truth in truths:  # without a train, which the network never predicts either
        ids = np.array(Image.open(truth))
        ids[ids == 31] = 7
        Image.fromarray(ids).save(truth)
    options = ("--height", height, "--batch-size", 2)
    printed, figures, maps = evaluate(*options, datadir=cityscapes_copy)
    assert (figures["input_height"], figures["input_width"]) == (height, 2 * height)

    monkeypatch.setattr(official.args, "predictionPath", str(tmp_path / "results"))
    monkeypatch.setattr(official.args, "predictionWalk", None)
    monkeypatch.setattr(official.args, "quiet", True)
    monkeypatch.setattr(official.args, "JSONOutput", False)
    # Its instance scores need an older numpy; class and category IoU do not depend on them.
    monkeypatch.setattr(official.args, "evalInstLevelScore", False)
    predictions = [official.getPrediction(official.args, truth) for truth in truths]
    scores = official.evaluateImgLists(predictions, truths, official.args)

    assert figures["class_miou"] == pytest.approx(scores["averageScoreClasses"], abs=1e-12)
    assert figures["category_miou"] == pytest.approx(scores["averageScoreCategories"], abs=1e-12)
    assert figures["class_iou"].pop("train") is None and np.isnan(scores["classScores"]["train"])
    for name, iou in figures["class_iou"].items():
        assert iou == pytest.approx(scores["classScores"][name], abs=1e-12)
    assert sum(iou > 0 for iou in figures["class_iou"].values()) >= 3
    assert f"class mIoU      {100 * figures['class_miou']:6.2f} %" in printed
    assert all(labels.shape == (64, 128) for labels in maps.values())
    assert np.isin(np.stack([*maps.values()]), Cityscapes.CLASSES.label_ids).all()


def test_score_is_that_of_training(evaluate, trained):
    _, figures, _ = evaluate(checkpoint=trained / "best.pth")
    best = load_checkpoint(trained / "best.pth")["best"]
    assert figures["class_miou"] == pytest.approx(best["miou"], abs=1e-3)
    assert figures["images"] == 3 and figures["subset"] == "val"


@pytest.fixture(scope="module")
def learned(cityscapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "learned"
    argv = ("--datadir", cityscapes, "--height", 64, "--batch-size", 3, "--workers", 0)
    recipe = ("--decoder", "--epochs", 40, "--lr", 5e-3, "--val-every", 40)
    assert run_script("main.py", *argv, *recipe, "--savedir", folder) == 0
    return folder / "best.pth"


def test_training_learns_its_images(evaluate, learned):
    _, figures, _ = evaluate("--subset", "train", checkpoint=learned)
    assert figures["images"] == 6
    assert figures["class_iou"]["road"] > 0.6 and figures["class_iou"]["sky"] > 0.5
    assert figures["class_miou"] > 0.1  # one class everywhere: 0.03 at most


@pytest.mark.parametrize(
    ("options", "ran", "tolerance", "agreement"),
    [
        (("--runtime", "compiled"), "Deployed", 1e-4, 0.999),
        (("--runtime", "onnx"), "OnnxNetwork", 1e-4, 0.999),
        (("--runtime", "openvino"), "OpenVinoNetwork", 1e-4, 0.999),
        (("--precision", "bfloat16"), "InPrecision", 0.02, 0.95),
        (("--batch-size", 2), "LEDNet", 1e-4, 0.999),  # and so a last batch of 1
    ],
    ids=["compiled", "onnx", "openvino", "bfloat16", "batches"],
)
def test_runtimes_score_the_same(
    request, evaluate, camvid, monkeypatch, options, ran, tolerance, agreement
):
    if {"onnx", "openvino"} & {*options}:
        request.getfixturevalue("quick_export")
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    timed = []
    monkeypatch.setattr(
        speed,
        "measure_latency",
        lambda model, size: timed.append(model) or speed.Latency(1, 1, 1, 1),
    )
    shipped = {"checkpoint": CAMVID_WEIGHTS, "datadir": camvid}
    _, plain, expected = evaluate("--height", 72, **shipped, name="plain")
    _, other, maps = evaluate("--height", 72, *options, **shipped, name="other")
    assert ran in [type(module).__name__ for module in timed[1].modules()][:2]
    assert (plain["runtime"], plain["precision"]) == ("torch", "float32")
    assert options[1] in (other["runtime"], other["precision"], 2)
    assert other["class_miou"] == pytest.approx(plain["class_miou"], abs=tolerance)
    assert other["parameters"] == plain["parameters"]
    assert len(expected) == 3 and maps.keys() == expected.keys()
    assert len(np.unique(np.stack([*expected.values()]))) > 3
    assert np.mean([(maps[name] == labels).mean() for name, labels in expected.items()]) > agreement


def eager_compiler(compiled: list, monkeypatch) -> Callable:
    """Let torch.compile trace alone, and note each compilation."""

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable:
        compiled.append(graph)
        return graph.forward

    compile_with = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **_: compile_with(model, backend=backend, dynamic=False)
    )
    return torch.compile


def test_what_is_scored_and_timed_is_compiled_once(evaluate, camvid, monkeypatch):
    compiled = []
    eager_compiler(compiled, monkeypatch)
    evaluate("--height", 72, "--runtime", "compiled", checkpoint=CAMVID_WEIGHTS, datadir=camvid)
    assert len(compiled) == 1


@torch._dynamo.config.patch(recompile_limit=8)
def test_every_size_of_image_is_compiled(monkeypatch):
    """Not only eight."""
    compiled = []
    compile_eagerly = eager_compiler(compiled, monkeypatch)
    monkeypatch.setattr(eval_cityscapes_server, "deploy", lambda model, **_: compile_eagerly(model))
    args = argparse.Namespace(runtime="compiled", precision="float32")
    model = eval_cityscapes_server.on_runtime(torch.nn.Conv2d(3, 2, 1), args)
    for width in range(64, 84):
        model(torch.zeros(1, 3, 64, width))
    assert len(compiled) == 20


def test_subset_test_writes_pngs_but_has_no_scores(evaluate, cityscapes, tmp_path):
    printed, figures, _ = evaluate("--subset", "test")
    assert "test has no labels" in printed and "mIoU" not in printed
    assert "FPS at 128x64" in printed and "class_miou" not in figures
    images = sorted((cityscapes / "leftImg8bit/test").rglob("*.png"))
    written = sorted((tmp_path / "results").rglob("*.png"))
    assert [(p.parent.name, p.name) for p in written] == [
        (p.parent.name, p.name.replace("_leftImg8bit", "_pred_labelIds")) for p in images
    ]


def test_coarse_labels_are_a_split_of_their_own(evaluate, refused):
    assert "scoring 3 images of val_coarse" in evaluate("--subset", "val_coarse")[0]
    assert "cityscapes has no split trainval, only train, val" in refused("--subset", "trainval")


@pytest.mark.parametrize(("width", "parameters"), [(20, 951_835), (128, 2_358_751)])
def test_size_and_speed_without_a_checkpoint(script, tmp_path, width, parameters):
    result = script(EVAL, "--D", width, "--height", 64, "--json", "f.json", "--device", "cpu")
    assert result.status == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["parameters"] == parameters and figures["encoder_parameters"] == 911_436
    assert figures["decoder_parameters"] == parameters - 911_436
    assert figures["fps"] > 0 and figures["p95_ms"] >= figures["median_ms"] > 0
    assert figures["multiply_adds"] > 0 and figures["input_width"] == 128
    assert f"{parameters:,}" in result.out and "multiply-adds" in result.out


def test_unsuitable_checkpoints_are_refused(refused, trained, street_network, tmp_path):
    line = refused(checkpoint=trained / "encoder.pth")
    assert "encoder alone" in line and "main.py --pretrained-encoder" in line
    assert "does not exist" in refused(checkpoint="none.pth")
    (tmp_path / "cut.pth").write_bytes(street_network.read_bytes()[:-100])
    assert "not a checkpoint" in refused(checkpoint=tmp_path / "cut.pth")
    assert "has D = 20: leave --D out" in refused("--apn-channels", 128)
    save_checkpoint(load_checkpoint(street_network) | {"dataset": "moon"}, tmp_path / "moon.pth")
    assert "was trained on moon, which is not in" in refused(checkpoint=tmp_path / "moon.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--height", 0), "--height: 0 is not a positive whole number"),
        (("--height", 20), "--height 20 is too small: LEDNet needs 64x64"),
        (("--datadir", "nowhere"), "needs --checkpoint"),
        (("--datadir", ""), "the path is empty"),
        (("--json", ""), "the path is empty"),
        (("--save-results", "out"), "needs --checkpoint and --datadir"),
        (("--device", "cuda:99"), "cannot be used here"),
        (("--runtime", "onnx", "--precision", "float16"), "computes in float32"),
        (("--runtime", "openvino", "--precision", "float16"), "in float32 or bfloat16"),
        (("--runtime", "openvino", "--model", "none.onnx"), "cannot be read as an ONNX model"),
        (("--model", "int8.onnx"), "--model needs --runtime openvino"),
        (("--threads", 0), "--threads: 0 is not a positive whole number"),
        (("--json", "no/such/folder/f.json"), "no/such/folder is not a folder"),
    ],
)
def test_impossible_options_are_refused(fails, options, message):
    assert message in fails(EVAL, *options)


def test_the_model_given_is_scored(evaluate, exported, camvid, monkeypatch):
    """In place of the checkpoint, which is another network here."""
    options = ("--runtime", "openvino", "--model", exported / "logits.onnx", "--height", 72)
    _, plain, expected = evaluate(
        "--height", 72, checkpoint=CAMVID_WEIGHTS, datadir=camvid, name="plain"
    )
    changed = load_checkpoint(CAMVID_WEIGHTS)
    changed["model"]["decoder.classifier.bias"] += torch.arange(11.0)
    save_checkpoint(changed, "changed.pth")
    printed, other, maps = evaluate(*options, checkpoint="changed.pth", datadir=camvid)
    assert other["class_miou"] == pytest.approx(plain["class_miou"], abs=1e-4)
    assert f"float32, openvino with {exported / 'logits.onnx'}, on " in printed
    assert all((maps[name] == labels).mean() > 0.999 for name, labels in expected.items())


def test_a_data_set_with_a_missing_label_is_refused(refused, cityscapes_copy):
    label = next((cityscapes_copy / "gtFine/val").rglob("*labelIds.png"))
    label.unlink()
    assert label.name in refused(datadir=cityscapes_copy)


def test_a_damaged_image_is_named_before_anything_is_scored(refused, cityscapes_copy):
    image = next((cityscapes_copy / "leftImg8bit/val").rglob("*.png"))
    image.write_bytes(image.read_bytes()[:-100])
    line = refused("--save-results", "out", datadir=cityscapes_copy)
    assert image.name in line and "tools/check_dataset.py lists them all" in line


def test_existing_results_are_not_overwritten(refused, tmp_path):
    (tmp_path / "out").mkdir()
    for path in (tmp_path / "out/old.png", tmp_path / "f.json"):
        path.write_text("precious")
    assert "out is not empty" in refused("--save-results", "out")
    assert "f.json exists" in refused("--json", "f.json")
    assert (tmp_path / "f.json").read_text() == "precious"


def test_pngs_that_cannot_be_encoded_are_reported(refused, monkeypatch):
    def broken(file, prediction, classes):
        raise OSError("encoder error -2 when writing image file")

    monkeypatch.setattr("datasets.segmentation.write_label", broken)
    line = refused("--save-results", "out")
    assert "3 label PNGs are missing: a result cannot be saved (encoder" in line


@pytest.mark.parametrize("option", ["--json", "--save-results"])
def test_a_full_disk_is_reported(refused, tmp_path, option):
    with full_disk(80):
        line = refused(option, "out")
    assert "/" * (option != "--json") in line and "out" in line
    assert "cannot be written (File too large); make room, or give another --save-results" in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["../../out.png", "/out.png", "../out.png"])
def test_results_stay_in_their_folder(refused, tmp_path, monkeypatch, name):
    if name.startswith("/"):
        name = f"{tmp_path}{name}"
    monkeypatch.setattr(Cityscapes, "result_name", lambda self, index: name)
    assert "leads out of a/b" in refused("--save-results", "a/b")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_batches_have_the_size_asked_for(evaluate, monkeypatch):
    shapes, forward = [], LEDNet.forward
    monkeypatch.setattr(
        LEDNet, "forward", lambda self, images: shapes.append(images.shape) or forward(self, images)
    )
    evaluate("--batch-size", 2, "--height", 80)
    counts = [2, 2, 2, 2, 1]  # of warming up, and of the 3 images
    assert shapes[:5] == [(count, 3, 80, 160) for count in counts]


def test_workers_change_nothing(evaluate):
    _, alone, maps = evaluate("--workers", 0, name="a")
    _, together, other = evaluate("--num-workers", 2, name="b")
    assert alone["class_iou"] == together["class_iou"]
    assert all((maps[name] == other[name]).all() for name in maps)
