"""The Inception networks: GoogLeNet (Szegedy et al. 2014, https://arxiv.org/abs/1409.4842) and Inception-v3 (Szegedy et al. 2015,
https://arxiv.org/abs/1512.00567).

A module looks at its input through filters of several sizes at once and lays the results side by side.
1x1 convolutions before the large filters keep that cheap; v3 factorises 7x7 into 1x7 and 7x1.
The architectures are tables of steps: `GOOGLENET` and `INCEPTION_V3` below can be read beside the papers' table 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Steps = Mapping[str, "Conv | Pool | Fork"]  # steps one after another, by name


@dataclass(frozen=True)
class Conv:
    """Convolution without bias, batch normalisation, ReLU."""

    d_out: int  # channels
    height: int  # of the filter
    width: int | None = None  # of the filter; None: square
    stride: int = 1
    padded: bool = True  # with zeros, so that stride 1 keeps height and width

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Height and width of the filter."""
        return self.height, self.width or self.height


@dataclass(frozen=True)
class Pool:
    """Pooling over squares."""

    kind: str  # "max" or "mean"
    size: int
    stride: int
    padding: int = 0
    ceil: bool = False  # whether a last, incomplete square counts


@dataclass(frozen=True)
class Fork:
    """Branches side by side, each a chain of steps; their channels are concatenated."""

    branches: Mapping[str, Steps]


def _chain(*steps: Conv | Pool | Fork) -> Steps:
    return {str(index): step for index, step in enumerate(steps)}


def _fork(**branches: Steps) -> Fork:
    """Branch names cannot begin with a digit in Python: "x3" stands for 3x3, "x1_7" is not used."""
    return Fork(branches)
