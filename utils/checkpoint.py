"""Checkpoints: one file that explains itself, written whole and read with care.

A checkpoint is a dict of plain tensors, numbers, strings, lists and dicts:

    model           state_dict of LEDNet; before stage 2 of the encoder under its training head
    stage           that wrote it: 0 is pretraining by lednet_imagenet.py, 1 and 2 are main.py's
    dataset, num_classes, class_names, colors (RGB 0-255), categories
    label_ids       value of each class in the label files of the data set
    ignored_ids     values in them that are ignored
    train_images    that it was trained on
    apn_channels    width D of the decoder, where there is one
    mean, std       that inputs in [0, 1] are normalised with, by RGB channel
    height          of the images that the network was trained on
    args            options of the training run
    epoch, best     epochs done in this stage; the best one so far and its scores

and in last.pth what `utils.training` needs to go on from any step:

    optimizer, scheduler, scaler
    training_model  the weights that training goes on with, where `model` may be an average (EMA)
    ema_updates     steps that are in the average
    step, steps     done of the epoch after `epoch`, and all of it
    lr, batch_size  of that epoch
    processes       of each process its random states and sums
"""

import math
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.lednet import Encoder, ImageClassifier, LEDNet
from utils.errors import UserError
from utils.files import atomic_write
from utils.original_names import original_names

# What a checkpoint must say of its network to rebuild it and its preprocessing.
DESCRIPTION = {
    "dataset": str,
    "num_classes": int,
    "class_names": list,
    "colors": list,
    "label_ids": list,
    "ignored_ids": list,
    "apn_channels": int,
    "mean": list,
    "std": list,
    "height": int,
}


class CheckpointError(UserError):
    """A checkpoint file is not usable; the message is one line that says what to do."""


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint beside `path`, sync it and rename it: the file is whole or absent.

    Raises:
        OSError: it cannot be written; the file that was there is as it was.
    """
    with atomic_write(path) as unfinished, unfinished.open("wb") as file:
        try:
            torch.save(dict(checkpoint), file)
        except RuntimeError as error:
            # Where writing failed, torch fails again to close its archive, and hides the reason.
            if error.__context__ is not None:
                raise error.__context__ from None
            raise


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running any code that is in it.

    A plain state_dict is taken too, and comes back as {"model": state_dict}.

    Raises:
        CheckpointError: the file is missing, damaged or holds something else.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} does not exist: give the path of a checkpoint file")
    try:
        # torch itself loads a flipped bit in silence; the archive's checksums tell.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"{path} is damaged (checksum of {damaged}): use a copy")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # what torch.load raises on other files is not documented
        raise CheckpointError(
            f"{path} is not a checkpoint, or was cut short: use another file or a copy"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no weights but a {type(content).__name__}")
    if "model" not in content:
        wrapped = "state_dict" in content
        content = {**content, "model": content["state_dict"]} if wrapped else {"model": content}
    weights = content["model"]
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in weights.items()
    ):
        raise CheckpointError(f"{path} holds no weights: use a checkpoint that main.py wrote")
    # DataParallel puts a prefix before every name.
    content["model"] = {name.removeprefix("module."): w for name, w in weights.items()}
    return content


def load_network(path: str | os.PathLike) -> tuple[LEDNet, dict[str, Any]]:
    """Rebuild the trained network that a checkpoint holds, in evaluation mode on the CPU.

    Returns:
        The network and the rest of the checkpoint.

    Raises:
        CheckpointError: the file is not a checkpoint of a whole network by main.py.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.get("stage") in (0, 1):
        raise CheckpointError(
            f"{path} holds the encoder alone: train stage 2 first, with "
            f"main.py --pretrained-encoder {path}"
        )
    for key, kind in DESCRIPTION.items():
        if not isinstance(checkpoint.get(key), kind):
            raise CheckpointError(
                f"{path} does not say its {key}: it was not written by main.py; "
                f"train from it with main.py --init {path}"
            )
    network = LEDNet(checkpoint["num_classes"], checkpoint["apn_channels"])
    fill(network, checkpoint.pop("model"), path)
    return network.eval(), checkpoint


def load_classifier(path: str | os.PathLike) -> tuple[ImageClassifier, dict[str, Any]]:
    """Rebuild the image classifier that a checkpoint holds, in evaluation mode on the CPU.

    Returns:
        The classifier and the rest of the checkpoint.

    Raises:
        CheckpointError: the file is not a checkpoint of a classifier by lednet_imagenet.py.
    """
    checkpoint = load_checkpoint(path)
    head, names = checkpoint["model"].get("head.weight"), checkpoint.get("class_names")
    if (
        checkpoint.get("stage") != 0
        or not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or head is None
        or head.shape[:1] != (len(names),)
        or not isinstance(checkpoint.get("height"), int)
        or normalisation(checkpoint, path) is None
    ):
        raise CheckpointError(
            f"{path} holds no image classifier: give the best.pth of a run of lednet_imagenet.py"
        )
    model = ImageClassifier(Encoder(), len(names))
    fill(model, checkpoint.pop("model"), path)
    return model.eval(), checkpoint


