"""What a transformer holds and sends: memory of training and of serving, checkpoints, traffic, least times.

Formulas count numbers and multiply by their size. Not counted: what the library itself takes, fragmentation, and buffers of
the communication library; leave a margin for them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Literal

import torch

from bigmodel_utils.models import GPTConfig
from bigmodel_utils.scaling import communication, counts, shapes

Model = shapes.Shape | GPTConfig | str
Precision = Literal["float32", "autocast", "mixed"]

# Bytes a parameter: of weights, of gradients, of a master copy in float32 where the weights are in 16 bits.
# "autocast" is what `train.fit(precision="bfloat16")` does: 16 bits in the products and activations, float32 at rest.
# "mixed" is what large runs do (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 3.1: 2 + 2 + 12 with Adam).
STATE_BYTES = {"float32": (4, 4, 0), "autocast": (4, 4, 0), "mixed": (2, 2, 4)}
ACTIVATION_BYTES = {"float32": 4, "autocast": 2, "mixed": 2}


def state_bytes(
    n_parameters: int,
    *,
    precision: Precision = "float32",
    n_optimizer_slots: int = 2,
    zero_stage: int = 0,
    n_ranks: int = 1,
) -> dict[str, float]:
    """Memory of weights, gradients and optimiser on one of `n_ranks` data-parallel devices.

    ZeRO shards the optimiser's state (stage 1), the gradients too (stage 2), and the weights too (stage 3)
    (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5).

    Args:
        n_parameters: of the model, or of the part that this device holds under tensor or pipeline parallelism.
        n_optimizer_slots: float32 numbers that the optimiser keeps a weight: 0 for SGD, 1 with momentum, 2 for Adam.

    Raises:
        ValueError: for a stage that is not 0 to 3.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO has stages 1, 2 and 3, and 0 for none; got {zero_stage}")
    weight, gradient, master = STATE_BYTES[precision]
    shard = [n_ranks if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    return {
        "weights": n_parameters * weight / shard[0],
        "gradients": n_parameters * gradient / shard[1],
        "optimiser": n_parameters * (master + 4 * n_optimizer_slots) / shard[2],
    }


def layer_activations(model: Model, rows: int, *, fused: bool = True) -> int:
    """Numbers that one layer keeps for its backward pass, for `rows` = batch size x length tokens.

    Its two inputs (before attention, before feed-forward) and, with a norm each, what the norms give; queries, keys and
    values, and rotated copies of the first two; what attention gives, and a normaliser a head; in the feed-forward the
    hidden numbers before and after the bend, and two more where it is gated. Attention keeps no length x length matrix
    (Dao et al. 2022, https://arxiv.org/abs/2205.14135). With GPT's layout this is the 34 bytes a number and token of
    Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198, equation 1), less 2 for the masks of dropout.

    Args:
        fused: each norm and attention is one kernel, as on a GPU, that keeps its input. False: as torch 2.13 does on a CPU,
            where RMSNorm also keeps what it scales, and rotated attention's result is copied once.
    """
    s = shapes.as_shape(model)
    d, queries, keys = s.d_model, s.n_heads * s.d_head, s.n_kv_heads * s.d_head
    attention = 2 * queries + 2 * keys + s.rotary * (queries + keys) + s.n_heads
    attention += s.qk_norm * (s.n_heads + s.n_kv_heads)
    norms = s.n_block_norms * (d + 1 + (s.norm == "layer"))  # what they give; a scale a row, and a mean
    if not fused:
        norms += s.n_block_norms * d * (s.norm == "rms")
        attention += s.rotary * queries + s.qk_norm * (queries + keys)
    return rows * (2 * d + norms + attention + (4 if s.gated else 2) * s.d_ff)


def activation_bytes(
    model: Model,
    batch_size: int,
    length: int,
    *,
    precision: Precision = "float32",
    recompute: bool = False,
    fused: bool = True,
) -> dict[str, float]:
    """Most memory of activations in one training step without dropout.

    Args:
        recompute: keep only each layer's input, and compute the rest again in the backward pass, a layer at a time
            (Chen et al. 2016, https://arxiv.org/abs/1604.06174).
        fused: as for `layer_activations`.

    Returns:
        "layers", what all layers keep, and "top", what comes on top of it at the worst moment. That is either the start of
        the backward pass (the last norm, the logits, their log-softmax and its gradient, both in float32) or the last
        layer's own backward pass (gradients on their way, and with recomputation all that the layer would have kept).
    """
    s, rows = shapes.as_shape(model), batch_size * length
    n_bytes = ACTIVATION_BYTES[precision]
    layer = n_bytes * layer_activations(s, rows, fused=fused)
    n_copies = 1 + s.gated + 2 * s.squared  # of the hidden numbers, where their bend is differentiated
    hidden = max(rows * n_copies, rows + s.d_model) * s.d_ff  # or one, and a weight's gradient before it is added
    waiting = s.tied * s.vocab_size * s.d_model  # the output's gradient of a tied embedding, until the input's comes
    gradients = n_bytes * (rows * s.d_model + hidden + waiting)
    last_norm = s.d_model * (2 if fused or s.norm == "layer" else 3)
    output = rows * (last_norm * n_bytes + s.vocab_size * (n_bytes + 4 + 4))
    if not recompute:
        return {"layers": s.n_layers * layer, "top": max(output, gradients)}
    return {"layers": s.n_layers * rows * s.d_model * n_bytes, "top": max(output, layer + gradients)}


def memory_bytes(
    model: Model,
    batch_size: int,
    length: int,
    *,
    precision: Precision = "float32",
    n_optimizer_slots: int = 2,
    recompute: bool = False,
    zero_stage: int = 0,
    n_ranks: int = 1,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
) -> dict[str, float]:
    """Most memory of a training step on the fullest device: weights, gradients, optimiser, activations, and their total.

    Tensor parallelism divides weights and activations alike (with its sequence-parallel form, Korthikanti et al. 2022);
    a pipeline divides the layers, and its first stage holds the activations of as many micro-batches as there are stages
    (1F1B, Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, section 2.2), which comes to as much as no pipeline.
    Under ZeRO 3 the layers in use are whole for a while: two layers' weights and one's gradient are added.

    Args:
        batch_size: sequences in one micro-batch of one replica.
        n_ranks: replicas that share the states under ZeRO.
    """
    s = shapes.as_shape(model)
    parts = shapes.parameter_parts(s)
    layers = parts["attention"] + parts["feed-forward"] + parts["norms"]
    ends = parts["embedding"] + parts["output"] if pipeline_parallel == 1 else max(parts["embedding"], parts["output"])
    held = (layers / pipeline_parallel + ends) / tensor_parallel
    states = state_bytes(held, precision=precision, n_optimizer_slots=n_optimizer_slots, zero_stage=zero_stage, n_ranks=n_ranks)
    if zero_stage == 3 and n_ranks > 1:  # a layer in use, the next one on its way, and the gradient of the one before
        weight, gradient, _ = STATE_BYTES[precision]
        states["weights"] += (2 * weight + gradient) * layers / s.n_layers / tensor_parallel
    activations = sum(activation_bytes(s, batch_size, length, precision=precision, recompute=recompute).values())
    memory = states | {"activations": activations / tensor_parallel}
    return memory | {"total": sum(memory.values())}


def measured_peak_bytes(function: Callable[[], object]) -> int:
    """The most that a call allocates at any moment beyond what was there before, as torch's allocator reports it (CPU).

    Every allocation and release is recorded by `torch.profiler`; their running sum has a maximum. On a GPU,
    `torch.cuda.max_memory_allocated` keeps it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write its log between a notebook's outputs
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes, initial=0))


def kv_cache_bytes(model: Model, batch_size: int, length: int, *, bytes_per_number: float = 2) -> float:
    """Memory of the keys and values of `length` tokens in every layer: 2 layers x n_kv_heads x d_head numbers a token."""
    s = shapes.as_shape(model)
    return 2 * s.n_layers * batch_size * length * s.n_kv_heads * s.d_head * bytes_per_number


def checkpoint_bytes(model: Model | int, *, precision: Precision = "float32", n_optimizer_slots: int = 2) -> float:
    """Bytes of a checkpoint to resume from: weights, master copy and optimiser; with 0 slots in float32, weights alone."""
    n_parameters = model if isinstance(model, int) else shapes.as_shape(model).n_parameters
    weight, _, master = STATE_BYTES[precision]
    return n_parameters * (weight + master + 4 * n_optimizer_slots)


def communication_bytes(
    model: Model,
    batch_size: int,
    length: int,
    *,
    data_parallel: int = 1,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    n_microbatches: int = 1,
    zero_stage: int = 0,
    precision: Precision = "mixed",
) -> dict[str, float]:
    """Bytes that one device (for a pipeline: an inner stage) sends in one training step, by kind of parallelism.

    The gradients are summed once, under ZeRO 1 and 2 in two halves. Under ZeRO 3 every micro-batch gathers the weights twice and
    scatters its gradients. What each kind sends, `communication` derives.

    Args:
        batch_size: sequences of one micro-batch.
        n_microbatches: micro-batches a step and replica.
    """
    s = shapes.as_shape(model)
    held = s.n_parameters / tensor_parallel / pipeline_parallel * STATE_BYTES[precision][1]
    activations = n_microbatches * batch_size * length * s.d_model * ACTIVATION_BYTES[precision]
    if zero_stage == 3:
        data = n_microbatches * communication.sharded_bytes(held, 0, data_parallel)
    else:
        data = communication.data_parallel_bytes(held, data_parallel)
    stage = communication.pipeline_bytes(1, 3, activations / tensor_parallel) if pipeline_parallel > 1 else 0.0
    return {
        "data": data,
        "tensor": communication.tensor_parallel_bytes(s.n_layers / pipeline_parallel, activations, tensor_parallel),
        "pipeline": stage,
    }


def training_step_s(
    model: Model, batch_size: int, length: int, flops_per_s: float, bytes_per_s: float, *, bytes_per_number: int = 4
) -> float:
    """The least seconds of a training step on one device: every product by the roofline, then AdamW's update.

    Each product of the forward pass has two of the same size in the backward pass. The update reads weight, gradient and two
    slots and writes all but the gradient: 7 float32 numbers a weight. Norms, softmax, dropout, loading of data and the time
    to start each operation are not counted, so a measured step is longer.
    """
    products = sum(
        3
        * often
        * counts.roofline_s(
            counts.product_flops(*shape), counts.product_bytes(*shape, bytes_per_number), flops_per_s, bytes_per_s
        )
        for _, often, shape in counts.layer_products(model, batch_size, length)
    )
    return products + 7 * 4 * shapes.as_shape(model).n_parameters / bytes_per_s


def decode_step_s(
    model: Model,
    batch_size: int,
    context: int,
    flops_per_s: float,
    bytes_per_s: float,
    *,
    bytes_per_weight: float = 2,
    bytes_per_kv: float = 2,
) -> float:
    """The least seconds to generate one token in each of `batch_size` sequences that hold `context` tokens already.

    Every weight is read once for the whole batch, every sequence's keys and values once; the embedding is a look-up.

    Args:
        bytes_per_weight: 2 for 16 bits, 1 for 8, 0.5 for 4.
        bytes_per_kv: the same for the keys and values.
    """
    s = shapes.as_shape(model)
    parts = shapes.parameter_parts(s)
    read = parts["attention"] + parts["feed-forward"] + parts["norms"] + s.vocab_size * s.d_model
    n_bytes = read * bytes_per_weight + kv_cache_bytes(s, batch_size, context, bytes_per_number=bytes_per_kv)
    n_flops = 2 * batch_size * (read + 2 * s.n_layers * s.n_heads * s.d_head * context)
    return counts.roofline_s(n_flops, n_bytes, flops_per_s, bytes_per_s)
