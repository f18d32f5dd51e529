"""The Transformer of Vaswani et al. 2017, "Attention Is All You Need" (https://arxiv.org/abs/1706.03762): encoder and decoder.

Section numbers below are the paper's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigmodel_utils.models.gpt import KVCache

SIZES = {  # table 3; dropout of the English-to-German models, 37,000 byte-pair entries for both languages (section 5.1)
    "transformer-base": {"n_layers": 6, "n_heads": 8, "d_model": 512, "d_ff": 2048, "dropout": 0.1},
    "transformer-big": {"n_layers": 6, "n_heads": 16, "d_model": 1024, "d_ff": 4096, "dropout": 0.3},
}

REFERENCE_PARTS = {  # of one layer of torch.nn.Transformer -> ours; its in_proj holds three of our matrices
    "self_attn.in_proj": ("self_attention.query", "self_attention.key", "self_attention.value"),
    "self_attn.out_proj": ("self_attention.output",),
    "multihead_attn.in_proj": ("cross_attention.query", "cross_attention.key", "cross_attention.value"),
    "multihead_attn.out_proj": ("cross_attention.output",),
    "linear1": ("feed_forward.0",),
    "linear2": ("feed_forward.2",),
    "norm1": ("residual_1.norm",),
    "norm2": ("residual_2.norm",),
    "norm3": ("residual_3.norm",),
}


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of an encoder-decoder Transformer; the defaults are the paper's base model.

    Raises:
        ValueError: for a size below 1, a width that the heads do not divide, or a dropout outside [0, 1).
    """

    n_layers: int = 6  # of the encoder, and as many of the decoder
    n_heads: int = 8  # attention heads a layer; each is d_model / n_heads wide
    d_model: int = 512  # width of a token's vector
    d_ff: int = 2048  # hidden units of a feed-forward network
    vocab_size: int = 37_000  # tokens of both languages together: they share one embedding
    dropout: float = 0.1  # of the embeddings and of every sublayer's output, in training
    norm_first: bool = False  # LayerNorm before each sublayer (pre-norm); the paper has it behind the sum (post-norm)
    final_norm: bool | None = None  # one more LayerNorm behind each stack, as in torch.nn.Transformer; None: with pre-norm
    attention_bias: bool = False  # biases of the attention's four maps: the paper has none, torch.nn.Transformer has them

    def __post_init__(self):
        for name in ("n_layers", "n_heads", "d_model", "d_ff", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a number of 1 or more, got {getattr(self, name)}")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads} does not divide d_model = {self.d_model}: the heads share the width")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {self.dropout}")

    @classmethod
    def named(cls, name: str) -> TransformerConfig:
        """One of the paper's: "transformer-base" or "transformer-big".

        Raises:
            ValueError: for another name, listing these.
        """
        if name not in SIZES:
            raise ValueError(f"no Transformer is named {name!r}: choose from {', '.join(SIZES)}")
        return cls(**SIZES[name])

    @property
    def has_final_norm(self) -> bool:
        """Whether a LayerNorm stands behind each stack."""
        return self.norm_first if self.final_norm is None else self.final_norm

    @property
    def n_parameters(self) -> int:
        """The embedding once (it is the output map too), then attention, feed-forward and LayerNorms of all layers."""
        C = self.d_model
        attention = 4 * (C * C + C * self.attention_bias)
        feed_forward = (C + 1) * self.d_ff + (self.d_ff + 1) * C
        norm = 2 * C
        encoder_layer = attention + feed_forward + 2 * norm
        decoder_layer = 2 * attention + feed_forward + 3 * norm
        return self.vocab_size * C + self.n_layers * (encoder_layer + decoder_layer) + 2 * norm * self.has_final_norm


def sinusoidal_positions(
    n_positions: int, d_model: int, device=None, dtype: torch.dtype = torch.float32, first: int = 0
) -> Tensor:
    """Sines and cosines of the position, wavelengths from 2 pi to 10,000 * 2 pi (section 3.5).

    Computed when asked for, not stored: any length is allowed, and nothing is lost when a model is built on the meta device.

    Args:
        first: the position that row 0 is for.

    Returns:
        (n_positions, d_model): column 2i is sin(position / 10000^(2i / d_model)), column 2i + 1 its cosine.
    """
    exact = torch.promote_types(dtype, torch.float32)  # bfloat16 cannot tell position 256 from 257
    position = torch.arange(first, first + n_positions, device=device, dtype=exact)  # (T)
    frequency = 10_000.0 ** (-torch.arange(0, d_model, 2, device=device, dtype=exact) / d_model)  # (C / 2)
    angle = torch.outer(position, frequency)  # (T, C / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :d_model].to(dtype)  # (T, C)


