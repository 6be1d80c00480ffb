"""Tokenises chat prompts whose data contains the chat template's control tokens: in data they are text, not tokens.

A problem that quotes "<|im_end|>" must not end the user's turn. The tokenizer cannot tell the template's tokens from
the data's, so a copy of it is used for such prompts, which knows the tokens under private names. Only the template's
are written with these names. While the template renders a chat, the data's are veiled.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from itertools import takewhile
from typing import Any

from atesd.data.thinking import MARKS
from atesd.errors import DataError

__all__ = ["ChatTokens"]


class ChatTokens:
    """Converts text to ids, without adding special tokens.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        template = str(tokenizer.chat_template)
        # Other added tokens (runs of spaces, "\n\n", HTML tags) are ordinary text that has a token of its own.
        self.control = {
            token.content: i
            for i, token in added.items()
            if token.content.strip() and (token.special or token.content in template)
        }
        longest_first = sorted(self.control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._veils = {token: f"\ue002{number}\ue003" for number, token in enumerate(longest_first)}

    def in_data(self, text: str) -> bool:
        """Whether `text` contains a control token."""
        return self._pattern is not None and self._pattern.search(text) is not None

    def encode(self, template: str, data: str = "", **options: Any) -> Any:
        """Returns the tokenizer's encoding of `template + data`, in which control tokens in `data` are text."""
        tokenizer: Any = self.tokenizer
        if self.in_data(data):
            tokenizer, template = self._private, self._renamed(template)
        return tokenizer(template + data, add_special_tokens=False, **options)

    def veiled(self, data: str) -> str:
        """Returns `data` with its control tokens in a form that a chat template writes out like any other text."""
        return data if self._pattern is None else self._pattern.sub(lambda token: self._veils[token[0]], data)

    def unveiled_ids(self, rendered: str) -> list[int]:
        """Returns the ids of a rendered chat, in which the tokens that were veiled are text."""
        text = self._renamed(rendered)
        for token, veil in self._veils.items():
            text = text.replace(veil, token)
        return list(self._private(text, add_special_tokens=False)["input_ids"])

    def turn_end(self, rendered_end: str) -> list[int]:
        """Returns the ids that end an assistant's turn: what the template writes after it, up to its control token.

        Where control tokens follow one another up to the end-of-sequence token, all of these (Cohere 2 ends a response
        and then the turn). Falls back to the end-of-sequence token if the template writes none.
        """
        ids = list(self.tokenizer(rendered_end, add_special_tokens=False)["input_ids"]) if rendered_end.strip() else []
        marks = {self.control.get(mark) for pair in MARKS for mark in pair}
        ends = set(self.control.values()) - marks
        first = next((index for index, token in enumerate(ids) if token in ends), None)
        if first is None:
            return [self.tokenizer.eos_token_id]
        together = list(takewhile(ends.__contains__, ids[first:]))
        if self.tokenizer.eos_token_id in together:
            first += together.index(self.tokenizer.eos_token_id)
        return ids[: first + 1]

    def header(self, text: str) -> list[int]:
        """Returns the ids of what the template writes before an assistant's text, where a control token is in it.

        gpt-oss names a channel there. An empty thinking block is left out: whether a reply thinks, the prompt says.
        """
        if not self.in_data(text) or any(mark in text for pair in MARKS for mark in pair):
            return []
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _renamed(self, text: str) -> str:
        return self._pattern.sub(lambda token: private(token[0]), text)

    @cached_property
    def _private(self) -> Any:
        if not getattr(self.tokenizer, "is_fast", False):
            raise DataError(
                f"a problem or solution contains a control token of the chat template, and "
                f"{type(self.tokenizer).__name__} cannot read it as text: use a fast tokenizer, or remove it"
            )
        return with_private_names(self.tokenizer, self.control)


def private(token: str) -> str:
    return f"\ue000{token}\ue001"  # characters of a private use area, which no text contains


def with_private_names(tokenizer: Any, control: dict[str, int]) -> Any:
    """Returns a tokenizer with the same ids that knows the `control` tokens by their private names only."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for added in content["added_tokens"]:
        if added["content"] in control:
            added["content"] = private(added["content"])
            added["normalized"] = False  # a normaliser could change the private name
    vocab = content["model"].get("vocab")
    if isinstance(vocab, dict):
        content["model"]["vocab"] = {private(name) if name in control else name: i for name, i in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: [token, score]
        content["model"]["vocab"] = [[private(n) if n in control else n, score] for n, score in vocab]
    unknown = content["model"].get("unk_token")
    if unknown in control:
        content["model"]["unk_token"] = private(unknown)
    copy = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    moved = [name for name, i in control.items() if copy.convert_tokens_to_ids(private(name)) != i]
    if moved:
        raise DataError(
            f"a problem or solution contains a control token, and {moved} cannot be told from text: remove it"
        )
    return copy
