"""The Inception networks: GoogLeNet (Szegedy et al. 2014, https://arxiv.org/abs/1409.4842, "[v1]" below) and Inception-v3
(Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, "[v3]" below).

A module looks at its input through filters of several sizes at once and lays the results side by side.
1x1 convolutions before the large filters keep that cheap; v3 factorises 7x7 filters into 1x7 and 7x1.
An architecture is a table of steps, `googlenet_steps` or `inception_v3_steps`, that can be read beside the papers' tables 1;
counting its parameters and building it are two walks over the same table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Conv:
    """A convolution without bias, batch normalisation and ReLU."""

    d_out: int  # channels
    kernel_size: int | tuple[int, int]  # pixels, height and width
    stride: int = 1
    padded: bool = True  # with zeros, so that a stride of 1 keeps height and width

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the filter."""
        return self.kernel_size if isinstance(self.kernel_size, tuple) else (self.kernel_size, self.kernel_size)


@dataclass(frozen=True)
class Pool:
    """The largest or the mean value of each square."""

    kind: str  # "max" or "mean"
    size: int = 3
    stride: int = 1
    padding: int = 0
    ceil: bool = False  # whether an incomplete square at the border gives a value too


@dataclass(frozen=True)
class Fork:
    """Branches side by side, each a list of steps; their channels are concatenated in this order."""

    branches: dict[str, list[Step]]


Step = Conv | Pool | Fork
SAME_MAX, SAME_MEAN = Pool("max", padding=1), Pool("mean", padding=1)  # height and width are kept


def googlenet_module(n_1: int, reduce_3: int, n_3: int, reduce_5: int, n_5: int, n_pool: int, side_5: int) -> Fork:
    """[v1], figure 2(b); the six numbers are the columns of its table 1."""
    return Fork(
        {
            "1x1": [Conv(n_1, 1)],
            "3x3": [Conv(reduce_3, 1), Conv(n_3, 3)],
            "5x5": [Conv(reduce_5, 1), Conv(n_5, side_5)],
            "pool": [SAME_MAX, Conv(n_pool, 1)],
        }
    )


def googlenet_steps(side_5: int) -> dict[str, Step]:
    """[v1], table 1, by the table's names; `side_5` is the side of the filters of the branch "5x5"."""

    def module(*widths: int) -> Fork:
        return googlenet_module(*widths, side_5)

    halve = Pool("max", 3, 2, ceil=True)
    return {
        "conv1": Conv(64, 7, stride=2),
        "pool1": halve,
        "conv2": Conv(64, 1),
        "conv3": Conv(192, 3),
        "pool2": halve,
        "3a": module(64, 96, 128, 16, 32, 32),
        "3b": module(128, 128, 192, 32, 96, 64),
        "pool3": halve,
        "4a": module(192, 96, 208, 16, 48, 64),
        "4b": module(160, 112, 224, 24, 64, 64),
        "4c": module(128, 128, 256, 24, 64, 64),
        "4d": module(112, 144, 288, 32, 64, 64),
        "4e": module(256, 160, 320, 32, 128, 128),
        "pool4": Pool("max", 2, 2, ceil=True),  # 3 x 3 in the table; 2 x 2 in torchvision and its weights
        "5a": module(256, 160, 320, 32, 128, 128),
        "5b": module(384, 192, 384, 48, 128, 128),
    }


def module_a(n_pool: int) -> Fork:
    """[v3], figure 5: two 3x3 filters see as far as one 5x5."""
    return Fork(
        {
            "1x1": [Conv(64, 1)],
            "5x5": [Conv(48, 1), Conv(64, 5)],
            "3x3dbl": [Conv(64, 1), Conv(96, 3), Conv(96, 3)],
            "pool": [SAME_MEAN, Conv(n_pool, 1)],
        }
    )


def module_c(n_7: int) -> Fork:
    """[v3], figure 6: n x n filters factorised into 1 x n and n x 1, with n = 7."""
    wide, tall = (1, 7), (7, 1)
    return Fork(
        {
            "1x1": [Conv(192, 1)],
            "7x7": [Conv(n_7, 1), Conv(n_7, wide), Conv(192, tall)],
            "7x7dbl": [Conv(n_7, 1), Conv(n_7, tall), Conv(n_7, wide), Conv(n_7, tall), Conv(192, wide)],
            "pool": [SAME_MEAN, Conv(192, 1)],
        }
    )


def module_e() -> Fork:
    """[v3], figure 7: branches that fork again, for many channels on the coarsest grid."""
    both = Fork({"1x3": [Conv(384, (1, 3))], "3x1": [Conv(384, (3, 1))]})
    return Fork(
        {
            "1x1": [Conv(320, 1)],
            "3x3": [Conv(384, 1), both],
            "3x3dbl": [Conv(448, 1), Conv(384, 3), both],
            "pool": [SAME_MEAN, Conv(192, 1)],
        }
    )


