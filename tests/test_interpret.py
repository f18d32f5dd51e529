"""Attributions, hooks, circuits and dictionaries against closed forms, enumeration and planted truth."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bigmodel_utils import interpret
from bigmodel_utils.models import GPT, GPTConfig


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)).double()


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(1)
    sizes = {"vocab_size": 12, "context_length": 16, "n_layers": 2, "n_heads": 2, "d_model": 16}
    model = GPT(GPTConfig(**sizes, tied=False)).eval()
    for weight in model.parameters():  # GPT-2's start is so small that heads hardly differ
        weight.data += 0.3 * torch.randn_like(weight)
    return model


def rows(n=4, d=5, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradient_is_the_finite_difference(net):
    x, eps = rows(), 1e-6

    def score(x):
        return net(x)[:, 0]

    found = interpret.gradient(score, x)
    for i in range(5):
        step = eps * torch.eye(5).double()[i]
        assert torch.allclose(found[:, i], (score(x + step) - score(x - step)).detach() / (2 * eps), atol=1e-6)


def test_integrated_gradients_are_complete_and_exact_on_a_polynomial(net):
    x, zero = rows(), torch.zeros(1, 5).double()

    def score(x):
        return net(x)[:, 0]

    gap = [
        (interpret.integrated_gradients(score, x, zero, n).sum(1) - score(x) + score(zero)).abs().max().item()
        for n in (10, 1000)
    ]
    assert gap[1] < 1e-3 and gap[1] < gap[0] / 10

    def product(x):
        return x[:, 0] * x[:, 1] ** 2  # from 0: a third and two thirds of the value

    found = interpret.integrated_gradients(product, x, zero, 2000)
    value = product(x)
    assert torch.allclose(found[:, 0], value / 3, atol=1e-5) and torch.allclose(found[:, 1], 2 * value / 3, atol=1e-5)


def shapley_by_orders(score, x, background):
    """The definition: what a feature adds, averaged over all orders in which features may join."""
    values = torch.zeros_like(x)
    orders = list(itertools.permutations(range(x.shape[1])))

    def worth(joined):
        return torch.stack([torch.stack([score(torch.where(joined, row, b)[None])[0] for b in background]).mean() for row in x])

    for order in orders:
        joined = torch.zeros(x.shape[1], dtype=torch.bool)
        before = worth(joined)
        for feature in order:
            joined[feature] = True
            after = worth(joined)
            values[:, feature] += (after - before) / len(orders)
            before = after
    return values


def test_shapley_values_are_the_average_over_all_orders():
    def score(x):
        return x[:, 0] * x[:, 1] + (x[:, 2] - x[:, 3]).relu() * x[:, 0]

    x, background = rows(3, 4), rows(2, 4, seed=1)
    found = interpret.shapley_values(score, x, background)
    assert torch.allclose(found, shapley_by_orders(score, x, background), atol=1e-12)
    with pytest.raises(ValueError, match="16 features"):
        interpret.shapley_values(score, rows(1, 17), rows(1, 17))


def test_guided_gradient_by_hand_and_its_hooks_are_removed():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    model[2].weight.data = torch.tensor([[1.0, -1.0]])
    x = torch.tensor([[1.0, 1.0]])  # both units are on; the second's gradient is negative and is dropped

    def score(x):
        return model(x)[:, 0]

    assert torch.equal(interpret.guided_gradient(model, score, x), torch.tensor([[1.0, 2.0]]))
    assert torch.equal(interpret.gradient(score, x), torch.tensor([[-2.0, 3.0]]))


def test_randomized_changes_the_last_layers_and_leaves_the_model(net):
    before = [weight.clone() for weight in net.parameters()]
    fresh = interpret.randomized(net, 1)
    assert all(map(torch.equal, before, net.parameters()))
    assert torch.equal(fresh[2].weight, net[2].weight) and not torch.equal(fresh[4].weight, net[4].weight)
    assert not torch.equal(interpret.randomized(net)[0].weight, net[0].weight)
    assert torch.equal(interpret.randomized(net, seed=3)[0].weight, interpret.randomized(net, seed=3)[0].weight)


def test_correlations_equal_scipy():
    from scipy import stats

    a, b = rows(3, 9), rows(3, 9, seed=2).round()  # ties in b
    for i in range(3):
        assert interpret.rank_correlation(a, b)[i].item() == pytest.approx(stats.spearmanr(a[i], b[i]).statistic)
        assert interpret.correlation(a, b)[i].item() == pytest.approx(stats.pearsonr(a[i], b[i]).statistic)


def test_recording_and_patching_see_and_change_and_leave_no_hook(net):
    x = rows()
    with interpret.recording(net, ["0", "3"]) as found:
        whole = net(x)
    assert torch.equal(found["0"], net[0](x)) and torch.equal(net[4](found["3"]), whole)
    with interpret.patched(net, {"3": lambda h: torch.zeros_like(h)}):
        assert torch.equal(net(x), net[4].bias.expand(4, 1))
    assert torch.equal(net(x), whole) and not any(module._forward_hooks for module in net.modules())


def test_attention_weights_give_what_attention_adds(gpt):
    tokens = torch.randint(12, (3, 10), generator=torch.Generator().manual_seed(0))
    weights = interpret.attention_weights(gpt, tokens)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 2, 10)) and weights.triu(1).abs().max() == 0
    for layer in range(2):
        name = f"blocks.{layer}.attention"
        with interpret.recording(gpt, [f"{name}.qkv", name]) as found, torch.no_grad():
            gpt(tokens)
        v = found[f"{name}.qkv"][..., 32:].view(3, 10, 2, 8).transpose(1, 2)
        mixed = (weights[layer] @ v).transpose(1, 2).reshape(3, 10, 16)
        assert torch.allclose(gpt.blocks[layer].attention.out(mixed), found[name], atol=1e-5)
    with pytest.raises(ValueError, match="learned positions"):
        interpret.attention_weights(GPT(GPTConfig.modern(vocab_size=5, n_layers=1, n_heads=2, d_model=8)), tokens[:1, :4] % 5)


def test_a_head_without_output_weights_can_be_silenced_without_effect(gpt):
    tokens = torch.arange(10)[None]
    other = GPT(gpt.config)
    other.load_state_dict(gpt.state_dict())
    other.blocks[1].attention.out.weight.data[:, 8:] = 0  # head 1 of layer 1 adds nothing in this copy
    with interpret.without_heads(gpt, [(1, 1)]):
        silent = gpt(tokens)
    assert torch.allclose(silent, other(tokens), atol=1e-6) and not torch.allclose(silent, gpt(tokens), atol=1e-3)


def test_logit_lens_ends_with_the_model_and_begins_with_the_embedding(gpt):
    tokens = torch.arange(9)[None]
    lens = interpret.logit_lens(gpt, tokens)
    first = gpt.token_embedding(tokens) + gpt.position_embedding(torch.arange(9))
    assert lens.shape == (3, 1, 9, 12) and torch.allclose(lens[-1], gpt(tokens), atol=1e-5)
    assert torch.allclose(lens[0], gpt.head(gpt.norm(first)), atol=1e-5)


def test_patching_the_changed_input_or_the_last_place_restores_everything(gpt):
    clean = torch.randint(12, (8, 10), generator=torch.Generator().manual_seed(3))
    corrupt = clean.clone()
    corrupt[:, 4] = (corrupt[:, 4] + 1) % 12
    found = interpret.patch_stream(gpt, clean, corrupt, lambda logits: logits[:, -1, 0])
    assert found.shape == (3, 10)
    assert found[0, 4].item() == pytest.approx(1, abs=1e-4) and found[2, 9].item() == pytest.approx(1, abs=1e-4)
    assert found[:, :4].abs().max() < 1e-4, "places before the change are the same in both runs"
    assert found[2, :9].abs().max() < 1e-4, "behind the last block only the last place is read"


def test_repeated_tokens_repeat_and_differ_within_a_period():
    tokens, period = interpret.repeated_tokens(50, 30, 20, (5, 12), torch.Generator().manual_seed(0))
    assert {*period.tolist()} == set(range(5, 13))
    for row, p in zip(tokens.tolist(), period.tolist()):
        assert row[p:] == row[:-p] and len(set(row[:p])) == p
    known = interpret.is_predictable(period, 30)
    assert known.sum(1).tolist() == [30 - p for p in period.tolist()]


def test_induction_score_of_planted_heads():
    tokens, period = interpret.repeated_tokens(6, 14, 20, (4, 6), torch.Generator().manual_seed(0))
    weights = torch.zeros(6, 3, 14, 14)
    weights[:, 0, torch.arange(14), (torch.arange(14) - 1).clamp(min=0)] = 1  # the place before
    for b, p in enumerate(period.tolist()):
        for t in range(14):
            weights[b, 1, t, t - p + 1 if t >= p else 0] = 1  # the token after the last copy
    weights[:, 2] = torch.ones(14, 14).tril() / torch.arange(1, 15)[:, None]  # everywhere alike
    score = interpret.induction_score(weights, tokens)
    assert score[:2].tolist() == [0, 1] and 0.05 < score[2] < 0.3
    assert interpret.previous_token_score(weights)[0] == 1
    assert interpret.induction_score(weights[None].repeat(2, 1, 1, 1, 1), tokens).shape == (2, 3)


def test_training_on_repeats_lowers_the_loss():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=8, context_length=12, n_layers=1, n_heads=2, d_model=16))
    seen = []
    losses = interpret.train_on_repeats(model, 60, (3, 3), batch_size=16, lr=1e-2, watch=seen.append)
    assert losses[0] == pytest.approx(math.log(8), abs=0.2) and losses[-1] < losses[0] - 0.5 and seen == list(range(60))


def test_probe_reads_what_is_there_and_a_hidden_layer_computes_more():
    x = rows(600, 4).float()
    line, product = (x[:, 0] > 0).long(), (x[:, 0] * x[:, 1] > 0).long()

    def accuracy(y, d):
        return interpret.probe_accuracy((x[:400], y[:400]), (x[400:], y[400:]), d)

    assert accuracy(line, 0) > 0.95 and accuracy(product, 0) < 0.65 and accuracy(product, 32) > 0.9


def test_sparse_autoencoder_recovers_a_planted_dictionary():
    generator = torch.Generator().manual_seed(0)
    planted = F.normalize(torch.randn(16, 10, generator=generator), dim=1)
    x = interpret.sparse_mixtures(planted, 5000, 2, generator)
    model = interpret.fit_sparse_autoencoder(x, 32, 2, n_steps=500)
    code = model.encode(x)
    assert (code >= 0).all() and (code != 0).sum(1).max() <= 2
    assert (interpret.best_match(model.directions.detach(), planted) > 0.95).sum() >= 15
    assert (interpret.best_match(torch.randn(32, 10, generator=generator), planted) > 0.95).sum() <= 2


def test_mixtures_have_the_planted_number_of_parts():
    x = interpret.sparse_mixtures(torch.eye(12), 200, 3, torch.Generator().manual_seed(0))
    assert ((x != 0).sum(1) == 3).all() and x[x != 0].min() >= 0.5 and x.max() <= 1.5


def test_best_match_ignores_sign_and_length():
    assert torch.allclose(interpret.best_match(-3 * torch.eye(3)[:2], torch.eye(3)), torch.tensor([1.0, 1.0, 0.0]))
