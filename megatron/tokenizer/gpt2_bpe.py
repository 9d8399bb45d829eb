"""GPT-2's byte-level BPE from vocab.json and merges.txt."""

from __future__ import annotations

from megatron.config.tokenizer import TokenizerConfig
from megatron.tokenizer.base import Tokenizer, one_line, require_file
from megatron.tokenizer.huggingface import HuggingFaceTokenizer

_ADVICE = "GPT-2's: bash dataset/download_vocab.sh"


def build_gpt2_bpe(config: TokenizerConfig, threads: int) -> Tokenizer:
    """Build GPT-2's byte-level BPE from its two files.

    Raises:
        FileNotFoundError: a file is not set or does not exist.
        ValueError: a file is malformed, or --eod-token is not in the vocabulary.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    kind = config.tokenizer_type
    vocab = require_file(config.vocab_file, "--vocab-file", kind, f"vocab.json ({_ADVICE})")
    merges = require_file(config.merge_file, "--merge-file", kind, f"merges.txt ({_ADVICE})")
    try:
        backend = Backend(models.BPE.from_file(vocab, merges))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(
            f"--vocab-file {vocab} and --merge-file {merges} are not the two files of a "
            f"byte-level BPE ({one_line(error)})"
        ) from None
    # use_regex: split by GPT-2's regular expression.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return HuggingFaceTokenizer(kind, backend, vocab, config.eod_token)
