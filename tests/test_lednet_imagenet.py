import json
import re
import shutil

import pytest
import torch
from conftest import (
    PRETRAIN_QUICK,
    QUICK,
    read_log,
    run_script,
    same_weights,
    wait_for_the_next_second,
)
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from torch.utils.data import DataLoader

import datasets.drawn.shapes
import lednet_imagenet
import main
import utils.checkpoint
import utils.evaluation
import utils.optim
from datasets.cityscapes import Cityscapes
from datasets.folder import Folder
from datasets.imagenet import validation_images
from datasets.loading import as_lists
from datasets.transforms import to_floats
from lednet_imagenet import build_schedule, weight_decay
from models.lednet import Encoder
from utils.checkpoint import load_checkpoint, load_classifier, save_checkpoint
from utils.evaluation import evaluate, evaluate_classifier

NAME = "lednet_imagenet.py"

# What a run leaves and says


def test_a_run_leaves_what_it_promises(pretrained, shapes):
    assert {"args.json", "log.csv", "last.pth", "best.pth", "encoder.pth"} < {
        path.name for path in pretrained.iterdir()
    }
    args = json.loads((pretrained / "args.json").read_text())
    assert args["datadir"] == str(shapes) and args["recipe"] == "paper"
    (row,) = read_log(pretrained)
    assert row["epoch"] == "1" and float(row["lr"]) == 0.01
    for name in ("train_loss", "val_loss", "images_per_second", "seconds"):
        assert float(row[name]) > 0
    for name in ("train_top1", "train_top5", "val_top1", "val_top5", "data_wait"):
        assert 0 <= float(row[name]) <= 1

    model, best = load_classifier(pretrained / "best.pth")
    assert model.head.out_features == 6
    assert best["class_names"] == datasets.drawn.shapes.CLASSES and best["num_classes"] == 6
    assert best["mean"] == [0.485, 0.456, 0.406] and best["std"] == [0.229, 0.224, 0.225]
    assert best["stage"] == 0 and best["height"] == 32 and best["dataset"] == "imagenet"
    assert best["args"] == args and best["epoch"] == 1
    assert best["best"]["val_top1"] == pytest.approx(float(row["val_top1"]))
    assert "optimizer" not in best and "optimizer" in load_checkpoint(pretrained / "last.pth")


def test_the_encoder_file_holds_the_encoder_alone(pretrained):
    encoder, best = (load_checkpoint(pretrained / name) for name in ("encoder.pth", "best.pth"))
    inside = {k: w for k, w in best["model"].items() if k.startswith("encoder.")}
    assert same_weights(encoder["model"], inside) and len(inside) == len(best["model"]) - 2
    assert encoder["mean"] == best["mean"] and encoder["std"] == best["std"]


def test_tensorboard_shows_scores_and_pictures(pretrained):
    events = EventAccumulator(str(pretrained)).Reload()
    tags = events.Tags()
    assert {
        *("loss/train", "loss/val", "lr", "top-1/train", "top-1/val", "top-5/train", "top-5/val"),
        *("images per second/train", "share of time waiting for data/train"),
    } <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("top-1/val")] == [1]
    assert set(tags["images"]) == {f"val/{number}" for number in range(6)}
    picture = events.Images("val/0")[0]
    assert (picture.width, picture.height) == (32, 48)


def test_a_run_says_what_it_does_and_what_comes_next(script, shapes, tmp_path):
    result = script(
        *(NAME, "--datadir", shapes, *PRETRAIN_QUICK, "--savedir", "a", "--steps-loss", 2)
    )
    assert result.status == 0
    assert "911,436 parameters" in result.out
    assert "12 images of 6 classes to train on, 6 to validate" in result.out
    assert "32x32, in batches of 4" in result.out and "1 epochs of the paper recipe" in result.out
    assert re.search(r"epoch 1/1: step 2/3, loss [\d.]+, top-1 [\d.]+ %, top-5 ", result.out)
    line = next(line for line in result.out.splitlines() if "train loss" in line)
    for text in ("top-1", "top-5", "images/s", "waiting for data", "val loss"):
        assert text in line
    assert "main.py --datadir CITYSCAPES --pretrained-encoder save/a/encoder.pth" in result.out
    assert (tmp_path / "save/a/encoder.pth").exists()


