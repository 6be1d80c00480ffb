"""`atesd lab` makes the lab: a model of 0.13 million weights, its problems and templates.

The model reads two kinds of documents: bare problems with their solutions, over the common letters, and problems
followed by a prefix of their reference (none of it to all of it) as a teacher's prompt has it. There the shown lines
have letters of all kinds. So it can follow a reference for every letter, and without one it knows the common letters
only. That is a plateau, which more training does not leave, and not a moment at which training has to stop.

In half of the documents, lines go wrong: a random state stands in the place of the right one, and the working goes on
from there. The wrong state itself is not trained, nor is what a rare letter makes of it, which no reference shows. A
model that has never seen an error copies the reference on, line by line, after a student's first error; this one goes
on from what the student has written.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from atesd.data.templates import fill
from atesd.errors import ConfigError
from atesd.files import share_with_readers
from atesd.models.model_folder import MODEL_FILE, filled, own_empty, save_model
from atesd.models.precision import fast_fp32_products
from atesd.studies.lab.world import (
    ASSISTANT,
    END,
    IDS,
    LENGTH,
    LETTERS,
    NUM_COMMON,
    PAD,
    STATES,
    TEMPLATES,
    USER,
    VOCABULARY,
    Machine,
    Word,
    draw,
    encode,
    solution,
    tokenizer,
)
from atesd.terminal import show

STEPS, BATCH_SIZE, LEARNING_RATE, WARMUP = 1_600, 48, 4e-3, 100
BARE = 0.4  # share of bare problems
FAULTY, WRONG = 0.5, 0.15  # share of documents that may go wrong, and of their lines that do
NUM_PROBLEMS = 8_000  # in each file
IGNORED = -100  # cross_entropy's mark for a target that does not count

Document = tuple[list[int], list[int], list[bool]]  # ids of prompt and response, and which of the latter are trained


def document(machine: Machine, rng: random.Random, bare: bool) -> Document:
    """Returns a problem, with a prefix of its reference unless `bare`, and a solution that may go wrong on its way."""
    num_shown = 0 if bare else rng.randint(0, LENGTH + 1)  # LENGTH + 1: the answer line as well, alpha = 1
    word = draw(rng, LETTERS[:NUM_COMMON], "pretraining", num_early=min(num_shown, LENGTH))
    message = word.text if bare else teacher_message(machine, word, num_shown)
    states, wrong = walk(machine, word, rng, WRONG if rng.random() < FAULTY else 0.0)
    known = [not bad and not secret for bad, secret in zip(wrong, unread(machine, word, states), strict=True)]
    trained = [flag for state in known for flag in (True, True, True, state, True)]
    response = encode(solution(word, states) + END)
    return encode(USER + message + ASSISTANT), response, trained + [True] * (len(response) - len(trained))


def teacher_message(machine: Machine, word: Word, num_shown: int) -> str:
    """Returns what `PromptBuilder.teacher_text` writes: the first lines of the reference, or all if there are more."""
    states = machine.states(word)
    lines = solution(word, states).splitlines(keepends=True)
    shown, answer = "".join(lines[:num_shown]), str(states[-1])
    if num_shown > LENGTH:
        return fill(TEMPLATES.teacher, problem=word.text, reference=shown)
    if num_shown:
        return fill(TEMPLATES.teacher_partial, problem=word.text, reference=shown.rstrip(), answer=answer)
    return fill(TEMPLATES.teacher_answer_only, problem=word.text, answer=answer)


def unread(machine: Machine, word: Word, states: list[int]) -> list[bool]:
    """Returns which states no reference shows: those to which a rare letter leads from a state off the reference."""
    right = [word.start, *machine.states(word)]
    return [
        letter not in LETTERS[:NUM_COMMON] and before != shown
        for letter, before, shown in zip(word.letters, [word.start, *states], right, strict=False)
    ]


def walk(machine: Machine, word: Word, rng: random.Random, wrong_rate: float) -> tuple[list[int], list[bool]]:
    """Returns the states of a run that goes on from its errors, and which of them were drawn at random."""
    states, wrong = [word.start], []
    for letter in word.letters:
        wrong.append(rng.random() < wrong_rate)
        states.append(rng.randrange(STATES) if wrong[-1] else machine.table[letter][states[-1]])
    return states[1:], wrong


def padded(documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """Returns input ids and next-token targets, `(documents, longest)` each."""
    width = max(len(prompt) + len(response) for prompt, response, _ in documents)
    ids = torch.full((len(documents), width), IDS[PAD])
    targets = torch.full((len(documents), width), IGNORED)
    for row, (prompt, response, trained) in enumerate(documents):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        wanted = [token if flag else IGNORED for token, flag in zip(response, trained, strict=True)]
        targets[row, len(prompt) - 1 : end - 1] = torch.tensor(wanted)
    return ids, targets


def new_model(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[USER],
        eos_token_id=IDS[END],
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def pretrain(machine: Machine, seed: int = 0, steps: int = STEPS) -> LlamaForCausalLM:
    """Returns a model trained on `steps` batches of documents. On two busy cores, 1,600 steps took four minutes."""
    model, rng = new_model(seed), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    num_bare = round(BATCH_SIZE * BARE)
    with fast_fp32_products(model.device):
        for step in range(steps):
            kinds = ((True, num_bare), (False, BATCH_SIZE - num_bare))  # apart, since bare ones are half as long
            parts = [padded([document(machine, rng, bare) for _ in range(count)]) for bare, count in kinds]
            loss = train_step(model, parts)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if (step + 1) % 100 == 0:
                show(f"step {step + 1} of {steps}: loss {loss:.3f}")
    return model


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return min((step + 1) / WARMUP, 1) * (0.05 + 0.95 * cosine)


def train_step(model: LlamaForCausalLM, parts: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Adds the gradient of the mean loss per trained token, and returns that loss."""
    num_tokens = sum(int((targets != IGNORED).sum()) for _, targets in parts)
    total = 0.0
    for ids, targets in parts:
        logits = model(input_ids=ids, attention_mask=(ids != IDS[PAD]).long()).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        (loss / num_tokens).backward()
        total += loss.item()
    return total / num_tokens


