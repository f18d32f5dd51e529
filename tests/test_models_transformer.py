"""The Transformer against torch.nn.Transformer, against literal loops, against table 3 of its paper, and its invariances."""

import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import randomize
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_utils import models, predict
from bigmodel_utils.models.transformer import (
    Attention,
    Conditioned,
    DecoderCache,
    Transformer,
    TransformerConfig,
    attend,
    cross_attention,
    sinusoidal_positions,
)

TINY = TransformerConfig(n_layers=2, n_heads=3, d_model=15, d_ff=7, vocab_size=11, dropout=0.0)
AS_TORCH = {"attention_bias": True, "final_norm": True}
SEEDS, FEW = st.integers(0, 10_000), settings(deadline=None, max_examples=30)


def build(config: TransformerConfig, seed: int = 0) -> Transformer:
    """A model in float64, random throughout."""
    torch.manual_seed(seed)
    return randomize(Transformer(config).double())


def reference_model(config: TransformerConfig, train: bool = False) -> torch.nn.Transformer:
    """torch's model of the same shape, random throughout."""
    n, width = config.n_layers, config.d_model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that its fast path is not for these shapes
        reference = torch.nn.Transformer(
            width, config.n_heads, n, n, config.d_ff, 0.0, batch_first=True, norm_first=config.norm_first, dtype=torch.float64
        )
    return randomize(reference).train(train)


def run_reference(reference, source, target, source_mask=None, target_mask=None):
    """torch's masks are True where a position is hidden."""
    T = target.shape[1]
    return reference(
        source,
        target,
        tgt_mask=torch.ones(T, T, dtype=torch.bool).triu(1),
        src_key_padding_mask=None if source_mask is None else ~source_mask,
        tgt_key_padding_mask=None if target_mask is None else ~target_mask,
        memory_key_padding_mask=None if source_mask is None else ~source_mask,
    )


def random_mask(B: int, T: int) -> torch.Tensor:
    """Holes anywhere but at the first position."""
    mask = torch.rand(B, T) < 0.6
    mask[:, 0] = True
    return mask


def assert_equal(ours: torch.Tensor, reference: torch.Tensor, what: str) -> None:
    error = (ours - reference).abs().max().item()
    assert error < 1e-10 * max(1.0, reference.abs().max().item()), f"{what} differs by {error:.1e}"


CASES = [  # n_layers, n_heads, d_model, d_ff, S, T, masked
    (2, 3, 15, 7, 6, 5, True),
    (1, 1, 5, 9, 1, 1, False),
    (1, 7, 7, 1, 9, 1, True),
    (3, 2, 8, 33, 1, 8, True),
    (1, 4, 12, 24, 40, 33, False),
]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stacks_and_gradients_equal_torchs(case, norm_first, train):
    n_layers, n_heads, d_model, d_ff, S, T, masked = case
    config = replace(TINY, n_layers=n_layers, n_heads=n_heads, d_model=d_model, d_ff=d_ff, norm_first=norm_first, **AS_TORCH)
    torch.manual_seed(S + T)
    reference, model = reference_model(config, train), Transformer(config).double().train(train)
    models.load_reference(model, reference.state_dict())
    source = torch.randn(3, S, d_model, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, T, d_model, dtype=torch.float64, requires_grad=True)
    masks = (random_mask(3, S), random_mask(3, T)) if masked else (None, None)
    theirs, ours = run_reference(reference, source, target, *masks), model.run_stacks(source, target, *masks)
    assert_equal(ours, theirs, "the decoder's output")

    direction = torch.randn_like(theirs)
    their_inputs = torch.autograd.grad((theirs * direction).sum(), (source, target), retain_graph=True)
    our_inputs = torch.autograd.grad((ours * direction).sum(), (source, target), retain_graph=True)
    (theirs * direction).sum().backward()
    source.grad = target.grad = None
    (ours * direction).sum().backward()
    for name, our_gradient, gradient in zip(("source", "target"), our_inputs, their_inputs):
        assert_equal(our_gradient, gradient, f"the gradient of the {name}")
    gradients = model.translate_reference({name: p.grad for name, p in reference.state_dict(keep_vars=True).items()})
    compared = [name for name, _ in model.named_parameters() if name != "embedding.weight"]
    assert len(compared) == len(gradients) - 1
    for name in compared:
        assert_equal(model.get_parameter(name).grad, gradients[name], f"the gradient of {name}")


