"""Scaling laws: how a model's loss falls with its parameters N and its training tokens D, fitted, inverted and used to plan.

    L(N, D) = E + A / N^alpha + B / D^beta

is fitted as Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556, approach 3) define it: the least sum of Huber losses
(delta 1e-3) of log L - log L(N, D), from a grid of starts. How it is found is ours: all starts and all bootstrap samples are
solved side by side, by steps of which some are Newton's, so that the optimum is really reached. The original's optimiser stopped
early (Besiroglu et al. 2024, https://arxiv.org/abs/2404.10102).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Numbers = Sequence[float] | np.ndarray

DELTA = 1e-3  # where the Huber loss turns from quadratic to linear, in log loss
PARAMETERS = ("A", "B", "E", "alpha", "beta")  # in the order of `LawFit.samples`
MIN_RUNS = 8  # five parameters, and something left to judge them by
MAX_EXPONENT = 10.0  # of N and D: beyond it a term is a step at the smallest model
LOWEST_TERM = -25.0  # log of the least share of the smallest loss that a term may have: 0 for all purposes
PF_DAY = 1e15 * 86_400  # FLOPs of a day at 10^15 a second, Kaplan's unit


@dataclass(frozen=True)
class LawFit:
    """L(N, D) = E + A / N^alpha + B / D^beta, fitted or published."""

    A: float
    B: float
    E: float  # nats a token that no model and no data can take away
    alpha: float
    beta: float
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict, hash=False)  # by parameter, and of a and b
    level: float = 0.95  # share of samples inside each interval
    objective: float = float("nan")  # the sum of Huber losses at the optimum
    residuals: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False, compare=False)  # log L - log law, a run each
    samples: np.ndarray = field(default_factory=lambda: np.empty((0, 5)), repr=False, compare=False)  # bootstrap, PARAMETERS
    notes: tuple[str, ...] = ()  # what the data do not determine
    source: str = ""

    @property
    def a(self) -> float:
        """The best N grows as C^a, a = beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """The best D grows as C^b, b = alpha / (alpha + beta) = 1 - a."""
        return self.alpha / (self.alpha + self.beta)

    def loss(self, n_params: Numbers, n_tokens: Numbers) -> np.ndarray:
        """Predicted nats a token, in the shape that N and D broadcast to."""
        return _law(np.array([self.A, self.B, self.E, self.alpha, self.beta]), n_params, n_tokens)

    def outliers(self, threshold: float = 4.0) -> np.ndarray:
        """Indices of the runs whose residual lies that many robust standard deviations (1.48 MAD) from the median."""
        if not len(self.residuals):
            return np.empty(0, dtype=int)
        distance = np.abs(self.residuals - np.median(self.residuals))
        return np.flatnonzero(distance > threshold * max(1.4826 * np.median(distance), 1e-12))

    def loss_interval(self, n_params: float, n_tokens: float, level: float | None = None, seed: int = 0) -> tuple[float, float]:
        """Where the loss of one more run is expected: the bootstrap's laws, each with one of the runs' residuals.

        Raises:
            ValueError: for a law without bootstrap samples.
        """
        low, high = _tails(self, level)
        n_runs = len(self.residuals)
        noise = np.random.default_rng(seed).choice(self.residuals, len(self.samples)) * np.sqrt(n_runs / (n_runs - 5))
        return _interval(_law(self.samples.T, n_params, n_tokens) * np.exp(noise), low, high)

    def optimum_interval(self, flops: float, level: float | None = None) -> tuple[tuple[float, float], tuple[float, float]]:
        """Intervals of the N and of the D that `compute_optimal` recommends.

        Raises:
            ValueError: for a law without bootstrap samples.
        """
        low, high = _tails(self, level)
        A, B, _, alpha, beta = self.samples.T
        n_params, n_tokens = _optimum(flops, A, B, alpha, beta)
        return _interval(n_params, low, high), _interval(n_tokens, low, high)


def _law(parameters: np.ndarray, n_params: Numbers, n_tokens: Numbers) -> np.ndarray:
    A, B, E, alpha, beta = parameters
    return E + A * np.asarray(n_params, float) ** -alpha + B * np.asarray(n_tokens, float) ** -beta