def make_lab(folder: Path, seed: int = 0, steps: int = STEPS, model: Path | None = None) -> Path:
    """Writes `model/`, `problems.jsonl`, `tuning.jsonl` (other problems, to choose settings on) and `templates.yaml`.

    `model` is the model of another lab, to take in the place of training one.

    Raises:
        ConfigError: the folder exists already and is not empty, or another process makes it, or there is no such model.
    """
    if model is not None and not (model / MODEL_FILE).is_file():
        raise ConfigError(f"model is {str(model)!r}, which is no folder of a model: it has no {MODEL_FILE}")
    if steps < 1:
        raise ConfigError(f"steps is {steps}: at least 1")
    owned = own_empty(folder)
    try:
        with filled(folder, last="model") as staging:
            write_lab(staging, seed, steps, model)
    finally:
        owned.discard()  # what is written stays, the lock goes
    return folder


def write_lab(folder: Path, seed: int, steps: int, model: Path | None) -> None:
    machine = Machine()
    for share in ("problems", "tuning"):
        rows = [
            {"problem": p.problem, "solution": p.solution, "answer": p.answer}
            for p in machine.problems(share, NUM_PROBLEMS)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{share}.jsonl").write_text(text, encoding="utf-8")
    (folder / "templates.yaml").write_text(yaml.safe_dump(asdict(TEMPLATES)), encoding="utf-8")
    if model is None:
        save_model(pretrain(machine, seed, steps), tokenizer(), folder / "model")
    else:
        shutil.copytree(model, folder / "model")
        share_with_readers(folder / "model")