def key_mask(is_real: Tensor | None, n_rows: int, n_keys: int) -> Tensor | None:
    """A padding mask in the form that attention takes: every query may look at the real keys only.

    Args:
        is_real: (B, S), True where a token is real and False where it is padding, or None where all are real.

    Returns:
        (B, 1, 1, S), for all heads and queries, or None.

    Raises:
        ValueError: for another shape, or numbers in place of truth values (added to the scores, they would mask nothing).
    """
    if is_real is None:
        return None
    if is_real.dtype != torch.bool or is_real.shape != (n_rows, n_keys):
        raise ValueError(
            f"a mask is of shape ({n_rows}, {n_keys}) and type bool, True where a token is real; "
            f"got {tuple(is_real.shape)}, {is_real.dtype}"
        )
    return is_real[:, None, None, :]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d_head)) v: torch's fused kernel, but in bfloat16 on a CPU, where the products are faster alone.

    Args:
        q: queries (B, n_heads, T, d_head).
        k, v: keys and values (B, n_heads, S, d_head).
        mask: bool, True where a query may look at a key, of a shape that broadcasts to (B, n_heads, T, S).
        dropout: probability that a weight is set to 0.

    Returns:
        (B, n_heads, T, d_head)
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return F.dropout(attention_weights(q, k, mask), dropout) @ v


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """How much each query looks at each key, softmax(q k^T / sqrt(d_head)): (B, n_heads, T, S); arguments as for `attend`."""
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # finite: a row without keys gives no NaN
    return scores.softmax(dim=-1)


class DecoderCache(KVCache):
    """What a decoder has computed of the target so far, and of the source: a new token then costs one position.

    Args:
        n_layers: of the decoder.
        max_length: target tokens that there is room for.
    """

    def __init__(self, n_layers: int, max_length: int):
        super().__init__(n_layers, max_length)
        self.source: list[tuple[Tensor, Tensor] | None] = [None] * n_layers  # keys and values (B, n_heads, S, d_head)

    def select(self, rows: Tensor) -> None:
        """Let the batch be these rows (n,) of the present one, repeats allowed, as beam search needs it."""
        super().select(rows)
        self.source = [pair if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.source]


class Attention(nn.Module):
    """Multi-head attention, softmax(Q K^T / sqrt(d_head)) V in every head (section 3.2)."""

    def __init__(self, d_model: int, n_heads: int, *, bias: bool, dropout: float = 0.0):
        """dropout: of the attention's weights, in training; the paper has none there."""
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.query = nn.Linear(d_model, d_model, bias=bias)
        self.key = nn.Linear(d_model, d_model, bias=bias)
        self.value = nn.Linear(d_model, d_model, bias=bias)
        self.output = nn.Linear(d_model, d_model, bias=bias)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, n_heads, T, C / n_heads)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Every vector of x asks all vectors of memory.

        Args:
            x: (B, T, C), where the queries come from.
            memory: (B, S, C), where the keys and values come from; x itself in self-attention.
            mask: bool, True where a query may look at a key, of a shape that broadcasts to (B, n_heads, T, S).

        Returns:
            (B, T, C)
        """
        return self.ask(x, *self.keys_and_values(memory), mask)

    def keys_and_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """What can be asked about memory (B, S, C): keys and values, each (B, n_heads, S, d_head)."""
        return self.split_heads(self.key(memory)), self.split_heads(self.value(memory))

    def ask(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """`forward` with the memory's keys and values in place of the memory."""
        q = self.split_heads(self.query(x))  # (B, n_heads, T, d_head)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, n_heads, T, d_head)
        return self.output(y.transpose(1, 2).flatten(2))  # (B, T, C)


