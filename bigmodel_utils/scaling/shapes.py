"""Sizes of published transformers, and their parameters, counted part by part.

`Shape` holds what counts depend on: queries that share keys and values, gated feed-forwards, biases, norms, ties.
`named` gives the published ones, with the number of parameters that their files hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from bigmodel_utils.models import GPTConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer of one stack, such as a GPT; the defaults are the layout of LLaMA (rotary, RMSNorm, SwiGLU).

    Raises:
        ValueError: for sizes below 1, or query heads that key-value heads do not divide.
    """

    n_layers: int
    n_heads: int  # query heads a layer
    d_model: int
    d_ff: int  # hidden width of the feed-forward
    vocab_size: int
    n_kv_heads: int | None = None  # heads with keys and values of their own; None: all
    d_head: int | None = None  # width of a head; None: d_model / n_heads
    context_length: int = 2048  # tokens of a training sequence
    gated: bool = True  # a third matrix in the feed-forward, as in SwiGLU
    squared: bool = False  # squared ReLU between the feed-forward's two maps; its backward pass makes two more copies
    tied: bool = False  # the output layer is the embedding
    bias: bool = False  # in every linear map but the output layer
    qkv_bias: bool | None = None  # in the maps to queries, keys and values; None: as `bias`
    norm: Literal["rms", "layer"] = "rms"  # a weight a channel, or a weight and, with `norm_bias`, a bias
    norm_bias: bool | None = None  # None: layer norms have one, RMS norms do not
    n_block_norms: int = 2  # norms a layer; 1 where attention and feed-forward share theirs
    embedding_norm: bool = False  # one more norm behind the embedding
    qk_norm: bool = False  # RMSNorm of each head's queries and keys
    learned_positions: bool = False  # a vector a position; rotary and relative positions have no parameters
    rotary: bool = True  # queries and keys are rotated, which makes copies of them

    def __post_init__(self):
        fill = {"n_kv_heads": self.n_heads, "d_head": self.d_model // self.n_heads, "qkv_bias": self.bias}
        fill["norm_bias"] = self.norm == "layer"
        for name, value in fill.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("n_layers", "n_heads", "d_model", "d_ff", "vocab_size", "n_kv_heads", "d_head", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads, got {self.n_kv_heads} and {self.n_heads}")

    @property
    def n_parameters(self) -> int:
        """All weights, a tied embedding once."""
        return sum(parameter_parts(self).values())


@dataclass(frozen=True)
class Published:
    """A published model: its shape, and the number of parameters that is published for it."""

    shape: Shape
    n_parameters: int
    source: str


def as_shape(model: Shape | GPTConfig | str) -> Shape:
    """A shape of a shape, of our GPT's configuration, or of a published model's name.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(model, str):
        return named(model).shape
    if isinstance(model, Shape):
        return model
    if not isinstance(model, GPTConfig):
        raise TypeError(f"expected a Shape, a GPTConfig or a name, got {type(model).__name__}")
    return Shape(
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        d_model=model.d_model,
        d_ff=model.d_ff,
        vocab_size=model.vocab_size,
        n_kv_heads=model.n_kv_heads,
        context_length=model.context_length,
        gated=model.feed_forward == "swiglu",
        squared=model.feed_forward == "relu2",
        tied=model.tied,
        bias=model.bias,
        norm=model.norm,
        norm_bias=model.bias and model.norm == "layer",
        qk_norm=model.qk_norm,
        learned_positions=model.position == "learned",
        rotary=model.position == "rotary",
    )


def parameter_parts(model: Shape | GPTConfig | str) -> dict[str, int]:
    """Parameters of each part of the model; their sum is the model's.

    A layer's attention has d (n_heads + 2 n_kv_heads) d_head weights into queries, keys and values and n_heads d_head d out
    of them; its feed-forward has 2 d d_ff, or 3 d d_ff where it is gated.
    """
    s = as_shape(model)
    d, queries, keys = s.d_model, s.n_heads * s.d_head, s.n_kv_heads * s.d_head
    norm = d * (1 + s.norm_bias)
    attention = d * (queries + 2 * keys) + queries * d + s.qkv_bias * (queries + 2 * keys) + s.bias * d
    n_into = (1 + s.gated) * s.d_ff  # numbers that the feed-forward's first map or maps give
    return {
        "embedding": s.vocab_size * d + s.learned_positions * s.context_length * d,
        "attention": s.n_layers * (attention + 2 * s.d_head * s.qk_norm),
        "feed-forward": s.n_layers * (n_into * d + s.d_ff * d + s.bias * (n_into + d)),
        "norms": (s.n_layers * s.n_block_norms + 1 + s.embedding_norm) * norm,
        "output": 0 if s.tied else s.vocab_size * d,
    }


def shape_for(n_parameters: float, *, vocab_size: int = 32_000, context_length: int = 2048, d_head: int = 128) -> Shape:
    """A model in LLaMA's layout with about so many parameters, about 100 times as wide as it is deep.

    LLaMA's four sizes are 85 to 128 times as wide as deep (Touvron et al. 2023, https://arxiv.org/abs/2302.13971, table 2).
    The width is a multiple of d_head, the feed-forward 8/3 of it, up to a multiple of 256; of the depths that follow, the
    one is taken whose number of parameters is nearest.

    Raises:
        ValueError: for fewer parameters than the smallest such model has.
    """
    best = None
    for n_heads in (*range(1, 16), *range(16, 400, 8)):  # large models can be cut in 8
        d_model = n_heads * d_head
        d_ff = 256 * math.ceil(8 * d_model / 3 / 256)
        per_layer = 4 * d_model**2 + 3 * d_model * d_ff + 2 * d_model
        n_layers = max(1, round((n_parameters - 2 * vocab_size * d_model - d_model) / per_layer))
        shape = Shape(n_layers, n_heads, d_model, d_ff, vocab_size, context_length=context_length)
        off = abs(math.log(shape.n_parameters / n_parameters)) + 0.02 * abs(math.log(d_model / n_layers / 100))
        if best is None or off < best[0]:
            best = (off, shape)
    if abs(math.log(best[1].n_parameters / n_parameters)) > 0.1:
        raise ValueError(f"no model of this layout has about {n_parameters:.3g} parameters: give another vocab_size or d_head")
    return best[1]


def named(name: str) -> Published:
    """A published model by its name, such as "llama-2-7b".

    Raises:
        ValueError: for another name, listing the known ones.
    """
    if name not in PUBLISHED:
        raise ValueError(f"no published shape is called {name!r}: choose from {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def _gelu(n_layers: int, n_heads: int, d_model: int, vocab_size: int, **rest) -> Shape:
    """The layout of GPT-3: a plain feed-forward four times as wide, layer norms, biases everywhere."""
    layout = {"gated": False, "bias": True, "norm": "layer", "rotary": False}
    return Shape(n_layers, n_heads, d_model, 4 * d_model, vocab_size, **(layout | rest))


_HUB = "https://huggingface.co/"

# Sizes from the models' configuration files; numbers of parameters from the hub's count of the tensors in the files, which for
# Llama 2 also holds the rotary frequencies (32 layers of 64 numbers for 7B): these are no parameters, and are subtracted here.
PUBLISHED = {
    "gpt3-175b": Published(
        _gelu(96, 96, 12288, 50257, tied=True, learned_positions=True), 174_600_000_000, "https://arxiv.org/abs/2005.14165"
    ),
    "bloom-176b": Published(
        _gelu(70, 112, 14336, 250_880, tied=True, embedding_norm=True), 176_247_271_424, f"{_HUB}bigscience/bloom"
    ),
    "pythia-6.9b": Published(_gelu(32, 32, 4096, 50432, rotary=True), 6_857_302_016, "https://github.com/EleutherAI/pythia"),
    "palm-540b": Published(
        Shape(118, 48, 18432, 73728, 256_000, n_kv_heads=1, d_head=256, tied=True, n_block_norms=1),
        540_350_000_000,
        "https://arxiv.org/abs/2204.02311",
    ),
    "falcon-180b": Published(
        Shape(80, 232, 14848, 59392, 65024, n_kv_heads=8, gated=False, norm="layer"),
        179_522_565_120,
        f"{_HUB}tiiuae/falcon-180B",
    ),
    "llama-7b": Published(Shape(32, 32, 4096, 11008, 32000), 6_738_415_616, "https://arxiv.org/abs/2302.13971"),
    "llama-65b": Published(Shape(80, 64, 8192, 22016, 32000), 65_285_660_672, "https://arxiv.org/abs/2302.13971"),
    "llama-2-7b": Published(
        Shape(32, 32, 4096, 11008, 32000, context_length=4096), 6_738_417_664 - 32 * 64, f"{_HUB}meta-llama/Llama-2-7b-hf"
    ),
    "llama-2-13b": Published(
        Shape(40, 40, 5120, 13824, 32000, context_length=4096), 13_015_866_880 - 40 * 64, f"{_HUB}meta-llama/Llama-2-13b-hf"
    ),
    "llama-2-70b": Published(
        Shape(80, 64, 8192, 28672, 32000, n_kv_heads=8, context_length=4096),
        68_976_653_312 - 80 * 64,
        f"{_HUB}meta-llama/Llama-2-70b-hf",
    ),
    "llama-3-8b": Published(
        Shape(32, 32, 4096, 14336, 128_256, n_kv_heads=8, context_length=8192),
        8_030_261_248,
        f"{_HUB}meta-llama/Llama-3.1-8B",
    ),
    "llama-3-70b": Published(
        Shape(80, 64, 8192, 28672, 128_256, n_kv_heads=8, context_length=8192),
        70_553_706_496,
        f"{_HUB}meta-llama/Llama-3.1-70B",
    ),
    "llama-3-405b": Published(
        Shape(126, 128, 16384, 53248, 128_256, n_kv_heads=8, context_length=8192),
        405_853_388_800,
        f"{_HUB}meta-llama/Llama-3.1-405B",
    ),
    "mistral-7b": Published(
        Shape(32, 32, 4096, 14336, 32000, n_kv_heads=8, context_length=8192),
        7_241_732_096,
        f"{_HUB}mistralai/Mistral-7B-v0.1",
    ),
    "qwen1.5-72b": Published(
        Shape(80, 64, 8192, 24576, 152_064, qkv_bias=True, context_length=32768), 72_287_920_128, f"{_HUB}Qwen/Qwen1.5-72B"
    ),
    "qwen2-72b": Published(
        Shape(80, 64, 8192, 29568, 152_064, n_kv_heads=8, qkv_bias=True, context_length=32768),
        72_706_203_648,
        f"{_HUB}Qwen/Qwen2-72B",
    ),
    "smollm3-3b": Published(
        Shape(36, 16, 2048, 11008, 128_256, n_kv_heads=4, tied=True, context_length=4096),
        3_075_098_624,
        f"{_HUB}HuggingFaceTB/SmolLM3-3B-Base",
    ),
}