def test_the_embedded_default_is_drawn_once(script, tmp_path, monkeypatch):
    for split in ("train", "val"):
        monkeypatch.setitem(datasets.drawn.shapes.COUNTS, split, 1)
    argv = (NAME, "--epochs", 1, "--workers", 0, "--size", 32)
    first = script(*argv, "--savedir", "a")
    assert first.status == 0 and "drawing shapes and textures into data/shapes" in first.out
    assert "main.py --pretrained-encoder save/a/encoder.pth" in first.out
    made = (tmp_path / "data/shapes").stat().st_mtime_ns
    second = script(*argv, "--savedir", "b")
    assert second.status == 0 and "drawing" not in second.out
    assert (tmp_path / "data/shapes").stat().st_mtime_ns == made
    args = json.loads((tmp_path / "save/b/args.json").read_text())
    assert args["lr"] < 0.1 and args["dataset"] == "shapes"


def test_help_shows_defaults(script):
    result = script(NAME, "--help")
    assert result.status == 0
    for text in ("--datadir", "default 224", "default 150", "default 256", "default 0.1", "modern"):
        assert text in " ".join(result.out.split())


# The recipes


def rates(recipe: str, epochs: int, steps: int, lr: float) -> list[float]:
    """The learning rate of each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    scheduler = build_schedule(recipe, optimizer, epochs, steps)
    found = []
    for _ in range(epochs * steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_published_schedule():
    """0.1 to epoch 15, then 5 % less with each epoch, and no weight decay any more."""
    found = rates("paper", 150, 3, 0.1)
    assert found[: 15 * 3] == [0.1] * 15 * 3
    by_hand = {16: 0.095, 17: 0.09025, 18: 0.0857375, 25: 0.0598737, 150: 9.8330e-05}
    for epoch, rate in by_hand.items():
        assert found[3 * (epoch - 1) : 3 * epoch] == pytest.approx([rate] * 3, rel=1e-4), epoch
    decays = [weight_decay("paper", epoch) for epoch in (1, 15, 16, 150)]
    assert decays == [1e-4, 1e-4, 0, 0]


@pytest.mark.filterwarnings("error")
def test_the_modern_schedule():
    """From a hundredth up over the first twentieth, and down to nothing, each half a cosine."""
    found = rates("modern", 17, 7, 0.1)
    by_hand = {0: 0.001, 1: 0.0104537, 2: 0.0352037, 3: 0.0657963, 4: 0.0905463, 5: 0.1}
    by_hand |= {43: 0.075, 62: 0.05, 81: 0.025, 118: 1.9085e-5}
    for step, rate in by_hand.items():
        assert found[step] == pytest.approx(rate, rel=1e-3), step
    assert weight_decay("modern", 1) == weight_decay("modern", 100) == 0.05


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 2), (2, 3), (1, 20), (2, 10), (1, 40)])
def test_the_modern_schedule_of_a_short_run(epochs, steps):
    found = rates("modern", epochs, steps, 0.1)
    assert all(0 < rate <= 0.1 for rate in found)
    assert epochs * steps == 1 or max(found) == pytest.approx(0.1, rel=0.01)


def test_the_recipe_is_followed_epoch_by_epoch(script, shapes, monkeypatch, tmp_path):
    """Without training: what each of 17 epochs would be trained with, of three batches."""
    seen = []

    def train_one_epoch(training, forward, loader, **options):
        group = training.optimizer.param_groups[0]
        seen.append((group["lr"], group["weight_decay"]))
        for _ in range(len(loader)):
            training.optimizer.step()
            training.scheduler.step()
        return {"images_per_second": 1.0, "data_wait": 0.0}

    monkeypatch.setattr(utils.evaluation, "train_one_epoch", train_one_epoch)
    scripted_scores(monkeypatch, *[0.5] * 17)
    argv = (NAME, "--datadir", shapes, *PRETRAIN_QUICK, "--epochs", 17, "--savedir", "a")
    assert script(*argv).status == 0
    assert seen == [(0.1, 1e-4)] * 15 + [(pytest.approx(0.095), 0), (pytest.approx(0.09025), 0)]
    logged = [float(row["lr"]) for row in read_log(tmp_path / "save/a")]
    assert logged == pytest.approx([rate for rate, _ in seen])


def options_of_a_run(script, shapes, monkeypatch, *options):
    """Run one epoch; returns what the epoch was trained with."""
    seen, real = {}, utils.evaluation.train_one_epoch

    def train_one_epoch(training, forward, loader, **options):
        seen.update(vars(training) | options, loader=loader)
        seen["weight_decay"] = training.optimizer.param_groups[0]["weight_decay"]
        return real(training, forward, loader, **options)

    monkeypatch.setattr(utils.evaluation, "train_one_epoch", train_one_epoch)
    result = script(NAME, "--datadir", shapes, *PRETRAIN_QUICK, "--savedir", "a", *options)
    assert result.status == 0, result.err
    return seen


def assert_smoothed_by(smoothing: float, loss_function) -> None:
    """What is half precision is summed in full."""
    logits, labels = torch.randn(8, 6).bfloat16(), torch.randint(6, (8,))
    expected = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    assert torch.equal(loss_function(logits, labels), expected)


def test_the_published_recipe_is_the_default(script, shapes, monkeypatch):
    seen = options_of_a_run(script, shapes, monkeypatch)
    group = seen["optimizer"].param_groups[0]
    assert type(seen["optimizer"]) is torch.optim.SGD
    assert (group["initial_lr"], group["momentum"], seen["weight_decay"]) == (0.1, 0.9, 1e-4)
    assert_smoothed_by(0.0, seen["loss_function"])
    assert seen["ema"] is None
    # Images are trained on as the checkpoint says.
    labels = torch.tensor([4])
    grey, same = seen["prepare"](torch.full((1, 3, 1, 1), 51, dtype=torch.uint8), labels)
    assert torch.allclose(grey.flatten(), torch.tensor([-1.244541, -1.142857, -0.915556]))
    assert torch.equal(same, labels)
    steps = seen["loader"].dataset.dataset.transform.transforms
    assert "RandAugment" not in [type(step).__name__ for step in steps]


def test_the_modern_recipe(script, shapes, monkeypatch, tmp_path):
    options = ("--recipe", "modern", "--amp", "bf16", "--device", "cpu")
    seen = options_of_a_run(script, shapes, monkeypatch, *options)
    assert type(seen["optimizer"]) is torch.optim.AdamW
    assert seen["optimizer"].param_groups[0]["max_lr"] == 1e-3
    assert_smoothed_by(0.1, seen["loss_function"])
    assert seen["amp_dtype"] == torch.bfloat16
    steps = seen["loader"].dataset.dataset.transform.transforms
    assert "RandAugment" in [type(step).__name__ for step in steps]
    # What is scored and kept is the average.
    assert seen["ema"].n_averaged == 3
    averaged = seen["ema"].module.state_dict()
    assert same_weights(load_checkpoint(tmp_path / "save/a/best.pth")["model"], averaged)
    encoder = load_checkpoint(tmp_path / "save/a/encoder.pth")["model"]
    assert same_weights(encoder, {k: w for k, w in averaged.items() if k in encoder})
    last = load_checkpoint(tmp_path / "save/a/last.pth")
    assert same_weights(last["model"], averaged)
    assert last["training_model"].keys() == averaged.keys()
    assert not same_weights(last["training_model"], averaged)


def scripted_scores(monkeypatch, *shares):
    """Make every validation find the next of some top-1 shares."""
    scores = iter(shares)

    def evaluate(*args, **kwargs):
        return {"val_loss": 1.0, "val_top1": next(scores), "val_top5": 1.0}

    monkeypatch.setattr(utils.evaluation, "evaluate_classifier", evaluate)


def test_the_encoder_of_the_best_epoch_is_kept(script, shapes, tmp_path, monkeypatch):
    scripted_scores(monkeypatch, 0.4, 0.8, 0.6)
    argv = (NAME, "--datadir", shapes, *PRETRAIN_QUICK, "--epochs", 3, "--savedir", "a")
    result = script(*argv)
    assert "best on val after epoch 2: top-1 80.00 %" in result.out
    folder = tmp_path / "save/a"
    encoder, best, last = (
        load_checkpoint(folder / name) for name in ("encoder.pth", "best.pth", "last.pth")
    )
    assert encoder["epoch"] == best["epoch"] == 2 and last["epoch"] == 3
    assert last["best"] == {"epoch": 2, "val_top1": 0.8, "val_top5": 1.0}
    inside = {k: w for k, w in best["model"].items() if k.startswith("encoder.")}
    assert same_weights(encoder["model"], inside)


# Evaluating


def test_evaluate_finds_what_training_logged(pretrained, script, tmp_path):
    (row,) = read_log(pretrained)
    expected = [f"{100 * float(row[name]):.2f} %" for name in ("val_top1", "val_top5")]
    for argv in (("--evaluate", "--savedir", pretrained), ("--evaluate", pretrained / "best.pth")):
        result = script(NAME, *argv)
        assert result.status == 0
        assert f"top-1 {expected[0]}, top-5 {expected[1]}" in result.out
        assert f"loss {float(row['val_loss']):.4f}" in result.out
        assert "on the 6 images of" in result.out and "at 32x32" in result.out
    assert not (tmp_path / "save").exists()


def test_evaluate_normalises_as_the_checkpoint_says(pretrained, script, tmp_path):
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


def test_what_cannot_be_evaluated(pretrained, fails, trained, shapes_copy, tmp_path):
    assert "--evaluate needs a checkpoint" in fails(NAME, "--evaluate")
    assert "best.pth does not exist" in fails(NAME, "--evaluate", "--savedir", tmp_path / "none")
    assert "no image classifier" in fails(NAME, "--evaluate", trained / "best.pth")
    assert "no image classifier" in fails(NAME, "--evaluate", pretrained / "encoder.pth")
    (shapes_copy / "val/rings").rename(shapes_copy / "val/circles")
    line = fails(NAME, "--evaluate", "--savedir", pretrained, "--datadir", shapes_copy)
    assert "not trained on (circles)" in line
    line = fails(NAME, "--evaluate", "--savedir", pretrained, "--resume")
    assert "--evaluate and --resume exclude each other" in line
    assert "--size 8 is too small" in fails(
        NAME, "--evaluate", pretrained / "best.pth", "--size", 8
    )
    nowhere = load_checkpoint(pretrained / "best.pth") | {"args": {}}
    save_checkpoint(nowhere, tmp_path / "best.pth")
    # The file that is named, not the one of --savedir.
    line = fails(NAME, "--evaluate", "best.pth", "--savedir", pretrained)
    assert "best.pth does not say what it was trained on: give --datadir" in line


# Resuming


@pytest.fixture(scope="module", params=["paper", "modern"])
def whole(request, shapes, tmp_path_factory):
    """The recipe and folder of a run of three epochs that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run_script(NAME, *resumable(request.param, shapes, folder)) == 0
    return request.param, folder


