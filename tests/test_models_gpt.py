"""The GPT against transformers' GPT-2, Llama and Qwen3 in float64, and by the properties of a causal model."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_utils import models
from bigmodel_utils.models.gpt import GPT, GPTConfig, attend, linear, rotate, rotation

MODERN = {"position": "rotary", "norm": "rms", "feed_forward": "swiglu", "bias": False, "tied": False}
LAYOUTS = [  # n_heads, d_model and what else differs from GPT-2
    {"n_heads": 3, "d_model": 12},
    {"n_heads": 1, "d_model": 7, "d_ff": 5, "tied": False},
    {"n_heads": 6, "d_model": 24, "n_kv_heads": 2, "bias": False, "feed_forward": "relu2"},
    {"n_heads": 4, "d_model": 8, "n_kv_heads": 1, "qk_norm": True} | MODERN,
    {"n_heads": 2, "d_model": 12, "position": "rotary", "norm": "rms", "qk_norm": True},
]


def build(layout: dict, seed: int = 0, **changes) -> GPT:
    """A small model in float64 whose weights are large enough for attention to matter."""
    torch.manual_seed(seed)
    config = GPTConfig(**({"vocab_size": 13, "context_length": 9, "n_layers": 2} | layout | changes))
    model = GPT(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def draw_tokens(n_rows: int, length: int, seed: int = 0, vocab_size: int = 13) -> torch.Tensor:
    return torch.randint(vocab_size, (n_rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def transformers(transformers):
    """The reference library, in float64 throughout."""
    from transformers.models.gpt2 import modeling_gpt2
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen3 import modeling_qwen3

    class Double:
        """torch, except that float32 is float64: the reference rounds norms and angles to float32, whatever the weights."""

        float32 = float = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    with pytest.MonkeyPatch.context() as patch:
        for module in (modeling_gpt2, modeling_llama, modeling_qwen3):
            patch.setattr(module, "torch", Double())
        yield transformers


def make_gpt2(transformers, config: GPTConfig):
    """transformers' GPT-2 of our configuration."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.d_ff,
            activation_function={"gelu": "gelu_new", "relu2": "relu2"}[config.feed_forward],
            layer_norm_epsilon=config.norm_eps,
            tie_word_embeddings=config.tied,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def make_llama(transformers, config: GPTConfig):
    """transformers' Llama of our configuration, or its Qwen3, which has normalised queries and keys."""
    kind = "Qwen3" if config.qk_norm else "Llama"
    bias = {} if config.qk_norm else {"mlp_bias": config.bias}
    reference = getattr(transformers, f"{kind}Config")(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        hidden_size=config.d_model,
        head_dim=config.d_head,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
        attention_bias=config.bias,
        tie_word_embeddings=config.tied,
        bos_token_id=0,
        eos_token_id=0,
        **bias,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(reference)


def assert_equal_to_reference(reference, config: GPTConfig, n_rows: int, length: int, training: bool, padding: bool) -> None:
    """Same logits and, of a loss, same gradients, with the reference's weights drawn at random."""
    torch.manual_seed(length)
    reference = reference.double().train(training)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.4)
    model = GPT(config).double().train(training)
    models.load_reference(model, reference.state_dict())
    tokens = draw_tokens(n_rows, length, vocab_size=config.vocab_size)
    targets = draw_tokens(n_rows, length, 1, config.vocab_size)
    mask = torch.ones_like(tokens)
    if padding:  # on the right, from 1 to all tokens of a row left
        lengths = torch.randint(1, length + 1, (n_rows,))
        mask = (torch.arange(length) < lengths[:, None]).long()
        targets[mask == 0] = -100
    theirs = reference(input_ids=tokens, attention_mask=mask).logits
    ours = model(tokens)
    torch.testing.assert_close(ours[mask == 1], theirs[mask == 1], rtol=0, atol=1e-10)
    for logits in (ours, theirs):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    expected = model.translate_reference({name: parameter.grad for name, parameter in reference.named_parameters()})
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


