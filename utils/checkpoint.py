"""Checkpoints: files that describe themselves, written whole and verified when they are read.

A checkpoint is a dict of plain tensors, numbers, strings, lists and dicts:

    model           state_dict of LEDNet, or of what an earlier stage trains
    stage           0: lednet_imagenet.py; 1 and 2: stages of main.py
    epoch, best     finished epochs of the stage; its best epoch so far and the scores of that
    dataset, num_classes, class_names, ...          see `Description`

`last.pth` also holds what `utils.training` needs to resume from any step.
"""

import math
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets import DATASETS
from datasets.segmentation import Classes, Segmentation
from datasets.transforms import normalizer
from models.lednet import Encoder, ImageClassifier, LEDNet
from utils.errors import UserError, few
from utils.files import atomic_write
from utils.original_names import original_names

# Keys that checkpoints have their state_dict under, ours first.
WEIGHTS = ("model", "state_dict", "model_state_dict", "network", "net", "weights", "params")
# Parts of names that come from DataParallel and torch.compile.
WRAPPERS = {"module", "_orig_mod"}
# How files begin that lie in place of checkpoints, and what to say of them.
STAND_INS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: `git lfs pull`",
    b"<": "is a web page or a server's error message, not a checkpoint: download the file itself",
}
# What the reader of weights says of files that Python could read only by running code.
NEEDS_CODE = re.compile(r"GLOBAL (?P<object>\S+)|TorchScript|operand 149")


class CheckpointError(UserError):
    """A checkpoint file cannot be used."""


class EncoderOnly(CheckpointError):
    """A checkpoint of the encoder alone, where a whole network is needed."""


class WrongWidth(CheckpointError):
    """A checkpoint of a network with another decoder width D."""