@pytest.mark.parametrize("norm_first", [False, True])
def test_paper_form_equals_torch_without_its_additions(norm_first):
    """No biases in attention; post-norm has no LayerNorm behind the stacks."""
    config = replace(TINY, norm_first=norm_first)
    reference, model = reference_model(config), Transformer(config).double()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "attn" in name and name.endswith("bias"):
                parameter.zero_()
    if not norm_first:
        reference.encoder.norm = reference.decoder.norm = None
    weights = {name: value for name, value in reference.state_dict().items() if not ("attn" in name and name.endswith("bias"))}
    models.load_reference(model, weights)
    source, target = torch.randn(2, 6, 15, dtype=torch.float64), torch.randn(2, 4, 15, dtype=torch.float64)
    masks = random_mask(2, 6), random_mask(2, 4)
    assert_equal(model.run_stacks(source, target, *masks), run_reference(reference, source, target, *masks), "the output")


def test_logits_are_scaled_embeddings_and_sines_through_torchs_stacks():
    """Embedding, positions and the shared output map, written out number by number."""
    config = replace(TINY, **AS_TORCH)
    torch.manual_seed(1)
    reference, model = reference_model(config), Transformer(config).double()
    models.load_reference(model, reference.state_dict())
    source, target = torch.randint(11, (2, 7)), torch.randint(11, (2, 5))
    weight = model.embedding.weight.tolist()

    def embed(tokens):
        rows = [[list(weight[token]) for token in row] for row in tokens.tolist()]
        for row in rows:
            for position, vector in enumerate(row):
                for column in range(15):
                    angle = position / 10_000 ** ((column - column % 2) / 15)
                    vector[column] = vector[column] * math.sqrt(15) + (math.cos if column % 2 else math.sin)(angle)
        return torch.tensor(rows, dtype=torch.float64)

    hidden = run_reference(reference, embed(source), embed(target))
    logits = [[[sum(h * w for h, w in zip(vector, row)) for row in weight] for vector in rows] for rows in hidden.tolist()]
    assert_equal(model(source, target), torch.tensor(logits, dtype=torch.float64), "the logits")


@FEW
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), SEEDS)
def test_attention_equals_the_slow_loop(n_heads, T, S, seed):
    torch.manual_seed(seed)
    d_head = 3
    attention = Attention(n_heads * d_head, n_heads, bias=True).double()
    x, memory = (torch.randn(1, n, n_heads * d_head, dtype=torch.float64) for n in (T, S))
    mask = torch.rand(T, S) < 0.5
    mask[:, seed % S] = True
    q, k, v = attention.query(x)[0].tolist(), attention.key(memory)[0].tolist(), attention.value(memory)[0].tolist()
    rows = []
    for t in range(T):
        row = []
        for head in range(n_heads):
            at = range(head * d_head, (head + 1) * d_head)
            seen = [s for s in range(S) if mask[t, s]]
            weights = [math.exp(sum(q[t][i] * k[s][i] for i in at) / math.sqrt(d_head)) for s in seen]
            row += [sum(w * v[s][i] for w, s in zip(weights, seen)) / sum(weights) for i in at]
        rows.append(row)
    expected = attention.output(torch.tensor([rows], dtype=torch.float64))
    assert_equal(attention(x, memory, mask), expected, "attention")


# Counts


@pytest.mark.parametrize(("name", "count"), [("transformer-base", 63_045_632), ("transformer-big", 214_171_648)])
def test_named_sizes_count_by_formula_and_on_the_meta_device(name, count):
    """By hand, base: 37,000 * 512 + 6 * (3,150,336 + 4,199,936); big: 37,000 * 1024 + 6 * (12,592,128 + 16,788,480)."""
    config = TransformerConfig.named(name)
    with torch.device("meta"):
        model = Transformer(config)
    assert models.count_parameters(config) == models.count_parameters(model) == count
    assert all(parameter.is_meta for parameter in model.parameters())


