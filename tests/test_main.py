import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import QUICK, read_log, run_script, same_weights, wait_for_the_next_second
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import datasets.synthetic
import datasets.transforms
import utils.checkpoint
import utils.engine
import utils.losses
from datasets.cityscapes import training_parts
from datasets.statistics import count_pixels
from utils.checkpoint import load_checkpoint, load_network, save_checkpoint
from utils.losses import class_weights
from utils.metrics import ConfusionMatrix

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
    assert best["mean"] == [0, 0, 0] and best["std"] == [1, 1, 1] and best["height"] == 64
    assert best["dataset"] == "cityscapes" and best["epoch"] == 1 and best["args"] == args
    assert best["best"]["miou"] == pytest.approx(float(rows[1]["val_miou"]))
    resumable = {"optimizer", "scheduler", "scaler", "rng"}
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
    assert "6 gtFine/train images to train on, 3 to validate" in result.out
    assert "output: save/a" in result.out
    assert "stage 2 epoch 1/1: train loss" in result.out and "stage 1 epoch" not in result.out
    assert "--checkpoint save/a/best.pth" in result.out
    assert re.search(r"^road +[\d-]", result.out, re.MULTILINE)
    (row,) = read_log(tmp_path / "save/a")
    assert 0 <= float(row["train_miou"]) <= 1
    assert not (tmp_path / "save/a/encoder.pth").exists()


def test_the_embedded_default_is_drawn_once(script, tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.synthetic.COUNTS, "train", 2)
    for split in ("val", "test", "train_extra"):
        monkeypatch.setitem(datasets.synthetic.COUNTS, split, 1)
    argv = ("--num-epochs", 1, "--workers", 0, "--decoder", "--height", 64)
    first = script("main.py", *argv, "--savedir", "a")
    assert first.status == 0 and "drawing street scenes into data/synthetic" in first.out
    assert "2 gtFine/train images" in first.out
    made = (tmp_path / "data/synthetic").stat().st_mtime_ns
    second = script("main.py", *argv, "--savedir", "b")
    assert second.status == 0 and "drawing" not in second.out
    assert (tmp_path / "data/synthetic").stat().st_mtime_ns == made
    assert json.loads((tmp_path / "save/b/args.json").read_text())["lr"] != 5e-4


def test_help_shows_defaults(script):
    result = script("main.py", "--help")
    assert result.status == 0
    for text in ("--apn-channels", "--D", "default 512", "default 0.0005", "default fine"):
        assert text in result.out


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

RECIPE = ("--encoder-epochs", 2, "--epochs", 2, "--batch-size", 2, "--workers", 1, "--D", 4)
RECIPE += ("--augment", "strong")