class Residual(nn.Module):
    """What surrounds a sublayer f: LayerNorm(x + dropout(f(x))) (section 3.1), or x + dropout(f(LayerNorm(x))) with pre-norm."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm_first = config.norm_first
        self.norm, self.dropout = nn.LayerNorm(config.d_model), nn.Dropout(config.dropout)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.norm_first:
            return x + self.dropout(sublayer(self.norm(x)))
        return self.norm(x + self.dropout(sublayer(x)))


def feed_forward(config: TransformerConfig) -> nn.Sequential:
    """max(0, x W_1 + b_1) W_2 + b_2, at every position alike (section 3.3)."""
    return nn.Sequential(nn.Linear(config.d_model, config.d_ff), nn.ReLU(), nn.Linear(config.d_ff, config.d_model))


class EncoderLayer(nn.Module):
    """Self-attention over the whole source, then the feed-forward network."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.self_attention = Attention(config.d_model, config.n_heads, bias=config.attention_bias)
        self.feed_forward = feed_forward(config)
        self.residual_1, self.residual_2 = Residual(config), Residual(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        x = self.residual_1(x, lambda y: self.self_attention(y, y, mask))
        return self.residual_2(x, self.feed_forward)


class DecoderLayer(nn.Module):
    """Self-attention over the target so far, attention to the encoded source, then the feed-forward network."""

    def __init__(self, config: TransformerConfig, index: int):
        super().__init__()
        self.index = index  # which layer it is, for the cache
        self.self_attention = Attention(config.d_model, config.n_heads, bias=config.attention_bias)
        self.cross_attention = Attention(config.d_model, config.n_heads, bias=config.attention_bias)
        self.feed_forward = feed_forward(config)
        self.residual_1, self.residual_2, self.residual_3 = Residual(config), Residual(config), Residual(config)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor, memory_mask: Tensor | None, cache: DecoderCache | None = None
    ) -> Tensor:
        """(B, T, C) and (B, S, C) -> (B, T, C)."""
        x = self.residual_1(x, lambda y: self.self_attention.ask(y, *self.target_keys(y, cache), mask))
        x = self.residual_2(x, lambda y: self.cross_attention.ask(y, *self.source_keys(memory, cache), memory_mask))
        return self.residual_3(x, self.feed_forward)

    def target_keys(self, y: Tensor, cache: DecoderCache | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the target: of y, and of what came before it where there is a cache."""
        new = self.self_attention.keys_and_values(y)
        return new if cache is None else cache.append(self.index, *new)

    def source_keys(self, memory: Tensor, cache: DecoderCache | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the source: computed once where there is a cache."""
        if cache is None:
            return self.cross_attention.keys_and_values(memory)
        if cache.source[self.index] is None:
            cache.source[self.index] = self.cross_attention.keys_and_values(memory)
        return cache.source[self.index]


class Transformer(nn.Module):
    """A source sentence and the target so far in, logits of the next target token out, at every target position."""

    def __init__(self, config: TransformerConfig = TransformerConfig()):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)  # source, target and output map (section 3.4)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config, index) for index in range(config.n_layers))
        self.encoder_norm = nn.LayerNorm(config.d_model) if config.has_final_norm else nn.Identity()
        self.decoder_norm = nn.LayerNorm(config.d_model) if config.has_final_norm else nn.Identity()
        self.initialize()

    def initialize(self) -> None:
        """Draw the weights: Glorot's uniform law for the maps; embeddings of variance 1 once scaled (the paper is silent)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=self.config.d_model**-0.5)

    def embed(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Token embeddings times sqrt(d_model), plus positions from `first` on (sections 3.4 and 3.5): (B, T) -> (B, T, C).

        Raises:
            ValueError: for tokens that are not a batch of one or more positions.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"expected tokens of shape (B, T) with T of 1 or more, got {tuple(tokens.shape)}")
        x = self.embedding(tokens)
        B, T, C = x.shape
        return self.dropout(x * math.sqrt(C) + sinusoidal_positions(T, C, x.device, x.dtype, first))

    def run_encoder(self, source_embeddings: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """The encoder's layers alone: (B, S, C) -> (B, S, C); `source_mask` as in `forward`."""
        B, S, C = source_embeddings.shape
        x, mask = source_embeddings, key_mask(source_mask, B, S)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x)

    def run_decoder(
        self,
        target_embeddings: Tensor,
        memory: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """The decoder's layers alone: (B, T, C) and the encoder's (B, S, C) -> (B, T, C); arguments as in `decode`."""
        B, T, C = target_embeddings.shape
        x, memory_mask = target_embeddings, key_mask(source_mask, B, memory.shape[1])
        before = 0 if cache is None else cache.length
        # A position sees itself and what came before.
        mask = torch.ones(T, before + T, dtype=torch.bool, device=x.device).tril(before)
        if target_mask is not None:
            mask = mask & key_mask(target_mask, B, before + T)  # (B, 1, T, before + T)
        for layer in self.decoder:
            x = layer(x, memory, mask, memory_mask, cache)
        if cache is not None:
            cache.length += T
        return self.decoder_norm(x)

    def run_stacks(
        self,
        source_embeddings: Tensor,
        target_embeddings: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Encoder and decoder between embeddings and output map, which is what torch.nn.Transformer computes.

        Args:
            source_embeddings: (B, S, C).
            target_embeddings: (B, T, C).
            source_mask, target_mask: as in `forward`.

        Returns:
            (B, T, C), the decoder's.
        """
        memory = self.run_encoder(source_embeddings, source_mask)
        return self.run_decoder(target_embeddings, memory, source_mask, target_mask)

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Read the source once: tokens (B, S) -> (B, S, C), the memory that `decode` asks; `source_mask` as in `forward`."""
        return self.run_encoder(self.embed(source), source_mask)

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Logits of the next token behind every position of the target.

        Args:
            target: (B, T) tokens; with a cache only those that it has not seen.
            memory: (B, S, C), the encoder's.
            source_mask, target_mask: as in `forward`; with a cache the target's mask covers what it has seen, too.
            cache: of this source and the target so far.

        Returns:
            (B, T, vocab_size)
        """
        x = self.embed(target, 0 if cache is None else cache.length)
        return F.linear(self.run_decoder(x, memory, source_mask, target_mask, cache), self.embedding.weight)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next target token at every target position.

        Args:
            source: (B, S) tokens.
            target: (B, T) tokens, begun by a start token: in training the translation shifted by one.
            source_mask: (B, S) bool, True where a token is real; None where there is no padding.
            target_mask: (B, T) bool likewise. Padding behind the sentence needs none: what comes before does not see it.

        Returns:
            (B, T, vocab_size)

        Raises:
            ValueError: for tokens or masks of another shape, or masks that are not bool.
        """
        return self.decode(target, self.encode(source, source_mask), source_mask, target_mask)

    def translate_reference(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """torch.nn.Transformer's entries under our names, its fused query-key-value matrices split; others unchanged.

        It has biases in its attention and a LayerNorm behind each stack (`attention_bias=True, final_norm=True`), and no
        embedding: ours stays.
        """
        translated, is_reference = {}, False
        for full_name, value in state_dict.items():
            name = full_name.removeprefix("transformer.")
            in_layer = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)[._](weight|bias)", name)
            behind = re.fullmatch(r"(encoder|decoder)\.norm\.(weight|bias)", name)
            if in_layer and in_layer[3] in REFERENCE_PARTS:
                stack, layer, part, kind = in_layer.groups()
                parts, is_reference = REFERENCE_PARTS[part], True
                for ours, share in zip(parts, value.chunk(len(parts))):
                    translated[f"{stack}.{layer}.{ours}.{kind}"] = share
            elif behind:
                translated[f"{behind[1]}_norm.{behind[2]}"] = value
            else:
                translated[full_name] = value
        if is_reference:
            translated.setdefault("embedding.weight", self.embedding.weight.detach())
        return translated


class Conditioned(nn.Module):
    """A Transformer that has read its sources: a causal model of the translation, for `predict.generate` and `beam_search`.

    Args:
        model: the Transformer; set it to evaluation first, since the sources are read here and now.
        source: (B, S) tokens.
        source_mask: (B, S) bool, True where a token is real; None where there is no padding.
        context_length: most tokens of a translation, its start and end included.
    """

    def __init__(self, model: Transformer, source: Tensor, source_mask: Tensor | None = None, context_length: int = 256):
        super().__init__()
        self.model, self.source_mask = model, source_mask
        self.memory = model.encode(source, source_mask)
        self.config = SimpleNamespace(vocab_size=model.config.vocab_size, context_length=context_length)

    def new_cache(self, max_length: int) -> DecoderCache:
        """An empty cache for translations of up to max_length tokens."""
        return DecoderCache(self.model.config.n_layers, max_length)

    def forward(self, tokens: Tensor, cache: DecoderCache | None = None) -> Tensor:
        """Logits (n B, T, vocab_size) behind the tokens (n B, T); the n translations of a source are neighbouring rows."""
        n = len(tokens) // len(self.memory)
        memory = self.memory.repeat_interleave(n, dim=0)
        mask = None if self.source_mask is None else self.source_mask.repeat_interleave(n, dim=0)
        return self.model.decode(tokens, memory, mask, cache=cache)


@torch.no_grad()
def cross_attention(model: Transformer, source: Tensor, target: Tensor, source_mask: Tensor | None = None) -> Tensor:
    """Where the decoder looks in the source while it writes: attention weights of every layer and head.

    Args:
        source: (B, S) tokens.
        target: (B, T) tokens, begun by a start token.
        source_mask: (B, S) bool, True where a token is real.

    Returns:
        (n_layers, B, n_heads, T, S); row t belongs to the choice of token t + 1.
    """
    found, hooks = [], []
    memory, mask = model.encode(source, source_mask), key_mask(source_mask, *source.shape)

    def keep(attention: Attention, queries: Tensor) -> None:
        keys, _ = attention.keys_and_values(memory)
        found.append(attention_weights(attention.split_heads(queries), keys, mask))

    for layer in model.decoder:
        hook = lambda _, inputs, queries, attention=layer.cross_attention: keep(attention, queries)  # noqa: E731
        hooks.append(layer.cross_attention.query.register_forward_hook(hook))
    try:
        model.decode(target, memory, source_mask)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)
