"""Helpers for the tests of streaming: texts, the expected samples, and views of the cache."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from helpers import runs
from helpers.corpora import BYTE_TOKENIZER
from megatron.config.schema import DataConfig, TokenizerConfig
from megatron.data.sampling.blend import Samples
from megatron.data.splits import build_splits
from megatron.data.streaming.stream import StreamingContext, TokenStream, find_stream
from megatron.io.staging_dir import StagingDir
from megatron.tokenizer.build import build_tokenizer

TOKENIZER = build_tokenizer(BYTE_TOKENIZER)
S = 16


def write_text(path: Path, number: int = 40, name: str = "", key: str = "text") -> list[int]:
    """Write JSON lines and return their tokens."""
    rng = random.Random(path.name)
    texts = []
    for i in range(number):
        text = f"{name or path.name} {i} " + "é" * rng.randrange(40)
        texts.append(text if i % 9 else "")
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return [token for text in texts if text for token in [*text.encode(), 256]]


def write_large_text(path: Path) -> list[int]:
    """Write some 6 MB of JSON lines, which take several chunks, and return their tokens."""
    texts = [f"{i} " + "abcdefghij" * (500 + i % 7) for i in range(1200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [token for text in texts for token in [*text.encode(), 256]]


def open_samples(
    *entries,
    samples: int = 20,
    window: int = 4,
    starts: bool = True,
    seed: int = 5,
    run: str = "this",
    cache: Path | str = "",
) -> Samples:
    """Open the training samples of `--streaming-data-path`.

    Args:
        entries: the words after the flag.
        samples: number of samples.
        starts: whether this process starts the producers.
    """
    data = DataConfig(
        streaming_data_path=tuple(map(str, entries)),
        streaming_shuffle_samples=window,
        data_cache_path=str(cache),
    )
    return build_splits(
        data,
        seq_length=S,
        train_samples=samples,
        valid_samples=0,
        test_samples=0,
        seed=seed,
        tokenizer=TOKENIZER,
        streaming=StreamingContext(BYTE_TOKENIZER, run, starts),
    )["train"]


def open_stream(
    entry: Path | str,
    cache: Path | str,
    run: str = "this",
    key: str = "text",
    config: TokenizerConfig = BYTE_TOKENIZER,
) -> TokenStream:
    """The stream of one source."""
    context = StreamingContext(config, run, starts=True)
    return find_stream(str(entry), str(cache), key, build_tokenizer(config), context)


def reference_samples(
    tokens: list[int], stop: int, window: int, seed: int = 5, start: int = 0
) -> list[list[int]]:
    """Compute samples `start` to `stop` of a repeated text, one token at a time."""
    out = []
    for i in range(start, stop):
        order = np.random.RandomState([seed, i // window]).permutation(window)
        k = i // window * window + order[i % window]
        out.append([tokens[(k * S + j) % len(tokens)] for j in range(S + 1)])
    return out


def read_samples(samples: Samples, start: int = 0) -> list[list[int]]:
    """Read the samples from `start` to the end."""
    assert all(samples[i].dtype == np.int64 for i in range(start, min(start + 2, len(samples))))
    return [samples[i].tolist() for i in range(start, len(samples))]


def committed_state(cache: Path) -> dict:
    """The content of `state.json` in a cache of one unfinished source."""
    (path,) = cache.glob("*.partial/state.json")
    return json.loads(path.read_text())


def committed_tokens(cache: Path) -> int:
    """The number of durable tokens in a cache of one unfinished source; 0 if there are none."""
    if not list(cache.glob("*.partial/state.json")):
        return 0
    return committed_state(cache)["writers"]["text"]["tokens"]


def is_unlocked(cache: Path) -> bool:
    """Whether no producer holds a staging directory of a cache."""
    try:
        for path in cache.glob("*.partial"):
            StagingDir(str(path).removesuffix(".partial")).release()
    except ValueError:
        return False
    return True


def streaming_flags(text: Path, out: Path, data: str, *more: str) -> list[str]:
    """The command line of a short run on streamed text."""
    streaming = ["--streaming-data-path", str(text), "--streaming-shuffle-samples", "16"]
    evaluation = ["--valid-data-path", data, "--test-data-path", data, "--eval-iters", "1"]
    argv = runs.flags(data, out, 8, *runs.EP2, *streaming, *evaluation, *more)
    at = argv.index("--data-path")
    return argv[:at] + argv[at + 4 :]  # --split has no effect without it
