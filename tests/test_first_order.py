"""create_graph=True through our autograd Functions raises; it never gives wrong second derivatives.

The mistake to catch: where the incoming gradient is a constant, as for y.sum(), torch's
`once_differentiable` returns gradients without a graph and says nothing.
"""

import ast
from pathlib import Path

import pytest
import torch

from helpers.moe_layers import E, make_carry, make_input, make_layer
from helpers.spawn import groups_for
from helpers.triton_kernels import CHOICES, mlp_inputs, routed
from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import build_model
from megatron.model.cross_entropy import linear_cross_entropy
from megatron.model.document_attention import (
    DocumentLayout,
    _PadDocuments,
    _UnpadDocuments,
)
from megatron.moe.dispatch.permute import GatherWeights, PermuteTokens, UnpermuteTokens
from megatron.moe.experts.grouped_linear import _AddExpertBias, grouped_linear
from megatron.moe.experts.grouped_mlp import grouped_mlp
from megatron.moe.ffn import FFNContext
from megatron.moe.gate import available_gates
from megatron.moe.peer import lookup
from megatron.moe.peer.lookup import PairDots, PairOps, TokenExpertPairs, WeightedRowSum
from megatron.parallel.groups import Groups

REPO = Path(__file__).resolve().parents[1]
TWICE_DIFFERENTIABLE = {"_ContiguousGradient"}
ROWS = routed(*CHOICES, 9, 5)
ERROR = r"create_graph is True and the graph contains {}.*allowed: False"


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def second_gradient(function, tensors):
    """The gradient of the sum of squares of the gradients of a sum.

    The loss is a plain sum: its gradient, ones, depends on nothing.
    """
    loss = function(*tensors).sum()
    grads = torch.autograd.grad(loss, tensors, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)


def test_every_function_is_marked():
    """A new Function is either first order only or twice differentiable on purpose."""
    found = {}
    for path in sorted((REPO / "megatron").rglob("*.py")):
        source = path.read_text()
        assert "once_differentiable" not in source or path.name == "first_order.py", path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and any(
                ast.unparse(base).endswith("autograd.Function") for base in node.bases
            ):
                found[node.name] = [
                    ast.unparse(decorator)
                    for function in node.body
                    if getattr(function, "name", "") == "backward"
                    for decorator in function.decorator_list
                ]
    assert len(found) >= 16
    for name, decorators in found.items():
        assert ("first_order_only" in decorators) != (name in TWICE_DIFFERENTIABLE), name


def pair_lists():
    token, expert = (torch.tensor(values) for values in CHOICES)
    return TokenExpertPairs.of(token, expert, 9, 5, 1)


def pair_ops():
    return PairOps(lookup.embedding_dots, lookup.segment_sum_in_reused_memory, False)


def document_batches():
    layout = DocumentLayout(torch.tensor([[0, 0, 0, 1, 1], [2, 3, 3, 3, 3]]))
    return layout.batches


def mlp(backend):
    inputs = mlp_inputs(ROWS, "swiglu", 8, 4, torch.float32)
    return (
        lambda x, w, w1, w3, w2: grouped_mlp(x, w, w1, w3, w2, ROWS, "swiglu", backend),
        tuple(inputs.values()),
    )


