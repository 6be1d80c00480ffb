"""Real inputs: hidden states of SmolLM2-135M on gsm_symbolic, read by the student and by teachers at an exposure.

The states are those the head multiplies: after the final norm, at the positions that predict the response.
"""

from __future__ import annotations

import torch
from torch import Tensor

import atesd_kernels
from atesd.data.problems import load_problems
from atesd.data.prompts import PromptBuilder
from atesd.data.segmentation import split_reference
from bench.entrants import Inputs

MAX_COMPLETION = 512


class SmolLM2:
    """The model in fp32, its prompts, and problems in a fixed order."""

    def __init__(self, num_problems: int, seed: int = 0):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from atesd.models.smollm import smollm2_path

        path = str(smollm2_path())
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.builder = PromptBuilder(
            self.tokenizer, max_prompt_length=1024, max_completion_length=MAX_COMPLETION, context_length=4096
        )
        self.problems = load_problems("gsm_symbolic", num_train=num_problems, num_probe=0, num_eval=0, seed=seed).train
        self.references = [split_reference(p.solution, p.answer) for p in self.problems]
        self.student_prompts = [self.builder.student(p) for p in self.problems]

    def teacher_prompts(self, alpha: float) -> list[list[int]]:
        return [self.builder.teacher(p, r, alpha) for p, r in zip(self.problems, self.references, strict=True)]

    def solutions(self) -> list[list[int]]:
        """The reference solutions as replies."""
        return [self.builder.reference_completion(r)[0][:MAX_COMPLETION] for r in self.references]

    @torch.no_grad()
    def rollouts(self, new_tokens: int, temperature: float = 1.1, seed: int = 0) -> list[list[int]]:
        """The student's own sampled replies, with the recipe's top-p 0.95 and top-k 20."""
        torch.manual_seed(seed)
        batch = self.tokenizer.pad({"input_ids": self.student_prompts}, return_tensors="pt")
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95, "top_k": 20}
        pad = self.tokenizer.pad_token_id
        out = self.model.generate(**batch, max_new_tokens=new_tokens, pad_token_id=pad, **sampling)
        replies = out[:, batch["input_ids"].shape[1] :].tolist()
        eos = self.tokenizer.eos_token_id
        return [r[: r.index(eos) + 1] if eos in r else r for r in replies]

    @torch.no_grad()
    def states(self, prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
        """`[N, H]` fp32, over all replies' tokens."""
        rows = []
        for prompt, reply in zip(prompts, replies, strict=True):
            hidden = self.model.model(input_ids=torch.tensor([prompt + reply])).last_hidden_state[0]
            rows.append(hidden[len(prompt) - 1 : -1])
        return torch.cat(rows)

    def weight(self) -> Tensor:
        return self.model.lm_head.weight.detach()


def teacher_at_kl(student: Tensor, teacher: Tensor, weight: Tensor, target: float) -> Tensor:
    """The teacher on the line whose mean KL is about `target`: KL grows like the square of the distance."""
    scale = 1.0
    for _ in range(4):
        moved = student + scale * (teacher - student)
        with torch.no_grad():
            kl = atesd_kernels.linear_divergence(student, weight, moved).item()
        scale *= (target / kl) ** 0.5
    return student + scale * (teacher - student)


def solution_inputs(num_tokens: int, mean_kl: float = 0.1) -> Inputs:
    """`num_tokens` rows over reference solutions; the teacher lies towards the one who reads half of the solution.

    Solutions are not the student's own words, and the teacher who reads them is further from it (mean KL above 0.6)
    than over its own replies, which is what the losses are for: hence the point on the line with that mean KL.
    """
    model = SmolLM2(num_problems=max(4, num_tokens // 64))
    replies = model.solutions()
    student, teacher = (model.states(p, replies) for p in (model.student_prompts, model.teacher_prompts(0.5)))
    targets = torch.tensor([token for reply in replies for token in reply])
    if len(targets) < num_tokens:
        raise ValueError(f"{len(model.problems)} solutions hold {len(targets)} tokens, {num_tokens} are wanted")
    student, teacher = student[:num_tokens], teacher[:num_tokens]
    teacher = teacher_at_kl(student, teacher, model.weight(), mean_kl)
    return Inputs(student, model.weight(), teacher, targets[:num_tokens])
