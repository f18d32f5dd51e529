"""Ranks against one process: losses, gradients, bytes, bubbles, a killed rank, a hanging one. Few starts, as each costs seconds."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
import torch
from torch import distributed as dist

from bigmodel_utils import distributed, scaling
from bigmodel_utils.distributed import __main__ as program
from bigmodel_utils.distributed import compare, data, launch, pipeline, tensor, traffic
from bigmodel_utils.models import GPT, GPTConfig
from bigmodel_utils.scaling import communication

SMALL = GPTConfig(vocab_size=11, context_length=8, n_layers=4, n_heads=4, d_model=16, tied=False)
TRAINING = {"n_steps": 12, "save_every": 4}


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> dict:
    """What four ranks found, in one start."""
    return distributed.run(
        {"compare": {"group_sizes": [2, 4]}},
        {"ring": {"n_numbers": 4000}},
        {"bubble": {"n_microbatches": [4, 6], "schedules": ["1F1B", "GPipe"], "forward_s": 0.01, "backward_s": 0.02}},
        {"speed": {"group_sizes": [1, 2], "n_layers": 1, "d_model": 32, "n_rounds": 1}},
        {"link": {"sizes_bytes": [1024], "n_rounds": 3}},
        {"train": {"folder": str(tmp_path_factory.mktemp("whole")), **TRAINING}},
        n_ranks=4,
    )


@pytest.fixture(scope="module")
def three() -> list[dict]:
    """Three ranks, and LLaMA's layout."""
    sizes = {"layout": "modern", "n_layers": 3, "n_heads": 6, "d_model": 72, "batch_size": 6, "length": 9, "n_microbatches": 3}
    return distributed.run({"compare": sizes}, n_ranks=3)["compare"]


