"""The story of main.py: what a run says and leaves, what each stage is made of, where it starts."""

import json
import math
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compare import shown
from conftest import (
    QUICK,
    Forked,
    Result,
    pretend_processes,
    read_log,
    run_script,
    same_weights,
    send,
)

import datasets.drawn.streets
import main
import utils.run_folder
import utils.training
from datasets import open_splits, read_classes_for
from datasets.cityscapes import Cityscapes
from datasets.counts import count_labels
from datasets.transforms import Paper, Strong
from models.lednet import AuxiliaryHead, Encoder, EncoderClassifier, LEDNet
from utils.checkpoint import CheckpointError, load_checkpoint, load_network, save_checkpoint
from utils.errors import UserError
from utils.losses import LOSSES, class_weights
from utils.options import SEGMENTATION, parse_options, settle_segmentation
from utils.speed import count_parameters
from utils.training import Stage

CPU = torch.device("cpu")

# A run


def test_a_run_leaves_what_it_promises(trained, cityscapes):
    files = {"args.json", "log.csv", "last.pth", "best.pth", "encoder.pth", "class_counts.json"}
    assert files < {path.name for path in trained.iterdir()}
    args = json.loads((trained / "args.json").read_text())
    assert args["datadir"] == str(cityscapes) and args["epochs"] == args["encoder_epochs"] == 1
    assert args["lr"] == 5e-4 and args["apn_channels"] == 20

    rows = read_log(trained)
    assert [(row["stage"], row["epoch"]) for row in rows] == [("1", "1"), ("2", "1")]
    for row in rows:
        assert float(row["train_loss"]) > 0 and 0 <= float(row["val_miou"]) <= 1
        assert float(row["lr"]) == 5e-4 and "iou bicycle" in row

    best = load_checkpoint(trained / "best.pth")
    assert best["best"]["miou"] == pytest.approx(float(rows[1]["val_miou"]))
    assert best["epoch"] == 1 and best["args"] == args
    resumable = {"optimizer", "scheduler", "scaler", "processes"}
    assert not resumable & best.keys()
    assert resumable < load_checkpoint(trained / "last.pth").keys()


def test_a_checkpoint_explains_itself(trained):
    _, about = load_network(trained / "best.pth")
    assert (about.dataset, about.apn_channels, about.height) == ("cityscapes", 20, 64)
    assert about.mean == [0, 0, 0] and about.std == [1, 1, 1] and about.train_images == 6
    assert about.classes.names[0] == "road" and list(about.classes.colors[0]) == [128, 64, 128]
    assert about.classes.categories[0] == "flat" and about.classes.label_ids[:2] == [7, 8]


def test_the_head_of_stage_1_is_in_no_deployable_file(trained):
    for name in ("best.pth", "encoder.pth"):
        assert not any("head" in key for key in load_checkpoint(trained / name)["model"])


def test_tensorboard_shows_scores_and_pictures(trained):
    found = shown(trained)
    assert {"loss/train", "loss/val", "lr", "miou/val", "iou/road"} < found.keys()
    assert list(found["loss/train"]) == [1, 2]
    pictures = {tag for tag in found if tag.startswith("val/")}
    assert pictures == {"val/0", "val/1", "val/2"}
    width, height = (int.from_bytes(found["val/0"][1][0][n : n + 4]) for n in (16, 20))  # of a PNG
    assert (width, height) == (3 * 128, 64)


def test_the_counts_of_the_classes_are_stored(trained):
    counts = json.loads((trained / "class_counts.json").read_text())
    assert list(counts)[:2] == ["road", "sidewalk"] and list(counts)[-1] == "ignored"
    assert sum(counts.values()) == 6 * 64 * 128


