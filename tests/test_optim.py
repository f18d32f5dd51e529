"""Our optimisers and schedules against torch's."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from bigmodel_utils import checkpoint, models, optim, train

N_STEPS = 100
rates = st.floats(1e-4, 0.1)
decays = st.sampled_from([0.0, 1e-3, 0.3])
fractions = st.floats(0.0, 0.9)
long_fractions = st.floats(0.9, 0.999)  # below, g / sqrt(mean g^2) is near the sign of g, whose jumps amplify roundoff
seeds = st.integers(0, 2**31)
few = settings(max_examples=8, deadline=None)


def run(make, seed, n_steps=N_STEPS):
    """All weights after steps of the optimiser on a small nonlinear regression in float64 with mini-batches."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    w1, w2, unused = (draw(*shape).requires_grad_() for shape in [(3, 4), (4, 1), (2,)])
    optimizer = make([w1, w2, unused])
    for _ in range(n_steps):
        x, y = draw(8, 3), draw(8, 1)
        optimizer.zero_grad()
        (torch.tanh(x @ w1) @ w2 - y).square().mean().backward()
        optimizer.step()
    return torch.cat([w1.flatten(), w2.flatten(), unused]).detach()


def assert_same(ours, theirs, seed):
    torch.testing.assert_close(run(ours, seed), run(theirs, seed), rtol=1e-9, atol=1e-9)


@few
@given(lr=rates, weight_decay=decays, seed=seeds)
def test_sgd_equals_torch(lr, weight_decay, seed):
    options = {"lr": lr, "weight_decay": weight_decay}
    assert_same(lambda p: optim.SGD(p, **options), lambda p: torch.optim.SGD(p, **options), seed)


