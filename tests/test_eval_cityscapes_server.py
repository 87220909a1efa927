import json

import numpy as np
import pytest
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
from conftest import full_disk, run_script
from PIL import Image

from datasets.cityscapes import Cityscapes
from models.lednet import LEDNet
from utils.checkpoint import load_checkpoint, save_checkpoint

EVAL = "eval_cityscapes_server.py"


@pytest.fixture(scope="module")
def checkpoint(cityscapes, tmp_path_factory):
    """A network that was trained for long enough to know some classes."""
    folder = tmp_path_factory.mktemp("runs") / "fitted"
    argv = ("--datadir", cityscapes, "--height", 64, "--batch-size", 3, "--workers", 0)
    recipe = ("--decoder", "--epochs", 40, "--lr", 5e-3, "--val-every", 40)
    assert run_script("main.py", *argv, *recipe, "--savedir", folder) == 0
    return folder / "best.pth"


def test_training_learns_its_images(script, checkpoint, cityscapes, tmp_path):
    argv = ("--checkpoint", checkpoint, "--datadir", cityscapes, "--subset", "train")
    assert script(EVAL, *argv, "--json", "f.json").status == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["images"] == 6
    assert figures["class_iou"]["road"] > 0.6 and figures["class_iou"]["sky"] > 0.5
    assert figures["class_miou"] > 0.1  # one class everywhere: 0.03 at most


@pytest.mark.parametrize("height", [64, 80])
def test_scores_agree_with_the_official_evaluation(
    script, cityscapes, checkpoint, tmp_path, monkeypatch, height
):
    result = script(
        *(EVAL, "--checkpoint", checkpoint, "--datadir", cityscapes, "--height", height),
        *("--save-results", "results", "--json", "figures.json", "--batch-size", 2),
    )
    assert result.status == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["input_height"], figures["input_width"]) == (height, 2 * height)

    truths = sorted((cityscapes / "gtFine/val").rglob("*_gtFine_labelIds.png"))
    monkeypatch.setattr(official.args, "predictionPath", str(tmp_path / "results"))
    monkeypatch.setattr(official.args, "predictionWalk", None)
    monkeypatch.setattr(official.args, "quiet", True)
    monkeypatch.setattr(official.args, "JSONOutput", False)
    # Its instance scores need an older numpy; class and category IoU do not depend on them.
    monkeypatch.setattr(official.args, "evalInstLevelScore", False)
    predictions = [official.getPrediction(official.args, str(truth)) for truth in truths]
    for prediction in predictions:
        with Image.open(prediction) as label:
            assert label.size == (128, 64) and label.mode == "L"
            assert np.isin(np.array(label), Cityscapes.CLASSES.label_ids).all()
    scores = official.evaluateImgLists(predictions, [str(t) for t in truths], official.args)

    assert figures["class_miou"] == pytest.approx(scores["averageScoreClasses"], abs=1e-12)
    assert figures["category_miou"] == pytest.approx(scores["averageScoreCategories"], abs=1e-12)
    for name, iou in figures["class_iou"].items():
        expected = scores["classScores"][name]
        assert iou is None if np.isnan(expected) else iou == pytest.approx(expected, abs=1e-12)
    assert sum(iou is not None and iou > 0 for iou in figures["class_iou"].values()) >= 3
    assert f"class mIoU      {100 * figures['class_miou']:6.2f} %" in result.out


def test_score_is_that_of_training(script, trained, cityscapes, tmp_path):
    argv = ("--checkpoint", trained / "best.pth", "--datadir", cityscapes, "--json", "f.json")
    assert script(EVAL, *argv).status == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    best = load_checkpoint(trained / "best.pth")["best"]
    assert figures["class_miou"] == pytest.approx(best["miou"], abs=1e-3)
    assert figures["images"] == 3 and figures["subset"] == "val"


@pytest.mark.parametrize(
    "options",
    [
        ("--runtime", "compiled"),
        ("--runtime", "onnx"),
        ("--precision", "bfloat16"),
        ("--batch-size", 2),  # and so a last batch of 1
    ],
    ids=lambda options: options[1],
)
def test_runtimes_score_the_same(script, checkpoint, cityscapes, tmp_path, options):
    argv = ("--checkpoint", checkpoint, "--datadir", cityscapes, "--save-results")
    assert script(EVAL, *argv, "a", "--json", "a.json").status == 0
    result = script(EVAL, *argv, "b", "--json", "b.json", *options)
    assert result.status == 0, result.err
    plain, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert (plain["runtime"], plain["precision"]) == ("torch", "float32")
    assert options[1] in (other["runtime"], other["precision"], 2)
    tolerance = 0.02 if "bfloat16" in options else 1e-4
    assert other["class_miou"] == pytest.approx(plain["class_miou"], abs=tolerance)
    assert other["parameters"] == plain["parameters"] and other["fps"] > 0
    names = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png")]
    assert len(names) == 3
    pairs = [[np.array(Image.open(tmp_path / x / name)) for x in "ab"] for name in names]
    assert np.mean([(a == b).mean() for a, b in pairs]) > (0.95 if "bfloat16" in options else 0.999)