GPT2S = [
    GPTConfig(vocab_size=11, context_length=8, n_layers=1, n_heads=1, d_model=5),
    GPTConfig(vocab_size=17, context_length=13, n_layers=3, n_heads=3, d_model=15, d_ff=7, tied=False, norm_eps=1e-3),
    GPTConfig(vocab_size=23, context_length=16, n_layers=2, n_heads=7, d_model=21, feed_forward="relu2"),
]
LLAMAS = [
    GPTConfig.modern(vocab_size=11, context_length=8, n_layers=1, n_heads=1, d_model=6),
    GPTConfig.modern(vocab_size=17, context_length=13, n_layers=3, n_heads=6, n_kv_heads=2, d_model=24, d_ff=7, norm_eps=1e-3),
    GPTConfig.modern(vocab_size=23, context_length=16, n_layers=2, n_heads=5, n_kv_heads=1, d_model=20, tied=True, bias=True),
    GPTConfig.modern(
        vocab_size=19, context_length=11, n_layers=2, n_heads=4, n_kv_heads=2, d_model=16, qk_norm=True, rotary_base=50.0
    ),
]


@pytest.mark.parametrize("config", GPT2S + LLAMAS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_logits_and_gradients_equal_the_reference(transformers, config, training, padding):
    make = make_llama if config.position == "rotary" else make_gpt2
    for n_rows, length in ((2, 1), (3, 6), (1, config.context_length)):
        assert_equal_to_reference(make(transformers, config), config, n_rows, length, training, padding)


def test_unpatched_reference_agrees_in_float32(transformers):
    config = LLAMAS[1]
    reference = make_llama(transformers, config)
    model = GPT(config)
    models.load_reference(model, reference.state_dict())
    tokens = draw_tokens(2, 13)
    torch.testing.assert_close(model(tokens), reference(tokens).logits.float(), rtol=1e-4, atol=1e-5)


def test_files_without_prefix_or_head_and_with_masks_load(transformers):
    config = GPT2S[0]
    reference = make_gpt2(transformers, config).double()
    bare = reference.transformer.state_dict() | {
        "h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    model = GPT(config).double()
    models.load_reference(model, bare)
    torch.testing.assert_close(model(draw_tokens(1, 8, 0, 11)), reference(draw_tokens(1, 8, 0, 11)).logits, rtol=0, atol=1e-10)
    llama = make_llama(transformers, LLAMAS[2]).double()
    models.load_reference(GPT(LLAMAS[2]), llama.model.state_dict())


def test_what_does_not_fit_is_named(transformers):
    state = make_gpt2(transformers, GPT2S[0]).state_dict()
    for change, message in (
        (
            {"transformer.h.0.mlp.c_fc.weight": torch.zeros(5, 21)},
            r"blocks.0.feed_forward.up.weight is \(21, 5\), not \(20, 5\)",
        ),
        ({"transformer.h.1.ln_1.weight": torch.zeros(5)}, "blocks.1.norm1.weight is unexpected"),
        ({"lm_head.weight": torch.zeros(11, 5)}, "head.weight is unexpected"),  # the file's output layer is not its embedding
        ({"extra.thing": torch.zeros(1)}, "extra.thing is unexpected"),
    ):
        with pytest.raises(ValueError, match=message):
            models.load_reference(GPT(GPT2S[0]), state | change)
    state.pop("transformer.wpe.weight")
    with pytest.raises(ValueError, match="position_embedding.weight is missing"):
        models.load_reference(GPT(GPT2S[0]), state)


# Sizes.


@pytest.mark.parametrize(
    ("name", "n_parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_published_sizes(name, n_parameters):
    config = GPTConfig.named(name)
    with torch.device("meta"):
        model = GPT(config)
    assert models.count_parameters(config) == models.count_parameters(model) == n_parameters
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_modern_layout_at_llamas_size_has_its_published_parameters():
    config = GPTConfig.modern(vocab_size=32000, context_length=2048, n_layers=32, n_heads=32, d_model=4096, d_ff=11008)
    assert config.n_parameters == 6_738_415_616  # LLaMA 7B


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 30), st.integers(0, 3),
    st.sampled_from(["learned", "rotary"]), st.sampled_from(["layer", "rms"]), st.sampled_from(["gelu", "swiglu", "relu2"]),
    st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_formula_counts_the_parameters(group, n_kv, pairs, vocab_size, n_layers, position, norm, kind, bias, qk_norm, tied):
    config = GPTConfig(
        vocab_size,
        5,
        n_layers + 1,
        group * n_kv,
        group * n_kv * pairs * 2,
        None,
        n_kv,
        position,
        norm,
        kind,
        bias,
        qk_norm,
        tied,
    )
    model = GPT(config)
    assert config.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert config.n_parameters == sum(value.numel() for value in model.state_dict().values())  # nothing derivable is stored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "n_layers must be 1 or more"),
        ({"d_ff": 0}, "d_ff must be 1 or more"),
        ({"n_kv_heads": 0}, "n_kv_heads must be 1 or more"),
        ({"d_model": 770}, "n_heads must divide d_model"),
        ({"n_kv_heads": 5}, "n_kv_heads must divide n_heads"),
        ({"position": "sine"}, "position must be one of learned, rotary, got 'sine'"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"feed_forward": "relu"}, "feed_forward must be one of"),
        ({"position": "rotary", "d_model": 36}, "must be even, got 3"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_senseless_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="gpt2, gpt2-medium, gpt2-large, gpt2-xl"):
        GPTConfig.named("gpt3")


def test_configurations_survive_a_round_trip_and_fill_in_again():
    config = GPTConfig.modern(n_heads=8, d_model=64)
    assert GPTConfig(**dataclasses.asdict(config)) == config and config.d_ff == 176 and config.n_kv_heads == 8
    wide = dataclasses.replace(config, d_model=96, d_ff=None)
    assert wide.d_ff == 256 and config.d_head == 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_start_is_gpt2s_and_knows_nothing(layout):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            **(
                {"vocab_size": 500, "context_length": 32, "n_layers": 8}
                | layout
                | {"n_heads": 2, "d_model": 64, "n_kv_heads": 1}
            )
        )
    )
    block = model.blocks[3]
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.feed_forward.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert block.attention.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    tokens = draw_tokens(8, 32, vocab_size=500)
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), draw_tokens(8, 32, 1, 500).flatten())
    assert loss.item() == pytest.approx(math.log(500), abs=0.1)


