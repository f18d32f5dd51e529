"""What ranks tell each other, in bytes and in seconds, by formula.

A *rank* is one process with its accelerator; p is the number of ranks. All volumes are bytes that one rank sends in one
training step, with collectives as rings; what it receives is as much. Times follow Hockney's model of a message,
latency + bytes / bandwidth (1994, https://doi.org/10.1016/S0167-8191%2806%2980021-9).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What joins two ranks.

    Raises:
        ValueError: for a bandwidth that is not positive or a negative latency.
    """

    name: str
    bytes_per_s: float  # that one rank can send, while it receives as much
    latency_s: float  # of one message; an assumption, since vendors do not publish it
    source: str = ""  # of the bandwidth

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0 or self.latency_s < 0:
            raise ValueError(f"{self.name}: a link has a positive bandwidth and a latency of 0 or more")

    def message_s(self, n_bytes: float) -> float:
        """Seconds until a message of that size is there."""
        return self.latency_s + n_bytes / self.bytes_per_s


LINKS = {  # bandwidths: published peaks, in one direction, for one GPU; latencies: assumed
    "nvlink": Link("NVLink 4, inside a server", 450e9, 3e-6, "https://github.com/NVIDIA/nccl/issues/1264"),
    "infiniband": Link(
        "InfiniBand, 400 Gb/s", 50e9, 5e-6, "https://docs.nvidia.com/networking/display/ConnectX7VPI/Introduction"
    ),
    "ethernet": Link("Ethernet, 10 Gb/s", 1.25e9, 30e-6, "by its name"),
}


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be 1 or more, got {count}")


def ring_allreduce_bytes(n_bytes: float, n_ranks: int) -> float:
    """Bytes that each rank sends so that all have the sum of a buffer of n_bytes: 2 (p - 1) / p n.

    A reduce-scatter and an all-gather, one after the other; no algorithm can do with fewer.

    Raises:
        ValueError: for fewer than one rank.

    Source: Patarasuk and Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002, section 3 and theorem 1.
    """
    return 2 * ring_allgather_bytes(n_bytes, n_ranks)


def ring_allgather_bytes(n_bytes: float, n_ranks: int) -> float:
    """Bytes that each rank sends so that all have a whole buffer of n_bytes, of which each had 1/p: (p - 1) / p n."""
    _check_counts(n_ranks=n_ranks)
    return n_bytes * (n_ranks - 1) / n_ranks


def ring_reducescatter_bytes(n_bytes: float, n_ranks: int) -> float:
    """Bytes that each rank sends so that each has 1/p of the sum of a buffer of n_bytes: (p - 1) / p n."""
    return ring_allgather_bytes(n_bytes, n_ranks)


def data_parallel_bytes(n_gradient_bytes: float, n_ranks: int) -> float:
    """One all-reduce of all gradients a step, however many micro-batches are accumulated."""
    return ring_allreduce_bytes(n_gradient_bytes, n_ranks)


def sharded_bytes(n_block_bytes: float, n_rest_bytes: float, n_ranks: int) -> float:
    """Weights sharded over the ranks (ZeRO stage 3, FSDP): gather blocks twice, the rest once; scatter all gradients.

    Args:
        n_block_bytes: weights that are dropped after the forward pass and gathered again for the backward pass.
        n_rest_bytes: weights that stay gathered between the two.

    Source: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 7: 3 buffers where data parallelism has 2.
    """
    gathered = ring_allgather_bytes(2 * n_block_bytes + n_rest_bytes, n_ranks)
    return gathered + ring_reducescatter_bytes(n_block_bytes + n_rest_bytes, n_ranks)


def tensor_parallel_bytes(n_layers: int, n_activation_bytes: float, n_ranks: int) -> float:
    """Four all-reduces a layer, two forward and two backward, of one layer's activations, batch x T x d_model numbers.

    Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3 and figure 4.
    """
    return 4 * n_layers * ring_allreduce_bytes(n_activation_bytes, n_ranks)


def sequence_parallel_bytes(n_layers: int, n_activation_bytes: float, n_norm_bytes: float, n_ranks: int) -> float:
    """As much as tensor parallelism, each all-reduce in two halves; and the ends: what is cut and what was not is joined.

    At the end of the forward pass the activations are gathered, at the end of the backward pass their gradient is; and
    the gradients of the norms, of which each rank knows its positions' part, are summed.
    """
    blocks = tensor_parallel_bytes(n_layers, n_activation_bytes, n_ranks)
    ends = 2 * ring_allgather_bytes(n_activation_bytes, n_ranks)
    return blocks + ends + ring_allreduce_bytes(n_norm_bytes, n_ranks)


def pipeline_bytes(stage: int, n_stages: int, n_activation_bytes: float) -> float:
    """What the rank of one stage sends: activations to the next stage, and their gradient to the one before.

    Args:
        stage: 0 ... n_stages - 1.
        n_activation_bytes: batch x T x d_model numbers, over all micro-batches.

    Raises:
        ValueError: for a stage that is not there.
    """
    _check_counts(n_stages=n_stages)
    if not 0 <= stage < n_stages:
        raise ValueError(f"stages are 0 ... {n_stages - 1}, got {stage}")
    return n_activation_bytes * ((stage < n_stages - 1) + (stage > 0))


def pipeline_bubble(n_stages: int, n_microbatches: int) -> float:
    """Share of the time in which a pipeline's ranks wait: (p - 1) / (m + p - 1), for GPipe and for 1F1B.

    With stages of equal work, and messages that take no time.

    Raises:
        ValueError: for fewer than one stage or micro-batch.

    Source: Huang et al. 2019, https://arxiv.org/abs/1811.06965, section 2.3.
    """
    _check_counts(n_stages=n_stages, n_microbatches=n_microbatches)
    return (n_stages - 1) / (n_microbatches + n_stages - 1)


def ring_allreduce_s(n_bytes: float, n_ranks: int, link: Link) -> float:
    """Seconds of a ring's 2 (p - 1) steps, in each of which every rank sends n / p bytes."""
    _check_counts(n_ranks=n_ranks)
    return 2 * (n_ranks - 1) * link.message_s(n_bytes / n_ranks)


def data_parallel_step_s(compute_s: float, n_gradient_bytes: float, n_ranks: int, link: Link, hidden: bool = False) -> float:
    """Seconds of a step whose batch is shared out evenly.

    Args:
        compute_s: seconds that one rank alone takes for the whole batch.
        hidden: the all-reduce goes on behind the computation, and the longer of the two decides; else one after the other.
    """
    parts = compute_s / n_ranks, ring_allreduce_s(n_gradient_bytes, n_ranks, link)
    return max(parts) if hidden else sum(parts)


def tensor_parallel_step_s(compute_s: float, n_layers: int, n_activation_bytes: float, n_ranks: int, link: Link) -> float:
    """Seconds of a step whose matrices are cut: what is computed next needs what was sent, so that nothing is hidden."""
    return compute_s / n_ranks + 4 * n_layers * ring_allreduce_s(n_activation_bytes, n_ranks, link)


def pipeline_step_s(compute_s: float, n_activation_bytes: float, n_stages: int, n_microbatches: int, link: Link) -> float:
    """Seconds of a step whose layers are shared out: work, bubble, and the messages on the way there and back.

    A micro-batch's messages in the steady state go on behind the computation of others.
    """
    working_s = compute_s / n_stages / (1 - pipeline_bubble(n_stages, n_microbatches))
    return working_s + 2 * (n_stages - 1) * link.message_s(n_activation_bytes / n_microbatches)
