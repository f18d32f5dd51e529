"""Formulas of the scaling module, against PyTorch's FLOP counter, tensors that are really there, and literal loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bigmodel_utils import scaling
from bigmodel_utils.models import MLP, MLPConfig, count_parameters

SIZES = st.integers(1, 40)
CONFIGS = st.lists(st.integers(1, 30), min_size=2, max_size=5).map(lambda widths: MLPConfig(tuple(widths)))


def counted(function) -> int:
    """What PyTorch's counter sees the function do."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@given(SIZES, SIZES, SIZES)
@settings(max_examples=25, deadline=None)
def test_a_product_is_what_torch_counts_and_moves(m, k, n):
    a, b = torch.zeros(m, k), torch.zeros(k, n)
    assert scaling.product_flops(m, k, n) == counted(lambda: a @ b)
    assert scaling.product_bytes(m, k, n) == a.nbytes + b.nbytes + (a @ b).nbytes
    assert scaling.product_bytes(m, k, n, bytes_per_number=2) == (a.nbytes + b.nbytes + (a @ b).nbytes) / 2


@given(CONFIGS, SIZES)
@settings(max_examples=25, deadline=None)
def test_an_mlp_is_what_torch_counts(config, batch_size):
    model, x = MLP(config), torch.zeros(batch_size, config.widths[0])
    assert scaling.forward_flops(config, batch_size) == counted(lambda: model(x))
    step = counted(lambda: model(x).square().mean().backward())
    assert scaling.train_flops(config, batch_size) == step
    assert sum(scaling.product_flops(*shape) for shape in scaling.step_products(config, batch_size)) == step


def test_the_rule_six_n_d():
    assert scaling.train_flops(1000, 10) == 60_000
    with pytest.raises(ValueError, match="got -1"):
        scaling.train_flops(1000, -1)


@pytest.mark.parametrize(("n_flops", "n_bytes", "seconds"), [(300, 10, 3.0), (10, 300, 6.0), (100, 50, 1.0), (0, 0, 0.0)])
def test_the_slower_resource_decides(n_flops, n_bytes, seconds):
    assert scaling.roofline_s(n_flops, n_bytes, flops_per_s=100, bytes_per_s=50) == seconds


@pytest.mark.parametrize("rates", [(0, 1), (1, 0), (-1, 1)])
def test_a_rate_must_be_positive(rates):
    with pytest.raises(ValueError, match="rates must be positive"):
        scaling.roofline_s(1, 1, *rates)


@given(CONFIGS, SIZES)
@settings(max_examples=25, deadline=None)
def test_a_step_on_a_machine_with_only_one_limit(config, batch_size):
    """With endless bandwidth only FLOPs count; with endless arithmetic only bytes do."""
    compute_bound = scaling.step_s(config, batch_size, flops_per_s=7.0, bytes_per_s=float("inf"))
    assert compute_bound == pytest.approx(scaling.train_flops(config, batch_size) / 7.0)
    n_bytes = 3 * sum(parameter.nbytes for parameter in MLP(config).parameters())
    for m, k, n in scaling.step_products(config, batch_size):
        n_bytes += sum(torch.zeros(shape).nbytes for shape in [(m, k), (k, n), (m, n)])
    assert scaling.step_s(config, batch_size, flops_per_s=float("inf"), bytes_per_s=7.0) == pytest.approx(n_bytes / 7.0)


@pytest.mark.parametrize("make_optimizer, n_slots", [(torch.optim.SGD, 0), (torch.optim.Adam, 2)])
def test_training_memory_is_what_the_tensors_take(make_optimizer, n_slots):
    config, batch_size = MLPConfig((12, 7, 5, 1)), 9
    model = MLP(config)
    optimizer = make_optimizer(model.parameters(), lr=0.1)
    kept, x = [], torch.zeros(batch_size, 12)
    hooks = [
        layer.register_forward_hook(lambda *args: kept.append(args[2]))
        for layer in model.layers
        if layer.__class__ != torch.nn.Dropout
    ]
    model(x).sum().backward()
    optimizer.step()
    tensors = [x, *kept, *model.parameters(), *(parameter.grad for parameter in model.parameters())]
    tensors += [slot for state in optimizer.state.values() for name, slot in state.items() if name != "step"]
    assert hooks and scaling.training_memory_bytes(config, batch_size, n_optimizer_slots=n_slots) == sum(
        t.nbytes for t in tensors
    )


def test_parameters_of_the_articles_mlp():
    assert count_parameters(MLPConfig()) == count_parameters(MLP()) == 500 * 1001 + 100 * 501 + 1 * 101
