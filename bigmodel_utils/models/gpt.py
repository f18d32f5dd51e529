"""The GPT: a decoder-only transformer that predicts the next token from the tokens before it.

One configuration spans GPT-2 (Radford et al. 2019) and what followed it: rotary positions (Su et al. 2021), RMSNorm
(Zhang and Sennrich 2019), SwiGLU (Shazeer 2020) or squared ReLU (So et al. 2021), grouped-query attention (Ainslie et
al. 2023), normalised queries and keys (Henry et al. 2020), and an output layer of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Position = Literal["learned", "rotary"]
Norm = Literal["layer", "rms"]
FeedForwardKind = Literal["gelu", "swiglu", "relu2"]


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and layout; the defaults are GPT-2's smallest.

    `d_ff` and `n_kv_heads` are filled in where they are None; `dataclasses.replace` with another `d_model` or `n_heads`
    needs `d_ff=None, n_kv_heads=None` to fill them in again.

    Raises:
        ValueError: for sizes that are not positive or do not divide, or an unknown layout.
    """

    vocab_size: int = 50257  # different tokens
    context_length: int = 1024  # tokens that the model can read at once
    n_layers: int = 12  # blocks of attention and feed-forward
    n_heads: int = 12  # attention heads a layer
    d_model: int = 768  # numbers that stand for a token, from layer to layer
    d_ff: int | None = None  # hidden width of the feed-forward; None: 4 d_model, for SwiGLU 8/3 of it, up to a multiple of 8
    n_kv_heads: int | None = None  # heads with keys and values of their own, each serving n_heads / n_kv_heads; None: all
    position: Position = "learned"  # a vector added to each position, or queries and keys rotated by it
    norm: Norm = "layer"
    feed_forward: FeedForwardKind = "gelu"
    bias: bool = True  # in linear maps and layer norms
    qk_norm: bool = False  # RMSNorm of each head's queries and keys
    tied: bool = True  # the output layer is the embedding, transposed
    dropout: float = 0.0  # probability, in training, on embeddings, attention weights and what blocks add; GPT-2 had 0.1
    norm_eps: float = 1e-5  # added to the variance, against division by 0
    rotary_base: float = 10_000.0  # the slowest pair of numbers turns by about 1 / base radians a token

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.d_ff is None:
            width = 8 * math.ceil(self.d_model / 3) if self.feed_forward == "swiglu" else 4 * self.d_model
            object.__setattr__(self, "d_ff", width)
        for name in ("vocab_size", "context_length", "n_layers", "n_heads", "d_model", "d_ff", "n_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads must divide d_model, and n_kv_heads must divide n_heads, "
                f"got d_model = {self.d_model}, n_heads = {self.n_heads}, n_kv_heads = {self.n_kv_heads}"
            )
        for name, known in (("position", Position), ("norm", Norm), ("feed_forward", FeedForwardKind)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {getattr(self, name)!r}")
        if self.position == "rotary" and self.d_head % 2:
            raise ValueError(f"rotary positions turn pairs of numbers: d_model / n_heads must be even, got {self.d_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {self.dropout}")
        if self.norm_eps <= 0 or self.rotary_base <= 0:
            raise ValueError(f"norm_eps and rotary_base must be positive, got {self.norm_eps} and {self.rotary_base}")

    @classmethod
    def named(cls, name: str) -> GPTConfig:
        """A published size (Radford et al. 2019, table 2, whose parameter counts are too low; heads from the released files).

        Raises:
            ValueError: for an unknown name.
        """
        sizes = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
        if name not in sizes:
            raise ValueError(f"unknown GPT {name!r}: choose from {', '.join(sizes)}")
        n_layers, n_heads, d_model = sizes[name]
        return cls(n_layers=n_layers, n_heads=n_heads, d_model=d_model)

    @classmethod
    def modern(cls, **changes) -> GPTConfig:
        """The layout of LLaMA (Touvron et al. 2023, section 2.2), with GPT-2's smallest sizes where `changes` has none."""
        layout = {"position": "rotary", "norm": "rms", "feed_forward": "swiglu", "bias": False, "tied": False}
        return cls(**(layout | changes))

    @classmethod
    def fast(cls, **changes) -> GPTConfig:
        """A layout that learns from fewer tokens: rotary, RMSNorm, squared ReLU, normalised queries and keys, no biases.

        With GPT-2's smallest sizes where `changes` has none. `optim.Muon` and `optim.trapezoid` go with it; what each part
        is worth on this course's text, `benchmarks/recipe.py` measures.

        Source: Jordan et al. 2024, https://github.com/KellerJordan/modded-nanogpt; each part's own in this file's beginning.
        """
        layout = {"position": "rotary", "norm": "rms", "feed_forward": "relu2", "qk_norm": True, "bias": False}
        return cls(**(layout | changes))

    @property
    def d_head(self) -> int:
        """Numbers in one head's query, key or value."""
        return self.d_model // self.n_heads

    @property
    def n_parameters(self) -> int:
        """All weights, the tied embedding once."""
        d, n_qkv = self.d_model, (self.n_heads + 2 * self.n_kv_heads) * self.d_head
        n_up = (2 if self.feed_forward == "swiglu" else 1) * self.d_ff
        bias = int(self.bias)
        attention = (d + bias) * n_qkv + (d + bias) * d + 2 * self.d_head * self.qk_norm
        feed_forward = (d + bias) * n_up + (self.d_ff + bias) * d
        norm = d * (1 + bias * (self.norm == "layer"))
        embeddings = self.vocab_size * d * (1 if self.tied else 2) + self.context_length * d * (self.position == "learned")
        return embeddings + self.n_layers * (attention + feed_forward + 2 * norm) + norm


class KVCache:
    """Keys and values of the tokens read so far, so that the next token costs one position and not all of them.

    For inference: keys and values are written in place, and a backward pass through them raises an error.

    Args:
        n_layers: of the model.
        max_length: tokens that there is room for.
    """

    def __init__(self, n_layers: int, max_length: int):
        self.length, self.max_length = 0, max_length  # tokens read, and the most
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layers  # keys and values (B, H, max_length, d_head)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H, T, d_head) of a layer; return all of its, (B, H, length + T, d_head).

        The model adds T to `length` once every layer has stored its own.

        Raises:
            ValueError: for another batch than the stored one.
        """
        B, H, T, d_head = k.shape
        if self.layers[layer] is None:
            self.layers[layer] = (k.new_empty(B, H, self.max_length, d_head), v.new_empty(B, H, self.max_length, d_head))
        keys, values = self.layers[layer]
        if len(keys) != B:
            raise ValueError(f"the cache holds a batch of {len(keys)} sequences and cannot go on with one of {B}")
        end = self.length + T
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Let the batch be these rows (n,) of the present one, repeats allowed, as beam search needs it."""
        self.layers = [pair if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.layers]

    @property
    def n_bytes(self) -> int:
        """Memory held, including room not yet used."""
        return sum(part.numel() * part.element_size() for pair in self.layers if pair is not None for part in pair)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., d_in) -> (..., d_out).

    A single row on the CPU, such as a token being generated, goes to NumPy's library (OpenBLAS). All the work is then to
    read the weights, and torch's (MKL) reads them at a half to a third of the speed (measured on AMD's Zen 5).
    """
    is_plain = x.is_cpu and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    is_traced = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if x.numel() != weight.shape[1] or not is_plain or is_traced:
        return F.linear(x, weight, bias)
    y = torch.from_numpy(x.numpy() @ weight.numpy().T)
    return y if bias is None else y.add_(bias)


class Linear(nn.Linear):
    """torch's, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the weight's precision, under autocast as well."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return super().forward(x.to(self.weight.dtype))


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    """Layer norm, or RMSNorm, which neither subtracts the mean nor adds a bias."""
    if config.norm == "rms":
        return RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def rotation(positions: Tensor, d_head: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, d_head / 2) of the angles p * base^(-2 i / d_head) (Su et al. 2021, equation 15).

    In float32 or better: bfloat16 cannot tell position 256 from 257.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    speed = base ** (-torch.arange(0, d_head, 2, device=positions.device, dtype=dtype) / d_head)
    angles = positions.to(dtype)[:, None] * speed  # (T, d_head / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + d_head / 2}) of x (B, H, T, d_head): products q.k then depend on distance alone.

    The paper pairs neighbours; pairing the halves is the same up to the order of the weights' rows, and faster.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention, softmax(q k^T / sqrt(d_head)) v: the last query sees all keys, the one before it all but one, ...

    torch's fused kernel, but for bfloat16 on a CPU and up to 1024 tokens, where training through it (torch 2.13) takes 2 to
    7 times as long as through the two products written out.

    Args:
        q: queries (B, H, T, d_head).
        k, v: keys and values (B, H_kv, S, d_head), with S >= T; H / H_kv heads in a row share theirs.
        dropout: probability that an attention weight is set to 0.

    Returns:
        (B, H, T, d_head).

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1.
    """
    H, T, d_head, H_kv, S = *q.shape[1:], *k.shape[1:3]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or S > 1024:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if 1 < T < S else None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=1 < T == S, enable_gqa=H_kv < H
        )
    if H_kv < H:
        k, v = k.repeat_interleave(H // H_kv, dim=1), v.repeat_interleave(H // H_kv, dim=1)
    mask = torch.full((T, S), -math.inf, dtype=q.dtype).triu(S - T + 1)
    weights = (q * d_head**-0.5 @ k.mT + mask).softmax(dim=-1, dtype=q.dtype)  # (B, H, T, S)
    return F.dropout(weights, dropout) @ v


class Attention(nn.Module):
    """Causal self-attention: each position averages the values of those before it and its own."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        d, d_head = config.d_model, config.d_head
        self.qkv = Linear(d, (config.n_heads + 2 * config.n_kv_heads) * d_head, bias=config.bias)
        self.out = Linear(d, d, bias=config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(d_head, eps=config.norm_eps), RMSNorm(d_head, eps=config.norm_eps)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, cache: KVCache | None) -> Tensor:
        """(B, T, C) -> (B, T, C); `turn` holds the rotation of these positions."""
        B, T, _ = x.shape
        config = self.config
        heads = self.qkv(x).view(B, T, -1, config.d_head).transpose(1, 2)  # (B, H + 2 H_kv, T, d_head)
        q, k, v = heads.split([config.n_heads, config.n_kv_heads, config.n_kv_heads], dim=1)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a norm gives float32
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H_kv, S, d_head), with S = length + T
        y = attend(q, k, v, config.dropout if self.training else 0.0)  # (B, H, T, d_head)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))  # C numbers, or this rank's heads' under tensor parallelism


