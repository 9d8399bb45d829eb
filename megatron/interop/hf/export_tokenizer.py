"""Files of a tokenizer that transformers' AutoTokenizer loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.checkpoint.manifest import copy_with_digest
from megatron.config.tokenizer import TokenizerConfig
from megatron.interop.hf.hf_folder import TOKENIZER_FILES, files_to_copy
from megatron.io.atomic_write import write_text
from megatron.log import get_logger
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.huggingface import HuggingFaceTokenizer

_SENTENCEPIECE = ("SentencePieceTokenizer", "Llama2Tokenizer")


def write_tokenizer(config: TokenizerConfig, hf_folder: Path, target: Path) -> None:
    """Write the files of a run's tokenizer to a Hugging Face folder.

    Those of the folder from which the model came are copied as they are. A tokenizer that has no
    such files is a log line.

    Args:
        config: Tokenizer of the run.
        hf_folder: Folder `hf/` of the checkpoint, which need not exist.
        target: The folder that is written.
    """
    names = files_to_copy(hf_folder, TOKENIZER_FILES)
    for name in names:
        copy_with_digest(hf_folder / name, target / name)
    if names:
        return
    if config.tokenizer_type in ("NullTokenizer", "ByteTokenizer"):
        reason = f"{config.tokenizer_type} has no files that transformers reads"
    else:
        reason = _try_write(config, target)
    if reason:
        get_logger().info("the folder has no tokenizer: %s", reason)


def special_token_ids(config: TokenizerConfig) -> dict[str, int | None]:
    """Return the keys of config.json for the ids of a run's tokenizer that begin and end texts.

    Without them transformers would take the ids of the family's released models. Empty if the
    tokenizer cannot be built.
    """
    try:
        tokenizer = build_tokenizer(config)
    except (OSError, ValueError):
        return {}
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod, "pad_token_id": None}


def _try_write(config: TokenizerConfig, target: Path) -> str:
    """Write the files of one of our tokenizers. Returns why it cannot be done, or nothing."""
    try:
        tokenizer = build_tokenizer(config)
    except (OSError, ValueError) as error:
        return str(error)
    if config.tokenizer_type in _SENTENCEPIECE:
        copy_with_digest(Path(config.tokenizer_model), target / "tokenizer.model")
        settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
        settings["add_bos_token"] = tokenizer.bos is not None
        _write_settings(target, settings)
        return ""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return f"{config.tokenizer_type} has no files that transformers reads"
    write_text(target / "tokenizer.json", tokenizer.to_json())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    source = Path(config.tokenizer_model)
    folder = source if source.is_dir() else source.parent
    if config.tokenizer_type == "HuggingFaceTokenizer":
        for name in files_to_copy(folder, TOKENIZER_FILES):
            if name != "tokenizer.json":
                copy_with_digest(folder / name, target / name)
    if not (target / "tokenizer_config.json").exists():
        if tokenizer.eod is not None:
            settings["eos_token"] = tokenizer.literal(tokenizer.eod)
        _write_settings(target, settings)
    return ""


def _write_settings(target: Path, settings: dict[str, Any]) -> None:
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    write_text(target / "tokenizer_config.json", text)
