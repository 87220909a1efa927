"""The network as an ONNX model that describes itself, and ONNX Runtime to run it."""

import json
import os

import torch
from torch import Tensor, nn
from torch.export import Dim

from datasets.images import MIN_SIZE
from models.deployed import Deployed
from models.lednet import LEDNet
from utils.checkpoint import Description
from utils.errors import UserError
from utils.files import atomic_write

# What a model states beside its graph, each as JSON: how to prepare images and to show labels.
METADATA = ("dataset", "num_classes", "class_names", "colors", "label_ids", "apn_channels")
METADATA += ("mean", "std", "height")


class MissingExtra(UserError):
    """An optional package is not installed."""


def export_onnx(
    network: LEDNet, about: Description | None, path: str | os.PathLike, labels: bool = False
) -> None:
    """Write a trained network as an ONNX model, whole or not at all.

    Args:
        about: content of the metadata; None for no metadata.
        labels: output "labels", N x H x W, uint8, trainIds, instead of "logits", N x C x H x W.

    Raises:
        MissingExtra: packages of the exporter are not installed.
        OSError: the file cannot be written.
    """
    free = {0: Dim("batch"), 2: Dim("height", min=MIN_SIZE), 3: Dim("width", min=MIN_SIZE)}
    try:
        images = torch.rand(2, 3, 2 * MIN_SIZE, 4 * MIN_SIZE)
        program = torch.onnx.export(
            Deployed(network, labels), (images,), dynamo=True, verbose=False,
            input_names=["images"], output_names=["labels" if labels else "logits"],
            dynamic_shapes=(free,),
        )  # fmt: skip
    except ImportError as error:
        raise MissingExtra(f"{error}: pip install onnx onnxscript onnxruntime") from error
    if about is not None:
        stated = about.to_checkpoint()
        program.model.metadata_props.update({key: json.dumps(stated[key]) for key in METADATA})
    with atomic_write(path) as unfinished:
        program.save(unfinished)


class OnnxNetwork(nn.Module):
    """An exported network in ONNX Runtime, on the CPU; raises MissingExtra without that package."""

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtra(f"{error}: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )

    def forward(self, images: Tensor) -> Tensor:
        """Turn N x 3 x H x W, float32, into logits or labels, as the model was exported."""
        (outputs,) = self.session.run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(outputs)