TABLE_3_DIFFERENCES = [  # rows (C) of the paper's table 3 whose embedding is the base model's, in million parameters
    ({"n_layers": 2}, 36 - 65),
    ({"n_layers": 4}, 50 - 65),
    ({"n_layers": 8}, 80 - 65),
    ({"d_ff": 1024}, 53 - 65),
    ({"d_ff": 4096}, 90 - 65),
]


@pytest.mark.parametrize(("changes", "difference"), TABLE_3_DIFFERENCES, ids=str)
def test_layers_count_as_in_the_papers_table(changes, difference):
    """Differences cancel the embedding, whose number of entries the paper only gives as "about 37,000"; rounded to +-1."""
    base = TransformerConfig.named("transformer-base")
    assert (replace(base, **changes).n_parameters - base.n_parameters) / 1e6 == pytest.approx(difference, abs=1)


@settings(deadline=None, max_examples=50)
@given(
    st.tuples(*[st.integers(1, 4)] * 5),
    st.booleans(),
    st.sampled_from([None, False, True]),
    st.booleans(),
)
def test_formula_counts_the_parameters(sizes, norm_first, final_norm, attention_bias):
    n_layers, n_heads, d_head, d_ff, vocab_size = sizes
    config = TransformerConfig(
        n_layers, n_heads, n_heads * d_head, d_ff, vocab_size, 0.0, norm_first, final_norm, attention_bias
    )
    assert models.count_parameters(config) == models.count_parameters(Transformer(config))


# Invariances


@FEW
@given(SEEDS, st.booleans(), st.integers(1, 6), st.integers(1, 6), st.integers(0, 4), st.integers(0, 4))
def test_padding_never_changes_real_positions(seed, norm_first, S, T, source_padding, target_padding):
    """Neither its amount nor its tokens do."""
    model = build(replace(TINY, norm_first=norm_first), seed)
    source, target = torch.randint(11, (2, S)), torch.randint(11, (2, T))

    def pad(tokens, n):
        mask = torch.ones(2, tokens.shape[1] + n, dtype=torch.bool)
        mask[:, tokens.shape[1] :] = False
        return torch.cat([tokens, torch.randint(11, (2, n))], dim=1), mask

    (padded, source_mask), (longer, target_mask) = pad(source, source_padding), pad(target, target_padding)
    alone = model(source, target)
    assert_equal(model(padded, longer, source_mask, target_mask)[:, :T], alone, "a padded sentence")
    assert_equal(model(padded, longer, source_mask)[:, :T], alone, "padding behind the target without a mask")
    others = torch.where(source_mask, padded, torch.randint(11, padded.shape))
    first, second = model(padded, target, source_mask), model(others, target, source_mask)
    assert torch.equal(first, second), "tokens under the mask are seen"


@FEW
@given(SEEDS, st.integers(1, 5), st.integers(1, 4))
def test_padding_before_the_target_is_hidden_and_its_gradients_are_finite(seed, T, n_padding):
    """The first rows see nothing at all then; they must not turn the weights' gradients to NaN."""
    model = build(TINY, seed)
    source, target = torch.randn(1, 3, 15, dtype=torch.float64), torch.randn(1, T, 15, dtype=torch.float64)
    padded = torch.cat([torch.randn(1, n_padding, 15, dtype=torch.float64), target], dim=1)
    mask = torch.arange(n_padding + T)[None] >= n_padding
    y = model.run_stacks(source, padded, target_mask=mask)[:, n_padding:]
    assert_equal(y, model.run_stacks(source, target), "a target padded in front")
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if name != "embedding.weight")


@FEW
@given(SEEDS, st.integers(2, 8), st.booleans())
def test_decoder_leaks_nothing_from_the_future(seed, T, norm_first):
    """Bit for bit: other tokens from position t on leave the logits before it as they are."""
    model = build(replace(TINY, norm_first=norm_first), seed)
    source, target = torch.randint(11, (2, 4)), torch.randint(11, (2, T))
    t = 1 + seed % (T - 1)
    changed = target.clone()
    changed[:, t:] = (changed[:, t:] + torch.randint(1, 11, (2, T - t))) % 11
    before, after = model(source, target), model(source, changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t] != after[:, t]).any(), "a position does not even see itself"


