"""Backend choice with its reason, expert-parallel groups, reductions, random state."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from helpers.spawn import free_port, groups_for
from megatron.engine import distributed
from megatron.parallel import groups as parallel
from megatron.parallel import rng
from megatron.parallel.groups import Groups


def test_cpu_is_chosen_and_says_why(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert parallel.choose_comm_backend() == (
        "gloo",
        torch.device("cpu"),
        "DS_ACCELERATOR=cpu is set",
    )
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parallel.choose_comm_backend()[2] == "torch finds no CUDA device"


def test_cuda_is_chosen_when_there_and_ranks_must_fit(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.choose_comm_backend() == (
        "nccl",
        torch.device("cuda", 1),
        "torch finds 2 CUDA device(s)",
    )
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="LOCAL_RANK is 2; allowed: below the 2 CUDA devices"):
        parallel.choose_comm_backend()


def test_expert_parallel_size_must_divide_the_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    with pytest.raises(
        ValueError, match="--moe-expert-parallel-size is 3; allowed: a divisor of the 4 ranks"
    ):
        distributed.init_distributed(3)


def test_deepspeeds_operator_cache_goes_into_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    distributed.prepare_deepspeed(torch.device("cpu"))
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "torch_extensions")
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "mine")
    distributed.prepare_deepspeed(torch.device("cpu"))
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "mine"


def _init(ep_size):
    os.environ.update(
        RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0"
    )
    g = distributed.init_distributed(ep_size, timeout_minutes=0.5)
    seconds = g.ep_group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    assert seconds == 30, "the expert group has the run's timeout"
    return g.rank, g.ep_rank, dist.get_process_group_ranks(g.ep_group), g.backend, g.is_rank0


def test_consecutive_ranks_share_experts(ranks4):
    assert ranks4.run(_init, 2) == [
        (0, 0, [0, 1], "gloo", True),
        (1, 1, [0, 1], "gloo", False),
        (2, 0, [2, 3], "gloo", False),
        (3, 1, [2, 3], "gloo", False),
    ]


def _reduce():
    g = groups_for(1)
    return parallel.all_reduce_mean(g.rank + 1.0, g), parallel.all_reduce_sum(
        torch.tensor([g.rank, 1]), g
    ).tolist()


def test_reductions(ranks4):
    assert ranks4.run(_reduce) == [(2.5, [6, 4])] * 4
    assert parallel.all_reduce_mean(3.0, Groups()) == 3.0


def _exchange(fails):
    g = groups_for(1)

    def ask():
        assert g.is_rank0, "only rank 0 is asked"
        if fails:
            raise OSError(28, "No space left on device", "x")
        return {"a": g.rank}

    try:
        return parallel.all_gather_objects(g.rank * 2, g), parallel.broadcast_from_rank0(ask, g)
    except OSError as error:
        return error.errno, error.filename


@pytest.mark.parametrize("number", [1, 4])
def test_objects_travel_and_so_do_errors_of_the_first(number, request):
    pool = request.getfixturevalue(f"ranks{number}")
    assert (
        pool.run(_exchange, False)
        == [([2 * rank for rank in range(number)], {"a": 0})] * number
    )
    assert pool.run(_exchange, True) == [(28, "x")] * number


def test_ranks_draw_different_numbers_and_state_comes_back():
    rng.seed_rank(1, 0)
    first = torch.rand(3)
    rng.seed_rank(1, 1)
    assert not torch.equal(first, torch.rand(3))
    state = rng.get_state()
    a = torch.rand(3)
    rng.set_state(state)
    assert torch.equal(a, torch.rand(3))


@pytest.mark.parametrize(
    "rank, message", [("0", "1 of 2 are there"), ("1", "client socket|connect")]
)
def test_a_rank_that_waits_in_vain_says_for_whom(rank, message):
    """Rank 0 alone counts who is there, rank 1 alone finds no one."""
    port = str(free_port())
    code = (
        "from megatron.exit_codes import exit_code, exit_process; from megatron.engine import distributed; "
        "exit_process(exit_code(lambda: distributed.init_distributed(1, 0.03)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "RANK": rank,
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
        },
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    line = next(line for line in done.stderr.splitlines() if "error: " in line)
    assert re.search(
        f"did not find each other at 127.0.0.1:{port} within --timeout-minutes 0.03: .*({message}).* "
        "GLOO_SOCKET_IFNAME, which is lo",
        line,
    ), line


def test_gloos_error_of_connecting_is_one_line(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "a")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    error = RuntimeError(
        "Gloo connectFullMesh failed with [x] Connection refused\nException raised from ..."
    )
    line = distributed._rendezvous_error(error, 5.0)
    assert "connectFullMesh failed" in line and "which is not set" in line and "\n" not in line


def _fail_to_start():
    import deepspeed

    original = deepspeed.init_distributed
    deepspeed.init_distributed = lambda *args, **kwargs: (_ for _ in ()).throw(
        RuntimeError("something else")
    )
    try:
        distributed.init_distributed(1)
    finally:
        deepspeed.init_distributed = original


def test_other_errors_at_the_start_keep_their_traceback(ranks1):
    with pytest.raises(RuntimeError, match="RuntimeError: something else"):
        ranks1.run(_fail_to_start)
