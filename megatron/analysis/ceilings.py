"""What the hardware of a rank reaches: matrix products, memory and collectives.

Ceilings are measured on this device in about a second, or given for hardware that is not here.

Shape suffixes: M rows, D hidden, F output features, E experts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.config.fields import require
from megatron.config.schema import RunConfig
from megatron.io.untrusted import parse_json
from megatron.moe.experts.backends import COMPUTE_DTYPES
from megatron.moe.experts.grouped_linear import grouped_linear
from megatron.moe.gate import gate_class
from megatron.parallel.groups import Groups

_SECONDS = 0.1
"""time spent on each measurement, at least"""
_FEWEST_CALLS = 7
_COPIED_BYTES = 2**26
_MESSAGE_BYTES = 2**24
_MOST_ROWS = 8192
_MOST_EXPERTS = 8


@dataclass(frozen=True)
class Ceilings:
    """Rates that a rank reaches at best; 0: not known, and not counted."""

    dense_tflops: float
    """10^12 operations per second in matrix products of the model's dense layers"""
    grouped_tflops: float
    """10^12 operations per second in the grouped matrix products of the experts"""
    bandwidth_gb_s: float
    """10^9 bytes per second that are read or written in the device's memory"""
    all_reduce_gb_s: float = 0.0
    """10^9 bytes per second that leave a rank in all-reduces, all-gathers and
    reduce-scatters"""
    all_to_all_gb_s: float = 0.0
    """10^9 bytes per second that leave a rank in all-to-alls"""
    source: str = "given"
    """where the numbers are from"""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "source":
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            required = field.name in ("dense_tflops", "grouped_tflops", "bandwidth_gb_s")
            is_allowed = is_number and 0 <= value < math.inf and (value > 0 or not required)
            allowed = "a positive number" if required else "a number, 0 or more"
            require(is_allowed, field.name, value, allowed, "Measure it or look it up.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `read_ceilings` reads them."""
        return asdict(self)

    def text(self) -> str:
        """Return one line."""
        return (
            f"{self.dense_tflops:.3g} TFLOP/s dense, {self.grouped_tflops:.3g} grouped, memory "
            f"{self.bandwidth_gb_s:.3g} GB/s, all-reduce {self.all_reduce_gb_s:.3g} GB/s, "
            f"all-to-all {self.all_to_all_gb_s:.3g} GB/s ({self.source})"
        )


def given_ceilings(
    file: str = "",
    peak_tflops: float = 0.0,
    bandwidth_gb_s: float = 0.0,
    network_gb_s: float = 0.0,
) -> Ceilings | None:
    """Return the ceilings that flags give; None: none given.

    Numbers replace those of the file. Without a file the first two are needed.

    Args:
        file: --ceilings, see `read_ceilings`.
        peak_tflops: --peak-tflops, for dense and grouped products.
        bandwidth_gb_s: --bandwidth-gb-s.
        network_gb_s: --network-gb-s, for all collectives.

    Raises:
        ValueError: the file cannot be read or has wrong fields, or one of the numbers is missing.
    """
    if file:
        ceilings = read_ceilings(file)
    elif peak_tflops or bandwidth_gb_s or network_gb_s:
        require(
            bool(peak_tflops and bandwidth_gb_s),
            "--peak-tflops and --bandwidth-gb-s",
            [peak_tflops, bandwidth_gb_s],
            "both, or --ceilings FILE.json",
            "Give the missing one.",
        )
        ceilings = Ceilings(peak_tflops, peak_tflops, bandwidth_gb_s)
    else:
        return None
    if peak_tflops:
        ceilings = replace(ceilings, dense_tflops=peak_tflops, grouped_tflops=peak_tflops)
    if bandwidth_gb_s:
        ceilings = replace(ceilings, bandwidth_gb_s=bandwidth_gb_s)
    if network_gb_s:
        ceilings = replace(ceilings, all_reduce_gb_s=network_gb_s, all_to_all_gb_s=network_gb_s)
    return ceilings


def read_ceilings(file: str) -> Ceilings:
    """Read a JSON object with the fields of `Ceilings`.

    Raises:
        ValueError: the file cannot be read, is not such an object, or has another field.
    """
    try:
        content = parse_json(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--ceilings: {file} cannot be read: {error}; allowed: a JSON file with the fields of "
            "a measurement. Write one with --measure-ceilings --save-ceilings FILE"
        ) from None
    names = {field.name for field in fields(Ceilings)}
    needed = {"dense_tflops", "grouped_tflops", "bandwidth_gb_s"}
    is_valid = isinstance(content, dict) and needed <= content.keys() <= names
    require(
        is_valid,
        "--ceilings",
        file,
        f"a JSON object with {' '.join(sorted(needed))} and, optionally, "
        f"{' '.join(sorted(names - needed))}",
    )
    return Ceilings(**content)


def write_ceilings(ceilings: Ceilings) -> str:
    """Return the JSON text of ceilings."""
    return json.dumps(ceilings.to_dict(), indent=1) + "\n"


def measure_ceilings(config: RunConfig, groups: Groups) -> Ceilings:
    """Measure this rank's device at the model's shapes and dtype.

    With several ranks all of them call it, and all get the slowest rank's numbers.

    Args:
        groups: the ranks. Without process groups there is nothing to communicate.
    """
    device = groups.device
    dtype = COMPUTE_DTYPES[config.optimizer.precision]
    rates = [
        _dense_rate(config, device, dtype),
        _grouped_rate(config, device, dtype),
        _bandwidth(device),
        *_communication_rates(groups),
    ]
    if groups.world_size > 1:
        slowest = torch.tensor(rates, dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
        rates = slowest.tolist()
    name = "CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    source = f"measured on {groups.world_size} x {name}, {config.optimizer.precision}"
    return Ceilings(*rates, source=source)


def _rate(function: Callable[[], Any], amount: float, device: torch.device) -> float:
    """Return the amount per second of the fastest of several calls."""
    best = math.inf
    calls = 0
    function()
    end = time.perf_counter() + _SECONDS
    while calls < _FEWEST_CALLS or time.perf_counter() < end:
        best = min(best, _seconds(function, device))
        calls += 1
    return amount / best


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _num_rows(config: RunConfig) -> int:
    return min(config.train.micro_batch_size * config.model.seq_length, _MOST_ROWS)


def _dense_rate(config: RunConfig, device: torch.device, dtype: torch.dtype) -> float:
    rows = _num_rows(config)
    hidden_size = config.model.hidden_size
    features = config.model.ffn_size
    x_MD = torch.randn(rows, hidden_size, device=device).to(dtype)
    weight_FD = torch.randn(features, hidden_size, device=device).to(dtype)
    operations = 2 * rows * hidden_size * features
    return _rate(lambda: x_MD @ weight_FD.t(), operations, device) / 1e12


def _grouped_rate(config: RunConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Return the rate of equally many rows per expert.

    It is that of dense products for models without experts, and for PEER, whose look-ups are no
    grouped products: so the time of a step stays a lower bound.
    """
    moe = config.moe
    gates = [name for name in moe.gates(config.model.num_layers) if name is not None]
    if not gates or any(gate_class(name).expert_kind == "peer" for name in gates):
        return _dense_rate(config, device, dtype)
    num_experts = min(moe.num_experts, _MOST_EXPERTS)
    rows = max(_num_rows(config) // num_experts, 1) * num_experts
    size = moe.moe_latent_size or config.model.hidden_size
    width = moe.expert_size(config.model.ffn_size)
    x_MD = torch.randn(rows, size, device=device).to(dtype)
    weight_EFD = torch.randn(num_experts, width, size, device=device).to(dtype)
    ends_E = torch.arange(1, num_experts + 1, device=device) * (rows // num_experts)
    operations = 2 * rows * size * width
    with torch.no_grad():
        return (
            _rate(lambda: grouped_linear(x_MD, weight_EFD, ends_E), operations, device) / 1e12
        )


def _bandwidth(device: torch.device) -> float:
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return _rate(lambda: target.copy_(source), 2 * _COPIED_BYTES, device) / 1e9


def _communication_rates(groups: Groups) -> tuple[float, float]:
    """Return 10^9 bytes per second that leave a rank in an all-reduce and an all-to-all."""
    world_size = groups.world_size
    if world_size == 1:
        return 0.0, 0.0
    numbers = _MESSAGE_BYTES // 4 // world_size * world_size
    sent = torch.ones(numbers, device=groups.device)
    received = torch.empty_like(sent)
    others = 4 * numbers * (world_size - 1) / world_size
    reduced = min(
        _seconds(lambda: dist.all_reduce(sent), groups.device) for _ in range(_FEWEST_CALLS)
    )
    exchanged = min(
        _seconds(lambda: dist.all_to_all_single(received, sent), groups.device)
        for _ in range(_FEWEST_CALLS)
    )
    return 2 * others / reduced / 1e9, others / exchanged / 1e9
