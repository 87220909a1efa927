"""LEDNet through torch.hub: `torch.hub.load(REPOSITORY, "lednet", pretrained=True)`."""

from pathlib import Path as _Path

from torch.nn import Module as _Module

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm"]

_WEIGHTS = _Path(__file__).parent / "weights"


def lednet(
    pretrained: bool = False, apn_channels: int = 20, num_classes: int | None = None
) -> _Module:
    """LEDNet, a network for real-time semantic segmentation.

    It takes N x 3 x H x W images, RGB in [0, 1], of at least 64 x 64 pixels, and returns logits,
    N x num_classes x H x W.

    Args:
        pretrained: with the weights that ship with the code, trained on the 11 classes of
            CamVid; in evaluation mode.
        apn_channels: width of the decoder, 20 or 128 for the published versions.
        num_classes: of a network that is not pretrained; default 19.

    Raises:
        ValueError: no weights of this width ship, or num_classes is not theirs.
        ImportError: the caller has packages named models or utils, which hide those from here.
    """
    # Not above: torch.hub reads this file to list and to explain what it offers.
    try:
        from models.lednet import LEDNet
        from utils.checkpoint import load_network
    except ImportError as error:
        raise ImportError(
            f"{error}: another package named models or utils was imported before; load LEDNet "
            "first, or in a process of its own"
        ) from error
    if not pretrained:
        return LEDNet(19 if num_classes is None else num_classes, apn_channels)
    path = _WEIGHTS / f"lednet_d{apn_channels}_camvid.pth"
    if not path.exists():
        found = ", ".join(file.name for file in sorted(_WEIGHTS.glob("*.pth")))
        raise ValueError(f"no weights of apn_channels={apn_channels} ship, but these: {found}")
    network, checkpoint = load_network(path)
    if num_classes not in (None, checkpoint["num_classes"]):
        raise ValueError(
            f"the shipped weights are of {checkpoint['num_classes']} classes, not {num_classes}"
        )
    return network
