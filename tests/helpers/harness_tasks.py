"""Task files of lm-evaluation-harness with local data, one of each kind of request, and a direct
computation of what a model answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron.config.schema import ModelConfig, MoEConfig, TokenizerConfig
from megatron.evaluation.lm_harness import build_harness_model
from megatron.evaluation.scoring import TokenScorer
from megatron.evaluation.text_generation import TextGenerator
from megatron.model.builder import build_model
from megatron.parallel.groups import Groups
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer

POSITIONS = 40
NEW_TOKENS = 6
STOPS = ["\n", "q"]
QUESTIONS = [
    {
        "question": "Which animal barks?",
        "choices": ["a dog", "a very old fox", "cat"],
        "gold": 0,
    },
    {
        "question": "What is in the sea? Choose.",
        "choices": ["sand", "salt and water"],
        "gold": 1,
    },
    {"question": "One letter:", "choices": ["A", "B", "C", "D"], "gold": 2},
    # Longer than the model has positions, and then a continuation that is.
    {"question": "so " * 20 + "who is it?", "choices": ["he", "she"], "gold": 1},
    {"question": "Long?", "choices": ["yes " * 14, "no"], "gold": 1},
]
LAST_WORDS = [{"text": "the quick brown fox", "last": "jumps"}, {"text": "ä", "last": "ö ü"}]
DOCUMENTS = [
    {"page": "A first page, of more than forty characters, and so of more than one window."},
    {"page": "short"},
    {"page": "Größe, 日本"},
]
PROMPTS = [{"prompt": "count: one two", "answer": " three"}, {"prompt": "x", "answer": "y"}]

_FILES = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": " {{last}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "local_pages": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [
            {"metric": "word_perplexity"},
            {"metric": "byte_perplexity"},
            {"metric": "bits_per_byte"},
        ],
    },
    "local_answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": STOPS, "max_gen_toks": NEW_TOKENS},
        "metric_list": [{"metric": "exact_match"}],
    },
}
_DATA = {
    "local_choice": QUESTIONS,
    "local_last_word": LAST_WORDS,
    "local_pages": DOCUMENTS,
    "local_answers": PROMPTS,
}
NAMES = sorted(_FILES)


def write_tasks(folder: Path) -> str:
    """Write the task files and their data; return the folder as text."""
    folder.mkdir(exist_ok=True)
    for name, settings in _FILES.items():
        write_task(folder, name, settings, _DATA[name])
    return str(folder)


def write_task(folder: Path, name: str, settings: dict, records: list[dict]) -> Path:
    """Write one task file, in JSON, which is YAML, and its data. Returns its path."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    path = folder / f"{name}.yaml"
    source = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    path.write_text(json.dumps({**source, **settings}))
    return path


def generation_settings() -> dict:
    """Return the settings of a task that generates text."""
    options = {"until": STOPS, "max_gen_toks": NEW_TOKENS}
    return {**_FILES["local_answers"], "generation_kwargs": options}


def harness_model(model: nn.Module | None = None, batch_size: int = 3, **options: Any) -> Any:
    """Build the harness's model around a model of bytes.

    Args:
        options: further arguments of `build_harness_model`.
    """
    model = model or tiny_model()
    options.setdefault("tokenizer", byte_tokenizer())
    tokenizer = options["tokenizer"]
    scorer = TokenScorer(model, Groups(), tokenizer.vocab_size, POSITIONS, batch_size)
    generator = TextGenerator(model, Groups(), tokenizer, batch_size)
    return build_harness_model(scorer, generator, needed_by="--tasks", **options)


def byte_tokenizer() -> Tokenizer:
    return build_tokenizer(TokenizerConfig("ByteTokenizer"))


def tiny_model(seed: int = 3) -> nn.Module:
    """Build a model of bytes with experts whose predictions are far from uniform."""
    model = ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        seq_length=POSITIONS,
        init_method_std=0.6,
        hidden_dropout=0.5,
    )
    moe = MoEConfig(num_experts=4, moe_ffn_hidden_size=16, gate="topk")
    built = build_model(model, moe, {}, vocab_size=257, seed=seed, groups=Groups())
    return built.eval()