def resumable(recipe: str, shapes, folder) -> tuple:
    argv = ("--datadir", shapes, "--size", 32, "--batch-size", 4, "--lr", 0.01, "--workers", 1)
    return (*argv, "--recipe", recipe, "--epochs", 3, "--savedir", folder)


@pytest.mark.parametrize(("epoch", "saved"), [(1, True), (2, True), (1, False), (3, False)])
def test_a_resumed_run_ends_as_the_one_that_never_stopped(
    whole, script, shapes, tmp_path, monkeypatch, epoch, saved
):
    """Stopped after last.pth of an epoch, or before it, when the log has its row already."""

    class Stop(Exception):
        pass

    def save_and_stop(checkpoint, path):
        here = path.name == "last.pth" and checkpoint["epoch"] == epoch
        if saved or not here:
            save_checkpoint(checkpoint, path)
        if here:
            raise Stop

    recipe, unbroken = whole
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(utils.run_folder, "save_checkpoint", save_and_stop)
        script(NAME, *resumable(recipe, shapes, stopped))
    wait_for_the_next_second()
    result = script(NAME, "--savedir", stopped, "--resume")
    assert result.status == 0
    done = epoch if saved else epoch - 1
    assert f"resuming after epoch {done}" in result.out or (done == 0 and "from the" in result.out)

    for name in ("last.pth", "best.pth", "encoder.pth"):
        ours, theirs = load_checkpoint(stopped / name), load_checkpoint(unbroken / name)
        assert same_weights(ours["model"], theirs["model"]), name
        assert ours["epoch"] == theirs["epoch"]
    ours, theirs = load_checkpoint(stopped / "last.pth"), load_checkpoint(unbroken / "last.pth")
    assert same_weights(ours["training_model"], theirs["training_model"])
    for ours, theirs in zip(read_log(stopped), read_log(unbroken), strict=True):
        for clock in ("seconds", "images_per_second", "data_wait"):
            del ours[clock], theirs[clock]
        assert ours == theirs
    steps = [e.step for e in EventAccumulator(str(stopped)).Reload().Scalars("loss/train")]
    assert steps == [1, 2, 3]


