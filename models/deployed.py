"""LEDNet rewritten for inference: the same function in fewer and larger steps.

What changes against `models/lednet.py`, which reads like the paper:

- Batch norms are folded into their convolutions: in evaluation mode both are linear.
- The two halves of the channels stay two tensors through a stage; they are never split, and are
  joined only for the shuffle.
- The last shuffle of a stage is left out, and the weights that read the stage are reordered.
- Shuffling and upsampling, which only move and mix values, can be matrix products.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from models.lednet import APN, Downsampler, LEDNet, SSnbt, upsample_logits

Halves = tuple[Tensor, Tensor]  # the left and right half of the channels


def deploy(
    network: LEDNet, labels: bool = False, dtype: torch.dtype = torch.float32, compiled: bool = True
) -> nn.Module:
    """Return a copy of a trained network for inference, on the same device.

    Args:
        network: trained network, which stays as it is.
        labels: return the class of each pixel, N x H x W, uint8, instead of the logits,
            N x C x H x W, float32.
        dtype: precision of the computation; float16 or bfloat16 for half precision.
        compiled: use torch.compile, which takes about a minute at the first pass of each input
            shape, and a C++ compiler on a CPU. On a GPU the passes become CUDA graphs: each one
            overwrites the output of the last.
    """
    device = next(network.parameters()).device
    deployed = Deployed(network, labels, products=device.type != "cuda")
    deployed.to(device, dtype, memory_format=torch.channels_last)
    return WithoutGradients(compiled_for(deployed, device)) if compiled else deployed


def compiled_for(network: nn.Module, device: torch.device) -> nn.Module:
    """Compile a network for inference, with the options that suit the device."""
    # One graph for all input shapes would be slower at each of them.
    if device.type == "cuda":
        return torch.compile(network, mode="reduce-overhead", dynamic=False)
    return torch.compile(network, options={"freezing": True}, dynamic=False)


class WithoutGradients(nn.Module):
    """Run a network in inference mode, without which freezing does not fold its weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class Deployed(nn.Module):
    """A trained network for inference only.

    Args:
        network, labels: as for `deploy`.
        products: shuffle by 1x1 convolutions of zeros and ones, and upsample by matrix products.
            CPU runtimes keep channels in blocks, a layout that convolutions keep and copies
            break. False: copy and interpolate, which compilers for GPUs fuse with other steps.
    """

    def __init__(self, network: LEDNet, labels: bool = False, products: bool = True) -> None:
        super().__init__()
        self.labels, self.products = labels, products
        network = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
        stages: list[list[nn.Module]] = []
        for layer in network.encoder:
            if isinstance(layer, Downsampler):
                stages.append([])
            stages[-1].append(layer)
        self.stages = nn.ModuleList()
        order = torch.arange(3)  # input channels: RGB
        for downsampler, *blocks in stages:
            self.stages.append(Stage(downsampler, blocks, order, products))
            # The shuffle that the stage leaves out is done to the weights that read it.
            order = shuffled_order(downsampler.bn.num_features).argsort()
        self.decoder = fused_decoder(network.decoder, order)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Segment images, N x 3 x H x W, normalised as in training; H and W are at least 64.

        Returns:
            Logits, N x C x H x W, float32; or labels, N x H x W, uint8, trainIds.
        """
        features = images.to(self.decoder.classifier.weight.dtype)
        for stage in self.stages:
            features = stage(features)
        logits = self.decoder(features)  # N x C x H/8 x W/8
        upsample = upsample_by_products if self.products else upsample_logits
        logits = upsample(logits.float(), images)
        return logits.argmax(1).to(torch.uint8) if self.labels else logits


class Stage(nn.Module):
    """A downsampler and its blocks, without the last shuffle."""

    def __init__(
        self, downsampler: Downsampler, blocks: list[SSnbt], order: Tensor, products: bool
    ) -> None:
        super().__init__()
        channels = downsampler.bn.num_features
        self.downsample = Downsample(downsampler, order)
        self.blocks = nn.ModuleList(map(Block, blocks))
        self.shuffle = ShuffleByProducts(channels) if products else Shuffle()

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.downsample(x)
        for block in self.blocks[:-1]:
            left, right = self.shuffle(*block(left, right))
        return torch.cat(self.blocks[-1](left, right), dim=1)


class Downsample(nn.Module):
    """A downsampler that returns halves: convolved channels, then pooled ones.

    Before its ReLU it is linear: [conv(x), pool(x)] is a convolution of x, padded with zero
    filters, plus a 1x1 convolution of pool(x), and the batch norm goes into both. In the second
    and third stage the right half is pooled only; in the first it has 13 convolved channels too.
    Input channels come in the given order.
    """

    def __init__(self, downsampler: Downsampler, order: Tensor) -> None:
        super().__init__()
        conv, bn, self.pool = downsampler.conv, downsampler.bn, downsampler.pool
        statistics = bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        more = (0, 0, 0, 0, 0, 0, 0, conv.in_channels)  # filters of zeros
        filters, biases = F.pad(conv.weight, more), F.pad(conv.bias, more[-2:])
        selection = F.pad(torch.eye(conv.in_channels), (0, 0, conv.out_channels, 0))
        filters, biases = fuse_conv_bn_weights(filters, biases, *statistics)
        scales, _ = fuse_conv_bn_weights(selection[..., None, None], None, *statistics)
        filters, scales = filters[:, order], scales[:, order]

        half = bn.num_features // 2
        self.left = conv_of(filters[:half], biases[:half], stride=2, padding=1)
        self.pooled = conv_of(scales[half:], biases[half:])
        self.right = None
        if conv.out_channels > half:
            self.right = conv_of(filters[half:], None, stride=2, padding=1)

    def forward(self, x: Tensor) -> Halves:
        right = self.pooled(self.pool(x))
        if self.right is not None:
            right = self.right(x) + right
        return F.relu(self.left(x)), F.relu(right)


class Block(nn.Module):
    """A split-shuffle-non-bottleneck up to its shuffle, on halves."""

    def __init__(self, block: SSnbt) -> None:
        super().__init__()
        self.left, self.right = fused(block.left), fused(block.right)

    def forward(self, left: Tensor, right: Tensor) -> Halves:
        return F.relu(self.left(left) + left), F.relu(self.right(right) + right)


class Shuffle(nn.Module):
    """Shuffle the channels of both halves with 2 groups, by copying; channels stay last."""

    def forward(self, left: Tensor, right: Tensor) -> Halves:
        quarters = zip(left.chunk(2, dim=1), right.chunk(2, dim=1), strict=True)
        first, second = (
            torch.stack([a.movedim(1, -1), b.movedim(1, -1)], -1).flatten(-2).movedim(-1, 1)
            for a, b in quarters
        )
        return first, second


class ShuffleByProducts(nn.Module):
    """Shuffle by a convolution for each new half, which selects its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        selection = torch.eye(channels)[shuffled_order(channels)][..., None, None]
        left, right = selection.chunk(2)
        self.left, self.right = conv_of(left, None), conv_of(right, None)

    def forward(self, left: Tensor, right: Tensor) -> Halves:
        both = torch.cat([left, right], dim=1)
        return self.left(both), self.right(both)


