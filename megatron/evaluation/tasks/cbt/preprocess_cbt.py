"""Children's Book Test: examples as a context and ten ways to end it.

The books are stored as tokens of the Penn Treebank with blanks between them. Language models read
ordinary text, so blanks and quotation marks are restored, as for GPT-2 (Radford et al. 2019).
"""

from __future__ import annotations

import re
from typing import Any

_BLANK = "XXXXX"
"""what stands for the missing word"""
_RULES = (
    (r"-LRB-", "("),
    (r"-RRB-", ")"),
    (r"``\s+", '"'),  # opens a quotation
    (r"\s+''", '"'),  # closes one
    (r"`\s+", "'"),
    (r"\s+'(?=\s|$)", "'"),
    (r"(\()\s+", r"\1"),
    (r"\s+([.,;:!?)])", r"\1"),
    (r"\s+(n't|'s|'re|'ve|'ll|'d|'m)\b", r"\1"),
    (r"\s+", " "),
)


def process_docs(dataset: Any) -> Any:
    """Add the context, the choices and the number of the right one to each example.

    Args:
        dataset: a `datasets.Dataset` with sentences, question, options and answer.
    """
    return dataset.map(to_choices)


def to_choices(document: dict[str, Any]) -> dict[str, Any]:
    """Return the context before the blank, and each option with the rest of the sentence.

    Choices begin with the blank that follows the context, if one does.

    Raises:
        ValueError: the question has no blank, or the answer is not an option.
    """
    before, blank, after = document["question"].partition(_BLANK)
    if not blank or document["answer"] not in document["options"]:
        raise ValueError(
            f"an example has the question {document['question']!r} and the answer "
            f"{document['answer']!r}; allowed: a question with {_BLANK}, and one of its options"
        )
    story = " ".join(document["sentences"])
    text = ordinary_text(f"{story} {before.strip()} {_BLANK} {after.strip()}")
    start, _, end = text.rpartition(_BLANK)
    context = start.rstrip()
    gap = start[len(context) :]
    options = document["options"]
    return {
        "context": context,
        "choices": [f"{gap}{ordinary_text(option)}{end}" for option in options],
        "gold": options.index(document["answer"]),
    }


def ordinary_text(tokens: str) -> str:
    """Join tokens of the Penn Treebank to ordinary text."""
    for pattern, replacement in _RULES:
        tokens = re.sub(pattern, replacement, tokens)
    return tokens.strip()
