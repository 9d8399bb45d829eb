"""Routing traces: every gate's assignments survive a file, and bad files are refused."""

from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import pytest
import torch

from helpers.moe_layers import D, make_layer
from helpers.traces import layer_of_lists, traced_gates
from megatron.io.safetensors_writer import SafetensorsWriter, TensorSpec, read_header
from megatron.moe.ffn import FFNContext
from megatron.moe.gate import available_gates
from megatron.moe.routing_record import record_routing
from megatron.moe.routing_trace import (
    LayerTrace,
    RoutingTrace,
    concatenate_layers,
    from_routed_experts,
    to_routed_experts,
    trace_layers,
)
from megatron.moe.routing_trace_file import read_routing_trace, write_routing_trace


def assert_equal(found: RoutingTrace, expected: RoutingTrace) -> None:
    """Compare all fields, values and dtypes."""
    for field in dataclasses.fields(RoutingTrace):
        if field.name != "layers":
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    for layer, other in zip(found.layers, expected.layers, strict=True):
        for field in dataclasses.fields(LayerTrace):
            assert_same(getattr(layer, field.name), getattr(other, field.name))


def assert_same(found, expected) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    else:
        assert found == expected


def rewrite(path, change_header=None, change_data=None) -> None:
    """Write a trace file again with another JSON header or other data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    data = bytearray(content[8 + length :])
    if change_header:
        change_header(header)
    if change_data:
        change_data(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("name", available_gates())
def test_trace_of_each_gate_survives_file(name, tmp_path):
    """Two layers, one after the other in time: with and without a constant number of experts."""
    trace = traced_gates(name, "topk", model="checkpoint:abc")
    write_routing_trace(tmp_path / "trace", trace)
    assert_equal(read_routing_trace(tmp_path / "trace"), trace)
    for layer in trace.layers:
        sets = [[] for _ in range(7)]
        for token, expert in zip(layer.token_A.tolist(), layer.expert_A.tolist(), strict=True):
            sets[token].append(expert)
        assert [len(chosen) for chosen in sets] == layer.count_T.tolist()
        assert max(map(max, filter(None, sets)), default=0) < layer.num_choices


def test_trace_has_what_the_gate_returns():
    """Positions, choices and weights are those of the gate, assignment by assignment."""
    torch.manual_seed(0)
    layer = make_layer("moepp").eval()
    passes = torch.randn(2, 1, 5, D)
    parts = []
    for x_BSD in passes:
        with record_routing(layer) as records:
            layer(x_BSD)
        parts.append(trace_layers(layer, records))
    (joined,) = concatenate_layers(parts)
    assert joined.gate == "moepp" and joined.num_zero_computation > 0
    expected = set()
    for i, x_BSD in enumerate(passes):
        routing = layer.gate(layer._gate_input(x_BSD, FFNContext()))
        triples = zip(routing.token_A, routing.expert_A, routing.weight_A, strict=True)
        expected |= {(5 * i + int(t), int(e), float(w)) for t, e, w in triples}
    columns = (joined.token_A.tolist(), joined.expert_A.tolist(), joined.weight_A.tolist())
    assert set(zip(*columns, strict=True)) == expected


def test_optional_parts_survive_file(tmp_path):
    """Texts may hold any characters, and positions may have no experts at all."""
    trace = RoutingTrace(
        (layer_of_lists([[0, 3], [], [1]]), layer_of_lists([[], [], []], zero=2)),
        "hf:1",
        torch.tensor([0, 70000, 5]),
        torch.tensor([0, 2]),
        ("<b>", "", "e\u0301\u202e\x00\U0001f642"),
    )
    write_routing_trace(tmp_path / "trace", trace)
    found = read_routing_trace(tmp_path / "trace")
    assert_equal(found, trace)
    assert found.document_ranges == [(0, 2), (2, 3)] and found.constant_k is None
    bare = dataclasses.replace(
        trace, layers=tuple(dataclasses.replace(x, weight_A=None) for x in trace.layers)
    )
    write_routing_trace(
        tmp_path / "bare", dataclasses.replace(bare, texts=None, token_ids_T=None)
    )
    assert not read_routing_trace(tmp_path / "bare").has_weights


def test_trace_without_positions_survives_file(tmp_path):
    trace = RoutingTrace((layer_of_lists([]),), texts=(), token_ids_T=torch.zeros(0).long())
    write_routing_trace(tmp_path / "trace", trace)
    assert_equal(read_routing_trace(tmp_path / "trace"), trace)


@pytest.mark.parametrize(
    "num_experts, dtype", [(256, "U8"), (257, "I16"), (32769, "I32"), (1 << 20, "I32")]
)
@pytest.mark.parametrize("is_fixed", [True, False])
def test_experts_have_the_narrowest_dtype(num_experts, dtype, is_fixed, tmp_path):
    rest = [1] if is_fixed else []
    trace = RoutingTrace((layer_of_lists([[num_experts - 1], rest], num_experts),))
    write_routing_trace(tmp_path / "trace", trace)
    header, _ = read_header(tmp_path / "trace")
    assert header["experts" if is_fixed else "experts.0"]["dtype"] == dtype
    assert_equal(read_routing_trace(tmp_path / "trace"), trace)


def test_trace_of_another_model_is_refused():
    trace = traced_gates("topk", model="checkpoint:a")
    trace.require_model("checkpoint:a")
    with pytest.raises(ValueError, match="the model of t.st is 'checkpoint:a'; allowed: hf:b"):
        trace.require_model("hf:b", "t.st")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c[:100], "its header is longer than the file"),
        (lambda c: c[:-3], "the size of the routing trace .* the file is truncated or damaged"),
        (lambda c: c + b"x", "the size of the routing trace"),
        (lambda c: b"", "is not a safetensors file: it has 0 bytes"),
        (lambda c: b"PK\x03\x04 a pickle of torch", "is not a safetensors file"),
    ],
)
def test_damaged_files_are_refused(change, message, tmp_path):
    path = tmp_path / "trace"
    write_routing_trace(path, traced_gates("topk", "threshold"))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"(?i){message}"):
        read_routing_trace(path)


def layers_json(**change) -> dict:
    layer = {"gate": "topk", "num_experts": 4, "num_zero_computation": 0, **change}
    return {"layers": json.dumps([layer])}


@pytest.mark.parametrize(
    "metadata, message",
    [
        (
            {"format": "a model"},
            "the format of .* is 'a model'; allowed: 'moe-megatron routing",
        ),
        ({"version": "2"}, "the version of .* is '2'; allowed: 1 to 1"),
        ({"version": "one"}, "the version of .* is 'one'"),
        (
            {"model": None},
            "the metadata of .* allowed: format, version, model, layers and form",
        ),
        ({"form": "dense"}, "the form of .* is 'dense'; allowed: fixed or ragged"),
        ({"layers": "[]"}, "the layers of the routing trace"),
        ({"layers": "{"}, "the layers of the routing trace"),
        ({"layers": '["topk"]'}, "the layers of the routing trace"),
        (layers_json(num_experts=0), "the layers of the routing trace"),
        (layers_json(num_experts=True), "the layers of the routing trace"),
        (layers_json(num_experts=10**30), "the layers of the routing trace"),
        (
            layers_json(num_experts=2),
            "the experts of MoE layer 0 of the routing trace .*/trace",
        ),
        ({"format": 1}, "__metadata__ of its header"),
    ],
)
def test_foreign_headers_are_refused(metadata, message, tmp_path):
    path = tmp_path / "trace"
    write_routing_trace(path, RoutingTrace((layer_of_lists([[0], [3, 1]]),)))

    def change(header):
        found = header["__metadata__"] | metadata
        header["__metadata__"] = {key: x for key, x in found.items() if x is not None}

    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        read_routing_trace(path)


def write_tensors(path, **tensors: torch.Tensor) -> None:
    """Write a ragged trace of one layer with other tensors."""
    metadata = {"format": "moe-megatron routing trace", "version": "1", "model": ""}
    metadata |= {"form": "ragged", **layers_json()}
    tensors = {name.replace("_0", ".0"): tensor for name, tensor in tensors.items()}
    if "experts" in tensors:
        metadata["form"] = "fixed"
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with SafetensorsWriter(path, specs, metadata) as file:
        for spec in file.specs:
            file.write(tensors[spec.name])
        file.finish()


EXPERTS = torch.tensor([1, 2])
OFFSETS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "tensor experts.0 of .* is 'missing'"),
        ({"experts_0": EXPERTS[None]}, "tensor experts.0 of .* is .*1, 2"),
        ({"experts_0": EXPERTS.float()}, "the dtype of tensor experts.0"),
        ({"experts_0": -EXPERTS, "offsets_0": OFFSETS}, "the experts of MoE layer 0"),
        ({"experts_0": EXPERTS, "offsets_0": OFFSETS[:0]}, "tensor offsets.0 of .* 'empty'"),
        ({"experts_0": EXPERTS, "offsets_0": OFFSETS - 1}, "the offsets of MoE layer 0"),
        ({"experts_0": EXPERTS, "offsets_0": OFFSETS.flip(0)}, "the offsets of MoE layer 0"),
        ({"experts_0": EXPERTS, "offsets_0": OFFSETS[:2]}, "the offsets of MoE layer 0"),
        ({"experts": EXPERTS.view(1, 2, 1)}, "the shape of the experts"),
        ({"experts": EXPERTS[:0].view(0, 1, 1)}, "the shape of the experts"),
        ({"experts": EXPERTS.view(2, 1, 1), "weights": torch.ones(2, 1)}, "tensor weights of"),
        ({"experts": EXPERTS.view(2, 1, 1), "weights": torch.ones(1, 1, 1)}, "tensor weights"),
        (
            {"experts": EXPERTS.view(2, 1, 1), "weights": torch.full((2, 1, 1), torch.nan)},
            "a weight of MoE layer 0 of the routing trace .* is 'not finite'",
        ),
        (
            {"experts": EXPERTS.view(2, 1, 1), "token_ids": EXPERTS[:1]},
            "the number of token ids",
        ),
        ({"experts": EXPERTS.view(2, 1, 1), "token_ids": -EXPERTS}, "the token ids of"),
        (
            {"experts": EXPERTS.view(2, 1, 1), "documents": EXPERTS[:1]},
            "the starts of documents",
        ),
        (
            {"experts": EXPERTS.view(2, 1, 1), "documents": EXPERTS[:0]},
            "the starts of documents",
        ),
        ({"experts": EXPERTS.view(2, 1, 1), "documents": OFFSETS}, "the starts of documents"),
        (
            {"experts": EXPERTS.view(2, 1, 1), "text_bytes": EXPERTS, "text_offsets": EXPERTS},
            "tensor text_offsets of the routing trace",
        ),
        ({"experts": EXPERTS.view(2, 1, 1), "other": EXPERTS}, "a tensor of .* is .*other"),
    ],
)
def test_invalid_tensors_are_refused(tensors, message, tmp_path):
    write_tensors(tmp_path / "trace", **tensors)
    with pytest.raises(ValueError, match=message):
        read_routing_trace(tmp_path / "trace")


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"layers": ()}, "the number of MoE layers of a routing trace is 0"),
        ({"layers": (layer_of_lists([[0]], 0),)}, "num_experts of MoE layer 0"),
        ({"layers": (layer_of_lists([[0]], 2, -1),)}, "num_zero_computation of MoE layer 0"),
        (
            {"layers": (dataclasses.replace(layer_of_lists([[0]]), weight_A=torch.ones(2)),)},
            "the number of weights of MoE layer 0",
        ),
        ({"texts": ("a",)}, "the number of texts of a routing trace is 1; allowed: 2"),
        (
            {"layers": (layer_of_lists([[0]]), layer_of_lists([[0], []]))},
            "the offsets of MoE layer 1",
        ),
    ],
)
def test_inconsistent_traces_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        RoutingTrace(**{"layers": (layer_of_lists([[0], [1]]),), **parts})


def test_routed_experts_of_engines_survive():
    """Export equals a loop over positions; import gives the same assignments without weights."""
    layers = (
        layer_of_lists([[0, 1], [2, 3], [1, 0]]),
        layer_of_lists([[5, 1], [0, 4], [2, 5]], 4, 2),
    )
    trace = RoutingTrace(layers, "m", torch.tensor([7, 8, 9]), torch.tensor([0, 2]))
    arrays = to_routed_experts(trace)
    assert [array.shape for array in arrays] == [(2, 2, 2), (1, 2, 2)]
    assert arrays[0].dtype == np.int32
    assert arrays[0].tolist() == [[[0, 1], [5, 1]], [[2, 3], [0, 4]]]
    assert arrays[1].tolist() == [[[1, 0], [2, 5]]]
    tokens = [np.array([7, 8, 3]), np.array([9, 3])]
    found = from_routed_experts(arrays, layers, model="m", token_ids=tokens)
    bare = tuple(dataclasses.replace(layer, weight_A=None) for layer in layers)
    assert_equal(found, dataclasses.replace(trace, layers=bare))


def test_routed_experts_need_a_constant_k():
    with pytest.raises(
        ValueError, match="the number of experts per position is 'not constant'"
    ):
        to_routed_experts(RoutingTrace((layer_of_lists([[0], [1, 2]]),)))


@pytest.mark.parametrize(
    "arrays, tokens, message",
    [
        ([], None, "the number of sequences is 0"),
        ([np.zeros((2, 1, 1))], None, "routed_experts of sequence 0 is 'float64"),
        ([np.zeros((2, 1), int)], None, "routed_experts of sequence 0"),
        ([np.zeros((), int)], None, "routed_experts of sequence 0"),
        ([np.zeros((0, 1, 1), int)], None, "routed_experts of sequence 0"),
        ([np.zeros((2, 2, 1), int)], None, r"sequence - 1, 1 MoE layers, k 1"),
        ([np.zeros((2, 1, 1), int), np.zeros((2, 1, 2), int)], None, "sequence 1"),
        ([np.full((2, 1, 1), 4)], None, "the experts of MoE layer 0"),
        ([np.zeros((2, 1, 1), int)], [np.zeros(2, int)], "the numbers of tokens"),
    ],
)
def test_invalid_routed_experts_are_refused(arrays, tokens, message):
    with pytest.raises(ValueError, match=message):
        from_routed_experts(arrays, [layer_of_lists([])], token_ids=tokens)


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def fail(self, tensor):
        raise OSError("disk full")

    monkeypatch.setattr(SafetensorsWriter, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        write_routing_trace(tmp_path / "trace", traced_gates("topk"))
    assert not list(tmp_path.iterdir())
