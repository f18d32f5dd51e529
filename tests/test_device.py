"""The device module: choosing, moving, seeding, memory, measurements held against sleeps of known length; and one training
step of each model on the meta device, where a tensor that a model makes elsewhere is found without an accelerator."""

from __future__ import annotations

import random
import subprocess
import sys
import time
import types

import numpy
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bigmodel_utils import device, models, optim
from bigmodel_utils.models import inception

CPU, META, XLA = torch.device("cpu"), torch.device("meta"), torch.device("xla:0")


@pytest.fixture
def two_xpus(monkeypatch):
    """Lets torch say that it has two of Intel's GPUs."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.fixture
def no_accelerator(monkeypatch):
    """Lets torch say that there is none."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def fake_xla(monkeypatch):
    """Stands in for torch_xla with meta for its device; `device_type` is its runtime's, `calls` are those made of it."""
    torch_xla = types.ModuleType("torch_xla")
    torch_xla.calls, torch_xla.device_type = [], "TPU"
    torch_xla.device = lambda index: META
    torch_xla.manual_seed = lambda seed: torch_xla.calls.append(f"seed {seed}")
    torch_xla.sync = lambda: torch_xla.calls.append("sync")
    torch_xla.runtime = types.ModuleType("torch_xla.runtime")
    torch_xla.runtime.device_type = lambda: torch_xla.device_type
    torch_xla.core = types.ModuleType("torch_xla.core")
    torch_xla.core.xla_model = types.ModuleType("torch_xla.core.xla_model")
    torch_xla.core.xla_model.wait_device_ops = lambda: torch_xla.calls.append("wait")
    for module in (torch_xla, torch_xla.runtime, torch_xla.core, torch_xla.core.xla_model):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return torch_xla


def test_auto_is_a_device_of_this_machine():
    assert device.select("auto").type in {"cpu", "cuda", "mps", "xpu", "xla", "tpu"}
    assert device.select("cpu") == CPU


def test_auto_prefers_what_torch_reports_then_a_tpu_then_the_cpu(monkeypatch, no_accelerator, fake_xla):
    assert device.select("auto") == META
    fake_xla.device_type = "CPU"  # torch_xla without a TPU: the CPU itself is faster
    assert device.select("auto") == CPU
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    assert device.select("auto") == CPU


def test_a_backend_of_torch_goes_by_its_own_name(two_xpus):
    assert device.select("auto") == device.select("xpu") == torch.device("xpu")
    assert device.select("xpu:1") == torch.device("xpu:1")
    with pytest.raises(ValueError, match="'xpu:2' is not available"):
        device.select("xpu:2")


def test_a_backend_that_torch_does_not_know_brings_its_name():
    """What torch_tpu does when it is imported, where there is a TPU; a name is given once a process."""
    program = """
import torch
from bigmodel_utils import device
torch.utils.rename_privateuse1_backend("tpu")
torch.accelerator.is_available, torch.accelerator.device_count = lambda: True, lambda: 1
torch.accelerator.current_accelerator = lambda: torch.device("tpu")
print(device.select("auto"), device.select("tpu"), device.supports_fused(device.select("tpu")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["tpu", "tpu", "False"], done.stderr


@pytest.mark.parametrize("name", ["gpu", "", "cpux", "tpux"])
def test_an_unknown_device_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="use auto, cpu, cuda, mps, xla, or the name of an installed backend"):
        device.select(name)


@pytest.mark.parametrize("name", ["cuda", "mps", "cuda:3", "meta", "cpu:1"])
def test_an_absent_device_is_refused(no_accelerator, name):
    with pytest.raises(ValueError, match=f"'{name}' is not available.*use 'auto' or 'cpu'"):
        device.select(name)


def test_xla_without_its_library_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(ValueError, match="needs torch_xla"):
        device.select("xla")


class Tied(nn.Module):
    """Two names for one weight; on the meta device, as on XLA, tensors are of another kind than on the CPU."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, 4), nn.Linear(4, 3)
        self.head.weight = self.embedding.weight


def test_move_keeps_ties_and_parameters_where_to_does_not():
    untied = Tied().to(META)
    assert untied.head.weight is not untied.embedding.weight
    model = Tied()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    assert device.move(model, META) is model
    assert model.head.weight is model.embedding.weight
    assert all(new is old and new.device == META for new, old in zip(model.parameters(), parameters))
    assert optimizer.param_groups[0]["params"][0].device == META


