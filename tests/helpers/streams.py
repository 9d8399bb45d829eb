"""What the tests of streaming share: texts, the samples they must become, and a look into the cache."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from helpers import runs
from megatron.config.schema import DataConfig, TokenizerConfig
from megatron.data.sampling.blend import Samples
from megatron.data.splits import build_splits
from megatron.data.streaming.producer import StreamingContext, TokenStream, find_stream
from megatron.io.staging_dir import StagingDir
from megatron.tokenizer.build import build_tokenizer

BYTES = TokenizerConfig(tokenizer_type="ByteTokenizer")
TOKENIZER = build_tokenizer(BYTES)
S = 16


def corpus(path: Path, number: int = 40, name: str = "", key: str = "text") -> list[int]:
    """Write JSON lines; the tokens that must come of them."""
    rng = random.Random(path.name)
    texts = [
        f"{name or path.name} {i} " + "é" * rng.randrange(40) if i % 9 else ""
        for i in range(number)
    ]
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return [token for text in texts if text for token in [*text.encode(), 256]]


def large(path: Path) -> list[int]:
    """Some 6 MB, so several chunks."""
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
        streaming=StreamingContext(BYTES, run, starts),
    )["train"]


def stream_of(
    entry: Path | str,
    cache: Path | str,
    run: str = "this",
    key: str = "text",
    config: TokenizerConfig = BYTES,
) -> TokenStream:
    return find_stream(
        str(entry),
        str(cache),
        key,
        build_tokenizer(config),
        StreamingContext(config, run, True),
    )


def loop(
    tokens: list[int], stop: int, window: int, seed: int = 5, start: int = 0
) -> list[list[int]]:
    """What samples `start` to `stop` must be, one token at a time, of the text repeated for ever."""
    out = []
    for i in range(start, stop):
        order = np.random.RandomState([seed, i // window]).permutation(window)
        k = i // window * window + order[i % window]
        out.append([tokens[(k * S + j) % len(tokens)] for j in range(S + 1)])
    return out


def read(samples: Samples, start: int = 0) -> list[list[int]]:
    assert all(samples[i].dtype == np.int64 for i in range(start, min(start + 2, len(samples))))
    return [samples[i].tolist() for i in range(start, len(samples))]


def until(condition: Callable[[], object], seconds: float = 20.0) -> object:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


def state(cache: Path) -> dict:
    (path,) = cache.glob("*.partial/state.json")
    return json.loads(path.read_text())


def cached_tokens(cache: Path) -> int:
    return state(cache)["writers"]["text"]["tokens"]


def is_free(cache: Path) -> bool:
    """Whether no producer is at work in a cache of one source."""
    prefixes = {str(path).rpartition(".partial")[0] for path in cache.glob("*.partial")}
    try:
        for prefix in prefixes:
            StagingDir(prefix).release()
    except ValueError:
        return False
    return True


def streaming_flags(text: Path, out: Path, data: str, *more: str) -> list[str]:
    argv = runs.flags(
        data,
        out,
        8,
        *runs.EP2,
        "--streaming-data-path",
        str(text),
        "--valid-data-path",
        data,
        "--test-data-path",
        data,
        "--eval-iters",
        "1",
        "--streaming-shuffle-samples",
        "16",
        *more,
    )
    at = argv.index("--data-path")
    return argv[:at] + argv[at + 2 :]