def inception_v3_steps() -> dict[str, Step]:
    """[v3], table 1, with the channel counts of the published weights, by their names."""
    halve = Pool("max", 3, 2)
    to_17 = {  # [v3], figure 10: a coarser grid without a bottleneck, 35 x 35 to 17 x 17
        "3x3": [Conv(384, 3, 2, padded=False)],
        "3x3dbl": [Conv(64, 1), Conv(96, 3), Conv(96, 3, 2, padded=False)],
        "pool": [halve],
    }
    to_8 = {  # the same, 17 x 17 to 8 x 8
        "3x3": [Conv(192, 1), Conv(320, 3, 2, padded=False)],
        "7x7x3": [Conv(192, 1), Conv(192, (1, 7)), Conv(192, (7, 1)), Conv(192, 3, 2, padded=False)],
        "pool": [halve],
    }
    stem = {
        "1a": Conv(32, 3, 2, padded=False),
        "2a": Conv(32, 3, padded=False),
        "2b": Conv(64, 3),
        "pool2": halve,
        "3b": Conv(80, 1),
        "4a": Conv(192, 3, padded=False),
        "pool4": halve,
    }
    modules = {"5b": module_a(32), "5c": module_a(64), "5d": module_a(64), "6a": Fork(to_17)}
    modules |= {"6b": module_c(128), "6c": module_c(160), "6d": module_c(160), "6e": module_c(192)}
    return stem | modules | {"7a": Fork(to_8), "7b": module_e(), "7c": module_e()}


@dataclass(frozen=True)
class InceptionConfig:
    """Shape of an Inception network for images.

    Raises:
        ValueError: for an unknown version, sizes below 1, an even filter or a dropout outside [0, 1).
    """

    version: str = "googlenet"  # "googlenet" or "inception-v3"
    n_classes: int = 1000
    n_channels: int = 3  # of the image
    auxiliary: bool = True  # whether to have the heads that classify from the middle of the network, for training
    dropout: float = 0.4  # before the classifier; [v1], section 5
    auxiliary_dropout: float = 0.7  # in GoogLeNet's auxiliary heads; [v1], section 5
    width: float = 1.0  # factor on every number of channels, for small experiments
    side_5: int = 3  # side in pixels of the filters of GoogLeNet's branch "5x5": 5 in [v1], 3 in torchvision by mistake

    def __post_init__(self):
        if self.version not in ("googlenet", "inception-v3"):
            raise ValueError(f"version is googlenet or inception-v3, got {self.version!r}")
        if min(self.n_classes, self.n_channels) < 1 or self.width <= 0:
            raise ValueError(f"n_classes and n_channels are 1 or more and width is above 0, got {self}")
        if self.side_5 < 1 or self.side_5 % 2 == 0:
            raise ValueError(f"side_5 is an odd number of pixels, got {self.side_5}")
        if not (0 <= self.dropout < 1 and 0 <= self.auxiliary_dropout < 1):
            raise ValueError(f"dropouts are probabilities in [0, 1), got {self.dropout} and {self.auxiliary_dropout}")

    @classmethod
    def named(cls, name: str) -> InceptionConfig:
        """A published size, with its auxiliary heads: "googlenet" or "inception-v3", as torchvision's.

        Raises:
            ValueError: for another name.
        """
        known = {"googlenet": cls("googlenet"), "inception-v3": cls("inception-v3", dropout=0.5)}
        if name not in known:
            raise ValueError(f"unknown Inception network {name!r}; known: {', '.join(known)}")
        return known[name]

    @property
    def steps(self) -> dict[str, Step]:
        """The network from image to last feature map."""
        steps = googlenet_steps(self.side_5) if self.version == "googlenet" else inception_v3_steps()
        return {name: _scale(step, self.width) for name, step in steps.items()}

    @property
    def head_positions(self) -> tuple[str, ...]:
        """Steps behind which an auxiliary head stands."""
        return () if not self.auxiliary else ("4a", "4d") if self.version == "googlenet" else ("6e",)

    @property
    def head_widths(self) -> tuple[int, int]:
        """Channels of an auxiliary head's first convolution, and of its hidden layer or second convolution."""
        return _scaled(128, self.width), _scaled(1024 if self.version == "googlenet" else 768, self.width)

    @property
    def n_parameters(self) -> int:
        """Over the convolutions area * d_in d_out + 2 d_out, the classifier and the auxiliary heads."""
        n, d_out = count_steps(self.steps.values(), self.n_channels)
        n += (d_out + 1) * self.n_classes
        d_conv, d_hidden = self.head_widths
        for position in self.head_positions:
            n += (self.d_behind(position) + 2) * d_conv + (d_hidden + 1) * self.n_classes
            n += (16 * d_conv + 1) * d_hidden if self.version == "googlenet" else (25 * d_conv + 2) * d_hidden
        return n

    def d_behind(self, position: str) -> int:
        """Channels behind a step."""
        names = list(self.steps)
        return count_steps([self.steps[name] for name in names[: names.index(position) + 1]], self.n_channels)[1]


