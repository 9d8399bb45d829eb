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


def test_backend_is_gloo_without_cuda(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert parallel.choose_comm_backend() == (
        "gloo",
        torch.device("cpu"),
        "DS_ACCELERATOR=cpu is set",
    )
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parallel.choose_comm_backend()[2] == "torch finds no CUDA device"


def test_backend_is_nccl_with_enough_devices(monkeypatch):
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


def test_expert_parallel_size_divides_the_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    with pytest.raises(
        ValueError, match="--moe-expert-parallel-size is 3; allowed: a divisor of the 4 ranks"
    ):
        distributed.init_distributed(3)


def test_operator_cache_is_in_the_environment(monkeypatch, tmp_path):
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
    """On a rank: its place in the expert-parallel groups."""
    os.environ.update(
        RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0"
    )
    groups = distributed.init_distributed(ep_size, timeout_minutes=0.5)
    for group in (dist.group.WORLD, groups.ep_group):
        backend = group._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == 30, "the run's timeout"
    distributed.init_distributed(ep_size)  # the other tests on these ranks may take longer
    members = dist.get_process_group_ranks(groups.ep_group)
    return groups.rank, groups.ep_rank, members, groups.backend, groups.is_rank0


def test_consecutive_ranks_share_experts(ranks4):
    assert ranks4.run(_init, 2, timeout=300) == [
        (0, 0, [0, 1], "gloo", True),
        (1, 1, [0, 1], "gloo", False),
        (2, 0, [2, 3], "gloo", False),
        (3, 1, [2, 3], "gloo", False),
    ]


def _reduce():
    groups = groups_for(1)
    mean = parallel.all_reduce_mean(groups.rank + 1.0, groups)
    total = parallel.all_reduce_sum(torch.tensor([groups.rank, 1]), groups)
    return mean, total.tolist()


def test_reductions_are_over_all_ranks(ranks4):
    assert ranks4.run(_reduce) == [(2.5, [6, 4])] * 4
    assert parallel.all_reduce_mean(3.0, Groups()) == 3.0


def _exchange_objects(fails):
    """On a rank: what all ranks and rank 0 sent, or the fields of rank 0's error."""
    groups = groups_for(1)

    def compute():
        assert groups.is_rank0, "only rank 0 computes"
        if fails:
            raise OSError(28, "No space left on device", "x")
        return {"a": groups.rank}

    gathered = parallel.all_gather_objects(groups.rank * 2, groups)
    try:
        return gathered, parallel.broadcast_from_rank0(compute, groups)
    except OSError as error:
        return error.errno, error.filename


@pytest.mark.parametrize("number", [1, 4])
def test_objects_and_errors_reach_all_ranks(number, request):
    pool = request.getfixturevalue(f"ranks{number}")
    gathered = [2 * rank for rank in range(number)]
    assert pool.run(_exchange_objects, False) == [(gathered, {"a": 0})] * number
    assert pool.run(_exchange_objects, True) == [(28, "x")] * number


def test_random_streams_differ_and_are_restored():
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
def test_missing_rank_is_a_clear_error(rank, message):
    """Rank 0 alone counts the ranks that joined; rank 1 alone finds no server."""
    port = str(free_port())
    code = (
        "from megatron.exit_codes import exit_code, exit_process\n"
        "from megatron.engine import distributed\n"
        "exit_process(exit_code(lambda: distributed.init_distributed(1, 0.03)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
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
        f"did not find each other at 127.0.0.1:{port} within --timeout-minutes 0.03: "
        f".*({message}).* "
        "GLOO_SOCKET_IFNAME, which is lo",
        line,
    ), line


def test_gloo_connection_error_is_one_line(monkeypatch):
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

    def fail(*args, **kwargs):
        raise RuntimeError("something else")

    original = deepspeed.init_distributed
    deepspeed.init_distributed = fail
    try:
        distributed.init_distributed(1)
    finally:
        deepspeed.init_distributed = original


def test_other_start_errors_keep_their_traceback(ranks1):
    with pytest.raises(RuntimeError, match="RuntimeError: something else"):
        ranks1.run(_fail_to_start)