@pytest.mark.parametrize("before", [False, True])
def test_move_leaves_torchs_setting_as_it_was(before):
    torch.__future__.set_swap_module_params_on_conversion(before)
    try:
        device.move(Tied(), META)
        with pytest.raises(RuntimeError):
            device.move(Tied(), "nowhere")
        assert torch.__future__.get_swap_module_params_on_conversion() is before
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("precision", device.PRECISIONS)
def test_autocast_decides_the_type_of_a_product(precision):
    x = torch.ones(2, 2)
    with device.autocast(CPU, precision):
        assert (x @ x).dtype == getattr(torch, precision)
    assert (x @ x).dtype == torch.float32


def test_senseless_precisions_are_refused():
    with pytest.raises(ValueError, match="unknown precision 'float8'; use float32, bfloat16, float16"):
        device.autocast(CPU, "float8")
    with pytest.raises(ValueError, match="no float16; use 'bfloat16'"):
        device.autocast(XLA, "float16")


def test_fused_optimizers_run_where_they_are_said_to():
    assert device.supports_fused(CPU) and not device.supports_fused(XLA)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.supports_fused(CPU))
    before = model.weight.clone()
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_a_step_ends_with_one_sync_on_xla_and_with_nothing_elsewhere(fake_xla):
    device.end_step(CPU)
    assert fake_xla.calls == []
    device.end_step(XLA)
    assert fake_xla.calls == ["sync"]
    device.synchronize(XLA)
    assert fake_xla.calls == ["sync", "sync", "wait"]


