"""What training costs: floating-point operations and memory, by formula.

Conventions: a multiply-add is two FLOPs; only matrix products count, since they are nearly all of the work. A causal mask
saves nothing in these counts: they are the products that the layers are defined by, as PyTorch's counter sees them.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from bigmodel_utils.models import BERTConfig, GPTConfig, MLPConfig, TransformerConfig, count_parameters
from bigmodel_utils.scaling import shapes


def product_flops(m: int, k: int, n: int) -> int:
    """FLOPs of an (m, k) times (k, n) product: each of the m n results is k multiplications and k additions."""
    return 2 * m * k * n


def product_bytes(m: int, k: int, n: int, bytes_per_number: int = 4) -> int:
    """The least traffic of that product: both factors read once, the result written once."""
    return bytes_per_number * (m * k + k * n + m * n)


def roofline_s(n_flops: float, n_bytes: float, flops_per_s: float, bytes_per_s: float) -> float:
    """The least seconds that the work can take: arithmetic and traffic overlap, and the slower of the two decides.

    Source: Williams, Waterman and Patterson 2009, https://doi.org/10.1145/1498765.1498785.

    Raises:
        ValueError: for a rate that is not positive.
    """
    if flops_per_s <= 0 or bytes_per_s <= 0:
        raise ValueError(f"rates must be positive, got {flops_per_s} FLOP/s and {bytes_per_s} bytes/s")
    return max(n_flops / flops_per_s, n_bytes / bytes_per_s)


def step_products(config: MLPConfig, batch_size: int) -> list[tuple[int, int, int]]:
    """The matrix products (m, k, n) of one training step: a layer's output, its weights' gradient, its input's gradient.

    The first layer's input gradient is missing: nothing is trained below it.
    """
    products = []
    for layer, (d_in, d_out) in enumerate(pairwise(config.widths)):
        products += [(batch_size, d_in, d_out), (d_out, batch_size, d_in)]
        if layer > 0:
            products.append((batch_size, d_out, d_in))
    return products


def step_s(config: MLPConfig, batch_size: int, flops_per_s: float, bytes_per_s: float) -> float:
    """The least seconds of one training step with plain SGD in float32: its products one after another, then the update.

    The update reads every weight and its gradient and writes the weight. Biases, ReLUs, the loss and the time that
    starting each operation takes are not counted.
    """
    products = (
        roofline_s(product_flops(*shape), product_bytes(*shape), flops_per_s, bytes_per_s)
        for shape in step_products(config, batch_size)
    )
    return sum(products) + 3 * 4 * count_parameters(config) / bytes_per_s


def forward_flops(config: MLPConfig, n_samples: int) -> int:
    """FLOPs of one forward pass over `n_samples` rows: two a weight and row; biases and ReLUs are not counted."""
    return 2 * n_samples * sum(d_in * d_out for d_in, d_out in pairwise(config.widths))


def train_flops(config_or_n_params: MLPConfig | GPTConfig | shapes.Shape | str | int, n_tokens: int) -> int:
    """FLOPs of training on `n_tokens` samples or tokens, repeats counted.

    For a configuration, exact: forward, the gradient of every weight, and the gradient of every layer's input but
    the first. For a number of parameters N, the rule 6 N D (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, 2.1).
    A GPT, a `Shape` or a published model's name is trained on sequences as long as its context; recomputation is not counted.

    Raises:
        ValueError: for a negative count.
    """
    if n_tokens < 0:
        raise ValueError(f"n_tokens counts samples or tokens, got {n_tokens}")
    if isinstance(config_or_n_params, MLPConfig):
        first_layer = 2 * n_tokens * config_or_n_params.widths[0] * config_or_n_params.widths[1]
        return 3 * forward_flops(config_or_n_params, n_tokens) - first_layer
    if isinstance(config_or_n_params, (GPTConfig, shapes.Shape, str)):
        length = shapes.as_shape(config_or_n_params).context_length
        return 3 * sum(forward_parts(config_or_n_params, 1, length).values()) * n_tokens // length
    return 6 * config_or_n_params * n_tokens


def training_memory_bytes(config: MLPConfig, batch_size: int, *, n_optimizer_slots: int = 2, bytes_per_number: int = 4) -> int:
    """Memory of a training step: weights, gradients, the optimiser's slots, and the activations kept for the backward pass.

    Args:
        batch_size: rows a step.
        n_optimizer_slots: numbers that the optimiser keeps a weight: 0 for SGD, 1 with momentum, 2 for Adam.
        bytes_per_number: 4 for float32.
    """
    n_activations = batch_size * (
        config.widths[0] + 2 * sum(config.widths[1:-1]) + config.widths[-1]
    )  # linear and ReLU outputs
    return bytes_per_number * ((2 + n_optimizer_slots) * count_parameters(config) + n_activations)


def forward_parts(
    model: GPTConfig | BERTConfig | TransformerConfig | shapes.Shape | str,
    batch_size: int,
    length: int,
    *,
    source_length: int | None = None,
) -> dict[str, int]:
    """FLOPs of each part of one forward pass, as `torch.utils.flop_counter` counts them (attention by separate products).

    Args:
        model: a configuration of ours, a `Shape`, or a published model's name.
        batch_size: sequences.
        length: tokens of each; for an encoder-decoder, of the target.
        source_length: tokens of the source of an encoder-decoder; None: as the target.

    Returns:
        "projections" (into queries, keys and values, and out), "scores" (q k^T, and the weights times the values),
        "feed-forward", and "output" (the vocabulary, and BERT's heads).
    """
    if isinstance(model, BERTConfig):
        return _bert_parts(model, batch_size, length)
    if isinstance(model, TransformerConfig):
        return _translation_parts(model, batch_size, length, length if source_length is None else source_length)
    parts: Counter[str] = Counter()
    for part, often, sizes in layer_products(model, batch_size, length):
        parts[part] += often * product_flops(*sizes)
    return dict(parts)


def layer_products(
    model: GPTConfig | shapes.Shape | str, batch_size: int, length: int
) -> list[tuple[str, int, tuple[int, int, int]]]:
    """The matrix products of one forward pass: of which part, how often, and (m, k, n). Attention is one a head and sequence."""
    s, rows = shapes.as_shape(model), batch_size * length
    queries, keys, heads = s.n_heads * s.d_head, s.n_kv_heads * s.d_head, batch_size * s.n_heads
    return [
        ("projections", s.n_layers, (rows, s.d_model, queries + 2 * keys)),
        ("projections", s.n_layers, (rows, queries, s.d_model)),
        ("scores", s.n_layers * heads, (length, s.d_head, length)),
        ("scores", s.n_layers * heads, (length, length, s.d_head)),
        ("feed-forward", s.n_layers * (1 + s.gated), (rows, s.d_model, s.d_ff)),
        ("feed-forward", s.n_layers, (rows, s.d_ff, s.d_model)),
        ("output", 1, (rows, s.d_model, s.vocab_size)),
    ]


def backward_parts(model: GPTConfig | BERTConfig | TransformerConfig | shapes.Shape | str, *sizes, **options) -> dict[str, int]:
    """FLOPs of each part of one backward pass; arguments as for `forward_parts`.

    Twice the forward pass: each product has two factors, and the gradient of each is one product of the same size. Nothing
    is saved at the first layer, since the embedding below it is trained.
    """
    return {part: 2 * n_flops for part, n_flops in forward_parts(model, *sizes, **options).items()}


def _bert_parts(config: BERTConfig, batch_size: int, length: int) -> dict[str, int]:
    rows, d = batch_size * length, config.d_model
    by_token = config.n_token_labels + config.masked_lm * (d + config.vocab_size)
    by_row = config.pooler * d + 2 * config.next_sentence + config.n_row_labels
    return {
        "projections": config.n_layers * 4 * product_flops(rows, d, d),
        "scores": config.n_layers * 2 * product_flops(rows, d, length),
        "feed-forward": config.n_layers * 2 * product_flops(rows, d, config.d_ff),
        "output": product_flops(rows, d, by_token) + product_flops(batch_size, d, by_row),
    }


def _translation_parts(config: TransformerConfig, batch_size: int, length: int, source_length: int) -> dict[str, int]:
    """The encoder sees the source; the decoder the target, and the source through its cross-attention."""
    source, target, d = batch_size * source_length, batch_size * length, config.d_model
    projections = 4 * product_flops(source, d, d) + 4 * product_flops(target, d, d)
    projections += 2 * product_flops(target, d, d) + 2 * product_flops(source, d, d)  # of the cross-attention
    scores = source * source_length + target * length + target * source_length
    return {
        "projections": config.n_layers * projections,
        "scores": config.n_layers * 4 * d * scores,
        "feed-forward": config.n_layers * 2 * product_flops(source + target, d, config.d_ff),
        "output": product_flops(target, d, config.vocab_size),
    }
