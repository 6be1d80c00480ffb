"""Adaptive exposure in TRL's SDFT and SDPO: a policy says how much of its privileged context the teacher reads.

`atesd_kernels.integrations.trl` replaces how the loss is computed; this file changes what the teacher reads. Each works
without the other. Rollouts, teacher, loss and optimizer stay TRL's.

In SDFT the privileged context is a worked solution that states its answer. In SDPO it is a successful response of the
student to the same prompt. In both, the teacher reads the first segments.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from atesd.data.answers import final_answer
from atesd.data.prompts import PromptBuilder, PromptTooLong
from atesd.data.reading.context import exposed_text, is_full, num_exposed
from atesd.data.segmentation import segment, split_reference
from atesd.exposure.outcomes import GROUNDING_PROBLEMS
from atesd.exposure.policies import ExposurePolicy
from atesd_kernels import exposure_logprobs
from atesd_kernels.integrations.source import is_as_expected
from atesd_kernels.integrations.trl import WRITTEN_FOR, Hidden, hidden_states
from atesd_kernels.integrations.wrappers import eval_mode

STATE_FILE = "exposure.pt"
_EXPECTED = {
    "sdft": {
        "_prepare_training_batch": "b4c86ba3c416",
        "DemonstrationTeacherContextBuilder": "4d4b802bcfc3",
        "_tokenize_prompts": "4226e23b903c",
    },
    "sdpo": {
        "_prepare_training_batch": "5946cef658ca",
        "SuccessfulRolloutTeacherContextBuilder": "1e56f2d053a9",
        "_tokenize_prompts": "42f975313e13",
    },
}


def use_exposure(
    trainer: Any,
    policy: ExposurePolicy,
    *,
    probe: Sequence[Mapping[str, Any]] = (),
    probe_every: int = 1,
    grounding: str | None = None,
    batch_size: int = 2,
    strict: bool = True,
) -> ExposureCallback | None:
    """Let `policy` decide how much of its privileged context the teacher of an SDFT or SDPO trainer reads.

    At exposure alpha the context is cut to its first `floor(alpha * m)` segments and the final answer it states (SDPO's
    attempts need not state one); at 1 it is TRL's, to the letter. `make_policy` makes one by name or as
    `module:object`. The policy observes the distillation loss of every step, the student's confidence if
    `use_linear_divergence` measures it, and what is asked for below. Its state is saved with TRL's checkpoints and
    resumed with them.

    Args:
        trainer: an `SDFTTrainer` or `SDPOTrainer` that is about to train.
        policy: see `atesd.exposure.policies`. Its hold window must cover the steps that one generation serves.
        probe: held-out rows with `prompt` and `privileged_context` (a worked solution): the student's NLL of those
            solutions is the progress signal `probe_nll`. Without them use `progress_signal="distill_loss"`.
        probe_every: steps between two measurements of it.
        grounding: "reference" scores the solution's tokens that the teacher was not shown, "answer" the final answer
            only, "none" nothing. None is "reference" for SDFT and "none" for SDPO, which has no reference.
        batch_size: sequences in a forward of these measurements.
        strict: raise if the installed TRL is not the one this was written for. False: warn, leave the trainer as it is.

    Returns:
        The callback that was added to the trainer; None after that warning.

    Raises:
        UnexpectedSourceError: a `RuntimeError` that names both versions and the differing functions; see `strict`.
        ValueError: another trainer; a context without a final answer; a prompt that TRL would cut from the left
            (`PromptTooLong`); a hold window that splits a generation.

    Example:
        >>> policy = make_policy("atesd", max_steps=200, progress_signal="distill_loss")  # doctest: +SKIP
        >>> use_exposure(trainer, policy)  # doctest: +SKIP
    """
    kind = getattr(type(trainer), "_name", "").lower()
    if kind not in _EXPECTED:
        raise ValueError(f"{type(trainer).__name__} is neither TRL's SDFTTrainer nor its SDPOTrainer.")
    if grounding is None:
        grounding = "reference" if kind == "sdft" else "none"
    if grounding not in ("reference", "answer", "none") or (kind == "sdpo" and grounding != "none"):
        raise ValueError(f"grounding={grounding!r} is not known for {type(trainer).__name__}.")
    if not is_as_expected(type(trainer), f"{kind.upper()}Trainer", _EXPECTED[kind], "trl", WRITTEN_FOR, strict):
        return None
    args = trainer.args
    steps = math.ceil(args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps)
    window = getattr(policy, "hold_window", steps)
    if window % steps:
        raise ValueError(
            f"hold_window={window}, but one generation serves {steps} steps, and the teacher's prompt is written with "
            f"it. Use a multiple of {steps}."
        )
    callback = ExposureCallback(trainer, policy, probe, probe_every, grounding, batch_size)
    callback.check()
    callback.cut_contexts()
    trainer.add_callback(callback)
    return callback


def exposed_context(text: str, alpha: float) -> str:
    r"""What of a worked solution, or of an attempt, the teacher reads at exposure `alpha`.

    >>> exposed_context("2 + 3 = 5.\nTwice that is 10.\n#### 10", 0.5)
    '2 + 3 = 5.\n\nThe final answer is: 10'
    >>> exposed_context("Two and three.\nI give up.", 0.5)
    'Two and three.'
    """
    if is_full(alpha):
        return text
    if final_answer(text) is None:
        pieces = segment(text)
        return "".join(pieces[: num_exposed(alpha, len(pieces))]).rstrip()
    reference = split_reference(text, None)
    return f"{exposed_text(reference, alpha).rstrip()}\n\nThe final answer is: {reference.answer}".lstrip()


class ExposureCallback(TrainerCallback):
    """Cuts the teacher's context as the policy says, and reports each optimizer step's measurements to the policy."""

    def __init__(self, trainer, policy, probe, probe_every, grounding, batch_size):
        self.trainer, self.policy = trainer, policy
        self.probe, self.probe_every, self.grounding, self.batch_size = list(probe), probe_every, grounding, batch_size
        self.builder = trainer.teacher_context_builder
        self.text = getattr(self.builder, "_stringify_privileged_context", str)
        self.latest: list[tuple[Any, str]] = []  # prompts and whole contexts of the latest batch
        self.seen = 0  # losses in TRL's metrics since its last log line that the policy has already observed
        context_length = trainer.model.config.get_text_config().max_position_embeddings
        self.replies = PromptBuilder(
            trainer._tokenizer,
            max_prompt_length=trainer.max_prompt_length or context_length,
            max_completion_length=trainer.max_completion_length,
            context_length=context_length,
        )

    def alpha(self) -> float:
        """The exposure in force; the policy's mean while evaluating."""
        return self.policy.alpha(self.trainer.state.global_step, deterministic=not self.trainer.model.training)

    # What the teacher reads.

    def cut_contexts(self) -> None:
        builder = self.builder
        if hasattr(builder, "_stringify_privileged_context"):  # SDFT
            build = builder.build

            def noted_build(prompts, contexts, *rest):
                self.latest = [(p, self.text(c)) for p, c in zip(prompts, contexts, strict=True)]
                return build(prompts, contexts, *rest)

            builder.build = noted_build
            builder._stringify_privileged_context = lambda context: exposed_context(self.text(context), self.alpha())
            return
        compose = builder._build_reprompt_text
        before, after = self.trainer.args.solution_template.split("{successful_previous_attempt}")

        def cut_attempt(prompt_text, solution_text, feedback_text):
            if solution_text:
                attempt = solution_text[len(before) : len(solution_text) - len(after)]
                solution_text = before + exposed_context(attempt, self.alpha()) + after
            return compose(prompt_text, solution_text, feedback_text)

        builder._build_reprompt_text = cut_attempt

    def check(self) -> None:
        """Refuse now what would go wrong, or be cut silently, during training."""
        rows = self.probe if not hasattr(self.builder, "_compose_teacher_prompt") else [*self.trainer.train_dataset]
        limit, self.trainer.max_prompt_length = self.trainer.max_prompt_length, None
        try:
            for i, row in enumerate(rows):
                text = self.text(row["privileged_context"])
                m = len(split_reference(text, None).segments)
                prompts: list[Any] = [exposed_context(text, k / m if m else 1.0) for k in {0, max(m - 1, 0), m}]
                if hasattr(self.builder, "_compose_teacher_prompt"):
                    prompts = [self.builder._compose_teacher_prompt(row["prompt"], p) for p in prompts]
                else:
                    prompts = [row["prompt"]]
                longest = max(len(ids) for ids in self.trainer._tokenize_prompts([row["prompt"], *prompts]))
                if limit is not None and longest > limit:
                    advice = "TRL would cut it from the left; raise max_prompt_length or drop the row"
                    raise PromptTooLong(str(i), "teacher prompt", longest, limit, advice)
        finally:
            self.trainer.max_prompt_length = limit

    # What the policy observes.

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Everything is measured before the update of this step."""
        step, noted = state.global_step, self.trainer._metrics["train"]
        alpha = self.policy.alpha(step)

        def mean(name: str) -> float | None:
            values = noted[f"self_distillation/{name}"][self.seen :]
            return sum(values) / len(values) if values else None

        loss = mean("distillation_loss")
        confidence = mean("student_confidence")
        self.seen = len(noted["self_distillation/distillation_loss"])
        due = self.probe and step % self.probe_every == 0
        learned = self.policy.observe(
            step,
            loss=loss,
            mismatch=loss,
            confidence=confidence,
            probe_nll=self.probe_nll() if due else None,
            grounded=None if self.grounding == "none" else self.grounded(alpha),
        )
        for name, value in learned.items():
            noted[f"exposure/{name}"].append(value)

    def on_log(self, args, state, control, **kwargs):
        self.seen = 0

    def on_train_end(self, args, state, control, **kwargs):
        self.policy.finish()

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            torch.save(self.policy.state_dict(), self._state_path(state))

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            return
        path = self._state_path(state)
        if not path.is_file():
            raise ValueError(
                f"resuming at step {state.global_step}, but {path}, the exposure policy's state, is missing."
            )
        self.policy.load_state_dict(torch.load(path))

    def _state_path(self, state: Any) -> Path:
        return Path(self.trainer.args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE

    @torch.no_grad()
    def probe_nll(self) -> float:
        """Mean over tokens of the student's `-log p(solution | prompt)` on the probe rows."""
        total = count = 0.0
        for start in range(0, len(self.probe), self.batch_size):
            rows = self.probe[start : start + self.batch_size]
            contexts = self.trainer._tokenize_prompts([row["prompt"] for row in rows])
            replies = [self._reply(self.text(row["privileged_context"]))[0] for row in rows]
            means, lengths = self._score(self.trainer.model, contexts, replies, [0] * len(rows))
            total += float((means.double() * lengths).sum())
            count += float(lengths.sum())
        return -total / count

    @torch.no_grad()
    def grounded(self, alpha: float) -> float:
        """Mean over rows of the mean `log p_T^alpha` of the solution's tokens that the teacher was not shown."""
        rows = self.latest[:GROUNDING_PROBLEMS]
        prompts = [self.builder._compose_teacher_prompt(prompt, context) for prompt, context in rows]
        replies, exposed = [], []
        for _, text in rows:
            ids, ends = self._reply(text)
            replies.append(ids)
            copied = num_exposed(alpha, len(ends)) if self.grounding == "reference" else len(ends)
            exposed.append(ends[copied - 1] if copied else 0)
        contexts = self.trainer._tokenize_prompts(prompts)
        with self.trainer._get_teacher_context_for_self_distillation():
            means, _ = self._score(self.trainer.teacher_model, contexts, replies, exposed)
        return float(self.trainer.accelerator.gather(means.double().mean()).mean())

    def _reply(self, text: str) -> tuple[list[int], list[int]]:
        return self.replies.reference_completion(split_reference(text, None))

    def _score(self, model, contexts, replies, exposed) -> tuple[Tensor, Tensor]:
        """`[B]`, mean log-probability of each reply after its exposed tokens, and `[B]`, the replies' lengths."""
        device = self.trainer.accelerator.device
        rows = [torch.tensor(c + r) for c, r in zip(contexts, replies, strict=True)]
        # padding on the right: positions count from each sequence's first token
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        attention = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True).to(device)
        lengths = torch.tensor([len(r) for r in replies], device=device)
        first = torch.tensor([len(c) for c in contexts], device=device)
        index = (first[:, None] + torch.arange(int(lengths.max()), device=device)).clamp_max(ids.shape[1] - 1)
        with eval_mode(model) if model.training else contextlib.nullcontext():
            hidden: Hidden = hidden_states(self.trainer, model, input_ids=ids, attention_mask=attention)
        states = hidden.states.gather(1, (index - 1)[..., None].expand(-1, -1, hidden.states.shape[-1]))
        with self.trainer.accelerator.autocast():
            means: Any = exposure_logprobs(
                states,
                hidden.head.weight,
                ids.gather(1, index),
                lengths,
                torch.tensor(exposed, device=device),
                **hidden.head.logprob_options(1.0),
            )
        return means, lengths
