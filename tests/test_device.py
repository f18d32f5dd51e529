"""The device module: choosing, seeding, and measurements that are held against sleeps of known length."""

from __future__ import annotations

import random
import time

import numpy
import pytest
import torch

from bigmodel_utils import device

CPU = torch.device("cpu")


def test_auto_is_a_device_of_this_machine():
    assert device.select("auto").type in {"cpu", "cuda", "mps", "xpu"}
    assert device.select("cpu") == CPU


@pytest.mark.parametrize("name", ["gpu", "", "cpux"])
def test_an_unknown_device_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="use one of auto, cpu, cuda, mps, xla"):
        device.select(name)


def test_an_absent_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' is not available"):
        device.select("cuda")


def test_the_seed_decides_all_three_generators():
    def draw(seed):
        device.seed_everything(seed)
        return random.random(), numpy.random.random(), torch.rand(()).item()

    assert draw(3) == draw(3)
    assert all(a != b for a, b in zip(draw(3), draw(4)))


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


def test_available_memory_is_less_than_the_machine_has():
    import psutil

    assert 0 < device.available_memory_bytes() <= psutil.virtual_memory().total
