"""LEDNet as it is served: the same function in fewer and larger steps.

What changes against `models/lednet.py`, where the network reads like the paper:

- Batch norms are folded into their convolutions: in evaluation both are linear.
- The two halves of the channels stay two tensors through a stage. They are never split, and are
  joined only to be shuffled.
- The last shuffle of a stage is left out, and the weights that read the stage are reordered.
- Shuffling and upsampling, which only move and mix values, can be done as products of matrices.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from models.lednet import APN, Downsampler, LEDNet, SSnbt, upsample

Halves = tuple[Tensor, Tensor]  # of the channels of features: those left, those right


class Deployed(nn.Module):
    """A trained network, for inference alone.

    Args:
        network: whose weights are taken as they are now; it stays as it is.
        labels: return the class of each pixel in place of the logits.
        products: shuffle with 1x1 convolutions of zeros and ones, and upsample with a matrix for
            each direction. Runtimes on CPUs keep channels in blocks; they leave that layout to
            copy channels, but not to convolve them. False: copy and interpolate, which compilers
            for GPUs fuse with the steps around.
    """

    def __init__(self, network: LEDNet, labels: bool = False, products: bool = True) -> None:
        super().__init__()
        self.labels, self.products = labels, products
        network = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
        self.stages = nn.ModuleList()
        order = torch.arange(3)  # of the input's channels: RGB
        for downsampler, blocks in stages_of(network):
            self.stages.append(Stage(downsampler, blocks, order, products))
            order = unshuffled_order(downsampler.bn.num_features)
        self.decoder = fused_decoder(network.decoder, order)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Segment images of at least 64 x 64 pixels.

        Args:
            images: N x 3 x H x W, floating point, normalised as the network was trained.

        Returns:
            Logits, N x C x H x W, float32; or labels, N x H x W, uint8, trainIds.
        """
        features = images.to(self.decoder.classifier.weight.dtype)
        for stage in self.stages:
            features = stage(features)
        logits = self.decoder(features)  # N x C x H/8 x W/8
        if self.products:
            logits = upsample_by_products(logits.float(), images)
        else:
            logits = upsample(logits, images)
        return logits.argmax(1).to(torch.uint8) if self.labels else logits.float()


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
    """A downsampler that returns halves: convolved channels, then the pooled ones.

    It is linear up to its ReLU, so that [conv(x), pool(x)] is a convolution of x with more rows
    plus a 1x1 convolution of pool(x), and the batch norm goes into both. In the second and third
    stage the right half is pooled alone; in the first it has 13 convolved channels besides.

    Args:
        order: of the channels of its input; see `unshuffled_order`.
    """

    def __init__(self, downsampler: Downsampler, order: Tensor) -> None:
        super().__init__()
        conv, bn, self.pool = downsampler.conv, downsampler.bn, downsampler.pool
        statistics = bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        more = (0, 0, 0, 0, 0, 0, 0, conv.in_channels)  # rows of zeros
        rows, biases = F.pad(conv.weight, more), F.pad(conv.bias, more[-2:])
        selection = F.pad(torch.eye(conv.in_channels), (0, 0, conv.out_channels, 0))
        rows, biases = fuse_conv_bn_weights(rows, biases, *statistics)
        scales, _ = fuse_conv_bn_weights(selection[..., None, None], None, *statistics)
        rows, scales = rows[:, order], scales[:, order]

        half = bn.num_features // 2
        self.left = conv_of(rows[:half], biases[:half], stride=2, padding=1)
        self.pooled = conv_of(scales[half:], biases[half:])
        self.right = None
        if conv.out_channels > half:
            self.right = conv_of(rows[half:], None, stride=2, padding=1)

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
    """Shuffle the channels of both halves together with 2 groups, by copying."""

    def forward(self, left: Tensor, right: Tensor) -> Halves:
        first, second = zip(left.chunk(2, dim=1), right.chunk(2, dim=1), strict=True)
        return torch.stack(first, 2).flatten(1, 2), torch.stack(second, 2).flatten(1, 2)


class ShuffleByProducts(nn.Module):
    """The same, each new half by a convolution that selects its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        selection = torch.eye(channels)[shuffled_order(channels)][..., None, None]
        left, right = selection.chunk(2)
        self.left, self.right = conv_of(left, None), conv_of(right, None)

    def forward(self, left: Tensor, right: Tensor) -> Halves:
        both = torch.cat([left, right], dim=1)
        return self.left(both), self.right(both)


def stages_of(network: LEDNet) -> list[tuple[Downsampler, list[SSnbt]]]:
    stages: list[tuple[Downsampler, list[SSnbt]]] = []
    for layer in network.encoder:
        if isinstance(layer, Downsampler):
            stages.append((layer, []))
        else:
            stages[-1][1].append(layer)
    return stages


def fused(layers: nn.Sequential) -> nn.Sequential:
    """The same layers with each batch norm in the convolution before it, and no dropout."""
    steps: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            steps[-1] = fuse_conv_bn_eval(steps[-1], layer)
        elif not isinstance(layer, nn.Dropout2d):
            steps.append(layer)
    return nn.Sequential(*steps)


def fused_decoder(decoder: APN, order: Tensor) -> APN:
    """The decoder, without batch norms, of features in this order of channels."""
    for name, layers in list(decoder.named_children()):
        if isinstance(layers, nn.Sequential):
            setattr(decoder, name, fused(layers))
    for reading in (decoder.reduce[0], decoder.context[0]):
        reading.weight = nn.Parameter(reading.weight[:, order], requires_grad=False)
    return decoder


def conv_of(weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    """A convolution with these weights, out x in x height x width."""
    out_channels, in_channels, *kernel = weight.shape
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=bias is not None)
    conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return conv


def shuffled_order(channels: int) -> Tensor:
    """Which channel each one is after a shuffle."""
    return F.channel_shuffle(torch.arange(channels)[None, :, None], groups=2).flatten()


def unshuffled_order(channels: int) -> Tensor:
    """The order of weights over channels that were to be shuffled and were not."""
    return shuffled_order(channels).argsort()


def upsample_by_products(x: Tensor, like: Tensor) -> Tensor:
    """Resize as `upsample` does, by a product with a matrix in each direction."""
    height, width = like.shape[-2:]
    rows = interpolation(x.shape[-2], height, x)
    columns = interpolation(x.shape[-1], width, x)
    return rows @ (x @ columns.T)


def interpolation(old: int, new: int, like: Tensor) -> Tensor:
    """The matrix, new x old, of linear interpolation with align_corners=True: each new place
    weighs an old one by 1 less their distance, if that is above 0."""
    places = torch.arange(new, device=like.device, dtype=like.dtype) * ((old - 1) / (new - 1))
    distance = places[:, None] - torch.arange(old, device=like.device, dtype=like.dtype)
    return (1 - distance.abs()).clamp(min=0)