def test_what_may_not_change_on_resume(pretrained, fails, shapes_copy, tmp_path):
    folder = shutil.copytree(pretrained, tmp_path / "copy")
    argv = (NAME, "--savedir", folder, "--resume")
    assert "has --recipe paper" in fails(*argv, "--recipe", "modern")
    assert "--resume needs --savedir" in fails(NAME, "--resume")
    for split in ("train", "val"):
        (shapes_copy / split / "rings").rename(shapes_copy / split / "circles")
    line = fails(*argv, "--datadir", shapes_copy)
    assert "has other names of classes than the run" in line
    for split in ("train", "val"):
        shutil.rmtree(shapes_copy / split / "circles")
    assert "has 5 classes, not the 6 that the run" in fails(*argv, "--datadir", shapes_copy)


def test_another_number_of_images_is_refused_on_resume(pretrained, fails, shapes_copy, tmp_path):
    folder = shutil.copytree(pretrained, tmp_path / "copy")
    next((shapes_copy / "train").rglob("*0.jpg")).unlink()  # the batches are as many as before
    line = fails(NAME, "--savedir", folder, "--resume", "--datadir", shapes_copy)
    assert "another number of training images" in line


def test_other_data_before_an_epoch_is_finished(pretrained, fails, shapes_copy, tmp_path):
    folder = shutil.copytree(pretrained, tmp_path / "copy")
    (folder / "last.pth").unlink()
    line = fails(NAME, "--savedir", folder, "--resume", "--datadir", shapes_copy)
    assert "nothing was saved of the run in" in line and "start another run" in line


