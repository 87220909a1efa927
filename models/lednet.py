"""LEDNet: a lightweight encoder-decoder network for real-time semantic segmentation.

Wang et al., "LEDNet: A Lightweight Encoder-Decoder Network for Real-Time Semantic
Segmentation", ICIP 2019, arXiv:1905.02423. Shapes in the comments are N x C x H x W for an
input of N x 3 x H x W; fractions round up.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_NORM_EPS = 1e-3


class LEDNet(nn.Module):
    """The whole network: images in, one logit per class and pixel out.

    Args:
        num_classes: classes to tell apart, C.
        apn_channels: width of the decoder, D in the letter; 20 is the light version,
            128 the heavy one.
        dropout: of the encoder's last stage, 0.3 as published.
    """

    def __init__(self, num_classes: int = 19, apn_channels: int = 20, dropout: float = 0.3) -> None:
        super().__init__()
        self.encoder = Encoder(dropout)
        self.decoder = APN(self.encoder.out_channels, apn_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Segment images of at least 64 x 64 pixels.

        Args:
            images: N x 3 x H x W, floating point; RGB in [0, 1] as published.

        Returns:
            Logits, N x C x H x W.
        """
        features = self.encoder(images)  # N x 128 x H/8 x W/8
        logits = self.decoder(features)  # N x C x H/8 x W/8
        return upsample_logits(logits, images)


class EncoderClassifier(nn.Module):
    """The encoder under a 1x1 head, as stage 1 trains it. LEDNet does not have this head."""

    def __init__(self, encoder: "Encoder", num_classes: int = 19) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Conv2d(encoder.out_channels, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Turn N x 3 x H x W images into logits at 1/8 resolution, N x C x H/8 x W/8."""
        return self.head(self.encoder(images))


class AuxiliaryHead(nn.Module):
    """LEDNet with a second classifier on its encoder, which only training uses.

    So the encoder learns from labels at its own resolution in the same run, not in one before.
    """

    def __init__(self, network: LEDNet, num_classes: int = 19) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Conv2d(network.encoder.out_channels, num_classes, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """Turn N x 3 x H x W images into logits, N x C x H x W, and in training those of the
        encoder as well, N x C x H/8 x W/8."""
        if not self.training:
            return self.network(images)
        features = self.network.encoder(images)
        logits = self.network.decoder(features)
        return upsample_logits(logits, images), self.head(features)


class ImageClassifier(nn.Module):
    """The encoder under a linear head, as it is pretrained on ImageNet."""

    def __init__(self, encoder: "Encoder", num_classes: int = 1000) -> None:
        super().__init__()
        self.encoder = encoder
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(encoder.out_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Turn N x 3 x H x W images of at least 16 x 16 pixels into logits, N x C."""
        features = self.pool(self.encoder(images))  # N x 128 x H/16 x W/16
        return self.head(features.mean(dim=(2, 3)))


class Encoder(nn.Sequential):
    """Images to features at 1/8 resolution, N x 3 x H x W to N x 128 x H/8 x W/8."""

    out_channels = 128

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__(
            # 1/2
            Downsampler(3, 32),
            *(SSnbt(32, dilation=1, dropout=0.03) for _ in range(3)),
            # 1/4
            Downsampler(32, 64),
            *(SSnbt(64, dilation=1, dropout=0.03) for _ in range(2)),
            # 1/8
            Downsampler(64, self.out_channels),
            *(
                SSnbt(self.out_channels, dilation, dropout)
                for dilation in (1, 2, 5, 9, 2, 5, 9, 17)
            ),
        )


class Downsampler(nn.Module):
    """Halve the resolution: strided convolution beside max pooling (from ENet)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels - in_channels, 3, stride=2, padding=1)
        # ceil_mode makes odd sizes come out as large as the convolution's.
        self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.bn = nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(torch.cat([self.conv(x), self.pool(x)], dim=1)), inplace=True)


class SSnbt(nn.Module):
    """Split-shuffle-non-bottleneck: a residual block on two factorised half-width branches."""

    def __init__(self, channels: int, dilation: int, dropout: float) -> None:
        super().__init__()
        half = channels // 2
        self.left = self._branch(half, ((3, 1), (1, 3)), dilation, dropout)
        self.right = self._branch(half, ((1, 3), (3, 1)), dilation, dropout)

    @staticmethod
    def _branch(
        channels: int, kernels: tuple[tuple[int, int], ...], dilation: int, dropout: float
    ) -> nn.Sequential:
        def conv(kernel: tuple[int, int], dilation: int) -> nn.Conv2d:
            padding = tuple(dilation * (size // 2) for size in kernel)
            return nn.Conv2d(channels, channels, kernel, padding=padding, dilation=dilation)

        first, second = kernels
        return nn.Sequential(
            conv(first, 1),
            nn.ReLU(inplace=True),
            conv(second, 1),
            nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS),
            nn.ReLU(inplace=True),
            conv(first, dilation),
            nn.ReLU(inplace=True),
            conv(second, dilation),
            nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS),
            nn.Dropout2d(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        residual = torch.cat([self.left(left), self.right(right)], dim=1)
        return shuffle(F.relu(x + residual, inplace=True))


class APN(nn.Module):
    """The decoder, an attention pyramid network: features to logits, both at 1/8 resolution."""

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.reduce = conv_bn_relu(in_channels, channels, 1)
        self.down1 = conv_bn_relu(channels, channels, 7, stride=2)
        self.down2 = conv_bn_relu(channels, channels, 5, stride=2)
        self.down3 = conv_bn_relu(channels, channels, 3, stride=2)
        self.lateral1 = conv_bn_relu(channels, channels, 1)
        self.lateral2 = conv_bn_relu(channels, channels, 1)
        self.lateral3 = conv_bn_relu(channels, channels, 1)
        self.context = conv_bn_relu(in_channels, channels, 1)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        reduced = self.reduce(features)  # N x D x H/8 x W/8

        level1 = self.down1(reduced)  # N x D x H/16 x W/16
        level2 = self.down2(level1)  # N x D x H/32 x W/32
        level3 = self.down3(level2)  # N x D x H/64 x W/64

        attention = self.lateral3(level3)
        attention = upsample(attention, level2) + self.lateral2(level2)
        attention = upsample(attention, level1) + self.lateral1(level1)
        attention = upsample(attention, reduced)

        context = self.context(F.adaptive_avg_pool2d(features, 1))  # N x D x 1 x 1
        return self.classifier(attention * reduced + context)


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2),
        nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPS),
        nn.ReLU(inplace=True),
    )


def shuffle(x: Tensor) -> Tensor:
    """Interleave the two halves of the channels: F.channel_shuffle(x, 2), but channels stay last.

    That function returns channels first, and every convolution would convert them back.
    """
    x = x.permute(0, 2, 3, 1)  # N x H x W x C
    x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return x.permute(0, 3, 1, 2)


def upsample_logits(logits: Tensor, images: Tensor) -> Tensor:
    """Resize logits to the size of the images, in float32 whatever the precision of the network.

    In half precision, rounded logits would tie, and each gradient would be a sum of 256 rounded
    terms. Losses want a plane for each class, which is cheaper to make of the small logits.
    """
    return upsample(logits.float().contiguous(), images)


def upsample(x: Tensor, like: Tensor) -> Tensor:
    """Resize bilinearly to the height and width of another tensor, so that odd sizes work."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)
