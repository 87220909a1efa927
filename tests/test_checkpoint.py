import pickle
import zipfile

import pytest
import torch

from models.lednet import Encoder, LEDNet
from utils.checkpoint import (
    CheckpointError,
    init_network,
    load_checkpoint,
    load_encoder,
    load_network,
    save_checkpoint,
)


def describe(network: LEDNet, num_classes: int = 3, apn_channels: int = 4) -> dict:
    return {
        "model": network.state_dict(),
        "stage": 2,
        "dataset": "fields",
        "colors": [[n, 0, 0] for n in range(num_classes)],
        "num_classes": num_classes,
        "class_names": [f"class {n}" for n in range(num_classes)],
        "apn_channels": apn_channels,
        "height": 64,
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
    }


@pytest.fixture
def network():
    return LEDNet(3, 4).eval()


@pytest.fixture
def path(network, tmp_path):
    path = tmp_path / "network.pth"
    save_checkpoint(describe(network), path)
    return path


def test_a_checkpoint_rebuilds_its_network(network, path):
    rebuilt, rest = load_network(path)
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(rebuilt(image), network(image))
    assert rest["apn_channels"] == 4 and rest["height"] == 64 and "model" not in rest
    assert not rebuilt.training


def test_saving_leaves_nothing_else_behind(path):
    assert [p.name for p in path.parent.iterdir()] == ["network.pth"]


def test_a_failed_save_keeps_the_old_file(path):
    before = path.read_bytes()
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        save_checkpoint({"model": lambda: None}, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["network.pth"]


def test_a_file_cut_short_is_refused(path):
    data = path.read_bytes()
    for size in (0, 100, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"network\.pth"):
            load_checkpoint(path)


def test_a_flipped_bit_is_found(path):
    """torch loads it in silence."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 1000] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
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
def test_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth"):
        load_checkpoint(tmp_path / "other.pth")


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "text.pth")


def test_a_stage_1_checkpoint_is_no_network(network, tmp_path):
    save_checkpoint({**describe(network), "stage": 1}, tmp_path / "one.pth")
    with pytest.raises(CheckpointError, match="encoder alone"):
        load_network(tmp_path / "one.pth")


@pytest.mark.parametrize(("key", "value"), [("mean", None), ("num_classes", "three")])
def test_a_description_that_lacks_something(network, tmp_path, key, value):
    save_checkpoint(describe(network) | {key: value}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=f"does not say its {key}"):
        load_network(tmp_path / "odd.pth")


def test_plain_weights_say_what_is_missing(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="does not say its dataset"):
        load_network(tmp_path / "plain.pth")


@pytest.mark.parametrize("form", ["checkpoint", "state_dict", "data parallel", "encoder alone"])
def test_an_encoder_loads_from_any_wrapper(network, path, tmp_path, form):
    file = tmp_path / "weights.pth"
    weights = network.state_dict()
    torch.save(
        {
            "checkpoint": describe(network),
            "state_dict": {"state_dict": weights},
            "data parallel": {f"module.{k}": v for k, v in weights.items()},
            "encoder alone": network.encoder.state_dict(),
        }[form],
        file,
    )
    encoder = Encoder()
    load_encoder(encoder, file)
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, weights[f"encoder.{name}"]), name


def test_an_incomplete_encoder_is_refused_and_nothing_copied(network, tmp_path):
    weights = network.encoder.state_dict()
    del weights["0.conv.weight"]
    torch.save(weights, tmp_path / "part.pth")
    encoder = Encoder()
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"0\.conv\.weight is missing"):
        load_encoder(encoder, tmp_path / "part.pth")
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, before[name])


def test_init_keeps_the_classifier_of_the_same_classes(network, path):
    other = LEDNet(3, 4)
    fresh = init_network(other, load_checkpoint(path), path, ["class 0", "class 1", "class 2"])
    assert fresh == []
    assert torch.equal(other.decoder.classifier.weight, network.decoder.classifier.weight)


@pytest.mark.parametrize("names", [["a", "b", "c"], ["a", "b", "c", "d", "e"]])
def test_init_replaces_the_classifier_of_other_classes(network, path, names):
    other = LEDNet(len(names), 4)
    own = other.decoder.classifier.weight.clone()
    fresh = init_network(other, load_checkpoint(path), path, names)
    assert fresh == ["decoder.classifier.weight", "decoder.classifier.bias"]
    assert torch.equal(other.decoder.classifier.weight, own)
    reduce = "decoder.reduce.0.weight"
    assert torch.equal(other.state_dict()[reduce], network.state_dict()[reduce])


def test_init_of_another_width_is_refused(path):
    with pytest.raises(CheckpointError, match="trained with --apn-channels 4, not 8"):
        init_network(LEDNet(3, 8), load_checkpoint(path), path, ["class 0", "class 1", "class 2"])


def test_init_from_an_encoder_alone_is_refused(network, tmp_path):
    torch.save({f"encoder.{k}": v for k, v in network.encoder.state_dict().items()}, tmp_path / "e")
    with pytest.raises(CheckpointError, match=r"decoder.* is missing"):
        init_network(network, load_checkpoint(tmp_path / "e"), tmp_path / "e", [])