def test_data_that_moved_are_checked_on_resume(pretrained, fails, shapes_copy, tmp_path):
    folder = shutil.copytree(pretrained, tmp_path / "copy")
    path = next((shapes_copy / "train").rglob("*.jpg"))
    path.write_text("no picture")
    line = fails(NAME, "--savedir", folder, "--resume", "--datadir", shapes_copy)
    assert f"{path.name} cannot be read as an image" in line


def test_pictures_say_what_was_taken_for_what(monkeypatch):
    said = []
    monkeypatch.setattr(
        lednet_imagenet, "captioned", lambda image, caption, right: said.append((caption, right))
    )
    pictures = lednet_imagenet.Pictures(["cat", "dog"], 3)
    logits = torch.tensor([[2.0, 1], [1, 2], [2, 1]])
    pictures.keep(torch.zeros(3, 3, 4, 4), logits, torch.tensor([0, 1, 1]))
    assert said == [("cat", True), ("dog", True), ("cat, not dog", False)]


def test_a_checkpoint_of_another_run_is_refused_on_resume(pretrained, trained, fails, tmp_path):
    folder = shutil.copytree(pretrained, tmp_path / "copy")
    shutil.copy(trained / "last.pth", folder / "last.pth")
    assert "last.pth is of another run" in fails(NAME, "--savedir", folder, "--resume")
    other = load_checkpoint(pretrained / "last.pth")
    other["args"]["recipe"] = "modern"
    save_checkpoint(other, folder / "last.pth")
    assert "last.pth is of another run" in fails(NAME, "--savedir", folder, "--resume")


