"""GPT-2's byte-level BPE from vocab.json and merges.txt."""

from __future__ import annotations

from megatron.config.schema import TokenizerConfig
from megatron.tokenizer.base import Tokenizer, _file, one_line
from megatron.tokenizer.huggingface import HuggingFaceTokenizer


def _gpt2(config: TokenizerConfig) -> Tokenizer:
    """GPT-2's byte-level BPE from its two files."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    advice = "GPT-2's: bash dataset/download_vocab.sh"
    vocab = _file(
        config.vocab_file, "--vocab-file", config.tokenizer_type, f"vocab.json ({advice})"
    )
    merges = _file(
        config.merge_file, "--merge-file", config.tokenizer_type, f"merges.txt ({advice})"
    )
    try:
        backend = Backend(models.BPE.from_file(vocab, merges))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(
            f"--vocab-file {vocab} and --merge-file {merges} are not the two files of a byte-level BPE "
            f"({one_line(error)})"
        ) from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=True
    )  # GPT-2's regex
    backend.decoder = decoders.ByteLevel()
    return HuggingFaceTokenizer(config.tokenizer_type, backend, vocab)