def _tails(law: LawFit, level: float | None) -> tuple[float, float]:
    if not len(law.samples):
        raise ValueError("this law has no bootstrap samples: fit it with n_bootstrap=500, say")
    outside = 1 - (law.level if level is None else level)
    return outside / 2, 1 - outside / 2


def _interval(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    return tuple(float(value) for value in np.quantile(values, [low, high]))


_HOFFMANN = "Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556, appendix D.3"
_BESIROGLU = "Besiroglu et al. 2024, https://arxiv.org/abs/2404.10102"
PUBLISHED = {  # losses in nats a token of each one's own tokenizer and text: compare exponents and optima, not losses
    "Hoffmann 2022, rounded": LawFit(406.4, 410.7, 1.69, 0.34, 0.28, source=_HOFFMANN),
    "Hoffmann 2022, unrounded": LawFit(
        406.4, 410.7, 1.6934, 0.3392, 0.2849, source=f"the TeX source of Hoffmann et al. 2022, by {_BESIROGLU}"
    ),
    "Besiroglu 2024": LawFit(482.01, 2085.43, 1.8172, 0.3478, 0.3658, source=_BESIROGLU),
    "Muennighoff 2023": LawFit(
        float(np.exp(6.255414)),
        float(np.exp(7.3049974)),
        float(np.exp(0.6254804)),
        0.3526596,
        0.3526596,
        source="Muennighoff et al. 2023, https://arxiv.org/abs/2305.16264, appendix A, on C4; alpha = beta was imposed",
    ),
}
R_STAR = (
    15.387756  # repetitions after which repeated tokens have lost most of their worth (Muennighoff et al. 2023, appendix A)
)


def compute_optimal(flops: Numbers | float, law: LawFit) -> tuple[np.ndarray | float, np.ndarray | float]:
    """The N and D of the lowest loss that 6 N D = `flops` can buy: N = G (C/6)^a, D = (C/6)^b / G.

    With G = (alpha A / (beta B))^(1 / (alpha + beta)); chapter 11 derives it line by line.

    Returns:
        (n_params, n_tokens), numbers for a number, else arrays of the shape of `flops`.

    Raises:
        ValueError: for FLOPs or parameters of the law that are not positive.

    Source: Hoffmann et al. 2022, equation 4.
    """
    budget = np.asarray(flops, dtype=float)
    if not (np.isfinite(budget).all() and (budget > 0).all()):
        raise ValueError(f"flops must be positive and finite, got {flops}")
    if min(law.A, law.B, law.alpha, law.beta) <= 0:
        raise ValueError(f"A, B, alpha and beta must be positive for an optimum to exist, got {law}")
    n_params, n_tokens = _optimum(budget, law.A, law.B, law.alpha, law.beta)
    return (float(n_params), float(n_tokens)) if budget.ndim == 0 else (n_params, n_tokens)


def _optimum(flops, A, B, alpha, beta):
    log_g = (np.log(alpha * A) - np.log(beta * B)) / (alpha + beta)
    a = beta / (alpha + beta)
    n_params = np.exp(log_g + a * np.log(flops / 6))
    return n_params, flops / 6 / n_params


def simulate(law: LawFit, n_params: Numbers, n_tokens: Numbers, noise: float, seed: int = 0) -> np.ndarray:
    """Losses of runs that follow a law, each times exp(noise z), z standard normal: data whose law is known."""
    losses = law.loss(n_params, n_tokens)
    return losses * np.exp(noise * np.random.default_rng(seed).standard_normal(losses.shape))


# The fit.


def fit_law(
    n_params: Numbers,
    n_tokens: Numbers,
    loss: Numbers,
    n_bootstrap: int = 0,
    seed: int = 0,
    *,
    level: float = 0.95,
    delta: float = DELTA,
) -> LawFit:
    """Fit L(N, D) = E + A / N^alpha + B / D^beta to runs.

    Args:
        n_params: (n,) N of each run.
        n_tokens: (n,) D of each run, repeats counted.
        loss: (n,) nats a token.
        n_bootstrap: samples for the intervals; 500 are plenty. Each run gets a random weight (gamma, mean 1, variance
            n / (n - 5), for the five parameters that were fitted): a smooth bootstrap (Rubin 1981,
            https://doi.org/10.1214/aos/1176345338) that cannot draw a sample without an optimum.
        seed: of the bootstrap.
        level: of the percentile intervals.
        delta: of the Huber loss.

    Returns:
        the law; its `notes` say what the data do not determine, its `outliers()` which runs do not fit.

    Raises:
        ValueError: for values that are missing, not finite or not positive; for fewer than 8 runs or 6 different ones; for
            fewer than 3 different N or D; for N and D that change together along one line, as both terms then look the same.
    """
    log_n, log_d, log_loss = _check_runs(n_params, n_tokens, loss)
    if not 0 < level < 1 or n_bootstrap < 0:
        raise ValueError(f"level lies between 0 and 1 and n_bootstrap is 0 or more, got {level} and {n_bootstrap}")
    problem = _Problem(log_n, log_d, log_loss, delta)
    starts = problem.starts()
    optima = problem.search(starts)
    best = optima[:1]
    samples = problem.raw(problem.bootstrap(starts, optima, n_bootstrap, seed)) if n_bootstrap else np.empty((0, 5))
    law = dict(zip(PARAMETERS, problem.raw(best)[0].tolist()))
    value, residuals = problem.objective(best, np.ones((1, len(log_n))))
    return LawFit(
        **law,
        intervals=_intervals(samples, level) if n_bootstrap else {},
        level=level,
        objective=float(value[0]),
        residuals=-residuals[0],
        samples=samples,
        notes=_notes(best[0], log_loss.min()),
    )


def _check_runs(n_params: Numbers, n_tokens: Numbers, loss: Numbers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithms of N, D and L, or an error that says what is wrong with them."""
    columns = [np.asarray(column, dtype=float) for column in (n_params, n_tokens, loss)]
    if any(column.ndim != 1 or len(column) != len(columns[0]) for column in columns):
        raise ValueError(f"N, D and loss are three rows of one length, got shapes {[column.shape for column in columns]}")
    for name, column in zip(("n_params", "n_tokens", "loss"), columns):
        bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
        if len(bad):
            raise ValueError(
                f"{name} must be finite and positive: {len(bad)} are not, the first is run {bad[0]}, {column[bad[0]]}"
            )
    log_n, log_d, log_loss = (np.log(column) for column in columns)
    n_different = len(np.unique(np.column_stack([log_n, log_d]), axis=0))
    if len(log_n) < MIN_RUNS or n_different < 6:
        raise ValueError(f"five parameters need {MIN_RUNS} runs, 6 of them different, got {len(log_n)} and {n_different}")
    for name, column in (("n_params", log_n), ("n_tokens", log_d)):
        if len(np.unique(column.round(6))) < 3:
            raise ValueError(f"{name} takes fewer than 3 different values: its coefficient and exponent are not determined")
    slope, cut = np.polyfit(log_n, log_d, 1)
    if np.std(log_d - slope * log_n - cut) < 0.05:
        raise ValueError("N and D change together in all runs (as with D = 20 N, or one budget): vary them apart")
    return log_n, log_d, log_loss


def _intervals(samples: np.ndarray, level: float) -> dict[str, tuple[float, float]]:
    columns = dict(zip(PARAMETERS, samples.T))
    columns["a"] = columns["beta"] / (columns["alpha"] + columns["beta"])
    columns["b"] = 1 - columns["a"]
    return {name: _interval(values, (1 - level) / 2, (1 + level) / 2) for name, values in columns.items()}


def _notes(theta: np.ndarray, lowest: float) -> tuple[str, ...]:
    terms = zip(("A", "B", "E"), theta[:3] - lowest)
    notes = [f"{name} is 0 within the data: its term is not needed" for name, share in terms if share <= LOWEST_TERM + 1]
    at_bound = [name for name, value in zip(("alpha", "beta"), theta[3:]) if not 1e-3 < value < MAX_EXPONENT - 1e-3]
    return (*notes, *(f"{name} lies at the end of its range: the data do not determine it" for name in at_bound))


class _Problem:
    """Many fits at once. Parameters are rows (log A, log B, log E, alpha, beta), with log N and log D centred."""

    def __init__(self, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray, delta: float):
        self.centres = log_n.mean(), log_d.mean()
        self.x, self.y, self.log_loss, self.delta = log_n - self.centres[0], log_d - self.centres[1], log_loss, delta
        self.low = np.append(np.full(3, LOWEST_TERM + log_loss.min()), [0.0, 0.0])
        self.high = np.append(np.full(3, log_loss.max() + 25.0), [MAX_EXPONENT, MAX_EXPONENT])

    def raw(self, theta: np.ndarray) -> np.ndarray:
        """(S, 5) A, B, E, alpha, beta of the laws, for N and D as they were given."""
        log_a, log_b, log_e, alpha, beta = theta.T
        centred = [log_a + alpha * self.centres[0], log_b + beta * self.centres[1], log_e]
        return np.column_stack([*np.exp(centred), alpha, beta])

    def starts(self) -> np.ndarray:
        """(S, 5): a grid of exponents and of E; A and B are then the least squares of L(N, D) / L - 1."""
        exponents, shares = [0.03, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.6], [0.02, 0.3, 0.6, 0.8, 0.92, 0.99]
        grid = np.array(np.meshgrid(exponents, exponents, shares)).reshape(3, -1)
        alpha, beta = grid[:2]
        E = grid[2] * np.exp(self.log_loss.min())
        inverse = np.exp(-self.log_loss)
        p, q = np.exp(-np.outer(alpha, self.x)) * inverse, np.exp(-np.outer(beta, self.y)) * inverse  # (S, n)
        r = 1 - np.outer(E, inverse)
        pp, qq, pq, pr, qr = ((u * v).sum(axis=1) for u, v in ((p, p), (q, q), (p, q), (p, r), (q, r)))
        determinant = np.maximum(pp * qq - pq**2, 1e-12 * pp * qq)
        floor = 0.01 * np.exp(self.log_loss.min())
        A, B = (pr * qq - qr * pq) / determinant, (qr * pp - pr * pq) / determinant
        return np.column_stack([*np.log([np.maximum(A, floor), np.maximum(B, floor), E]), alpha, beta])

    def predict(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals log law - log L (S, n), and the shares of the three terms in the law (3, S, n)."""
        log_a, log_b, log_e, alpha, beta = (column[:, None] for column in theta.T)
        terms = np.stack(np.broadcast_arrays(log_a - alpha * self.x, log_b - beta * self.y, log_e))
        top = terms.max(axis=0)
        np.subtract(terms, top, out=terms)
        np.exp(terms, out=terms)
        total = terms.sum(axis=0)
        terms /= total
        return top + np.log(total) - self.log_loss, terms

    def objective(self, theta: np.ndarray, weights: np.ndarray, delta: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sums of Huber losses (S,), and residuals (S, n)."""
        delta = self.delta if delta is None else delta
        residuals, _ = self.predict(theta)
        return (weights * _huber(residuals, delta)).sum(axis=1), residuals

    def search(self, starts: np.ndarray) -> np.ndarray:
        """Different local optima, the best one first: all starts go a little way, the best of them to the end."""
        weights = np.ones((1, len(self.x)))
        theta = starts
        for factor, n_steps in ((100, 12), (10, 12), (1, 25)):
            theta, values = self.descend(theta, weights, self.delta * factor, n_steps)
        theta, values = self.descend(theta[np.argsort(values)[:24]], weights, self.delta, 400, tolerance=1e-13)
        order = np.argsort(values)
        kept = [order[0]]
        for index in order[1:]:
            apart = min(np.abs(theta[index] - theta[other]).max() for other in kept)
            if apart > 1e-2 and values[index] < 1.5 * values[order[0]] + 1e-12:
                kept.append(index)
        return theta[kept[:4]]

    def bootstrap(self, starts: np.ndarray, optima: np.ndarray, n_bootstrap: int, seed: int) -> np.ndarray:
        """(n_bootstrap, 5): the best optimum of each random weighting, from the optima of the data and its own two best starts."""
        n_runs = len(self.x)
        shape = (n_runs - 5) / n_runs
        weights = np.random.default_rng(seed).gamma(shape, 1 / shape, size=(n_bootstrap, n_runs))
        own = np.argsort(weights @ _huber(self.predict(starts)[0], self.delta).T, axis=1)[:, :2]  # (n_bootstrap, 2)
        theta = np.concatenate([np.broadcast_to(optima, (n_bootstrap, *optima.shape)), starts[own]], axis=1)
        n_each, repeated = theta.shape[1], np.repeat(weights, theta.shape[1], axis=0)
        flat, _ = self.descend(theta.reshape(-1, 5), repeated, 10 * self.delta, 12)
        flat, values = self.descend(flat, repeated, self.delta, 150)
        best = values.reshape(-1, n_each).argmin(axis=1)
        return flat.reshape(-1, n_each, 5)[np.arange(n_bootstrap), best]

    def descend(
        self, theta: np.ndarray, weights: np.ndarray, delta: float, n_steps: int, tolerance: float = 1e-9
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower each row's sum of Huber losses, some rows at a time; those that no longer fall leave the computation.

        A step solves (H + damping diag(H)) step = gradient twice: with the Hessian of a parabola that lies above the Huber
        loss (which cannot fail), and with the true Hessian (which converges at once when the runs inside and outside
        delta stay the same); the lower result is taken, or the damping is raised.

        Returns:
            parameters (S, 5) and sums (S,).
        """
        weights = np.broadcast_to(weights, (len(theta), len(self.x)))
        if len(theta) > 1 and weights.size > 250_000:  # numbers that fit a processor's cache, and not a gigabyte
            rows = np.array_split(np.arange(len(theta)), min(len(theta), -(-weights.size // 250_000)))
            parts = [self.descend(theta[some], weights[some], delta, n_steps, tolerance) for some in rows]
            return tuple(np.concatenate(part) for part in zip(*parts))
        theta = theta.copy()
        values = self.objective(theta, weights, delta)[0]
        damping, n_idle, active = np.full(len(theta), 1e-2), np.zeros(len(theta), int), np.arange(len(theta))
        for _ in range(n_steps):
            t, w = theta[active], weights[active]
            tried = [np.clip(t - step, self.low, self.high) for step in self.steps(t, w, delta, damping[active])]
            sums = np.array([self.objective(candidate, w, delta)[0] for candidate in tried])
            sums = np.where(np.isfinite(sums), sums, np.inf)
            choice, rows = sums.argmin(axis=0), np.arange(len(active))
            lower = sums[choice, rows] < values[active]
            gain = np.where(lower, values[active] - sums[choice, rows], 0.0)
            theta[active[lower]] = np.array(tried)[choice, rows][lower]
            n_idle[active] = np.where(gain > tolerance * values[active], 0, n_idle[active] + 1)
            values[active] -= gain
            damping[active] = np.clip(damping[active] * np.where(lower, 0.2, 6.0), 1e-12, 1e8)
            active = active[(n_idle[active] < 6) & (values[active] > 1e-24)]
            if not len(active):
                break
        return theta, values

    def steps(self, theta: np.ndarray, weights: np.ndarray, delta: float, damping: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both steps of `descend`, (S, 5) each."""
        residuals, (p, q, s) = self.predict(theta)
        slope = weights * np.clip(residuals, -delta, delta)  # the Huber loss's derivative
        jacobian = np.stack([p, q, s, -self.x * p, -self.y * q], axis=2)  # (S, n, 5)
        gradient = np.einsum("sn,snk->sk", slope, jacobian)
        above = _gram(jacobian, weights * (delta / np.maximum(np.abs(residuals), delta)))
        true = _gram(jacobian, weights * (np.abs(residuals) <= delta) - slope)
        for first, exponent, share, at in ((0, 3, p, self.x), (1, 4, q, self.y)):
            pull = slope * share
            true[:, first, first] += pull.sum(axis=1)
            true[:, first, exponent] -= pull @ at
            true[:, exponent, first] -= pull @ at
            true[:, exponent, exponent] += pull @ at**2
        true[:, 2, 2] += (slope * s).sum(axis=1)
        scale = np.maximum(np.einsum("skk->sk", above), 1e-14)
        ridge = np.eye(5) * (damping[:, None] * scale + 1e-13 * scale.max(axis=1, keepdims=True))[:, :, None]
        return _solve(above + ridge, gradient), _solve(true + ridge, gradient)


def _huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residuals)
    inside = np.minimum(size, delta)
    return inside * (size - 0.5 * inside)


def _gram(jacobian: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """J^T diag(w) J of each row: (S, n, 5) and (S, n) -> (S, 5, 5)."""
    return (jacobian * weights[:, :, None]).transpose(0, 2, 1) @ jacobian


def _solve(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.solve(matrices, vectors[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:  # one of them is exactly singular
        return (np.linalg.pinv(matrices) @ vectors[:, :, None])[:, :, 0]


# Power laws, IsoFLOP profiles, and Kaplan's form.


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient x^exponent."""

    coefficient: float
    exponent: float
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict, hash=False)
    source: str = ""

    def __call__(self, x: Numbers) -> np.ndarray:
        return self.coefficient * np.asarray(x, dtype=float) ** self.exponent

    @property
    def scale(self) -> float:
        """x_c in y = (x_c / x)^p with p = -exponent, Kaplan's way of writing a falling law."""
        return float(np.exp(-np.log(self.coefficient) / self.exponent))


_KAPLAN = "Kaplan et al. 2020, https://arxiv.org/abs/2001.08361"
KAPLAN = {  # N without embeddings, C in FLOPs, L in nats a token of WebText2
    "L(N)": PowerLaw(8.8e13**0.076, -0.076, source=f"{_KAPLAN}, equation 1.1"),
    "L(D)": PowerLaw(5.4e13**0.095, -0.095, source=f"{_KAPLAN}, equation 1.2"),
    "L(C)": PowerLaw((3.1e8 * PF_DAY) ** 0.050, -0.050, source=f"{_KAPLAN}, equation 1.3"),
    "N(C)": PowerLaw(1.3e9 / PF_DAY**0.73, 0.73, source=f"{_KAPLAN}, table 6"),
}


def fit_power_law(x: Numbers, y: Numbers, level: float = 0.95) -> PowerLaw:
    """The straight line through log y against log x, with Student's intervals.

    Raises:
        ValueError: for values that are not positive and finite, or fewer than 3 different x.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise ValueError("x and y are positive, finite and of one length")
    if len(np.unique(x)) < 3:
        raise ValueError(f"a power law with an interval needs 3 different x, got {len(np.unique(x))}")
    from scipy import stats  # takes longer to import than all else here

    line = stats.linregress(np.log(x), np.log(y))
    reach = stats.t.ppf((1 + level) / 2, len(x) - 2)
    exponent = (line.slope - reach * line.stderr, line.slope + reach * line.stderr)
    coefficient = np.exp(line.intercept + reach * line.intercept_stderr * np.array([-1, 1]))
    intervals = {"exponent": tuple(map(float, exponent)), "coefficient": tuple(coefficient.tolist())}
    return PowerLaw(float(np.exp(line.intercept)), float(line.slope), intervals)


@dataclass(frozen=True)
class IsoFlopFit:
    """The best size at each budget, and the power law N = k C^a through them."""

    flops: np.ndarray  # (k,) budgets
    n_params: np.ndarray  # (k,) at the bottom of each budget's parabola
    loss: np.ndarray  # (k,) there
    law: PowerLaw
    notes: tuple[str, ...] = ()  # budgets that show no minimum


def fit_isoflop(
    flops: Numbers, n_params: Numbers, loss: Numbers, n_bootstrap: int = 0, seed: int = 0, level: float = 0.95
) -> IsoFlopFit:
    """A parabola in log N for each budget, and a power law through their minima (Hoffmann et al. 2022, approach 2).

    Args:
        flops: (n,) FLOPs of each run; runs within 10 % of each other are one budget.
        n_params: (n,).
        loss: (n,).
        n_bootstrap: fits to losses drawn around the parabolas with their residuals' deviation; they give the interval of the
            exponent. It needs more runs than three a budget.
        seed: of these draws.
        level: of the interval.

    Raises:
        ValueError: for values that are not positive and finite, a budget with fewer than 3 sizes, or fewer than 2 budgets
            whose minimum lies among their sizes.
    """
    log_c, log_n, values = np.log(flops), np.log(n_params), np.asarray(loss, dtype=float)
    if not np.isfinite([log_c, log_n, values]).all():
        raise ValueError("FLOPs, N and loss are positive and finite")
    order = np.argsort(log_c)
    budgets = np.split(order, np.flatnonzero(np.diff(log_c[order]) > 0.1) + 1)
    for budget in budgets:
        if len(np.unique(log_n[budget])) < 3:
            raise ValueError(f"the budget of {np.exp(log_c[budget].mean()):.3g} FLOPs has fewer than 3 sizes")
    bottoms = [_bottom(log_n[budget], values[budget]) for budget in budgets]
    kept = [index for index, bottom in enumerate(bottoms) if bottom is not None]
    centres = np.array([log_c[budget].mean() for budget in budgets])
    notes = tuple(f"no minimum at {np.exp(c):.3g} FLOPs" for index, c in enumerate(centres) if index not in kept)
    if len(kept) < 2:
        raise ValueError("fewer than 2 budgets have their minimum among their sizes: add smaller or larger models")
    found = np.array([bottoms[index] for index in kept])  # (k, 2): log N and loss
    a, cut = np.polyfit(centres[kept], found[:, 0], 1)
    intervals = {}
    if n_bootstrap:
        exponents = _redraw(log_n, values, [budgets[index] for index in kept], centres[kept], n_bootstrap, seed)
        intervals = {"exponent": _interval(exponents, (1 - level) / 2, (1 + level) / 2)}
    law = PowerLaw(float(np.exp(cut)), float(a), intervals)
    return IsoFlopFit(np.exp(centres[kept]), np.exp(found[:, 0]), found[:, 1], law, notes)


def _bottom(log_n: np.ndarray, loss: np.ndarray) -> tuple[float, float] | None:
    """Where the parabola through (log N, loss) is lowest, and its value; None where that is not among the sizes."""
    centre = log_n.mean()
    parabola = np.polynomial.Polynomial.fit(log_n - centre, loss, 2, domain=[])
    _, slope, curvature = parabola.convert().coef
    at = -slope / (2 * curvature) if curvature > 0 else np.inf
    if not (log_n - centre).min() <= at <= (log_n - centre).max():
        return None
    return float(at + centre), float(parabola(at))


def _redraw(log_n, loss, budgets, centres, n_bootstrap, seed) -> np.ndarray:
    """Exponents of power laws through the minima of losses drawn around the parabolas."""
    hats, fits = [], []
    for budget in budgets:
        design = np.vander(log_n[budget] - log_n[budget].mean(), 3)
        hats.append(np.linalg.pinv(design))  # losses -> the parabola's coefficients
        fits.append(design @ hats[-1] @ loss[budget])
    squares = sum(np.square(loss[budget] - fit).sum() for budget, fit in zip(budgets, fits))
    n_free = sum(len(budget) - 3 for budget in budgets)
    if n_free < 1:
        raise ValueError("three runs a budget leave nothing to judge the noise by: no interval without a fourth")
    noise, generator = np.sqrt(squares / n_free), np.random.default_rng(seed)
    bottoms = []
    for budget, hat, fit in zip(budgets, hats, fits):
        drawn = fit + noise * generator.standard_normal((n_bootstrap, len(budget)))
        curvature, slope, _ = hat @ drawn.T
        at = np.where(curvature > 0, -slope / (2 * np.where(curvature > 0, curvature, 1.0)), np.nan)
        bottoms.append(at + log_n[budget].mean())
    bottoms = np.array(bottoms).T  # (n_bootstrap, k)
    bottoms = bottoms[np.isfinite(bottoms).all(axis=1)]
    away = centres - centres.mean()
    return bottoms @ away / (away @ away)


@dataclass(frozen=True)
class KaplanFit:
    """L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D: no loss remains for N and D without end."""

    N_c: float
    D_c: float
    alpha_N: float
    alpha_D: float
    objective: float = float("nan")
    source: str = ""

    def loss(self, n_params: Numbers, n_tokens: Numbers) -> np.ndarray:
        """Predicted nats a token, in the shape that N and D broadcast to."""
        n_params, n_tokens = np.asarray(n_params, dtype=float), np.asarray(n_tokens, dtype=float)
        return ((self.N_c / n_params) ** (self.alpha_N / self.alpha_D) + self.D_c / n_tokens) ** self.alpha_D


KAPLAN_JOINT = KaplanFit(6.4e13, 1.8e13, 0.076, 0.103, source=f"{_KAPLAN}, table 2")


def fit_kaplan(n_params: Numbers, n_tokens: Numbers, loss: Numbers, delta: float = DELTA) -> KaplanFit:
    """Fit Kaplan's joint law by the same Huber loss of log residuals as `fit_law`, from 9 starts.

    Raises:
        ValueError: as `fit_law`.

    Source: Kaplan et al. 2020, equation 1.5.
    """
    from scipy import optimize

    log_n, log_d, log_loss = _check_runs(n_params, n_tokens, loss)

    def residuals(theta: np.ndarray) -> np.ndarray:  # theta: log N_c, log D_c, log alpha_N, log alpha_D
        alpha_n, alpha_d = np.exp(theta[2:])
        return alpha_d * np.logaddexp((theta[0] - log_n) * alpha_n / alpha_d, theta[1] - log_d) - log_loss

    fits = []
    for alpha_n in (0.03, 0.08, 0.2):
        for alpha_d in (0.03, 0.1, 0.3):
            start = [log_n.mean() + log_loss.mean() / alpha_n, log_d.mean() + log_loss.mean() / alpha_d - 1]
            start += [np.log(alpha_n), np.log(alpha_d)]
            for f_scale in (100 * delta, delta):  # the smooth problem first
                fit = optimize.least_squares(residuals, start, loss="huber", f_scale=f_scale, x_scale="jac", max_nfev=400)
                start = fit.x
            fits.append(fit)
    best = min(fits, key=lambda fit: fit.cost)
    N_c, D_c, alpha_N, alpha_D = np.exp(best.x).tolist()
    return KaplanFit(N_c, D_c, alpha_N, alpha_D, float(best.cost))


# Data that run out.


def effective_tokens(n_unique: Numbers, n_tokens: Numbers, r_star: float = R_STAR) -> np.ndarray:
    """How many fresh tokens D tokens are worth of which only U differ: U + U R* (1 - exp(-(D / U - 1) / R*)).

    Raises:
        ValueError: for counts or an r_star that are not positive.

    Source: Muennighoff et al. 2023, https://arxiv.org/abs/2305.16264, equation 5.
    """
    unique, total = np.asarray(n_unique, dtype=float), np.asarray(n_tokens, dtype=float)
    if not ((unique > 0).all() and (total > 0).all() and r_star > 0):
        raise ValueError("n_unique, n_tokens and r_star must be positive")
    n_repeats = np.maximum(total / unique - 1, 0.0)
    return np.minimum(unique, total) - unique * r_star * np.expm1(-n_repeats / r_star)


def fit_repetition(law: LawFit, n_params: Numbers, n_unique: Numbers, n_tokens: Numbers, loss: Numbers) -> float:
    """R* of `effective_tokens`, given the law of fresh tokens: least squares of the log residuals, between 0.01 and 1000.

    A constant factor between the law and these runs is fitted too, so that only the shape over repetitions counts.
    """
    from scipy import optimize

    log_loss = np.log(np.asarray(loss, dtype=float))

    def cost(log_r: float) -> float:
        predicted = np.log(law.loss(n_params, effective_tokens(n_unique, n_tokens, np.exp(log_r))))
        return float(np.var(log_loss - predicted))

    return float(np.exp(optimize.minimize_scalar(cost, bounds=np.log([1e-2, 1e3]), method="bounded").x))
