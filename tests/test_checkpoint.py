import argparse
import errno
import math
import pickle
import zipfile
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import full_disk, same_weights
from torch import nn
from torch.nn import functional as F

from datasets.segmentation import Classes
from models.lednet import Downsampler, Encoder, EncoderClassifier, ImageClassifier, LEDNet
from utils.checkpoint import (
    CheckpointError,
    Description,
    EncoderOnly,
    WrongWidth,
    init_network,
    load_checkpoint,
    load_classifier,
    load_encoder,
    load_network,
    normalisation,
    save_checkpoint,
)

NAMES = ["road", "sky", "tree"]
CLASSES = Classes(NAMES, [[n, 0, 0] for n in range(3)], [7, 8, 9], [3], ["flat", "air", "nature"])
ABOUT = Description(
    "fields", CLASSES, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 64, 12, 4, {"lr": 0.1, "crop": [64, 64]}
)


def checkpoint_of(module: nn.Module, stage: int = 2) -> dict:
    return ABOUT.to_checkpoint() | {"model": module.state_dict(), "stage": stage}


@pytest.fixture(scope="module")
def network():
    return LEDNet(3, 4).eval()


@pytest.fixture
def path(network, tmp_path):
    path = tmp_path / "network.pth"
    save_checkpoint(checkpoint_of(network), path)
    return path


def test_a_checkpoint_rebuilds_its_network_and_describes_it(network, path):
    rebuilt, about = load_network(path)
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(rebuilt(image), network(image))
    assert about == ABOUT and not rebuilt.training


def test_the_keys_on_disk_stay_what_they_were():
    """Shipped weights and files of earlier versions have these."""
    assert ABOUT.to_checkpoint() == {
        "dataset": "fields",
        "num_classes": 3,
        "class_names": NAMES,
        "colors": [[0, 0, 0], [1, 0, 0], [2, 0, 0]],
        "label_ids": [7, 8, 9],
        "ignored_ids": [3],
        "categories": ["flat", "air", "nature"],
        "label_colors": None,
        "train_images": 12,
        "apn_channels": 4,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "height": 64,
        "args": {"lr": 0.1, "crop": [64, 64]},
    }


def test_an_earlier_file_states_less(network, tmp_path):
    old = checkpoint_of(network)
    for key in ("ignored_ids", "categories", "train_images", "apn_channels", "mean", "std", "args"):
        del old[key]
    save_checkpoint(old, tmp_path / "old.pth")
    _, about = load_network(tmp_path / "old.pth")
    assert about.apn_channels == 4  # the weights say it
    assert (about.mean, about.std, about.args) == ([0.0] * 3, [1.0] * 3, {})


