"""The network as an ONNX model that explains itself, and ONNX Runtime as one of its runtimes."""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from models.deployed import Deployed
from models.lednet import LEDNet
from utils.errors import UserError
from utils.files import atomic_write

# What the model's metadata says beside its graph, each as JSON: what a program needs to prepare
# images and to show labels.
METADATA = (
    "dataset",
    "num_classes",
    "class_names",
    "colors",
    "label_ids",
    "apn_channels",
    "mean",
    "std",
    "height",
)
LEAST = 64  # height and width of an image


class MissingExtra(UserError):
    """An optional package is not installed; the message is one line that says how to."""


def export_onnx(
    network: LEDNet, checkpoint: Mapping[str, Any], path: str | os.PathLike, labels: bool = False
) -> None:
    """Write a trained network as ONNX, whole or not at all.

    Its input is "images", N x 3 x H x W, float32, RGB in [0, 1], normalised with the mean and std
    of the metadata; N, H and W are free, from 64 on for H and W. Its output is "logits",
    N x C x H x W, float32, or "labels", N x H x W, uint8, trainIds.

    Args:
        checkpoint: what the metadata says, as far as it says it; see METADATA.

    Raises:
        MissingExtra: the exporter's packages are not installed.
        OSError: the file cannot be written.
    """
    free = {0: Dim("batch"), 2: Dim("height", min=LEAST), 3: Dim("width", min=LEAST)}
    try:
        program = torch.onnx.export(
            Deployed(network, labels),
            (torch.rand(2, 3, 2 * LEAST, 4 * LEAST),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["labels" if labels else "logits"],
            dynamic_shapes=(free,),
        )
    except ImportError as error:
        raise MissingExtra(f"{error}: pip install onnx onnxscript onnxruntime") from error
    properties = {name: json.dumps(checkpoint[name]) for name in METADATA if name in checkpoint}
    program.model.metadata_props.update(properties)
    with atomic_write(path) as unfinished:
        program.save(unfinished)


class OnnxNetwork(nn.Module):
    """An exported network in ONNX Runtime, on the CPU.

    Args:
        path: of the model.
        threads: that it computes with; None: as many as torch does.

    Raises:
        MissingExtra: onnxruntime is not installed.
    """

    def __init__(self, path: str | os.PathLike, threads: int | None = None) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtra(f"{error}: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )

    def forward(self, images: Tensor) -> Tensor:
        """N x 3 x H x W, float32, to logits or labels, as the model was exported."""
        (outputs,) = self.session.run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(outputs)