def test_subset_test_writes_pngs_and_says_there_are_no_labels(
    script, checkpoint, cityscapes, tmp_path
):
    argv = ("--checkpoint", checkpoint, "--datadir", cityscapes, "--subset", "test")
    result = script(EVAL, *argv, "--save-results", "out", "--json", "f.json")
    assert result.status == 0
    assert "test: there are no labels" in result.out and "mIoU" not in result.out
    assert "FPS at 128x64" in result.out
    images = sorted((cityscapes / "leftImg8bit/test").rglob("*.png"))
    written = sorted((tmp_path / "out").rglob("*.png"))
    assert [p.name for p in written] == [
        p.name.replace("_leftImg8bit", "_pred_labelIds") for p in images
    ]
    assert [p.parent.name for p in written] == [p.parent.name for p in images]
    assert "class_miou" not in json.loads((tmp_path / "f.json").read_text())


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


def test_checkpoints_of_something_else(fails, trained, checkpoint, cityscapes, tmp_path):
    data = ("--datadir", cityscapes)
    assert "encoder alone" in fails(EVAL, "--checkpoint", trained / "encoder.pth", *data)
    assert "does not exist" in fails(EVAL, "--checkpoint", "none.pth", *data)
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:-100])
    assert "not a checkpoint" in fails(EVAL, "--checkpoint", tmp_path / "cut.pth", *data)
    line = fails(EVAL, "--checkpoint", checkpoint, *data, "--apn-channels", 128)
    assert "was trained with --apn-channels 20, not 128" in line

    content = load_checkpoint(checkpoint)
    content |= {"class_names": ["sky", "road"], "num_classes": 2, "dataset": "fields"}
    for name in ("weight", "bias"):
        key = f"decoder.classifier.{name}"
        content["model"][key] = content["model"][key][:2].clone()
    save_checkpoint(content, tmp_path / "two.pth")
    line = fails(EVAL, "--checkpoint", tmp_path / "two.pth", *data)
    assert "was trained on fields, which is none of cityscapes, synthetic, camvid" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--height", 0), "--height: 0 is not a positive whole number"),
        (("--height", 20), "LEDNet needs 64x64"),
        (("--datadir", "nowhere"), "needs --checkpoint"),
        (("--datadir", ""), "the path is empty"),
        (("--json", ""), "the path is empty"),
        (("--save-results", "out"), "needs --checkpoint and --datadir"),
        (("--device", "cuda:99"), "cannot be used here"),
        (("--runtime", "onnx", "--precision", "float16"), "computes in float32"),
        (("--json", "no/such/folder/f.json"), "no/such/folder is no folder to write into"),
    ],
)
def test_options_that_cannot_be(fails, options, message):
    assert message in fails(EVAL, *options)


def test_coarse_labels_are_scored_as_a_split_of_their_own(script, fails, checkpoint, cityscapes):
    argv = ("--checkpoint", checkpoint, "--datadir", cityscapes, "--subset")
    assert "scoring 3 images of val_coarse" in script(EVAL, *argv, "val_coarse").out
    assert "--subset trainval: cityscapes has" in fails(EVAL, *argv, "trainval")


def test_results_are_not_overwritten(fails, checkpoint, cityscapes, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.png").write_bytes(b"precious")
    argv = ("--checkpoint", checkpoint, "--datadir", cityscapes)
    assert "out is not empty" in fails(EVAL, *argv, "--save-results", "out")
    (tmp_path / "f.json").write_text("precious")
    assert "f.json exists" in fails(EVAL, *argv, "--json", "f.json")
    assert (tmp_path / "f.json").read_text() == "precious"


def test_a_damaged_data_set(fails, checkpoint, cityscapes_copy):
    argv = ("--checkpoint", checkpoint, "--datadir", cityscapes_copy)
    label = next((cityscapes_copy / "gtFine/val").rglob("*labelIds.png"))
    label.unlink()
    assert label.name in fails(EVAL, *argv)


def test_results_that_cannot_be_written_are_said(fails, checkpoint, cityscapes, monkeypatch):
    def broken(path, prediction, classes):
        raise OSError("encoder error -2 when writing image file")

    monkeypatch.setattr("datasets.segmentation.write_label", broken)
    argv = ("--checkpoint", checkpoint, "--datadir", cityscapes, "--save-results", "out")
    assert "3 label PNGs are missing: a result cannot be saved (encoder" in fails(EVAL, *argv)


@pytest.mark.parametrize("option", ["--json", "--save-results"])
def test_a_full_disk_is_said(fails, checkpoint, cityscapes, tmp_path, option):
    argv = ("--checkpoint", checkpoint, "--datadir", cityscapes, option, "out")
    with full_disk(80):
        line = fails(EVAL, *argv)
    assert "/" * (option != "--json") in line and "out" in line
    assert f"cannot be written (File too large): make room, or give another {option}" in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["../../out.png", "/out.png", "../out.png"])
def test_results_stay_in_their_folder(fails, checkpoint, cityscapes, tmp_path, monkeypatch, name):
    if name.startswith("/"):
        name = f"{tmp_path}{name}"
    monkeypatch.setattr(Cityscapes, "result_name", lambda self, index: name)
    argv = ("--checkpoint", checkpoint, "--datadir", cityscapes)
    assert "it leads out of a/b" in fails(EVAL, *argv, "--save-results", "a/b")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_batches_are_as_large_as_asked_for(script, checkpoint, cityscapes, monkeypatch):
    counts = []
    forward = LEDNet.forward

    def counting(self, images):
        counts.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(LEDNet, "forward", counting)
    argv = ("--checkpoint", checkpoint, "--datadir", cityscapes, "--batch-size", 2)
    assert script(EVAL, *argv).status == 0
    assert counts[:8] == [1, 1, 1, 2, 2, 2, 2, 1]  # of warming up, and of the 3 images
