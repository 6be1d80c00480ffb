r"""Builds the token ids of student prompts, teacher prompts and reference replies.

``reading/context.py`` decides what the teacher reads, ``templates.py`` has the wording, and this file converts text to
ids. The tokenizer's chat template renders a prompt with the generation prompt; tokenisation adds no further special
tokens. Prompts are never truncated: one that is too long raises an error with its problem's id.

In both prompts the response follows the generation prompt, so it comes right after the same closing tokens unless the
chat kwargs differ. For example, Qwen3's ``enable_thinking=False`` ends the prompt with an empty ``<think></think>``
block. OPSD's published settings use it for the student only. ``PromptBuilder`` warns if the closing tokens differ, and
raises an error if they differ although the kwargs agree.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

from atesd.data.chat_tokens import ChatTokens
from atesd.data.chats import Turn
from atesd.data.problems import Problem
from atesd.data.reading.context import exposed_text, is_full
from atesd.data.segmentation import Reference
from atesd.data.templates import PromptTemplates, fill
from atesd.data.thinking import closing_mark, opens_thinking
from atesd.errors import AtesdError, DataError

__all__ = ["PromptBuilder", "PromptTemplates", "PromptTooLong"]

_SENTINEL = "the-content-ends-here"


class PromptTooLong(AtesdError, ValueError):
    """A prompt does not fit. Has ``problem_id``, ``kind``, and ``length`` and ``limit`` in tokens."""

    def __init__(self, problem_id: str, kind: str, length: int, limit: int, advice: str):
        self.problem_id, self.kind, self.length, self.limit, self.advice = problem_id, kind, length, limit, advice
        super().__init__(
            f"the {kind} of problem {problem_id!r} has {length} tokens, {limit} fit: {advice} (nothing is cut "
            "silently; overlong_problems: skip leaves such problems out)"
        )

    def __reduce__(self) -> tuple[Any, ...]:  # it may come from another process
        return type(self), (self.problem_id, self.kind, self.length, self.limit, self.advice)


class PromptBuilder:
    r"""Builds the ids of student prompts, teacher prompts and reference replies.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        templates: the wording; see ``PromptTemplates``.
        student_chat_kwargs, teacher_chat_kwargs: for ``apply_chat_template``, e.g. ``{"enable_thinking": False}``.
        max_prompt_length: longest student prompt, in tokens. Student and teacher prompts must also fit in
            ``context_length - max_completion_length``; that is the only limit on teacher prompts, which are longer.
        max_completion_length: longest response, in tokens.
        context_length: the model's context length, in tokens.
        teacher_context_length: that of another model that teaches; None: the student's.

    Example::

        builder = PromptBuilder(tokenizer, max_prompt_length=512, max_completion_length=96, context_length=2048)
        reference = split_reference(problem.solution, problem.answer)
        student_ids = builder.student(problem)
        teacher_ids = builder.teacher(problem, reference, alpha=0.5)

    Raises ValueError if the tokenizer has no chat template, the template rejects the system prompt or the kwargs, or
    the closing tokens of student and teacher prompts differ although their kwargs agree.
    """

    def __init__(
        self,
        tokenizer: Any,
        templates: PromptTemplates | None = None,
        *,
        student_chat_kwargs: dict[str, Any] | None = None,
        teacher_chat_kwargs: dict[str, Any] | None = None,
        max_prompt_length: int,
        max_completion_length: int,
        context_length: int,
        teacher_context_length: int | None = None,
    ):
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"the tokenizer of {getattr(tokenizer, 'name_or_path', '?')!r} has no chat template: "
                "use an instruction-tuned model, or set tokenizer.chat_template"
            )
        contexts = {"a": context_length, "the teacher's": teacher_context_length or context_length}
        for whose, length in contexts.items():
            if max_completion_length >= length:
                raise DataError(
                    f"max_completion_length={max_completion_length} leaves no room for a prompt in {whose} context of "
                    f"{length} tokens"
                )
        self.tokenizer = tokenizer
        self.templates = templates if templates is not None else PromptTemplates()
        self.student_chat_kwargs = dict(student_chat_kwargs or {})
        self.teacher_chat_kwargs = dict(teacher_chat_kwargs or {})
        self.max_prompt_length = max_prompt_length
        self.max_completion_length = max_completion_length
        self.context_length, self.teacher_context_length = contexts.values()
        self.student_suffix = self._suffix(self.student_chat_kwargs)
        self.teacher_suffix = self._suffix(self.teacher_chat_kwargs)
        self._check_suffixes()
        self.chat_tokens = ChatTokens(tokenizer)
        self.carried: set[tuple[str, ...]] = set()  # chats that the template is known to write out, by their roles
        before, after = self._around_reply()
        self.reply_header, self.turn_end = self.chat_tokens.header(before), self.chat_tokens.turn_end(after)

    def student_text(self, problem: Problem) -> str:
        """Returns the student's last user message, before the chat template: the problem only."""
        return fill(self.templates.student, problem=problem.problem)

    def teacher_text(self, problem: Problem, reference: Reference | None, alpha: float) -> str:
        """Returns the teacher's last user message at exposure ``alpha``, before the chat template.

        alpha = 1: ``templates.teacher`` with the exact solution, OPSD's prompt. floor(alpha*m) = 0 (no segment
        exposed), or a problem without a solution: ``templates.teacher_answer_only``. In between:
        ``templates.teacher_partial`` with the exposed segments, without trailing white space; ``teacher_parts`` if the
        reference names an order. Without a reference: the student's message.
        """
        if reference is None:
            return self.student_text(problem)
        exposed = exposed_text(reference, alpha)
        if is_full(alpha) and exposed.strip():
            template = self.templates.teacher
        elif exposed:
            template = self.templates.teacher_parts if reference.order else self.templates.teacher_partial
            exposed = exposed.rstrip()
        else:
            template = self.templates.teacher_answer_only
        transition = self.templates.transition
        return fill(
            template, problem=problem.problem, reference=exposed, answer=reference.answer, transition=transition
        )

    def student(self, problem: Problem) -> list[int]:
        """Returns the token ids of the student's prompt, including the generation prompt."""
        ids = self._ids(problem, self.student_text(problem), self.student_chat_kwargs)
        if len(ids) > self.max_prompt_length:
            advice = "raise max_prompt_length or drop the problem"
            raise PromptTooLong(problem.id, "student prompt", len(ids), self.max_prompt_length, advice)
        return self._fits(problem, "student prompt", ids, self.context_length)

    def teacher(self, problem: Problem, reference: Reference | None, alpha: float) -> list[int]:
        """Returns the token ids of the teacher's prompt at ``alpha``, including the generation prompt.

        ``reference`` is what the teacher is shown of: the problem's own one, another's, or None.
        """
        ids = self._ids(problem, self.teacher_text(problem, reference, alpha), self.teacher_chat_kwargs)
        return self._fits(problem, f"teacher prompt at alpha={alpha:g}", ids, self.teacher_context_length)

    def reference_completion(
        self, reference: Reference, *, after_teacher_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        r"""Returns the reference solution as an assistant reply, ``(ids, ends)``.

        The reply follows the student's prompt, or the teacher's if ``after_teacher_prompt``. ``ids`` are the tokens of
        the full solution, between what the chat template writes before and after a reply. If the prompt opens a
        thinking block, the reply closes it first: a reference is an answer, not a thought. ``ends[i]`` is the number of
        tokens up to and including segment ``i``; a token across a border counts as exposed, white space aside.
        ``ids[ends[-1]:]`` is the tail, which states the answer. A solution without a tail gets the tail
        ``Final answer: \boxed{answer}``, so that there is always an answer to score.
        """
        text = reference.solution
        if not reference.tail.strip():
            text = text.rstrip() + ("\n\n" if text.strip() else "") + f"Final answer: \\boxed{{{reference.answer}}}"
        if not getattr(self.tokenizer, "is_fast", False):
            raise DataError(f"{type(self.tokenizer).__name__} gives no character offsets: use a fast tokenizer")
        opening = opens_thinking(self.teacher_suffix if after_teacher_prompt else self.student_suffix)
        closed = [*(self._closed_thinking(opening) if opening else []), *self.reply_header]
        encoded = self.chat_tokens.encode("", text, return_offsets_mapping=True)
        # Offset of the first non-space character of each token: BPE tokens may start with a space.
        first_ink = []
        for start, end in encoded["offset_mapping"]:
            token = text[start:end]
            first_ink.append(start + len(token) - len(token.lstrip()) if token.strip() else None)
        ends, border, index = [], 0, 0
        for piece in reference.segments:
            border += len(piece)
            while index < len(first_ink) and (first_ink[index] is None or first_ink[index] < border):
                index += 1
            ends.append(len(closed) + index)
        return [*closed, *encoded["input_ids"], *self.turn_end], ends

    def _closed_thinking(self, opening: str) -> list[int]:
        """Returns the ids that close an empty thinking block, as templates with thinking off write it."""
        return list(self.tokenizer(f"\n{closing_mark(opening)}\n\n", add_special_tokens=False)["input_ids"])

    def check_answer_fits(self, problem: Problem, max_new_tokens: int) -> None:
        """Raises ``PromptTooLong`` if the student's prompt and ``max_new_tokens`` exceed the context."""
        length, limit = len(self.student(problem)), self.context_length - max_new_tokens
        if length > limit:
            advice = f"the context less eval_max_completion_length={max_new_tokens}; lower it, or drop the problem"
            raise PromptTooLong(problem.id, "evaluation prompt", length, limit, advice)

    def check(self, problem: Problem, own: Reference, shown: Reference | None, max_alpha: float = 1.0) -> None:
        """Raises ``PromptTooLong`` if any prompt of this problem, at any alpha up to ``max_alpha``, does not fit.

        Also raises it if the reply, the problem's ``own`` reference, does not fit after the longest prompt. ``shown``
        is what the teacher reads.
        """
        m = len(shown.segments) if shown else 0
        exposures = {0.0, max_alpha} | ({(m - 1) / m} if m and is_full(max_alpha) else set())
        longest = max(len(self.teacher(problem, shown, alpha)) for alpha in exposures)
        replies = [self.reference_completion(own, after_teacher_prompt=after)[0] for after in (False, True)]
        for whose, prompt, context in (
            ("teacher", longest, self.teacher_context_length),
            ("student", len(self.student(problem)), self.context_length),
        ):
            if (total := prompt + max(map(len, replies))) > context:
                model = "model" if self.context_length == self.teacher_context_length else whose
                advice = f"use a {model} with a longer context or drop the problem"
                raise PromptTooLong(problem.id, "prompt and reference reply", total, context, advice)

    def largest_alpha(self, problem: Problem, own: Reference, shown: Reference | None) -> float:
        """Returns the largest exposure that ``check`` accepts: 1.0, or k/m for the largest k that fits.

        Raises ``PromptTooLong`` if even the prompt with the answer alone does not fit.
        """
        m = (len(shown.segments) if shown else 0) or 1
        self.check(problem, own, shown, 0.0)
        fits, too_many = 0, m + 1  # bisection: prompt length never decreases with k
        while too_many - fits > 1:
            k = (fits + too_many) // 2
            try:
                self.check(problem, own, shown, k / m)
                fits = k
            except PromptTooLong:
                too_many = k
        return fits / m

    def _render(
        self,
        content: str,
        chat_kwargs: dict[str, Any],
        add_generation_prompt: bool = True,
        earlier: Sequence[Turn] = (),
    ) -> str:
        """Returns the rendered chat whose last user turn is `content`. A system turn in it takes the place of ours."""
        messages = [{"role": role, "content": text} for role, text in (*earlier, ("user", content))]
        own_system = self.templates.system is not None and all(role != "system" for role, _ in earlier)
        if own_system:
            messages.insert(0, {"role": "system", "content": str(self.templates.system)})
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **chat_kwargs
            )
        except Exception as error:
            beside = " and a system prompt" if own_system else ""
            if earlier:
                beside = f" or the turns {', '.join(message['role'] for message in messages)}"
            raise DataError(f"the chat template refuses kwargs {chat_kwargs}{beside}: {error}") from error

    def _ids(self, problem: Problem, content: str, chat_kwargs: dict[str, Any]) -> list[int]:
        """Returns the ids of a prompt whose last user turn is `content`. In data, control tokens are text."""
        if problem.earlier:
            self._check_carried(problem)
        tokens = self.chat_tokens
        quotes = any(tokens.in_data(text) for text in (content, *(text for _, text in problem.earlier)))
        if not quotes:
            # The template already wrote the special tokens, BOS included: the tokenizer must not add them again.
            return list(tokens.encode(self._render(content, chat_kwargs, earlier=problem.earlier))["input_ids"])
        veiled = [(role, tokens.veiled(text)) for role, text in problem.earlier]
        return tokens.unveiled_ids(self._render(tokens.veiled(content), chat_kwargs, earlier=veiled))

    def _check_carried(self, problem: Problem) -> None:
        """Raises DataError if the chat template refuses a chat of these roles, or leaves a turn out."""
        roles = tuple(role for role, _ in problem.earlier)
        if roles in self.carried:
            return
        advice = "take the problem out, or use a model whose template writes them"
        marked = [(role, f"the-words-of-turn-{number}-end-here") for number, role in enumerate(roles)]
        for chat_kwargs in (self.student_chat_kwargs, self.teacher_chat_kwargs):
            try:
                text = self._render(_SENTINEL, chat_kwargs, earlier=marked)
            except DataError as error:
                raise DataError(f"problem {problem.id!r}: {error}. If the turns are why, {advice}") from error
            lost = list(dict.fromkeys(role for role, mark in (*marked, ("user", _SENTINEL)) if mark not in text))
            if lost:
                names = " and ".join([", ".join(lost[:-1]), lost[-1]] if lost[1:] else lost)
                raise DataError(
                    f"problem {problem.id!r}: the chat template leaves out its {names} turn{'s' * (len(lost) > 1)}: "
                    f"{advice}"
                )
        self.carried.add(roles)

    def _fits(self, problem: Problem, kind: str, ids: list[int], context_length: int) -> list[int]:
        limit = context_length - self.max_completion_length
        if len(ids) > limit:
            advice = (
                f"the context of {context_length} tokens less max_completion_length={self.max_completion_length}; "
                "lower max_completion_length, use a model with a longer context, or drop the problem"
            )
            raise PromptTooLong(problem.id, kind, len(ids), limit, advice)
        return ids

    def _suffix(self, chat_kwargs: dict[str, Any]) -> str:
        """Returns what the chat template writes after the user's text: end of turn and generation prompt."""
        _, found, suffix = self._render(_SENTINEL, chat_kwargs).rpartition(_SENTINEL)
        if not found or suffix == self._render(_SENTINEL, chat_kwargs, False).rpartition(_SENTINEL)[2]:
            raise DataError("the chat template writes no generation prompt: responses would continue the user's turn")
        return suffix

    def _around_reply(self) -> tuple[str, str]:
        """Returns what the chat template writes before and after an assistant's text, "" where it takes no such turn.

        What it writes at the end of a conversation only is left out.
        """
        user, reply = {"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}
        prompt, *chats = (
            self._chat(messages, generation)
            for messages, generation in (([user], True), ([user, reply], False), ([user, reply, user], False))
        )
        parts = [chat.rpartition(_SENTINEL) for chat in chats if chat]
        before = parts[0][0] if parts else ""
        after = os.path.commonprefix([end for _, _, end in parts])  # noqa: RUF071 - characters are meant
        return before[len(prompt) :] if prompt and before.startswith(prompt) else "", after

    def _chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """Returns the rendered chat; "" if the template demands another one."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception:  # a template raises what it likes
            return ""

    def _check_suffixes(self) -> None:
        if self.student_suffix == self.teacher_suffix:
            return
        seen = f"student: {self.student_suffix!r}, teacher: {self.teacher_suffix!r}"
        if self.student_chat_kwargs == self.teacher_chat_kwargs:
            raise DataError(f"student and teacher prompts end differently although their chat kwargs agree: {seen}")
        warnings.warn(
            f"student and teacher prompts end differently because their chat kwargs do: {seen}. The response follows "
            "either ending. OPSD does so on purpose (student thinking off, teacher on). To avoid it, use equal kwargs.",
            stacklevel=3,
        )