def _scaled(d: int, width: float) -> int:
    return max(1, round(d * width))


def _scale(step: Step, width: float) -> Step:
    if isinstance(step, Conv):
        return replace(step, d_out=_scaled(step.d_out, width))
    if isinstance(step, Fork):
        return Fork({name: [_scale(inner, width) for inner in branch] for name, branch in step.branches.items()})
    return step


def count_steps(steps: Iterable[Step], d_in: int) -> tuple[int, int]:
    """Parameters of steps one after another on `d_in` channels, and the channels that come out."""
    n = 0
    for step in steps:
        if isinstance(step, Conv):
            height, width = step.sides
            n += (height * width * d_in + 2) * step.d_out
            d_in = step.d_out
        elif isinstance(step, Fork):
            counts, widths = zip(*(count_steps(branch, d_in) for branch in step.branches.values()))
            n, d_in = n + sum(counts), sum(widths)
    return n, d_in


class ConvNormReLU(nn.Module):
    """The layer for a `Conv`."""

    def __init__(self, d_in: int, step: Conv):
        super().__init__()
        padding = tuple(side // 2 for side in step.sides) if step.padded else 0
        self.conv = nn.Conv2d(d_in, step.d_out, step.sides, step.stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(step.d_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, d_in, H, W) -> (B, d_out, H', W')."""
        return self.norm(self.conv(x)).relu()


class Branches(nn.Module):
    """The layer for a `Fork`."""

    def __init__(self, d_in: int, step: Fork):
        super().__init__()
        self.branches = nn.ModuleDict({name: nn.Sequential(*build(steps, d_in)) for name, steps in step.branches.items()})

    def forward(self, x: Tensor) -> Tensor:
        """(B, d_in, H, W) -> (B, sum of the branches' channels, H', W')."""
        return torch.cat([branch(x) for branch in self.branches.values()], dim=1)


def build(steps: Iterable[Step], d_in: int) -> list[nn.Module]:
    """Layers for steps one after another on `d_in` channels."""
    layers: list[nn.Module] = []
    for step in steps:
        if isinstance(step, Pool):
            pool = nn.MaxPool2d if step.kind == "max" else nn.AvgPool2d
            layers.append(pool(step.size, step.stride, step.padding, ceil_mode=step.ceil))
        else:
            layers.append((ConvNormReLU if isinstance(step, Conv) else Branches)(d_in, step))
        d_in = count_steps([step], d_in)[1]
    return layers


class GoogLeNetHead(nn.Module):
    """An auxiliary classifier of GoogLeNet ([v1], section 5): 4 x 4 means, 1x1 convolution, two linear layers.

    The means are over four ranges of any height, as torchvision has them; in the paper over squares of 5, every 3 pixels of 14.
    """

    def __init__(self, d_in: int, config: InceptionConfig):
        super().__init__()
        d_conv, d_hidden = config.head_widths
        self.conv = ConvNormReLU(d_in, Conv(d_conv, 1))
        self.hidden = nn.Linear(16 * d_conv, d_hidden)
        self.dropout = nn.Dropout(config.auxiliary_dropout)
        self.classifier = nn.Linear(d_hidden, config.n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, d_in, H, W) -> logits (B, n_classes)."""
        x = self.conv(F.adaptive_avg_pool2d(x, (4, 4)))  # (B, d_conv, 4, 4)
        return self.classifier(self.dropout(self.hidden(x.flatten(1)).relu()))


class InceptionV3Head(nn.Module):
    """The auxiliary classifier of Inception-v3 ([v3], figure 8): 5 x 5 means, 1x1 and 5x5 convolutions, a linear layer."""

    def __init__(self, d_in: int, config: InceptionConfig):
        super().__init__()
        d_conv, d_hidden = config.head_widths
        self.conv = ConvNormReLU(d_in, Conv(d_conv, 1))
        self.conv_5x5 = ConvNormReLU(d_conv, Conv(d_hidden, 5, padded=False))
        self.classifier = nn.Linear(d_hidden, config.n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, d_in, H, W) -> logits (B, n_classes).

        Raises:
            ValueError: for a feature map below 17 x 17, from images below 299 x 299.
        """
        if min(x.shape[2:]) < 17:
            raise ValueError(
                f"the auxiliary head of inception-v3 needs a feature map of 17 x 17 or more, got {tuple(x.shape[2:])}: "
                "train on images of 299 x 299 or more, or with auxiliary=False"
            )
        x = self.conv(F.avg_pool2d(x, kernel_size=5, stride=3))  # (B, d_conv, 5, 5)
        return self.classifier(self.conv_5x5(x).mean(dim=(2, 3)))


class Inception(nn.Module):
    """GoogLeNet or Inception-v3: the steps, mean over the pixels, linear classifier, and the auxiliary heads."""

    def __init__(self, config: InceptionConfig = InceptionConfig()):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict(zip(config.steps, build(config.steps.values(), config.n_channels)))
        head = GoogLeNetHead if config.version == "googlenet" else InceptionV3Head
        self.heads = nn.ModuleDict({name: head(config.d_behind(name), config) for name in config.head_positions})
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.d_behind(list(config.steps)[-1]), config.n_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits of the classes; in training also those of the auxiliary heads, if there are any.

        Args:
            x: images (B, n_channels, H, W), at their published size 224 x 224 (googlenet) or 299 x 299 (inception-v3).

        Returns:
            (B, n_classes), or a tuple of such: the classifier's first, then the heads' from input to output.

        Raises:
            ValueError: for images of another shape.
        """
        if x.ndim != 4 or x.shape[1] != self.config.n_channels:
            raise ValueError(f"expected images of shape (B, {self.config.n_channels}, H, W), got {tuple(x.shape)}")
        auxiliary = []
        for name, layer in self.layers.items():
            x = layer(x)  # (B, C, H', W')
            if self.training and name in self.heads:
                auxiliary.append(self.heads[name](x))
        logits = self.classifier(self.dropout(x.mean(dim=(2, 3))))  # (B, n_classes)
        return (logits, *auxiliary) if auxiliary else logits

    def translate_reference(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's names into ours: "Mixed_5b.branch5x5_2.conv.weight" becomes "layers.5b.branches.5x5.1.conv.weight"."""
        translate = _translate_googlenet if self.config.version == "googlenet" else _translate_inception_v3
        return {translate(re.sub(r"^module\.", "", name)): value for name, value in state_dict.items()}


def loss(outputs: Tensor | tuple[Tensor, ...], targets: Tensor, auxiliary_weight: float = 0.3) -> Tensor:
    """Cross-entropy of the classifier plus `auxiliary_weight` times that of each auxiliary head ([v1], section 5).

    Args:
        outputs: of `Inception`, in training or not.
        targets: (B,) classes.
    """
    logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
    return F.cross_entropy(logits, targets) + auxiliary_weight * sum(F.cross_entropy(a, targets) for a in auxiliary)


def _translate_googlenet(name: str) -> str:
    name = re.sub(r"\.bn\.", ".norm.", name)
    heads, branches = {"1": "4a", "2": "4d"}, {"1": "1x1.0", "2": "3x3", "3": "5x5", "4": "pool"}
    name = re.sub(r"^aux(\d)\.", lambda match: f"heads.{heads[match[1]]}.", name)
    name = re.sub(r"^(heads\.\w+)\.fc1\.", r"\1.hidden.", name)
    name = re.sub(r"^(heads\.\w+\.|)fc2?\.", r"\1classifier.", name)
    name = re.sub(r"^inception(\w+)\.branch(\d)\.", lambda m: f"layers.{m[1]}.branches.{branches[m[2]]}.", name)
    return re.sub(r"^conv(\d)\.", r"layers.conv\1.", name)


def _translate_inception_v3(name: str) -> str:
    name = re.sub(r"\.bn\.", ".norm.", name)
    name = re.sub(r"^Conv2d_(\w\w)_\dx\d\.", r"layers.\1.", name)
    for ours, theirs in (("conv", "conv0"), ("conv_5x5", "conv1"), ("classifier", "fc")):
        name = re.sub(rf"^AuxLogits\.{theirs}\.", f"heads.6e.{ours}.", name)
    name = re.sub(r"^fc\.", "classifier.", name)
    return re.sub(r"^Mixed_(\w\w)\.branch_?([^\W_]+)(?:_(\d)([ab]?))?\.", _translate_branch, name)


def _translate_branch(match: re.Match) -> str:
    module, branch, number, half = match.groups()
    step = int(number) - 1 if number else int(branch == "pool")  # in "pool" the convolution stands behind the pooling
    inner = {"a": ".branches.1x3.0", "b": ".branches.3x1.0"}.get(half, "")
    return f"layers.{module}.branches.{branch}.{step}{inner}."
