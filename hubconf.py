"""LEDNet through torch.hub: `torch.hub.load(REPOSITORY, "lednet", pretrained=True)`."""

from pathlib import Path as _Path

from torch.nn import Module as _Module

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm"]

_WEIGHTS = _Path(__file__).parent / "weights"


def lednet(
    pretrained: bool = False, apn_channels: int = 20, num_classes: int | None = None
) -> _Module:
    """LEDNet, a network for real-time semantic segmentation.

    Turns images, N x 3 x H x W, RGB in [0, 1], into logits; H and W are at least 64.

    Args:
        pretrained: load the weights that come with the code, trained on the 11 classes of CamVid,
            in evaluation mode.
        apn_channels: width of the decoder; 20 or 128 for the published versions.
        num_classes: number of classes of a network that is not pretrained; default 19.

    Raises:
        ValueError: there are no weights of this width, or num_classes does not fit them.
        ImportError: the caller has imported other packages named models, utils or datasets.
    """
    # Imported late: torch.hub reads this file to list what it offers.
    from models.lednet import LEDNet
    from utils.checkpoint import load_network

    if not pretrained:
        return LEDNet(19 if num_classes is None else num_classes, apn_channels)
    path = _WEIGHTS / f"lednet_d{apn_channels}_camvid.pth"
    if not path.exists():
        found = ", ".join(file.name for file in sorted(_WEIGHTS.glob("*.pth")))
        raise ValueError(f"there are no weights for apn_channels={apn_channels}, only {found}")
    network, about = load_network(path)
    if num_classes not in (None, len(about.classes)):
        raise ValueError(f"the weights are for {len(about.classes)} classes, not {num_classes}")
    return network
