"""Balance losses at their three scopes, for every gate with the option: values and gradients."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from helpers.moe_layers import D, E, make_layer
from helpers.spawn import groups_for
from megatron.moe.ffn import FFNContext
from megatron.moe.gate import available_gates, gate_class
from megatron.moe.gate_update import GateUpdater
from megatron.moe.routing import GateInput, LoadBalancingLoss
from megatron.parallel.groups import Groups

NAMES = [
    n
    for n in available_gates()
    if "balance_scope" in {f.name for f in dataclasses.fields(gate_class(n).Config)}
]
TOKENS = 6


def options(name, scope):
    """Options of the gate with a coefficient so large that the loss is well above rounding."""
    fields = {f.name for f in dataclasses.fields(gate_class(name).Config)}
    known = {"balance_scope": scope, "loss_coeff": 0.5, "lambda_init": 0.5}
    return {key: value for key, value in known.items() if key in fields}


def micro_batch(number, sequences=2):
    """Hidden states [sequences, TOKENS, D], skewed so that loads differ between micro-batches,
    and token ids."""
    g = torch.Generator().manual_seed(number)
    x = torch.randn(sequences, TOKENS, D, generator=g) + torch.randn(D, generator=g)
    return x, torch.randint(0, 50, (sequences, TOKENS), generator=g)


def gate_grads(layer):
    """Gradients of the gate's parameters by name; zeros for those without one."""
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in layer.gate.named_parameters()
    }


def _one_step(name, ep_size, numbers, recompute=False):
    """Losses of this rank's micro-batches of one step, and the gate's gradients of their sum."""
    groups = groups_for(ep_size)
    layer = make_layer(name, groups, options=options(name, "global-batch"))
    layer.sum_loads_over_step()
    losses = []
    for number in numbers[groups.rank]:
        x, ids = micro_batch(number)
        if recompute:
            out = checkpoint(
                layer,
                x,
                FFNContext(ids),
                use_reentrant=False,
                context_fn=layer.recompute_contexts,
            )
        else:
            out = layer(x, FFNContext(ids))
        out.aux_loss.backward()
        losses.append(out.aux_loss.item())
    return losses, gate_grads(layer)


@pytest.mark.parametrize("name", NAMES)
def test_global_batch_spans_ranks(name, ranks2):
    """Two ranks have the loss and the gradients of one rank with all tokens."""
    results = ranks2.run(_one_step, name, 2, [[1], [2]])
    layer = make_layer(name, options=options(name, "global-batch"))
    x1, ids1 = micro_batch(1)
    x2, ids2 = micro_batch(2)
    together = layer(torch.cat([x1, x2]), FFNContext(torch.cat([ids1, ids2]))).aux_loss
    together.backward()
    mean_loss = sum(losses[0] for losses, _ in results) / 2
    assert mean_loss == pytest.approx(together.item(), rel=1e-5)
    for n, expected in gate_grads(layer).items():
        mean = sum(grads[n] for _, grads in results) / 2
        torch.testing.assert_close(
            mean, expected, atol=1e-6, rtol=1e-4, msg=lambda m, n=n: f"{n}: {m}"
        )
    separate = [
        make_layer(name, options=options(name, "micro-batch"))(*_args(n)).aux_loss.item()
        for n in (1, 2)
    ]
    assert abs(sum(separate) / 2 - together.item()) > 1e-4, "the scopes must differ here"