class FeedForward(nn.Module):
    """Two linear maps around a nonlinearity, at each position alone; SwiGLU multiplies by a third."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind = config.feed_forward
        self.up = Linear(config.d_model, config.d_ff, bias=config.bias)
        if self.kind == "swiglu":
            self.gate = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        h = self.up(x)  # (B, T, d_ff)
        return self.down(F.relu(h).square() if self.kind == "relu2" else F.gelu(h, approximate="tanh"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.norm1, self.attention = make_norm(config, config.d_model), Attention(config, layer)
        self.norm2, self.feed_forward = make_norm(config, config.d_model), FeedForward(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, cache: KVCache | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.dropout(self.attention(self.norm1(x), turn, cache))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class GPT(nn.Module):
    """Tokens in, logits of each next token out.

    A tied output layer is the embedding itself, used twice, and not a second module that shares its weight: moving
    the model to a device cannot untie it, and checkpoints hold it once.
    """

    def __init__(self, config: GPTConfig = GPTConfig()):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = make_norm(config, config.d_model)
        if not config.tied:
            self.head = Linear(config.d_model, config.vocab_size, bias=False)
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        """GPT-2's start: normal with standard deviation 0.02; smaller where 2 n_layers results are added (section 2.3)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):  # apply() visits a block after its parts
            for last in (module.attention.out, module.feed_forward.down):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * self.config.n_layers))

    def new_cache(self, max_length: int | None = None) -> KVCache:
        """An empty cache for `max_length` tokens, at most and by default the context."""
        context = self.config.context_length
        return KVCache(self.config.n_layers, context if max_length is None else min(max_length, context))

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the token after each position, from the tokens up to it: (B, T) -> (B, T, vocab_size).

        Padding on the right needs no mask: no position sees what comes after it. Leave padded positions out of the loss.

        Args:
            tokens: integers (B, T); with a cache those that follow the ones it has read.
            cache: from `new_cache`; is given the keys and values of these tokens.

        Raises:
            ValueError: for tokens that are not (B, T) integers below vocab_size, or more than the context or cache holds.
        """
        config, start = self.config, 0 if cache is None else cache.length
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] < 1:
            raise ValueError(f"expected integer tokens of shape (B, T), T >= 1, got {tokens.dtype} {tuple(tokens.shape)}")
        B, T = tokens.shape
        room = config.context_length if cache is None else cache.max_length
        if start + T > room:
            raise ValueError(f"{start + T} tokens do not fit {'the context' if cache is None else 'the cache'} of {room}")
        try:
            x = self.token_embedding(tokens)  # (B, T, C)
        except IndexError:
            low, high = tokens.min().item(), tokens.max().item()
            raise ValueError(f"tokens must lie in 0 ... {config.vocab_size - 1}, got {low} ... {high}") from None
        positions = torch.arange(start, start + T, device=tokens.device)
        if config.position == "learned":
            x, turn = x + self.position_embedding(positions), None
        else:
            turn = rotation(positions, config.d_head, config.rotary_base, x.dtype)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, turn, cache)
        x = self.norm(x)
        if cache is not None:
            cache.length += T
        return linear(x, self.token_embedding.weight) if config.tied else self.head(x)  # (B, T, vocab_size)

    def translate_reference(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of transformers' GPT2LMHeadModel, LlamaForCausalLM or Qwen3ForCausalLM under our names.

        Args:
            state_dict: with or without the prefix "transformer." or "model.".

        Returns:
            ours; what is not known keeps its name.
        """
        ours: dict[str, Tensor] = {}
        for name, value in state_dict.items():
            head, _, rest = name.partition(".")
            path = (rest if head in ("transformer", "model") else name).split(".")
            if path[0] in ("h", "layers") and len(path) > 3 and path[1].isdigit():
                block, part = f"blocks.{path[1]}", ".".join(path[2:-1])
                if part == "attn" and path[-1] in ("bias", "masked_bias"):
                    continue  # the causal mask, which old files hold
                if part in _CONV1D:
                    ours[f"{block}.{_CONV1D[part]}.{path[-1]}"] = value.t() if path[-1] == "weight" else value
                    continue
                if part in _LINEAR:
                    ours[f"{block}.{_LINEAR[part]}.{path[-1]}"] = value
                    continue
            ours[_WHOLE.get(".".join(path), name)] = value
        for layer in range(self.config.n_layers):  # three maps into one
            for kind in ("weight", "bias"):
                names = [f"blocks.{layer}.attention.{part}.{kind}" for part in "qkv"]
                if all(part in ours for part in names):
                    ours[f"blocks.{layer}.attention.qkv.{kind}"] = torch.cat([ours.pop(part) for part in names])
        both = {"head.weight", "token_embedding.weight"} <= ours.keys()
        if self.config.tied and both and torch.equal(ours["head.weight"], ours["token_embedding.weight"]):
            del ours["head.weight"]
        return ours


# transformers' names of a block's parts, and ours. GPT-2's linear maps are stored as (d_in, d_out), the transpose of ours.
_CONV1D = {
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "mlp.c_fc": "feed_forward.up",
    "mlp.c_proj": "feed_forward.down",
}
_LINEAR = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.out",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
_WHOLE = {
    "wte.weight": "token_embedding.weight",
    "wpe.weight": "position_embedding.weight",
    "ln_f.weight": "norm.weight",
    "ln_f.bias": "norm.bias",
    "embed_tokens.weight": "token_embedding.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