@pytest.fixture
def one_rank():
    """A group of one, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_every_kind_equals_one_process(four, three):
    records = four["compare"] + three
    assert {(each["kind"], each["ranks"]) for each in records} == {(kind, n) for kind in compare.KINDS for n in (2, 3, 4)}
    for each in records:
        assert each["loss_error"] < 1e-12 and each["gradient_error"] < 1e-12 and each["missing"] == 0, each


def test_bytes_issued_equal_the_formulas(four):
    for each in four["compare"]:
        assert each["issued"] == each["formula"] > 0, each


def test_bytes_on_the_sockets_equal_theory_and_headers(four):
    """Few messages, each with a few dozen bytes in front; gloo scatters by all-reduce (torch 2.13)."""
    if four["compare"][0]["sockets"] is None:
        pytest.skip("this system does not count bytes of a socket")
    for each in four["compare"]:
        n_messages = 2 * each["ranks"] * sum(each["calls"].values())
        assert 0 < each["sockets"] - each["gloo"] < 400 * n_messages, each
        scatters = each["kind"] in ("sharded", "tensor and sequence")
        assert (each["gloo"] > each["formula"]) == scatters, each


def test_accumulation_sends_once(four):
    calls = {each["kind"]: each["calls"] for each in four["compare"]}
    assert calls["data, accumulated"] == calls["data"] == {"all-reduce": 1}


def test_weights_held(four):
    held = {(each["kind"], each["ranks"]): each["held"] for each in four["compare"]}
    config = GPTConfig(vocab_size=64, context_length=16, n_layers=4, n_heads=4, d_model=64, tied=False)
    assert held["data", 4] == 8 * config.n_parameters
    assert held["sharded", 4] == 8 * config.n_parameters / 4
    block = sum(weight.numel() for weight in GPT(config).blocks[0].parameters())
    assert held["pipeline", 4] == 8 * (block + 64 * 64 + 16 * 64)  # the first stage: tokens' and positions' embedding


def test_the_hand_written_ring(four):
    found = four["ring"]
    assert found["error"] < 1e-13
    assert found["sends"] == 6 and found["issued"] == scaling.ring_allreduce_bytes(8 * 4000, 4)


@pytest.mark.parametrize("index", range(4))
def test_bubble_of_torchs_schedules(four, index):
    run = four["bubble"][index]
    orders = [[kind for kind, *_ in passes] for passes in run["passes"]]
    m = run["n_microbatches"]
    bubble = scaling.pipeline_bubble(4, m)
    assert pipeline.idle_share(pipeline.timetable(orders)) == pytest.approx(bubble, abs=1e-12)
    held = [4, 3, 2, 1] if run["schedule"] == "1F1B" else [m] * 4
    assert [pipeline.most_in_flight(order) for order in orders] == held
    span = max(end for passes in run["passes"] for *_, end in passes)
    assert span >= 0.03 * (m + 3) * 0.999  # sleeping takes no less than it should; a loaded machine may take more


def test_times_are_there(four):
    assert [step["ranks"] for step in four["speed"]["steps"]] == [1, 2]
    assert all(step["step_s"] > 0 for step in four["speed"]["steps"])
    assert four["link"]["latency_s"] > 0 and four["link"]["allreduce"][0]["seconds"] > 0


def test_a_killed_rank_on_the_second_of_two_agents_changes_no_bit(four, tmp_path):
    killed = {"folder": str(tmp_path), **TRAINING, "killed_rank": 3, "killed_at": 10}
    found = distributed.run({"train": killed}, n_ranks=4, n_nodes=2, max_restarts=3)["train"]
    assert found["resumed_at"] == 8
    assert found["sha256"] == four["train"]["sha256"] and found["losses"] == four["train"]["losses"]
    assert found["losses"][-1] < found["losses"][0]


def test_without_restarts_a_killed_rank_is_an_error(tmp_path):
    with pytest.raises(distributed.LaunchError, match="SIGKILL"):
        distributed.run({"train": {"folder": str(tmp_path), "killed_rank": 1, "killed_at": 1}}, n_ranks=2)


def test_a_hanging_rank_is_ended_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(distributed.LaunchError, match="did not end within 8 s"):
        distributed.run({"bubble": {"forward_s": 1000, "n_microbatches": [2]}}, n_ranks=2, timeout_s=8)
    assert not list(tmp_path.iterdir())
    assert not [child for child in psutil.Process().children(recursive=True) if "torch" in " ".join(child.cmdline())]


def test_command_line_prints_the_answer():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "bigmodel_utils.distributed", "ring", "n_numbers=100", "seed=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(distributed.__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert json.loads(done.stdout)["ring"]["n_bytes"] == 800, done.stderr


def test_words_of_a_command_line():
    words = launch.as_words(("ring", {"compare": {"n_layers": 2, "kinds": ["data"], "layout": "modern"}}))
    expected = [("ring", {}), ("compare", {"n_layers": 2, "kinds": ["data"], "layout": "modern"})]
    assert program.parse(words) == expected
    assert program.parse(["train", "folder=/some/place"]) == [("train", {"folder": "/some/place"})]
    with pytest.raises(SystemExit, match="unknown job 'dance': choose from compare"):
        program.parse(["dance"])
    with pytest.raises(SystemExit, match="n=1 belongs to no job"):
        program.parse(["n=1"])


def test_every_job_is_a_function():
    assert all(callable(program.job(name)) for name in program.JOBS)


def test_ranks_must_divide():
    with pytest.raises(ValueError, match="3 ranks cannot be shared out evenly to 2 nodes"):
        distributed.run("ring", n_ranks=3, n_nodes=2)


@pytest.mark.parametrize(("n_gpus", "second"), [(0, ""), (3, ""), (4, "2,3")])
def test_local_agents_share_out_the_gpus(monkeypatch, n_gpus, second):
    """Or have none at all, since some ranks on GPUs and some on CPUs would not find together."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    assert launch._own_gpus(1, 2, 4) == {"CUDA_VISIBLE_DEVICES": second}
    assert launch._own_gpus(0, 1, 4) == {}


def test_timetable_by_hand():
    """Two stages, two micro-batches: F0 F1 at 0 and 1 on the first, F0 B0 F1 B1 on the second from 1 on."""
    slots = pipeline.timetable([["F", "F", "B", "B"], ["F", "B", "F", "B"]])
    assert sorted((slot.rank, slot.kind, slot.microbatch, slot.begin) for slot in slots) == [
        (0, "B", 0, 4), (0, "B", 1, 7), (0, "F", 0, 0), (0, "F", 1, 1),
        (1, "B", 0, 2), (1, "B", 1, 5), (1, "F", 0, 1), (1, "F", 1, 4),
    ]  # fmt: skip
    assert pipeline.idle_share(slots) == pytest.approx(1 - 12 / 18)


def test_a_deadlock_is_seen():
    with pytest.raises(ValueError, match="each waits for another"):
        pipeline.timetable([["B", "F"], ["F", "B"]])


@pytest.mark.parametrize("n_stages", [1, 2, 4])
def test_stages_one_after_the_other_are_the_model(n_stages):
    model, x = GPT(SMALL), torch.randint(11, (2, 8))
    y = x
    for stage in range(n_stages):
        y = pipeline.Stage(model, stage, n_stages)(y)
    assert torch.equal(y, model(x))