@FEW
@given(SEEDS, st.integers(1, 8), st.booleans())
def test_without_positions_the_encoder_is_permutation_equivariant_and_the_decoder_indifferent(seed, S, norm_first):
    model = build(replace(TINY, norm_first=norm_first), seed)
    source, target = torch.randn(2, S, 15, dtype=torch.float64), torch.randn(2, 3, 15, dtype=torch.float64)
    mask, order = random_mask(2, S), torch.randperm(S)
    assert_equal(model.run_encoder(source[:, order], mask[:, order]), model.run_encoder(source, mask)[:, order], "the encoder")
    moved = model.run_stacks(source[:, order], target, mask[:, order])
    assert_equal(moved, model.run_stacks(source, target, mask), "the decoder")


def test_with_positions_order_matters():
    model, target = build(TINY), torch.tensor([[1, 2]])
    assert not torch.allclose(model(torch.tensor([[3, 4]]), target), model(torch.tensor([[4, 3]]), target))


@FEW
@given(SEEDS, st.integers(1, 6))
def test_one_token_at_a_time_equals_all_at_once(seed, T):
    """The source is read once; each prefix's last logits are the whole target's there."""
    model = build(TINY, seed)
    source, target, mask = torch.randint(11, (2, 5)), torch.randint(11, (2, T)), random_mask(2, 5)
    memory, at_once = model.encode(source, mask), model(source, target, mask)
    for t in range(T):
        assert_equal(model.decode(target[:, : t + 1], memory, mask)[:, -1], at_once[:, t], f"the token at {t}")


@FEW
@given(SEEDS, st.integers(1, 7), st.booleans(), st.booleans())
def test_cached_decoding_equals_uncached(seed, T, masked, norm_first):
    """In steps of any length, and the cache knows how much it holds."""
    torch.manual_seed(seed)
    model = build(replace(TINY, norm_first=norm_first), seed)
    source, target = torch.randint(11, (2, 5)), torch.randint(11, (2, T))
    mask = random_mask(2, 5) if masked else None
    memory, cache, first, parts = model.encode(source, mask), DecoderCache(TINY.n_layers, T), 0, []
    while first < T:
        step = 1 + int(torch.randint(T - first, ()))
        with torch.no_grad():
            parts.append(model.decode(target[:, first : first + step], memory, mask, cache=cache))
        first += step
        assert cache.length == first
    assert_equal(torch.cat(parts, dim=1), model.decode(target, memory, mask), "cached logits")