@few
@given(lr=rates, weight_decay=decays, momentum=st.floats(0.01, 0.95), nesterov=st.booleans(), seed=seeds)
def test_momentum_equals_torch(lr, weight_decay, momentum, nesterov, seed):
    options = {"lr": lr * (1 - momentum), "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
    assert_same(lambda p: optim.Momentum(p, **options), lambda p: torch.optim.SGD(p, **options), seed)


@few
@given(lr=rates, weight_decay=decays, eps=st.sampled_from([1e-10, 1e-3]), seed=seeds)
def test_adagrad_equals_torch(lr, weight_decay, eps, seed):
    options = {"lr": lr, "weight_decay": weight_decay, "eps": eps}
    assert_same(lambda p: optim.AdaGrad(p, **options), lambda p: torch.optim.Adagrad(p, **options), seed)


@few
@given(lr=rates, weight_decay=decays, alpha=long_fractions, eps=st.sampled_from([1e-8, 1e-3]), seed=seeds)
def test_rmsprop_equals_torch(lr, weight_decay, alpha, eps, seed):
    options = {"lr": lr, "weight_decay": weight_decay, "alpha": alpha, "eps": eps}
    assert_same(lambda p: optim.RMSProp(p, **options), lambda p: torch.optim.RMSprop(p, **options), seed)


@few
@given(
    name=st.sampled_from(["Adam", "AdamW"]), lr=rates, weight_decay=decays, beta1=fractions, beta2=long_fractions, seed=seeds
)
def test_adam_and_adamw_equal_torch(name, lr, weight_decay, beta1, beta2, seed):
    options = {"lr": lr, "weight_decay": weight_decay, "betas": (beta1, beta2)}
    assert_same(lambda p: getattr(optim, name)(p, **options), lambda p: getattr(torch.optim, name)(p, **options), seed)


PAIRS = [
    (optim.SGD, torch.optim.SGD),
    (optim.AdaGrad, torch.optim.Adagrad),
    (optim.RMSProp, torch.optim.RMSprop),
    (optim.Adam, torch.optim.Adam),
    (optim.AdamW, torch.optim.AdamW),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_defaults_are_torchs(ours, theirs):
    assert_same(ours, theirs, seed=0)


def test_parameter_groups_have_their_own_settings():
    groups = lambda p: [{"params": p[:1], "lr": 0.1}, {"params": p[1:], "weight_decay": 0.5}]  # noqa: E731
    assert_same(lambda p: optim.AdamW(groups(p)), lambda p: torch.optim.AdamW(groups(p)), seed=1)


@pytest.mark.parametrize("make", [optim.SGD, optim.Momentum, optim.AdaGrad, optim.RMSProp, optim.Adam, optim.AdamW])
def test_bad_settings_are_refused(make):
    w = [torch.zeros(2, requires_grad=True)]
    for bad in ({"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}, {"weight_decay": -1e-3}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            make(w, **bad)
    with pytest.raises(ValueError, match="empty"):
        make([])
    with pytest.raises(TypeError):
        make(w[0])  # a tensor, not an iterable of tensors


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (optim.Momentum, {"momentum": 1.0}, "momentum"),
        (optim.Momentum, {"momentum": 0.0, "nesterov": True}, "nesterov"),
        (optim.AdaGrad, {"eps": -1.0}, "eps"),
        (optim.RMSProp, {"alpha": -0.1}, "alpha"),
        (optim.Adam, {"betas": (1.0, 0.999)}, "beta1"),
        (optim.AdamW, {"betas": (0.9, 1.5)}, "beta2"),
    ],
)
def test_bad_own_settings_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make([torch.zeros(1, requires_grad=True)], **options)


def tiny_gpt(seed: int = 0) -> models.GPT:
    torch.manual_seed(seed)
    return models.GPT(models.GPTConfig.modern(vocab_size=7, context_length=5, n_layers=2, n_heads=2, d_model=8, qk_norm=True))


def train_gpt(model, optimizers, n_steps, first_seed=0):
    """Steps of next-token prediction on random tokens, by one optimizer or several; (a function so that calls compare)."""
    for step in range(n_steps):
        tokens = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(first_seed + step))
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def assert_same_weights(ours, theirs):
    for (name, w), other in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(w, other), name


def test_muon_is_torchs_muon_and_adamw():
    ours, theirs = tiny_gpt(), tiny_gpt()
    options = {"weight_decay": 0.1}
    train_gpt(ours, [optim.Muon(*optim.split_matrices(ours), lr=0.03, adamw_lr=2e-3, **options)], N_STEPS)
    matrices = [w for name, w in theirs.named_parameters() if name.startswith("blocks") and w.ndim == 2]
    others = [w for name, w in theirs.named_parameters() if not (name.startswith("blocks") and w.ndim == 2)]
    muon = torch.optim.Muon(matrices, lr=0.03, momentum=0.95, **options)
    train_gpt(theirs, [muon, torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), fused=True, **options)], N_STEPS)
    assert_same_weights(ours, theirs)


def test_muon_moves_matrices_by_orthogonal_ones():
    """The update's singular vectors are the gradient's, and its singular values near 1 (the source says 0.7 to 1.2)."""
    wide, tall, vector = (torch.randn(*shape, requires_grad=True) for shape in [(6, 20), (20, 6), (5,)])
    before = [w.detach().clone() for w in (wide, tall)]
    for w in (wide, tall, vector):
        w.grad = torch.randn(w.shape)
    optim.Muon([wide, tall], [vector], lr=1.0).step()
    for w, old, factor in zip((wide, tall), before, (1.0, math.sqrt(20 / 6))):
        u, s, vh = torch.linalg.svd(w.grad, full_matrices=False)
        update = u.T @ (old - w.detach()) @ vh.T / factor  # diagonal, were bfloat16 exact
        assert ((update.diagonal() > 0.6) & (update.diagonal() < 1.3)).all(), update.diagonal()
        assert (update - update.diagonal().diag()).abs().max() < 0.1


