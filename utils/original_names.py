"""How the original LEDNet code names the encoder's tensors.

Its first downsampler is `initial_block`, the other blocks are `layers.0` to `layers.14`. Both
branches of an ss-nbt block are named alike, `_l` and `_r` at the end, although the right one runs
each 1x3 convolution before the 3x1.
"""

from models.lednet import Downsampler, Encoder

# The layers of a branch that have weights, in the order in which they run.
LEFT = ("conv3x1_1_l", "conv1x3_1_l", "bn1_l", "conv3x1_2_l", "conv1x3_2_l", "bn2_l")
RIGHT = ("conv1x3_1_r", "conv3x1_1_r", "bn1_r", "conv1x3_2_r", "conv3x1_2_r", "bn2_r")


def original_names(encoder: Encoder) -> dict[str, str]:
    """The original's name, without a prefix, for each name of the encoder's state_dict."""
    layers = {}  # our name of each layer that has weights, and theirs
    for number, block in enumerate(encoder):
        original = f"layers.{number - 1}" if number else "initial_block"
        if isinstance(block, Downsampler):
            layers |= {f"{number}.{name}": f"{original}.{name}" for name in ("conv", "bn")}
        else:
            for side, names in (("left", LEFT), ("right", RIGHT)):
                branch = block.get_submodule(side).named_children()
                ours = [f"{number}.{side}.{name}" for name, layer in branch if layer.state_dict()]
                layers |= dict(zip(ours, (f"{original}.{name}" for name in names), strict=True))
    split = (name.rpartition(".") for name in encoder.state_dict())
    return {f"{layer}.{tensor}": f"{layers[layer]}.{tensor}" for layer, _, tensor in split}
