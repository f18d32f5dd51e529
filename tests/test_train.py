"""The training loop against a loop written out, and the recipe of chapter 5."""

import copy
import itertools
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score
from torch import nn

from bigmodel_utils import checkpoint, data, train
from bigmodel_utils.models import MLP, MLPConfig

CONFIG = MLPConfig((6, 8, 1))


def linear_data(m: int = 40, seed: int = 0) -> data.Split:
    """A noisy linear target."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, 6, generator=generator)
    return data.Split(x, x[:, :1] - 2 * x[:, 1:2] + 0.1 * torch.randn(m, 1, generator=generator))


def build(seed: int = 0) -> tuple[MLP, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = MLP(CONFIG)
    return model, torch.optim.Adam(model.parameters(), lr=0.02)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def fit(model, optimizer, split=None, n_epochs=5, validation=None, **options):
    config_options = {key: options.pop(key) for key in options.keys() & train.TrainConfig.__dataclass_fields__.keys()}
    batches = data.Batches(split or linear_data(), 7, seed=1)
    config = train.TrainConfig(n_epochs, **config_options)
    return train.fit(model, batches, nn.functional.mse_loss, config, optimizer=optimizer, validation=validation, **options)


def test_fit_equals_a_literal_loop():
    model, optimizer = build()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    history = fit(model, optimizer, scheduler=scheduler, max_grad_norm=0.5)

    by_hand, optimizer = build()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    split, generator, losses = linear_data(), torch.Generator().manual_seed(1), []
    for _ in range(5):
        order, squares = torch.randperm(40, generator=generator).tolist(), 0.0
        for start in range(0, 40, 7):
            rows = order[start : start + 7]
            loss = ((by_hand(split.x[rows]) - split.y[rows]) ** 2).mean()
            squares += loss.item() * len(rows)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
        losses.append(squares / 40)
    for ours, theirs in zip(model.parameters(), by_hand.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(history.train_loss, losses, rtol=1e-4)
    assert (history.n_samples, history.best_epoch, history.validation_loss) == (200, None, [])


def test_the_same_seed_gives_the_same_bits():
    (one, one_optimizer), (two, two_optimizer) = build(), build()
    assert fit(one, one_optimizer).train_loss == fit(two, two_optimizer).train_loss
    assert same(one, two)


class Scripted(nn.Module):
    """Its validation losses are a list: one weight, which counts the optimiser's steps, looks the next one up."""

    def __init__(self, losses):
        super().__init__()
        self.weight, self.losses = nn.Parameter(torch.zeros(())), losses

    def forward(self, x):
        if self.training:
            return -self.weight.expand(len(x), 1)  # under a mean loss the gradient is -1: SGD adds lr = 1
        return torch.full((len(x), 1), self.losses[round(self.weight.item()) - 1])


def scripted_fit(losses, n_epochs, patience):
    model, one_batch = Scripted(losses), data.Split(torch.zeros(3, 1), torch.zeros(3, 1))
    batches = data.Batches(one_batch, 3)
    history = train.fit(
        model,
        batches,
        lambda prediction, target: prediction.mean(),
        train.TrainConfig(n_epochs, patience),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        validation=batches,
    )
    return model, history


def test_early_stopping_stops_and_restores_the_best_epoch():
    model, history = scripted_fit([3.0, 2.0, 1.0, 1.5, 1.0, 0.5], n_epochs=6, patience=2)
    assert history.validation_loss == [3.0, 2.0, 1.0, 1.5, 1.0]  # a tie is no improvement
    assert (history.best_epoch, history.stopped_early) == (3, True)
    assert model.weight.item() == 3  # the weights after epoch 3


def test_patience_counts_from_the_last_best_epoch():
    model, history = scripted_fit([3.0, 4.0, 2.0, 4.0, 1.0], n_epochs=5, patience=2)
    assert (history.best_epoch, history.stopped_early, model.weight.item()) == (5, False, 5)


def test_without_patience_all_epochs_run_and_the_best_is_kept():
    model, history = scripted_fit([1.0, 2.0, 3.0, 4.0], n_epochs=4, patience=None)
    assert (len(history.validation_loss), history.best_epoch, model.weight.item()) == (4, 1, 1)


def test_a_loss_that_is_not_finite_names_step_and_batch_and_leaves_the_weights():
    model, _ = build()
    calls, before = [], []

    def loss_fn(prediction, target):
        calls.append(1)
        if len(calls) == 9:  # 40 rows in batches of 7: six steps an epoch
            before.append(copy.deepcopy(model.state_dict()))
            return nn.functional.mse_loss(prediction, target) * float("nan")
        return nn.functional.mse_loss(prediction, target)

    config, optimizer = train.TrainConfig(3), torch.optim.Adam(model.parameters())
    with pytest.raises(train.TrainingError, match=r"step 9 \(epoch 2, batch 3\): the loss is nan.*lower the learning rate"):
        train.fit(model, data.Batches(linear_data(), 7), loss_fn, config, optimizer=optimizer)
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())