def load_encoder(encoder: Encoder, path: str | os.PathLike) -> tuple[dict[str, Any], int]:
    """Fill an encoder from any file that holds all of its weights, and nothing else of it.

    That is a checkpoint of either program, whole or the encoder alone, or a plain state_dict
    with our names or those of the original code.

    Returns:
        The checkpoint without its weights, and the number of tensors that were copied.

    Raises:
        CheckpointError: the file is not a checkpoint or does not fill the encoder.
    """
    checkpoint = load_checkpoint(path)
    weights = checkpoint.pop("model")
    own = {name: name for name in encoder.state_dict()}
    found = [(*_prefix(weights, names.values()), names) for names in (own, original_names(encoder))]
    prefix, _, names = max(found, key=lambda way: way[1])
    inside = {
        ours: weights[prefix + theirs]
        for ours, theirs in names.items()
        if prefix + theirs in weights
    }
    # PyTorch before 0.4.1 did not count batches, and nothing reads the count.
    counters = {
        name: torch.zeros_like(count)
        for name, count in encoder.state_dict().items()
        if name.endswith(".num_batches_tracked") and name not in inside
    }
    filling = inside | counters
    missing = [prefix + theirs for ours, theirs in names.items() if ours not in filling]
    if missing:
        raise CheckpointError(
            f"{path} does not fill the encoder: {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            + (" are" if len(missing) > 1 else " is")
            + " missing: give a file that holds the whole encoder"
        )
    fill(encoder, filling, path)
    return checkpoint, len(inside)


def _prefix(weights: Mapping[str, Tensor], names: Iterable[str]) -> tuple[str, int]:
    """What stands before most of these names in a file, such as "encoder.", and before how many."""
    wanted, prefixes = set(names), Counter({"": 0})
    for key in weights:
        parts = key.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in wanted:
                prefixes["".join(f"{part}." for part in parts[:cut])] += 1
    return prefixes.most_common(1)[0]


def normalisation(
    checkpoint: Mapping[str, Any], path: str | os.PathLike
) -> tuple[list[float], list[float]] | None:
    """The mean and std, by RGB channel, that a checkpoint's inputs were normalised with.

    Returns:
        None where the file says nothing of it.

    Raises:
        CheckpointError: what it says is not three numbers each, the std above 0.
    """
    if "mean" not in checkpoint and "std" not in checkpoint:
        return None
    mean, std = checkpoint.get("mean"), checkpoint.get("std")
    for values in (mean, std):
        if not (
            isinstance(values, list | tuple)
            and len(values) == 3
            and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
        ):
            raise CheckpointError(f"{path} says a mean and std that are not three numbers each")
    if min(std) <= 0:
        raise CheckpointError(f"{path} says a std of {min(std)}: it must be above 0")
    return list(mean), list(std)


def init_network(
    network: LEDNet, checkpoint: Mapping[str, Any], path: str | os.PathLike, class_names: list[str]
) -> list[str]:
    """Start from a whole trained network; its classifier is kept where the classes agree.

    Args:
        checkpoint: what `load_checkpoint` read from `path`.
        class_names: of the classes that the network is to tell apart.

    Returns:
        Names of the tensors that keep their random values: the classifier's, or none.

    Raises:
        CheckpointError: the file does not fill the rest of the network.
    """
    if checkpoint.get("stage") in (0, 1):
        raise CheckpointError(
            f"{path} holds the encoder alone: give it as --pretrained-encoder {path}"
        )
    weights, own = checkpoint["model"], network.state_dict()
    classifier = [name for name in own if name.startswith("decoder.classifier.")]
    same_classes = checkpoint.get("class_names", class_names) == class_names
    fresh = [
        name
        for name in classifier
        if name in weights and not (same_classes and weights[name].shape == own[name].shape)
    ]
    fill(network, {**weights, **{name: own[name] for name in fresh}}, path)
    return fresh


def apn_channels_of(weights: Mapping[str, Tensor]) -> int | None:
    """The decoder width D of a network's weights; None where they hold no decoder."""
    reduce = weights.get("decoder.reduce.0.weight")
    return None if reduce is None else reduce.shape[0]


def fill(module: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Copy weights into a module after comparing every name and shape.

    Raises:
        CheckpointError: names what is missing, left over or of another shape; nothing is copied.
    """
    own = module.state_dict()
    width, stored_width = apn_channels_of(own), apn_channels_of(weights)
    if width and stored_width and width != stored_width:
        raise CheckpointError(
            f"{path} was trained with --apn-channels {stored_width}, not {width}: "
            f"give --apn-channels {stored_width} or another file"
        )
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(weight.shape)}"
        for name, weight in own.items()
        if name in weights and weights[name].shape != weight.shape
    ]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    if problems:
        raise CheckpointError(
            f"{path} does not fit the {type(module).__name__}: {'; '.join(problems[:3])}"
            + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
            + ": give a checkpoint of this network"
        )
    module.load_state_dict(weights)


def on_cpu(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module, loadable on any machine."""
    return {name: weight.cpu() for name, weight in module.state_dict().items()}