def fused(layers: nn.Sequential) -> nn.Sequential:
    """Fold each batch norm into the convolution before it, and drop the dropout."""
    steps: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            steps[-1] = fuse_conv_bn_eval(steps[-1], layer)
        elif not isinstance(layer, nn.Dropout2d):
            steps.append(layer)
    return nn.Sequential(*steps)


def fused_decoder(decoder: APN, order: Tensor) -> APN:
    """Fold the batch norms of the decoder, for features whose channels come in this order."""
    for name, layers in list(decoder.named_children()):
        if isinstance(layers, nn.Sequential):
            setattr(decoder, name, fused(layers))
    for first in (decoder.reduce[0], decoder.context[0]):
        first.weight = nn.Parameter(first.weight[:, order], requires_grad=False)
    return decoder


def conv_of(weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    """Return a convolution with these weights, out x in x height x width."""
    outputs, inputs, *kernel = weight.shape
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias is not None)
    conv.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return conv.requires_grad_(False)


def shuffled_order(channels: int) -> Tensor:
    """Return the index that each channel had before a shuffle."""
    return F.channel_shuffle(torch.arange(channels)[None, :, None], groups=2).flatten()


def upsample_by_products(x: Tensor, like: Tensor) -> Tensor:
    """Resize as `upsample_logits` does, by a matrix product in each direction."""
    height, width = like.shape[-2:]
    rows = interpolation(x.shape[-2], height, x)
    columns = interpolation(x.shape[-1], width, x)
    return rows @ (x @ columns.T)


def interpolation(old: int, new: int, like: Tensor) -> Tensor:
    """Return the matrix, new x old, of linear interpolation with align_corners=True."""
    positions = torch.arange(new, device=like.device, dtype=like.dtype) * ((old - 1) / (new - 1))
    # Each new position weighs an old one by 1 minus their distance, if that is positive.
    distance = positions[:, None] - torch.arange(old, device=like.device, dtype=like.dtype)
    return (1 - distance.abs()).clamp(min=0)
