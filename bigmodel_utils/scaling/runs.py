"""Training runs: what they will cost, how well such estimates did on published runs, and a plan for a budget.

Two tables stand beside the package, a source in every row: `accelerators.csv` and `published_runs.csv`. Every estimate is an
interval. Its width comes from the published runs: the same formula is applied to each, and its error is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bigmodel_utils.scaling import communication, counts, laws, memory, shapes

if TYPE_CHECKING:
    import pandas as pd  # imported where a table is asked for: notebooks that only count do not wait for it

FOLDER = Path(__file__).resolve().parent.parent
COVERAGE = 0.8  # of the intervals: four times out of five
HOST_POWER = (1.0, 1.5)  # watts drawn, host included, a watt of the accelerator's rated power: see `estimate_run`
PUE = (1.08, 1.2)  # a data centre's watts a watt of its machines: of PaLM (appendix B) and of BLOOM (Luccioni et al. 2022)
KG_CO2_PER_KWH = (0.057, 0.429)  # of the French grid (BLOOM) and of that of GPT-3 (Patterson et al. 2021, table 4)
REPLICATED = laws.PUBLISHED["Besiroglu 2024"]  # Hoffmann's data, fitted again


class Infeasible(ValueError):
    """A plan that cannot be carried out; the message begins with the limit that binds: memory, time, batch or data."""


class Interval(NamedTuple):
    """An estimate between two bounds."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, value: Interval | tuple[float, float] | float) -> Interval:
        """Of two bounds, with their geometric mean between, or of a number that is known.

        Raises:
            ValueError: for bounds that are not positive or not in order.
        """
        if isinstance(value, Interval):
            return value
        low, high = (value, value) if isinstance(value, (int, float)) else value
        if not 0 < low <= high:
            raise ValueError(f"an interval needs two positive bounds in order, got {value}")
        return cls(low, math.sqrt(low * high), high)

    def __str__(self) -> str:
        return f"{self.middle:.3g} ({self.low:.3g} to {self.high:.3g})"


def product(*factors: Interval | float) -> Interval:
    """The product of independent factors: their distances from the middle, in logarithms, add as squares.

    An exact rule for log-normal factors whose intervals have the same coverage, which the product's then has too.
    """
    parts = [Interval.of(factor) for factor in factors]
    middle = math.prod(part.middle for part in parts)
    down = math.sqrt(sum(math.log(part.middle / part.low) ** 2 for part in parts))
    up = math.sqrt(sum(math.log(part.high / part.middle) ** 2 for part in parts))
    return Interval(middle * math.exp(-down), middle, middle * math.exp(up))


def reciprocal(interval: Interval) -> Interval:
    """1 / interval: the bounds change places."""
    return Interval(1 / interval.high, 1 / interval.middle, 1 / interval.low)


@cache
def accelerators() -> pd.DataFrame:
    """The accelerators, a row each: peaks without sparsity in FLOP/s, bytes, watts, dollars an hour, sources.

    NaN where no source was found. `link_bytes_per_s` is to the neighbours in the same machine or pod, both directions together.
    """
    import pandas as pd

    return pd.read_csv(FOLDER / "accelerators.csv", dtype={"price_date": str}).set_index("accelerator")


def accelerator(name: str) -> pd.Series:
    """One accelerator of the table.

    Raises:
        ValueError: for a name that is not in it, listing those that are.
    """
    if name not in accelerators().index:
        raise ValueError(f"no accelerator is called {name!r}: choose from {', '.join(accelerators().index)}")
    return accelerators().loc[name]


def peak_flops_per_s(name: str, precision: str = "bfloat16") -> float:
    """Peak of the matrix units in FLOP/s without sparsity, in 16 bits ("bfloat16", "float16") or 8 ("float8", "int8").

    Raises:
        ValueError: for another precision, or one that the accelerator does not have.
    """
    bits = {"bfloat16": 16, "float16": 16, "float8": 8, "int8": 8}.get(precision)
    if bits is None:
        raise ValueError(f"precision is bfloat16, float16, float8 or int8, got {precision!r}")
    peak = accelerator(name)[f"peak_{bits}bit_flops_per_s"]
    if math.isnan(peak):
        raise ValueError(f"the table has no {bits}-bit peak of {name}")
    return float(peak)


