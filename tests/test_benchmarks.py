"""Tests of the benchmarks: their arithmetic, the peers they compare with, and quick runs."""

import json
import mmap
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import dispatch, hf_experts, moe_layer, report, train_step
from benchmarks import moe_peers as peers
from helpers.benchmark_runs import run_quickly
from helpers.spawn import groups_for
from megatron.interop.hf_experts import register_experts

REPO = Path(__file__).resolve().parents[1]


def test_interleave_calls_functions_in_turn():
    calls = []
    seconds = report.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1
    )
    assert calls == ["a", "b"] * 4 and {k: len(v) for k, v in seconds.items()} == {
        "a": 3,
        "b": 3,
    }
    assert all(s >= 0 for v in seconds.values() for s in v)


def test_ratios_are_taken_round_by_round():
    rows = report.compare(
        {"base": [1.0, 10.0, 1.0, 1.0], "x": [2.0, 20.0, 3.0, 2.0]}, "base", {"x": 2.5}
    )
    assert (
        len(rows) == 1 and rows[0].ratio == 2.0 and rows[0].low == 2.0 and rows[0].high >= 2.0
    )
    assert rows[0].holds and not report.Row("x", "b", 3, 3, 3, 2.5).holds
    assert report.Row("x", "b", 1, 1, 1).holds is None


@pytest.mark.parametrize(
    "ratio, check, code", [(1.0, True, 0), (3.0, True, 1), (3.0, False, 0)]
)
def test_finish_writes_rows_and_exit_code(ratio, check, code, tmp_path, capsys):
    argv = ["--json", str(tmp_path / "rows.json"), *(["--check"] if check else [])]
    args = report.parser("x").parse_args(argv)
    assert report.finish([report.Row("n", "b", ratio, ratio, ratio, 2.0)], args) == code
    assert ("holds" if ratio < 2 else "MISSED") in capsys.readouterr().out
    row = json.loads((tmp_path / "rows.json").read_text())[0]
    assert (
        row["name"] == "n"
        and row["baseline"] == "b"
        and row["bar"] == 2.0
        and row["holds"] == (ratio < 2)
    )


def describe_rank(groups, failing_rank: int):
    if groups.rank == failing_rank:
        raise SystemExit(3)
    return groups.rank, groups.world_size, groups.ep_size, torch.get_num_threads()


def test_on_ranks_returns_result_of_rank0():
    assert report.on_ranks(2, describe_rank, 2) == (0, 2, 2, 1)
    with pytest.raises(RuntimeError, match="a rank failed"):
        report.on_ranks(1, describe_rank, 0)


@pytest.mark.slow
def test_data_index_runs_quickly(tmp_path):
    """Every row is present and no file is left. A busy machine need not hold the bars."""
    printed, table, temp = run_quickly("data_index.py", tmp_path)
    assert "200,000 documents, 200,000,000 tokens: 195,312 samples" in printed
    assert all(
        words in printed
        for words in ("peak memory", "the dataset and", "first visit: median", "tokens/s")
    )
    assert [row["name"] for row in table] == [
        "open what is built",
        "a random sample, first visit",
        "a random sample, again",
    ] + [
        f"100 micro-batches, {kind}" for kind in ("0 workers", "2 workers", "0 workers, resets")
    ]
    assert all(
        row["bar"] == 1.0 and 0 < row["low"] <= row["ratio"] <= row["high"] for row in table
    )
    assert not [p for p in temp.iterdir() if (p / "big.idx").exists()]


@pytest.mark.slow
def test_preprocess_runs_quickly(tmp_path):
    """Every row is present, both programs write the same, and no file is left."""
    printed, table, temp = run_quickly("preprocess.py", tmp_path)
    assert "tokens equal byte for byte" in printed and not list(temp.iterdir())
    assert [(row["name"], row["bar"]) for row in table] == [
        ("tools/preprocess_data.py", None),
        ("time per byte, 8 MB", None),
        ("peak memory, 8 MB", None),
        ("tools/merge_datasets.py", None),
    ]