def test_muon_goes_on_from_its_state_dict_with_its_schedule():
    def start():
        model = tiny_gpt()
        optimizer = optim.Muon(*optim.split_matrices(model))
        return model, optimizer, lr_scheduler.LambdaLR(optimizer, optim.trapezoid(4, 2, 2))

    model, optimizer, scheduler = start()
    seen = []
    for step in range(4):
        train_gpt(model, [optimizer, scheduler], 1, step)
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert seen == [[0.02, 3e-3], [0.02, 3e-3], [0.01, 1.5e-3], [0.0, 0.0]]
    whole = model
    model, optimizer, scheduler = start()
    train_gpt(model, [optimizer, scheduler], 2)
    state, weights = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict())), model.state_dict()
    model, optimizer, scheduler = start()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state[0])
    scheduler.load_state_dict(state[1])
    for step in (2, 3):
        train_gpt(model, [optimizer, scheduler], 1, step)
    assert_same_weights(model, whole)


def test_split_matrices_parts_every_model_once():
    for model in (tiny_gpt(), models.Transformer(models.TransformerConfig(1, 2, 8, 8, vocab_size=9))):
        matrices, others = optim.split_matrices(model)
        names = {id(w): name for name, w in model.named_parameters()}
        assert sorted(names) == sorted(map(id, [*matrices, *others])) and all(w.ndim == 2 for w in matrices)
        outside = {names[id(w)] for w in others if w.ndim == 2}
        assert not any(name.startswith(("blocks", "encoder", "decoder")) for name in outside) and outside
    with pytest.raises(ValueError, match="MLP has no linear map"):
        optim.split_matrices(models.MLP(models.MLPConfig((3, 4, 1))))


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"adamw_lr": math.nan}, {"momentum": 1.0}, {"betas": (0.9, 1.0)}])
def test_bad_settings_of_muon_are_refused(options):
    with pytest.raises(ValueError, match="beta2" if "betas" in options else next(iter(options))):
        optim.Muon(*optim.split_matrices(tiny_gpt()), **options)


