"""The story of lednet_imagenet.py: what a run says and leaves, its recipes, --evaluate."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compare import shown
from conftest import (
    PRETRAIN_QUICK,
    QUICK,
    Forked,
    Result,
    pretend_processes,
    read_log,
    run_script,
    same_weights,
)
from PIL import Image
from torch import nn
from torch.nn import functional as F

import datasets.drawn.shapes
import lednet_imagenet
import main
import utils.run_folder
import utils.training
from datasets.cityscapes import Cityscapes
from datasets.folder import Folder
from datasets.imagenet import open_images, validation_images
from datasets.loading import Batch, batch_loader
from models.lednet import Encoder, ImageClassifier
from utils.checkpoint import load_checkpoint, load_classifier, save_checkpoint
from utils.errors import UserError
from utils.evaluation import evaluate, evaluate_classifier
from utils.optim import PretrainingSchedule
from utils.options import (
    PRETRAINING,
    SEGMENTATION,
    parse_options,
    settle_pretraining,
    settle_segmentation,
)
from utils.training import Stage

NAME = "lednet_imagenet.py"
CPU = torch.device("cpu")

# A run


def test_a_run_leaves_what_it_promises(pretrained, shapes):
    files = {"args.json", "log.csv", "last.pth", "best.pth", "encoder.pth"}
    assert files < {path.name for path in pretrained.iterdir()}
    args = json.loads((pretrained / "args.json").read_text())
    assert args["datadir"] == str(shapes) and args["recipe"] == "paper"
    (row,) = read_log(pretrained)
    assert row["epoch"] == "1" and float(row["lr"]) == 0.01 and "stage" not in row
    for name in ("train_loss", "val_loss", "images_per_second", "seconds"):
        assert float(row[name]) > 0
    for name in ("train_top1", "train_top5", "val_top1", "val_top5", "data_wait"):
        assert 0 <= float(row[name]) <= 1
    best = load_checkpoint(pretrained / "best.pth")
    assert best["stage"] == 0 and best["epoch"] == 1 and best["args"] == args
    assert best["best"]["val_top1"] == pytest.approx(float(row["val_top1"]))
    assert "optimizer" not in best and "optimizer" in load_checkpoint(pretrained / "last.pth")


def test_a_checkpoint_explains_itself(pretrained):
    model, about = load_classifier(pretrained / "best.pth")
    assert model.head.out_features == 6 and about.classes.names == datasets.drawn.shapes.CLASSES
    assert (about.dataset, about.height, about.train_images) == ("imagenet", 32, 12)
    assert about.mean == [0.485, 0.456, 0.406] and about.std == [0.229, 0.224, 0.225]


def test_the_encoder_file_holds_the_encoder_alone(pretrained):
    encoder, best = (load_checkpoint(pretrained / name) for name in ("encoder.pth", "best.pth"))
    expected = {k: w for k, w in best["model"].items() if k.startswith("encoder.")}
    assert same_weights(encoder["model"], expected) and len(expected) == len(best["model"]) - 2
    assert encoder["mean"] == best["mean"] and encoder["std"] == best["std"]


def test_tensorboard_shows_scores_and_pictures(pretrained):
    found = shown(pretrained)
    scores = {"loss/train", "loss/val", "lr", "top1/train", "top1/val", "top5/train", "top5/val"}
    assert scores < found.keys() and list(found["top1/val"]) == [1]
    assert {tag for tag in found if tag.startswith("val/")} == {f"val/{n}" for n in range(6)}
    width, height = (int.from_bytes(found["val/0"][1][0][n : n + 4]) for n in (16, 20))  # of a PNG
    assert (width, height) == (32, 48)


@pytest.fixture(scope="module")
def modern(shapes, tmp_path_factory) -> tuple[Path, Result]:
    """A run of the modern recipe, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "modern"
    argv = ("--recipe", "modern", "--steps-loss", 2, "--savedir", folder)
    argv = (NAME, "--datadir", shapes, *PRETRAIN_QUICK, *argv)
    return folder, Forked(lambda: run_script(*argv), tmp_path_factory.mktemp("out")).finish()


