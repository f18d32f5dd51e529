"""DeepSpeech against torchaudio's, DeepSpeech2 against a literal one, and what padding must not change."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bigmodel_utils import models
from bigmodel_utils.models.deepspeech import DeepSpeech, DeepSpeech2, DeepSpeech2Config, DeepSpeechConfig

FEW = settings(deadline=None, max_examples=30)
SMALL = DeepSpeech2Config(6, 5, (2, 3), ((3, 3), (5, 3)), ((2, 2), (1, 2)), n_layers=2, d_hidden=4)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(scope="module")
def reference():
    """torchaudio's DeepSpeech from its file: the library itself looks for compiled parts that may not fit this torch."""
    if (library := importlib.util.find_spec("torchaudio")) is None:
        pytest.skip("torchaudio is not installed")
    spec = importlib.util.spec_from_file_location("reference_deepspeech", Path(library.origin).parent / "models/deepspeech.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DeepSpeech


def build(model_class, config, seed: int = 0):
    """A model in float64, random throughout, with weights large enough for the activations to reach the clip at 20."""
    torch.manual_seed(seed)
    model = randomize(model_class(config).double(), 0.2)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def draw_frames(n_recordings: int, n_frames: int, n_features: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n_frames)
    return scale * torch.randn(n_recordings, n_frames, n_features, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("n_features, d_hidden, n_classes, n_recordings, n_frames", [(7, 9, 5, 3, 11), (3, 16, 4, 1, 1)])
def test_outputs_and_gradients_equal_torchaudios(
    reference, n_features, d_hidden, n_classes, n_recordings, n_frames, context, train
):
    torch.manual_seed(1)
    theirs = reference(n_features * (2 * context + 1), d_hidden, n_classes).double().train(train)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = DeepSpeech(DeepSpeechConfig(n_features, d_hidden, n_classes, context)).double().train(train)
    models.load_reference(ours, theirs.state_dict())
    x = draw_frames(n_recordings, n_frames, n_features, scale=10).requires_grad_()
    padded = F.pad(x, (0, 0, context, context))
    wide = torch.cat([padded[:, k : k + n_frames] for k in range(2 * context + 1)], dim=-1)  # (B, T, d_input)
    outputs = ours(x), theirs(wide.unsqueeze(1))
    torch.testing.assert_close(*outputs, **CLOSE)
    gradients = []
    for output in outputs:
        [for_x] = torch.autograd.grad((output.cos() * output).sum(), x, retain_graph=True)
        (output.cos() * output).sum().backward(inputs=[*ours.parameters()] if output is outputs[0] else [*theirs.parameters()])
        gradients.append(for_x)
    torch.testing.assert_close(*gradients, **CLOSE)
    expected = ours.translate_reference({name: parameter.grad for name, parameter in theirs.named_parameters()})
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    torch.testing.assert_close(found, expected, **CLOSE)


def test_clip_is_reached_in_the_comparison():
    model, x = build(DeepSpeech, DeepSpeechConfig(7, 9, 5)), draw_frames(3, 11, 7, scale=10)
    first = model.activate(model.frame_layers[0](x))
    assert (first == 20).any() and (first == 0).any() and ((first > 0) & (first < 20)).any()


def test_published_count():
    config = DeepSpeechConfig.named("deepspeech")
    with torch.device("meta"):
        model = DeepSpeech(config)
    assert config.n_parameters == models.count_parameters(model) == 29_720_616


@FEW
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))
def test_formula_counts_the_parameters(n_features, d_hidden, n_classes, context):
    config = DeepSpeechConfig(n_features, d_hidden, n_classes, context)
    with torch.device("meta"):
        assert config.n_parameters == models.count_parameters(DeepSpeech(config))


