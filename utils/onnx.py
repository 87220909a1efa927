"""The network as an ONNX model that describes itself, and ONNX Runtime to run it."""

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
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

# Those of ONNX 1.12, of 2022, for runtimes such as TensorRT 8.5. torch writes opset 18 and newer.
OPSET, IR_VERSION = 17, 8


class MissingExtra(UserError):
    """An optional package is not installed."""


def export_onnx(
    network: LEDNet,
    about: Description | None,
    path: str | os.PathLike,
    labels: bool = False,
    size: Sequence[int] | None = None,
) -> None:
    """Write a trained network as an ONNX model, whole or not at all.

    Args:
        about: content of the metadata; None for no metadata.
        labels: output "labels", N x H x W, uint8, trainIds, instead of "logits", N x C x H x W.
        size: height and width of its images, which come one by one; None: any, in any batch.

    Raises:
        MissingExtra: packages of the exporter are not installed.
        OSError: the file cannot be written.
    """
    free = {0: Dim("batch"), 2: Dim("height", min=MIN_SIZE), 3: Dim("width", min=MIN_SIZE)}
    images = torch.rand(2, 3, 2 * MIN_SIZE, 4 * MIN_SIZE)
    if size is not None:
        free, images = {}, torch.rand(1, 3, *size)
    try:
        from onnxscript.optimizer import optimize

        program = torch.onnx.export(
            Deployed(network, labels), (images,), dynamo=True, verbose=False, opset_version=18,
            input_names=["images"], output_names=["labels" if labels else "logits"],
            dynamic_shapes=(free,),
        )  # fmt: skip
    except ImportError as error:
        raise MissingExtra(f"{error}: pip install onnx onnxscript onnxruntime") from error
    lower_opset(program.model)
    # With a size, all that depends on it becomes constants, of any length.
    optimize(program.model, input_size_limit=2**31, output_size_limit=2**31)
    if about is not None:
        stated = about.to_checkpoint()
        program.model.metadata_props.update({key: json.dumps(stated[key]) for key in METADATA})
    with atomic_write(path) as unfinished:
        program.save(unfinished)


def lower_opset(model: "onnx_ir.Model") -> None:  # noqa: F821
    """Turn an exported network of opset 18 into one of opset 17: two kinds of nodes differ."""
    for node in model.graph:
        if node.op_type == "Resize":
            for name in ("antialias", "keep_aspect_ratio_policy"):  # at their defaults
                node.attributes.pop(name, None)
        elif node.op_type == "ReduceMean":  # over height and width, now given as an input
            node.op_type = "GlobalAveragePool"
            node.attributes.clear()
            node.resize_inputs(1)
    model.opset_imports[""], model.ir_version = OPSET, IR_VERSION


def quantize(exported: Path, quantized: Path, images: Iterable[Tensor]) -> None:
    """Write an exported network with integers, scaled to the ranges that it shows on images."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    remaining = iter(images)

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(remaining, None)
            return None if image is None else {"images": image.contiguous().numpy()}

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        # Batch norms are folded already; only the shapes are missing.
        quant_pre_process(exported, prepared, skip_optimization=True, skip_symbolic_shape=True)
        nodes = onnx.load(prepared).graph.node
        decoder = next(i for i, n in enumerate(nodes) if any("decoder." in m for m in n.input))
        # Attention of 8 bits, which scales every feature, would change 0.5 % of the labels.
        attention = [n.name for n in nodes[decoder:] if n.op_type not in ("Conv", "Relu")]
        quantize_static(
            prepared,
            quantized,
            Reader(),
            nodes_to_exclude=attention,
            per_channel=True,
            # Unsigned, since most activations come after a ReLU.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,  # 7 bits: see tools/quantize.py
        )


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
