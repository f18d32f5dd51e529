"""Compression against brute force, the theorem of Eckart and Young, int8 of `predict`, and algebra."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bigmodel_utils import compress, predict
from bigmodel_utils.models import MLP, MLPConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MLP(MLPConfig((20, 16, 12, 4)))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_one_group_a_row_at_eight_bits_is_what_predict_does():
    weight = draw(6, 50)
    codes, scale = compress.quantize_groups(weight, 8, 50)
    expected, row_scale = predict.quantize_rows(weight)
    assert torch.equal(codes, expected) and torch.allclose(scale, row_scale.expand(6, 50))


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [1, 7, 16, 100])
def test_each_weight_goes_to_the_nearest_level(n_bits, group_size):
    weight = draw(5, 33, seed=1)
    weight[2] = 0
    codes, scale = compress.quantize_groups(weight, n_bits, group_size)
    n = 2 ** (n_bits - 1) - 1
    for r, c in itertools.product(range(5), range(33)):
        group = weight[r, c // group_size * group_size : (c // group_size + 1) * group_size]
        levels = [k * group.abs().max().item() / n for k in range(-n, n + 1)]
        nearest = min(abs(level - weight[r, c].item()) for level in levels)
        assert abs(codes[r, c] * scale[r, c] - weight[r, c]) == pytest.approx(nearest, abs=1e-5)
    assert ((weight - codes * scale).abs() <= scale / 2 * (1 + 1e-5)).all() and codes.abs().max() <= n


def test_wrong_numbers_of_bits_are_refused():
    for n_bits, group in ((1, 4), (9, 4), (4, 0)):
        with pytest.raises(ValueError, match="2 to 8 bits"):
            compress.quantize_groups(draw(2, 4), n_bits, group)


def test_bytes_are_counted_one_by_one(model):
    weight = draw(3, 10)
    assert compress.quantized_bytes(weight, 4, 4) == 15 + 3 * 3 * 2  # 30 half bytes; three groups a row
    _, n_bytes = compress.quantized(model, 4, 8)
    matrices = sum(math.ceil(o * i / 2) + o * math.ceil(i / 8) * 2 for o, i in ((16, 20), (12, 16), (4, 12)))
    assert n_bytes == matrices + 4 * (16 + 12 + 4)


@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_no_output_moves_by_more_than_the_bound(model, n_bits):
    x = draw(100, 20, seed=2)
    rounded, _ = compress.quantized(model, n_bits, 8)
    off = (model(x) - rounded(x)).abs().double()
    bound = compress.output_bound(model.layers, rounded.layers, x)
    assert (off <= bound + 1e-5).all() and (off > 0).any()


def test_the_bound_is_reached_where_all_errors_push_the_same_way():
    exact, moved = nn.Linear(3, 1, bias=True), nn.Linear(3, 1, bias=True)
    moved.load_state_dict(exact.state_dict())
    moved.weight.data += 0.1
    x = torch.ones(1, 3)
    bound = compress.output_bound(nn.Sequential(exact), nn.Sequential(moved), x)
    assert bound.item() == pytest.approx((moved(x) - exact(x)).abs().item(), rel=1e-5)
    with pytest.raises(ValueError, match="Tanh"):
        compress.output_bound(nn.Sequential(nn.Tanh()), nn.Sequential(nn.Tanh()), x)


def test_masks_drop_the_smallest_of_all_matrices_together(model):
    masks = compress.magnitude_masks(model, 0.75)
    sizes = torch.cat([layer.weight.abs().flatten() for layer in compress.linear_layers(model).values()])
    keep = torch.cat([mask.flatten() for mask in masks.values()])
    assert (~keep).sum() == round(0.75 * len(keep)) and sizes[keep].min() >= sizes[~keep].max()
    with pytest.raises(ValueError, match="share"):
        compress.magnitude_masks(model, 1.0)


def test_no_other_mask_changes_a_small_matrix_less():
    model = nn.Sequential(nn.Linear(3, 2))
    weight = model[0].weight.detach().flatten()
    (mask,) = compress.magnitude_masks(model, 0.5).values()
    lost = weight[~mask.flatten()].square().sum()
    assert lost <= min(weight[list(rest)].square().sum() for rest in itertools.combinations(range(6), 3)) + 1e-9


def test_pruned_weights_stay_zero_in_training(model):
    masks = compress.magnitude_masks(model, 0.5)
    thin = compress.pruned(model, masks)
    optimizer = torch.optim.Adam(thin.parameters(), lr=0.01)
    before = thin.layers[0].weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        thin(draw(8, 20)).square().sum().backward()
        optimizer.step()
    for name, mask in masks.items():
        assert (thin.get_submodule(name).weight[~mask] == 0).all()
    assert not torch.equal(before, thin.layers[0].weight) and (model.layers[0].weight != 0).all()
    kept, dense = sum(int(mask.sum()) for mask in masks.values()), 20 * 16 + 16 * 12 + 12 * 4
    assert compress.pruned_bytes(model, masks) == 4 * (16 + 12 + 4) + 4 * kept + dense // 8


def test_low_rank_has_the_error_of_eckart_and_young_and_beats_others():
    weight = draw(9, 7, seed=3).double()
    s = torch.linalg.svdvals(weight)
    for rank in (1, 3, 7):
        up, down = compress.low_rank(weight, rank)
        assert up.shape == (9, rank) and (weight - up @ down).square().sum().item() == pytest.approx(
            s[rank:].square().sum().item(), abs=1e-10
        )
    best = (weight - torch.matmul(*compress.low_rank(weight, 2))).norm()
    for seed in range(20):  # the best factor for a random basis
        basis = torch.linalg.qr(draw(9, 2, seed=seed).double())[0]
        assert (weight - basis @ basis.T @ weight).norm() >= best
    with pytest.raises(ValueError, match="rank"):
        compress.low_rank(weight, 8)


def test_a_factored_model_computes_with_the_products(model):
    thin, x = compress.factored(model, 4), draw(5, 20)
    assert compress.n_trainable(thin.parameters()) < compress.n_trainable(model.parameters())
    assert isinstance(thin.layers[6], nn.Linear), "4 x 12 has no thinner product of rank 4"
    layer = thin.layers[0]
    up, down = compress.low_rank(model.layers[0].weight.detach(), 4)
    assert torch.allclose(layer(x), x @ (up @ down).T + model.layers[0].bias, atol=1e-5)


def test_distillation_loss_is_the_sum_written_out():
    student, teacher, labels = draw(6, 3), draw(6, 3, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    soft = sum(p[i, k] * (p[i, k] / q[i, k]).log() for i in range(6) for k in range(3)) / 6
    expected = 0.7 * 4 * soft + 0.3 * F.cross_entropy(student, labels)
    assert compress.distillation_loss(student, teacher, labels, 2.0, 0.7).item() == pytest.approx(expected.item(), rel=1e-5)
    assert compress.distillation_loss(teacher, teacher, labels, 3.0, 1.0).item() == pytest.approx(0, abs=1e-6)


def test_lora_begins_as_the_model_changes_by_its_rank_and_merges(model):
    x, low = draw(5, 20), compress.with_lora(model, 2)
    assert torch.equal(low(x), model(x))
    assert compress.n_trainable(low.parameters()) == 2 * (20 + 16 + 16 + 12 + 12 + 4)
    optimizer = torch.optim.SGD([w for w in low.parameters() if w.requires_grad], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        low(x).square().sum().backward()
        optimizer.step()
    merged = compress.merge_lora(low)
    assert torch.allclose(merged(x), low(x), atol=1e-5) and not torch.allclose(low(x), model(x), atol=1e-2)
    for layer in (0, 3, 6):
        change = (merged.layers[layer].weight - model.layers[layer].weight).detach().double()
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
        assert torch.equal(low.layers[layer].linear.weight, model.layers[layer].weight)


def test_pareto_front_is_what_comparing_all_pairs_finds():
    generator = torch.Generator().manual_seed(0)
    cost, quality = torch.randint(6, (30,), generator=generator), torch.randint(6, (30,), generator=generator)
    front = compress.pareto_front(cost, quality)
    for i in range(30):
        beaten = any(
            cost[j] <= cost[i] and quality[j] >= quality[i] and (cost[j] < cost[i] or quality[j] > quality[i])
            for j in range(30)
        )
        assert front[i] == (not beaten)