@cache
def published_runs() -> pd.DataFrame:
    """Published training runs with what the formula needs, a row each, and columns computed from it.

    `flops` is 6 N D with the parameters that one token passes through; `efficiency` is that over what the accelerators could
    have done at their 16-bit peak in the published hours: the implied model FLOPs utilisation of the whole run, waiting,
    restarts and all, and NaN where no hours are published. `is_mixture` marks mixtures of experts.
    """
    import pandas as pd

    table = pd.read_csv(FOLDER / "published_runs.csv")
    peak = table["accelerator"].map(accelerators()["peak_16bit_flops_per_s"])
    table["flops"] = 6 * table["active_parameters"].fillna(table["parameters"]) * table["tokens"]
    table["efficiency"] = table["flops"] / (3600 * table["accelerator_hours"] * peak)
    table["is_mixture"] = table["active_parameters"].notna()
    return table


def order_interval(values: np.ndarray, coverage: float = COVERAGE) -> Interval:
    """Bounds that a new value from the same source falls between with at least this probability, and the median.

    The k-th smallest and k-th largest of n exchangeable values: a new one lies outside with probability 2 k / (n + 1)
    (split conformal prediction, Vovk et al. 2005, https://doi.org/10.1007/b106715).

    Raises:
        ValueError: for too few values.
    """
    values = np.sort(np.asarray(values, dtype=float))
    k = math.floor((1 - coverage) / 2 * (len(values) + 1) + 1e-9)
    if k < 1:
        raise ValueError(f"a coverage of {coverage:.0%} needs at least {math.ceil(2 / (1 - coverage) - 1e-9) - 1} values")
    return Interval(float(values[k - 1]), float(np.median(values)), float(values[-k]))


def efficiency_interval(coverage: float = COVERAGE) -> Interval:
    """Efficiency of a whole run, from all published runs."""
    return order_interval(published_runs()["efficiency"].dropna().to_numpy(), coverage)


def back_test(coverage: float = COVERAGE, *, by: str = "family") -> pd.DataFrame:
    """Each published run's hours predicted from the efficiencies of the others.

    Args:
        by: what is left out together with a run: "family" (runs of the same people with the same code teach each other's
            efficiency), or "run".

    Returns:
        the published runs that have hours, with `predicted_hours`, `low_hours`, `high_hours`, `ratio` (predicted over
        published) and `is_covered`.
    """
    table = published_runs().dropna(subset=["efficiency"]).copy()
    others = [order_interval(table["efficiency"][table[by] != group], coverage) for group in table[by]]
    at_peak = table["accelerator_hours"] * table["efficiency"]  # hours that the run would have taken at its peak
    table["predicted_hours"] = at_peak / [interval.middle for interval in others]
    table["low_hours"] = at_peak / [interval.high for interval in others]
    table["high_hours"] = at_peak / [interval.low for interval in others]
    table["ratio"] = table["predicted_hours"] / table["accelerator_hours"]
    table["is_covered"] = table["accelerator_hours"].between(table["low_hours"], table["high_hours"])
    return table


