"""Residual networks (He, Zhang, Ren and Sun 2015, https://arxiv.org/abs/1512.03385), and the same without their shortcuts.

A block adds what it computed to what it was given: y = relu(x + f(x)).
To do nothing, a residual block needs f = 0, a plain one must learn the identity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

# name: (block, blocks a stage); section 4.1, table 1.
IMAGENET_SIZES = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)  # section 4.2, table 6
EXPANSION = {"basic": 1, "bottleneck": 4}  # a block's output channels for each channel of its 3x3 convolution


@dataclass(frozen=True)
class ResNetConfig:
    """Shape of a residual network for images.

    Raises:
        ValueError: for an unknown block, stem or shortcut, stages without blocks, sizes below 1,
            or shortcuts of zeros between stages that get narrower.
    """

    block: str = "bottleneck"  # "basic": 3x3, 3x3 convolutions; "bottleneck": 1x1, 3x3, 1x1
    n_blocks: tuple[int, ...] = (3, 4, 6, 3)  # blocks a stage; each stage but the first halves height and width
    widths: tuple[int, ...] = (64, 128, 256, 512)  # channels of each stage's 3x3 convolutions
    n_classes: int = 1000
    n_channels: int = 3  # of the image
    stem: str = "imagenet"  # "imagenet": 7x7 convolution and max pooling, height / 4; "cifar": 3x3 convolution, height kept
    shortcut: str = "projection"  # where shapes change: "projection" (1x1 convolution, option B), "zeros" (padding, option A)
    residual: bool = True  # False: the plain network, blocks without shortcuts

    def __post_init__(self):
        for field, known in (("block", EXPANSION), ("stem", ("imagenet", "cifar")), ("shortcut", ("projection", "zeros"))):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} is one of {', '.join(known)}, got {getattr(self, field)!r}")
        if not self.n_blocks or len(self.n_blocks) != len(self.widths):
            raise ValueError(f"needs a width for each stage, got {len(self.n_blocks)} stages and {len(self.widths)} widths")
        if min(*self.n_blocks, *self.widths, self.n_classes, self.n_channels) < 1:
            raise ValueError(f"n_blocks, widths, n_classes and n_channels are 1 or more, got {self}")
        if self.shortcut == "zeros" and any(narrow < wide for wide, narrow in pairwise(self.widths)):
            raise ValueError(f"shortcuts of zeros can only add channels, got widths {self.widths}")

    @classmethod
    def named(cls, name: str) -> ResNetConfig:
        """A published size: resnet18 to resnet152 for ImageNet (as torchvision's), resnet20 to resnet1202 for CIFAR-10.

        Raises:
            ValueError: for another name, listing the known ones.
        """
        if name in IMAGENET_SIZES:
            return cls(*IMAGENET_SIZES[name])
        if name in (cifar := {f"resnet{depth}": depth for depth in CIFAR_DEPTHS}):
            return cls.cifar(cifar[name])
        raise ValueError(f"unknown residual network {name!r}; known: {', '.join([*IMAGENET_SIZES, *cifar])}")

    @classmethod
    def cifar(cls, n_layers: int, n_classes: int = 10, n_channels: int = 3, residual: bool = True) -> ResNetConfig:
        """A network for 32 x 32 images of 6n + 2 layers: three stages of n basic blocks, option A (section 4.2).

        Raises:
            ValueError: for a number of layers that is not 6n + 2.
        """
        n, rest = divmod(n_layers - 2, 6)
        if n < 1 or rest:
            raise ValueError(f"n_layers is 6n + 2 (8, 14, 20, ...), got {n_layers}")
        return cls("basic", (n, n, n), (16, 32, 64), n_classes, n_channels, "cifar", "zeros", residual)

    @property
    def block_shapes(self) -> list[list[tuple[int, int, int]]]:
        """(channels in, width, stride) of each block of each stage."""
        stages, d_in = [], self.widths[0]
        for stage, (n, width) in enumerate(zip(self.n_blocks, self.widths)):
            d_out = width * EXPANSION[self.block]
            first = (d_in, width, 1 if stage == 0 else 2)
            stages.append([first] + [(d_out, width, 1)] * (n - 1))
            d_in = d_out
        return stages

    @property
    def d_features(self) -> int:
        """Channels that the classifier sees."""
        return self.widths[-1] * EXPANSION[self.block]

    @property
    def n_layers(self) -> int:
        """Layers with weights from image to logits, the depth in the network's name; projections do not count."""
        return 2 + sum(self.n_blocks) * {"basic": 2, "bottleneck": 3}[self.block]

    @property
    def n_parameters(self) -> int:
        """k^2 d_in d_out a convolution and 2 d_out for the normalisation behind it, and the classifier."""
        n = _count_conv(self.n_channels, self.widths[0], 7 if self.stem == "imagenet" else 3)
        for d_in, width, stride in (shape for stage in self.block_shapes for shape in stage):
            n += sum(_count_conv(*sizes[:3]) for sizes in _block_convs(self.block, d_in, width, stride))
            d_out = width * EXPANSION[self.block]
            if self.residual and self.shortcut == "projection" and (stride != 1 or d_in != d_out):
                n += _count_conv(d_in, d_out, 1)
        return n + (self.d_features + 1) * self.n_classes


def _count_conv(d_in: int, d_out: int, kernel_size: int) -> int:
    return kernel_size**2 * d_in * d_out + 2 * d_out


def _block_convs(block: str, d_in: int, width: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(channels in, channels out, kernel size, stride) of a block's convolutions.

    The bottleneck's stride is at its 3x3 convolution, as torchvision has it; the paper's first version had it at the 1x1 before.
    """
    if block == "basic":
        return [(d_in, width, 3, stride), (width, width, 3, 1)]
    return [(d_in, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]


class ConvNorm(nn.Module):
    """A convolution and its batch normalisation, which makes a bias superfluous."""

    def __init__(self, d_in: int, d_out: int, kernel_size: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(d_in, d_out, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(d_out)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, d_in, H, W) -> (B, d_out, ceil(H / stride), ceil(W / stride))."""
        return self.norm(self.conv(x))


class ZeroPad(nn.Module):
    """The shortcut without parameters: every second pixel, and zeros for the new channels (option A)."""

    def __init__(self, d_in: int, d_out: int, stride: int):
        super().__init__()
        self.n_new, self.stride = d_out - d_in, stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, d_in, H, W) -> (B, d_out, ceil(H / stride), ceil(W / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.n_new))


class Block(nn.Module):
    """relu(x + f(x)), or relu(f(x)) in the plain network; f is two or three convolutions, ReLUs between them."""

    def __init__(self, config: ResNetConfig, d_in: int, width: int, stride: int):
        super().__init__()
        d_out = width * EXPANSION[config.block]
        self.layers = nn.ModuleList(ConvNorm(*sizes) for sizes in _block_convs(config.block, d_in, width, stride))
        self.residual = config.residual
        if config.residual and (stride != 1 or d_in != d_out):
            projects = config.shortcut == "projection"
            self.shortcut = ConvNorm(d_in, d_out, 1, stride) if projects else ZeroPad(d_in, d_out, stride)
        elif config.residual:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, d_in, H, W) -> (B, d_out, ceil(H / stride), ceil(W / stride))."""
        *first, last = self.layers
        h = x
        for layer in first:
            h = layer(h).relu()
        h = last(h)  # (B, d_out, H / stride, W / stride)
        return (h + self.shortcut(x)).relu() if self.residual else h.relu()


class ResNet(nn.Module):
    """Stem, stages of blocks, mean over the pixels, linear classifier."""

    def __init__(self, config: ResNetConfig = ResNetConfig()):
        super().__init__()
        self.config = config
        self.stem = ConvNorm(config.n_channels, config.widths[0], *((7, 2) if config.stem == "imagenet" else (3, 1)))
        self.stages = nn.ModuleList(nn.Sequential(*(Block(config, *shape) for shape in stage)) for stage in config.block_shapes)
        self.classifier = nn.Linear(config.d_features, config.n_classes)

    def features(self, x: Tensor) -> Tensor:
        """Images (B, n_channels, H, W) -> the last stage's channels (B, d_features, H', W'); at "imagenet" H' is about H / 32.

        Raises:
            ValueError: for images of another shape.
        """
        if x.ndim != 4 or x.shape[1] != self.config.n_channels:
            raise ValueError(f"expected images of shape (B, {self.config.n_channels}, H, W), got {tuple(x.shape)}")
        h = self.stem(x).relu()  # (B, C, H / 2, W / 2) or (B, C, H, W)
        if self.config.stem == "imagenet":
            h = F.max_pool2d(h, kernel_size=3, stride=2, padding=1)  # (B, C, H / 4, W / 4)
        for stage in self.stages:
            h = stage(h)
        return h

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes: (B, n_channels, H, W) -> (B, n_classes), any height and width."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))

    def translate_reference(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's names into ours: "layer1.0.conv2.weight" becomes "stages.0.0.layers.1.conv.weight"."""
        return {_translate(name): value for name, value in state_dict.items()}


def _translate(name: str) -> str:
    name = re.sub(r"^module\.", "", name)
    name = re.sub(r"^layer(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.", name)
    name = re.sub(r"^(stages\.\d+\.\d+)\.downsample\.(\d)\.", lambda m: f"{m[1]}.shortcut.{['conv', 'norm'][int(m[2])]}.", name)
    kinds = {"conv": "conv", "bn": "norm"}
    name = re.sub(r"^(stages\.\d+\.\d+)\.(conv|bn)(\d)\.", lambda m: f"{m[1]}.layers.{int(m[3]) - 1}.{kinds[m[2]]}.", name)
    name = re.sub(r"^(conv|bn)1\.", lambda match: f"stem.{kinds[match[1]]}.", name)
    return re.sub(r"^fc\.", "classifier.", name)