def test_a_learning_rate_far_too_high_is_reported():
    model, _ = build()
    with pytest.raises(train.TrainingError, match="epoch"):
        fit(model, torch.optim.SGD(model.parameters(), lr=1e6), n_epochs=50)


def corrupt(loss_fn, bad_calls, factor):
    """`loss_fn` whose calls of these numbers, counted from 1, are multiplied."""
    calls = itertools.count(1)
    return lambda prediction, target: loss_fn(prediction, target) * (factor if next(calls) in bad_calls else 1.0)


@settings(max_examples=20, deadline=None)
@given(micro_batch_size=st.integers(1, 9))
def test_micro_batches_add_up_to_the_large_batch(micro_batch_size):
    (one, one_optimizer), (two, two_optimizer) = build(), build()
    one.double(), two.double()
    split = data.Split(linear_data().x.double(), linear_data().y.double())
    whole = fit(one, one_optimizer, split)
    parts = fit(two, two_optimizer, split, micro_batch_size=micro_batch_size)
    np.testing.assert_allclose(parts.train_loss, whole.train_loss, rtol=1e-12)
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Hungry(MLP):
    """An MLP for which more than three rows at a time are too many."""

    def forward(self, x):
        if len(x) > 3:
            torch.empty(2**50)  # a petabyte: the allocator refuses
        return super().forward(x)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch():
    (model, optimizer), hungry = build(), Hungry(CONFIG)
    hungry.load_state_dict(model.state_dict())
    whole = fit(model, optimizer)
    with pytest.warns(UserWarning, match="out of memory"):
        parts = fit(hungry, torch.optim.Adam(hungry.parameters(), lr=0.02))
    np.testing.assert_allclose(parts.train_loss, whole.train_loss, rtol=1e-5)
    assert parts.events == [
        "step 1: out of memory with 7 rows at a time; now 4, their gradients added up to the same batch of 7",
        "step 1: out of memory with 4 rows at a time; now 2, their gradients added up to the same batch of 7",
    ]


def test_out_of_memory_with_one_row_ends_the_training():
    class Insatiable(MLP):
        def forward(self, x):
            return torch.empty(2**50)

    model = Insatiable(CONFIG)
    with pytest.warns(UserWarning), pytest.raises(train.TrainingError, match="one row at a time: make the model .* smaller"):
        fit(model, torch.optim.Adam(model.parameters()))


def test_other_errors_of_the_model_are_passed_on():
    model, optimizer = build()
    with pytest.raises(RuntimeError, match="must match the size"), warnings.catch_warnings(action="ignore"):
        fit(model, optimizer, data.Split(torch.zeros(3, 6), torch.zeros(3, 2, 2)))


def test_a_roll_back_undoes_the_steps_and_goes_on_with_the_next_batch():
    batches = [linear_data(7, seed) for seed in range(6)]
    passes = [(split.x, split.y) for split in batches]
    model, optimizer = build()
    with pytest.warns(UserWarning, match="the loss is nan"):
        history = train.fit(
            model,
            passes,
            corrupt(nn.functional.mse_loss, {4}, float("nan")),
            train.TrainConfig(1, n_rollbacks=1),
            optimizer=optimizer,
        )
    assert history.events == [
        "step 4 (epoch 1, batch 4): the loss is nan; went back to step 0, and the batches since then are not repeated"
    ]
    expected, optimizer = build()
    train.fit(expected, passes[4:], nn.functional.mse_loss, train.TrainConfig(1), optimizer=optimizer)
    assert same(model, expected)


def test_when_no_roll_back_is_left_training_stops():
    model, optimizer = build()
    loss_fn, config = corrupt(nn.functional.mse_loss, {4, 6}, float("inf")), train.TrainConfig(2, n_rollbacks=1)
    with pytest.warns(UserWarning), pytest.raises(train.TrainingError, match=r"batch 6\): the loss is inf"):
        train.fit(model, data.Batches(linear_data(), 7), loss_fn, config, optimizer=optimizer)


def test_a_spike_is_named_and_ordinary_noise_is_not():
    model, optimizer = build()
    quiet = fit(model, optimizer, n_epochs=30, spike_sigmas=10)
    assert quiet.events == []
    model, optimizer = build()
    loss_fn = corrupt(nn.functional.mse_loss, {50}, 1e3)
    with pytest.raises(
        train.TrainingError, match=r"step 50 \(epoch 9, batch 2\): the loss is .*, usual were .* with a deviation"
    ):
        train.fit(model, data.Batches(linear_data(), 7), loss_fn, train.TrainConfig(30, spike_sigmas=10), optimizer=optimizer)