@pytest.mark.slow
def test_gate_cost_runs_quickly(tmp_path):
    from megatron.moe.gate import available_gates

    _, table, _ = run_quickly("gate_cost.py", tmp_path)
    names = [row["name"] for row in table]
    gates = [f"{gate}: gate" for gate in available_gates()]
    assert names[: len(gates)] == gates
    assert all(row["ratio"] < 1 for row in table[: len(gates)])
    assert [row["bar"] for row in table[len(gates) :]] == [1.25] * 8 + [None, 0.65]


def test_startup_is_split_into_stages():
    from benchmarks.startup import stages

    lines = [
        (1.0, "12:00:00 experts run on the cpu backend"),
        (
            9.0,
            "12:00:00 start-up: 7.00 s: torch 2.50, DeepSpeed and process groups 3.25, "
            "first step 1.25",
        ),
        (9.5, "12:00:00 iteration   1/200 | loss 1"),
    ]
    assert stages(lines) == {
        "launcher": 2.0,
        "torch": 2.5,
        "DeepSpeed and process groups": 3.25,
        "first step": 1.25,
        "the rest": 0.5,
    }


def test_launch_ends_all_processes(tmp_path):
    """A launch ends at the line that is waited for, with all its processes."""
    from benchmarks.startup import launch

    program = f"sleep 300 & echo $! >{tmp_path}/pid; echo one; echo iteration; sleep 300"
    lines = launch(["bash", "-c", program], "iteration")
    assert [line for _, line in lines] == ["one", "iteration"] and lines[0][0] <= lines[1][
        0
    ] < 60
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while (
        Path(f"/proc/{pid}").exists()
        and "zombie" not in Path(f"/proc/{pid}/status").read_text()
    ):
        assert time.monotonic() < deadline, "the background process lives on"
        time.sleep(0.1)
    assert [line for _, line in launch(["bash", "-c", "echo one"], None)] == ["one", ""]
    with pytest.raises(RuntimeError, match="did not do what it should:\none"):
        launch(["bash", "-c", "echo one"], "iteration")
    with pytest.raises(RuntimeError, match="did not do what it should:\ntwo"):
        launch(["bash", "-c", "echo two; exit 3"], None)


@pytest.mark.slow
def test_startup_runs_quickly(tmp_path):
    printed, table, temp = run_quickly("startup.py", tmp_path)
    assert [(row["name"], row["bar"]) for row in table] == [
        ("launch to first logged step", 1.5),
        ("launch to first logged step, no evaluation", 1.5),
        ("launch to first logged step", None),
    ]
    assert all(
        f"\n{stage} " in printed
        for stage in ("launcher", "torch", "data", "model", "engine", "first step")
    )
    assert not list(temp.iterdir())


CPU = torch.device("cpu")
SMALL = peers.Size(tokens=40, hidden=32, experts=4, width=16, topk=2)


def test_ranks_draw_same_weights():
    """Tokens differ between ranks, and rounding does not change their choice of experts."""
    a, b = (peers.Problem.draw(SMALL, "swiglu", CPU, rank) for rank in (0, 1))
    assert all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("router_ED", "w1_EHD", "w2_EDH", "w3_EHD")
    )
    assert not torch.equal(a.x_TD, b.x_TD) and a.x_TD.shape == a.grad_TD.shape == (40, 32)
    assert torch.equal(a.router_ED, a.router_ED.bfloat16().float())
    exact = (a.x_TD.double() @ a.router_ED.double().T).sort(-1, descending=True)
    assert (exact.values[:, 1] - exact.values[:, 2]).min() > peers.MARGIN
    rounded_Tk = (a.x_TD @ a.router_ED.bfloat16().T).topk(2, dim=-1).indices
    assert torch.equal(rounded_Tk.sort(-1).values, exact.indices[:, :2].sort(-1).values)


