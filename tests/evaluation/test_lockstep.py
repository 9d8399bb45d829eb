"""Programs on rank 0 whose calls all ranks run."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from helpers.spawn import groups_for
from megatron.evaluation import lockstep
from megatron.evaluation.lockstep import LockstepRanks
from megatron.parallel.groups import Groups


def total(value: float) -> float:
    t = torch.tensor(value + dist.get_rank())
    dist.all_reduce(t)
    return t.item()


def run_program(name: str):
    """Run a program in a rank; return its result and the number of polls of this rank."""
    groups = groups_for(1)
    ranks = LockstepRanks(groups, {"total": total})
    polls = []
    original = ranks._next_command

    def counted():
        polls.append(1)
        return original()

    ranks._next_command = counted
    lockstep._POLL_SECONDS = 0.05
    programs = {
        "calls": lambda: [ranks.call("total", 1.0), ranks.call("total", 2.0)],
        "slow": lambda: time.sleep(0.5) or "done",
        "mistake of the user": lambda: int("x"),
        "fault of the machine": lambda: os.stat("/none"),
        "mistake of the program": lambda: [][1],
    }
    return ranks.run(programs[name]), len(polls)


def test_calls_run_on_all_ranks(ranks2):
    results = ranks2.run(run_program, "calls")
    assert [result for result, _ in results] == [[3.0, 5.0], None]


def test_ranks_meet_while_program_runs(ranks2):
    """No rank waits in one collective for as long as the program takes."""
    (first, polls), (second, others) = ranks2.run(run_program, "slow")
    assert (first, second) == ("done", None)
    assert polls == others > 3


@pytest.mark.parametrize(
    "name, message",
    [
        ("mistake of the user", "ValueError: invalid literal"),
        ("fault of the machine", "No such file or directory: '/none'"),
        ("mistake of the program", "IndexError: list index out of range"),
    ],
)
def test_error_of_program_ends_all_ranks(ranks2, name, message):
    """The pool reports the first rank that fails; a rank that waited would time out."""
    with pytest.raises(RuntimeError, match=message):
        ranks2.run(run_program, name, timeout=60)
    assert ranks2.run(run_program, "calls")[1][0] is None, "the ranks are still in step"


def test_one_rank_runs_program_itself():
    ranks = LockstepRanks(Groups(), {"double": lambda value: 2 * value})
    assert ranks.run(lambda: ranks.call("double", 4)) == 8