def test_a_run_says_what_it_does_and_what_comes_next(modern):
    folder, result = modern
    assert result.status == 0 and result.err == ""
    for text in (
        "911,436 parameters",
        "12 images of 6 classes to train on, 6 to validate",
        "32x32, in batches of 4, 0 workers; 1 epochs of the modern recipe",
        f"main.py --datadir CITYSCAPES --pretrained-encoder {folder}/encoder.pth",
    ):
        assert text in result.out, text
    assert re.search(r"epoch 1/1: step 2/3, train loss [\d.]+, train top-1 [\d.]+%", result.out)
    line = next(line for line in result.out.splitlines() if "val loss" in line)
    for text in ("train top-1", "val top-1", "val top-5", "images/s", "waiting for data"):
        assert text in line


def test_the_average_of_the_weights_is_saved(modern):
    folder, _ = modern
    best, last, encoder = (
        load_checkpoint(folder / name) for name in ("best.pth", "last.pth", "encoder.pth")
    )
    assert last["ema_updates"] == 3
    assert same_weights(best["model"], last["model"])
    assert same_weights(encoder["model"], {name: best["model"][name] for name in encoder["model"]})
    assert last["training_model"].keys() == last["model"].keys()
    assert not same_weights(last["training_model"], last["model"])


def interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_the_embedded_data_set_is_drawn_once(script, tmp_path, monkeypatch):
    for split in ("train", "val"):
        monkeypatch.setitem(datasets.drawn.shapes.COUNTS, split, 1)
    argv = (NAME, "--epochs", 1, "--workers", 0, "--size", 32)
    first = script(*argv, "--savedir", "a")
    assert first.status == 0 and "drawing shapes and textures into data/shapes" in first.out
    assert "main.py --pretrained-encoder save/a/encoder.pth" in first.out
    made = (tmp_path / "data/shapes").stat().st_mtime_ns
    monkeypatch.setattr(utils.training, "fit", interrupted)
    second = script(*argv, "--savedir", "b")
    assert second.status == 130 and "drawing" not in second.out
    assert (tmp_path / "data/shapes").stat().st_mtime_ns == made
    args = json.loads((tmp_path / "save/b/args.json").read_text())
    assert args["lr"] < 0.1 and args["dataset"] == "shapes"


def test_images_of_every_mode_are_trained_on(script, tmp_path):
    for split in ("train", "val"):
        for number, mode in enumerate(("L", "CMYK", "P", "I;16", "RGBA")):
            suffix = "jpg" if mode in ("L", "CMYK") else "png"
            folder = tmp_path / "modes" / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (30, 50)).save(folder / f"{number}.{suffix}")
    argv = ("--datadir", tmp_path / "modes", *PRETRAIN_QUICK, "--savedir", "a")
    assert script(NAME, *argv).status == 0


# Recipes


@pytest.fixture
def stage(shapes, monkeypatch) -> Callable[..., Stage]:
    """Put a run together, without training; arguments are options."""

    def build(*options: object) -> Stage:
        argv = ("--datadir", shapes, *PRETRAIN_QUICK, "--device", "cpu", *options)
        monkeypatch.setattr(sys, "argv", [NAME, *map(str, argv)])
        args = parse_options(None, PRETRAINING, settle_pretraining)
        train, val = open_images(args)
        model = ImageClassifier(Encoder(), len(train.classes))
        return lednet_imagenet.build_stage(args, model, train, val, CPU)

    return build


def assert_smoothed_by(smoothing: float, loss: Callable) -> None:
    """Half precision is summed in full."""
    logits, labels = torch.randn(8, 6).bfloat16(), torch.randint(6, (8,))
    expected = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    assert torch.equal(loss(logits, labels), expected)


def transforms_of(stage: Stage) -> list[str]:
    return [type(step).__name__ for step in stage.loader.dataset.dataset.transform.transforms]