def test_skewed_router_overloads_both_halves():
    size = peers.Size(tokens=2000, hidden=32, experts=8, width=16, topk=2)
    even, skewed = (
        peers.loads(peers.Problem.draw(size, "gelu", CPU, skew=skew)) for skew in (0.0, 0.5)
    )
    assert sum(even) == sum(skewed) == 4000 and max(even) < 1.5 * min(even)
    for half in (skewed[:4], skewed[4:]):
        assert sum(half) > 1600 and max(half) > 2 * min(half)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_expert_loop_matches_formula(activation):
    """The formula is a sum over tokens and their experts, one at a time, in fp64."""
    from megatron.moe.experts.activations import activate

    problem = peers.Problem.draw(SMALL, activation, CPU).float()
    y_TD, x_grad_TD, _ = peers.expert_loop(problem).results(problem)
    x_TD = problem.x_TD.double().requires_grad_()
    rows = []
    for x_D in x_TD:
        logit_k, expert_k = (problem.router_ED.double() @ x_D).topk(2)
        y_D = 0
        for weight, e in zip(logit_k.softmax(0), expert_k.tolist(), strict=True):
            up = None if problem.w3_EHD is None else problem.w3_EHD[e].double() @ x_D
            y_D += weight * (
                problem.w2_EDH[e].double()
                @ activate(activation, problem.w1_EHD[e].double() @ x_D, up)
            )
        rows.append(y_D)
    expected_TD = torch.stack(rows)
    expected_TD.backward(problem.grad_TD.double())
    torch.testing.assert_close(y_TD.double(), expected_TD.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x_grad_TD.double(), x_TD.grad, atol=1e-5, rtol=1e-5)


def layers_of(problem: peers.Problem, names: str) -> dict[str, peers.Layer]:
    return {
        c.name: c.make(problem)
        for c in peers.candidates(problem.size, problem.activation, CPU)
        if not c.reason and c.name.startswith(names)
    }


def test_layers_compute_the_same(capsys):
    """DeepSpeed's layer needs a process group; the benchmark itself compares that one."""
    problem = peers.Problem.draw(SMALL, "swiglu", CPU)
    layers = {
        name: layer
        for part in ("ours", "per-expert", "Mixtral", "OLMoE")
        for name, layer in layers_of(problem, part).items()
    }
    assert list(layers) == [
        "ours, auto",
        "ours, reference",
        "ours, grouped_mm",
        "ours, cpu",
        "per-expert loop",
        "Mixtral, eager",
        "Mixtral, batched_mm",
        "Mixtral, grouped_mm",
        "OLMoE, grouped_mm",
    ]
    moe_layer.compare_values(problem, layers)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(layers)


@pytest.mark.parametrize(
    "wrong", ["output", "nothing but NaN", "input gradient", "weight gradient"]
)
def test_different_layer_is_found(wrong):
    problem = peers.Problem.draw(SMALL, "gelu", CPU)
    layer = peers.expert_loop(problem)
    if wrong == "output":
        forward = lambda x_TD: layer.forward(x_TD) * 1.1  # noqa: E731
    elif wrong == "nothing but NaN":
        forward = lambda x_TD: layer.forward(x_TD) * float("nan")  # noqa: E731
    elif wrong == "input gradient":
        forward = lambda x_TD: layer.forward(x_TD) + (x_TD - x_TD.detach())  # noqa: E731
    else:
        layer.module.experts[0].up_proj.weight.register_hook(torch.zeros_like)
        forward = layer.forward
    with pytest.raises(RuntimeError, match="per-expert loop computes something else"):
        moe_layer.compare_values(
            problem, {"per-expert loop": peers.Layer(layer.module, forward, layer.experts)}
        )


def test_step_leaves_no_gradients():
    problem = peers.Problem.draw(SMALL, "gelu", CPU)
    layer = peers.expert_loop(problem)
    layer.step(problem)()
    assert all(p.grad is None for p in layer.module.parameters()) and problem.x_TD.grad is None