CASES = {
    "PermuteTokens": lambda: (lambda x: PermuteTokens.apply(x, ROWS) ** 2, (randn(9, 4),)),
    "UnpermuteTokens": lambda: (
        lambda x, w: UnpermuteTokens.apply(x, w, ROWS),
        (randn(18, 4), randn(18)),
    ),
    "GatherWeights": lambda: (lambda w: GatherWeights.apply(w, ROWS) * w, (randn(18),)),
    "CpuMLP": lambda: mlp("cpu"),
    "ExpertMLP": lambda: mlp("triton"),
    "UnpermuteTokens|PermuteTokens": lambda: mlp("reference"),
    "UnpermuteTokens|PermuteTokens ": lambda: mlp("grouped_mm"),
    "Loop": lambda: (
        lambda x, w: grouped_linear(x, w, ROWS.expert_offsets_E, "cpu"),
        (randn(18, 4), randn(5, 8, 4)),
    ),
    "TritonGroupedLinear": lambda: (
        lambda x, w: grouped_linear(x, w, ROWS.expert_offsets_E, "triton"),
        (randn(18, 4), randn(5, 8, 4)),
    ),
    "AddExpertBias": lambda: (
        lambda y, b: _AddExpertBias.apply(y, b, ROWS.expert_offsets_E) ** 2,
        (randn(18, 4), randn(5, 4)),
    ),
    "PairDots": lambda: (
        lambda x, table: PairDots.apply(x, table, pair_ops(), *pair_lists()),
        (randn(9, 4), randn(5, 1, 4)),
    ),
    "WeightedRowSum": lambda: (
        lambda table, scale: WeightedRowSum.apply(table, scale, pair_ops(), *pair_lists()),
        (randn(5, 1, 4), randn(18)),
    ),
    "LinearCrossEntropy": lambda: (
        lambda h, w: linear_cross_entropy(h, w, torch.arange(9) % 6, torch.ones(9)),
        (randn(9, 4), randn(6, 4)),
    ),
    "PadDocuments": lambda: (
        lambda x: _PadDocuments.apply(x, document_batches()) ** 2,
        (randn(10, 4),),
    ),
    "UnpadDocuments": lambda: (
        lambda x: _UnpadDocuments.apply(x, document_batches()) ** 2,
        (randn(len(document_batches().token_P), 4),),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_second_gradient_raises(name):
    """First gradients of the same graph are computed."""
    if name in ("ExpertMLP", "TritonGroupedLinear"):
        pytest.importorskip("triton", reason="triton is not installed")
    function, tensors = CASES[name]()
    with pytest.raises(RuntimeError, match=ERROR.format(f"({name.strip()})")):
        second_gradient(function, tensors)
    function, tensors = CASES[name]()
    assert all(
        g.isfinite().all() for g in torch.autograd.grad(function(*tensors).sum(), tensors)
    )


@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
def test_grouped_linear_twice_differentiable(backend):
    """Equal to separate linear layers: torch's grouped product may raise, never be wrong."""

    def reference(x, w):
        parts = zip(x.split(ROWS.counts()), w, strict=True)
        return torch.cat([part @ weight.t() for part, weight in parts]) ** 2

    def ours(x, w):
        return grouped_linear(x, w, ROWS.expert_offsets_E, backend) ** 2

    tensors = (randn(18, 4), randn(5, 8, 4, seed=1))
    for got, expected in zip(
        second_gradient(ours, tensors), second_gradient(reference, tensors), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def layer_function(layer, tokens=11):
    """A layer as a function of its input and parameters, and these tensors."""
    x, ids = make_input(tokens)
    context = FFNContext(ids, make_carry(layer.gate, tokens))
    tensors = (x.requires_grad_(), *layer.parameters())
    return lambda *_: layer(x, context).y, tensors


@pytest.mark.parametrize("name", available_gates())
def test_layer_of_any_gate_raises(name):
    with pytest.raises(RuntimeError, match=ERROR.format("")):
        second_gradient(*layer_function(make_layer(name, layer=1)))


@pytest.mark.parametrize("backend", ["reference", "cpu", "grouped_mm", "triton"])
def test_layer_of_any_backend_raises(backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    layer = make_layer("topk", moe_backend=backend)
    with pytest.raises(RuntimeError, match=ERROR.format("")):
        second_gradient(*layer_function(layer))


def _sharded(name):
    """The message of the error of a layer whose experts are on two ranks."""
    function, tensors = layer_function(make_layer(name, groups_for(2), layer=1))
    grads = torch.autograd.grad(function().square().sum(), tensors, allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)
    with pytest.raises(RuntimeError) as error:
        second_gradient(function, tensors)
    return str(error.value)


@pytest.mark.parametrize("name", ["topk", "peer"])
def test_sharded_layer_raises(name, ranks2):
    """All ranks raise in the same Function, so none waits for another."""
    first, second = ranks2.run(_sharded, name)
    assert first == second and "create_graph is True" in first


@pytest.mark.parametrize("num_experts", [0, E])
def test_model_raises(num_experts):
    """Also a dense one; its loss is the first Function of the backward pass."""
    model = build_model(
        ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, seq_length=8),
        MoEConfig(num_experts=num_experts),
        {},
        vocab_size=64,
        seed=1,
        groups=Groups(),
    )
    ids = torch.arange(9)[None]
    with pytest.raises(RuntimeError, match=ERROR.format("LinearCrossEntropy")):
        second_gradient(
            lambda *_: model(ids[:, :-1], ids[:, 1:]).loss, tuple(model.parameters())
        )
