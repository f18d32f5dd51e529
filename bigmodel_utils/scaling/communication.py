"""What ranks tell each other, in bytes, by formula.

A *rank* is one process with its accelerator; p is the number of ranks. All volumes are bytes that one rank sends in one
training step, with collectives as rings; what it receives is as much.
"""

from __future__ import annotations


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