# What a causal model must not do, and may.


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(LAYOUTS), st.integers(1, 3), st.integers(2, 9), st.data())
def test_nothing_leaks_from_the_future(layout, n_rows, length, data):
    model, tokens = build(layout), draw_tokens(n_rows, length)
    changed_from = data.draw(st.integers(1, length - 1))
    other = tokens.clone()
    other[:, changed_from:] = (other[:, changed_from:] + data.draw(st.integers(1, 12))) % 13
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :changed_from], after[:, :changed_from])
    assert not torch.equal(before[:, changed_from:], after[:, changed_from:])
    gradient = torch.autograd.grad(before[:, changed_from - 1].sum(), model.token_embedding.weight)[0]
    if layout.get("tied") is False:  # tokens that occur later only have no part in it
        later = set(tokens[:, changed_from:].flatten().tolist()) - set(tokens[:, :changed_from].flatten().tolist())
        assert all(not gradient[token].any() for token in later)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(LAYOUTS), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_rows_do_not_depend_on_their_batch_or_padding(layout, lengths, seed):
    model, tokens = build(layout), draw_tokens(len(lengths), max(lengths), seed)
    together = model(tokens)
    for row, length in enumerate(lengths):  # alone and without what follows
        torch.testing.assert_close(together[row, :length], model(tokens[row : row + 1, :length])[0], rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(LAYOUTS), st.lists(st.integers(1, 5), min_size=1, max_size=9), st.integers(1, 3))