def _args(number):
    x, ids = micro_batch(number)
    return x, FFNContext(ids)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_global_batch_spans_micro_batches(name, recompute, ranks2):
    """Micro-batch m uses the loads of micro-batches up to m of both ranks, and its own scores."""
    numbers = [[1, 2], [3, 4]]
    results = ranks2.run(_one_step, name, 2, numbers, recompute)
    layer = make_layer(name, options=options(name, "global-batch"))
    routings = {}
    for number in (1, 2, 3, 4):
        x, ids = micro_batch(number)
        sequence = torch.arange(2).repeat_interleave(TOKENS)
        routings[number] = layer.gate(
            GateInput(x.flatten(0, 1), ids.flatten(), sequence, num_sequences=2)
        )
    total = 0
    for rank in (0, 1):
        for m in (0, 1):
            mine = routings[numbers[rank][m]]
            so_far = [routings[numbers[r][i]] for r in (0, 1) for i in range(m + 1)]
            expected = mine.aux_loss + sum(
                term.loss(
                    sum(routing.balance[i].count_NG for routing in so_far),
                    sum(routing.balance[i].total_N for routing in so_far),
                )
                for i, term in enumerate(mine.balance)
            )
            assert results[rank][0][m] == pytest.approx(expected.item(), rel=1e-5)
            total = total + expected
    total.backward()
    for n, expected in gate_grads(layer).items():
        got = results[0][1][n] + results[1][1][n]
        torch.testing.assert_close(
            got, expected, atol=1e-6, rtol=1e-4, msg=lambda m, n=n: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_next_step_resets_loads(name):
    layer = make_layer(name, options=options(name, "global-batch"))
    gate_updater = GateUpdater(torch.nn.ModuleList([layer]), Groups())
    first = layer(*_args(1)).aux_loss.item()
    second = layer(*_args(1)).aux_loss.item()
    assert second == pytest.approx(first, rel=1e-5), (
        "counting the same loads twice must not change their shares"
    )
    third = layer(*_args(2)).aux_loss.item()
    gate_updater.post_optimizer_step()
    fresh = make_layer(name, options=options(name, "global-batch"))
    fresh.load_state_dict(layer.state_dict())
    alone = fresh(*_args(2)).aux_loss.item()
    assert layer(*_args(2)).aux_loss.item() == pytest.approx(alone, rel=1e-5)
    assert third != pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_sequence_scope_averages_sequences(name):
    layer = make_layer(name, options=options(name, "sequence"))
    x, ids = micro_batch(5, sequences=3)
    together = layer(x, FFNContext(ids)).aux_loss.item()
    parts = [layer(x[i : i + 1], FFNContext(ids[i : i + 1])).aux_loss.item() for i in range(3)]
    assert together == pytest.approx(sum(parts) / 3, rel=1e-5)


@pytest.mark.parametrize("documents", [3, 100])
def test_many_documents_need_little_memory(documents):
    """Value and gradient are the mean of each document's; autograd keeps nothing whose size
    is tokens times documents. Some documents have no tokens, and the order is free."""
    tokens = 300
    g = torch.Generator().manual_seed(0)
    score_TG = torch.rand(tokens, E, generator=g, requires_grad=True)
    choice_T = torch.randint(0, E, (tokens,), generator=g)
    document_T = torch.randint(0, documents, (tokens,), generator=g) // 2 * 2
    inp = GateInput(torch.zeros(tokens, D), None, document_T, num_sequences=documents)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        loss = LoadBalancingLoss.of(
            inp, score_TG, torch.arange(tokens), choice_T, coeff=0.5, scope="sequence"
        ).loss()
    expected = []
    for document in document_T.unique():
        mine = document_T == document
        load_G = torch.stack([(choice_T[mine] == e).float().mean() for e in range(E)])
        expected.append(0.5 * E * (load_G * score_TG[mine].mean(0)).sum())
    expected = sum(expected) / len(expected)
    torch.testing.assert_close(loss, expected)
    got, want = (torch.autograd.grad(v, score_TG)[0] for v in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    assert max(saved) <= tokens * E


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_uses_local_loads(name):
    """In evaluation the global-batch loss is the rank's own, and no loads are stored."""
    layer = make_layer(name, options=options(name, "global-batch")).eval()
    local = make_layer(name, options=options(name, "micro-batch")).eval()
    layer(*_args(1))
    assert layer(*_args(2)).aux_loss.item() == pytest.approx(
        local(*_args(2)).aux_loss.item(), rel=1e-5
    )
    assert layer.step_sums == {} and layer._step_loads == []


def test_loop_without_step_ends_keeps_no_loads():
    """A training loop that never announces the end of a step: the balance loss of scope
    global-batch counts one forward pass, whatever ran before it or failed in the middle."""
    layer = make_layer("topk", options=options("topk", "global-batch"))
    alone = layer(*_args(2)).aux_loss.item()
    layer(*_args(1))
    layer.experts.forward = None
    with pytest.raises(TypeError):
        layer(*_args(1))
    del layer.experts.forward
    layer.eval()(*_args(1))
    assert layer.train()(*_args(2)).aux_loss.item() == alone
    gate_updater = GateUpdater(torch.nn.ModuleList([layer]), Groups())
    assert layer(*_args(2)).aux_loss.item() == alone, "what ran before is no part of the step"
    layer(*_args(1))
    assert layer(*_args(2)).aux_loss.item() != alone
    gate_updater.post_optimizer_step()
    assert layer(*_args(2)).aux_loss.item() == alone
