"""OpenVINO to run the network on a CPU, in float32, bfloat16 or 8-bit integers."""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from models.lednet import LEDNet
from utils.errors import UserError
from utils.onnx import MissingExtra, export_onnx


class OpenVinoNetwork(nn.Module):
    """An exported network in OpenVINO, on the CPU, with as many threads as torch.

    All up to the classifier is computed in `dtype`, and the upsampling of its logits in float32:
    OpenVINO would round the sampling positions too, which changes 1 % of the labels.

    Args:
        path: model of `export_onnx`, or one that tools/quantize.py made of it.
        dtype: float32 or bfloat16; layers with integers keep them in both.

    Raises:
        MissingExtra: openvino is not installed.
        UserError: the CPU has no bfloat16, or the file is no ONNX model.
    """

    def __init__(self, path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        check_openvino(dtype)
        from openvino import Core

        core = Core()
        try:
            model = core.read_model(os.fspath(path))
        except RuntimeError as error:
            raise UserError(f"{path} cannot be read as an ONNX model") from error
        self.output_shape = model.output(0).partial_shape
        precisions = ("bf16" if dtype == torch.bfloat16 else "f32", "f32")
        self.parts = [
            core.compile_model(
                part,
                "CPU",
                {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
                | {"INFERENCE_NUM_THREADS": torch.get_num_threads()},
            )
            for part, precision in zip(split(model), precisions, strict=True)
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Turn N x 3 x H x W, float32, into logits or labels, as the model was exported.

        Each pass overwrites the output of the last.
        """
        inputs = [images.contiguous().numpy()]
        for part in self.parts:
            outputs = part(inputs, share_inputs=True, share_outputs=True)[0]
            inputs.insert(0, outputs)
        return torch.from_numpy(outputs)


def in_openvino(
    network: LEDNet, dtype: torch.dtype, exported: str | os.PathLike | None = None
) -> OpenVinoNetwork:
    """Return a network in OpenVINO, with logits out; see `OpenVinoNetwork` for its errors.

    Args:
        exported: file of the network to run; None: it is exported for the moment.
    """
    if exported:
        model = OpenVinoNetwork(exported, dtype)
        classes = network.decoder.classifier.out_channels
        if str(model.output_shape) != f"[?,{classes},?,?]":
            raise UserError(
                f"{exported} does not give logits of {classes} classes for images of any size: "
                "make it of the same --checkpoint, with neither --labels nor --size"
            )
        return model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        export_onnx(network, None, path)
        return OpenVinoNetwork(path, dtype)


def check_openvino(dtype: torch.dtype) -> None:
    """Raise the errors of `OpenVinoNetwork` that come before its file is read."""
    try:
        from openvino import Core
    except ImportError as error:
        raise MissingExtra(f"{error}: pip install openvino") from error
    if dtype not in (torch.float32, torch.bfloat16):
        raise UserError("OpenVINO computes in float32 or bfloat16")
    if dtype == torch.bfloat16:
        if "BF16" not in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UserError("this CPU has no bfloat16: give float32")


def split(model: "openvino.Model") -> "tuple[openvino.Model, openvino.Model]":  # noqa: F821
    """Cut a model behind its classifier, the last convolution with its bias.

    Returns:
        From images to logits, and from these and the images, for their size, to the outputs.
    """
    from openvino import Model
    from openvino.op import Parameter

    convolutions = [op for op in model.get_ordered_ops() if op.get_type_name() == "Convolution"]
    logits = convolutions[-1].output(0)
    readers = [reader.get_node() for reader in logits.get_target_inputs()]
    logits = next((op.output(0) for op in readers if op.get_type_name() == "Add"), logits)
    given = Parameter(logits.get_element_type(), logits.get_partial_shape())
    for reader in logits.get_target_inputs():
        reader.replace_source_output(given.output(0))
    images = model.get_parameters()
    return Model([logits], images), Model(model.get_results(), [given, *images])