def test_cache_changes_nothing_in_chunks_of_any_size(layout, chunks, n_rows):
    ends = [end for end in itertools.accumulate(chunks) if end <= 9] or [chunks[0]]
    model, tokens = build(layout), draw_tokens(n_rows, ends[-1])
    cache = model.new_cache(ends[-1])
    with torch.no_grad():
        parts = [model(tokens[:, start:end], cache) for start, end in itertools.pairwise([0, *ends])]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=0, atol=1e-11)
    assert cache.length == ends[-1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cache_changes_nothing_one_by_one(layout):
    model, tokens = build(layout), draw_tokens(2, 9)
    cache = model.new_cache()
    with torch.no_grad():
        for length in range(1, 10):
            step = model(tokens[:, length - 1 : length], cache)
            torch.testing.assert_close(step[:, 0], model(tokens[:, :length])[:, -1], rtol=0, atol=1e-11)
    heads = model.config.n_kv_heads * model.config.d_head
    assert cache.n_bytes == 2 * 2 * 2 * 9 * heads * 8  # layers, keys and values, rows, tokens, numbers, bytes


@torch.no_grad()
def test_cache_rows_can_be_selected_and_repeated():
    model, tokens, rows = build(LAYOUTS[3]), draw_tokens(3, 9), torch.tensor([2, 0, 0, 1])
    cache = model.new_cache()
    model(tokens[:, :5], cache)
    cache.select(rows)
    torch.testing.assert_close(model(tokens[rows, 5:], cache), model(tokens[rows])[:, 5:], rtol=0, atol=1e-11)


@torch.no_grad()
def test_cache_refuses_what_it_has_no_room_for_and_stays_valid():
    model, tokens = build(LAYOUTS[0]), draw_tokens(2, 9)
    cache = model.new_cache(6)
    model(tokens[:, :4], cache)
    with pytest.raises(ValueError, match="7 tokens do not fit the cache of 6"):
        model(tokens[:, 4:7], cache)
    with pytest.raises(ValueError, match="batch of 2 sequences and cannot go on with one of 1"):
        model(tokens[:1, 4:5], cache)
    torch.testing.assert_close(model(tokens[:, 4:6], cache), model(tokens[:, :6])[:, 4:], rtol=0, atol=1e-11)
    assert model.new_cache(100).max_length == 9


def test_training_through_a_cache_is_an_error_not_a_wrong_gradient():
    model, tokens = build(LAYOUTS[0]), draw_tokens(1, 4)
    cache = model.new_cache()
    first, second = model(tokens[:, :2], cache), model(tokens[:, 2:], cache)
    with pytest.raises(RuntimeError, match="inplace"):
        (first.sum() + second.sum()).backward()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.long), r"shape \(B, T\), T >= 1, got torch.int64 \(3,\)"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"\(1, 2, 3\)"),
        (torch.zeros(1, 0, dtype=torch.long), r"\(1, 0\)"),
        (torch.zeros(1, 2), "torch.float32"),
        (torch.zeros(1, 10, dtype=torch.long), "10 tokens do not fit the context of 9"),
        (torch.tensor([[0, 13]]), r"0 \.\.\. 12, got 0 \.\.\. 13"),
        (torch.tensor([[-1, 3]]), r"got -1 \.\.\. 3"),
    ],
)
def test_unreadable_tokens_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        build(LAYOUTS[0])(tokens)


def test_dropout_acts_in_training_only():
    model, tokens = build(LAYOUTS[3], dropout=0.3).train(), draw_tokens(1, 9)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(model(tokens), build(LAYOUTS[3])(tokens))


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_rotated_products_depend_on_distance_alone(pairs, i, j, shift):
    torch.manual_seed(pairs)
    q, k = torch.randn(2, 1, 1, 1, 2 * pairs, dtype=torch.float64)

    def turned(x, position):
        return rotate(x, *rotation(torch.tensor([position]), 2 * pairs, 100.0, x.dtype))

    there, elsewhere = (torch.sum(turned(q, i + by) * turned(k, j + by)).item() for by in (0, shift))
    assert there == pytest.approx(elsewhere, abs=1e-9)
    assert turned(q, i).norm().item() == pytest.approx(q.norm().item(), rel=1e-12)