@torch.no_grad()
def token_logprobs(model: nn.Module, tokens: list[int]) -> list[tuple[float, bool]]:
    """Return the log-probability of each token but the first, and whether it is the likeliest.

    One window, one row, without padding.
    """
    logits = model(torch.tensor([tokens[:-1]])).logits[0].double()
    results = []
    for position, target in enumerate(tokens[1:]):
        logprobs = logits[position].log_softmax(-1)
        results.append((float(logprobs[target]), int(logprobs[:257].argmax()) == target))
    return results


def continuation_score(model: nn.Module, context: str, continuation: str) -> tuple[float, bool]:
    """Score a continuation after its context, of which the last tokens are used."""
    before = list(context.encode())
    after = list(continuation.encode())
    if len(after) > POSITIONS:
        return text_score(model, [before[-1], *after])
    found = token_logprobs(model, [*before, *after][-POSITIONS - 1 :])[-len(after) :]
    return sum(logprob for logprob, _ in found), all(is_best for _, is_best in found)


def text_score(model: nn.Module, tokens: list[int]) -> tuple[float, bool]:
    """Score all tokens but the first in windows that share one token; the last one is full."""
    found = []
    scored_to = 1
    while scored_to < len(tokens):
        end = min(scored_to + POSITIONS, len(tokens))
        start = max(0, end - POSITIONS - 1)
        found += token_logprobs(model, tokens[start:end])[-(end - scored_to) :]
        scored_to = end
    return sum(logprob for logprob, _ in found), all(is_best for _, is_best in found)


@torch.no_grad()
def greedy_text(model: nn.Module, prompt: str) -> str:
    """Continue a prompt with the most likely bytes, up to a stop string or the end."""
    tokens = list(prompt.encode())
    new: list[int] = []
    while len(new) < NEW_TOKENS:
        logits = model(torch.tensor([tokens + new])).logits[0, -1, :257]
        token = int(logits.argmax())
        if token == 256:
            break
        new.append(token)
        text = bytes(new).decode(errors="replace")
        for stop in STOPS:
            if stop in text:
                return text[: text.index(stop)]
    return bytes(new).decode(errors="replace")


def expected_results(model: nn.Module) -> dict[str, dict[str, float]]:
    """Compute what the harness should report, directly from the model."""
    choices = [
        [continuation_score(model, q["question"], f" {c}")[0] for c in q["choices"]]
        for q in QUESTIONS
    ]
    best = [max(range(len(row)), key=row.__getitem__) for row in choices]
    per_character = [
        [score / len(choice) for score, choice in zip(row, q["choices"])]
        for row, q in zip(choices, QUESTIONS)
    ]
    best_norm = [max(range(len(row)), key=row.__getitem__) for row in per_character]
    gold = [q["gold"] for q in QUESTIONS]
    words = [continuation_score(model, d["text"], f" {d['last']}") for d in LAST_WORDS]
    pages = [d["page"] for d in DOCUMENTS]
    total = sum(text_score(model, [256, *page.encode()])[0] for page in pages)
    num_words = sum(len(page.split()) for page in pages)
    num_bytes = sum(len(page.encode()) for page in pages)
    texts = [greedy_text(model, d["prompt"]) for d in PROMPTS]
    matches = [text == d["answer"] for text, d in zip(texts, PROMPTS)]
    return {
        "local_choice": {"acc": _mean(best, gold), "acc_norm": _mean(best_norm, gold)},
        "local_last_word": {
            "perplexity": math.exp(-sum(score for score, _ in words) / len(words)),
            "acc": sum(greedy for _, greedy in words) / len(words),
        },
        "local_pages": {
            "word_perplexity": math.exp(-total / num_words),
            "byte_perplexity": math.exp(-total / num_bytes),
            "bits_per_byte": -total / num_bytes / math.log(2),
        },
        "local_answers": {"exact_match": sum(matches) / len(matches)},
    }


def _mean(found: list[int], gold: list[int]) -> float:
    return sum(a == b for a, b in zip(found, gold)) / len(gold)