def test_an_accelerator_is_waited_for_by_its_own_index(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    device.synchronize(CPU)
    device.synchronize(torch.device("cuda:1"))
    assert waited == [torch.device("cuda:1")]


def draw() -> list[float]:
    """Three numbers of each generator; normal ones come in pairs, of which the generator keeps the second."""
    numbers = [random.random(), random.gauss(0, 1), numpy.random.random(), numpy.random.standard_normal()]
    return numbers + [random.getrandbits(40), int(numpy.random.randint(2**31)), *torch.randn(3).tolist()]


def test_the_seed_decides_all_three_generators(fake_xla):
    def seeded(seed):
        device.seed_everything(seed)
        return draw()

    assert seeded(3) == seeded(3)
    assert all(a != b for a, b in zip(seeded(3), seeded(4)))
    device.seed_everything(-1)  # torch takes it, the others take it modulo their range
    assert fake_xla.calls == ["seed 3", "seed 3", "seed 3", "seed 4", f"seed {2**64 - 1}"]


@given(seed=st.integers(0, 2**32 - 1), n_drawn=st.integers(0, 3))
def test_a_stored_state_gives_the_same_numbers_bit_for_bit(seed, n_drawn):
    device.seed_everything(seed)
    for _ in range(n_drawn):
        draw()
    stored = safetensors.torch.load(safetensors.torch.save(device.random_state(CPU)))  # as a checkpoint holds it
    expected = [draw() for _ in range(2)]
    device.seed_everything(seed + 1)
    device.set_random_state(stored, CPU)
    assert [draw() for _ in range(2)] == expected


def test_the_accelerators_generator_is_stored_and_put_back(monkeypatch):
    states = {torch.device("cuda:1"): torch.tensor([1, 2], dtype=torch.uint8)}
    module = types.SimpleNamespace(
        get_rng_state=lambda where: states[where].clone(), set_rng_state=lambda state, where: states.update({where: state})
    )
    monkeypatch.setattr(torch, "get_device_module", lambda where: module)
    stored = device.random_state(torch.device("cuda:1"))
    states[torch.device("cuda:1")] = torch.zeros(2, dtype=torch.uint8)
    device.set_random_state(device.random_state(CPU), torch.device("cuda:1"))  # the CPU's state knows nothing of it
    assert states[torch.device("cuda:1")].tolist() == [0, 0]
    device.set_random_state(stored, torch.device("cuda:1"))
    assert states[torch.device("cuda:1")].tolist() == [1, 2]


def test_refused_memory_is_known():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert device.is_out_of_memory(refused.value)
    with pytest.raises(MemoryError) as refused:
        numpy.empty(2**60, dtype=numpy.uint8)
    assert device.is_out_of_memory(refused.value)
    assert device.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    assert device.is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"))
    assert device.is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Attempting to reserve 16.00G"))


def test_other_errors_are_not_taken_for_refused_memory():
    with pytest.raises(RuntimeError) as mistake:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not device.is_out_of_memory(mistake.value)
    assert not device.is_out_of_memory(ValueError("not enough memory"))


def test_the_processs_peak_is_in_bytes():
    import psutil

    held = torch.ones(2**26, dtype=torch.uint8)
    peak = device.peak_memory_bytes()
    assert psutil.Process().memory_info().rss * 0.99 <= peak <= psutil.virtual_memory().total
    assert device.peak_memory_bytes(CPU) >= peak > held.nbytes


def test_available_memory_is_less_than_the_machine_has():
    import psutil

    assert 0 < device.available_memory_bytes() <= psutil.virtual_memory().total


def test_a_device_with_memory_of_its_own_is_asked(monkeypatch):
    gpu = torch.device("cuda:1")
    module = types.SimpleNamespace(mem_get_info=lambda where: {gpu: (30, 80)}[where])
    monkeypatch.setattr(torch, "get_device_module", lambda where: module)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", {gpu: 50}.get)
    assert device.available_memory_bytes(gpu) == 30 and device.peak_memory_bytes(gpu) == 50
    monkeypatch.setattr(torch, "get_device_module", lambda where: types.SimpleNamespace())  # a backend that does not tell
    assert device.available_memory_bytes(gpu) > 2**20 and device.peak_memory_bytes(gpu) > 2**20


@pytest.fixture
def fake_clock(monkeypatch):
    """Lets a function *return* how many seconds its call shall have taken."""
    monkeypatch.setattr(device, "_seconds", lambda function, _: function())


def test_time_call_is_the_median_and_leaves_the_warm_up_out(fake_clock):
    seconds = iter([99.0, 3.0, 1.0, 7.0, 2.0, 8.0])
    assert device.time_call(lambda: next(seconds)) == 3.0


def test_fastest_s_finds_the_undisturbed_call_of_each_function(fake_clock):
    disturbed, steady = iter([0.1, 9.0, 1.0, 9.0]), iter([0.1, 2.0, 2.0, 2.0])  # the first of each is the warm-up
    fastest = device.fastest_s({"disturbed": lambda: next(disturbed), "steady": lambda: next(steady)}, budget_s=0)
    assert fastest == {"disturbed": 1.0, "steady": 2.0}


def test_a_sleep_takes_as_long_as_it_sleeps():
    assert device.time_call(lambda: time.sleep(0.02), n_repeats=3) >= 0.02
    assert device.fastest_s({"nap": lambda: time.sleep(0.02)}, budget_s=0)["nap"] >= 0.02


def test_fastest_s_keeps_its_budget_and_takes_turns():
    calls = []
    begin = time.perf_counter()
    device.fastest_s({name: lambda name=name: (calls.append(name), time.sleep(0.001)) for name in "ab"}, budget_s=0.1)
    assert 0.1 <= time.perf_counter() - begin < 2
    assert calls == ["a", "b"] * (len(calls) // 2)


def test_fastest_s_needs_a_function():
    with pytest.raises(ValueError, match="at least one function"):
        device.fastest_s({})


def test_a_result_lives_until_the_clock_is_read(monkeypatch):
    """A lazy device would otherwise skip the work."""
    dead = []

    class Result:
        def __del__(self):
            dead.append(True)

    n_dead = []
    monkeypatch.setattr(device, "synchronize", lambda _: n_dead.append(len(dead)))
    device.time_call(Result, CPU, n_repeats=1)
    assert n_dead == [0, 0, 1, 1]  # before and after each of two calls: none has died before its own second look


def test_rates_are_work_over_time(monkeypatch):
    monkeypatch.setattr(device, "fastest_s", lambda functions, *_: dict.fromkeys(functions, 2.0))
    assert device.matmul_flops_per_s(CPU, size=10) == 2 * 10 * 10 * 10 / 2.0
    assert device.copy_bytes_per_s(CPU, n_bytes=4000) == 2 * 4000 / 2.0


def test_the_work_behind_the_rates_is_what_it_says():
    product = device.square_product(CPU, torch.bfloat16, size=7)()
    assert product.shape == (7, 7) and product.dtype == torch.bfloat16
    assert device.big_copy(CPU, n_bytes=4096)().nbytes == 4096


def test_threads_are_set_and_put_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), device.threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="1 or more"), device.threads(0):
        pass


class Only(TorchDispatchMode):
    """Inside it, an operation on a tensor of another type of device fails, also those that torch itself lets pass on meta."""

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in _pytree.tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor) and value.device.type != self.device_type:
                raise AssertionError(f"{function} with a tensor {tuple(value.shape)} on {value.device}")
        return result


def tokens(*shape):
    """Zeros that can be tokens or classes, on meta."""
    return torch.zeros(*shape, dtype=torch.long, device=META)


def numbers(*shape):
    """Zeros that can be features or images, on meta."""
    return torch.zeros(*shape, device=META)


def token_loss(logits):
    """Cross-entropy of (B, T, vocab_size)."""
    return F.cross_entropy(logits.flatten(0, 1), tokens(logits.shape[0] * logits.shape[1]))


