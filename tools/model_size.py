"""Prints the size of a model from pretrain_gpt.py's flags, without building it.

The parameters are listed by part of the model, in total and active per token.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from megatron.config.schema import RunConfig

GPT2_VOCABULARY_SIZE = 50257


def vocabulary_size(config: RunConfig) -> int:
    """Return the vocabulary size before padding; that of GPT-2 if its files are missing."""
    from megatron.tokenizer.build import build_tokenizer

    if config.model.vocab_size:
        return config.model.vocab_size
    try:
        return build_tokenizer(config.tokenizer).vocab_size
    except FileNotFoundError as error:
        if config.tokenizer.tokenizer_type != "GPT2BPETokenizer":
            raise
        print(f"(vocabulary taken as {GPT2_VOCABULARY_SIZE}: {error})")
        return GPT2_VOCABULARY_SIZE


def run() -> None:
    """Print the table of sizes."""
    from megatron.model.builder import build_run_config_model, size_table
    from megatron.model.meta_device import meta_device
    from megatron.pretrain import parse_flags

    config = parse_flags(sys.argv[1:])
    vocab_size = vocabulary_size(config)
    with meta_device():
        model = build_run_config_model(config, vocab_size)
    print(size_table(model))


def main() -> int:
    """Run the tool and return its exit code."""
    from megatron.exit_codes import exit_code

    return exit_code(run)


if __name__ == "__main__":
    raise SystemExit(main())