def grouped_mm_flops(a_shape, b_shape, *args, out_shape, **kwargs):
    """Every row of a is multiplied by one matrix; between matrices, rows are the inner size."""
    rows, inner = a_shape
    if len(b_shape) == 2:  # a gradient of the weights: a is transposed
        rows, inner = inner, rows
    return 2 * rows * inner * b_shape[-1]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_baselines_do_equal_multiply_adds(activation):
    problem = peers.Problem.draw(SMALL, activation, CPU)
    gated, x_TD = activation == "swiglu", problem.x_TD
    steps = [
        peers.dense(problem).step(problem),
        peers.bare_gemms([40], 32, 2 * 16, gated, x_TD),
        peers.bare_gemms(peers.loads(problem), 32, 16, gated, x_TD),
        peers.bare_grouped_mm(peers.loads(problem), 32, 16, gated, x_TD),
    ]
    totals = []
    for step in steps:
        mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            step()
        totals.append(counter.get_total_flops())
    assert totals == [40 * 2 * 3 * (3 if gated else 2) * 2 * 32 * 16] * 4


def test_experts_in_transformers_are_compared(capsys):
    register_experts()
    rows = hf_experts.size_rows(SMALL, CPU, rounds=2, bar=None)
    names = [(row.name.split(": ")[1], row.baseline.split(": ")[1]) for row in rows]
    assert names == [("moe_megatron", "grouped_mm"), ("eager", "grouped_mm")]
    assert "largest relative difference" in capsys.readouterr().out


def test_skipped_layers_name_their_reason():
    large = peers.Size(tokens=8192, hidden=1024, experts=64, width=512, topk=8)
    reasons = {c.name: c.reason for c in peers.candidates(large, "swiglu", CPU) if c.reason}
    assert list(reasons) == ["Mixtral, deepgemm", "Mixtral, batched_mm", "Mixtral, sonicmoe"]
    assert (
        "it needs 344 GB" in reasons["Mixtral, batched_mm"]
        and "CUDA" in reasons["Mixtral, deepgemm"]
    )
    ungated = {c.name for c in peers.candidates(SMALL, "relu", CPU) if "gated" in c.reason}
    assert ungated == {
        c.name for c in peers.candidates(SMALL, "relu", CPU) if c.name[:5] in ("Mixtr", "OLMoE")
    }


def test_bars_compare_with_fastest_peer():
    seconds = {
        "dense": [1.0, 1.0, 1.0],
        "ours, auto": [1.3, 1.2, 1.3],
        "DeepSpeed MoE": [4.0, 4.0, 4.0],
        "Mixtral, eager": [9.0, 9.0, 9.0],
        "OLMoE, grouped_mm": [2.0, 2.0, 2.0],
    }
    rows = {(r.name, r.baseline): r for r in moe_layer.ratio_rows(seconds, (1.4, 0.4, 0.5))}
    assert (
        len(rows) == 6
        and rows["ours, auto", "dense"].holds
        and rows["ours, auto", "DeepSpeed MoE"].holds
    )
    assert (
        rows["ours, auto", "OLMoE, grouped_mm"].holds is False
        and rows["DeepSpeed MoE", "dense"].holds is None
    )
    few = {name: seconds[name] for name in ("dense", "ours, auto")}
    assert [(r.name, r.baseline) for r in moe_layer.ratio_rows(few, None)] == [
        ("ours, auto", "dense")
    ]


def test_peak_memory_is_the_maximum():
    moe_layer.reset_peak(CPU)
    before = moe_layer.resident(CPU)[0]
    with mmap.mmap(-1, 64 * 2**20) as block:  # not malloc's, which may keep what it gets back
        block[::4096] = b"x" * (64 * 256)
    now, peak = moe_layer.resident(CPU)
    assert 63 * 2**20 < peak - before < 90 * 2**20 and now < peak
    moe_layer.reset_peak(CPU)
    assert moe_layer.resident(CPU)[1] < peak - 32 * 2**20