@FEW
@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(1, 4), *[st.sampled_from([1, 3, 5])] * 2, *[st.integers(1, 3)] * 2), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from(["gru", "rnn"]),
    st.integers(1, 9),
)
def test_deepspeech2_formula_counts_the_parameters_and_lengths(n_features, convs, n_layers, d_hidden, cell, n_frames):
    n_channels, tall, wide, down, across = zip(*convs)
    sides, strides = tuple(zip(tall, wide)), tuple(zip(down, across))
    config = DeepSpeech2Config(n_features, 4, n_channels, sides, strides, n_layers, d_hidden, cell)
    with torch.device("meta"):
        model = DeepSpeech2(config).eval()
        shape = model(torch.zeros(2, n_frames, n_features)).shape
    assert config.n_parameters == models.count_parameters(model)
    assert shape == (2, model.output_lengths(torch.tensor(n_frames)), 4)


@pytest.mark.parametrize("config", [DeepSpeechConfig(6, 4, 5, context=2), SMALL])
@pytest.mark.parametrize("filler", [1e3, float("nan")])
def test_padding_changes_nothing(config, filler):
    model = build(DeepSpeech if isinstance(config, DeepSpeechConfig) else DeepSpeech2, config).eval()
    lengths, x = torch.tensor([1, 7, 4, 9]), draw_frames(4, 9, 6)
    for row, length in zip(x, lengths):
        row[length:] = filler
    together = model(x, lengths)
    for row, length, output in zip(x, lengths, together):
        alone = model(row[None, :length])[0]
        torch.testing.assert_close(output[: len(alone)], alone, **CLOSE)


@pytest.mark.parametrize("config", [DeepSpeechConfig(6, 4, 5), SMALL])
def test_whole_length_is_no_length(config):
    model = build(DeepSpeech if isinstance(config, DeepSpeechConfig) else DeepSpeech2, config).eval()
    x = draw_frames(2, 8, 6)
    torch.testing.assert_close(model(x), model(x, torch.tensor([8, 8])), **CLOSE)
    torch.testing.assert_close(model(x).exp().sum(dim=-1), torch.ones_like(model(x)[..., 0]), **CLOSE)


def test_padding_gets_no_gradient():
    model, x = build(DeepSpeech2, SMALL).eval(), draw_frames(2, 9, 6).requires_grad_()
    lengths = torch.tensor([9, 5])
    log_probs = model(x, lengths).transpose(0, 1)  # (T', B, K)
    loss = F.ctc_loss(log_probs, torch.tensor([[1, 2], [3, 0]]), model.output_lengths(lengths), torch.tensor([2, 1]))
    loss.backward()
    assert x.grad[1, 5:].abs().max() == 0 and x.grad[1, :5].abs().max() > 0


