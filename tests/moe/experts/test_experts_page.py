"""The expert type that docs/experts.md shows: its formula, and a run that starts from its file."""

import re
from pathlib import Path

import pytest
import torch

from helpers import runs
from helpers.outside_gates import restored_registry
from helpers.routings import make_routing
from megatron.moe import ExpertContext, create_experts
from megatron.moe.dispatch.plan import build_dispatch_plan
from megatron.moe.experts.expert_registry import EXPERT_TYPES
from megatron.moe.experts.expert_type import available_expert_types
from megatron.moe.gate_registry import import_gate_files

REPO = Path(__file__).resolve().parents[3]
PAGE = (REPO / "docs/experts.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The file of the page's example; one, since ranks import it once."""
    path = tmp_path_factory.mktemp("example") / "squared_relu.py"
    path.write_text(EXAMPLE)
    return path


def test_page_lists_all_types():
    listed = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    built_in = [
        name
        for name in available_expert_types()
        if EXPERT_TYPES.classes[name].__module__.startswith("megatron.")
    ]
    assert sorted(listed) == built_in


def test_example_type_follows_its_formula(example):
    with restored_registry():
        import_gate_files([str(example)])
        experts = create_experts("squared_relu", ExpertContext(2, 4, 6), gain=3.0)
    routing = make_routing([0, 1, 1], [1, 0, 1], torch.tensor([0.5, 2.0, 1.0]))
    rows = build_dispatch_plan(routing, 2, 2).routed
    x = torch.randn(2, 4)
    expected = torch.zeros(2, 4)
    for t, e, w in [(0, 1, 0.5), (1, 0, 2.0), (1, 1, 1.0)]:
        expected[t] += w * 3 * (experts.w2[e] @ (experts.w1[e] @ x[t]).relu() ** 2)
    y = experts(x, routing.weight_A[rows.source_index_S], rows)
    torch.testing.assert_close(y, expected)


def _flags(data, out, example, iters, *more):
    words = ("--gate-path", str(example), "--expert-type", "squared_relu", "--expert-gain", "2")
    # Dropout is random per rank.
    return runs.flags(data, out, iters, *words, "--hidden-dropout", "0", *more)


@pytest.mark.parametrize("options", [("--moe-latent-size", "16"), ("--moe-weight-on-input",)])
def test_example_type_trains_and_resumes(options, data, example, tmp_path, ranks2, ranks1):
    """Two ranks with sharded experts, then one rank with all of them: the losses continue."""
    full = tmp_path / "full"
    ranks2.run(runs.train, _flags(data, full, example, 4, *runs.EP2, *options))
    first = tmp_path / "first"
    more = ("--save-interval", "2", "--exit-interval", "2", *options)
    ranks2.run(runs.train, _flags(data, first, example, 4, *runs.EP2, *more))
    words = ("--load", str(first / "checkpoints"), *options)
    ranks1.run(runs.train, _flags(data, tmp_path / "second", example, 4, *words))
    expected = [row["loss"] for row in runs.metrics(full)]
    resumed = [row["loss"] for row in runs.metrics(tmp_path / "second")]
    assert resumed == pytest.approx(expected[2:], abs=0.02)