def test_runs_of_the_two_programs_are_kept_apart(pretrained, trained, fails):
    assert "run of another program" in fails("main.py", "--savedir", pretrained, "--resume")
    assert "run of another program" in fails(NAME, "--savedir", trained, "--resume")


# Fine-tuning


@pytest.fixture
def square(tmp_path):
    """A folder with one class of one image of 256x256 noise in val."""
    path = tmp_path / "square/val/checks/noise.png"
    path.parent.mkdir(parents=True)
    noise = torch.randint(256, (256, 256, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)
    return path


def test_features_of_an_image_are_the_same_in_both_programs(pretrained, square, tmp_path):
    """Through each program's own way from the file to the encoder's output."""
    features = {}

    def keep(encoder, _inputs, output):
        features["pretraining"] = output

    model, checkpoint = load_classifier(pretrained / "best.pth")
    model.encoder.register_forward_hook(keep)
    val = validation_images(square.parents[2], 224, checkpoint["class_names"])
    prepare = to_floats(checkpoint["mean"], checkpoint["std"], torch.device("cpu"))
    evaluate_classifier(model, DataLoader(val), prepare, "")

    args = main.argparse.Namespace(
        init=None,
        pretrained_encoder=str(pretrained / "encoder.pth"),
        apn_channels=20,
        dropout=0.3,
        mean=None,
        std=None,
    )
    network, mean, std = main.build_network(args, Cityscapes.CLASSES, None)
    network.encoder.register_forward_hook(lambda *seen: features.update(training=seen[2]))
    # Pretraining shows the central 224 of 256 pixels; here they are the whole image.
    (tmp_path / "images/test").mkdir(parents=True)
    with Image.open(square) as image:
        image.crop((16, 16, 240, 240)).save(tmp_path / "images/test/central.png")
    central = DataLoader(
        Folder(tmp_path, "test", Cityscapes.CLASSES, height=224), collate_fn=as_lists
    )
    evaluate(network, central, to_floats(mean, std, torch.device("cpu")), 19, "")
    assert features["training"].std() > 0.01
    # Equal but for the order of sums, which may depend on where in memory an image lies.
    assert torch.allclose(features["training"], features["pretraining"], rtol=1e-4, atol=1e-5)


def test_fine_tuning_starts_with_the_pretrained_encoder(
    pretrained, script, cityscapes, monkeypatch, tmp_path
):
    started = {}

    def keep_start(training, *args, **kwargs):
        started.update({k: v.clone() for k, v in training.model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(utils.evaluation, "train_one_epoch", keep_start)
    stored = load_checkpoint(pretrained / "encoder.pth")["model"]
    for name in ("encoder.pth", "best.pth", "last.pth"):
        argv = ("--datadir", cityscapes, *QUICK, "--pretrained-encoder", pretrained / name)
        result = script("main.py", *argv, "--savedir", tmp_path / name.removesuffix(".pth"))
        assert result.status == 130
        assert f"{len(stored)} of {len(stored)} tensors of the encoder loaded" in result.out
        assert "normalised with mean [0.485, 0.456, 0.406]" in result.out
        assert "0 epochs of stage 1" in result.out
        assert same_weights({k: w for k, w in started.items() if k in stored}, stored)
        assert any(k.startswith("decoder.") for k in started)


def test_the_normalisation_stays_with_the_network(pretrained, script, cityscapes, tmp_path):
    argv = ("--datadir", cityscapes, *QUICK, "--D", 4, "--savedir")
    encoder = ("--pretrained-encoder", pretrained / "encoder.pth")
    assert script("main.py", *argv, "a", *encoder).status == 0
    tuned = load_checkpoint(tmp_path / "save/a/best.pth")
    assert tuned["mean"] == [0.485, 0.456, 0.406] and tuned["std"] == [0.229, 0.224, 0.225]
    again = script("main.py", *argv, "b", "--init", "save/a/best.pth")
    assert "normalised with mean [0.485, 0.456, 0.406]" in again.out
    assert load_checkpoint(tmp_path / "save/b/best.pth")["mean"] == tuned["mean"]
    assert script("main.py", "--savedir", "b", "--resume").status == 0


def test_a_foreign_encoder_is_normalised_as_the_options_say(script, fails, cityscapes, tmp_path):
    torch.save(Encoder().state_dict(), tmp_path / "foreign.pth")
    common = ("--datadir", cityscapes, *QUICK, "--D", 4)
    argv = (*common, "--pretrained-encoder", "foreign.pth")
    assert "normalised" not in script("main.py", *argv, "--savedir", "a").out
    assert load_checkpoint(tmp_path / "save/a/best.pth")["std"] == [1, 1, 1]
    options = ("--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 0.1)
    result = script("main.py", *argv, *options, "--savedir", "b")
    assert "normalised with mean [0.5, 0.4, 0.3] and std [0.2, 0.2, 0.1]" in result.out
    stored = load_checkpoint(tmp_path / "save/b/best.pth")
    assert stored["mean"] == [0.5, 0.4, 0.3] and stored["std"] == [0.2, 0.2, 0.1]
    assert script("main.py", "--savedir", "b", "--resume").status == 0

    line = fails("main.py", *common, "--init", "save/a/best.pth", *options, "--savedir", "c")
    assert "was trained on images normalised with mean [0.0, 0.0, 0.0]" in line
    line = fails("main.py", *argv, "--mean", 1, 1, 1, "--savedir", "c")
    assert "--mean and --std belong together" in line
    line = fails("main.py", *argv, "--mean", 1, 1, 1, "--std", 1, 0, 1, "--savedir", "c")
    assert "--std: 0 is not a positive number" in line


def test_a_classifier_is_not_a_network(pretrained, fails, cityscapes):
    argv = ("--datadir", cityscapes, *QUICK, "--savedir", "a", "--init", pretrained / "best.pth")
    assert "holds the encoder alone: give it as --pretrained-encoder" in fails("main.py", *argv)
    line = fails("eval_cityscapes_server.py", "--checkpoint", pretrained / "best.pth")
    assert "holds the encoder alone" in line


# Bad input: one line, status 2, nothing written


@pytest.fixture
def refused(fails, tmp_path):
    """Start a run that must be refused before it makes its folder; returns the line."""

    def run(datadir, *options) -> str:
        line = fails(NAME, "--datadir", datadir, *PRETRAIN_QUICK, *options, "--savedir", "no")
        assert not (tmp_path / "save").exists()
        return line

    return run


def test_a_datadir_that_is_missing_or_incomplete(refused, shapes_copy, tmp_path):
    assert "nowhere does not exist" in refused(tmp_path / "nowhere")
    (shapes_copy / "val").rename(tmp_path / "val")
    assert "has no folder val" in refused(shapes_copy)
    (shapes_copy / "train").rename(tmp_path / "train")
    assert "has no folder train" in refused(shapes_copy)


def test_classes_that_cannot_be(refused, shapes_copy):
    (shapes_copy / "train/empty").mkdir()
    assert "train/empty holds no images" in refused(shapes_copy)
    (shapes_copy / "train/empty").rename(shapes_copy / "val/strange")
    assert "not trained on (strange)" in refused(shapes_copy)
    (shapes_copy / "val/strange").rmdir()
    for split in ("train", "val"):
        for folder in sorted((shapes_copy / split).iterdir())[1:]:
            shutil.rmtree(folder)
    assert "one class alone" in refused(shapes_copy)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_image_is_named(refused, shapes_copy, split):
    path = next((shapes_copy / split / "rings").iterdir())
    path.write_bytes(path.read_bytes()[:-300])
    assert f"{split}/rings/{path.name} cannot be read as an image" in refused(shapes_copy)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_in_training_is_named(
    script, shapes_copy, tmp_path, monkeypatch, workers
):
    """After the check: it is found when it is read, and the checkpoint is kept."""
    path = next((shapes_copy / "train/rings").iterdir())
    good = path.read_bytes()

    def save_and_break(checkpoint, to):
        save_checkpoint(checkpoint, to)
        if to.name == "last.pth":
            path.write_bytes(good[:-300])

    argv = ("--datadir", shapes_copy, *PRETRAIN_QUICK, "--epochs", 2, "--lr", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(utils.run_folder, "save_checkpoint", save_and_break)
        result = script(NAME, *argv, "--workers", workers, "--savedir", "a")
    assert result.status == 2 and result.err.count("\n") == 1
    assert f"train/rings/{path.name} cannot be read as an image" in result.err
    path.write_bytes(good)
    assert script(NAME, "--savedir", "a", "--resume").status == 0
    assert len(read_log(tmp_path / "save/a")) == 2


def test_a_file_that_is_no_image_is_found_before_training(refused, shapes_copy):
    (shapes_copy / "val/rings/._00000.jpg").write_bytes(b"no picture")
    assert "._00000.jpg cannot be read as an image" in refused(shapes_copy)


def test_a_run_that_diverges_is_no_success(fails, shapes, tmp_path):
    argv = (NAME, "--datadir", shapes, *PRETRAIN_QUICK, "--epochs", 3, "--lr", 1e30)
    assert "training has diverged" in fails(*argv, "--savedir", "a")
    for path in (tmp_path / "save/a").glob("*.pth"):
        for name, weight in load_checkpoint(path)["model"].items():
            assert weight.isfinite().all(), (path, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", 8), "--size 8 is too small"),
        (("--epochs", 0), "--epochs: 0 is not a positive whole number"),
        (("--lr", "fast"), "--lr: fast is not a positive number"),
        (("--recipe", "old"), "invalid choice: 'old'"),
        (("--amp", "fp16", "--device", "cpu"), "--amp fp16 needs a CUDA GPU"),
        (("--device", "cuda:99"), "--device cuda:99 cannot be used here"),
    ],
)
def test_options_that_cannot_be(refused, shapes, options, message):
    assert message in refused(shapes, *options)


def test_an_output_folder_in_use(fails, shapes, pretrained):
    line = fails(NAME, "--datadir", shapes, *PRETRAIN_QUICK, "--savedir", pretrained)
    assert "holds a run already" in line


def test_no_place_for_the_embedded_shapes(fails, tmp_path):
    (tmp_path / "data").write_text("a file")
    assert "data/shapes cannot be made" in fails(NAME, "--savedir", "a")


def test_images_of_every_kind_are_trained_on(script, tmp_path):
    for split in ("train", "val"):
        for number, mode in enumerate(("L", "CMYK", "P", "I;16", "RGBA")):
            suffix = "jpg" if mode in ("L", "CMYK") else "png"
            folder = tmp_path / "kinds" / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (30, 50)).save(folder / f"{number}.{suffix}")
    argv = ("--datadir", tmp_path / "kinds", *PRETRAIN_QUICK, "--savedir", "a")
    assert script(NAME, *argv).status == 0