def class_loss(logits):
    """Cross-entropy of (B, n_classes)."""
    return F.cross_entropy(logits, tokens(len(logits)))


def blank_loss(log_probs):
    """Stands for CTC, for which torch has no kernel on meta."""
    return -log_probs[..., 0].mean()


SIZES = {"vocab_size": 11, "n_layers": 2, "n_heads": 2, "d_model": 8}
GROUPED = {"context_length": 8, "n_kv_heads": 1, "qk_norm": True}
SPEECH2 = models.DeepSpeech2Config(6, 5, (2, 3), ((3, 3), (5, 3)), ((2, 2), (1, 2)), n_layers=2, d_hidden=4)
MASK = tokens(2, 8).bool()
STEPS = {  # model, inputs, loss
    "MLP": (lambda: models.MLP(models.MLPConfig((6, 5, 1), dropout=0.1)), [numbers(4, 6)], torch.mean),
    "GPT": (
        lambda: models.GPT(models.GPTConfig(**SIZES, context_length=8, dropout=0.1)),
        [tokens(2, 8)],
        token_loss,
    ),
    "modern GPT": (lambda: models.GPT(models.GPTConfig.modern(**SIZES, **GROUPED)), [tokens(2, 8)], token_loss),
    "BERT": (
        lambda: models.BERT(models.BERTConfig(**SIZES, d_ff=7, context_length=8, masked_lm=True, next_sentence=True)),
        [tokens(2, 8), tokens(2, 8), MASK],
        lambda output: token_loss(output.masked_lm_logits) + class_loss(output.next_sentence_logits),
    ),
    "Transformer": (
        lambda: models.Transformer(models.TransformerConfig(**SIZES, d_ff=7)),
        [tokens(2, 8), tokens(2, 8), MASK, MASK],
        token_loss,
    ),
    "ResNet": (
        lambda: models.ResNet(models.ResNetConfig(n_blocks=(1, 1), widths=(2, 3))),
        [numbers(2, 3, 32, 32)],
        class_loss,
    ),
    "ResNet of CIFAR": (lambda: models.ResNet(models.ResNetConfig.cifar(8)), [numbers(2, 3, 8, 8)], class_loss),
    "GoogLeNet": (
        lambda: models.Inception(models.InceptionConfig(width=0.1)),
        [numbers(2, 3, 224, 224)],
        lambda logits: inception.loss(logits, tokens(2)),
    ),
    "Inception-v3": (
        lambda: models.Inception(models.InceptionConfig("inception-v3", width=0.1)),
        [numbers(2, 3, 299, 299)],
        lambda logits: inception.loss(logits, tokens(2)),
    ),
    "DeepSpeech": (
        lambda: models.DeepSpeech(models.DeepSpeechConfig(6, 4, 5, context=1, dropout=0.1)),
        [numbers(2, 7, 6)],
        blank_loss,
    ),
    "DeepSpeech2": (lambda: models.DeepSpeech2(SPEECH2), [numbers(2, 7, 6)], blank_loss),
}


def take_step(model, inputs, loss_fn):
    """Forward, loss, backward and one of our optimisers' steps, on meta alone."""
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    with Only("meta"):
        loss_fn(model(*inputs)).backward()
        optimizer.step()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_makes_no_tensor_on_another_device(name):
    build, inputs, loss_fn = STEPS[name]
    with META:
        model = build()
    assert take_step(model, inputs, loss_fn) == []


def test_every_model_takes_such_a_step():
    with META:
        tried = {type(build()) for build, _, _ in STEPS.values()}
    known = {value for value in vars(models).values() if isinstance(value, type) and issubclass(value, nn.Module)}
    assert tried == known


class Careless(nn.Module):
    """Forgets `device=` in its forward, where torch on meta does not complain: an index may lie on the CPU."""

    def __init__(self):
        super().__init__()
        self.positions, self.out = nn.Embedding(8, 8), nn.Linear(8, 11)

    def forward(self, tokens):
        return self.out(self.positions(torch.arange(tokens.shape[1])).expand(len(tokens), -1, -1))


class Constant(nn.Module):
    """Scales by a number that is a tensor on the CPU."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 11)

    def forward(self, tokens):
        return self.embedding(tokens) / torch.tensor(11.0).sqrt()


@pytest.mark.parametrize("mutant", [Careless, Constant])
def test_a_model_that_forgets_the_device_is_found(mutant):
    with META:
        model = mutant()
    token_loss(model(tokens(2, 8))).backward()  # torch itself lets it pass
    with pytest.raises(AssertionError, match="on cpu"):
        take_step(model, [tokens(2, 8)], token_loss)