def test_a_description_normalises_images():
    image = torch.tensor([51, 102, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    normalized = ABOUT.normalizer(torch.device("cpu"))(image)
    expected = [(0.2 - 0.1) / 0.4, (0.4 - 0.2) / 0.5, (1.0 - 0.3) / 0.6]
    assert normalized.flatten().tolist() == pytest.approx(expected)


def test_saving_leaves_nothing_else_behind(path):
    assert [p.name for p in path.parent.iterdir()] == ["network.pth"]


def test_a_failed_save_keeps_the_old_file(path):
    before = path.read_bytes()
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        save_checkpoint({"model": lambda: None}, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["network.pth"]


@pytest.mark.parametrize("limit", [1, 100, 5000, 100_000, 399_000, 401_000])
def test_a_full_disk_is_reported_wherever_in_its_archive_torch_runs_out_of_room(tmp_path, limit):
    path = tmp_path / "last.pth"
    path.write_text("old")
    with full_disk(limit), pytest.raises(OSError) as caught:
        save_checkpoint({"model": {"weight": torch.zeros(100_000)}}, path)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_a_file_cut_short_is_refused(path):
    data = path.read_bytes()
    for size in (0, 100, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"network\.pth"):
            load_checkpoint(path)


def test_a_flipped_bit_is_found(path):
    """torch itself does not notice."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 1000] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_code_in_a_checkpoint_never_runs(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"model": 3}, {"weights": [1]}, torch.ones(2), {0: torch.ones(2)}],
)
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth"):
        load_checkpoint(tmp_path / "other.pth")


def test_a_missing_file_and_a_text_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is a folder: give the path"):
        load_checkpoint(tmp_path)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "text.pth")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            "is a pointer of Git LFS",
        ),
        ("\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page or a server's err"),
        (
            '<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
            "is a web page or a server's err",
        ),
    ],
)
def test_what_lies_in_place_of_a_checkpoint_is_named(tmp_path, content, reason):
    (tmp_path / "best.pth").write_text(content)
    with pytest.raises(CheckpointError, match=rf"best\.pth {reason}"):
        load_checkpoint(tmp_path / "best.pth")


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda network: network, "models.lednet.LEDNet"),
        (lambda network: {"model": network, "epoch": 3}, "models.lednet.LEDNet"),
        (lambda network: {"state_dict": {}, "best": np.float64(0.7)}, "numpy"),
        (lambda network: {"state_dict": {}, "args": argparse.Namespace()}, "argparse.Namespace"),
    ],
)
def test_objects_are_refused_by_name_with_the_way_out(
    network, tmp_path, content, named, old_format
):
    path = tmp_path / "whole.pth"
    torch.save(content(network), path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CheckpointError, match=rf"whole\.pth .* holds {named}.*its state_dict"):
        load_checkpoint(path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    save_checkpoint({"model": {"weight": torch.zeros(1)}}, tmp_path / "a.pth")
    refused = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(torch, "load", Mock(side_effect=refused))
    with pytest.raises(CheckpointError, match=r"a\.pth cannot be read \(Permission denied\)"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.filterwarnings("error::UserWarning", "ignore:.*is deprecated:FutureWarning")
def test_a_model_in_another_form_is_named_too(network, tmp_path):
    path = tmp_path / "whole.pth"
    with path.open("wb") as file:
        pickle.dump(network, file)
    with pytest.raises(CheckpointError, match=r"holds a whole model.*its state_dict"):
        load_checkpoint(path)
    torch.jit.trace(network, torch.zeros(1, 3, 64, 64)).save(path)
    with pytest.raises(CheckpointError, match=r"holds a whole model.*its state_dict"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "key",
    [
        "model", "state_dict", "model_state_dict", "net", "network", "weights", "params",
        "model.state_dict", "student", None,
    ],
)  # fmt: skip
def test_weights_are_found_under_any_key(network, tmp_path, key):
    content = network.state_dict()
    if key:
        for part in reversed(key.split(".")):
            content = {part: content}
        moments = {number: {"exp_avg": torch.ones(1)} for number in range(2)}
        content |= {"epoch": 3, "optimizer": {"state": moments, "param_groups": []}}
    torch.save(content, tmp_path / "foreign.pth")
    assert same_weights(load_checkpoint(tmp_path / "foreign.pth")["model"], network.state_dict())


def test_the_network_is_preferred_to_what_else_has_weights(network, tmp_path):
    others = {"ema": {"a": torch.ones(1)}, "criterion": {"b": torch.ones(1)}}
    torch.save(others | {"net": network.state_dict()}, tmp_path / "foreign.pth")
    assert same_weights(load_checkpoint(tmp_path / "foreign.pth")["model"], network.state_dict())
    torch.save(others, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_checkpoint(tmp_path / "foreign.pth")


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "module.module.", "model.", "network.", "net.", "a.module.b."],
)
def test_a_network_loads_from_any_wrapper(network, tmp_path, prefix):
    """Also with the weights of a loss beside it, and with a wrapper around a part of it."""
    wrapped = {
        prefix + name.replace("encoder.", "encoder._orig_mod."): weight
        for name, weight in network.state_dict().items()
    }
    if prefix[0] != "_" and not prefix.startswith("module"):
        wrapped["criterion.weight"] = torch.ones(3)
    save_checkpoint(checkpoint_of(network) | {"model": wrapped}, tmp_path / "wrapped.pth")
    rebuilt, about = load_network(tmp_path / "wrapped.pth")
    assert same_weights(rebuilt.state_dict(), network.state_dict()) and about == ABOUT
    torch.save({"state_dict": wrapped}, tmp_path / "wrapped.pth")
    other = LEDNet(3, 4)
    checkpoint = load_checkpoint(tmp_path / "wrapped.pth")
    beside = [name for name in wrapped if name.startswith("criterion")]
    assert init_network(other, checkpoint, tmp_path / "wrapped.pth", CLASSES) == ([], beside)
    assert same_weights(other.state_dict(), network.state_dict())


def test_an_average_of_weights_is_a_network(network, tmp_path):
    average = torch.optim.swa_utils.AveragedModel(network)
    save_checkpoint(checkpoint_of(average), tmp_path / "average.pth")
    assert same_weights(
        load_network(tmp_path / "average.pth")[0].state_dict(), network.state_dict()
    )


@pytest.mark.parametrize("stage", [0, 1])
def test_an_encoder_is_not_a_network(network, tmp_path, stage):
    save_checkpoint(checkpoint_of(network, stage), tmp_path / "one.pth")
    with pytest.raises(EncoderOnly, match="encoder alone"):
        load_network(tmp_path / "one.pth")


def test_a_network_needs_a_decoder(network, tmp_path):
    weights = {f"encoder.{k}": w for k, w in network.encoder.state_dict().items()}
    content = checkpoint_of(network) | {"model": weights, "apn_channels": None}
    save_checkpoint(content, tmp_path / "one.pth")
    with pytest.raises(CheckpointError, match="holds no decoder"):
        load_network(tmp_path / "one.pth")


@pytest.mark.parametrize(
    ("key", "value"),
    [("dataset", None), ("class_names", "road"), ("label_ids", None), ("height", "64")],
)
def test_what_a_description_lacks_is_named(key, value):
    with pytest.raises(CheckpointError, match=rf"a\.pth does not state its {key}"):
        Description.from_checkpoint(ABOUT.to_checkpoint() | {key: value}, "a.pth")


def test_plain_weights_describe_nothing(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="does not state its dataset"):
        load_network(tmp_path / "plain.pth")


def original(encoder: Encoder, prefix: str) -> dict[str, torch.Tensor]:
    """Return the weights of an encoder as the original code saves them.

    The right branch of a block runs each 1x3 convolution first, but its names have the order of
    the left one.
    """
    weights = {}

    def put(name, layer):
        weights.update({f"{prefix}{name}.{key}": w for key, w in layer.state_dict().items()})

    for number, block in enumerate(encoder):
        name = f"layers.{number - 1}" if number else "initial_block"
        if isinstance(block, Downsampler):
            put(f"{name}.conv", block.conv)
            put(f"{name}.bn", block.bn)
            continue
        for side, branch, order in (
            ("l", block.left, (0, 2, 3, 5, 7, 8)),
            ("r", block.right, (2, 0, 3, 7, 5, 8)),
        ):
            layers = ("conv3x1_1", "conv1x3_1", "bn1", "conv3x1_2", "conv1x3_2", "bn2")
            for layer, place in zip(layers, order, strict=True):
                put(f"{name}.{layer}_{side}", branch[place])
    return weights


def original_forward(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Compute what the original encoder does in evaluation mode, from its own names alone."""

    def conv(name, x, **options):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    def bn(name, x):
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.batch_norm(x, mean, var, scale, shift, eps=1e-3)

    def down(name, x):
        both = torch.cat([conv(f"{name}.conv", x, stride=2, padding=1), F.max_pool2d(x, 2)], 1)
        return F.relu(bn(f"{name}.bn", both))

    def branch(name, side, x, dilation):
        tall, wide = ("conv3x1", (1, 0)), ("conv1x3", (0, 1))
        first, second = (tall, wide) if side == "l" else (wide, tall)
        for half, d in ((1, 1), (2, dilation)):
            for kind, axis in (first, second):
                padding = (d * axis[0], d * axis[1])
                x = conv(f"{name}.{kind}_{half}_{side}", x, padding=padding, dilation=d)
                if (kind, axis) == first:
                    x = F.relu(x)
            x = bn(f"{name}.bn{half}_{side}", x)
            if half == 1:
                x = F.relu(x)
        return x

    x = down("initial_block", x)
    dilations = [1] * 3 + [None] + [1] * 2 + [None] + [1, 2, 5, 9, 2, 5, 9, 17]
    for number, dilation in enumerate(dilations):
        name = f"layers.{number}"
        if dilation is None:
            x = down(name, x)
            continue
        halves = zip("lr", x.chunk(2, 1), strict=True)
        x = F.relu(x + torch.cat([branch(name, s, half, dilation) for s, half in halves], 1))
        x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return x


@pytest.fixture(scope="module")
def trained_encoder():
    """An encoder with all tensors different, running statistics too."""
    torch.manual_seed(3)
    encoder = Encoder()
    for tensor in encoder.state_dict().values():
        if tensor.ndim == 1:  # biases and all of batch norm
            tensor.add_(0.3 * torch.rand_like(tensor))
    return encoder.eval()


@pytest.mark.parametrize("prefix", ["module.features.encoder.", "module.encoder.", "encoder.", ""])
def test_an_encoder_of_the_original_code_loads(trained_encoder, tmp_path, prefix):
    weights = original(trained_encoder, prefix)
    others = {
        f"{prefix}output_conv.weight": torch.ones(20, 128, 1, 1),
        "module.decoder.layers.0.conv.weight": torch.ones(3),
        "module.classifier.linear.weight": torch.ones(1000, 128),
    }
    # Sorted, so that the order of the file does not help: names of the decoder begin alike.
    content = {"epoch": 7, "state_dict": dict(sorted((weights | others).items()))}
    torch.save(content, tmp_path / "model_best.pth.tar")
    encoder = Encoder()
    rest, loaded, _ = load_encoder(encoder, tmp_path / "model_best.pth.tar")
    assert loaded == len(encoder.state_dict()) == len(weights)
    assert normalisation(rest, "") is None
    assert same_weights(encoder.state_dict(), trained_encoder.state_dict())


def test_an_encoder_of_the_original_code_computes_the_same(trained_encoder):
    image = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        expected = original_forward(original(trained_encoder, ""), image)
        assert torch.allclose(trained_encoder(image), expected, atol=1e-5)


def test_what_a_file_states_beside_its_state_dict_is_kept(trained_encoder, tmp_path):
    stated = {"mean": [0.5] * 3, "std": [0.25] * 3}
    weights = original(trained_encoder, "module.encoder.")
    torch.save({"state_dict": weights, **stated}, tmp_path / "stated.pth")
    rest, *_ = load_encoder(Encoder(), tmp_path / "stated.pth")
    assert normalisation(rest, "") == (stated["mean"], stated["std"])


def test_an_old_file_without_counts_of_batches_loads(trained_encoder, tmp_path):
    weights = original(trained_encoder, "module.encoder.")
    weights = {k: w for k, w in weights.items() if not k.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    encoder = Encoder()
    encoder.state_dict()["0.bn.num_batches_tracked"].fill_(5)
    _, loaded, _ = load_encoder(encoder, tmp_path / "old.pth")
    assert loaded == len(weights) < len(encoder.state_dict())
    own = encoder.state_dict()
    assert own["0.bn.num_batches_tracked"] == 0
    assert torch.equal(own["15.right.8.bias"], trained_encoder.state_dict()["15.right.8.bias"])


@pytest.mark.parametrize(
    "name", ["layers.0.conv3x1_1_l.weight", "layers.14.bn2_r.running_var", "initial_block.bn.bias"]
)
def test_what_an_original_file_lacks_is_named(trained_encoder, tmp_path, name):
    weights = original(trained_encoder, "module.features.encoder.")
    del weights[f"module.features.encoder.{name}"]
    torch.save(weights, tmp_path / "part.pth")
    with pytest.raises(
        CheckpointError, match=rf"part\.pth .* are missing: features\.encoder\.{name}"
    ):
        load_encoder(Encoder(), tmp_path / "part.pth")


def test_an_original_file_of_other_widths_is_refused(trained_encoder, tmp_path):
    weights = original(trained_encoder, "")
    weights["layers.0.conv3x1_1_l.weight"] = torch.ones(24, 24, 3, 1)
    torch.save(weights, tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match=r"1\.left\.0\.weight is \(24, 24, 3, 1\), not"):
        load_encoder(Encoder(), tmp_path / "wide.pth")


@pytest.mark.parametrize(
    "form",
    [
        "checkpoint",
        "state_dict",
        "data parallel",
        "compiled",
        "encoder.pth",
        "bare encoder",
        "stage 1",
        "image classifier",
    ],
)
def test_an_encoder_loads_from_any_wrapper(network, tmp_path, form):
    file = tmp_path / "weights.pth"
    encoder, weights = network.encoder, network.state_dict()
    inside = {k: w for k, w in weights.items() if k.startswith("encoder.")}
    checkpoint = checkpoint_of(network)
    torch.save(
        {
            "checkpoint": checkpoint,
            "state_dict": {"state_dict": weights},
            "data parallel": {f"module.{k}": v for k, v in weights.items()},
            "compiled": {f"_orig_mod.{k}": v for k, v in weights.items()},
            "encoder.pth": checkpoint | {"model": inside, "stage": 0},
            "bare encoder": encoder.state_dict(),
            "stage 1": checkpoint_of(EncoderClassifier(encoder), 1),
            "image classifier": {"model": ImageClassifier(encoder).state_dict(), "stage": 0},
        }[form],
        file,
    )
    fresh = Encoder()
    _, loaded, others = load_encoder(fresh, file)
    assert len(others) == {"stage 1": 2, "image classifier": 2}.get(
        form, 0 if "encoder" in form else len(weights) - len(inside)
    )
    assert loaded == len(inside) == len(fresh.state_dict())
    assert same_weights({f"encoder.{k}": w for k, w in fresh.state_dict().items()}, inside)


def test_an_incomplete_encoder_is_refused_and_nothing_copied(network, tmp_path):
    weights = network.encoder.state_dict()
    del weights["0.conv.weight"]
    torch.save(weights, tmp_path / "part.pth")
    encoder = Encoder()
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"tensors are missing: 0\.conv\.weight"):
        load_encoder(encoder, tmp_path / "part.pth")
    assert same_weights(encoder.state_dict(), before)


def test_weights_of_another_network_do_not_fill_the_encoder(tmp_path):
    torch.save({"layer1.0.conv1.weight": torch.ones(3)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"resnet\.pth does not fill the encoder"):
        load_encoder(Encoder(), tmp_path / "resnet.pth")


def test_normalisation_is_three_numbers_each_with_a_std_above_0():
    assert normalisation({}, "a.pth") is None
    stated = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    assert normalisation(stated, "a.pth") == (stated["mean"], stated["std"])
    for odd in (
        {"std": None},
        {"mean": [0, 0]},
        {"mean": ["a"] * 3},
        {"std": [1, math.nan, 1]},
        {"std": [1, 0, 1]},
    ):
        with pytest.raises(
            CheckpointError, match=r"a\.pth states a mean and std that are not three"
        ):
            normalisation(stated | odd, "a.pth")


@pytest.fixture(scope="module")
def classifier():
    return ImageClassifier(Encoder(), 3).eval()


def test_a_classifier_is_rebuilt_from_its_checkpoint(classifier, tmp_path):
    """Also from files of earlier versions, which state no colours and label ids."""
    checkpoint = checkpoint_of(classifier, 0)
    image = torch.rand(1, 3, 32, 32)
    for missing in ((), ("colors", "label_ids", "ignored_ids", "categories")):
        for key in missing:
            del checkpoint[key]
        save_checkpoint(checkpoint, tmp_path / "three.pth")
        rebuilt, about = load_classifier(tmp_path / "three.pth")
        with torch.inference_mode():
            assert torch.equal(rebuilt(image), classifier(image))
        assert about.classes.names == NAMES and about.height == 64 and not rebuilt.training


def test_a_network_is_not_a_classifier(path):
    with pytest.raises(CheckpointError, match="holds no image classifier"):
        load_classifier(path)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"class_names": ["road"]}, "does not fit the ImageClassifier"),
        ({"height": None}, "does not state its height"),
        ({"std": [0.0] * 3}, "with a std above 0"),
    ],
)
def test_a_classifier_that_is_described_wrongly_is_refused(classifier, tmp_path, odd, message):
    save_checkpoint(checkpoint_of(classifier, 0) | odd, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=message):
        load_classifier(tmp_path / "odd.pth")