def test_by_default_training_follows_the_published_recipe(stage):
    built = stage()
    assert type(built.optimizer) is torch.optim.SGD
    expected = {"initial_lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert expected.items() <= built.optimizer.param_groups[0].items()
    assert type(built.scheduler) is PretrainingSchedule
    assert built.scheduler.last_constant_step == 15 * built.steps - 1 == 44
    assert_smoothed_by(0.0, built.loss)
    assert built.average is None and built.amp_dtype is None
    assert "RandAugment" not in transforms_of(built)
    assert list(built.best_files) == ["best.pth", "encoder.pth"] and built.score == "val_top1"
    assert built.prepare(next(iter(built.loader)))[0].shape == (4, 3, *built.image_size)
    # Images are normalised as the checkpoint states.
    grey = torch.full((1, 3, 1, 1), 51, dtype=torch.uint8)
    images, labels = built.prepare(Batch(grey, torch.tensor([4]), [0], [0], []))
    assert torch.allclose(images.flatten(), torch.tensor([-1.244541, -1.142857, -0.915556]))
    assert labels.tolist() == [4]


def test_the_modern_recipe(stage):
    built = stage("--recipe", "modern", "--amp", "bf16", "--epochs", 2)
    assert type(built.optimizer) is torch.optim.AdamW
    group = built.optimizer.param_groups[0]
    assert group["max_lr"] == 1e-3 and group["weight_decay"] == 0.05
    assert type(built.scheduler) is torch.optim.lr_scheduler.OneCycleLR
    assert built.scheduler.total_steps == 2 * built.steps + 1 == 7
    assert_smoothed_by(0.1, built.loss)
    assert built.average is not None and built.amp_dtype == torch.bfloat16
    assert "RandAugment" in transforms_of(built)


def test_pictures_show_what_was_found(monkeypatch):
    """Eight pictures at most, spread evenly, with the class that was found."""
    captions = []
    monkeypatch.setattr(
        lednet_imagenet,
        "captioned",
        lambda image, caption, right: captions.append((caption, right)),
    )
    labels = torch.tensor([0, 1, 1] + [0] * 13)
    batch = Batch(torch.zeros(16, 3, 4, 4), labels, [0] * 16, list(range(16)), [])
    found = torch.tensor([0, 1, 0] + [0] * 13)

    class Given(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return F.one_hot(found, 2).float()

    model = Given()
    model.weight = nn.Parameter(torch.zeros(1))
    lednet_imagenet.validate(model, [batch], "", ["cat", "dog"], 16, lambda images: images, None)
    assert captions == [("cat", True), ("cat, not dog", False)] + [("cat", True)] * 6


# --evaluate


def test_evaluate_finds_what_training_logged(pretrained, script, tmp_path):
    (row,) = read_log(pretrained)
    expected = [f"{100 * float(row[name]):.2f}%" for name in ("val_top1", "val_top5")]
    for argv in (("--evaluate", "--savedir", pretrained), ("--evaluate", pretrained / "best.pth")):
        result = script(NAME, *argv)
        assert result.status == 0
        assert f"top-1 {expected[0]}, top-5 {expected[1]}" in result.out
        assert f"loss {float(row['val_loss']):.4f}" in result.out
        assert "on the 6 images of" in result.out and "at 32x32" in result.out
    assert not (tmp_path / "save").exists()


def test_evaluate_normalises_as_the_checkpoint_states(pretrained, script, tmp_path):
    checkpoint = load_checkpoint(pretrained / "best.pth") | {"mean": [0.0] * 3, "std": [9.0] * 3}
    save_checkpoint(checkpoint, tmp_path / "other.pth")
    (row,) = read_log(pretrained)
    result = script(NAME, "--evaluate", "other.pth")
    assert result.status == 0 and f"loss {float(row['val_loss']):.4f}" not in result.out


def test_evaluate_needs_no_training_images(pretrained, script, shapes_copy):
    shutil.rmtree(shapes_copy / "train")
    shutil.rmtree(shapes_copy / "val/rings")
    result = script(NAME, "--evaluate", "--savedir", pretrained, "--datadir", shapes_copy)
    assert result.status == 0 and "on the 5 images of" in result.out


def test_evaluate_leaves_out_broken_images(pretrained, script, shapes_copy):
    min((shapes_copy / "val").rglob("*.jpg")).write_bytes(b"")
    argv = ("--evaluate", "--savedir", pretrained, "--datadir", shapes_copy, "--batch-size", 1)
    assert script(NAME, *argv).status == 2
    result = script(NAME, *argv, "--skip-broken")
    assert result.status == 0 and "on the 5 images of" in result.out
    assert "left out: unreadable: " in result.err


def test_what_cannot_be_evaluated(pretrained, fails, trained, shapes_copy, tmp_path):
    assert "best.pth does not exist" in fails(NAME, "--evaluate", "--savedir", tmp_path / "none")
    for path in (trained / "best.pth", pretrained / "encoder.pth"):
        assert "no image classifier" in fails(NAME, "--evaluate", path)
    (shapes_copy / "val/rings").rename(shapes_copy / "val/circles")
    line = fails(NAME, "--evaluate", "--savedir", pretrained, "--datadir", shapes_copy)
    assert "circles" in line
    checkpoint = load_checkpoint(pretrained / "best.pth") | {"args": {}}
    save_checkpoint(checkpoint, tmp_path / "best.pth")
    # The file that is named, not the one in --savedir.
    line = fails(NAME, "--evaluate", "best.pth", "--savedir", pretrained)
    assert "best.pth does not state its data set: give --datadir" in line


# Resuming; that a resumed run ends like any other is tested in test_resume.py


@pytest.fixture
def copy(pretrained, tmp_path) -> Path:
    """A copy of the short run, to be resumed."""
    return Path(shutil.copytree(pretrained, tmp_path / "copy"))


@pytest.fixture
def resume(copy, fails) -> Callable[..., str]:
    """Resume the copy, which must fail; returns the line."""
    return lambda *options: fails(NAME, "--savedir", copy, "--resume", *options)


def test_other_classes_are_refused_on_resume(resume, shapes_copy):
    for split in ("train", "val"):
        (shapes_copy / split / "rings").rename(shapes_copy / split / "circles")
    assert "has other classes than those" in resume("--datadir", shapes_copy)
    for split in ("train", "val"):
        shutil.rmtree(shapes_copy / split / "circles")
    assert "has other classes than those" in resume("--datadir", shapes_copy)


def test_another_number_of_training_images_is_refused_on_resume(resume, shapes_copy):
    next(shapes_copy.glob("train/*/*0.jpg")).unlink()  # there are as many batches as before
    assert "has 11 training images now, and 12 when" in resume("--datadir", shapes_copy)


def test_data_that_moved_are_checked_on_resume(resume, shapes_copy):
    path = next(shapes_copy.glob("train/*/*.jpg"))
    path.write_text("no picture")
    assert path.name in resume("--datadir", shapes_copy)


def test_the_checkpoint_of_another_run_is_refused(resume, copy, trained):
    good = load_checkpoint(copy / "last.pth")
    shutil.copy(trained / "last.pth", copy / "last.pth")
    assert "has the checkpoint of another run" in resume()
    good["args"]["recipe"] = "modern"
    save_checkpoint(good, copy / "last.pth")
    assert "has the checkpoint of another run" in resume()


def test_runs_are_resumed_by_their_own_program(pretrained, trained, fails):
    assert "run of another program" in fails("main.py", "--savedir", pretrained, "--resume")
    assert "run of another program" in fails(NAME, "--savedir", trained, "--resume")


# Fine-tuning


def test_features_of_an_image_are_the_same_in_both_programs(pretrained, tmp_path, monkeypatch):
    """Through each program's own way from the file to the encoder's output."""
    noise = torch.randint(256, (256, 256, 3), dtype=torch.uint8)
    square = tmp_path / "square/val/checks/noise.png"
    square.parent.mkdir(parents=True)
    Image.fromarray(noise.numpy()).save(square)
    # Pretraining shows the central 224 of 256 pixels; here they are the whole image.
    (tmp_path / "images/test").mkdir(parents=True)
    Image.fromarray(noise[16:240, 16:240].numpy()).save(tmp_path / "images/test/central.png")
    features = {}

    model, about = load_classifier(pretrained / "best.pth")
    model.encoder.register_forward_hook(lambda *seen: features.update(pretraining=seen[2]))
    val = validation_images(tmp_path / "square", 224, list(about.classes.names))
    loader = batch_loader(val, None, 1, 0, stacked=True)
    evaluate_classifier(model, loader, about.normalizer(CPU), "", 1)

    argv = ("main.py", "--datadir", "d", "--pretrained-encoder", str(pretrained / "encoder.pth"))
    monkeypatch.setattr(sys, "argv", [*argv])
    args = parse_options(None, SEGMENTATION, settle_segmentation)
    network, mean, std = main.start_network(args, Cityscapes.CLASSES, None)
    network.encoder.register_forward_hook(lambda *seen: features.update(training=seen[2]))
    central = Folder(tmp_path, "test", Cityscapes.CLASSES, height=224)
    loader = batch_loader(central, None, 1, 0)
    evaluate(
        network, loader, main.Description("", None, mean, std, 224, 1).normalizer(CPU), 19, "", 1
    )
    assert features["training"].std() > 0.01
    # Equal up to the order of sums, which may depend on where in memory an image lies.
    assert torch.allclose(features["training"], features["pretraining"], rtol=1e-4, atol=1e-5)


def test_a_fine_tuned_network_keeps_the_normalisation(pretrained, script, cityscapes, tmp_path):
    argv = ("--datadir", cityscapes, *QUICK, "--D", 4, "--savedir", "a")
    result = script("main.py", *argv, "--pretrained-encoder", pretrained / "encoder.pth")
    assert "images are normalised with mean [0.485, 0.456, 0.406]" in result.out
    assert "0 epochs of stage 1" in result.out
    tuned = load_checkpoint(tmp_path / "save/a/best.pth")
    assert tuned["mean"] == [0.485, 0.456, 0.406] and tuned["std"] == [0.229, 0.224, 0.225]
    assert script("main.py", "--savedir", "a", "--resume").status == 0


def test_a_classifier_is_not_a_network(pretrained, fails, cityscapes):
    argv = ("--datadir", cityscapes, *QUICK, "--savedir", "a", "--init", pretrained / "best.pth")
    line = fails("main.py", *argv)
    assert "holds the encoder alone" in line and "give it as --pretrained-encoder" in line
    line = fails("eval_cityscapes_server.py", "--checkpoint", pretrained / "best.pth")
    assert "holds the encoder alone" in line


# Mistakes: one line, status 2, and no folder left behind


@pytest.fixture
def refused(fails, tmp_path) -> Callable[..., str]:
    """Start a run that must be refused before it makes its folder; returns the line."""

    def run(datadir: Path, *options: object) -> str:
        line = fails(NAME, "--datadir", datadir, *PRETRAIN_QUICK, *options, "--savedir", "no")
        assert not (tmp_path / "save").exists()
        return line

    return run


def test_mistakes_are_refused_before_anything_is_written(refused, shapes, tmp_path):
    assert "nowhere does not exist" in refused(tmp_path / "nowhere")
    assert "--size 8 is too small" in refused(shapes, "--size", 8)
    assert "--amp fp16 needs a CUDA GPU" in refused(shapes, "--amp", "fp16", "--device", "cpu")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_file_is_found_before_training(refused, shapes_copy, split):
    path = next((shapes_copy / split / "rings").iterdir())
    path.write_bytes(path.read_bytes()[:-300])
    line = refused(shapes_copy)
    assert f"{split}/rings/{path.name}" in line and "--skip-broken leaves them out" in line


def test_an_image_that_breaks_in_training_is_named_and_nothing_is_lost(
    script, shapes_copy, tmp_path, monkeypatch
):
    path = next((shapes_copy / "train/rings").iterdir())
    good = path.read_bytes()

    def save_and_break(checkpoint: dict, to: Path) -> None:
        save_checkpoint(checkpoint, to)
        if to.name == "last.pth":
            path.write_bytes(good[:-300])

    argv = ("--datadir", shapes_copy, *PRETRAIN_QUICK, "--epochs", 2, "--lr", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(utils.run_folder, "save_checkpoint", save_and_break)
        result = script(NAME, *argv, "--savedir", "a")
    (line,) = result.err.splitlines()
    assert result.status == 2 and f"train/rings/{path.name}" in line and "resume with: " in line
    path.write_bytes(good)
    assert script(NAME, "--savedir", "a", "--resume").status == 0
    assert len(read_log(tmp_path / "save/a")) == 2


def test_a_run_that_diverges_says_so(fails, shapes, tmp_path):
    argv = (NAME, "--datadir", shapes, *PRETRAIN_QUICK, "--epochs", 3, "--lr", 1e30)
    assert "training has diverged" in fails(*argv, "--savedir", "a")
    for path in (tmp_path / "save/a").glob("*.pth"):
        assert all(weight.isfinite().all() for weight in load_checkpoint(path)["model"].values())


def test_a_folder_that_holds_a_run_is_kept(fails, shapes, pretrained):
    line = fails(NAME, "--datadir", shapes, *PRETRAIN_QUICK, "--savedir", pretrained)
    assert "holds a run already" in line


def test_no_place_for_the_embedded_data_set(fails, tmp_path):
    (tmp_path / "data").write_text("a file")
    assert "data/shapes cannot be made" in fails(NAME, "--savedir", "a")


def test_each_process_trains_and_scores_its_share(stage, monkeypatch):
    pretend_processes(monkeypatch, 2, rank=1)
    built = stage()
    assert len(built.loader.sampler) == 6
    assert list(built.val_loader.dataset.dataset.indices) == [1, 3, 5]


def test_too_few_images_for_the_processes(stage, monkeypatch):
    pretend_processes(monkeypatch, 13)
    with pytest.raises(UserError, match="fewer training images than there are processes"):
        stage()
