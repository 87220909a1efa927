"""LEDNet through torch.hub: `torch.hub.load(REPOSITORY, "lednet", pretrained=True)`."""

import sys as _sys
import types as _types
from importlib import util as _util
from pathlib import Path as _Path

import torch as _torch

dependencies = ["torch"]

_ROOT = _Path(__file__).resolve().parent


def lednet(
    pretrained: bool | str = False, apn_channels: int = 20, num_classes: int | None = None
) -> _torch.nn.Module:
    """LEDNet, a network for real-time semantic segmentation.

    Turns images, N x 3 x H x W, RGB in [0, 1], into logits; H and W are at least 64. Keep its
    state_dict rather than the network: its class is known only where torch.hub has loaded it.

    Args:
        pretrained: load weights that come with the code, in evaluation mode: "cityscapes" (or
            True), of 19 classes, or "camvid", of 11; weights/README.md says what to expect of them.
        apn_channels: width of the decoder; 20 or 128 for the published versions. There are weights
            of both for "camvid", and of 20 for "cityscapes".
        num_classes: number of classes of a network that is not pretrained; default 19.

    Raises:
        ValueError: there are no such weights, or num_classes does not fit them.
    """
    build = _network_code().LEDNet
    if not pretrained:
        return build(19 if num_classes is None else num_classes, apn_channels)
    data = "cityscapes" if pretrained is True else pretrained
    path = _ROOT / "weights" / f"lednet_d{apn_channels}_{data}.pth"
    if not path.exists():
        found = ", ".join(file.name for file in sorted(path.parent.glob("*.pth")))
        raise ValueError(f"there are no weights {path.name}, only {found}")
    checkpoint = _torch.load(path, map_location="cpu", weights_only=True)
    if num_classes not in (None, checkpoint["num_classes"]):
        raise ValueError(
            f"the weights are for {checkpoint['num_classes']} classes, not {num_classes}"
        )
    network = build(checkpoint["num_classes"], apn_channels)
    network.load_state_dict(checkpoint["model"])
    return network.eval()


def _network_code() -> _types.ModuleType:
    """Import models/lednet.py under a name of its own: `models` may be a package of the caller."""
    name, path = "lednet_network", _ROOT / "models" / "lednet.py"
    loaded = _sys.modules.get(name)
    if loaded and loaded.__file__ == str(path):
        return loaded
    spec = _util.spec_from_file_location(name, path)
    module = _sys.modules[name] = _util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
