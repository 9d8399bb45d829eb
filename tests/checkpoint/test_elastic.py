"""Resuming a run: exactly on the same topology, and with the same state on another one."""

from __future__ import annotations

import pytest
import torch

from helpers import engines, runs
from megatron.moe.gate import available_gates, create_gate


def gates_with_state() -> list[str]:
    """Return the gates that have buffers."""
    found = []
    for name in available_gates():
        gate = create_gate(
            name, hidden_size=16, num_experts=16, vocab_size=61, **engines.OPTIONS.get(name, {})
        )
        if list(gate.buffers()):
            found.append(name)
    return found


def check_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [
        name
        for name in a
        if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])
    ]
    assert not different, different


def test_gates_with_state_are_known():
    assert gates_with_state() == [
        "blockffn",
        "deepseek_v3",
        "expert_threshold",
        "hash",
        "longcat",
        "peer",
        "remoe",
    ]


def runs_that_resume():
    """Return parameters (gate, precision, stage, EP size); some of most gates are slow tests."""
    gates = [("topk", "fp32"), ("topk", "bf16")]
    gates += [(gate, "bf16") for gate in gates_with_state()]
    for stage, ep_size in [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]:
        for gate, precision in gates:
            always = gate in ("topk", "deepseek_v3") or (stage, ep_size) in [(1, 1), (3, 2)]
            marks = [] if always else pytest.mark.slow
            yield pytest.param(gate, precision, stage, ep_size, marks=marks)


@pytest.mark.parametrize("gate, precision, stage, ep_size", list(runs_that_resume()))
def test_resumed_run_equals_uninterrupted_run(
    gate, precision, stage, ep_size, ranks2, tmp_path
):
    """Losses, gradient norm, weights and buffers are equal bit by bit.

    The resumed run has another seed, so that everything comes from the files.
    """
    config = engines.config_of(
        gate, ep_size, stage, precision, save=str(tmp_path), async_save=stage == 2
    )
    uninterrupted = ranks2.run(engines.train, config, 3, 3)
    resumed = ranks2.run(engines.train, engines.loading(config, tmp_path), 0, 3, 8)
    for (_, expected, weights, norm), (_, losses, our_weights, our_norm) in zip(
        uninterrupted, resumed, strict=True
    ):
        assert losses == expected and norm == our_norm
        check_same(our_weights, weights)


ELSEWHERE = [  # (ranks, expert-parallel size, ZeRO stage) of the resumed run
    (1, 1, 1),
    (4, 4, 1),
    (4, 2, 1),
    (2, 2, 2),
    (2, 2, 3),
    (1, 1, 3),
    (4, 4, 3),
    (4, 2, 2),
]
MOVES = [(1, *there) for there in ELSEWHERE] + [
    (2, 2, 2, 3),
    (2, 2, 2, 1),
    (3, 2, 2, 1),
    (3, 2, 2, 2),
    (3, 4, 2, 3),
    (3, 1, 1, 2),
]
# Tolerances of the first loss and of five losses. In bf16 sums in another order round otherwise,
# and a router, which is bf16 under ZeRO 3 and fp32 otherwise, may choose another expert.
TOLERANCE = {"fp32": (1e-5, 1e-5), "bf16": (1e-3, 0.05)}


@pytest.fixture(scope="module")
def saved(ranks2, tmp_path_factory):
    """Return a function of (gate, stage, precision) to a checkpoint of two ranks, EP 2.

    It returns (directory, config, losses of the five steps after the checkpoint).
    """
    made = {}

    def make(gate, stage, precision):
        if (key := (gate, stage, precision)) not in made:
            folder = tmp_path_factory.mktemp("saved")
            config = engines.config_of(gate, 2, stage, precision, save=str(folder))
            made[key] = (folder, config, ranks2.run(engines.train, config, 3, 5)[0][1])
        return made[key]

    return make


@pytest.mark.parametrize(
    "stage, ranks, ep_size, new_stage, precision",
    [
        *((*move, "fp32") for move in MOVES),
        *((*move, "bf16") for move in [*MOVES[:3], *MOVES[-6:-2]]),
    ],
)
def test_run_resumes_on_another_topology(
    stage, ranks, ep_size, new_stage, precision, saved, request, tmp_path
):
    """Saved again immediately, all weights, moments and buffers are equal bit by bit.

    The next five losses agree with those of the uninterrupted run.
    """
    folder, _, expected = saved("deepseek_v3", stage, precision)
    config = engines.config_of("deepseek_v3", ep_size, new_stage, precision)
    pool = request.getfixturevalue(f"ranks{ranks}")
    answers = pool.run(engines.train, engines.loading(config, folder, tmp_path), 0, 5, 8)
    check_same(engines.full_tensors(tmp_path), engines.full_tensors(folder))
    for _, losses, _, _ in answers:
        assert losses == answers[0][1]
        assert losses[0] == pytest.approx(expected[0], abs=TOLERANCE[precision][0])
        assert losses == pytest.approx(expected, abs=TOLERANCE[precision][1])


def gates_that_resume_elsewhere():
    """Return parameters (gate): those with parameters of a router alone are slow tests."""
    own_tensors = {*gates_with_state(), "dynmoe", "moepp", "tcmoe"}
    for gate in available_gates():
        if gate != "deepseek_v3":
            yield pytest.param(gate, marks=[] if gate in own_tensors else pytest.mark.slow)


@pytest.mark.parametrize("gate", list(gates_that_resume_elsewhere()))
def test_every_gate_resumes_on_another_topology(gate, saved, ranks4, tmp_path):
    folder, _, expected = saved(gate, 1, "fp32")
    answers = ranks4.run(
        engines.train, engines.loading(engines.config_of(gate, 4, 1), folder, tmp_path), 0, 5, 8
    )
    check_same(engines.full_tensors(tmp_path), engines.full_tensors(folder))
    assert answers[0][1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "ranks, changes",
    [
        (1, ("--moe-expert-parallel-size", "1", "--zero-stage", "2")),
        (4, ("--moe-expert-parallel-size", "4", "--micro-batch-size", "1")),
    ],
)
def test_resumed_run_sees_same_samples_elsewhere(
    ranks, changes, full_run, data, request, tmp_path
):
    """Resume from two ranks on one and on four, through the flags of the program."""
    flags, folder, expected = full_run
    pool = request.getfixturevalue(f"ranks{ranks}")
    argv = flags(tmp_path, "--load", str(folder / "checkpoints"), "--load-step", "3", *changes)
    pool.run(runs.train, argv, timeout=300)
    got = runs.metrics(tmp_path)
    assert [m["iteration"] for m in got] == [4, 5, 6]
    for m, e in zip(got, expected[3:], strict=True):
        assert m["consumed_samples"] == e["consumed_samples"] and m["lr"] == e["lr"]
        assert m["loss"] == pytest.approx(e["loss"], abs=1e-3)
    losses = [e["loss"] for e in expected[3:]]
    assert max(losses) - min(losses) > 0.01, "the losses could not tell other samples"


@pytest.fixture(scope="module")
def full_run(data, ranks2, tmp_path_factory):
    """Run six iterations on two ranks, with a checkpoint after three.

    Returns (function from an output directory to flags, directory of the run, its metrics).
    """
    folder = tmp_path_factory.mktemp("full_run")

    def flags(out, *more):
        return [
            *runs.flags(data, out, 6, *runs.EP2),
            "--hidden-dropout",
            "0",
            "--eval-iters",
            "0",
            *more,
        ]

    ranks2.run(runs.train, flags(folder, "--save-interval", "3"), timeout=300)
    return flags, folder, runs.metrics(folder)