def test_init_keeps_the_classifier_of_the_same_classes(network, path):
    other = LEDNet(3, 4)
    assert init_network(other, load_checkpoint(path), path, CLASSES) == ([], [])
    assert torch.equal(other.decoder.classifier.weight, network.decoder.classifier.weight)


def classes_of(names: list[str], **related: list[str]) -> Classes:
    return Classes(
        names, [[0, 0, n] for n in range(len(names))], range(len(names)), related=related
    )


@pytest.mark.parametrize("names", [["a", "b", "c"], ["a", "b", "c", "d", "e"]])
def test_init_replaces_the_classifier_of_other_classes(network, path, names):
    other = LEDNet(len(names), 4)
    own = other.decoder.classifier.weight.clone()
    assert init_network(other, load_checkpoint(path), path, classes_of(names)) == (names, [])
    assert torch.equal(other.decoder.classifier.weight, own)
    reduce = "decoder.reduce.0.weight"
    assert torch.equal(other.state_dict()[reduce], network.state_dict()[reduce])


def test_init_keeps_the_classes_of_the_same_names_and_related_ones(network, path):
    """In any order; a name in other capitals counts only without the name itself."""
    names = ["Tree", "lake", "street", "ROAD", "road"]
    classes = classes_of(names, street=["path", "sky", "tree"], road=["tree"])
    other = LEDNet(5, 4)
    own, trained = other.decoder.classifier, network.decoder.classifier
    random = own.weight[1].clone(), own.bias[1].clone()
    assert init_network(other, load_checkpoint(path), path, classes) == (["lake"], [])
    kept = (own.weight, trained.weight, random[0]), (own.bias, trained.bias, random[1])
    for result, stored, lake in kept:
        expected = torch.stack([stored[2], lake, stored[1], stored[0], stored[0]])
        assert torch.equal(result, expected)