@pytest.mark.parametrize(("shapes", "message"), [([], r"\[\]"), ([(2, 3), (4,)], r"\(4,\)")])
def test_muon_is_for_matrices(shapes, message):
    with pytest.raises(ValueError, match=f"Muon needs matrices, got .*{message}"):
        optim.Muon([torch.zeros(shape, requires_grad=True) for shape in shapes], [torch.zeros(1, requires_grad=True)])


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
def test_orthogonalize_is_the_polar_factor_roughly_and_written_out_the_same(shape, monkeypatch):
    x = torch.randn(*shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    found = optim.orthogonalize(1000 * x, torch.float64)
    inside = u.T @ found @ vh.T
    assert ((inside.diagonal() < 1.3) & (inside.diagonal() > torch.where(s > 0.1 * s.max(), 0.6, 0))).all()
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-12
    monkeypatch.setattr(optim, "_add_product", lambda beta, x, alpha, a, b: beta * x + alpha * (a @ b))  # as under XLA
    torch.testing.assert_close(optim.orthogonalize(x, torch.float64), found, rtol=0, atol=1e-12)


def make_muon(parameters, lr):
    """A middle layer's matrix by Muon, the rest by AdamW."""
    matrices, others = [], []
    for w in parameters:
        (matrices if w.shape == (4, 4) else others).append(w)
    return optim.Muon(matrices, others, lr, lr)


@pytest.mark.parametrize("make", [optim.Momentum, optim.AdamW, make_muon])
def test_training_goes_on_from_a_checkpoint(tmp_path, make):
    """`train.fit`, LambdaLR and checkpoints take ours: four epochs equal two, a checkpoint and two."""
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    batches = [(x, x.sum(dim=1, keepdim=True))]

    def start():
        torch.manual_seed(1)
        model = models.MLP(models.MLPConfig((3, 4, 4, 1)))
        return model, make(model.parameters(), lr=0.01)

    def fit(model, optimizer, n_epochs):
        scheduler = lr_scheduler.LambdaLR(optimizer, optim.warmup(1))
        return train.fit(
            model, batches, nn.functional.mse_loss, train.TrainConfig(n_epochs), optimizer=optimizer, scheduler=scheduler
        )

    model, optimizer = start()
    whole = fit(model, optimizer, 4).train_loss
    model, optimizer = start()
    fit(model, optimizer, 2)
    checkpoint.save(tmp_path / "half.safetensors", model, optimizer)
    model, optimizer = start()
    checkpoint.load(tmp_path / "half.safetensors", model, optimizer)
    assert fit(model, optimizer, 2).train_loss == pytest.approx(whole[2:], rel=1e-6)


def rates_of(make_scheduler, n_steps):
    """The learning rates that a torch scheduler sets, beginning at 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, seen = make_scheduler(optimizer), []
    for _ in range(n_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def assert_same_rates(schedule, make_scheduler, n_steps):
    expected = rates_of(make_scheduler, n_steps)
    assert [schedule(step) for step in range(n_steps)] == pytest.approx(expected, abs=1e-12)
    assert rates_of(lambda o: lr_scheduler.LambdaLR(o, schedule), n_steps) == pytest.approx(expected, abs=1e-12)


@few
@given(every=st.integers(1, 40), factor=st.floats(0.1, 1.0))
def test_step_decay_equals_torch(every, factor):
    assert_same_rates(optim.step_decay(every, factor), lambda o: lr_scheduler.StepLR(o, every, factor), 60)


@few
@given(max_steps=st.integers(1, 60), floor=st.floats(0.0, 1.0))
def test_cosine_equals_torch_and_then_stays(max_steps, floor):
    schedule = optim.cosine(max_steps, floor)
    assert_same_rates(schedule, lambda o: lr_scheduler.CosineAnnealingLR(o, max_steps, floor), max_steps + 1)
    assert schedule(10 * max_steps) == pytest.approx(floor, abs=1e-12)


@few
@given(warmup_steps=st.integers(2, 20), max_steps=st.integers(1, 40))
def test_warmup_equals_torch(warmup_steps, max_steps):
    def theirs(optimizer):
        rise = lr_scheduler.LinearLR(optimizer, 1 / warmup_steps, 1.0, warmup_steps - 1)
        return lr_scheduler.SequentialLR(
            optimizer, [rise, lr_scheduler.CosineAnnealingLR(optimizer, max_steps)], [warmup_steps]
        )

    assert_same_rates(optim.warmup(warmup_steps, optim.cosine(max_steps)), theirs, warmup_steps + max_steps)
    assert optim.warmup(warmup_steps)(warmup_steps + 5) == 1.0


@few
@given(max_steps=st.integers(1, 40), data=st.data())
def test_trapezoid_is_a_trapezoid(max_steps, data):
    warmup_steps = data.draw(st.integers(1, max_steps))
    decay_steps = data.draw(st.integers(1, max_steps - warmup_steps + 1))

    schedule = optim.trapezoid(max_steps, warmup_steps, decay_steps)
    corners = [-1, warmup_steps - 1, max_steps - decay_steps, max_steps]
    expected = np.interp(range(max_steps + 5), corners, [0, 1, 1, 0])
    assert [schedule(step) for step in range(max_steps + 5)] == pytest.approx(expected, abs=1e-12)


def test_inverse_time_makes_sgd_the_running_mean():
    samples = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = optim.SGD([w], lr=1.0)
    scheduler = lr_scheduler.LambdaLR(optimizer, optim.inverse_time(1))
    for sample in samples:
        w.grad = (w - sample).detach()
        optimizer.step()
        scheduler.step()
    assert w.item() == pytest.approx(samples.mean().item(), abs=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.step_decay(0),
        lambda: optim.step_decay(5, 1.5),
        lambda: optim.inverse_time(0),
        lambda: optim.cosine(0),
        lambda: optim.cosine(5, -0.1),
        lambda: optim.warmup(0),
        lambda: optim.trapezoid(9, 0, 3),
        lambda: optim.trapezoid(9, 4, 7),
    ],
)
def test_bad_schedules_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()