@dataclass(frozen=True)
class Layout:
    """How a model is spread over devices: data x tensor x pipeline of them.

    `n_microbatches` of `micro_batch` sequences go through each replica in a step.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    zero_stage: int = 1
    recompute: bool = False
    micro_batch: int = 1
    n_microbatches: int = 1

    @property
    def n_devices(self) -> int:
        """All devices."""
        return self.data * self.tensor * self.pipeline

    @property
    def bubble(self) -> float:
        """Share of a step that the pipeline waits."""
        return communication.pipeline_bubble(self.pipeline, self.n_microbatches)

    def memory_bytes(self, model: memory.Model, length: int) -> dict[str, float]:
        """Of the fullest device, with 16-bit weights and activations (`memory.memory_bytes`)."""
        return memory.memory_bytes(
            model,
            self.micro_batch,
            length,
            precision="mixed",
            recompute=self.recompute,
            zero_stage=self.zero_stage,
            n_ranks=self.data,
            tensor_parallel=self.tensor,
            pipeline_parallel=self.pipeline,
        )

    def communication_bytes(self, model: memory.Model, length: int) -> dict[str, float]:
        """Sent by a device in a step (`memory.communication_bytes`)."""
        return memory.communication_bytes(
            model,
            self.micro_batch,
            length,
            data_parallel=self.data,
            tensor_parallel=self.tensor,
            pipeline_parallel=self.pipeline,
            n_microbatches=self.n_microbatches,
            zero_stage=self.zero_stage,
        )


@dataclass(frozen=True)
class Estimate:
    """What a run costs. Energy, CO2 and money are None where the table has no power or no price."""

    flops: float
    accelerator_hours: Interval
    days: Interval
    energy_kwh: Interval | None
    co2_kg: Interval | None
    usd: Interval | None
    memory: dict[str, float] | None  # of the fullest device, where a layout was given

    def table(self) -> pd.DataFrame:
        """One row a quantity: low, middle, high."""
        import pandas as pd

        rows = {
            "accelerator-hours": self.accelerator_hours,
            "days": self.days,
            "energy (MWh)": self.energy_kwh and Interval(*(value / 1e3 for value in self.energy_kwh)),
            "CO2 (t)": self.co2_kg and Interval(*(value / 1e3 for value in self.co2_kg)),
            "money (USD)": self.usd,
        }
        shown = {
            name: [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in row] for name, row in rows.items() if row
        }
        return pd.DataFrame.from_dict(shown, orient="index", columns=["low", "middle", "high"])


def estimate_run(
    model: memory.Model | int | float,
    n_tokens: float,
    accelerator_name: str = "h100-sxm",
    n_accelerators: int = 1,
    *,
    layout: Layout | None = None,
    precision: str = "bfloat16",
    efficiency: tuple[float, float] | Interval | None = None,
    usd_per_hour: tuple[float, float] | Interval | float | None = None,
    host_power: tuple[float, float] = HOST_POWER,
    pue: tuple[float, float] = PUE,
    kg_co2_per_kwh: tuple[float, float] = KG_CO2_PER_KWH,
) -> Estimate:
    """FLOPs, hours, energy, CO2 and money of a training run, each but the first as an interval.

    Args:
        model: a shape, a GPT's configuration, a published name, or a number of parameters (of a mixture of experts: those
            that one token passes through), for which 6 N D is used.
        n_tokens: seen in training, repeats counted.
        n_accelerators: where no layout says it.
        layout: checked against the accelerator's memory.
        efficiency: share of the peak that the whole run reaches; None: the interval of the published runs, 16 bits.
        usd_per_hour: of one accelerator; None: the table's prices.
        host_power: watts with the host's share, a watt of rated power. V100: 330 measured of 300 (Patterson et al. 2021,
            table 4); a node of 8 H100: 8.4 kW at most, 1.5 times their 700 (Latif et al. 2024, https://arxiv.org/abs/2412.08602).
        pue: watts of the data centre a watt of the machines.
        kg_co2_per_kwh: of the electricity.

    Raises:
        Infeasible: where the layout does not fit the accelerator's memory.
        ValueError: for an unknown accelerator or precision, or 8 bits without an efficiency of your own.
    """
    device = accelerator(accelerator_name)
    if efficiency is None and precision in ("float8", "int8"):
        raise ValueError("the published runs give no efficiency for 8 bits: give your own, such as efficiency=(0.1, 0.25)")
    efficiency = _given(efficiency, efficiency_interval())
    flops = float(counts.train_flops(model, int(n_tokens)))
    hours = product(flops / peak_flops_per_s(accelerator_name, precision) / 3600, reciprocal(efficiency))
    energy = None if math.isnan(device.power_w) else product(hours, device.power_w / 1e3, host_power, pue)
    usd_per_hour = _given(usd_per_hour, _price(device))
    used = None
    if layout is not None:
        n_accelerators = layout.n_devices
        used = layout.memory_bytes(model, shapes.as_shape(model).context_length)
        _check_memory(used, device.memory_bytes)
    return Estimate(
        flops=flops,
        accelerator_hours=hours,
        days=product(hours, 1 / 24 / n_accelerators),
        energy_kwh=energy,
        co2_kg=None if energy is None else product(energy, kg_co2_per_kwh),
        usd=None if usd_per_hour is None else product(hours, usd_per_hour),
        memory=used,
    )


def _given(value: Interval | tuple[float, float] | float | None, default: Interval | None) -> Interval | None:
    return default if value is None else Interval.of(value)


def _price(device: pd.Series) -> Interval | None:
    """Dollars an hour of the table, or None where it has none."""
    if math.isnan(device.usd_per_hour):
        return None
    return Interval(device.usd_per_hour_low, device.usd_per_hour, device.usd_per_hour_high)


FILL = 0.9  # share of a device's memory that a plan fills: the rest is the library's, the allocator's, the buffers'


def _check_memory(used: dict[str, float], available_bytes: float) -> None:
    if used["total"] > FILL * available_bytes:
        largest = max((part for part in used if part != "total"), key=used.get)
        raise Infeasible(
            f"memory: {used['total'] / 1e9:.0f} GB are needed and {FILL * available_bytes / 1e9:.0f} of "
            f"{available_bytes / 1e9:.0f} GB may be filled; most goes to {largest}"
        )


@dataclass(frozen=True)
class Plan:
    """A recommended run: how large, on how much text, spread how, and what it costs."""

    flops: Interval
    n_parameters: Interval
    n_tokens: Interval
    loss: Interval
    shape: shapes.Shape
    layout: Layout
    accelerator: str
    memory: dict[str, float]
    estimate: Estimate


def plan(
    *,
    flops: float | None = None,
    usd: float | None = None,
    accelerator_name: str = "h100-sxm",
    n_accelerators: int | None = None,
    max_days: float = 90.0,
    max_tokens: float = math.inf,
    batch_tokens: int | None = None,
    context_length: int = 4096,
    vocab_size: int = 32_000,
    law: laws.LawFit = REPLICATED,
    efficiency: tuple[float, float] | Interval | None = None,
    usd_per_hour: tuple[float, float] | Interval | float | None = None,
    network_bytes_per_s: float = 50e9,
) -> Plan:
    """The compute-optimal model and data for a budget, and a layout in which the run fits memory and time.

    Args:
        flops: the budget, or
        usd: money, from which the FLOPs follow as an interval (price and efficiency are uncertain).
        n_accelerators: None: the smallest power of two, 8 or more, that has the memory and finishes in time.
        max_days: that the run may take, at the middle efficiency.
        max_tokens: of text that there is.
        batch_tokens: of one optimiser step; limits how many replicas can work side by side. None: 0.292 C^0.3271 (DeepSeek
            2024, https://arxiv.org/abs/2401.02954, equation 1).
        law: of the loss by parameters and tokens; its optimum is used.
        network_bytes_per_s: that a device can send to another machine (default: 400 Gbit/s).

    Raises:
        Infeasible: saying which limit binds: data, batch, time or memory.
        ValueError: unless exactly one budget is given.
    """
    if (flops is None) == (usd is None):
        raise ValueError("give one budget: flops or usd")
    device = accelerator(accelerator_name)
    efficiency, usd_per_hour = _given(efficiency, efficiency_interval()), _given(usd_per_hour, _price(device))
    if usd is not None and usd_per_hour is None:
        raise ValueError(f"the table has no price of {accelerator_name}: give usd_per_hour")
    budget = (
        Interval.of(float(flops))
        if flops
        else product(usd * 3600 * peak_flops_per_s(accelerator_name), efficiency, reciprocal(usd_per_hour))
    )
    sizes, tokens = (Interval(*column) for column in zip(*(laws.compute_optimal(value, law) for value in budget)))
    if tokens.middle > max_tokens:
        raise Infeasible(
            f"data: the optimum is {tokens.middle:.3g} tokens and there are {max_tokens:.3g}: repeat it, spend less, or train a larger model on it"
        )
    shape = shapes.shape_for(sizes.middle, vocab_size=vocab_size, context_length=context_length)
    batch_tokens = batch_tokens or round(0.292 * budget.middle**0.3271)
    days = budget.middle / peak_flops_per_s(accelerator_name) / efficiency.middle / 3600 / 24  # on one accelerator
    counts_to_try = [n_accelerators] if n_accelerators else [2**i for i in range(3, 18) if 2**i >= days / max_days]
    layout = _first_layout(shape, accelerator_name, counts_to_try, days, max_days, batch_tokens, network_bytes_per_s)
    affordable = budget.middle / (counts.train_flops(shape, context_length) / context_length) / tokens.middle
    tokens = Interval(*(affordable * n for n in tokens))  # attention costs something too, which 6 N D leaves out
    losses = sorted(float(law.loss(*pair)) for pair in zip(sizes, tokens))
    estimate = estimate_run(
        shape, tokens.middle, accelerator_name, layout=layout, efficiency=efficiency, usd_per_hour=usd_per_hour
    )
    return Plan(budget, sizes, tokens, Interval(*losses), shape, layout, accelerator_name, estimate.memory, estimate)


def _first_layout(
    shape: shapes.Shape,
    accelerator_name: str,
    counts_to_try: list[int],
    days: float,
    max_days: float,
    batch_tokens: int,
    network_bytes_per_s: float,
) -> Layout:
    """The best layout on the first of these numbers of devices that is in time and has the memory."""
    if not counts_to_try or days / counts_to_try[-1] > max_days:
        n = counts_to_try[-1] if counts_to_try else 2**17
        raise Infeasible(
            f"time: {days / n:.3g} days on {n} accelerators where {max_days:g} are allowed: "
            f"{math.ceil(days / max_days)} accelerators would do"
        )
    for n in counts_to_try:
        try:
            return best_layout(shape, accelerator_name, n, batch_tokens, network_bytes_per_s)
        except Infeasible as error:
            if n == counts_to_try[-1] or not str(error).startswith("memory"):
                raise
    raise AssertionError("unreachable: the last number of devices returns or raises")


def best_layout(
    shape: shapes.Shape,
    accelerator_name: str,
    n_accelerators: int,
    batch_tokens: int,
    network_bytes_per_s: float = 50e9,
) -> Layout:
    """The layout that fits memory and wastes least: recomputed FLOPs, the pipeline's bubble, and traffic that nothing hides.

    Tensor parallelism uses the links inside a machine of 8, at half of their two-way rate, and nothing hides it; the rest uses
    the network behind half of the computation. A rough rule: it ranks layouts and does not predict their speed.

    Raises:
        Infeasible: where none fits: "batch" where there are more replicas than sequences in a batch, else "memory".
    """
    device = accelerator(accelerator_name)
    candidates = list(_layouts(shape, n_accelerators, batch_tokens))
    if not candidates:
        raise Infeasible(
            f"batch: {batch_tokens // shape.context_length} sequences of {shape.context_length} tokens cannot keep "
            f"{n_accelerators} accelerators busy: take fewer, or a larger batch"
        )
    used = {layout: layout.memory_bytes(shape, shape.context_length) for layout in candidates}
    fitting = [layout for layout in candidates if used[layout]["total"] <= FILL * device.memory_bytes]
    if not fitting:
        _check_memory(min(used.values(), key=lambda parts: parts["total"]), device.memory_bytes)
    link = device.link_bytes_per_s / 2 if device.link_bytes_per_s > 0 else network_bytes_per_s
    peak = peak_flops_per_s(accelerator_name)

    def waste(layout: Layout) -> float:
        n_tokens = layout.n_microbatches * layout.micro_batch * layout.data * shape.context_length
        compute_s = counts.train_flops(shape, n_tokens) / layout.n_devices / peak / 0.6
        sent = layout.communication_bytes(shape, shape.context_length)
        shared_s = (sent["data"] + sent["pipeline"]) / network_bytes_per_s
        exposed_s = sent["tensor"] / link + max(0.0, shared_s - compute_s / 2)
        bubble = layout.bubble / (1 - layout.bubble)
        return 1 + layout.recompute / 3 + bubble + exposed_s / compute_s

    return min(fitting, key=waste)


def _layouts(shape: shapes.Shape, n_accelerators: int, batch_tokens: int) -> Iterator[Layout]:
    """All layouts on so many devices whose replicas each have at least one sequence a step, and a pipeline enough to fill."""
    for tensor in (1, 2, 4, 8):
        for pipeline in (2**i for i in range(7)):
            replicas, rest = divmod(n_accelerators, tensor * pipeline)
            if rest or not replicas or shape.n_kv_heads % tensor or pipeline > shape.n_layers:
                continue
            sequences = batch_tokens // shape.context_length // replicas
            if sequences < max(1, 2 * (pipeline - 1)):
                continue
            for zero_stage in (1, 3) if pipeline == 1 else (1,):
                for recompute in (False, True):
                    yield Layout(replicas, tensor, pipeline, zero_stage, recompute, 1, sequences)
