"""Prints the size of a model (total, active per token, per part) from pretrain_gpt.py's flags, building nothing."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GPT2_VOCABULARY = 50257


def run() -> None:
    import torch

    from megatron.config import cli
    from megatron.model.builder import build_model, size_table
    from megatron.moe.gate import available_gates, gate_config_class
    from megatron.parallel.groups import Groups
    from megatron.tokenizer.build import build_tokenizer

    config = cli.parse(sys.argv[1:], gate_config_class, available_gates)
    vocab_size = config.model.vocab_size
    if not vocab_size:
        try:
            vocab_size = build_tokenizer(config.tokenizer).vocab_size
        except FileNotFoundError as error:
            if config.tokenizer.tokenizer_type != "GPT2BPETokenizer":
                raise
            vocab_size = GPT2_VOCABULARY
            print(f"(vocabulary taken as {vocab_size}: {error})")
    with torch.device("meta"):
        model = build_model(
            config.model,
            config.moe,
            config.gate_options,
            vocab_size=vocab_size,
            seed=config.train.seed,
            groups=Groups(),
        )
    print(size_table(model, config.moe, config.gate_options))


def main() -> int:
    from megatron.exit_codes import exit_code

    return exit_code(run)


if __name__ == "__main__":
    raise SystemExit(main())
