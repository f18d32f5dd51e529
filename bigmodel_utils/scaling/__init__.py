"""What a training run costs, and what it should be: counts, memory, traffic, published runs, plans, scaling laws."""

from __future__ import annotations

from bigmodel_utils.scaling.communication import pipeline_bubble, ring_allreduce_bytes
from bigmodel_utils.scaling.counts import (
    backward_parts,
    forward_flops,
    forward_parts,
    product_bytes,
    product_flops,
    roofline_s,
    step_products,
    step_s,
    train_flops,
    training_memory_bytes,
)
from bigmodel_utils.scaling.form import cost_form, cost_table
from bigmodel_utils.scaling.laws import LawFit, compute_optimal, fit_isoflop, fit_kaplan, fit_law
from bigmodel_utils.scaling.memory import (
    activation_bytes,
    checkpoint_bytes,
    communication_bytes,
    decode_step_s,
    kv_cache_bytes,
    measured_peak_bytes,
    memory_bytes,
    state_bytes,
    training_step_s,
)
from bigmodel_utils.scaling.runs import (
    Infeasible,
    Interval,
    Layout,
    accelerators,
    back_test,
    efficiency_interval,
    estimate_run,
    plan,
    published_runs,
)
from bigmodel_utils.scaling.shapes import Shape, named, parameter_parts, shape_for

__all__ = [
    "Infeasible",
    "Interval",
    "LawFit",
    "Layout",
    "Shape",
    "accelerators",
    "activation_bytes",
    "back_test",
    "backward_parts",
    "checkpoint_bytes",
    "communication_bytes",
    "compute_optimal",
    "cost_form",
    "cost_table",
    "decode_step_s",
    "efficiency_interval",
    "estimate_run",
    "fit_isoflop",
    "fit_kaplan",
    "fit_law",
    "forward_flops",
    "forward_parts",
    "kv_cache_bytes",
    "measured_peak_bytes",
    "memory_bytes",
    "named",
    "parameter_parts",
    "pipeline_bubble",
    "plan",
    "product_bytes",
    "product_flops",
    "published_runs",
    "ring_allreduce_bytes",
    "roofline_s",
    "shape_for",
    "state_bytes",
    "step_products",
    "step_s",
    "train_flops",
    "training_memory_bytes",
    "training_step_s",
]
