import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT, read_log, run_script, same_weights, wait_for_the_next_second
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import datasets.drawn.streets
import utils.evaluation
import utils.losses
import utils.run_folder
from datasets.cityscapes import Cityscapes
from datasets.statistics import count_pixels
from datasets.transforms import Paper, Strong
from models.lednet import AuxiliaryHead, EncoderClassifier, LEDNet
from utils.checkpoint import load_checkpoint, load_network, save_checkpoint
from utils.losses import class_weights
from utils.metrics import ConfusionMatrix
from utils.optim import PRESETS
from utils.speed import count_parameters

# What a run leaves and says


def test_a_run_leaves_what_it_promises(trained, cityscapes):
    assert {"args.json", "log.csv", "last.pth", "best.pth", "encoder.pth", "class_counts.json"} < {
        path.name for path in trained.iterdir()
    }
    args = json.loads((trained / "args.json").read_text())
    assert args["datadir"] == str(cityscapes) and args["epochs"] == args["encoder_epochs"] == 1
    assert args["lr"] == 5e-4 and args["apn_channels"] == 20

    rows = read_log(trained)
    assert [(row["stage"], row["epoch"]) for row in rows] == [("1", "1"), ("2", "1")]
    for row in rows:
        assert float(row["train_loss"]) > 0 and 0 <= float(row["val_miou"]) <= 1
        assert float(row["lr"]) == 5e-4 and "iou bicycle" in row

    _, best = load_network(trained / "best.pth")
    assert best["num_classes"] == 19 and best["class_names"][0] == "road"
    assert best["colors"][0] == [128, 64, 128] and best["categories"][0] == "flat"
    assert best["label_ids"][:2] == [7, 8] and best["train_images"] == 6
    assert best["mean"] == [0, 0, 0] and best["std"] == [1, 1, 1] and best["height"] == 64
    assert best["dataset"] == "cityscapes" and best["epoch"] == 1 and best["args"] == args
    assert best["best"]["miou"] == pytest.approx(float(rows[1]["val_miou"]))
    resumable = {"optimizer", "scheduler", "scaler", "processes"}
    assert not resumable & best.keys()
    assert resumable < load_checkpoint(trained / "last.pth").keys()


def test_the_head_of_stage_1_is_in_no_deployable_file(trained):
    for name in ("best.pth", "encoder.pth"):
        assert not any("head" in key for key in load_checkpoint(trained / name)["model"])


def test_tensorboard_shows_scores_and_pictures(trained):
    events = EventAccumulator(str(trained)).Reload()
    tags = events.Tags()
    assert {"loss/train", "loss/val", "lr", "miou/val", "iou/road"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2]
    assert set(tags["images"]) == {"val/0", "val/1", "val/2"}
    picture = events.Images("val/0")[0]
    assert (picture.width, picture.height) == (3 * 128, 64)


def test_class_counts_are_cached(trained, cityscapes):
    counts = json.loads((trained / "class_counts.json").read_text())
    assert list(counts)[:2] == ["road", "sidewalk"] and list(counts)[-1] == "ignored"
    assert sum(counts.values()) == 6 * 64 * 128


def test_a_run_says_what_it_does_and_what_comes_next(script, cityscapes, tmp_path):
    argv = ("--datadir", cityscapes, *QUICK, "--decoder", "--iouTrain", "--savedir", "a")
    result = script("main.py", *argv)
    assert result.status == 0
    assert "LEDNet, D = 20: 951,835 parameters, on c" in result.out
    assert "6 of train to train on, 3 of val to validate, 19 classes" in result.out
    assert "images: 128x64, in batches of 2, by 0 workers; 0 epochs of stage 1, 1 of" in result.out
    assert "val is trained on" not in result.out
    assert "output: save/a" in result.out
    assert "stage 2 epoch 1/1: train loss" in result.out and "stage 1 epoch" not in result.out
    assert "--checkpoint save/a/best.pth" in result.out
    assert re.search(r"^road +[\d-]", result.out, re.MULTILINE)
    (row,) = read_log(tmp_path / "save/a")
    assert 0 <= float(row["train_miou"]) <= 1
    assert not (tmp_path / "save/a/encoder.pth").exists()


def test_the_embedded_default_is_drawn_once(script, tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.drawn.streets.COUNTS, "train", 2)
    for split in ("val", "test", "train_extra"):
        monkeypatch.setitem(datasets.drawn.streets.COUNTS, split, 1)
    argv = ("--num-epochs", 1, "--workers", 0, "--decoder", "--height", 64)
    first = script("main.py", *argv, "--savedir", "a")
    assert first.status == 0 and "drawing street scenes into data/synthetic" in first.out
    assert "2 of train to train on" in first.out
    made = (tmp_path / "data/synthetic").stat().st_mtime_ns
    second = script("main.py", *argv, "--savedir", "b")
    assert second.status == 0 and "drawing" not in second.out
    assert (tmp_path / "data/synthetic").stat().st_mtime_ns == made
    args = json.loads((tmp_path / "save/b/args.json").read_text())
    assert args["preset"] == "quick" and args["lr"] != 5e-4 and args["dataset"] == "synthetic"


def test_help_shows_defaults(script):
    result = script("main.py", "--help")
    assert result.status == 0
    shown = " ".join(result.out.split())
    for text in (
        "--apn-channels",
        "--D",
        "default 512",
        "default 0.0005",
        "cityscapes: fine, coar",
    ):
        assert text in shown