@dataclass(frozen=True)
class Description:
    """What a checkpoint says about its network: how to rebuild it and how to prepare its inputs."""

    dataset: str  # a key of `datasets.DATASETS`
    classes: Classes  # for segmentation with colours, label ids and categories
    mean: list[float]  # with std, the normalisation of images in [0, 1], by RGB channel
    std: list[float]
    height: int  # of the training images
    train_images: int  # number of them
    apn_channels: int | None = None  # width D of the decoder; None without one, 0 of a teacher
    args: dict[str, Any] = field(default_factory=dict)  # options of the training run

    def to_checkpoint(self) -> dict[str, Any]:
        """Return the entries of a checkpoint: the classes' own, and one for each other field."""
        entries = dict(vars(self))
        return entries.pop("classes").to_checkpoint() | entries

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Mapping[str, Any], path: str | os.PathLike
    ) -> "Description":
        """Read a description; raise a CheckpointError if a part is missing or of another type."""
        types = dict(dataset=str, class_names=list, colors=list, label_ids=list, height=int)
        for key, expected in types.items():
            if not isinstance(checkpoint.get(key), expected):
                raise CheckpointError(
                    f"{path} does not state its {key}: main.py did not write it, and it can only "
                    "be used to start training"
                )
        mean, std = normalisation(checkpoint, path) or ([0.0] * 3, [1.0] * 3)
        weights = checkpoint.get("model", {})
        decoder_width = apn_channels_of(weights) or checkpoint.get("apn_channels")
        return cls(
            checkpoint["dataset"], Classes.from_checkpoint(checkpoint), mean, std,
            checkpoint["height"], checkpoint.get("train_images", 0), decoder_width,
            checkpoint.get("args", {}),
        )  # fmt: skip

    def dataset_class(self) -> type[Segmentation]:
        """Return the class of the data set that the network was trained on."""
        if self.dataset not in DATASETS:
            raise UserError(f"the network was trained on {self.dataset}, which is not in datasets/")
        return DATASETS[self.dataset]

    def open_split(
        self, root: str, split: str, height: int | None = None, resize_labels: bool = True
    ) -> Segmentation:
        """Open a split of the data set that the network was trained on, at its working height."""
        dataset_class = self.dataset_class()
        if split not in dataset_class.SPLITS:
            splits = ", ".join(dataset_class.SPLITS)
            raise UserError(f"{self.dataset} has no split {split}, only {splits}")
        return dataset_class(root, split, self.classes, height or self.height, resize_labels)

    def normalizer(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return a function that turns images, N x 3 x H x W, uint8, into inputs."""
        return normalizer(self.mean, self.std, device)


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint whole or not at all; an OSError leaves the old file as it is."""
    with atomic_write(path) as unfinished, unfinished.open("wb") as file:
        try:
            torch.save(dict(checkpoint), file)
        except RuntimeError as error:
            # After a failed write, torch fails again as it closes the archive, and hides the cause.
            if error.__context__ is not None:
                raise error.__context__ from None
            raise


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running code that it may contain.

    The checkpoint may be a plain state_dict, or have it under any of `WEIGHTS`; it is returned
    under "model", with the names that LEDNet has without what was wrapped around it.

    Raises:
        CheckpointError: the file is missing, damaged or something else.
    """
    if not os.path.isfile(path):
        wrong = "is a folder" if os.path.isdir(path) else "does not exist"
        raise CheckpointError(f"{path} {wrong}: give the path of a checkpoint file")
    damaged = content = None
    try:
        # torch does not compare the checksums of its archives, and would load a flipped bit.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        if not damaged:
            with warnings.catch_warnings(action="ignore"):  # of formats that are refused below
                content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # what torch.load raises on other files is not documented
        if found := NEEDS_CODE.search(str(error)):
            raise CheckpointError(
                f"{path} is not a checkpoint of weights alone but holds "
                f"{found['object'] or 'a whole model'}, and to read it would run its code: if you "
                "trust it, load it with the code that wrote it, and torch.save its state_dict"
            ) from error
        begin = Path(path).read_bytes()[:100].lstrip()
        wrong = [reason for start, reason in STAND_INS.items() if begin.startswith(start)]
        wrong.append("is not a checkpoint, or was cut short: use another file or a copy")
        raise CheckpointError(f"{path} {wrong[0]}") from error
    if damaged:
        raise CheckpointError(f"{path} is damaged (checksum of {damaged}): use a copy")
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no weights but a {type(content).__name__}")
    weights = _find_weights(content)
    if weights is None:
        raise CheckpointError(f"{path} holds no weights: use a checkpoint that main.py wrote")
    return ({} if weights is content else content) | {"model": _plain_names(weights)}


def _find_weights(content: Any, depth: int = 2) -> dict[str, Tensor] | None:
    """Return the state_dict that a file consists of, has under a known key, or has only one of."""
    if not isinstance(content, dict) or not content:
        return None
    if all(isinstance(name, str) and isinstance(w, Tensor) for name, w in content.items()):
        return content
    inside = {key: _find_weights(value, depth - 1) for key, value in content.items() if depth}
    found = {key: weights for key, weights in inside.items() if weights is not None}
    known = [key for key in WEIGHTS if key in found] or (list(found) if len(found) == 1 else [])
    return found[known[0]] if known else None


def _plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a network without what was around it, such as "model."; what lies
    beside it, such as those of a loss, keeps its name."""
    split = ((name.split("."), weight) for name, weight in weights.items())
    plain = {".".join(part for part in parts if part not in WRAPPERS): w for parts, w in split}
    plain.pop("n_averaged", None)  # of an AveragedModel
    prefix, _ = _prefix(plain, ["encoder.0.conv.weight", "decoder.reduce.0.weight"])
    return {name.removeprefix(prefix): weight for name, weight in plain.items()}


def load_network(path: str | os.PathLike) -> tuple[LEDNet, Description]:
    """Rebuild a trained network, in evaluation mode on the CPU, and read its description.

    Raises:
        CheckpointError: the file is not a checkpoint of a whole network by main.py.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.get("stage") in (0, 1):
        raise EncoderOnly(f"{path} holds the encoder alone, not a whole network")
    about = Description.from_checkpoint(checkpoint, path)
    if about.apn_channels == 0:
        raise CheckpointError(
            f"{path} holds a teacher: tools/write_soft_labels.py lets a network learn from it"
        )
    if not about.apn_channels:
        raise CheckpointError(f"{path} holds no decoder: use the best.pth of a run of main.py")
    network = LEDNet(len(about.classes), about.apn_channels)
    fill(network, checkpoint["model"], path)
    return network.eval(), about


def load_classifier(path: str | os.PathLike) -> tuple[ImageClassifier, Description]:
    """Rebuild an image classifier, in evaluation mode on the CPU, and read its description.

    Raises:
        CheckpointError: the file is not a checkpoint of a classifier by lednet_imagenet.py.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.get("stage") != 0 or "head.weight" not in checkpoint["model"]:
        raise CheckpointError(
            f"{path} holds no image classifier: give the best.pth of a run of lednet_imagenet.py"
        )
    # Files of earlier versions state nothing about colours and label ids.
    about = Description.from_checkpoint({"colors": [], "label_ids": []} | checkpoint, path)
    model = ImageClassifier(Encoder(), len(about.classes))
    fill(model, checkpoint["model"], path)
    return model.eval(), about


def load_encoder(
    encoder: Encoder, path: str | os.PathLike
) -> tuple[dict[str, Any], int, list[str]]:
    """Copy the weights of an encoder from any file that holds them all.

    It may be a checkpoint of either program, of the encoder alone or with more around it, or a
    plain state_dict, with our names or those of the original code.

    Returns:
        The checkpoint without its weights, the number of tensors copied, and the names of others.

    Raises:
        CheckpointError: the file is not a checkpoint or does not fill the encoder.
    """
    checkpoint = load_checkpoint(path)
    weights = checkpoint.pop("model")
    own = {name: name for name in encoder.state_dict()}
    found = [(*_prefix(weights, names.values()), names) for names in (own, original_names(encoder))]
    prefix, _, names = max(found, key=lambda candidate: candidate[1])
    stored = {ours: prefix + theirs for ours, theirs in names.items()}
    matched = {ours: weights[theirs] for ours, theirs in stored.items() if theirs in weights}
    # PyTorch before 0.4.1 did not count batches, and nothing reads the counts.
    zeros = {
        name: torch.zeros_like(weight)
        for name, weight in encoder.state_dict().items()
        if name.endswith(".num_batches_tracked")
    }
    filled = zeros | matched
    missing = [theirs for ours, theirs in stored.items() if ours not in filled]
    if missing:
        raise CheckpointError(
            f"{path} does not fill the encoder, tensors are missing: {few(missing)}; give a file "
            "that holds the whole encoder"
        )
    fill(encoder, filled, path)
    others = weights.keys() - set(stored.values())
    return checkpoint, len(matched), [name for name in weights if name in others]


def _prefix(weights: Mapping[str, Tensor], names: Iterable[str]) -> tuple[str, int]:
    """Return the commonest prefix of these names in a file, such as "encoder.", and its count."""
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
    """Return the mean and std of a checkpoint's inputs, by RGB channel; None if it states none."""
    if "mean" not in checkpoint and "std" not in checkpoint:
        return None
    try:
        mean, std = ([float(v) for v in checkpoint[key]] for key in ("mean", "std"))
        usable = len(mean) == len(std) == 3 and all(map(math.isfinite, mean + std)) and min(std) > 0
    except (KeyError, TypeError, ValueError):
        usable = False
    if not usable:
        raise CheckpointError(
            f"{path} states a mean and std that are not three numbers each, with a std above 0"
        )
    return mean, std


def init_network(
    network: LEDNet, checkpoint: Mapping[str, Any], path: str | os.PathLike, classes: Classes
) -> tuple[list[str], list[str]]:
    """Copy the weights of a whole trained network, and in its classifier those of the same classes.

    Args:
        checkpoint: what `load_checkpoint` read from `path`; if it names no classes but has as many
            as the network, they are taken to be the same.
        classes: classes of `network`.

    Returns:
        Names of the classes whose weights stay random, and of the tensors in the file that the
        network does not have.

    Raises:
        CheckpointError: the file does not fill the rest of the network.
    """
    if checkpoint.get("stage") in (0, 1):
        raise EncoderOnly(f"{path} holds the encoder alone, not a whole network")
    weights, own = dict(checkpoint["model"]), network.state_dict()
    heads = [name for name in own if name.startswith("decoder.classifier.") and name in weights]
    count = len(weights[heads[0]]) if heads else 0
    rows = _rows_of(classes, checkpoint.get("class_names"), count)
    for head in heads:
        if weights[head].shape[1:] == own[head].shape[1:]:  # else, another width D: refused below
            pairs = zip(own[head], rows, strict=True)
            weights[head] = torch.stack(
                [random if row is None else weights[head][row].to(random) for random, row in pairs]
            )
    fill(network, weights, path)
    fresh = [name for name, row in zip(classes.names, rows, strict=True) if row is None]
    return fresh, [name for name in weights if name not in own]


def _rows_of(classes: Classes, stored: Any, count: int) -> list[int | None]:
    """Return the row of each class in a classifier of `count` rows, None for classes without one.

    A class has the row of its own name, else of that name in other capitals, else of the first of
    its names in `classes.related`.
    """
    if stored is None and count == len(classes):
        return list(range(count))
    # Other programs may state anything by that key.
    if not isinstance(stored, list) or list(map(type, stored)) != [str] * count:
        return [None] * len(classes)
    rows = {name.lower(): row for row, name in enumerate(stored)}
    rows |= {name: row for row, name in enumerate(stored)}

    def row_of(name: str) -> int | None:
        names = (name, name.lower(), *classes.related.get(name, ()))
        return next((rows[known] for known in names if known in rows), None)

    return list(map(row_of, classes.names))


def apn_channels_of(weights: Mapping[str, Tensor]) -> int | None:
    """Return the decoder width D of a network's weights; None without a decoder."""
    reduce = weights.get("decoder.reduce.0.weight")
    return None if reduce is None else reduce.shape[0]


def fill(module: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Copy weights into a module; others than its own are left out.

    Raises:
        CheckpointError: a tensor of the module is missing, or has another shape.
    """
    own = module.state_dict()
    width, stored_width = apn_channels_of(own), apn_channels_of(weights)
    if width and stored_width and width != stored_width:
        raise WrongWidth(f"{path} was trained with D = {stored_width}, not {width}")
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(weight.shape)}"
        for name, weight in own.items()
        if name in weights and weights[name].shape != weight.shape
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit the {type(module).__name__}: {few(problems)}; give a "
            "checkpoint of this network"
        )
    module.load_state_dict({name: weights[name] for name in own})


def on_cpu(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a module on the CPU, so that they load on any machine."""
    return {name: weight.cpu() for name, weight in module.state_dict().items()}