def deepspeech2_by_loops(model: DeepSpeech2, x: np.ndarray) -> np.ndarray:
    """One recording (T, F), one convolution, GRU layers: every sum written out; batch normalisation in evaluation."""
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}

    def normalize(name: str, values: np.ndarray) -> np.ndarray:
        mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        return (values - mean) / np.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    kernel, (down, across) = weights["convs.0.weight"][:, 0], model.config.strides[0]
    n_channels, tall, wide = kernel.shape
    padded = np.pad(x, [(tall // 2, tall // 2), (wide // 2, wide // 2)])
    rows, columns = range(0, len(x), down), range(0, x.shape[1], across)
    maps = [[[(padded[i : i + tall, j : j + wide] * k).sum() for k in kernel] for j in columns] for i in rows]
    h = np.clip(normalize("conv_norms.0", np.array(maps)), 0, model.config.clip)  # (T', F', C)
    h = h.transpose(0, 2, 1).reshape(len(h), -1)
    for layer in range(model.config.n_layers):
        h = normalize(f"norms.{layer}", h)
        h = sum(gru_by_loop(weights, f"layers.{layer}", h, suffix) for suffix in ("", "_reverse"))
    logits = normalize(f"norms.{model.config.n_layers}", h) @ weights["classifier.weight"].T + weights["classifier.bias"]
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def gru_by_loop(weights: dict, name: str, x: np.ndarray, suffix: str) -> np.ndarray:
    """Cho et al. 2014, with torch's placing of the reset gate behind the matrix product."""
    w, u, b, c = (weights[f"{name}.{kind}_l0{suffix}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h, out = np.zeros(u.shape[1]), [None] * len(x)
    for t in range(len(x)) if not suffix else reversed(range(len(x))):
        (r, z, n), (r_h, z_h, n_h) = np.split(w @ x[t] + b, 3), np.split(u @ h + c, 3)
        reset, update = 1 / (1 + np.exp(-r - r_h)), 1 / (1 + np.exp(-z - z_h))
        h = out[t] = (1 - update) * np.tanh(n + reset * n_h) + update * h
    return np.array(out)


@pytest.mark.parametrize("n_frames", [1, 6])
def test_deepspeech2_equals_the_literal_one(n_frames):
    config = DeepSpeech2Config(5, 4, (3,), ((3, 5),), ((2, 2),), n_layers=2, d_hidden=3, clip=0.5)
    model, x = build(DeepSpeech2, config).eval(), draw_frames(1, n_frames, 5, scale=3)
    np.testing.assert_allclose(model(x)[0].detach().numpy(), deepspeech2_by_loops(model, x[0].numpy()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", [DeepSpeechConfig(6, 40, 5, dropout=0.5), DeepSpeech2Config(6, 5, dropout=0.5, d_hidden=20)])
def test_dropout_acts_in_training_only(config):
    model, x = build(DeepSpeech if isinstance(config, DeepSpeechConfig) else DeepSpeech2, config), draw_frames(2, 9, 6)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("config", [DeepSpeechConfig(3, 24, 3), DeepSpeech2Config(3, 3, (4,), ((3, 3),), ((1, 1),), 1, 16)])
def test_learns_to_spell_by_ctc(config):
    torch.manual_seed(0)
    model = (DeepSpeech if isinstance(config, DeepSpeechConfig) else DeepSpeech2)(config)
    texts = torch.tensor([[1, 2], [2, 1]])
    x = F.one_hot(torch.tensor([[1, 1, 1, 0, 2, 2], [2, 2, 0, 0, 1, 1]]), 3).float()
    optimizer, lengths = torch.optim.Adam(model.parameters(), lr=0.01), torch.tensor([6, 6])
    for _ in range(100):
        loss = F.ctc_loss(model(x).transpose(0, 1), texts, lengths, torch.tensor([2, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("prefix", ["", "module."])
def test_unknown_entries_keep_their_names(reference, prefix):
    ours, theirs = DeepSpeech(DeepSpeechConfig(2, 3, 4)), reference(2, 3, 4).state_dict()
    models.load_reference(ours, {prefix + name: value for name, value in theirs.items()})
    with pytest.raises(ValueError, match=r"fc9\.weight is unexpected"):
        models.load_reference(ours, theirs | {"fc9.weight": torch.zeros(1)})


@pytest.mark.parametrize("shape, lengths", [((2, 9, 7), None), ((9, 6), None), ((2, 0, 6), None), ((2, 9, 6), [9, 10])])
@pytest.mark.parametrize("model", [DeepSpeech(DeepSpeechConfig(6, 4, 5)), DeepSpeech2(SMALL)])
def test_wrong_shapes_are_refused(model, shape, lengths):
    with pytest.raises(ValueError, match=r"expected frames of shape \(B, T, 6\)|expected 2 lengths from 1 to 9"):
        model(torch.zeros(shape), lengths and torch.tensor(lengths))


@pytest.mark.parametrize("wrong", [{"n_classes": 0}, {"dropout": 1.0}, {"clip": 0.0}, {"context": -1}])
def test_senseless_configurations_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).removeprefix("n_") if "n_classes" not in wrong else "sizes"):
        DeepSpeechConfig(**wrong)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"n_channels": (32,)}, "each convolution"),
        ({"n_layers": 0}, "sizes"),
        ({"kernel_sizes": ((11, 41), (11, 20))}, "odd"),
        ({"strides": ((2, 2), (0, 2))}, "sizes"),
        ({"cell": "lstm"}, "gru or rnn"),
        ({"dropout": -0.1}, "probability"),
    ],
)
def test_senseless_second_configurations_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DeepSpeech2Config(**wrong)


def test_unknown_name_lists_the_known_one():
    with pytest.raises(ValueError, match="known: deepspeech"):
        DeepSpeechConfig.named("deepspeech3")
