"""The tokenizer of a dataset, built from the flags that its sidecar records."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from megatron.config.tokenizer import TokenizerConfig
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer

FLAGS_ENTRY = "tokenizer_flags"
"""entry of the sidecar with the fields of `TokenizerConfig` that were set"""


def recorded_flags(config: TokenizerConfig) -> dict[str, str]:
    """Return what a sidecar records of a tokenizer's flags: those set, with absolute paths."""
    flags = {}
    for name, value in asdict(config).items():
        if value:
            flags[name] = os.path.abspath(value) if os.path.exists(value) else value
    return flags


def build_recorded_tokenizer(sidecar: dict[str, Any] | None) -> tuple[Tokenizer | None, str]:
    """Build the tokenizer that made a dataset, for decoding.

    Returns:
        The tokenizer, or None; and why there is none, which is empty for a sidecar that records
        no flags.
    """
    record = sidecar or {}
    flags = record.get(FLAGS_ENTRY)
    if flags is None:
        return None, ""
    try:
        tokenizer = build_tokenizer(TokenizerConfig(**flags))
    except (ValueError, OSError, TypeError) as error:  # TypeError: no dict of known names
        return None, str(error)
    if tokenizer.fingerprint != record.get("vocab_hash"):
        return None, "the tokenizer's files have changed since the text was preprocessed"
    return tokenizer, ""
