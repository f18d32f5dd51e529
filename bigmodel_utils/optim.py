"""Optimisers and learning-rate schedules, written to be read: each is its formula.

`torch.optim.Optimizer` keeps the books (parameter groups, state, state dict), so that these drop into `train.fit`,
`checkpoint.save` and torch's schedulers; the arithmetic is here. Names, conventions and defaults are those of torch.optim,
and every class takes the same 100 float64 steps as its counterpart there. Training proper uses torch.optim's, which are fused
into fewer passes over memory; or `Muon`, whose AdamW is torch's and whose matrices are updated here, since torch's own Muon
leaves the device under XLA.

In the others w is a parameter, g its gradient, lr the step size, and `weight_decay` adds weight_decay * w to g
(the gradient of weight_decay/2 * sum of squares), but for AdamW, which shrinks w itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel_utils import device as devices

Parameters = (
    Iterable[Tensor] | Iterable[dict[str, Any]]
)  # as torch.optim takes them: tensors, or groups with their own settings
Schedule = Callable[[int], float]  # steps done -> factor on the learning rate; torch's LambdaLR takes it


class SGD(torch.optim.Optimizer):
    """w <- w - lr g. Gradient descent where g is the whole loss's gradient, *stochastic* where it is a mini-batch's.

    Raises:
        ValueError: for no parameters, or a negative or infinite lr or weight_decay.

    Source: Robbins and Monro 1951, https://doi.org/10.1214/aoms/1177729586.
    """

    def __init__(self, params: Parameters, lr: float = 1e-3, weight_decay: float = 0.0):
        super().__init__(params, _nonnegative(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for w, g, _, group in _visit(self):
            g = g + group["weight_decay"] * w
            w -= group["lr"] * g


class Momentum(torch.optim.Optimizer):
    """v <- momentum v + g, w <- w - lr v; with `nesterov`, w <- w - lr (g + momentum v), the velocity looked ahead.

    Raises:
        ValueError: as SGD, for a momentum outside [0, 1), and for nesterov without momentum.

    Source: Polyak 1964, https://doi.org/10.1016/0041-5553(64)90137-5; Nesterov 1983, in the form of
    Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html, and torch.optim.
    """

    def __init__(
        self, params: Parameters, lr: float = 1e-3, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
    ):
        if nesterov and momentum == 0:
            raise ValueError("nesterov looks ahead along the velocity: it needs a momentum above 0")
        settings = _nonnegative(lr=lr, weight_decay=weight_decay) | _fractions(momentum=momentum)
        super().__init__(params, settings | {"nesterov": nesterov})

    @torch.no_grad()
    def step(self) -> None:
        for w, g, state, group in _visit(self):
            g = g + group["weight_decay"] * w
            v = state["v"] = group["momentum"] * state.get("v", 0.0) + g
            w -= group["lr"] * (g + group["momentum"] * v if group["nesterov"] else v)


class AdaGrad(torch.optim.Optimizer):
    """s <- s + g^2, w <- w - lr g / (sqrt(s) + eps): each coordinate's step falls with the gradients that it has seen.

    Raises:
        ValueError: as SGD, and for a negative or infinite eps.

    Source: Duchi, Hazan and Singer 2011, https://jmlr.org/papers/v12/duchi11a.html.
    """

    def __init__(self, params: Parameters, lr: float = 1e-2, eps: float = 1e-10, weight_decay: float = 0.0):
        super().__init__(params, _nonnegative(lr=lr, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for w, g, state, group in _visit(self):
            g = g + group["weight_decay"] * w
            s = state["s"] = state.get("s", 0.0) + g**2
            w -= group["lr"] * g / (s.sqrt() + group["eps"])


class RMSProp(torch.optim.Optimizer):
    """s <- alpha s + (1 - alpha) g^2, w <- w - lr g / (sqrt(s) + eps): AdaGrad that forgets.

    Raises:
        ValueError: as AdaGrad, and for an alpha outside [0, 1).

    Source: Tieleman and Hinton 2012, lecture 6.5, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf.
    """

    def __init__(self, params: Parameters, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, _nonnegative(lr=lr, eps=eps, weight_decay=weight_decay) | _fractions(alpha=alpha))

    @torch.no_grad()
    def step(self) -> None:
        for w, g, state, group in _visit(self):
            g = g + group["weight_decay"] * w
            s = state["s"] = group["alpha"] * state.get("s", 0.0) + (1 - group["alpha"]) * g**2
            w -= group["lr"] * g / (s.sqrt() + group["eps"])


class Adam(torch.optim.Optimizer):
    """w <- w - lr m / (sqrt(s) + eps), with m and s the running means of g and g^2, corrected for starting at 0.

    Raises:
        ValueError: as AdaGrad, and for betas outside [0, 1).

    Source: Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        settings = _nonnegative(lr=lr, eps=eps, weight_decay=weight_decay)
        super().__init__(params, settings | {"betas": tuple(_fractions(beta1=betas[0], beta2=betas[1]).values())})

    @torch.no_grad()
    def step(self) -> None:
        for w, g, state, group in _visit(self):
            g = g + group["weight_decay"] * w
            w -= group["lr"] * adam_direction(g, state, group)


