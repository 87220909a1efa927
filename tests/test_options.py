"""The options of the training programs: their defaults, what may be combined, what may change."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.options import (
    PRESETS,
    PRETRAINING,
    SEGMENTATION,
    TRAINING_ADVICE,
    Option,
    Table,
    parse_options,
    settle_pretraining,
    settle_segmentation,
)

Parse = Callable[..., argparse.Namespace]


def rows(table: Table) -> dict[str, Option]:
    return {row.name: row for group in table.values() for row in group}


@pytest.fixture
def main(monkeypatch) -> Parse:
    """Return the options that main.py gets from a command line."""

    def parse(*argv: object) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, argv)])
        return parse_options("description", SEGMENTATION, settle_segmentation)

    return parse


@pytest.fixture
def pretrain(monkeypatch) -> Parse:
    """Return the options that lednet_imagenet.py gets from a command line."""

    def parse(*argv: object) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["lednet_imagenet.py", *map(str, argv)])
        return parse_options("description", PRETRAINING, settle_pretraining)

    return parse


def shown(parse: Parse, capsys) -> dict[str, str]:
    """Return the help text of each option."""
    with pytest.raises(SystemExit):
        parse("--help")
    sections = re.split(r"\n  --", capsys.readouterr().out)[1:]
    return {text.split()[0].rstrip(","): " ".join(text.split()) for text in sections}


# Defaults

PUBLISHED = {
    "height": 512, "augment": "paper", "crop": None, "encoder_epochs": 300, "epochs": 300,
    "batch_size": 5, "optimizer": "adam", "lr": 5e-4, "weight_decay": 1e-4, "schedule": "poly",
    "loss": "ce", "weight_c": None, "aux_weight": 0.0, "dropout": 0.3, "ema": False, "cache": "off",
}  # fmt: skip
OF_PRESETS = {
    "cityscapes": {
        "height": 1024, "crop": [1024, 1024], "epochs": 800, "encoder_epochs": 0, "loss": "ohem",
        "augment": "strong", "optimizer": "adamw", "schedule": "onecycle", "ema": True,
        "aux_weight": 0.4, "val_every": 5, "cache": "off",
    },
    "camvid": {
        "height": 360, "crop": [240, 320], "scale": [0.67, 1.5], "epochs": 80, "dropout": 0.1,
        "encoder_epochs": 0, "augment": "strong", "ema": True, "cache": "ram",
    },
}  # fmt: skip


def test_the_published_recipe_is_the_default(main):
    args = vars(main("--datadir", "d"))
    assert PUBLISHED.items() <= args.items()
    assert args["preset"] == "paper" and args["dataset"] == "cityscapes"
    assert args["train_on"] == "fine" and args["val_every"] == 1 and args["seed"] == 0


@pytest.mark.parametrize("preset", OF_PRESETS)
def test_presets_change_the_defaults(main, preset):
    args = vars(main("--datadir", "d", "--preset", preset))
    assert args["preset"] == preset and OF_PRESETS[preset].items() <= args.items()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_default_of_a_preset_reaches_the_run(main, preset):
    args = vars(main("--datadir", "d", "--preset", preset))
    for name, row in rows(SEGMENTATION).items():
        if preset in row.by_preset:
            assert args[name] == row.by_preset[preset], name
    assert {name for row in rows(SEGMENTATION).values() for name in row.by_preset} <= {*PRESETS}


def test_options_override_the_preset(main):
    given = {
        "height": 72, "augment": "paper", "cache": "off", "encoder_epochs": 1, "epochs": 7,
        "batch_size": 3, "optimizer": "adam", "lr": 0.125, "weight_decay": 0.5, "schedule": "poly",
        "loss": "ce", "weight_c": 1.5, "aux_weight": 0.7, "dropout": 0.0, "val_every": 2,
    }  # fmt: skip
    argv = [
        word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    args = vars(main("--datadir", "d", "--preset", "camvid", *argv, "--no-ema"))
    assert given.items() <= args.items() and args["ema"] is False
    args = main("--datadir", "d", *("--augment", "strong", "--crop", 70, 80), "--ema")
    assert args.crop == [70, 80] and args.ema is True


def test_the_data_set_follows_from_what_is_given(main):
    for argv, dataset, preset in (
        ((), "synthetic", "quick"),
        (("--datadir", "data/synthetic"), "synthetic", "paper"),
        (("--datadir", "d"), "cityscapes", "paper"),
        (("--datadir", "d", "--classes", "c.txt"), "folder", "paper"),
        (("--datadir", "d", "--dataset", "camvid"), "camvid", "paper"),
        (("--preset", "paper"), "synthetic", "paper"),
    ):
        args = main(*argv)
        assert (args.dataset, args.preset) == (dataset, preset), argv
    assert main().datadir == "data/synthetic"


def test_stage_1_is_skipped_if_training_starts_from_a_network_or_an_encoder(main):
    for argv in (("--init", "a.pth"), ("--pretrained-encoder", "a.pth"), ("--decoder",)):
        args = main("--datadir", "d", *argv)
        assert args.encoder_epochs == 0 and args.epochs == 300


def test_num_epochs_is_the_default_of_each_stage(main):
    args = main("--datadir", "d", "--num-epochs", 7)
    assert (args.encoder_epochs, args.epochs) == (7, 7)
    args = main("--datadir", "d", "--num-epochs", 7, "--epochs", 3)
    assert (args.encoder_epochs, args.epochs) == (7, 3)
    args = main("--num-epochs", 7)
    assert (args.encoder_epochs, args.epochs) == (0, 7)  # quick has one stage


def test_options_of_the_original_code_keep_their_meaning(main):
    args = main(
        *("--datadir", "d", "--annotations", "coarse", "--num-workers", 3, "--D", 128),
        *("--pretrainedEncoder", "a.pth", "--num-epochs", 5, "--batch-size", 6, "--iouTrain"),
        *("--epochs-save", 2, "--steps-loss", 9, "--decoder", "--height", 256),
    )
    assert args.train_on == "coarse" and args.workers == 3 and args.apn_channels == 128
    assert args.pretrained_encoder == "a.pth" and args.iouTrain and args.decoder
    assert main("--datadir", "d", "--state", "a.pth").init == "a.pth"


def test_pretraining_has_the_published_recipe_and_a_modern_one(pretrain):
    args = pretrain("--datadir", "d")
    published = {"recipe": "paper", "epochs": 150, "batch_size": 256, "lr": 0.1, "size": 224}
    assert published.items() <= vars(args).items() and args.dataset == "imagenet"
    modern = pretrain("--datadir", "d", "--recipe", "modern")
    assert modern.lr == 1e-3 and modern.epochs == 150
    drawn = pretrain()
    assert (drawn.dataset, drawn.datadir, drawn.recipe) == ("shapes", "data/shapes", "paper")
    assert drawn.epochs < 150 and drawn.lr < 0.1
    assert pretrain("--lr", 0.5).lr == 0.5


def test_evaluation_takes_what_is_open_from_the_checkpoint(pretrain):
    args = pretrain("--evaluate", "a.pth")
    assert (args.evaluate, args.size, args.datadir) == ("a.pth", None, None)
    args = pretrain("--evaluate", "a.pth", "--size", 64, "--datadir", "d", "--savedir", "run")
    assert (args.evaluate, args.size, args.datadir) == ("a.pth", 64, "d")
    assert pretrain("--evaluate", "--savedir", "run").evaluate == "save/run/best.pth"


# Help


def test_help_shows_every_default_by_preset(main, capsys):
    found = shown(main, capsys)
    for name, texts in {
        "preset": ["paper,cityscapes,camvid,quick"],
        "height": ["default 512", "cityscapes 1024", "camvid 360"],
        "crop": ["default none", "cityscapes 1024 1024", "camvid 240 320"],
        "optimizer": ["default adam", "cityscapes adamw"],
        "ema": ["default off", "cityscapes on", "camvid on"],
        "lr": ["default 0.0005"],
        "train-on": ["cityscapes: fine, coarse"],
        "apn-channels": ["--D", "default 20"],
    }.items():
        for text in texts:
            assert text in found[name], (name, text)


@pytest.mark.parametrize("program", ["main", "pretrain"])
def test_help_explains_every_option(request, capsys, program):
    found = shown(request.getfixturevalue(program), capsys)
    table = rows(SEGMENTATION if program == "main" else PRETRAINING)
    assert {name.replace("_", "-") for name in table} == found.keys()
    for name, row in table.items():
        text = found[name.replace("_", "-")]
        assert row.help, name
        assert row.type == "flag" or "default" in text or row.default is None, name


# Impossible options


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--height", 0), "--height: 0 is not a positive whole number"),
        (("--height", -512), "--height: -512 is not a positive whole number"),
        (("--batch-size", 1.5), "--batch-size: 1.5 is not a positive whole number"),
        (("--workers", -1), "--workers/--num-workers: -1 is not a whole number"),
        (("--init", ""), "the path is empty"),
        (("--savedir",), "--savedir: expected one argument"),
        (("--seed", 2**63), "--seed: 9223372036854775808 is not a whole number from 0"),
        (("--lr", "fast"), "--lr: fast is not a positive number"),
        (("--lr", "nan"), "--lr: nan is not a positive number"),
        (("--jitter", 1.5), "--jitter: 1.5 is not a number from 0 to 1"),
        (("--dropout", -0.1), "--dropout: -0.1 is not a number from 0 to 1"),
        (("--aux-weight", -1), "--aux-weight: -1 is not a number from 0 on"),
        (("--mean", "a", 1, 1), "--mean: a is not a number"),
        (("--std", 1, 0, 1), "--std: 0 is not a positive number"),
        (("--augment", "weak"), "invalid choice: 'weak'"),
        (("--preset", "best"), "invalid choice: 'best'"),
        (("--dataset", "fields"), "invalid choice: 'fields'"),
        (("--heigth", 64), "unrecognized arguments: --heigth 64"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(main, capsys, argv, message):
    with pytest.raises(SystemExit) as end:
        main("--datadir", "d", *argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert err.startswith("main.py: error: ") and message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--height", 32), "--height 32 is too small: LEDNet needs 64x64 pixels"),
        (("--augment", "strong", "--crop", 32, 64), "--crop 32 64 is too small"),
        (("--batch-size", 1), "--batch-size 1 cannot train"),
        (("--train-on", "trainval"), "cityscapes has fine and coarse and fine+coarse"),
        (("--crop", 64, 64), "--crop needs --augment strong"),
        (("--scale", 1, 2), "--scale needs --augment strong"),
        (("--jitter", 0.1), "--jitter needs --augment strong"),
        (("--noise", 5), "--noise needs --augment strong"),
        (("--augment", "strong", "--scale", 2, 1), "--scale 2.0 1.0: give the smaller one first"),
        (("--weight-c", 0.9), "--weight-c 0.9: give a number above 1, or 0"),
        (("--init", "a", "--pretrained-encoder", "b"), "exclude each other"),
        (("--mean", 1, 1, 1), "--mean and --std belong together"),
    ],
)
def test_options_that_contradict_each_other_are_refused(main, argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        main("--datadir", "d", *argv)


def test_a_data_set_needs_its_folder(main):
    with pytest.raises(UserError, match="--dataset camvid needs --datadir"):
        main("--dataset", "camvid")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--size", 8), "--size 8 is too small"),
        (("--evaluate", "a.pth", "--size", 8), "--size 8 is too small"),
        (("--evaluate",), "--evaluate needs a checkpoint, or --savedir"),
        (("--evaluate", "--savedir", "run", "--resume"), "exclude each other"),
    ],
)
def test_impossible_options_of_pretraining_are_refused(pretrain, tmp_path, argv, message):
    (tmp_path / "args.json").write_text("{}")
    argv = [tmp_path if word == "run" else word for word in argv]
    with pytest.raises(UserError, match=message):
        pretrain(*argv)


def test_advice_is_for_mistakes_of_users():
    assert all(issubclass(error, UserError) and text for error, text in TRAINING_ADVICE.items())


# Resuming


@pytest.fixture
def begun(main, tmp_path) -> Path:
    """The folder of a run with options of its own."""
    folder = tmp_path / "run"
    args = main(
        *("--datadir", "d", "--height", 64, "--augment", "strong", "--crop", 64, 96, "--ema"),
        *("--apn-channels", 4, "--batch-size", 3, "--steps-loss", 7, "--savedir", folder),
    )
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(vars(args)))
    return folder


def test_a_resumed_run_keeps_its_options(main, begun):
    stored = json.loads((begun / "args.json").read_text())
    args = vars(main("--savedir", begun, "--resume"))
    assert args == stored | {"resume": True}


def test_the_same_command_can_be_resumed(main, begun):
    args = main(
        *("--datadir", "d", "--height", 64, "--augment", "strong", "--crop", 64, 96, "--ema"),
        *("--apn-channels", 4, "--batch-size", 3, "--savedir", begun, "--resume"),
    )
    assert args.steps_loss == 7


@pytest.mark.parametrize(
    ("argv", "has"),
    [
        (("--height", 128), "--height 64"),
        (("--D", 8), "--apn-channels 4"),
        (("--crop", 96, 96), "--crop 64 96"),
        (("--no-ema",), "--ema on"),
        (("--lr", 1), "--lr 0.0005"),
        (("--seed", 1), "--seed 0"),
        (("--decoder",), "--encoder-epochs 300"),
        (("--preset", "camvid"), "--preset paper"),
    ],
)
def test_what_decides_the_result_may_not_change(main, begun, argv, has):
    with pytest.raises(UserError, match=f"has {re.escape(has)}: leave the option out"):
        main("--savedir", begun, "--resume", *argv)


@pytest.mark.parametrize("option", ["--epochs", "--num-epochs"])
def test_more_epochs_are_another_run_from_the_best_network(main, begun, option):
    message = (
        f"has --epochs 300: leave the option out to resume, or start another run; a schedule "
        f"cannot be lengthened once it has begun: to train on, give the other run --init "
        f"{begun}/best.pth"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        main("--savedir", begun, "--resume", option, 500)


def test_what_does_not_decide_the_result_may_change(main, begun):
    changes = {
        "datadir": "moved", "batch_size": 2, "workers": 1, "device": "cpu", "amp": "bf16",
        "cache": "ram", "steps_loss": 1, "val_every": 3, "checkpoint_minutes": 2.0,
        "epochs_save": 5,
    }  # fmt: skip
    argv = [
        word for name, value in changes.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    args = vars(main("--savedir", begun, "--resume", *argv, "--compile", "--skip-broken"))
    assert changes.items() <= args.items() and args["compile"] and args["skip_broken"]
    assert args["height"] == 64


def test_the_recipe_of_a_pretraining_may_not_change(pretrain, tmp_path):
    options = vars(pretrain("--datadir", "d", "--recipe", "modern", "--savedir", tmp_path))
    (tmp_path / "args.json").write_text(json.dumps(options))
    with pytest.raises(UserError, match="has --recipe modern"):
        pretrain("--savedir", tmp_path, "--resume", "--recipe", "paper")
    with pytest.raises(UserError, match=r"has --epochs 150: .* lengthened once it has begun$"):
        pretrain("--savedir", tmp_path, "--resume", "--epochs", 200)
    assert pretrain("--savedir", tmp_path, "--resume").lr == 1e-3


def test_only_runs_can_be_resumed_and_only_by_their_program(main, pretrain, begun, tmp_path):
    with pytest.raises(UserError, match="--resume needs --savedir"):
        main("--resume")
    with pytest.raises(UserError, match="holds no run to resume"):
        main("--savedir", tmp_path / "none", "--resume")
    with pytest.raises(UserError, match="run of another program"):
        pretrain("--savedir", begun, "--resume")
    (begun / "args.json").write_text(json.dumps(vars(pretrain("--datadir", "d"))))
    with pytest.raises(UserError, match="run of another program"):
        main("--savedir", begun, "--resume")