def test_what_no_stage_can_be():
    with pytest.raises(ValueError, match="4 layers cannot be shared out evenly to 3 stages"):
        pipeline.Stage(GPT(SMALL), 0, 3)
    with pytest.raises(ValueError, match="build the model with tied=False"):
        pipeline.Stage(GPT(GPTConfig(vocab_size=11, context_length=8, n_layers=4, n_heads=4, d_model=16)), 0, 2)


def test_what_cannot_be_cut(one_rank):
    mesh = launch.mesh_of(1, torch.device("cpu"))
    with pytest.raises(ValueError, match="not written for dropout, got 0.1"):
        tensor.parallelize(GPT(dataclasses.replace(SMALL, dropout=0.1)), mesh)
    with pytest.raises(ValueError, match="build with tied=False"):
        tensor.parallelize(GPT(dataclasses.replace(SMALL, tied=True)), mesh, sequence=True)


def test_head_order_gives_each_rank_whole_heads():
    config = GPTConfig(n_heads=4, n_kv_heads=2, d_model=8)  # rows: q 0-7, k 8-11, v 12-15
    assert tensor.head_order(config, 2).tolist() == [0, 1, 2, 3, 8, 9, 12, 13, 4, 5, 6, 7, 10, 11, 14, 15]
    assert tensor.head_order(config, 1).tolist() == list(range(16))


def test_an_operation_without_a_rule_is_refused(one_rank):
    with pytest.raises(NotImplementedError, match="no rule for the bytes of c10d::broadcast_"), traffic.Count():
        dist.broadcast(torch.ones(3), 0)


def test_buffers_are_counted(one_rank):
    with traffic.Count() as count:
        dist.all_reduce(torch.ones(5, dtype=torch.float64))
        dist.all_reduce(torch.ones(2))
    assert count.buffers == {"all-reduce": 48} and count.calls == {"all-reduce": 2}
    assert count.sent_bytes(4) == 2 * 3 / 4 * 48


def test_groups_and_batches_must_divide(one_rank):
    mesh = launch.mesh_of(1, torch.device("cpu"))
    assert data.part(torch.arange(3), mesh).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="1 ranks do not divide into groups of 2"):
        launch.mesh_of(2, torch.device("cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's counters are Linux's")
def test_socket_bytes_are_what_was_sent():
    with socket.create_server(("localhost", 0)) as server, socket.create_connection(server.getsockname()) as client:
        peer, _ = server.accept()
        with peer:
            before = traffic.socket_bytes()
            reader = threading.Thread(target=lambda: peer.recv(100_000, socket.MSG_WAITALL))
            reader.start()
            client.sendall(bytes(100_000))
            reader.join()
            assert traffic.socket_bytes() - before == 100_000


def test_a_link():
    link = communication.Link("wire", 100.0, 2.0)
    assert link.message_s(50) == 2.5
    for wrong in ({"bytes_per_s": 0, "latency_s": 1}, {"bytes_per_s": 1, "latency_s": -1}):
        with pytest.raises(ValueError, match="wire: a link has a positive bandwidth"):
            communication.Link("wire", **wrong)


def test_the_gpus_link_is_that_of_the_table_of_accelerators():
    both_directions = scaling.accelerators().loc["h100-sxm", "link_bytes_per_s"]
    assert 2 * communication.LINKS["nvlink"].bytes_per_s == both_directions


def test_step_times_are_sums_of_messages():
    """Message by message: each of a ring's steps, each layer's four sums, a pipeline's way there and back."""
    link = communication.Link("wire", 100.0, 0.25)
    ring = sum(link.message_s(60 / 3) for _ in range(2 * 2))
    assert communication.ring_allreduce_s(60, 3, link) == pytest.approx(ring)
    assert communication.data_parallel_step_s(9, 60, 3, link) == pytest.approx(9 / 3 + ring)
    assert communication.data_parallel_step_s(9, 60, 3, link, hidden=True) == max(9 / 3, ring)
    layers = sum(sum(link.message_s(60 / 3) for _ in range(2 * 2)) for _ in range(4 * 5))
    assert communication.tensor_parallel_step_s(9, 5, 60, 3, link) == pytest.approx(9 / 3 + layers)
    slots = pipeline.timetable([["F"] * 4 + ["B"] * 4] * 3, forward=0.25, backward=0.5)  # 9 s of work on 3 ranks
    span, way = max(slot.end for slot in slots), sum(link.message_s(60 / 4) for _ in range(2 * 2))
    assert communication.pipeline_step_s(9, 60, 3, 4, link) == pytest.approx(span + way)
