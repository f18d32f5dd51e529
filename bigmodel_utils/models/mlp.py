"""The multilayer perceptron: linear maps with a ReLU between them.

The article's is 1000-500-100-1: a thousand features in, one number out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn


@dataclass(frozen=True)
class MLPConfig:
    """Widths of a multilayer perceptron.

    Raises:
        ValueError: for fewer than two widths, one below 1, or a dropout outside [0, 1).
    """

    widths: tuple[int, ...] = (1000, 500, 100, 1)  # features in, hidden units ..., numbers out
    dropout: float = 0.0  # probability that a hidden activation is set to 0 in training

    def __post_init__(self):
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError(f"widths needs at least an input and an output width of 1 or more, got {self.widths}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {self.dropout}")

    @property
    def n_parameters(self) -> int:
        """Weights and biases: the sum of (d_in + 1) d_out over the layers."""
        return sum((d_in + 1) * d_out for d_in, d_out in pairwise(self.widths))


class MLP(nn.Module):
    """x -> W_n relu(... relu(W_1 x + b_1) ...) + b_n."""

    def __init__(self, config: MLPConfig = MLPConfig()):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(config.widths):
            layers += [nn.Linear(d_in, d_out), nn.ReLU(), nn.Dropout(config.dropout)]
        self.layers = nn.Sequential(*layers[:-2])  # no ReLU and no dropout behind the last linear map

    def forward(self, x: Tensor) -> Tensor:
        """Predict one row of outputs a row of features: (B, d_in) -> (B, d_out).

        Raises:
            ValueError: for features of another width than the model's.
        """
        d_in = self.config.widths[0]
        if x.ndim != 2 or x.shape[1] != d_in:
            raise ValueError(
                f"expected features of shape (B, {d_in}), got {tuple(x.shape)}: use the training features' transform"
            )
        return self.layers(x)  # (B, d_out)
