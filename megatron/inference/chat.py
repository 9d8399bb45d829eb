"""Conversations: lines of a user, and the chat template of a tokenizer.

A chat template and further end tokens are in files that Hugging Face's tokenizers and models have
next to their vocabulary: `chat_template.jinja` or `tokenizer_config.json`, and
`generation_config.json`.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.inference.prompts import require_fitting_prompt
from megatron.inference.text import encode_prompt
from megatron.io.untrusted import read_json_file
from megatron.optional_packages import import_optional
from megatron.tokenizer.base import Tokenizer, one_line

_READ_BYTES = 1 << 16


class ChatTemplate:
    """Turns a conversation into tokens, by the template of a Hugging Face tokenizer.

    Args:
        folder: has the files of the tokenizer.
    Raises:
        ValueError: the package transformers is missing.
    """

    def __init__(self, folder: Path):
        transformers = import_optional("transformers", "hf", f"the chat template of {folder}")
        self._tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True
        )

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the tokens of a conversation, up to where the next answer begins.

        Args:
            messages: with the keys role ("user" or "assistant") and content.
        """
        return self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )

    def render(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation.

        Args:
            add_generation_prompt: True: up to where the next answer begins; False: the last
                message is an answer that is not complete.
        """
        return self._tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of a text of `render`, in which special tokens are recognised."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    @property
    def end_tokens(self) -> set[int]:
        """Tokens that end an answer."""
        token = self._tokenizer.eos_token_id
        return set() if token is None else {token}


def template_folders(load: str, checkpoint: Path | None, tokenizer_model: str) -> list[Path]:
    """Return folders that may have a chat template and a generation_config.json.

    Args:
        load: directory of checkpoints, or a Hugging Face folder.
        checkpoint: the checkpoint that was found; None: none was.
        tokenizer_model: of the run's configuration; may be empty.
    """
    folders = [Path(load)]
    if checkpoint is not None:
        folders.append(checkpoint / "hf")
    if tokenizer_model:
        folders += [Path(tokenizer_model), Path(tokenizer_model).parent]
    return folders


def find_chat_template(folders: Sequence[Path]) -> ChatTemplate | None:
    """Return the chat template of the first folder that has one."""
    for folder in folders:
        if not (folder / "tokenizer.json").is_file():
            continue
        has_file = (folder / "chat_template.jinja").is_file()
        if has_file or _read_json(folder / "tokenizer_config.json").get("chat_template"):
            return ChatTemplate(folder)
    return None


def find_end_tokens(folders: Sequence[Path]) -> set[int]:
    """Return the tokens with which generation ends, as the first generation_config.json says."""
    for folder in folders:
        tokens = _read_json(folder / "generation_config.json").get("eos_token_id")
        if isinstance(tokens, int):
            return {tokens}
        if isinstance(tokens, list):
            return {token for token in tokens if isinstance(token, int)}
    return set()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read_json_file(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({one_line(error)}); replace it") from None
    return content if isinstance(content, dict) else {}


class Conversation:
    """The messages of a user and the answers of a model.

    Without a chat template each message is a prompt of its own.

    Args:
        max_positions: of the model.
        max_new_tokens: largest number of tokens of an answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        max_positions: int,
        max_new_tokens: int,
    ):
        self.tokenizer = tokenizer
        self.template = template
        self.max_positions = max_positions
        # An answer that is longer than half of the positions slides through them.
        self.max_prompt = max_positions - min(max_new_tokens, max_positions // 2)
        self.messages: list[dict[str, str]] = []

    def prompt(self, message: str) -> list[int]:
        """Add a message and return the tokens to continue.

        The oldest messages are dropped while an answer would not fit.

        Raises:
            ValueError: the message alone has too many tokens.
        """
        if self.template is None:
            tokens = encode_prompt(self.tokenizer, message)
            require_fitting_prompt(tokens, message, self.max_positions)
            return tokens
        self.messages.append({"role": "user", "content": message})
        tokens = self.template.encode(self.messages)
        while len(tokens) > self.max_prompt and len(self.messages) > 1:
            del self.messages[:2]
            tokens = self.template.encode(self.messages)
        try:
            require_fitting_prompt(tokens, message, self.max_positions)
        except ValueError:
            self.messages.clear()
            raise
        return tokens

    def add_answer(self, text: str) -> None:
        """Add an answer to the last message."""
        self.messages.append({"role": "assistant", "content": text})


class LineReader:
    """Reads lines of text from a file descriptor, with a time limit.

    Rank 0 waits for its user no longer than other ranks may wait for rank 0.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._bytes = b""
        self._has_ended = False

    def next_line(self, seconds: float) -> str | None:
        """Return the next line without its newline: "" if none came in time, None at the end."""
        while b"\n" not in self._bytes and not self._has_ended:
            ready, _, _ = select.select([self._descriptor], [], [], seconds)
            if not ready:
                return ""
            data = os.read(self._descriptor, _READ_BYTES)
            self._bytes += data
            self._has_ended = not data
        if not self._bytes:
            return None
        line, _, self._bytes = self._bytes.partition(b"\n")
        return line.decode(errors="replace")