def test_rotation_equals_multiplication_by_complex_numbers():
    x = torch.randn(1, 1, 7, 6, dtype=torch.float64)
    turned = rotate(x, *rotation(torch.arange(7), 6, 10.0, x.dtype))
    number = torch.complex(x[..., :3], x[..., 3:])
    angle = torch.tensor([[p * 10.0 ** (-2 * i / 6) for i in range(3)] for p in range(7)], dtype=torch.float64)
    expected = number * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], dim=-1), rtol=0, atol=1e-12)


def test_half_precision_counts_positions_apart():
    cos, sin = rotation(torch.tensor([256, 257]), 8, 10_000.0, torch.bfloat16)
    assert cos.dtype == torch.float32 and not torch.equal(cos[0], cos[1])


# Shortcuts on the CPU.


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(0, 20), st.integers(0, 99))
def test_attention_in_bfloat16_is_attention(n_rows, n_kv, group, length, n_before, seed):
    """Written out in bfloat16, against torch's kernel in float64 on the same numbers: values and gradients."""
    torch.manual_seed(seed)
    shapes = [(n_rows, n_kv * group, length, 16)] + 2 * [(n_rows, n_kv, n_before + length, 16)]
    short = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in short]
    found, expected = attend(*short), attend(*exact)
    weights = torch.randn(found.shape, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.03)
    for ours, theirs in zip(short, exact):
        torch.testing.assert_close(
            ours.grad.double(), theirs.grad, rtol=0.02, atol=0.05 * max(1.0, theirs.grad.abs().max().item())
        )
    if length > 1:  # what comes later is not seen
        changed = [tensor.detach().clone() for tensor in short]
        changed[1][:, :, -1], changed[2][:, :, -1] = 7.0, 9.0
        assert torch.equal(attend(*changed)[:, :, :-1], found[:, :, :-1])


def test_dropout_in_bfloat16_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 8, dtype=torch.bfloat16) for _ in range(3))
    mean = attend(q.expand(4000, -1, -1, -1), k, v, dropout=0.4).float().mean(dim=0, keepdim=True)
    torch.testing.assert_close(mean, attend(q, k, v).float(), rtol=0, atol=0.1)
    assert not torch.equal(attend(q, k, v, dropout=0.4), attend(q, k, v))


@pytest.mark.parametrize("shape", [(7,), (1, 7), (1, 1, 7), (2, 7), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_row_times_a_matrix_is_torchs(shape, dtype, bias):
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(5, 7, dtype=dtype, requires_grad=True)
    offset = torch.randn(5, dtype=dtype, requires_grad=True) if bias else None
    expected = torch.nn.functional.linear(x, weight, offset).detach()
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, offset), expected)
        torch.testing.assert_close(linear(x.unsqueeze(-1).mT.squeeze(-2), weight, offset), expected)
    assert linear(x, weight, offset).requires_grad
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, offset).dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.export itself
@torch.no_grad()
def test_one_token_can_be_exported():
    model, tokens = build(LAYOUTS[0]), draw_tokens(1, 1)
    program = torch.export.export(model, (tokens,))
    torch.testing.assert_close(program.module()(tokens), model(tokens), rtol=0, atol=1e-12)
    assert "linear" in str(program.graph)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_runs_under_autocast_with_and_without_cache(layout):
    model, tokens = build(layout).float(), draw_tokens(2, 9)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model.new_cache()
        parts = torch.cat([model(tokens[:, :5], cache), model(tokens[:, 5:], cache)], dim=1)
        whole = model(tokens)
    scale = model(tokens).detach().std()
    assert (whole.float() - model(tokens)).abs().max() < 0.3 * scale
    assert (parts.float() - model(tokens)).abs().max() < 0.3 * scale


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_built_on_meta_takes_its_weights_later(layout):
    model = build(layout)
    with torch.device("meta"):
        empty = GPT(model.config)
    filled = empty.double().to_empty(device="cpu").eval()
    filled.load_state_dict(model.state_dict())
    assert torch.equal(filled(draw_tokens(2, 9)), model(draw_tokens(2, 9)))