def test_steps_and_not_only_epochs_may_count():
    model, optimizer = build()
    history = fit(model, optimizer, validation=data.Batches(linear_data(seed=5), 40), max_steps=8, eval_every=3)
    assert [(record.step, record.epoch) for record in history.records] == [(3, 1), (6, 1), (8, 2)]
    assert history.n_samples == 40 + 14 and len(history.validation_loss) == 3
    whole_epochs, optimizer = build()
    history = fit(whole_epochs, optimizer, max_steps=12)
    assert [record.step for record in history.records] == [6, 12]


def test_the_history_is_a_table_with_throughput():
    model, optimizer = build()
    table = fit(model, optimizer, n_epochs=3, flops_per_row=100.0, max_grad_norm=1.0).table()
    assert table.epoch.tolist() == [1, 2, 3] and table.n_samples.tolist() == [40, 80, 120]
    seconds = np.diff(table.seconds, prepend=0)
    np.testing.assert_allclose(table.samples_per_s, 40 / seconds)
    np.testing.assert_allclose(table.flops_per_s, 100 * table.samples_per_s)
    assert (table.grad_norm > 0).all() and (table.learning_rate == 0.02).all()


class Sum(nn.Module):
    """Two inputs, to be added before the map, and a pair as prediction."""

    def __init__(self):
        super().__init__()
        self.inner = MLP(CONFIG)

    def forward(self, a, b):
        return self.inner(a + b), a.sum()


def test_inputs_and_targets_may_be_tuples():
    torch.manual_seed(0)
    model = Sum()
    split = data.Split((linear_data().x / 4, linear_data().x * 3 / 4), (linear_data().y, torch.ones(40)))
    history = train.fit(
        model,
        data.Batches(split, 7, seed=1),
        lambda prediction, target: nn.functional.mse_loss(prediction[0], target[0] * target[1][:, None]),
        train.TrainConfig(5, micro_batch_size=4),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.02),
    )
    plain, optimizer = build()
    np.testing.assert_allclose(history.train_loss, fit(plain, optimizer).train_loss, rtol=1e-4)


def test_bfloat16_trains_nearly_as_float32():
    (one, one_optimizer), (two, two_optimizer) = build(), build()
    exact, half = fit(one, one_optimizer), fit(two, two_optimizer, precision="bfloat16")
    assert half.train_loss != exact.train_loss
    np.testing.assert_allclose(half.train_loss, exact.train_loss, rtol=3e-2)  # bfloat16 keeps 8 bits: 0.4 % a product
    assert all(parameter.dtype == torch.float32 for parameter in two.parameters())


def test_float16_scales_the_loss_until_no_gradient_overflows():
    """Gradients of about 1e-9 are 0 in float16, and the scale of 65,536 saves them; a loss of 1e3 overflows, and the scale falls."""
    for size in (1e-9, 1e3):
        model, _ = build()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02, eps=1e-20)
        loss_fn = lambda prediction, target: size * nn.functional.mse_loss(prediction, target)  # noqa: B023, E731
        batches = data.Batches(linear_data(), 7, seed=1)
        history = train.fit(model, batches, loss_fn, train.TrainConfig(30, precision="float16"), optimizer=optimizer)
        assert history.train_loss[-1] < 0.1 * history.train_loss[0]


