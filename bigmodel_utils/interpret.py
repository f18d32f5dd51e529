"""Interpretation: attributions, probes, circuits and dictionaries, and the controls that show which of them tell the truth.

A *score* is a function of rows (B, ...) that returns one number a row (B,): a regression's output, or one class's logit.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigmodel_utils.models import gpt

Score = Callable[[Tensor], Tensor]  # (B, ...) -> (B,)


# Attributions: what each input is worth for the output.


def gradient(score: Score, x: Tensor) -> Tensor:
    """d score / d x for each row (Simonyan et al. 2013, https://arxiv.org/abs/1312.6034): x (B, ...) -> (B, ...)."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(score(x).sum(), x)[0]


def integrated_gradients(score: Score, x: Tensor, baseline: Tensor, n_steps: int = 64) -> Tensor:
    """(x - baseline) times the mean gradient on the straight path between them, by the midpoint rule.

    Completeness: each row's attributions sum to score(x) - score(baseline), up to the rule's error.

    Args:
        x: (B, ...).
        baseline: what stands for "nothing", of a shape that broadcasts to x's.
        n_steps: points on the path; the error falls as 1 / n_steps^2 where the score is smooth.

    Source: Sundararajan, Taly and Yan 2017, https://arxiv.org/abs/1703.01365, equation 1.
    """
    total = torch.zeros_like(x)
    for step in range(n_steps):
        total += gradient(score, baseline + (step + 0.5) / n_steps * (x - baseline))
    return (x - baseline) * total / n_steps


def guided_gradient(model: nn.Module, score: Score, x: Tensor) -> Tensor:
    """The gradient, with what flows back through each `nn.ReLU` of the model clipped at 0 (Springenberg et al. 2014).

    Source: https://arxiv.org/abs/1412.6806, section 3.4.
    """
    clip = lambda module, inputs, outputs: (inputs[0].clamp(min=0),)  # noqa: E731
    handles = [module.register_full_backward_hook(clip) for module in model.modules() if isinstance(module, nn.ReLU)]
    try:
        return gradient(score, x)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def shapley_values(score: Score, x: Tensor, background: Tensor) -> Tensor:
    """Exact Shapley values, by all 2^d coalitions: a coalition's features are x's, the others come from the background.

    Each row's values sum to score(x) - mean score(background).

    Args:
        x: (B, d), d at most 16.
        background: (m, d) rows to average over.

    Returns:
        (B, d).

    Raises:
        ValueError: for more than 16 features, whose coalitions are too many.

    Source: Shapley 1953, in Contributions to the Theory of Games II; Lundberg and Lee 2017, https://arxiv.org/abs/1705.07874, equation 4.
    """
    (B, d), m = x.shape, len(background)
    if d > 16:
        raise ValueError(f"{d} features have 2^{d} coalitions: exact Shapley values are for 16 features at most")
    codes = torch.arange(2**d)
    inside = (codes[:, None] >> torch.arange(d)) % 2 == 1  # (2^d, d)
    mixed = (torch.where(mask, x[:, None], background).reshape(B * m, d) for mask in inside)
    values = torch.stack([score(rows).view(B, m).mean(dim=1) for rows in mixed])  # (2^d, B)
    weight = torch.tensor([1 / (d * math.comb(d - 1, size)) for size in range(d)], dtype=values.dtype)
    columns = []
    for i in range(d):
        without = codes[~inside[:, i]]
        gain = values[without + 2**i] - values[without]
        columns.append(weight[inside[without].sum(dim=1)] @ gain)
    return torch.stack(columns, dim=1)


# Controls: does an explanation depend on the model at all?


def randomized(model: nn.Module, n_last: int | None = None, seed: int = 0) -> nn.Module:
    """A copy whose last `n_last` layers that have weights of their own (None: all) are drawn anew.

    Source: Adebayo et al. 2018, https://arxiv.org/abs/1810.03292, section 3: a map that survives this explains no weights.
    """
    model = copy.deepcopy(model)
    layers = [module for module in model.modules() if hasattr(module, "reset_parameters")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers[len(layers) - (len(layers) if n_last is None else n_last) :]:
            layer.reset_parameters()
    return model


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation of each row of a with the same row of b, ties sharing their mean rank: (B, ...) -> (B,)."""
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(values.detach().flatten(1).numpy(), axis=1)) for values in (a, b)]
    return correlation(*ranks)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row of a with the same row of b: (B, ...) -> (B,); 0 where a row is constant."""
    a, b = (values.flatten(1) - values.flatten(1).mean(dim=1, keepdim=True) for values in (a, b))
    return F.cosine_similarity(a, b, dim=1)


# Looking into a model, and changing what is there.


@contextlib.contextmanager
def recording(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside it, what the named modules put out is kept: a mapping of names to the tensors of the last forward pass."""
    found: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for name in names:

            def keep(module, inputs, output, name=name):
                found[name] = output.detach()

            stack.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        yield found


@contextlib.contextmanager
def patched(model: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside it, each named module's output is replaced by `change(output)`."""
    with contextlib.ExitStack() as stack:
        for name, change in changes.items():
            hook = lambda module, inputs, output, change=change: change(output)  # noqa: E731
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


@contextlib.contextmanager
def without_heads(model: gpt.GPT, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Inside it, attention heads (layer, head) of a GPT add nothing."""
    width = model.config.d_head
    with contextlib.ExitStack() as stack:
        for layer, head in heads:

            def silence(module, inputs, head=head):
                x = inputs[0].clone()
                x[..., head * width : (head + 1) * width] = 0
                return (x,)

            out = model.blocks[layer].attention.out
            stack.callback(out.register_forward_pre_hook(silence).remove)
        yield


@torch.no_grad()
def attention_weights(model: gpt.GPT, tokens: Tensor) -> Tensor:
    """What each position looks at, in each layer and head of a GPT: tokens (B, T) -> (L, B, H, T, T), rows sum to 1.

    Raises:
        ValueError: for rotary positions, shared keys or normalised queries: this is for the plain layout.
    """
    config = model.config
    if config.position != "learned" or config.qk_norm or config.n_kv_heads != config.n_heads:
        raise ValueError("attention_weights reads GPTs with learned positions, a key for each head and no qk_norm")
    names = [f"blocks.{layer}.attention.qkv" for layer in range(config.n_layers)]
    with recording(model, names) as found:
        model(tokens)
    B, T = tokens.shape
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = []
    for name in names:
        q, k, _ = found[name].view(B, T, 3, config.n_heads, config.d_head).permute(2, 0, 3, 1, 4)  # (B, H, T, d_head) each
        scores = q @ k.mT / math.sqrt(config.d_head)
        weights.append(scores.masked_fill(future, -math.inf).softmax(dim=-1))
    return torch.stack(weights)


def stream_names(model: gpt.GPT) -> list[str]:
    """The modules whose outputs are a GPT's residual stream: behind the embedding, and behind each block."""
    return ["dropout"] + [f"blocks.{layer}" for layer in range(model.config.n_layers)]


@torch.no_grad()
def logit_lens(model: gpt.GPT, tokens: Tensor) -> Tensor:
    """The logits that the model would give if it ended behind the embedding, block 1, ..., the last: (L + 1, B, T, V).

    Source: nostalgebraist 2020, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens.
    """
    with recording(model, stream_names(model)) as found:
        model(tokens)
    unembed = model.token_embedding.weight if model.config.tied else model.head.weight
    return torch.stack([F.linear(model.norm(found[name]), unembed) for name in stream_names(model)])


@torch.no_grad()
def patch_stream(model: gpt.GPT, clean: Tensor, corrupt: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """How much of the clean answer comes back when one place of the corrupt run is set to what it was in the clean run.

    Args:
        clean, corrupt: tokens (B, T).
        score: logits (B, T, V) -> (B,).

    Returns:
        (L + 1, T) for each part of the stream and each position: 0 where the answer stays corrupt, 1 where it is clean;
        the mean change of the score, over the mean difference of the two runs.

    Source: Meng et al. 2022, https://arxiv.org/abs/2202.05262, section 2.1.
    """
    names = stream_names(model)
    with recording(model, names) as kept:
        best = score(model(clean)).mean()
    worst = score(model(corrupt)).mean()
    recovered = torch.empty(len(names), clean.shape[1])
    for row, name in enumerate(names):
        for position in range(clean.shape[1]):
            here = (torch.arange(clean.shape[1]) == position)[:, None]  # (T, 1)
            change = lambda x, here=here, name=name: torch.where(here, kept[name], x)  # noqa: E731
            with patched(model, {name: change}):
                recovered[row, position] = (score(model(corrupt)).mean() - worst) / (best - worst)
    return recovered


# Induction: ... A B ... A -> B.


def repeated_tokens(n_rows: int, length: int, vocab_size: int, periods: tuple[int, int], generator: torch.Generator):
    """Rows that repeat a random beginning of different tokens over and over, so that from then on all is predictable.

    Args:
        periods: the least and the largest length of the beginning, at most `vocab_size`.

    Returns:
        tokens (n_rows, length), and the period of each row (n_rows,).
    """
    period = torch.randint(periods[0], periods[1] + 1, (n_rows,), generator=generator)
    different = torch.rand(n_rows, vocab_size, generator=generator).argsort(dim=1)
    return different.gather(1, torch.arange(length) % period[:, None]), period


def is_predictable(period: Tensor, length: int) -> Tensor:
    """Where the token at a position has been seen, so that the next is known: periods (B,) -> (B, length), True from `period` on."""
    return torch.arange(length) >= period[:, None]


def induction_score(weights: Tensor, tokens: Tensor) -> Tensor:
    """Attention from a token that came before to the tokens that followed it then, mean over such places.

    Args:
        weights: (..., B, H, T, T) attention.
        tokens: (B, T), with repeats.

    Returns:
        (..., H); 1 for a perfect induction head.

    Source: Olsson et al. 2022, https://arxiv.org/abs/2209.11895, "prefix matching".
    """
    before = F.pad(tokens[:, :-1], (1, 0), value=-1)  # (B, T) the token before each
    follows = (tokens[:, :, None] == before[:, None, :]).tril()  # (B, T, T): position j follows an earlier copy of token t
    mass = (weights * follows[:, None]).sum(dim=-1)  # (..., B, H, T)
    return mass.movedim(-2, -1)[..., follows.any(dim=-1), :].mean(dim=-2)


def previous_token_score(weights: Tensor) -> Tensor:
    """Attention to the position before, mean over rows and positions: (..., B, H, T, T) -> (..., H)."""
    return weights.diagonal(offset=-1, dim1=-2, dim2=-1).mean(dim=(-3, -1))


def train_on_repeats(
    model: gpt.GPT, n_steps: int, periods: tuple[int, int], *, batch_size: int = 32, lr: float = 3e-3, seed: int = 0, watch=None
) -> list[float]:
    """Train a GPT in place on endless `repeated_tokens`, its loss taken where the answer is known; Adam.

    Args:
        watch: called with the step, before each.

    Returns:
        the losses of the steps, nats a predictable token.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98), fused=True)
    config, losses = model.config, []
    for step in range(n_steps):
        if watch is not None:
            watch(step)
        tokens, period = repeated_tokens(batch_size, config.context_length + 1, config.vocab_size, periods, generator)
        known = is_predictable(period, config.context_length)
        loss = F.cross_entropy(model(tokens[:, :-1])[known], tokens[:, 1:][known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Probes: what can be read from a layer, by a small classifier.


def probe_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], d_hidden: int = 0, n_steps: int = 300, seed: int = 0
) -> float:
    """Share of test rows that a probe reads right; Adam on all training rows at once, features standardised.

    Args:
        train, test: activations (m, d) and labels (m,) from 0.
        d_hidden: units of the probe's hidden layer; 0 for a linear probe.

    Source: Hewitt and Liang 2019, https://arxiv.org/abs/1909.03368: compare with a *control task* of random labels; the
        difference of the two accuracies is the probe's selectivity.
    """
    mean, scale = train[0].mean(dim=0), train[0].std(dim=0).clamp(min=1e-6)
    d, n_classes = train[0].shape[1], int(train[1].max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = [nn.Linear(d, d_hidden), nn.ReLU()] if d_hidden else []
        probe = nn.Sequential(*hidden, nn.Linear(d_hidden or d, n_classes))
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.01, fused=True)
    for _ in range(n_steps):
        optimizer.zero_grad()
        F.cross_entropy(probe((train[0] - mean) / scale), train[1]).backward()
        optimizer.step()
    with torch.no_grad():
        return (probe((test[0] - mean) / scale).argmax(dim=1) == test[1]).double().mean().item()


# Dictionaries: more features than dimensions.


def sparse_mixtures(dictionary: Tensor, n_rows: int, n_active: int, generator: torch.Generator) -> Tensor:
    """Rows that are sums of `n_active` random rows of a dictionary (n, d), each times a number from 0.5 to 1.5: (n_rows, d)."""
    n = len(dictionary)
    chosen = torch.rand(n_rows, n, generator=generator).argsort(dim=1)[:, :n_active]
    amount = 0.5 + torch.rand(n_rows, n_active, generator=generator)
    return torch.zeros(n_rows, n).scatter(1, chosen, amount) @ dictionary


class SparseAutoencoder(nn.Module):
    """x is explained by the k of n learnt directions that it agrees with most (Gao et al. 2024, https://arxiv.org/abs/2406.04093)."""

    def __init__(self, d: int, n_features: int, k: int):
        super().__init__()
        self.k = k
        self.directions = nn.Parameter(F.normalize(torch.randn(n_features, d), dim=1))
        self.encoder = nn.Parameter(self.directions.detach().clone())
        self.mean = nn.Parameter(torch.zeros(d))

    def encode(self, x: Tensor) -> Tensor:
        """(B, d) -> (B, n_features) codes, at most k of a row's not 0, none negative."""
        best = ((x - self.mean) @ self.encoder.T).topk(self.k, dim=1)
        return x.new_zeros(len(x), len(self.encoder)).scatter(1, best.indices, best.values.relu())

    def forward(self, x: Tensor) -> Tensor:
        """(B, d) -> (B, d) explained part."""
        return self.encode(x) @ F.normalize(self.directions, dim=1) + self.mean


def fit_sparse_autoencoder(
    x: Tensor, n_features: int, k: int, n_steps: int = 1500, batch_size: int = 256, lr: float = 3e-3, seed: int = 0
) -> SparseAutoencoder:
    """Learn directions from rows (m, d) by Adam on the squared error, rate falling to 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SparseAutoencoder(x.shape[1], n_features, k)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, n_steps)
    for _ in range(n_steps):
        rows = x[torch.randint(len(x), (batch_size,), generator=generator)]
        optimizer.zero_grad()
        (model(rows) - rows).square().sum(dim=1).mean().backward()
        optimizer.step()
        schedule.step()
    return model


def best_match(found: Tensor, true: Tensor) -> Tensor:
    """For each true direction (n, d) the largest |cosine| with one of those found (m, d): (n,)."""
    return (F.normalize(true, dim=1) @ F.normalize(found, dim=1).T).abs().amax(dim=1)