def test_init_keeps_classes_stored_in_8_bits_beside_a_new_one(network, path):
    checkpoint, head = load_checkpoint(path), "decoder.classifier.weight"
    stored = checkpoint["model"][head] = checkpoint["model"][head].to(torch.float8_e4m3fn)
    other = LEDNet(2, 4)
    assert init_network(other, checkpoint, path, classes_of(["lake", "sky"])) == (["lake"], [])
    assert torch.equal(other.decoder.classifier.weight[1], stored[1].float())


def test_init_takes_a_network_whole_whose_names_differ_in_capitals_alone(network, path):
    names = ["Road", "road", "ROAD"]
    checkpoint = load_checkpoint(path) | {"class_names": names}
    other = LEDNet(3, 4)
    assert init_network(other, checkpoint, path, classes_of(names)) == ([], [])
    assert same_weights(other.state_dict(), network.state_dict())


@pytest.mark.parametrize(
    "stated", [["road"], ["road", "sky", "tree", "sea"], [1, 2, 3], {"road": 0}, "sky"], ids=str
)
def test_init_keeps_no_class_if_the_file_does_not_name_each_of_its_own(path, stated):
    checkpoint = load_checkpoint(path) | {"class_names": stated}
    assert init_network(LEDNet(3, 4), checkpoint, path, CLASSES) == (NAMES, [])


