r"""The lab's world: a machine of ten states that reads letters. Problems, worked solutions, tokenizer and templates.

A problem is a state and the letters that the machine reads next; the answer is the state in which it ends. There is
nothing to derive: which state a letter leads to has to be known by heart. A model that has seen little of some letters
therefore has something to learn, and a reference that shows the run tells it exactly that.

    problem    7cafe?
    solution   7c=1\n1a=4\n4f=4\n4e=0\n\boxed{0}
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from atesd.data.problems import Problem
from atesd.data.templates import PromptTemplates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STATES = 10
LETTERS = "abcdefghijklmnopqrst"
NUM_COMMON = 14  # the model has read bare problems with these letters only
LENGTH = 4  # letters of a problem, hence segments of its reference

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (PAD, USER, ASSISTANT, END)
VOCABULARY = (*SPECIAL, "\\boxed{", "}", "=", "\n", "|", "?", *map(str, range(STATES)), *LETTERS)
IDS = {token: i for i, token in enumerate(VOCABULARY)}
CHAT_TEMPLATE = (
    f"{{% for m in messages %}}{{{{ '{USER}' if m['role'] == 'user' else '{ASSISTANT}' }}}}{{{{ m['content'] }}}}"
    f"{{% if m['role'] == 'assistant' %}}{{{{ '{END}' }}}}{{% endif %}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)
TEMPLATES = PromptTemplates(
    student="{problem}",
    teacher="{problem}|{reference}",
    teacher_partial="{problem}|{reference}|{answer}",
    teacher_answer_only="{problem}|{answer}",
    transition="",
)
# Problems are dealt to disjoint shares by a hash of their text, so that no list of them has to be kept.
SHARES = {"problems": range(0, 2), "tuning": range(2, 4), "pretraining": range(4, 16)}


@dataclass(frozen=True)
class Word:
    """A problem: the machine's first state and the letters it reads, all different."""

    start: int
    letters: tuple[str, ...]

    @property
    def text(self) -> str:
        return f"{self.start}{''.join(self.letters)}?"

    @property
    def share(self) -> int:
        return hashlib.sha256(self.text.encode()).digest()[0] % 16


@dataclass(frozen=True)
class Machine:
    """A table drawn from `seed`: each letter takes each state to a random one."""

    seed: int = 0

    @cached_property
    def table(self) -> dict[str, tuple[int, ...]]:
        rng = random.Random(self.seed)
        return {letter: tuple(rng.randrange(STATES) for _ in range(STATES)) for letter in LETTERS}

    def states(self, word: Word) -> list[int]:
        """Returns the states after each letter."""
        states = [word.start]
        for letter in word.letters:
            states.append(self.table[letter][states[-1]])
        return states[1:]

    def problem(self, word: Word) -> Problem:
        states = self.states(word)
        return Problem(word.text, word.text, solution(word, states), str(states[-1]))

    def problems(self, share: str, count: int) -> list[Problem]:
        """Returns `count` different problems of a share of `SHARES`, over all letters alike; always the same ones."""
        rng, words = random.Random(f"{self.seed} {share}"), dict[Word, None]()
        while len(words) < count:
            words[draw(rng, LETTERS, share)] = None
        return [self.problem(word) for word in words]


def draw(rng: random.Random, late_letters: Sequence[str], share: str, num_early: int = 0) -> Word:
    """Returns a random word of the share. Letters after the first `num_early` are of `late_letters`."""
    while True:
        word = Word(rng.randrange(STATES), tuple(rng.sample(LETTERS, LENGTH)))
        if word.share in SHARES[share] and set(word.letters[num_early:]) <= set(late_letters):
            return word


def solution(word: Word, states: Sequence[int]) -> str:
    """Returns the working that passes through `states`, and the last of them as the answer."""
    before = [word.start, *states]
    steps = zip(before, word.letters, states, strict=False)
    return "".join(f"{x}{letter}={y}\n" for x, letter, y in steps) + f"\\boxed{{{states[-1]}}}"


def encode(text: str) -> list[int]:
    """Returns the ids of a text of this world. The same as the tokenizer's, many times faster."""
    return [IDS[token] for token in _TOKEN.findall(text)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tokenizer: a token for each character, and for `\\boxed{` and the chat's marks."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend: Any = Tokenizer(models.WordLevel(IDS, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=USER,
        eos_token=END,
        additional_special_tokens=[ASSISTANT],
        chat_template=CHAT_TEMPLATE,
    )


_PIECE = r"\\boxed\{|[\s\S]"
_TOKEN = re.compile("|".join(map(re.escape, SPECIAL)) + "|" + _PIECE)