def test_tensorboard_reads_the_same_numbers(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model, optimizer = build()
    history = fit(model, optimizer, validation=data.Batches(linear_data(seed=5), 40), log_folder=tmp_path)
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [6, 12, 18, 24, 30]
    np.testing.assert_allclose([event.value for event in events.Scalars("validation_loss")], history.validation_loss, rtol=1e-6)


@pytest.mark.parametrize(("variable", "shown"), [("CI", False), ("TQDM_DISABLE", False), (None, True)])
def test_the_progress_bar_shows_in_a_terminal_and_not_in_ci(variable, shown, capsys, monkeypatch):
    for name in ("CI", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    model, optimizer = build()
    fit(model, optimizer)
    assert ("step/s" in capsys.readouterr().err) is shown


def test_checkpoints_need_batches_that_know_their_place(tmp_path):
    model, optimizer = build()
    with pytest.raises(ValueError, match="needs batches that have state_dict"):
        train.fit(
            model,
            [(linear_data().x, linear_data().y)],
            nn.functional.mse_loss,
            train.TrainConfig(1),
            optimizer=optimizer,
            checkpoints=checkpoint.Folder(tmp_path),
        )


def test_a_checkpoint_of_another_architecture_is_named(tmp_path):
    model, optimizer = build()
    fit(model, optimizer, checkpoints=checkpoint.Folder(tmp_path))
    other = MLP(MLPConfig((6, 4, 1)))
    with pytest.raises(checkpoint.CheckpointError, match=r"holds a run of another architecture: .*\(8, 6\), not \(4, 6\)"):
        fit(other, torch.optim.Adam(other.parameters()), checkpoints=checkpoint.Folder(tmp_path))


def test_no_batches_are_refused():
    model, optimizer = build()
    with pytest.raises(ValueError, match="nothing to train on"):
        train.fit(model, [], nn.functional.mse_loss, train.TrainConfig(1), optimizer=optimizer)


def test_no_progress_bar_is_left_in_an_output(capfd):
    model, optimizer = build()
    fit(model, optimizer)
    assert capfd.readouterr() == ("", "")


def test_evaluate_weights_batches_by_their_rows_and_puts_the_mode_back():
    split = linear_data(m=10)
    torch.manual_seed(0)
    model = MLP(MLPConfig((6, 8, 1), dropout=0.5))
    loss = train.evaluate(model, data.Batches(split, 4, shuffle=False), nn.functional.mse_loss)
    assert model.training
    model.eval()
    assert loss == pytest.approx(((model(split.x) - split.y) ** 2).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="empty"):
        train.evaluate(model, [], nn.functional.mse_loss)
    assert not model.training


def test_r_squared_equals_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    target, prediction = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    assert train.r_squared(prediction, target) == pytest.approx(r2_score(target, prediction), abs=1e-6)
    assert train.r_squared(target, target) == 1
    assert train.r_squared(target.mean().expand(50), target) == pytest.approx(0, abs=1e-8)


def test_senseless_configurations_are_refused():
    for arguments in ((0,), (5, 0)):
        with pytest.raises(ValueError, match="1 or more"):
            train.TrainConfig(*arguments)


@pytest.fixture(scope="module")
def parts() -> dict[str, data.Split]:
    return {"train": linear_data(80, 0), "validation": linear_data(40, 1), "test": linear_data(40, 2)}


def test_the_recipe_standardises_by_the_training_rows_and_never_sees_the_test(parts):
    model, history, targets = train.fit_solubility(parts, config=CONFIG, n_epochs=40)
    assert targets.mean.item() == pytest.approx(parts["train"].y.mean().item())
    assert targets.scale.item() == pytest.approx(parts["train"].y.std(correction=0).item())
    assert history.best_epoch is not None
    without_test = {name: parts[name] for name in ("train", "validation")}
    again, _, _ = train.fit_solubility(without_test, config=CONFIG, n_epochs=40)
    assert same(model, again)


def test_the_recipe_is_adam_with_the_penalty_in_the_gradient(parts):
    model, history, targets = train.fit_solubility({"train": parts["train"]}, config=CONFIG, n_epochs=2, weight_decay=0.1)
    torch.manual_seed(0)
    by_hand, split = MLP(CONFIG), parts["train"]
    optimizer, generator = torch.optim.Adam(by_hand.parameters(), lr=1e-3), torch.Generator().manual_seed(0)
    for _ in range(2):
        for rows in torch.randperm(80, generator=generator).split(32):
            penalty = 0.05 * sum(parameter.square().sum() for parameter in by_hand.parameters())
            loss = ((by_hand(split.x[rows]) - targets(split.y[rows])) ** 2).mean() + penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), by_hand.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert history.best_epoch is None and len(history.train_loss) == 2


def test_the_recipe_learns(parts):
    model, _, targets = train.fit_solubility(parts, config=CONFIG, n_epochs=200, weight_decay=0.0)
    prediction = targets.inverse(model.eval()(parts["test"].x)).detach()
    assert train.r_squared(prediction, parts["test"].y) > 0.8


def test_a_saved_solubility_model_predicts_the_same_bits(parts, tmp_path):
    model, _, targets = train.fit_solubility(parts, config=CONFIG, n_epochs=2)
    train.save_solubility(tmp_path / "mlp.safetensors", model, targets)
    loaded, loaded_targets = train.load_solubility(tmp_path / "mlp.safetensors")
    x = parts["test"].x
    assert torch.equal(loaded_targets.inverse(loaded(x)), targets.inverse(model.eval()(x)))
    assert not loaded.training and loaded.config == CONFIG
    extra = checkpoint.load(tmp_path / "mlp.safetensors").extra
    assert extra["n_features"] == 6 and extra["radius"] == data.MORGAN_RADIUS and math.isfinite(extra["target_mean"])


def test_another_kind_of_checkpoint_is_refused_by_name(tmp_path):
    checkpoint.save(tmp_path / "other.safetensors", nn.Linear(2, 1))
    with pytest.raises(checkpoint.CheckpointError, match=r"other\.safetensors does not hold a solubility model.*'config'"):
        train.load_solubility(tmp_path / "other.safetensors")