@pytest.mark.parametrize(("count", "fresh"), [(3, []), (2, ["road", "sky"])])
def test_init_from_weights_that_name_no_classes(network, tmp_path, count, fresh):
    """They are those of the network if there are as many."""
    torch.save({"model": network.state_dict()}, tmp_path / "bare.pth")
    other, classes = LEDNet(count, 4), classes_of(NAMES[:count])
    checkpoint = load_checkpoint(tmp_path / "bare.pth")
    assert init_network(other, checkpoint, tmp_path / "bare.pth", classes) == (fresh, [])
    same = torch.equal(other.decoder.classifier.weight, network.decoder.classifier.weight[:count])
    assert same == (not fresh)


def test_more_tensors_than_those_of_the_network_are_left_out(network, tmp_path):
    path = tmp_path / "more.pth"
    weights = network.state_dict() | {"extra.weight": torch.ones(3)}
    torch.save({"model": weights}, path)
    other = LEDNet(3, 4)
    assert init_network(other, load_checkpoint(path), path, CLASSES) == ([], ["extra.weight"])
    assert same_weights(other.state_dict(), network.state_dict())
    *_, others = load_encoder(Encoder(), path)
    assert others == [name for name in weights if not name.startswith("encoder.")]
    del weights["decoder.reduce.0.weight"]
    torch.save({"model": weights}, path)
    with pytest.raises(CheckpointError, match=r"LEDNet: decoder\.reduce\.0\.weight is missing"):
        init_network(other, load_checkpoint(path), path, CLASSES)


def test_init_of_another_width_is_refused(path):
    with pytest.raises(WrongWidth, match="was trained with D = 4, not 8"):
        init_network(LEDNet(3, 8), load_checkpoint(path), path, CLASSES)


@pytest.mark.parametrize("stage", [0, 1])
def test_init_from_a_checkpoint_of_an_encoder_is_refused(network, path, stage):
    with pytest.raises(EncoderOnly, match="encoder alone"):
        init_network(network, load_checkpoint(path) | {"stage": stage}, path, CLASSES)


def test_init_from_the_weights_of_an_encoder_is_refused(network, tmp_path):
    torch.save({f"encoder.{k}": v for k, v in network.encoder.state_dict().items()}, tmp_path / "e")
    with pytest.raises(CheckpointError, match=r"decoder.* is missing"):
        init_network(network, load_checkpoint(tmp_path / "e"), tmp_path / "e", CLASSES)