def test_peak_memory_includes_gradients():
    """A loop in fp32 needs 9 MiB for its weight gradients; bf16 needs half of that.

    So few tokens add little.
    """
    size = (64, 256, 16, 192, 2)
    taken = moe_layer.run_in_fresh_process(
        moe_layer.peak_memory, "per-expert loop", size, "swiglu", "cpu"
    )
    assert 16 * 3 * 192 * 256 * 2 * 0.8 < taken < 40 * 2**20


def _count_exchanged_bytes():
    """Return the counted bytes of an uneven and an even exchange, and of another collective."""
    import torch.distributed as dist

    groups = groups_for(2)
    x_SD, receive = torch.zeros(6, 8, dtype=torch.bfloat16), [[2, 2], [4, 4]][groups.rank]
    received = torch.empty(sum(receive), 8, dtype=torch.bfloat16)

    def step():
        dist.all_to_all_single(received, x_SD, receive, [2, 4], group=groups.ep_group)
        dist.all_to_all_single(torch.empty_like(x_SD), x_SD, group=groups.ep_group)
        dist.barrier(groups.ep_group)

    return dispatch.bytes_to_others(step, groups.ep_group)


def test_bytes_sent_to_other_ranks(ranks2):
    row = 8 * 2
    assert ranks2.run(_count_exchanged_bytes) == [((4 + 3) * row, 2), ((2 + 3) * row, 2)]


def test_different_sharded_layer_is_found():
    problem = peers.Problem.draw(SMALL, "gelu", CPU)
    loop = peers.expert_loop(problem)
    wrong = peers.Layer(loop.module, lambda x_TD: loop.forward(x_TD.flip(0)), loop.experts)
    dispatch.check({dispatch.UNSHARDED: loop, dispatch.SHARDED: peers.ours(problem)}, problem)
    with pytest.raises(RuntimeError, match="sharded computes something else"):
        dispatch.check({dispatch.UNSHARDED: loop, dispatch.SHARDED: wrong}, problem)


def test_mixtral_has_equal_weights_and_loss():
    from megatron.parallel.groups import Groups

    shape = train_step.Shape(
        layers=1, hidden=32, heads=2, experts=4, width=16, vocab=128, length=8, sequences=2
    )
    batch = train_step.make_batch(2, 8, 128, seed=0)
    gpt, *_ = train_step.our_model(shape, Groups())
    theirs = train_step.their_model(shape, gpt)
    ours = gpt(batch.tokens_BS, batch.labels_BS).loss
    loss = theirs(
        input_ids=batch.tokens_BS, labels=batch.labels_BS, shift_labels=batch.labels_BS
    ).loss
    torch.testing.assert_close(loss, ours, atol=1e-5, rtol=1e-5)


def test_different_losses_are_an_error():
    train_step.check_losses({"a": 2.0, "b": 2.005})
    for losses in ((2.0, 2.02), (2.0, float("nan")), (float("nan"), 2.0)):
        with pytest.raises(RuntimeError, match="different losses"):
            train_step.check_losses(dict(zip("ab", losses)))


def test_profiled_parts_cover_the_step():
    """Each of two modules and a norm has its own time, and no time is counted twice."""
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = (
                nn.Linear(256, 256),
                nn.LayerNorm(256),
                nn.Linear(256, 4096),
            )

        def forward(self, x):
            return self.last(self.norm(self.first(x))).sum()

    model, x = Model(), torch.randn(512, 256)
    train_step.name_parts(model, model.norm, {model.first: "experts"})
    parts = train_step.profile_step(lambda: model(x).backward())
    assert list(parts) == list(train_step.PARTS) and parts["attention"] == parts["gate"] == 0
    assert parts["output and loss"] > parts["experts"] > 0 and parts["the rest"] > 0


@pytest.mark.slow
def test_host_allocator_runs_quickly(tmp_path):
    printed, table, _ = run_quickly("host_allocator.py", tmp_path)
    assert "MiB after 4 steps" in printed
    assert [(row["name"], row["baseline"]) for row in table] == [
        (f"{what}: {name}", f"{what}: host_allocator")
        for what in ("time", "memory")
        for name in ("plain malloc", "mallopt")
    ]