def test_options_of_the_original_code(script, cityscapes, tmp_path):
    result = script(
        *("main.py", "--model", "lednet", "--port", 8097, "--visualize", "--cuda", "--iouVal"),
        *("--steps-plot", 10, "--datadir", cityscapes, "--height", 64, "--num-epochs", 1),
        *("--batch-size", 3, "--num-workers", 0, "--steps-loss", 1, "--epochs-save", 1),
        *("--savedir", tmp_path / "old", "--apn-channels", 4, "--encoder-epochs", 0),
    )
    assert result.status == 0
    notes = [line for line in result.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 6
    assert "note: --port is ignored: it means nothing any more" in notes
    assert "stage 2 epoch 1/1: step 2/2, loss" in result.out
    assert (tmp_path / "old/stage2-epoch001.pth").exists()


def test_a_last_batch_of_one_is_dropped(script, cityscapes, tmp_path):
    argv = ("--datadir", cityscapes, *QUICK, "--decoder", "--D", 4, "--steps-loss", 1)
    result = script("main.py", *argv, "--batch-size", 5, "--savedir", "a")
    assert result.status == 0 and "step 1/1" in result.out


# Resuming

EVERY = ("--height", 64, "--batch-size", 2, "--workers", 1, "--D", 4, "--augment", "strong")
RECIPES = {
    "two stages": (*EVERY, "--encoder-epochs", 2, "--epochs", 2),
    "one stage": (
        *(*EVERY, "--encoder-epochs", 0, "--epochs", 3, "--aux-weight", 0.4, "--ema"),
        *("--optimizer", "adamw", "--schedule", "onecycle", "--cache", "ram", "--lr", 2e-3),
    ),
}
EPOCHS = {"two stages": [(1, 1), (1, 2), (2, 1), (2, 2)], "one stage": [(2, 1), (2, 2), (2, 3)]}


@pytest.fixture(scope="module")
def whole(cityscapes, tmp_path_factory):
    """The folder of a run by one of the RECIPES that was never stopped; each is run once."""

    @cache
    def folder_of(recipe: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "whole"
        argv = ("--datadir", cityscapes, *RECIPES[recipe], "--savedir", folder)
        assert run_script("main.py", *argv) == 0
        return folder

    return folder_of


@pytest.mark.parametrize(
    ("recipe", "stage", "epoch", "saved"),
    [
        *(("two stages", *last) for last in ((1, 1, True), (1, 2, True), (2, 1, True))),
        *(("two stages", *last) for last in ((2, 1, False), (2, 2, False))),
        *(("one stage", *last) for last in ((2, 1, True), (2, 2, True), (2, 3, False))),
    ],
)
def test_a_resumed_run_ends_as_the_one_that_never_stopped(
    whole, script, cityscapes, tmp_path, monkeypatch, recipe, stage, epoch, saved
):
    """Stopped after last.pth of an epoch, or before it, when the log has its row already."""

    class Stop(Exception):
        pass

    def save_and_stop(checkpoint, path):
        done = (checkpoint["stage"], checkpoint.get("epoch"))
        here = path.name == "last.pth" and done == (stage, epoch)
        if saved or not here:
            save_checkpoint(checkpoint, path)
        if here:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(utils.run_folder, "save_checkpoint", save_and_stop)
        argv = ("--datadir", cityscapes, *RECIPES[recipe], "--savedir", "stopped")
        script("main.py", *argv)
    wait_for_the_next_second()
    result = script("main.py", "--savedir", "stopped", "--resume")
    assert result.status == 0
    place = EPOCHS[recipe].index((stage, epoch))
    done = EPOCHS[recipe][place if saved else place - 1]
    assert f"resuming after epoch {done[1]} of stage {done[0]}" in result.out

    stopped, unbroken = tmp_path / "save/stopped", whole(recipe)
    names = {path.name for path in unbroken.glob("*.pth")}
    assert names == {path.name for path in stopped.glob("*.pth")}
    assert names == {"last.pth", "previous.pth", "best.pth"} | (
        {"encoder.pth"} if recipe == "two stages" else set()
    )
    for name in names - {"previous.pth"}:
        ours, theirs = load_checkpoint(stopped / name), load_checkpoint(unbroken / name)
        assert same_weights(ours["model"], theirs["model"]), name
        for key in ("epoch", "best"):
            assert repr(ours.get(key)) == repr(theirs.get(key)), name  # some scores are NaN
    ours, theirs = load_checkpoint(stopped / "last.pth"), load_checkpoint(unbroken / "last.pth")
    assert same_weights(ours["training_model"], theirs["training_model"])
    assert ours["ema_updates"] == theirs["ema_updates"]
    for ours, theirs in zip(read_log(stopped), read_log(unbroken), strict=True):
        for clock in ("seconds", "images_per_second", "data_wait"):
            del ours[clock], theirs[clock]
        assert ours == theirs
    steps = [e.step for e in EventAccumulator(str(stopped)).Reload().Scalars("loss/train")]
    assert steps == list(range(1, len(EPOCHS[recipe]) + 1))


def test_a_finished_run_can_be_resumed_and_changes_nothing(trained, script, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    result = script("main.py", "--savedir", folder, "--resume")
    assert result.status == 0 and "mIoU" in result.out
    for name in ("log.csv", "args.json", "class_counts.json", "best.pth", "last.pth"):
        assert (folder / name).read_bytes() == (trained / name).read_bytes(), name


def test_a_run_without_a_checkpoint_resumes_from_the_start(script, cityscapes, tmp_path):
    argv = ("--datadir", cityscapes, *QUICK, "--decoder", "--D", 4, "--savedir", "a")
    assert script("main.py", *argv).status == 0
    folder = tmp_path / "save/a"
    weights = load_checkpoint(folder / "last.pth")["model"]
    (folder / "last.pth").unlink()
    result = script("main.py", "--savedir", "a", "--resume")
    assert "resuming from the start" in result.out
    assert same_weights(load_checkpoint(folder / "last.pth")["model"], weights)
    assert len(read_log(folder)) == 1


def test_what_may_not_change_on_resume(trained, fails):
    argv = ("main.py", "--savedir", trained, "--resume")
    assert "has --height 64" in fails(*argv, "--height", 128)
    assert "has --apn-channels 20" in fails(*argv, "--D", 8)
    assert "--resume needs --savedir" in fails("main.py", "--resume")
    assert "--savedir: expected one argument" in fails("main.py", "--savedir")


def test_another_data_set_is_refused_on_resume(trained, fails, cityscapes_copy, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    for split in ("leftImg8bit", "gtFine"):
        for path in (cityscapes_copy / split / "train").rglob("*_000005_*"):
            path.unlink()
        for path in (cityscapes_copy / split / "train").rglob("*_000004_*"):
            path.unlink()
    argv = ("main.py", "--savedir", folder, "--resume", "--datadir", cityscapes_copy)
    assert "another number of training images" in fails(*argv)


def test_a_data_set_that_moved_can_be_resumed(trained, script, cityscapes_copy, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    result = script("main.py", "--savedir", folder, "--resume", "--datadir", cityscapes_copy)
    assert result.status == 0 and "counting the pixels" in result.out


def test_precision_may_change_on_resume(trained, script, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    args = json.loads((folder / "args.json").read_text()) | {"amp": "fp16"}
    (folder / "args.json").write_text(json.dumps(args))
    assert script("main.py", "--savedir", folder, "--resume", "--amp", "off").status == 0


def test_where_images_are_kept_may_change_on_resume(trained, script, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    assert script("main.py", "--savedir", folder, "--resume", "--cache", "ram").status == 0


def test_a_compiled_run_ends_with_the_same_weights(script, cityscapes, tmp_path, monkeypatch):
    """By a backend that leaves all operations as they are: the default one compiles for minutes."""
    argv = ("--datadir", cityscapes, *QUICK, "--D", 4, "--aux-weight", 0.4, "--ema")
    assert script("main.py", *argv, "--savedir", "plain").status == 0
    compiled = []

    def compile_eagerly(model, compile=torch.compile, **options) -> torch.nn.Module:
        compiled.append(type(model).__name__)
        return compile(model, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    assert script("main.py", *argv, "--savedir", "compiled", "--compile").status == 0
    assert compiled == ["EncoderClassifier", "AuxiliaryHead"]
    for name in ("encoder.pth", "best.pth", "last.pth"):
        ours, theirs = (
            load_checkpoint(tmp_path / "save" / run / name) for run in ("compiled", "plain")
        )
        assert same_weights(ours["model"], theirs["model"])
    assert same_weights(ours["training_model"], theirs["training_model"])
    # Where it runs may change.
    assert script("main.py", "--savedir", "plain", "--resume", "--compile").status == 0


def test_the_same_command_with_resume_goes_on(script, cityscapes, tmp_path):
    argv = ("--datadir", cityscapes, *QUICK, "--decoder", "--port", 1, "--D", 4, "--savedir", "a")
    assert script("main.py", *argv).status == 0
    result = script("main.py", *argv, "--resume")
    assert result.status == 0 and result.err.count("note: --port") == 1


def test_a_smaller_batch_holds_from_a_resume_on(script, cityscapes, tmp_path):
    argv = ("--datadir", cityscapes, *QUICK, "--decoder", "--epochs", 2, "--D", 4, "--savedir", "a")
    assert script("main.py", *argv, "--batch-size", 3).status == 0
    again = script("main.py", "--savedir", "a", "--resume", "--batch-size", 2)
    assert again.status == 0 and "note: steps are of 2 images, not 3" in again.out
    assert json.loads((tmp_path / "save/a/args.json").read_text())["batch_size"] == 2
    assert "batches of 2" in script("main.py", "--savedir", "a", "--resume").out


def test_a_loss_that_is_not_finite_leaves_no_trace_of_its_epoch(fails, cityscapes, tmp_path):
    """One step an epoch: it is looked at before anything of the epoch is scored or kept."""
    argv = ("--datadir", cityscapes, *QUICK, "--batch-size", 6, "--D", 4, "--savedir", "a")
    line = fails("main.py", *argv, "--epochs", 3, "--decoder", "--lr", 1e30)
    assert "training has diverged" in line
    assert not list((tmp_path / "save/a").glob("*.pth"))
    assert not (tmp_path / "save/a/log.csv").exists()


def test_the_last_good_checkpoint_may_be_of_the_stage_before(
    script, cityscapes, tmp_path, monkeypatch
):
    real = utils.losses.with_auxiliary
    monkeypatch.setattr(
        utils.losses,
        "with_auxiliary",
        lambda *args: lambda *given: real(*args)(*given) * float("nan"),
    )
    argv = ("--datadir", cityscapes, *QUICK, "--D", 4, "--aux-weight", 0.4, "--savedir", "a")
    result = script("main.py", *argv)
    assert result.status == 2 and "in step 1 of epoch 1 of stage 2" in result.err
    assert "the last good checkpoint is save/a/last.pth" in result.err
    assert load_checkpoint(tmp_path / "save/a/last.pth")["stage"] == 1


def test_sigterm_before_training_cleans_up(cityscapes, tmp_path):
    code = (
        "import os, runpy, signal, sys, datasets.check\n"
        "datasets.check.check_headers = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path('main.py', run_name='__main__')"
    )
    argv = ["main.py", "--datadir", str(cityscapes), "--savedir", str(tmp_path / "deep/run")]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 143 and done.stderr == "main.py: stopped by SIGTERM\n"
    assert not (tmp_path / "deep").exists()


def test_what_cannot_be_resumed_from(trained, fails, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    argv = ("main.py", "--savedir", folder, "--resume")
    (folder / "previous.pth").unlink()
    shutil.copy(folder / "best.pth", folder / "last.pth")
    assert "does not hold the step of a run" in fails(*argv)
    (folder / "last.pth").write_bytes(b"")
    assert "last.pth is not a checkpoint" in fails(*argv)
    (folder / "args.json").write_text("[]")
    assert "holds no run to resume" in fails(*argv)


def test_a_damaged_cache_of_the_counts_is_made_again(trained, script, tmp_path):
    folder, counts = shutil.copytree(trained, tmp_path / "copy"), "class_counts.json"
    (folder / counts).write_text('{"road":')
    assert script("main.py", "--savedir", folder, "--resume").status == 0
    assert (folder / counts).read_text() == (trained / counts).read_text()


# The recipe


def test_the_learning_rate_falls_with_every_step(whole):
    """Poly schedule of power 0.9 over the 2 x 3 steps of each stage."""
    for row in read_log(whole("two stages")):
        done = 3 * (int(row["epoch"]) - 1) / 6
        assert float(row["lr"]) == pytest.approx(5e-4 * (1 - done) ** 0.9)


def options_of_a_run(script, datadir, monkeypatch, *options) -> list[dict]:
    """Run an epoch of each stage; returns what each stage was trained with."""
    seen, real = [], utils.evaluation.train_one_epoch

    def train_one_epoch(training, forward, loader, **used):
        group = dict(training.optimizer.param_groups[0])
        seen.append(vars(training) | used | {"loader": loader, "group": group})
        return real(training, forward, loader, **used)

    with monkeypatch.context() as patch:
        patch.setattr(utils.evaluation, "train_one_epoch", train_one_epoch)
        argv = ("--datadir", datadir, *QUICK, "--D", 4, "--savedir", "seen", *options)
        assert script("main.py", *argv).status == 0
    return seen


@pytest.mark.parametrize("loss", ["ce", "ohem"])
def test_loss_weights_and_optimizer_are_those_of_the_paper(script, cityscapes, monkeypatch, loss):
    stages = options_of_a_run(script, cityscapes, monkeypatch, "--loss", loss)
    counts = count_pixels([Cityscapes(cityscapes, "train")], 19)
    expected = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "initial_lr": 5e-4}
    assert len(stages) == 2
    for used, c in zip(stages, (1.20, 1.10), strict=True):
        assert used["loss_function"].func is utils.losses.LOSSES[loss]
        assert torch.equal(used["loss_function"].keywords["weight"], class_weights(counts, c))
        assert type(used["optimizer"]) is torch.optim.Adam
        assert expected.items() <= used["group"].items()
        assert type(used["scheduler"]) is torch.optim.lr_scheduler.PolynomialLR
        assert used["ema"] is None


@pytest.mark.parametrize(("c", "even"), [(0, True), (1.02, False)])
def test_class_weights_may_be_stronger_or_off(script, cityscapes, monkeypatch, c, even):
    for used in options_of_a_run(script, cityscapes, monkeypatch, "--weight-c", c):
        weight = used["loss_function"].keywords["weight"]
        counts = count_pixels([Cityscapes(cityscapes, "train")], 19)
        assert torch.equal(weight, torch.ones(19) if even else class_weights(counts, c))


def test_another_optimizer_and_schedule(script, cityscapes, monkeypatch, tmp_path):
    options = ("--optimizer", "adamw", "--schedule", "onecycle", "--weight-decay", 0.02)
    for used in options_of_a_run(script, cityscapes, monkeypatch, *options, "--lr", 3e-3):
        assert type(used["optimizer"]) is torch.optim.AdamW
        assert type(used["scheduler"]) is torch.optim.lr_scheduler.OneCycleLR
        assert used["group"]["weight_decay"] == 0.02 and used["group"]["max_lr"] == 3e-3
    (last,) = load_checkpoint(tmp_path / "save/seen/last.pth")["optimizer"]["param_groups"]
    assert last["weight_decay"] == 0.02
    assert float(read_log(tmp_path / "save/seen")[0]["lr"]) == pytest.approx(3e-5)


def test_the_average_of_the_weights_is_kept(script, cityscapes, tmp_path):
    argv = ("--datadir", cityscapes, *QUICK, "--D", 4)
    assert script("main.py", *argv, "--ema", "--savedir", "ema").status == 0
    assert script("main.py", *argv, "--no-ema", "--savedir", "plain").status == 0
    plain, last = (load_checkpoint(tmp_path / f"save/{name}/last.pth") for name in ("plain", "ema"))
    assert last["ema_updates"] == 3 and plain["ema_updates"] == 0
    # It is of stage 2, and changes nothing of what is trained.
    assert same_weights(last["training_model"], plain["training_model"])
    assert same_weights(plain["model"], plain["training_model"])
    assert not same_weights(last["model"], last["training_model"])
    best = load_checkpoint(tmp_path / "save/ema/best.pth")
    assert same_weights(best["model"], last["model"])
    encoders = (load_checkpoint(tmp_path / f"save/{n}/encoder.pth") for n in ("plain", "ema"))
    assert same_weights(*(encoder["model"] for encoder in encoders))


def test_the_second_head_is_trained_but_neither_counted_nor_kept(script, cityscapes, tmp_path):
    argv = ("--datadir", cityscapes, *QUICK, "--D", 4, "--decoder", "--aux-weight", 0.4)
    result = script("main.py", *argv, "--iouTrain", "--epochs-save", 1, "--savedir", "a")
    assert result.status == 0
    network = LEDNet(19, 4)
    assert f"LEDNet, D = 4: {count_parameters(network):,} parameters" in result.out
    folder = tmp_path / "save/a"
    for name in ("best.pth", "last.pth", "stage2-epoch001.pth"):
        assert load_checkpoint(folder / name)["model"].keys() == network.state_dict().keys(), name
    load_network(folder / "best.pth")
    training = load_checkpoint(folder / "last.pth")["training_model"]
    heads = {name for name in training if name.startswith("head.")}
    assert heads == {"head.weight", "head.bias"}
    assert training.keys() - heads == {f"network.{name}" for name in network.state_dict()}
    assert 0 <= float(read_log(folder)[0]["train_miou"]) <= 1


def test_the_second_heads_loss_is_added_in_stage_2(script, cityscapes, monkeypatch):
    first, second = options_of_a_run(script, cityscapes, monkeypatch, "--aux-weight", 0.25)
    assert type(first["model"]) is EncoderClassifier and type(second["model"]) is AuxiliaryHead
    # Of even logits the loss is ln 19.
    labels, logits = torch.zeros(2, 16, 16).long(), torch.zeros(2, 19, 16, 16)
    assert first["loss_function"](logits, labels).item() == pytest.approx(np.log(19))
    both = second["loss_function"]((logits, logits[..., ::8, ::8]), labels)
    assert both.item() == pytest.approx(1.25 * np.log(19))


def test_dropout_is_that_of_the_option(script, cityscapes, monkeypatch):
    stages = options_of_a_run(script, cityscapes, monkeypatch, "--dropout", 0.15)
    for used in stages:
        rates = [m.p for m in used["model"].modules() if isinstance(m, torch.nn.Dropout2d)]
        assert rates == [0.03] * 10 + [0.15] * 16


def scripted_scores(monkeypatch, *mious):
    """Make every validation find the next of some IoUs, in the first class alone."""
    scores = iter(mious)

    def evaluate(*args, **kwargs):
        confusion = ConfusionMatrix(19)
        right = round(1000 * next(scores))
        confusion.counts[0, 0], confusion.counts[0, 1] = right, 1000 - right
        return 1.0, confusion

    monkeypatch.setattr(utils.evaluation, "evaluate", evaluate)


def test_the_best_epoch_is_kept(script, cityscapes, tmp_path, monkeypatch):
    scripted_scores(monkeypatch, 0.4, 0.8, 0.6)
    argv = ("--datadir", cityscapes, *QUICK, "--decoder", "--epochs", 3, "--D", 4)
    result = script("main.py", *argv, "--savedir", "a", "--epochs-save", 1)
    assert result.status == 0 and "after epoch 2, the best" in result.out
    folder = tmp_path / "save/a"
    best = load_checkpoint(folder / "best.pth")
    assert best["epoch"] == 2 and best["best"]["epoch"] == 2
    assert same_weights(best["model"], load_checkpoint(folder / "stage2-epoch002.pth")["model"])
    assert load_checkpoint(folder / "last.pth")["epoch"] == 3


def test_val_every_skips_validations_but_the_last(script, cityscapes, tmp_path, monkeypatch):
    scripted_scores(monkeypatch, 0.4, 0.3)
    argv = ("--datadir", cityscapes, *QUICK, "--decoder", "--epochs", 3, "--D", 4)
    assert script("main.py", *argv, "--savedir", "a", "--val-every", 2).status == 0
    rows = read_log(tmp_path / "save/a")
    assert [row["val_miou"] == "nan" for row in rows] == [True, False, False]
    assert load_checkpoint(tmp_path / "save/a/best.pth")["epoch"] == 2


# Where a run starts from


def test_a_pretrained_encoder_skips_stage_1(trained, script, cityscapes, tmp_path, monkeypatch):
    argv = (
        "--datadir",
        cityscapes,
        *QUICK,
        "--D",
        4,
        "--pretrainedEncoder",
        trained / "encoder.pth",
    )
    started = {}

    def keep_start(training, *args, **kwargs):
        started.update({k: v.clone() for k, v in training.model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.evaluation.train_one_epoch", keep_start)
    result = script("main.py", *argv, "--savedir", "a")
    assert result.status == 130 and "tensors of the encoder loaded" in result.out
    stored = load_checkpoint(trained / "encoder.pth")["model"]
    assert same_weights({k: v for k, v in started.items() if k.startswith("encoder.")}, stored)
    assert any(k.startswith("decoder.") for k in started)


def test_coarse_first_then_fine(script, cityscapes, tmp_path):
    common = ("main.py", "--datadir", cityscapes, *QUICK, "--D", 4)
    coarse = script(*common, "--decoder", "--annotations", "coarse", "--savedir", "coarse")
    assert "6 of train_coarse + 3 of train_extra to train on" in coarse.out
    fine = script(*common[:-2], "--state", "save/coarse/best.pth", "--savedir", "fine")
    total = len(load_checkpoint(tmp_path / "save/coarse/best.pth")["model"])
    assert fine.status == 0 and f"best.pth: {total} of {total} tensors loaded" in fine.out
    assert "stage 1" not in fine.out.split("output:")[1] and "D = 4" in fine.out


def test_fine_and_coarse_together(script, cityscapes):
    argv = ("--datadir", cityscapes, *QUICK, "--decoder", "--D", 4, "--train-on", "fine+coarse")
    result = script("main.py", *argv, "--steps-loss", 1, "--savedir", "a")
    assert "6 of train + 3 of train_extra to train on" in result.out
    assert "step 4/4" in result.out  # 9 images in twos, the last one dropped


def test_init_from_other_classes_replaces_the_classifier(trained, script, cityscapes, tmp_path):
    checkpoint = load_checkpoint(trained / "best.pth")
    for name in ("weight", "bias"):
        key = f"decoder.classifier.{name}"
        checkpoint["model"][key] = checkpoint["model"][key][:7].clone()
    checkpoint |= {"num_classes": 7, "class_names": [f"class {n}" for n in range(7)]}
    save_checkpoint(checkpoint, tmp_path / "seven.pth")
    argv = ("--datadir", cityscapes, *QUICK, "--init", tmp_path / "seven.pth", "--savedir", "a")
    result = script("main.py", *argv)
    assert result.status == 0
    assert "starting anew, since the classes differ: decoder.classifier.weight" in result.out


def test_other_recipes_train_as_they_say(script, cityscapes, monkeypatch):
    augment = ("--augment", "strong", "--scale", 0.9, 1.1, "--jitter", 0.2, "--crop", 64, 96)
    options = (*augment, "--amp", "bf16", "--loss", "ohem", "--device", "cpu")
    stages = options_of_a_run(script, cityscapes, monkeypatch, *options)
    # Labels of stage 1 are 8 times smaller.
    assert [used["prepare"].label_stride for used in stages] == [8, 1]
    for used in stages:
        recipe = used["prepare"].pair
        assert type(recipe) is Strong and used["prepare"].jitter == 0.2
        assert recipe.size == (64, 96) and recipe.scale == (0.9, 1.1)
        assert used["amp_dtype"] == torch.bfloat16
        assert used["loss_function"].func is utils.losses.ohem_cross_entropy


def test_the_published_augmentation_is_the_default(script, cityscapes, monkeypatch):
    for used in options_of_a_run(script, cityscapes, monkeypatch):
        assert type(used["prepare"].pair) is Paper and used["prepare"].jitter == 0


def test_parts_are_of_the_size_of_the_images_where_no_other_is_said(
    script, cityscapes, monkeypatch
):
    options = ("--augment", "strong", "--height", 70)
    used = options_of_a_run(script, cityscapes, monkeypatch, *options)[0]
    assert used["prepare"].pair.size == (70, 140)


def test_normalisation_comes_with_the_encoder(trained, script, cityscapes, tmp_path, monkeypatch):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
    checkpoint = load_checkpoint(trained / "encoder.pth") | {"mean": mean, "std": std}
    save_checkpoint(checkpoint, tmp_path / "encoder.pth")
    options = ("--pretrained-encoder", tmp_path / "encoder.pth")
    (used,) = options_of_a_run(script, cityscapes, monkeypatch, *options)
    best = load_checkpoint(tmp_path / "save/seen/best.pth")
    assert best["mean"] == mean and best["std"] == std
    seen = [used["prepare"](*batch)[0] for _ in range(5) for *batch, _, _ in used["loader"]]
    # The shift leaves black borders: 0 in the image is -mean / std for the network.
    for channel, darkest in enumerate(torch.cat(seen).amin(dim=(0, 2, 3)).tolist()):
        assert darkest == pytest.approx(-mean[channel] / std[channel])


# Presets


def stopped_before_training(script, monkeypatch, *argv):
    """Run main.py up to the first batch: everything is checked and written by then."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(utils.evaluation, "train_one_epoch", interrupted)
        result = script("main.py", *argv)
    assert result.status == 130, result.err
    return result


def test_every_preset_says_the_same_options():
    assert set(PRESETS) >= {"paper", "quick", "cityscapes", "camvid"}
    for name, values in PRESETS.items():
        assert values.keys() == PRESETS["paper"].keys(), name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_reaches_the_run(script, cityscapes, tmp_path, monkeypatch, preset):
    argv = ("--datadir", cityscapes, "--workers", 0, "--D", 4, "--preset", preset)
    result = stopped_before_training(script, monkeypatch, *argv, "--savedir", tmp_path / "a")
    args = json.loads((tmp_path / "a/args.json").read_text())
    assert args["preset"] == preset and f"preset {preset}" in result.out
    for name, value in PRESETS[preset].items():
        assert args[name] == value, name


STRONGER = {
    "height": 72, "augment": "strong", "scale": [0.6, 3.0], "jitter": 0.1, "crop": [70, 80],
    "cache": "ram", "encoder_epochs": 2, "epochs": 7, "batch_size": 3, "optimizer": "adamw",
    "lr": 0.125, "weight_decay": 0.5, "schedule": "onecycle", "loss": "ohem", "weight_c": 1.5,
    "aux_weight": 0.7, "dropout": 0.0, "ema": True, "val_every": 2,
}  # fmt: skip
WEAKER = {
    "height": 72, "augment": "paper", "cache": "off", "encoder_epochs": 1, "optimizer": "adam",
    "weight_decay": 0.0, "schedule": "poly", "aux_weight": 0.0, "ema": False,
}  # fmt: skip


@pytest.mark.parametrize(("preset", "options"), [("paper", STRONGER), ("camvid", WEAKER)])
def test_options_override_a_preset(script, cityscapes, tmp_path, monkeypatch, preset, options):
    argv = ["--datadir", cityscapes, "--workers", 0, "--D", 4, "--preset", preset]
    for name, value in options.items():
        assert value != PRESETS[preset][name], name
        option = name.replace("_", "-")
        if isinstance(value, bool):
            argv += [f"--{option}" if value else f"--no-{option}"]
        else:
            argv += [f"--{option}", *(value if isinstance(value, list) else [value])]
    stopped_before_training(script, monkeypatch, *argv, "--savedir", tmp_path / "a")
    args = json.loads((tmp_path / "a/args.json").read_text())
    assert STRONGER.keys() == PRESETS["paper"].keys()
    for name, value in (PRESETS[preset] | options).items():
        assert args[name] == value, name


def test_without_a_preset_a_data_set_is_trained_on_as_published(trained):
    args = json.loads((trained / "args.json").read_text())
    assert args["preset"] == "paper" and args["optimizer"] == PRESETS["paper"]["optimizer"]


def test_help_shows_what_each_preset_says(script):
    sections = re.split(r"\n  --", script("main.py", "--help").out)
    shown = {text.split()[0].rstrip(","): " ".join(text.split()) for text in sections}
    assert "paper,quick,cityscapes,camvid" in shown["preset"]
    for name, texts in {
        "height": ["default 512", "quick 160", "cityscapes 1024", "camvid 360"],
        "crop": ["default none", "cityscapes 1024 1024", "camvid 240 320"],
        "optimizer": ["default adam", "cityscapes adamw"],
        "loss": ["default ce", "cityscapes ohem"],
        "ema": ["default off", "cityscapes on", "camvid on"],
    }.items():
        for text in texts:
            assert text in shown[name], (name, text)


# Bad input: one line, status 2, nothing written


@pytest.fixture
def refused(fails, tmp_path):
    """Start a run that must be refused before it makes its folder; returns the line."""

    def run(datadir, *options) -> str:
        line = fails("main.py", "--datadir", datadir, *QUICK, *options, "--savedir", "refused")
        assert not (tmp_path / "save").exists()
        return line

    return run


def test_a_datadir_that_is_missing_or_empty(refused, cityscapes_copy, tmp_path):
    assert "nowhere does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no folder leftImg8bit/train" in refused(tmp_path / "empty")
    (cityscapes_copy / "gtCoarse").rename(tmp_path / "away")
    assert "has no folder gtCoarse/train" in refused(cityscapes_copy, "--train-on", "coarse")


def test_an_image_without_its_label(refused, cityscapes_copy):
    label = next((cityscapes_copy / "gtFine/train").rglob("*labelIds.png"))
    label.unlink()
    assert label.name in refused(cityscapes_copy)


def test_a_truncated_image(refused, cityscapes_copy):
    image = next((cityscapes_copy / "leftImg8bit/val").rglob("*.png"))
    image.write_bytes(image.read_bytes()[:3000])
    assert image.name in refused(cityscapes_copy)


def test_a_text_file_named_png(refused, cityscapes_copy):
    image = next((cityscapes_copy / "leftImg8bit/train").rglob("*.png"))
    image.write_text("not a picture")
    assert image.name in refused(cityscapes_copy)


@pytest.mark.parametrize(("split", "workers"), [("train", 0), ("train", 2), ("val", 0)])
def test_a_label_with_an_unknown_id(refused, cityscapes_copy, split, workers):
    path = next((cityscapes_copy / "gtFine" / split).rglob("*labelIds.png"))
    label = np.array(Image.open(path))
    label[0, 0] = 200
    Image.fromarray(label).save(path)
    line = refused(cityscapes_copy, "--workers", workers)
    assert path.name in line and "label id 200" in line


def test_a_label_of_another_size(refused, cityscapes_copy):
    path = next((cityscapes_copy / "gtFine/val").rglob("*labelIds.png"))
    Image.new("L", (32, 32), 7).save(path)
    assert f"{path.name} is 32x32 but its image is 128x64" in refused(cityscapes_copy)


def test_images_of_several_sizes_need_parts_of_one(refused, cityscapes_copy):
    """Of all that is trained on: the odd one is in the second part."""
    images, labels = (
        next((cityscapes_copy / folder / "train_extra").rglob("*_000001_*_l*"))
        for folder in ("leftImg8bit", "gtCoarse")
    )
    Image.new("RGB", (90, 64)).save(images)
    Image.new("L", (90, 64)).save(labels)
    line = refused(cityscapes_copy, "--train-on", "fine+coarse")
    assert "are 90 to 128 wide: give --augment strong and --crop 64 90" in line
    assert "are 90 to 128 wide" in refused(
        cityscapes_copy, "--train-on", "fine+coarse", "--augment", "strong"
    )


def test_an_image_that_breaks_while_it_is_read_into_memory(refused, cityscapes_copy):
    image = next((cityscapes_copy / "leftImg8bit/val").rglob("*.png"))
    good = image.read_bytes()
    image.write_bytes(good[:200] + bytes(1800) + good[2000:])
    assert image.name in refused(cityscapes_copy, "--cache", "ram")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_in_training_is_named_and_the_checkpoint_kept(
    script, cityscapes_copy, tmp_path, monkeypatch, workers
):
    """Its header and end are in place, so only decoding finds it."""
    image = next((cityscapes_copy / "leftImg8bit/train").rglob("*.png"))
    good = image.read_bytes()

    def save_and_break(checkpoint, path):
        save_checkpoint(checkpoint, path)
        if path.name == "last.pth":
            image.write_bytes(good[:200] + bytes(1800) + good[2000:])

    argv = ("--datadir", cityscapes_copy, *QUICK, "--decoder", "--epochs", 2, "--D", 4)
    with monkeypatch.context() as patch:
        patch.setattr(utils.run_folder, "save_checkpoint", save_and_break)
        result = script("main.py", *argv, "--savedir", "a", "--workers", workers)
    assert result.status == 2 and result.err.count("\n") == 1 and image.name in result.err
    assert load_checkpoint(tmp_path / "save/a/last.pth")["epoch"] == 1
    load_network(tmp_path / "save/a/best.pth")

    image.write_bytes(good)
    assert script("main.py", "--savedir", "a", "--resume").status == 0
    assert len(read_log(tmp_path / "save/a")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--height", 0), "--height: 0 is not a positive whole number"),
        (("--height", -512), "--height: -512 is not a positive whole number"),
        (("--height", 32), "LEDNet needs 64x64"),
        (("--init", ""), "the path is empty"),
        (("--seed", 2**63), "--seed: 9223372036854775808 is not a whole number from 0"),
        (("--batch-size", 1), "--batch-size 1 cannot train"),
        (("--lr", "fast"), "--lr: fast is not a positive number"),
        (("--augment", "weak"), "invalid choice: 'weak'"),
        (("--preset", "best"), "invalid choice: 'best'"),
        (("--dataset", "fields"), "invalid choice: 'fields'"),
        (
            ("--train-on", "trainval"),
            "is no part of cityscapes: give fine or coarse or fine+coarse",
        ),
        (("--crop", 64, 64), "--crop is of --augment strong: give that as well"),
        (("--scale", 1, 2), "--scale is of --augment strong"),
        (("--jitter", 0.1), "--jitter is of --augment strong"),
        (("--augment", "strong", "--crop", 32, 64), "--crop 32 64 is too small"),
        (("--augment", "strong", "--scale", 2, 1), "--scale 2.0 1.0: give the smaller one first"),
        (("--jitter", 1.5), "--jitter: 1.5 is not a number from 0 to 1"),
        (("--dropout", -0.1), "--dropout: -0.1 is not a number from 0 to 1"),
        (("--aux-weight", -1), "--aux-weight: -1 is not a number from 0 on"),
        (("--weight-c", 0.9), "--weight-c 0.9: give a number above 1, or 0"),
        (("--amp", "fp16", "--device", "cpu"), "--amp fp16 needs a CUDA GPU"),
        (("--device", "cuda:99"), "--device cuda:99 cannot be used here"),
        (("--init", "none.pth"), "none.pth does not exist"),
        (("--pretrained-encoder", "none.pth"), "none.pth does not exist"),
        (("--init", "a", "--pretrained-encoder", "b"), "exclude each other"),
    ],
)
def test_options_that_cannot_be(refused, cityscapes, options, message):
    assert message in refused(cityscapes, *options)


def test_a_checkpoint_that_is_none(refused, cityscapes, trained, tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "short.pth").write_bytes((trained / "best.pth").read_bytes()[:50_000])
    for option in ("--init", "--pretrained-encoder"):
        for name in ("text.pth", "short.pth"):
            assert f"{name} is not a checkpoint" in refused(cityscapes, option, tmp_path / name)


def test_an_encoder_is_no_network_to_start_from(refused, cityscapes, trained):
    line = refused(cityscapes, "--init", trained / "encoder.pth")
    assert "holds the encoder alone: give it as --pretrained-encoder" in line


def test_no_place_for_the_embedded_scenes(fails, tmp_path):
    (tmp_path / "data").write_text("a file")
    assert "data/synthetic cannot be made" in fails("main.py", "--savedir", "a")


def test_a_checkpoint_of_another_width(refused, cityscapes, trained):
    line = refused(cityscapes, "--init", trained / "best.pth", "--apn-channels", 128)
    assert "was trained with --apn-channels 20, not 128" in line


def test_an_output_folder_in_use(fails, cityscapes, trained):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in trained.iterdir())
    line = fails("main.py", "--datadir", cityscapes, *QUICK, "--savedir", trained)
    assert "holds a run already" in line and "--resume" in line
    assert sorted((p.name, p.stat().st_mtime_ns) for p in trained.iterdir()) == before