@pytest.fixture(scope="module")
def one_stage(cityscapes, tmp_path_factory) -> tuple[Path, Result]:
    """A run of stage 2 with a second head and an average of the weights, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    argv = (
        *("--datadir", cityscapes, *QUICK, "--decoder", "--D", 4, "--aux-weight", 0.4, "--ema"),
        *("--iouTrain", "--epochs-save", 1, "--steps-loss", 1, "--savedir", folder),
    )
    run = Forked(lambda: run_script("main.py", *argv), tmp_path_factory.mktemp("out"))
    return folder, run.finish()


def test_a_run_says_what_it_does_and_what_comes_next(one_stage):
    folder, result = one_stage
    assert result.status == 0 and result.err == ""
    network = LEDNet(19, 4)
    for text in (
        f"LEDNet, D = 4: {count_parameters(network):,} parameters\non ",
        " 1 threads, in full precision\n",
        "6 of train to train on, 3 of val to validate, 19 classes",
        "images: 128x64, in batches of 2, 0 workers; 0 epochs of stage 1, 1 of stage 2",
        f"output: {folder}",
        "stage 2 epoch 1/1: step 3/3, train loss",
        "stage 2 epoch 1/1: train loss",
        f"eval_cityscapes_server.py --checkpoint '{folder}'/best.pth",
        f"tensorboard --logdir '{folder}' --host localhost",
    ):
        assert text in result.out, text
    assert re.search(r"^road +[\d-]", result.out, re.MULTILINE)
    assert "val is trained on" not in result.out and "stage 1 epoch" not in result.out


def test_the_second_head_is_trained_but_not_saved(one_stage):
    folder, _ = one_stage
    names = LEDNet(19, 4).state_dict().keys()
    assert not (folder / "encoder.pth").exists()
    for name in ("best.pth", "last.pth", "stage2-epoch001.pth"):
        assert load_checkpoint(folder / name)["model"].keys() == names, name
    load_network(folder / "best.pth")
    training = load_checkpoint(folder / "last.pth")["training_model"]
    assert training.keys() == {"head.weight", "head.bias"} | {f"network.{name}" for name in names}
    assert 0 <= float(read_log(folder)[0]["train_miou"]) <= 1


def test_the_average_of_the_weights_is_saved(one_stage):
    folder, _ = one_stage
    last, best = (load_checkpoint(folder / name) for name in ("last.pth", "best.pth"))
    assert last["ema_updates"] == 3
    assert same_weights(best["model"], last["model"])
    trained = {name: last["training_model"][f"network.{name}"] for name in last["model"]}
    assert not same_weights(last["model"], trained)


def interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_the_embedded_data_set_is_drawn_once(script, tmp_path, monkeypatch):
    for split in datasets.drawn.streets.COUNTS:
        monkeypatch.setitem(datasets.drawn.streets.COUNTS, split, 2)
    argv = ("main.py", "--num-epochs", 1, "--workers", 0, "--decoder", "--height", 64, "--D", 4)
    first = script(*argv, "--savedir", "a")
    assert first.status == 0 and "drawing street scenes into data/synthetic" in first.out
    assert "2 of train to train on" in first.out
    made = (tmp_path / "data/synthetic").stat().st_mtime_ns
    monkeypatch.setattr(utils.training, "fit", interrupted)
    second = script(*argv, "--savedir", "b")
    assert second.status == 130 and "drawing" not in second.out
    assert (tmp_path / "data/synthetic").stat().st_mtime_ns == made
    args = json.loads((tmp_path / "save/b/args.json").read_text())
    assert args["preset"] == "quick" and args["lr"] != 5e-4 and args["dataset"] == "synthetic"


def test_training_starts_from_coarse_annotations(script, cityscapes, tmp_path, monkeypatch):
    argv = ("main.py", "--datadir", cityscapes, *QUICK)
    coarse = script(*argv, *("--D", 4, "--decoder", "--train-on", "coarse", "--savedir", "coarse"))
    assert "6 of train_coarse + 3 of train_extra to train on" in coarse.out
    monkeypatch.setattr(utils.training, "fit", interrupted)
    fine = script(*argv, "--init", "save/coarse/best.pth", "--savedir", "fine")
    assert "best.pth: the network is loaded; it knows 19 of the 19 classes" in fine.out
    assert "0 epochs of stage 1" in fine.out and "D = 4" in fine.out


# Stages


@pytest.fixture
def stages(cityscapes, monkeypatch, capsys) -> Callable[..., list[Stage]]:
    """Put both stages of a run together, without training; arguments are options."""

    def build(*options: object) -> list[Stage]:
        argv = ("--datadir", cityscapes, *QUICK, "--D", 4, "--device", "cpu", *options)
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, argv)])
        args = parse_options(None, SEGMENTATION, settle_segmentation)
        classes = read_classes_for(args)
        network, mean, std = main.start_network(args, classes, None)
        data = open_splits(args, classes, CPU)
        about = main.Description(args.dataset, classes, mean, std, args.height, len(data.train), 4)
        parts = (network, data, about, args, CPU)
        return [main.encoder_stage(*parts), main.network_stage(*parts)]

    return build


@pytest.mark.parametrize("loss", LOSSES)
def test_by_default_stages_are_trained_as_published(stages, cityscapes, loss):
    built = stages("--loss", loss, "--num-epochs", 2)
    counts = count_labels([Cityscapes(cityscapes, "train")]).by_class(Cityscapes.CLASSES)
    expected = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "initial_lr": 5e-4}
    for stage, number, c, stride in zip(built, (1, 2), (1.20, 1.10), (8, 1), strict=True):
        assert (stage.number, stage.epochs, stage.steps) == (number, 2, 3)
        assert stage.epochs_before == 2 * (number - 1)
        assert stage.loss.func is LOSSES[loss]
        assert torch.equal(stage.loss.keywords["weight"], class_weights(counts, c))
        assert type(stage.optimizer) is torch.optim.Adam
        assert expected.items() <= stage.optimizer.param_groups[0].items()
        assert type(stage.scheduler) is torch.optim.lr_scheduler.PolynomialLR
        assert (stage.scheduler.total_iters, stage.scheduler.power) == (6, 0.9)
        assert type(stage.prepare.recipe) is Paper and stage.prepare.jitter == 0
        assert stage.prepare.noise == 0
        assert stage.prepare.label_stride == stride  # labels at the encoder's resolution
        assert stage.average is None and stage.meter is None and stage.amp_dtype is None
        assert stage.prepare(next(iter(stage.loader)))[0].shape == (2, 3, *stage.image_size)
    first, second = built
    assert type(first.model) is EncoderClassifier and type(second.model) is LEDNet
    assert first.model.encoder is second.model.encoder
    assert list(first.best_files) == [] and list(second.best_files) == ["best.pth"]


def test_options_reach_the_stages(stages):
    augment = ("--augment", "strong", "--scale", 0.9, 1.1, "--jitter", 0.2, "--crop", 64, 96)
    augment += ("--noise", 3)
    more = ("--optimizer", "adamw", "--schedule", "onecycle", "--weight-decay", 0.02, "--lr", 3e-3)
    for stage in stages(*augment, *more, "--amp", "bf16", "--dropout", 0.15, "--ema", "--iouTrain"):
        recipe = stage.prepare.recipe
        assert type(recipe) is Strong and stage.prepare.jitter == 0.2 and stage.prepare.noise == 3
        assert recipe.size == (64, 96) and recipe.scale == (0.9, 1.1)
        assert stage.prepare(next(iter(stage.loader)))[0].shape == (2, 3, *stage.image_size)
        assert stage.amp_dtype == torch.bfloat16
        assert type(stage.optimizer) is torch.optim.AdamW
        assert type(stage.scheduler) is torch.optim.lr_scheduler.OneCycleLR
        group = stage.optimizer.param_groups[0]
        assert group["weight_decay"] == 0.02 and group["max_lr"] == 3e-3
        assert stage.scheduler.total_steps == 4  # one more than there are
        rates = [m.p for m in stage.model.modules() if isinstance(m, torch.nn.Dropout2d)]
        assert rates == [0.03] * 10 + [0.15] * 16
        assert (stage.average is not None) == (stage.number == 2)
        assert stage.meter().counts.shape == (19, 19)


@pytest.mark.parametrize("c", [0, 1.02])
def test_class_weights_may_be_stronger_or_off(stages, cityscapes, c):
    counts = count_labels([Cityscapes(cityscapes, "train")]).by_class(Cityscapes.CLASSES)
    for stage in stages("--weight-c", c):
        expected = class_weights(counts, c) if c else torch.ones(19)
        assert torch.equal(stage.loss.keywords["weight"], expected)


def test_the_second_head_adds_its_loss_in_stage_2(stages):
    first, second = stages("--aux-weight", 0.25)
    assert type(first.model) is EncoderClassifier and type(second.model) is AuxiliaryHead
    assert second.network is second.model.network
    # The loss of equal logits is ln 19.
    labels, logits = torch.zeros(2, 16, 16).long(), torch.zeros(2, 19, 16, 16)
    assert first.loss(logits, labels).item() == pytest.approx(math.log(19))
    both = second.loss((logits, logits[..., ::8, ::8]), labels)
    assert both.item() == pytest.approx(1.25 * math.log(19))


def test_each_process_trains_and_scores_its_share(stages, monkeypatch):
    for rank, images in enumerate(([0, 2], [1])):  # of val
        pretend_processes(monkeypatch, 2, rank)
        for stage in stages():
            assert len(stage.loader.sampler) == 3
            assert list(stage.val_loader.dataset.dataset.indices) == images


@pytest.mark.parametrize(("batch_size", "steps"), [(4, 2), (5, 1), (6, 1)])
def test_a_last_batch_of_one_is_left_out(stages, batch_size, steps):
    assert [stage.steps for stage in stages("--batch-size", batch_size)] == [steps, steps]


# Where a run starts


@pytest.fixture
def start(monkeypatch, capsys) -> Callable[..., tuple]:
    """Build the network that training starts from.

    Returns:
        The network, the mean and std to normalise images with, and what was printed.
    """

    def build(*options: object) -> tuple[LEDNet, list[float], list[float], str]:
        monkeypatch.setattr(sys, "argv", ["main.py", "--datadir", "d", *map(str, options)])
        args = parse_options(None, SEGMENTATION, settle_segmentation)
        capsys.readouterr()
        started = main.start_network(args, Cityscapes.CLASSES, None)
        assert args.apn_channels == main.apn_channels_of(started[0].state_dict())
        return *started, capsys.readouterr().out

    return build


@pytest.mark.parametrize("run", ["trained", "pretrained"])
@pytest.mark.parametrize("name", ["encoder.pth", "best.pth", "last.pth"])
def test_training_starts_with_the_encoder_of_either_program(request, start, run, name):
    file = request.getfixturevalue(run) / name
    network, mean, std, out = start("--pretrained-encoder", file)
    stored = load_checkpoint(file)["model"]
    encoder = {name: weight for name, weight in stored.items() if name.startswith("encoder.")}
    ours = network.state_dict()
    assert same_weights({name: ours[name] for name in encoder}, encoder)
    assert f"{file}: {len(encoder)} of {len(encoder)} tensors of the encoder loaded" in out
    if run == "pretrained":
        assert mean == [0.485, 0.456, 0.406] and std == [0.229, 0.224, 0.225]
    else:
        assert (mean, std) == ([0] * 3, [1] * 3)


def test_a_network_of_the_same_classes_is_taken_whole(start, trained):
    network, *_, out = start("--init", trained / "best.pth")
    stored = load_checkpoint(trained / "best.pth")["model"]
    assert same_weights(network.state_dict(), stored)
    assert "the network is loaded; it knows 19 of the 19 classes\n" in out and "random" not in out


def test_what_a_file_has_beside_the_network_is_named(start, trained, tmp_path):
    checkpoint = load_checkpoint(trained / "best.pth")
    checkpoint["model"]["extra.weight"] = torch.ones(3)
    save_checkpoint(checkpoint, tmp_path / "more.pth")
    for option in ("--init", "--pretrained-encoder"):
        *_, out = start(option, tmp_path / "more.pth")
        assert re.search("ignored, as the network has no such tensors: .*(extra.weight|more)", out)


def test_the_classifier_of_other_classes_is_replaced(start, trained, tmp_path):
    checkpoint = load_checkpoint(trained / "best.pth")
    for name in ("weight", "bias"):
        key = f"decoder.classifier.{name}"
        checkpoint["model"][key] = checkpoint["model"][key][:7].clone()
    checkpoint |= {"num_classes": 7, "class_names": [f"class {n}" for n in range(7)]}
    save_checkpoint(checkpoint, tmp_path / "seven.pth")
    network, *_, out = start("--init", tmp_path / "seven.pth")
    assert "seven.pth: the network is loaded; it knows 0 of the 19 classes" in out
    assert "these classes start from random weights: road, sidewalk, building and" in out
    assert network.decoder.classifier.out_channels == 19


def test_the_width_is_that_of_the_network_to_start_from(start, one_stage, trained):
    network, *_ = start("--init", one_stage[0] / "best.pth")
    assert same_weights(network.state_dict(), load_checkpoint(one_stage[0] / "best.pth")["model"])
    with pytest.raises(CheckpointError, match="was trained with D = 20, not 128"):
        start("--init", trained / "best.pth", "--apn-channels", 128)


def test_normalisation_stays_with_the_network(start, stages, trained, tmp_path):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
    checkpoint = load_checkpoint(trained / "best.pth") | {"mean": mean, "std": std}
    save_checkpoint(checkpoint, tmp_path / "best.pth")
    for option in ("--init", "--pretrained-encoder"):
        assert start(option, tmp_path / "best.pth")[1:3] == (mean, std)
    _, stage = stages("--pretrained-encoder", tmp_path / "best.pth")
    seen = torch.cat([stage.prepare(batch)[0] for _ in range(5) for batch in stage.loader])
    # The shift leaves black borders: 0 in the image is -mean / std for the network.
    for channel, darkest in enumerate(seen.amin(dim=(0, 2, 3)).tolist()):
        assert darkest == pytest.approx(-mean[channel] / std[channel])


def test_a_foreign_encoder_is_normalised_as_the_options_say(start, trained, tmp_path):
    torch.save(Encoder().state_dict(), tmp_path / "foreign.pth")
    argv = ("--pretrained-encoder", tmp_path / "foreign.pth")
    assert start(*argv)[1:3] == ([0] * 3, [1] * 3)
    options = ("--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 0.1)
    assert start(*argv, *options)[1:3] == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1])
    with pytest.raises(UserError, match=r"trained on images normalised with mean \[0"):
        start("--init", trained / "best.pth", *options)


# Resuming; that a resumed run ends like any other is tested in test_resume.py


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A copy of the short run, to be resumed."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_a_finished_run_can_be_resumed_and_changes_nothing(trained, copy, script):
    result = script("main.py", "--savedir", copy, "--resume")
    assert result.status == 0 and "mIoU" in result.out and "counting the pixels" not in result.out
    for name in ("log.csv", "args.json", "class_counts.json", "best.pth", "last.pth"):
        assert (copy / name).read_bytes() == (trained / name).read_bytes(), name


def test_a_data_set_that_moved_is_counted_again(copy, script, cityscapes_copy):
    result = script("main.py", "--savedir", copy, "--resume", "--datadir", cityscapes_copy)
    assert result.status == 0 and "counting the pixels" in result.out
    assert json.loads((copy / "args.json").read_text())["datadir"] == str(cityscapes_copy)


def test_another_number_of_training_images_is_refused(copy, fails, cityscapes_copy):
    for path in cityscapes_copy.glob("*/train/*/*_00000[45]_*"):
        path.unlink()
    argv = ("main.py", "--savedir", copy, "--resume", "--datadir", cityscapes_copy)
    assert "has 4 training images now, and 6 when the run began" in fails(*argv)


def test_damaged_counts_are_made_again(trained, copy, script):
    (copy / "class_counts.json").write_text('{"road":')
    assert script("main.py", "--savedir", copy, "--resume").status == 0
    counts = [(folder / "class_counts.json").read_text() for folder in (copy, trained)]
    assert counts[0] == counts[1]


# Mistakes: one line, status 2, and no folder left behind


@pytest.fixture
def refused(fails, tmp_path) -> Callable[..., str]:
    """Start a run that must be refused before it makes its folder; returns the line."""

    def run(datadir: Path, *options: object) -> str:
        line = fails("main.py", "--datadir", datadir, *QUICK, *options, "--savedir", "refused")
        assert not (tmp_path / "save").exists()
        return line

    return run


def test_mistakes_are_reported_with_what_mends_them(refused, cityscapes, trained, tmp_path):
    line = refused(cityscapes, "--init", trained / "encoder.pth")
    assert "holds the encoder alone" in line and "give it as --pretrained-encoder" in line
    line = refused(cityscapes, "--init", trained / "best.pth", "--apn-channels", 128)
    assert "was trained with D = 20, not 128" in line and "give --apn-channels as" in line
    assert "nowhere does not exist" in refused(tmp_path / "nowhere")
    assert "LEDNet needs 64x64" in refused(cityscapes, "--height", 32)
    assert "--amp fp16 needs a CUDA GPU" in refused(cityscapes, "--amp", "fp16")
    for option in ("--init", "--pretrained-encoder"):
        assert "none.pth does not exist" in refused(cityscapes, option, "none.pth")


@pytest.mark.parametrize("damage", ["cut short", "text"])
def test_a_broken_file_is_found_before_training(refused, cityscapes_copy, damage):
    path = next(cityscapes_copy.glob("leftImg8bit/train/*/*.png"))
    path.write_bytes(path.read_bytes()[:3000] if damage == "cut short" else b"no picture")
    line = refused(cityscapes_copy)
    assert path.name in line and "--skip-broken leaves them out" in line


def test_an_image_without_its_label_is_found_before_training(refused, cityscapes_copy):
    path = next(cityscapes_copy.glob("gtFine/val/*/*labelIds.png"))
    path.unlink()
    assert path.name in refused(cityscapes_copy)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_in_training_is_named_and_nothing_is_lost(
    script, cityscapes_copy, tmp_path, monkeypatch, workers
):
    """Its header and its end are whole, so that only decoding finds the damage."""
    image = next(cityscapes_copy.glob("leftImg8bit/train/*/*.png"))
    good = image.read_bytes()

    def save_and_break(checkpoint: dict, path: Path) -> None:
        save_checkpoint(checkpoint, path)
        if path.name == "last.pth":
            image.write_bytes(good[:200] + bytes(1800) + good[2000:])

    argv = ("--datadir", cityscapes_copy, *QUICK, "--decoder", "--epochs", 2, "--D", 4)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(utils.run_folder, "save_checkpoint", save_and_break)
        run = ("main.py", *argv, "--savedir", folder, "--workers", workers)
        result = Forked(lambda: run_script(*run), tmp_path).finish()
    (line,) = result.err.splitlines()
    assert result.status == 2 and image.name in line and "--skip-broken leaves it out" in line
    assert "resume with: python " in line
    assert load_checkpoint(folder / "last.pth")["epoch"] == 1
    load_network(folder / "best.pth")
    image.write_bytes(good)
    assert script("main.py", "--savedir", folder, "--resume", "--workers", 0).status == 0
    assert len(read_log(folder)) == 2


def test_a_run_that_diverges_says_so(fails, cityscapes, tmp_path):
    argv = ("main.py", "--datadir", cityscapes, *QUICK, "--D", 4, "--savedir", tmp_path / "run")
    line = fails(*argv, "--epochs", 3, "--decoder", "--lr", 1e30)
    assert "training has diverged" in line and "with a smaller --lr" in line
    for path in (tmp_path / "run").glob("*.pth"):
        assert all(weight.isfinite().all() for weight in load_checkpoint(path)["model"].values())


def test_a_folder_that_holds_a_run_is_kept(fails, cityscapes, trained):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in trained.iterdir())
    line = fails("main.py", "--datadir", cityscapes, *QUICK, "--savedir", trained)
    assert "holds a run already" in line and "--resume" in line
    assert sorted((path.name, path.stat().st_mtime_ns) for path in trained.iterdir()) == before


def test_no_place_for_the_embedded_data_set(fails, tmp_path):
    (tmp_path / "data").write_text("a file")
    assert "data/synthetic cannot be made" in fails("main.py", "--savedir", "a")


def test_sigterm_before_training_leaves_nothing_behind(cityscapes, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "open_splits", lambda *_: send(signal.SIGTERM)())
    argv = ("main.py", "--datadir", cityscapes, "--savedir", tmp_path / "deep/run")
    result = Forked(lambda: run_script(*argv), tmp_path).finish()
    assert (result.status, result.err) == (143, "main.py: stopped by SIGTERM\n")
    assert not (tmp_path / "deep").exists()