@pytest.mark.slow
def test_moe_layer_runs_quickly(tmp_path):
    """Every row and every layer is present. A busy machine need not hold the bars."""
    printed, table, _ = run_quickly("moe_layer.py", tmp_path)
    assert "not measured: Mixtral, sonicmoe" in printed and "MiB" in printed
    layers = [
        "ours, auto",
        "ours, reference",
        "ours, grouped_mm",
        "ours, cpu",
        "per-expert loop",
        "DeepSpeed MoE",
        "Mixtral, eager",
        "Mixtral, batched_mm",
        "Mixtral, grouped_mm",
        "OLMoE, grouped_mm",
    ]
    label = "E16 H128 k4"
    rows = [(r["name"], r["baseline"]) for r in table if r["name"].startswith(f"{label}: ")]
    bare = ("dense GEMMs alone", "experts' GEMMs alone", "F.grouped_mm alone")
    assert rows[:13] == [(f"{label}: {name}", f"{label}: dense") for name in (*bare, *layers)]
    assert rows[13] == (f"{label}: ours, auto", f"{label}: DeepSpeed MoE") and len(rows) == 15
    assert [(r["name"], r["baseline"]) for r in table[15:]] == [
        ("ours, E 32", "ours, E 8"),
        (f"{label} memory: ours, auto", f"{label} memory: OLMoE, grouped_mm"),
    ]
    assert all(0 < r["low"] <= r["ratio"] <= r["high"] and r["bar"] is None for r in table)


@pytest.mark.slow
def test_dispatch_runs_quickly(tmp_path):
    printed, table, _ = run_quickly("dispatch.py", tmp_path)
    assert (
        printed.count("KB to the other rank per token") == 2
        and printed.count("exchanges, profiled") == 2
    )
    assert [r["name"].partition(": ")[2] for r in table] == [
        "sharded",
        "DeepSpeed, sharded",
        "sharded",
        "sorted rows alone",
    ] * 2


@pytest.mark.slow
def test_train_step_runs_quickly(tmp_path):
    printed, table, _ = run_quickly("train_step.py", tmp_path)
    assert [(r["name"], r["bar"]) for r in table] == [
        ("MoE step", 1.25),
        ("reduced in fp32", 1.03),
        ("our step", None),
        ("our step", None),
    ]
    assert (
        printed.count("tokens/s") == 3
        and "master weights" in printed
        and "output and loss" in printed
    )


@pytest.mark.slow
def test_peer_runs_quickly(tmp_path):
    printed, table, _ = run_quickly("peer.py", tmp_path)
    size = "N 512^2, D 512, T 1024"
    assert [(row["name"], row["baseline"], row["bar"]) for row in table] == [
        (f"{size}: ours", "reference", 0.5),
        (f"{size}: reference, dense", "reference", None),
        (f"{size}: ours, dense", "reference", None),
        ("peak memory, gradients taken", "reference", 0.3),
        ("peak memory, gradients kept", "reference", None),
    ]
    assert (
        f"{size}: 131072 rows chosen" in printed
        and printed.count("peak memory, gradients taken") == 3
    )
    assert table[3]["holds"] and table[3]["ratio"] < table[4]["ratio"] < 0.6, (
        "bytes do not depend on a busy machine"
    )


@pytest.mark.slow
def test_document_attention_runs_quickly(tmp_path):
    printed, table, _ = run_quickly("document_attention.py", tmp_path)
    bars = {row["name"]: row["bar"] for row in table}
    for dtype in ("float32", "bfloat16"):
        assert bars[f"{dtype} S64, documents of 64: batches"] is None
        assert bars[f"{dtype} S512, documents of 64: batches"] == 1.0
    assert table[-1]["name"] == "bfloat16 S2048 memory: batches" and table[-1]["holds"]
    assert len(table) == 9 and "MiB in batches" in printed