class AdamW(Adam):
    """Adam whose weight decay shrinks the weights, w <- (1 - lr weight_decay) w, instead of entering the gradient.

    Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2 (with torch's lr in the decay).
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, lr, betas, eps, weight_decay)

    @torch.no_grad()
    def step(self) -> None:
        for w, g, state, group in _visit(self):
            w *= 1 - group["lr"] * group["weight_decay"]
            w -= group["lr"] * adam_direction(g, state, group)


def adam_direction(g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Adam's unit-free direction m / (sqrt(s) + eps), of the shape of g; counts the step and updates the means in `state`."""
    beta1, beta2 = group["betas"]
    k = state["k"] = state.get("k", 0) + 1
    m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    s = state["s"] = beta2 * state.get("s", 0.0) + (1 - beta2) * g**2
    m, s = m / (1 - beta1**k), s / (1 - beta2**k)  # both began at 0: divide by the weight that the gradients have so far
    return m / (s.sqrt() + group["eps"])


class Muon(torch.optim.Optimizer):
    """The matrices inside a network by Muon, and all else by AdamW, with one state dict and one schedule.

    Muon replaces each matrix's momentum by the nearest matrix with orthogonal rows or columns, roughly (`orthogonalize`), so
    that every direction moves equally far:
    m <- momentum m + (1 - momentum) g, w <- (1 - lr weight_decay) w - lr sqrt(max(1, rows / columns)) orthogonal(m),
    with m looked ahead as Nesterov does. That suits maps from activations to activations. An embedding, of which a batch
    moves few rows, the output layer, and vectors are AdamW's.

    Args:
        matrices: two-dimensional parameters; `split_matrices` finds them, and the others, in a model.
        others: the other parameters.
        lr: of the matrices; an update has singular values near 1, so that this is how far a weight matrix moves.
        adamw_lr: of the others.
        weight_decay: of both.
        momentum: of Muon.
        betas: of AdamW.

    Raises:
        ValueError: as AdamW, for no matrices or no others, and for matrices that are not two-dimensional.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        lr: float = 0.02,
        adamw_lr: float = 3e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ):
        matrices, others = list(matrices), list(others)
        _nonnegative(lr=lr, adamw_lr=adamw_lr, weight_decay=weight_decay)
        _fractions(momentum=momentum, beta1=betas[0], beta2=betas[1])
        if not matrices or any(w.ndim != 2 for w in matrices):
            raise ValueError(f"Muon needs matrices, got parameters of shapes {[tuple(w.shape) for w in matrices]}")
        fused = all(devices.supports_fused(w.device) for w in others)
        self.adamw = torch.optim.AdamW(others, lr=adamw_lr, betas=betas, weight_decay=weight_decay, fused=fused)
        muon = {"params": matrices, "lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([muon, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let AdamW work on this optimiser's state and groups, which schedulers and checkpoints see."""
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[1:]

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for w in group["params"]:
            if w.grad is None:
                continue
            if "m" not in self.state[w]:
                self.state[w]["m"] = torch.zeros_like(w)
            m = self.state[w]["m"].lerp_(w.grad, 1 - group["momentum"])
            direction = orthogonalize(w.grad.lerp(m, group["momentum"]))
            w *= 1 - group["lr"] * group["weight_decay"]
            w.add_(direction, alpha=-group["lr"] * math.sqrt(max(1, w.shape[0] / w.shape[1])))
        self.adamw.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def orthogonalize(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearly U V^T where x (n, m) is U S V^T: its singular values all moved to about 1, by products of matrices alone.

    Five steps of a Newton-Schulz iteration, x <- a x + (b x x^T + c (x x^T)^2) x, whose coefficients are chosen to raise small
    singular values fast; the results are between about 0.7 and 1.2, or less for a singular value near 0.

    Args:
        x: the matrix; its size does not matter.
        dtype: to compute in; `Muon` needs no more than bfloat16.

    Returns:
        (n, m) in that precision.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """
    is_tall, y = x.shape[0] > x.shape[1], x.to(dtype)
    y = y.mT if is_tall else y  # the smaller of the two products x x^T and x^T x
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = _add_product(3.4445, y, 1.0, _add_product(-4.7750, gram, 2.0315, gram, gram), y)
    return y.mT if is_tall else y


def _add_product(beta: float, x: Tensor, alpha: float, a: Tensor, b: Tensor) -> Tensor:
    """beta x + alpha a b; in two operations under XLA, for which `addmm` with factors would be computed on the host."""
    return beta * x + alpha * (a @ b) if x.device.type == "xla" else torch.addmm(x, a, b, beta=beta, alpha=alpha)


def split_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """A model's parameters as `Muon` takes them: the weights of linear maps in its repeated layers, and the others.

    Repeated layers are those in an `nn.ModuleList`, such as a GPT's blocks: embeddings and output layers are outside.

    Raises:
        ValueError: for a model without such matrices.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    linear = {id(part.weight) for layers in lists for part in layers.modules() if isinstance(part, nn.Linear)}
    matrices = [w for w in model.parameters() if id(w) in linear]
    if not matrices:
        raise ValueError(f"{type(model).__name__} has no linear map inside an nn.ModuleList: name the matrices yourself")
    return matrices, [w for w in model.parameters() if id(w) not in linear]


def step_decay(every: int, factor: float = 0.1) -> Schedule:
    """Multiply the learning rate by `factor` after each `every` steps.

    Raises:
        ValueError: for an interval below 1, or a factor outside (0, 1].
    """
    _at_least_one(every=every)
    if not 0 < factor <= 1:
        raise ValueError(f"factor must lie in (0, 1], got {factor}")
    return lambda step: factor ** (step // every)


def inverse_time(half_step: float) -> Schedule:
    """1 / (1 + step / half_step): half after `half_step` steps and, late, in proportion to 1/step.

    Raises:
        ValueError: for a half_step that is not above 0.

    Source: Robbins and Monro 1951: the sum of these factors diverges, the sum of their squares does not.
    """
    if not half_step > 0:
        raise ValueError(f"half_step must be above 0, got {half_step}")
    return lambda step: 1 / (1 + step / half_step)


def cosine(max_steps: int, floor: float = 0.0) -> Schedule:
    """From 1 down to `floor` along half a cosine over `max_steps` steps, and `floor` from there on.

    Raises:
        ValueError: for max_steps below 1, or a floor outside [0, 1].

    Source: Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, equation 5 (one period).
    """
    _at_least_one(max_steps=max_steps)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie in [0, 1], got {floor}")
    return lambda step: floor + (1 - floor) * (1 + math.cos(math.pi * min(step / max_steps, 1.0))) / 2


def warmup(warmup_steps: int, then: Schedule = lambda step: 1.0) -> Schedule:
    """Rise in equal steps, 1/warmup_steps, 2/warmup_steps ... 1, then follow `then`, whose steps count from the rise's end.

    Raises:
        ValueError: for warmup_steps below 1.

    Source: Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 2.2.
    """
    _at_least_one(warmup_steps=warmup_steps)
    return lambda step: (step + 1) / warmup_steps if step < warmup_steps else then(step - warmup_steps)


def trapezoid(max_steps: int, warmup_steps: int, decay_steps: int) -> Schedule:
    """Rise as `warmup`, stay at 1, and fall in a straight line, decay_steps long, that reaches 0 after max_steps.

    Unlike a cosine's, its course does not depend on the end until the fall begins: a run can be made longer halfway.

    Raises:
        ValueError: for lengths below 1, or a rise and a fall that overlap.

    Source: Xing et al. 2018, https://arxiv.org/abs/1802.08770; Hägele et al. 2024, https://arxiv.org/abs/2405.18392.
    """
    _at_least_one(max_steps=max_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)
    if warmup_steps + decay_steps > max_steps + 1:
        raise ValueError(f"{warmup_steps} steps of rise and {decay_steps} of fall must fit into {max_steps} steps")
    return lambda step: max(0.0, min(1.0, (step + 1) / warmup_steps, (max_steps - step) / decay_steps))


def _visit(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor, dict[str, Any], dict[str, Any]]]:
    """(parameter, gradient, its state, its group's settings) for each parameter that has a gradient."""
    for group in optimizer.param_groups:
        for w in group["params"]:
            if w.grad is not None:
                yield w, w.grad, optimizer.state[w], group


def _nonnegative(**settings: float) -> dict[str, float]:
    for name, value in settings.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of 0 or more, got {value}")
    return settings


def _fractions(**settings: float) -> dict[str, float]:
    for name, value in settings.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} is the share of the past that is kept: it must lie in [0, 1), got {value}")
    return settings


def _at_least_one(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name} counts steps: it must be 1 or more, got {value}")