@pytest.mark.parametrize("n_beams", [1, 3])
def test_a_conditioned_model_generates_as_the_whole_model_does(n_beams):
    """With and without the cache; greedy choices are those of a loop over `forward`."""
    model = build(TINY)
    source, mask, start = torch.randint(11, (3, 6)), random_mask(3, 6), torch.full((3, 1), 2)
    reader = Conditioned(model, source, mask)
    texts, scores = predict.beam_search(reader, start, 5, n_beams)
    again, same_scores = predict.beam_search(reader, start, 5, n_beams, use_cache=False)
    assert torch.equal(texts, again)
    assert_equal(scores, same_scores, "scores with a cache")
    text = start
    for _ in range(5):
        text = torch.cat([text, model(source, text, mask)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(predict.generate(reader, start, 5, temperature=0), text)
    if n_beams == 1:
        assert torch.equal(texts[:, 0], text)


def test_beams_of_several_sources_do_not_mix():
    model = build(TINY)
    sources, masks, start = torch.randint(11, (4, 5)), random_mask(4, 5), torch.full((4, 1), 2)
    together, scores = predict.beam_search(Conditioned(model, sources, masks), start, 4, 3)
    for row in range(4):
        one = slice(row, row + 1)
        alone, score = predict.beam_search(Conditioned(model, sources[one], masks[one]), start[one], 4, 3)
        assert torch.equal(together[one], alone)
        assert_equal(scores[one], score, "the scores of one source")


def test_full_width_beam_is_exhaustive():
    """Of all translations of a tiny vocabulary, with an end that may come early."""
    model = build(replace(TINY, vocab_size=4), 3)
    source, start, END = torch.tensor([[3, 0, 1]]), torch.tensor([[2]]), 3
    texts, scores = predict.beam_search(Conditioned(model, source), start, 3, 4**3, end_token=END)
    log_p = {}
    for tokens in itertools.product(range(4), repeat=3):
        ended = tokens.index(END) + 1 if END in tokens else 3
        if any(token != END for token in tokens[ended:]):
            continue  # the same translation, filled up otherwise
        row = torch.tensor([[2, *tokens]])
        steps = model(source, row[:, :-1]).log_softmax(dim=-1).gather(2, row[:, 1:, None])[0, :ended]
        log_p[tokens] = steps.sum().item()
    ranked = sorted(log_p.items(), key=lambda item: -item[1])
    assert texts.shape[1] == len(ranked)
    assert tuple(texts[0, 0, 1:].tolist()) == ranked[0][0]
    assert scores[0].tolist() == pytest.approx([score for _, score in ranked], abs=1e-5)


def test_cross_attention_is_what_the_decoder_uses():
    """Rows are distributions without padding, and rebuilding the last layer's output from them gives the same logits."""
    model = build(replace(TINY, n_layers=1, norm_first=True))
    source, target, mask = torch.randint(11, (2, 5)), torch.randint(11, (2, 4)), random_mask(2, 5)
    weights = cross_attention(model, source, target, mask)
    assert weights.shape == (1, 2, TINY.n_heads, 4, 5)
    assert_equal(weights.sum(dim=-1), torch.ones(1, 2, TINY.n_heads, 4, dtype=torch.float64), "the sums")
    assert (weights.masked_select(~mask[None, :, None, None, :].expand_as(weights)) == 0).all()
    layer, memory = model.decoder[0], model.encode(source, mask)
    expected = model.decode(target, memory, mask)
    _, values = layer.cross_attention.keys_and_values(memory)
    layer.cross_attention.ask = lambda *_: layer.cross_attention.output((weights[0] @ values).transpose(1, 2).flatten(2))
    assert_equal(model.decode(target, memory, mask), expected, "the logits")


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bfloat16_is_near_the_exact_one(masked):
    """The products written out, which replace the fused kernel there."""
    q, k, v = torch.randn(3, 2, 3, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if masked else None
    exact = attend(q.double(), k.double(), v.double(), mask)
    assert (attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask).double() - exact).abs().max() < 0.05


# Positions


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 20))
def test_a_shift_rotates_the_positions(position, shift, half):
    """Section 3.5: the encoding of position + shift is a linear map of that of position, the same for every position."""
    table = sinusoidal_positions(1001, 2 * half, dtype=torch.float64)
    for i in range(half):
        angle = shift / 10_000 ** (i / half)
        sine, cosine = table[position, 2 * i].item(), table[position, 2 * i + 1].item()
        rotated = (
            sine * math.cos(angle) + cosine * math.sin(angle),
            cosine * math.cos(angle) - sine * math.sin(angle),
        )
        assert table[position + shift, 2 * i : 2 * i + 2].tolist() == pytest.approx(rotated, abs=1e-9)


