"""Multi-head latent attention: decoding from a cache of latents, and training against GQA.

One attention layer with the heads of DeepSeek-V2-Lite (16 heads of 128 + 64 features, latents of
512), one process, one thread. Four tables:

1. Decoding one token per sequence: attention to cached latents ("absorbed") against expanding
   the latents of all cached tokens to keys and values.
2. The same for several new tokens, which the layer decides by counting multiplications: the last
   row of each length shows what it would cost to absorb anyway.
3. Training, forward and backward: values padded to the width of keys for fused kernels, as the
   layer does, against values as they are.
4. Training against grouped-query attention of the same width, with 16 and 4 key/value heads of
   128 features.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

HIDDEN = 2048
HEADS = 16


class FilledCache:
    """A cache of one layer that is full but for the new tokens, which are written at its end."""

    def __init__(self, batch: int, length: int, num_new: int, sizes: tuple[int, int], dtype):
        import torch

        g = torch.Generator().manual_seed(0)
        self.states = [torch.randn(batch, 1, length, n, generator=g).to(dtype) for n in sizes]
        self.num_new = num_new

    def update(self, first, second):
        """Overwrite the last tokens, and return all."""
        for state, new in zip(self.states, (first, second), strict=True):
            state[:, :, -self.num_new :] = new
        return self.states[0], self.states[1]


def build_latent(dtype):
    """Return an MLA layer with random weights."""
    import torch

    from megatron.config.schema import AttentionConfig, ModelConfig
    from megatron.model.mla import LatentAttention

    torch.manual_seed(0)
    model = ModelConfig(hidden_size=HIDDEN, num_attention_heads=HEADS)
    return LatentAttention(model, AttentionConfig(attention="mla")).to(dtype)


def build_grouped(groups: int, dtype):
    """Return a GQA layer of the same width."""
    import torch

    from megatron.config.schema import ModelConfig
    from megatron.model.attention import Attention

    torch.manual_seed(0)
    model = ModelConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=groups)
    return Attention(model).to(dtype)


def decode_of(layer, batch: int, length: int, num_new: int, absorbed: bool) -> Callable:
    """Return a function that decodes `num_new` tokens of each sequence."""
    import torch

    from megatron.model.attention_context import AttentionContext, VisibleKeys

    dtype = layer.o_proj.weight.dtype
    sizes = (layer.latent_size, layer.rope_size)
    cache = FilledCache(batch, length, num_new, sizes, dtype)
    x_BSD = torch.randn(batch, num_new, HIDDEN).to(dtype)
    slot_BS = torch.arange(length - num_new, length).expand(batch, -1)
    context = AttentionContext(cache=cache, visible=VisibleKeys(slot_BS))

    @torch.no_grad()
    def step() -> None:
        with mock.patch.object(type(layer), "absorbs", lambda *_: absorbed):
            layer(x_BSD, context)

    return step


def decoding(dtype, sizes: list[tuple[int, int, int]], rounds: int) -> list[report.Row]:
    """Compare absorbed with expanded decoding.

    Args:
        sizes: (sequences, cached tokens, new tokens) of each case.
    """
    rows = []
    layer = build_latent(dtype)
    for batch, length, num_new in sizes:
        label = f"{str(dtype)[6:]} B{batch} cache {length}, {num_new} new"
        functions = {
            f"{label}: absorbed": decode_of(layer, batch, length, num_new, True),
            f"{label}: expanded": decode_of(layer, batch, length, num_new, False),
        }
        bars = {f"{label}: absorbed": 0.5} if num_new == 1 else {}
        if num_new > 1:
            choice = "absorbed" if layer.absorbs(num_new, length) else "expanded"
            print(f"{label}: the layer chooses {choice}")
        seconds = report.interleave(functions, rounds, warmup=1)
        rows += report.compare(seconds, f"{label}: expanded", bars)
    return rows


def train_of(layer, batch: int, length: int) -> Callable[[], None]:
    """Return a function that runs a layer forward and backward."""
    import torch

    dtype = layer.o_proj.weight.dtype
    x_BSD = torch.randn(batch, length, HIDDEN).to(dtype).requires_grad_()
    gradient_BSD = torch.randn(batch, length, HIDDEN).to(dtype)

    def step() -> None:
        torch.autograd.grad(layer(x_BSD), (x_BSD, *layer.parameters()), gradient_BSD)

    return step


def without_padding(step: Callable[[], None]) -> Callable[[], None]:
    """Return the step of a latent layer whose values keep their width."""

    def unpadded() -> None:
        with mock.patch("megatron.model.mla.F.pad", lambda x, _: x):
            step()

    return unpadded


def training(dtype, sizes: list[tuple[int, int]], rounds: int) -> list[report.Row]:
    """Compare training with padded and unpadded values, and with grouped queries.

    Args:
        sizes: (sequences, tokens of each) of each case.
    """
    rows = []
    latent = build_latent(dtype)
    grouped = {groups: build_grouped(groups, dtype) for groups in (16, 4)}
    for batch, length in sizes:
        label = f"{str(dtype)[6:]} B{batch} S{length}"
        step = train_of(latent, batch, length)
        functions = {f"{label}: MLA": step, f"{label}: MLA, unpadded": without_padding(step)}
        for groups, layer in grouped.items():
            functions[f"{label}: GQA {groups}"] = train_of(layer, batch, length)
        seconds = report.interleave(functions, rounds, warmup=1)
        for baseline in (f"{label}: MLA, unpadded", f"{label}: GQA 16", f"{label}: GQA 4"):
            pair = {name: seconds[name] for name in (f"{label}: MLA", baseline)}
            rows += report.compare(pair, baseline)
    return rows


def print_cache_sizes() -> None:
    """Print the numbers that a cache holds of each token, and the parameters of the layers."""
    import torch

    latent = build_latent(torch.bfloat16)
    parameters = sum(p.numel() for p in latent.parameters()) / 1e6
    numbers = latent.latent_size + latent.rope_size
    print(f"MLA: {numbers} numbers per token and layer, {parameters:.1f} M parameters")
    for groups in (16, 4):
        layer = build_grouped(groups, torch.bfloat16)
        parameters = sum(p.numel() for p in layer.parameters()) / 1e6
        numbers = 2 * groups * layer.head_size
        print(
            f"GQA {groups}: {numbers} numbers per token and layer, {parameters:.1f} M parameters"
        )


def main() -> int:
    args = report.parser(__doc__).parse_args()
    os.environ["KINETO_LOG_LEVEL"] = "99"  # silences torch's profiler
    import torch

    torch.set_num_threads(1)
    decode_sizes = [(1, 512, 1), (1, 2048, 1), (4, 2048, 1), (1, 8192, 1)]
    decode_sizes += [(1, 1024, n) for n in (32, 128, 256)]
    train_sizes = [(4, 256), (1, 1024)]
    rounds = 9
    if args.quick:
        decode_sizes = [(1, 1024, 1), (1, 1024, 64)]
        train_sizes = [(1, 256)]
        rounds = 3
    print_cache_sizes()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += decoding(dtype, decode_sizes, rounds)
        rows += training(dtype, train_sizes, rounds)
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
