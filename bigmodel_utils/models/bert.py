"""BERT, Devlin et al. 2018 (https://arxiv.org/abs/1810.04805): the Transformer's encoder, read in both directions.

Three things differ from the encoder in transformer.py: positions are learned, a segment embedding tells sentence A from
sentence B, and the feed-forward network bends by GELU. Heads for the paper's tasks are options.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigmodel_utils.models.transformer import Attention, key_mask

SIZES = {  # section 3; the feed-forward network is four times as wide as the model
    "bert-base": {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_ff": 3072},
    "bert-large": {"n_layers": 24, "n_heads": 16, "d_model": 1024, "d_ff": 4096},
}

REFERENCE_PARTS = {  # names of transformers -> ours
    "embeddings.word_embeddings": "tokens",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "segments",
    "embeddings.LayerNorm": "norm",
    "pooler.dense": "pooler",
    "cls.predictions.transform.dense": "masked_lm.dense",
    "cls.predictions.transform.LayerNorm": "masked_lm.norm",
    "cls.predictions": "masked_lm",
    "cls.seq_relationship": "next_sentence",
    "classifier": "token_classifier",
}
REFERENCE_LAYER_PARTS = {  # the same within one layer
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.0",
    "output.dense": "feed_forward.2",
    "output.LayerNorm": "feed_forward_norm",
}


@dataclass(frozen=True)
class BERTConfig:
    """Shape of a BERT and the heads that it has; the defaults are BERT-base, uncased, with its pooler.

    Raises:
        ValueError: for a size below 1, a width that the heads do not divide, a dropout outside [0, 1), an epsilon that is
            not positive, or next-sentence prediction without the pooler that it reads.
    """

    n_layers: int = 12  # encoder layers
    n_heads: int = 12  # attention heads a layer; each is d_model / n_heads wide
    d_model: int = 768  # width of a token's vector
    d_ff: int = 3072  # hidden units of a feed-forward network
    vocab_size: int = 30_522  # WordPiece tokens, lower-cased English
    context_length: int = 512  # most tokens a row: each position has a learned vector
    n_segments: int = 2  # sentence A, sentence B
    dropout: float = 0.1  # of the embeddings, of attention's weights and of every sublayer's output, in training
    norm_eps: float = 1e-12  # added to the variance in LayerNorm; of the released models
    pooler: bool = True  # tanh(W x + b) of the first position, which stands for the whole row
    masked_lm: bool = False  # logits of the token that a [MASK] hides; its output matrix is the token embedding
    next_sentence: bool = False  # logits of two classes, from the pooler: B follows A, B does not
    n_row_labels: int = 0  # classes of a label for the row, such as sentiment, from the pooler or, without, the mean vector
    n_token_labels: int = 0  # classes of a label for every token, such as named entities; 0: no such head

    def __post_init__(self):
        for name in ("n_layers", "n_heads", "d_model", "d_ff", "vocab_size", "context_length", "n_segments"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a number of 1 or more, got {getattr(self, name)}")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads} does not divide d_model = {self.d_model}: the heads share the width")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {self.dropout}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps is a small positive number, got {self.norm_eps}")
        for name in ("n_row_labels", "n_token_labels"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is 0 or more, got {getattr(self, name)}")
        if self.next_sentence and not self.pooler:
            raise ValueError("next_sentence reads the pooler's output: set pooler=True")

    @classmethod
    def named(cls, name: str) -> BERTConfig:
        """One of the paper's, "bert-base" or "bert-large", with its pooler; `dataclasses.replace` adds heads.

        Raises:
            ValueError: for another name, listing these.
        """
        if name not in SIZES:
            raise ValueError(f"no BERT is named {name!r}: choose from {', '.join(SIZES)}")
        return cls(**SIZES[name])

    @property
    def n_parameters(self) -> int:
        """Embeddings, layers and the heads that are there; the masked LM's output matrix is the token embedding's."""
        C, norm, square = self.d_model, 2 * self.d_model, (self.d_model + 1) * self.d_model
        embeddings = (self.vocab_size + self.context_length + self.n_segments) * C + norm
        layer = 4 * square + norm + (C + 1) * self.d_ff + (self.d_ff + 1) * C + norm
        heads = self.pooler * square + self.masked_lm * (square + norm + self.vocab_size)
        heads += (2 * self.next_sentence + self.n_row_labels + self.n_token_labels) * (C + 1)
        return embeddings + self.n_layers * layer + heads


class BERTOutput(NamedTuple):
    """What a BERT says of a batch; None for the heads that it does not have."""

    hidden: Tensor  # (B, T, C), one vector a token
    pooled: Tensor | None  # (B, C), one vector a row
    masked_lm_logits: Tensor | None  # (B, T, vocab_size)
    next_sentence_logits: Tensor | None  # (B, 2): class 0 is "B follows A"
    row_logits: Tensor | None  # (B, n_row_labels)
    token_logits: Tensor | None  # (B, T, n_token_labels)


class Layer(nn.Module):
    """Self-attention, then the feed-forward network, each added to its input and normalised behind the sum."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        C = config.d_model
        self.attention = Attention(C, config.n_heads, bias=True, dropout=config.dropout)
        self.attention_norm = nn.LayerNorm(C, eps=config.norm_eps)
        self.feed_forward = nn.Sequential(nn.Linear(C, config.d_ff), nn.GELU(), nn.Linear(config.d_ff, C))
        self.feed_forward_norm = nn.LayerNorm(C, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.attention_norm(x + self.dropout(self.attention(x, x, mask)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class MaskedLMHead(nn.Module):
    """Logits over the vocabulary: one hidden layer, then the transposed token embedding (section 3.1, task 1)."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """(B, T, C) and the token embedding (vocab_size, C) -> (B, T, vocab_size)."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), embedding, self.bias)


class BERT(nn.Module):
    """Token ids in; a vector a token, and what the heads make of them, out."""

    def __init__(self, config: BERTConfig = BERTConfig()):
        super().__init__()
        self.config = config
        C = config.d_model
        self.tokens = nn.Embedding(config.vocab_size, C)
        self.positions = nn.Embedding(config.context_length, C)
        self.segments = nn.Embedding(config.n_segments, C)
        self.norm, self.dropout = nn.LayerNorm(C, eps=config.norm_eps), nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.pooler = nn.Linear(C, C) if config.pooler else None
        self.masked_lm = MaskedLMHead(config) if config.masked_lm else None
        self.next_sentence = nn.Linear(C, 2) if config.next_sentence else None
        self.row_classifier = nn.Linear(C, config.n_row_labels) if config.n_row_labels else None
        self.token_classifier = nn.Linear(C, config.n_token_labels) if config.n_token_labels else None
        self.initialize()

    def initialize(self) -> None:
        """Draw the weights as the released code did: a normal law of deviation 0.02, cut at two deviations; biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, mask: Tensor | None = None) -> BERTOutput:
        """Read a batch of rows.

        Args:
            tokens: (B, T) token ids; the first of a row is [CLS] where the pooler is used.
            segments: (B, T) of 0 for sentence A and 1 for sentence B; None: all A.
            mask: (B, T) bool, True where a token is real; None where there is no padding.

        Raises:
            ValueError: for rows that are empty or longer than the context, or segments or a mask of another shape or type.
        """
        x = self.embed(tokens, segments)
        return self.run_heads(self.run_layers(x, mask), mask)

    def embed(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """The sum of three vectors for each token, normalised: (B, T) -> (B, T, C); arguments and errors as in `forward`."""
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.config.context_length:
            raise ValueError(f"expected tokens (B, T) with T from 1 to {self.config.context_length}, got {tuple(tokens.shape)}")
        segments = torch.zeros_like(tokens) if segments is None else segments
        if segments.shape != tokens.shape:
            raise ValueError(f"expected segments of the tokens' shape {tuple(tokens.shape)}, got {tuple(segments.shape)}")
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]] + self.segments(segments)  # (B, T, C)
        return self.dropout(self.norm(x))

    def run_layers(self, x: Tensor, mask: Tensor | None = None, first: int = 0, last: int | None = None) -> Tensor:
        """The layers from `first` up to, not including, `last` (None: all): (B, T, C) -> (B, T, C); `mask` as in `forward`."""
        mask = key_mask(mask, *x.shape[:2])  # (B, 1, 1, T)
        for layer in self.layers[first:last]:
            x = layer(x, mask)
        return x

    def run_heads(self, x: Tensor, mask: Tensor | None = None) -> BERTOutput:
        """What the heads make of the last layer's (B, T, C); `mask` as in `forward`."""
        pooled = None if self.pooler is None else torch.tanh(self.pooler(x[:, 0]))  # (B, C)
        row_logits = None
        if self.row_classifier is not None:
            row_logits = self.row_classifier(self.dropout(mean_vector(x, mask) if pooled is None else pooled))
        return BERTOutput(
            hidden=x,
            pooled=pooled,
            masked_lm_logits=None if self.masked_lm is None else self.masked_lm(x, self.tokens.weight),
            next_sentence_logits=None if self.next_sentence is None else self.next_sentence(pooled),
            row_logits=row_logits,
            token_logits=None if self.token_classifier is None else self.token_classifier(self.dropout(x)),
        )

    def translate_reference(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Entries of transformers' BertModel or of its BertFor... models with our heads, under our names.

        A "classifier" is the token labels' where this model has them, else the row label's. Left out: position ids (they count from 0), and the masked LM's output matrix and second bias where they repeat the
        token embedding and the first. Old files' gamma and beta are a LayerNorm's weight and bias.
        """
        plain = {name.removeprefix("bert."): value for name, value in state_dict.items()}
        repeated = {
            "cls.predictions.decoder.weight": plain.get("embeddings.word_embeddings.weight"),
            "cls.predictions.decoder.bias": plain.get("cls.predictions.bias"),
        }
        translated = {}
        for full_name, value in state_dict.items():
            name = full_name.removeprefix("bert.")
            original = repeated.get(name)
            if name == "embeddings.position_ids" or (original is not None and torch.equal(value, original)):
                continue
            ours = our_name(name) or full_name
            if ours.startswith("token_classifier.") and self.token_classifier is None:
                ours = f"row_{ours.removeprefix('token_')}"
            translated[ours] = value
        return translated


def mean_vector(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of the real tokens' vectors: (B, T, C) -> (B, C); mask (B, T) bool, True where a token is real."""
    if mask is None:
        return x.mean(dim=1)
    weight = mask[..., None].to(x.dtype)  # (B, T, 1)
    return (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def our_name(name: str) -> str | None:
    """The name in our BERT of a parameter of transformers' (without its prefix "bert."), None where there is none."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    part, _, kind = name.rpartition(".")
    if kind in ("weight", "bias") and part in REFERENCE_PARTS:
        return f"{REFERENCE_PARTS[part]}.{kind}"
    in_layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", part)
    if kind in ("weight", "bias") and in_layer and in_layer[2] in REFERENCE_LAYER_PARTS:
        return f"layers.{in_layer[1]}.{REFERENCE_LAYER_PARTS[in_layer[2]]}.{kind}"
    return None