def test_positions_beyond_256_differ_in_bfloat16():
    table = sinusoidal_positions(300, 64, dtype=torch.bfloat16)
    assert table.dtype == torch.bfloat16
    assert len(table.unique(dim=0)) == 300


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_runs_and_is_near(dtype):
    model = Transformer(TINY).double()
    source, target, mask = torch.randint(11, (2, 5)), torch.randint(11, (2, 6)), random_mask(2, 5)
    exact, logits = model(source, target, mask), model.to(dtype)(source, target, mask)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_first_logits_are_of_order_one():
    """The loss of a model that knows nothing is near ln(vocab_size)."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(n_layers=2, n_heads=4, d_model=128, d_ff=256, vocab_size=1000, dropout=0.0))
    source, target, following = (torch.randint(1000, (8, 16)) for _ in range(3))
    loss = torch.nn.functional.cross_entropy(model(source, target).flatten(0, 1), following.flatten())
    assert math.log(1000) - 0.1 < loss.item() < math.log(1000) + 1.5


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_acts_in_training_only_and_where_the_paper_has_it(norm_first):
    """On the two sums of embedding and position, and on every sublayer's output: 2 + 2 layers * (2 + 3); not in attention."""
    torch.manual_seed(0)
    config = replace(TINY, dropout=0.5, norm_first=norm_first)
    model, source, target = Transformer(config), torch.randint(11, (2, 4)), torch.randint(11, (2, 3))
    dropouts, calls = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)], []
    for module in dropouts:
        module.register_forward_hook(lambda module, *_: calls.append(module.p))
    assert not torch.equal(model(source, target), model(source, target))
    assert calls == 2 * [0.5] * (2 + 2 * (2 + 3))
    for module in dropouts:
        module.p = 0.0
    assert torch.equal(model(source, target), model(source, target))
    model = Transformer(config).eval()
    assert torch.equal(model(source, target), model(source, target))


# Refusals


def test_weights_that_do_not_fit_are_named():
    config = replace(TINY, **AS_TORCH)
    deeper = reference_model(replace(config, n_layers=3)).state_dict()
    with pytest.raises(ValueError, match=r"decoder\.2\.cross_attention\.key\.bias is unexpected"):
        models.load_reference(Transformer(config), deeper)
    fitting = reference_model(config).state_dict()
    with pytest.raises(ValueError, match=r"^the state dict does not fit Transformer: lm_head\.weight is unexpected$"):
        models.load_reference(Transformer(config), fitting | {"lm_head.weight": torch.zeros(11, 15)})
    unknown = {"transformer.encoder.layers.0.adapter.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"fit Transformer: transformer\.encoder\.layers\.0\.adapter\.weight is unexpected$"):
        models.load_reference(Transformer(config), fitting | unknown)
    del fitting["encoder.layers.1.norm2.weight"]
    with pytest.raises(
        ValueError, match=r"^the state dict does not fit Transformer: encoder\.1\.residual_2\.norm\.weight is missing$"
    ):
        models.load_reference(Transformer(config), fitting)


def test_a_prefixed_reference_loads_with_its_own_embedding():
    config = replace(TINY, **AS_TORCH)
    reference, model, embedding = reference_model(config), Transformer(config), torch.randn(11, 15)
    prefixed = {f"transformer.{name}": value for name, value in reference.state_dict().items()}
    models.load_reference(model, prefixed | {"embedding.weight": embedding})
    assert torch.equal(model.embedding.weight, embedding)
    assert torch.equal(model.decoder[1].feed_forward[0].weight, reference.decoder.layers[1].linear1.weight.float())


def test_our_own_weights_pass_untouched():
    state = Transformer(TINY).state_dict()
    translated = Transformer(TINY).translate_reference(state)
    assert translated.keys() == state.keys()
    assert all(translated[name] is state[name] for name in state)


@pytest.mark.parametrize(
    "changes",
    [{"n_layers": 0}, {"n_heads": 4}, {"d_model": 0}, {"d_ff": 0}, {"vocab_size": 0}, {"dropout": 1.0}, {"dropout": -0.1}],
    ids=str,
)
def test_senseless_configurations_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(TINY, **changes)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'bert-base'.*transformer-base, transformer-big"):
        TransformerConfig.named("bert-base")


def test_wrong_tokens_and_masks_are_refused_with_their_shapes():
    model, tokens = Transformer(TINY), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(B, T\).*got \(3,\)"):
        model(tokens[0], tokens)
    with pytest.raises(ValueError, match=r"T of 1 or more, got \(2, 0\)"):
        model(tokens, tokens[:, :0])
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.ones(3, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"shape \(2, 3\) and type bool"):
            model(tokens, tokens, mask)
        with pytest.raises(ValueError, match=r"shape \(2, 3\) and type bool"):
            model(tokens, tokens, None, mask)
