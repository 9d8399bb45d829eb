"""Generation: cached attention states against running the model over all tokens again.

Greedy continuation of a prompt of 16 tokens up to 512 tokens, with random weights, in fp32 on a
CPU with one thread. The model has 4 layers of 512; every second one is an MoE layer with 16
experts, of which 2 are chosen.

1. All 496 new tokens with the cache against without it; not with --quick.
2. The last 8 of them, after a prompt of 504 tokens, which is not counted.
3. A batch of 8 prompts against one prompt, for each new token.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

HIDDEN = 512
LAYERS = 4
EXPERTS = 16
TOPK = 2
VOCAB = 8192
PROMPT = 16
TOTAL = 512
LAST = 8
BATCH = 8
BAR = 1 / 5
"""with the cache at least 5 times as fast"""


def make_model():
    """Build a model with random weights."""
    from megatron.config.schema import ModelConfig, MoEConfig
    from megatron.model.builder import build_model
    from megatron.parallel.groups import Groups

    shape = ModelConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HIDDEN // 64,
        seq_length=TOTAL,
        swiglu=True,
        init_method_std=0.06,
    )
    moe = MoEConfig(
        num_experts=EXPERTS, gate="topk", moe_ffn_hidden_size=HIDDEN, expert_interval=2
    )
    options = {"topk": {"topk": TOPK}}
    return build_model(shape, moe, options, vocab_size=VOCAB, seed=0, groups=Groups()).eval()


def seconds_per_token(model, rows: int, length: int, use_cache: bool) -> list[float]:
    """Return the time of each new token of prompts that are continued to TOTAL tokens."""
    import torch

    from megatron.inference.generate import generate
    from megatron.inference.sampling import GREEDY

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, VOCAB, (rows, length), generator=generator).tolist()
    times = [time.perf_counter()]

    def on_token(row: int, token: int) -> None:
        if row == 0:
            times.append(time.perf_counter())

    generate(
        model,
        prompts,
        max_new_tokens=TOTAL - length,
        vocab_size=VOCAB,
        sampling=GREEDY,
        use_cache=use_cache,
        on_token=on_token,
    )
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def main() -> int:
    args = report.parser(__doc__).parse_args()
    import torch

    torch.set_num_threads(1)
    model = make_model()
    seconds_per_token(model, 1, TOTAL - 2, True)
    everything = []
    last = []
    batch = []
    for _ in range(3 if args.quick else 7):
        # Without its first new token, for which both run over the prompt.
        start = TOTAL - LAST
        cached = sum(seconds_per_token(model, 1, start, True)[1:])
        last.append(cached / sum(seconds_per_token(model, 1, start, False)[1:]))
        batch.append(sum(seconds_per_token(model, BATCH, start, True)[1:]) / cached)
    for _ in range(0 if args.quick else 2):
        cached = sum(seconds_per_token(model, 1, PROMPT, True))
        everything.append(cached / sum(seconds_per_token(model, 1, PROMPT, False)))
    rows = []
    if everything:
        name = f"{TOTAL - PROMPT} tokens with the cache"
        rows.append(report.row(name, "without the cache", everything, BAR))
    name = f"the last {LAST - 1} of {TOTAL} tokens with the cache"
    rows.append(report.row(name, "without the cache", last, BAR))
    rows.append(report.row(f"a token of {BATCH} rows", "a token of one row", batch))
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