@pytest.fixture(scope="module")
def whole(cityscapes, tmp_path_factory):
    """The folder of a run of four epochs that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    argv = ("--datadir", cityscapes, "--height", 64, *RECIPE, "--savedir", folder)
    assert run_script("main.py", *argv) == 0
    return folder


@pytest.mark.parametrize(
    ("stage", "epoch", "saved"),
    [(1, 1, True), (1, 2, True), (2, 1, True), (2, 1, False), (2, 2, False)],
)
def test_a_resumed_run_ends_as_the_one_that_never_stopped(
    whole, script, cityscapes, tmp_path, monkeypatch, stage, epoch, saved
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
        patch.setattr(utils.checkpoint, "save_checkpoint", save_and_stop)
        argv = ("--datadir", cityscapes, "--height", 64, *RECIPE, "--savedir", "stopped")
        script("main.py", *argv)
    wait_for_the_next_second()
    result = script("main.py", "--savedir", "stopped", "--resume")
    assert result.status == 0
    done = (stage, epoch)
    if not saved:
        done = (2, epoch - 1) if epoch > 1 else (1, 2)
    assert f"resuming after epoch {done[1]} of stage {done[0]}" in result.out

    stopped = tmp_path / "save/stopped"
    for name in ("last.pth", "best.pth", "encoder.pth"):
        ours, theirs = load_checkpoint(stopped / name), load_checkpoint(whole / name)
        assert same_weights(ours["model"], theirs["model"]), name
    for ours, theirs in zip(read_log(stopped), read_log(whole), strict=True):
        for clock in ("seconds", "images_per_second", "data_wait"):
            del ours[clock], theirs[clock]
        assert ours == theirs
    steps = [e.step for e in EventAccumulator(str(stopped)).Reload().Scalars("loss/train")]
    assert steps == [1, 2, 3, 4]


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
    assert "has --batch-size 2" in fails(*argv, "--batch-size", 4)
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


def test_the_same_command_with_resume_goes_on(script, cityscapes, tmp_path):
    argv = ("--datadir", cityscapes, *QUICK, "--decoder", "--port", 1, "--D", 4, "--savedir", "a")
    assert script("main.py", *argv).status == 0
    result = script("main.py", *argv, "--resume")
    assert result.status == 0 and result.err.count("note: --port") == 1


def test_what_cannot_be_resumed_from(trained, fails, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    argv = ("main.py", "--savedir", folder, "--resume")
    shutil.copy(folder / "best.pth", folder / "last.pth")
    assert "does not hold the optimizer of a run" in fails(*argv)
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
    for row in read_log(whole):
        done = 3 * (int(row["epoch"]) - 1) / 6
        assert float(row["lr"]) == pytest.approx(5e-4 * (1 - done) ** 0.9)


def test_loss_weights_and_optimizer_are_those_of_the_paper(script, cityscapes, monkeypatch):
    losses, optimizers = [], []
    real_adam = torch.optim.Adam

    def build_loss(name, weight):
        losses.append((name, weight))
        return partial(utils.losses.cross_entropy, weight=weight)

    def adam(parameters, lr, **options):
        optimizers.append((lr, options))
        return real_adam(parameters, lr, **options)

    monkeypatch.setattr(utils.losses, "build_loss", build_loss)
    monkeypatch.setattr(torch.optim, "Adam", adam)
    argv = ("--datadir", cityscapes, *QUICK, "--D", 4, "--loss", "ohem", "--savedir", "a")
    assert script("main.py", *argv).status == 0
    counts = count_pixels(training_parts(cityscapes, "fine"), 19)
    assert [name for name, _ in losses] == ["ohem", "ohem"]
    for (_, weight), c in zip(losses, (1.20, 1.10), strict=True):
        assert torch.equal(weight.cpu(), class_weights(counts, c))
    expected = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}
    assert optimizers == [(5e-4, expected), (5e-4, expected)]


def scripted_scores(monkeypatch, *mious):
    """Make every validation find the next of some IoUs, in the first class alone."""
    scores = iter(mious)

    def evaluate(*args, **kwargs):
        confusion = ConfusionMatrix(19)
        right = round(1000 * next(scores))
        confusion.counts[0, 0], confusion.counts[0, 1] = right, 1000 - right
        return 1.0, confusion

    monkeypatch.setattr(utils.engine, "evaluate", evaluate)


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

    def keep_start(model, *args, **kwargs):
        started.update({k: v.clone() for k, v in model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.engine.train_one_epoch", keep_start)
    result = script("main.py", *argv, "--savedir", "a")
    assert result.status == 130 and "tensors of the encoder loaded" in result.out
    stored = load_checkpoint(trained / "encoder.pth")["model"]
    assert same_weights({k: v for k, v in started.items() if k.startswith("encoder.")}, stored)
    assert any(k.startswith("decoder.") for k in started)


def test_coarse_first_then_fine(script, cityscapes, tmp_path):
    common = ("main.py", "--datadir", cityscapes, *QUICK, "--D", 4)
    coarse = script(*common, "--decoder", "--annotations", "coarse", "--savedir", "coarse")
    assert "6 gtCoarse/train + 3 gtCoarse/train_extra images to train on" in coarse.out
    fine = script(*common[:-2], "--state", "save/coarse/best.pth", "--savedir", "fine")
    total = len(load_checkpoint(tmp_path / "save/coarse/best.pth")["model"])
    assert fine.status == 0 and f"best.pth: {total} of {total} tensors loaded" in fine.out
    assert "stage 1" not in fine.out.split("output:")[1] and "D = 4" in fine.out


def test_fine_and_coarse_together(script, cityscapes):
    argv = ("--datadir", cityscapes, *QUICK, "--decoder", "--D", 4, "--annotations", "fine+coarse")
    result = script("main.py", *argv, "--steps-loss", 1, "--savedir", "a")
    assert "6 gtFine/train + 3 gtCoarse/train_extra images to train on" in result.out
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
    made, trained_with = [], []
    real_transforms, real_epoch = datasets.transforms.train_transforms, utils.engine.train_one_epoch

    def train_transforms(*args):
        made.append(args)
        return real_transforms(*args)

    def train_one_epoch(*args, **kwargs):
        trained_with.append(kwargs)
        return real_epoch(*args, **kwargs)

    monkeypatch.setattr(datasets.transforms, "train_transforms", train_transforms)
    monkeypatch.setattr(utils.engine, "train_one_epoch", train_one_epoch)
    argv = ("--datadir", cityscapes, *QUICK, "--D", 4, "--device", "cpu", "--savedir", "a")
    recipe = ("--augment", "strong", "--amp", "bf16", "--loss", "ohem")
    assert script("main.py", *argv, *recipe).status == 0
    # Once for each stage; labels of stage 1 are 8 times smaller.
    assert {args[:3] for args in made} == {("strong", (64, 128), 8), ("strong", (64, 128), 1)}
    assert len(trained_with) == 2
    for used in trained_with:
        assert used["amp_dtype"] == torch.bfloat16
        assert used["loss_function"].func is utils.losses.ohem_cross_entropy


def test_normalisation_comes_with_the_encoder(trained, script, cityscapes, tmp_path, monkeypatch):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
    checkpoint = load_checkpoint(trained / "encoder.pth") | {"mean": mean, "std": std}
    save_checkpoint(checkpoint, tmp_path / "encoder.pth")
    seen, real_epoch = [], utils.engine.train_one_epoch

    def train_one_epoch(model, loader, **kwargs):
        for _ in range(5):
            seen.extend(images for images, _ in loader)
        return real_epoch(model, loader, **kwargs)

    monkeypatch.setattr(utils.engine, "train_one_epoch", train_one_epoch)
    argv = ("--datadir", cityscapes, *QUICK, "--D", 4, "--savedir", "a")
    assert script("main.py", *argv, "--pretrained-encoder", tmp_path / "encoder.pth").status == 0
    best = load_checkpoint(tmp_path / "save/a/best.pth")
    assert best["mean"] == mean and best["std"] == std
    # The shift leaves black borders: 0 in the image is -mean / std for the network.
    for channel, darkest in enumerate(torch.cat(seen).amin(dim=(0, 2, 3)).tolist()):
        assert darkest == pytest.approx(-mean[channel] / std[channel])


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
    assert "has no folder gtCoarse/train" in refused(cityscapes_copy, "--annotations", "coarse")


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
        patch.setattr(utils.checkpoint, "save_checkpoint", save_and_break)
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
