"""The MLP against a literal forward pass, and the counts against torch's."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_utils import models
from bigmodel_utils.models import MLP, MLPConfig

WIDTHS = st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple)


def forward_by_loop(model: MLP, x: np.ndarray) -> np.ndarray:
    """Every unit of every layer, one at a time."""
    linear = [layer for layer in model.layers if isinstance(layer, torch.nn.Linear)]
    rows = []
    for values in x.tolist():
        for index, layer in enumerate(linear):
            weights, biases = layer.weight.tolist(), layer.bias.tolist()
            values = [sum(w * v for w, v in zip(row, values)) + b for row, b in zip(weights, biases)]
            if index < len(linear) - 1:
                values = [max(0.0, value) for value in values]
        rows.append(values)
    return np.array(rows)


@settings(deadline=None)
@given(WIDTHS, st.integers(0, 1000))
def test_forward_equals_the_slow_loop(widths, seed):
    torch.manual_seed(seed)
    model, x = MLP(MLPConfig(widths, dropout=0.3)).double().eval(), torch.randn(3, widths[0], dtype=torch.float64)
    np.testing.assert_allclose(model(x).detach().numpy(), forward_by_loop(model, x.numpy()), rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(WIDTHS)
def test_formula_counts_the_parameters(widths):
    config = MLPConfig(widths)
    n_built = sum(parameter.numel() for parameter in MLP(config).parameters())
    assert models.count_parameters(config) == models.count_parameters(MLP(config)) == n_built
    assert n_built == sum(d_in * d_out + d_out for d_in, d_out in pairwise(widths))


def test_the_articles_network_has_550701_parameters():
    assert models.count_parameters(MLPConfig()) == 1001 * 500 + 501 * 100 + 101


def test_tied_weights_count_once_and_frozen_ones_not():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    tied = Tied()
    assert models.count_parameters(tied) == 9
    tied.a.weight.requires_grad_(False)
    assert models.count_parameters(tied) == 0


def test_count_refuses_what_is_no_model():
    with pytest.raises(TypeError, match="str"):
        models.count_parameters("mlp")


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model, x = MLP(MLPConfig((4, 50, 1), dropout=0.5)), torch.randn(2, 4)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("shape", [(2, 999), (2, 1001), (1000,), (2, 3, 1000)])
def test_wrong_width_is_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match=r"expected features of shape \(B, 1000\), got \(" + ", ".join(map(str, shape))):
        MLP()(torch.zeros(shape))


@pytest.mark.parametrize("arguments", [((5,),), ((5, 0, 1),), ((5, 1), 1.0), ((5, 1), -0.1)])
def test_senseless_configurations_are_refused(arguments):
    with pytest.raises(ValueError, match=r"widths|dropout"):
        MLPConfig(*arguments)
