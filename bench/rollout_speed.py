"""Rollouts per second: vLLM in the training process beside the HF engine, and what the weight sync costs a step.

    make test-vllm                                    # makes the environment
    .venv-vllm/bin/python -m bench.rollout_speed [--prompts 16] [--max_completion_length 128] [--rounds 3]

One process, one model (SmolLM2, bf16), one list of gsm_symbolic prompts, and no token ends a response, so that all
engines write the same number. vLLM returns log-probabilities, as training asks it to. The
HF engine is this project's own decoding loop; plain `generate` of transformers, in bf16 weights, stands beside it.
Then a run of a few steps with vLLM, whose metrics say how much of a step the sync is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

from atesd.config import ATESDConfig
from atesd.models import load_model_and_tokenizer, model_path
from atesd.problems import load_problems
from atesd.prompts import PromptBuilder
from atesd.rollout.hf import HFEngine
from atesd.rollout.vllm import VLLMEngine
from bench.machine import markdown, save

SAMPLING = {"unfiltered": {"top_p": 1.0, "top_k": 0}, "top-p 0.95, top-k 20": {"top_p": 0.95, "top_k": 20}}


def settings(args: argparse.Namespace, **changes) -> ATESDConfig:
    return ATESDConfig(
        model_name_or_path=args.model,
        bf16=True,
        num_train_problems=args.prompts * max(1, args.steps),
        num_probe_problems=0,
        grounding="none",
        exposure_policy="full",
        entry_clip=None,
        rollout_engine="vllm",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=args.prompts // 2,
        max_prompt_length=512,
        max_completion_length=args.max_completion_length,
        max_steps=max(1, args.steps),
        save_steps=10**6,
        output_dir=tempfile.mkdtemp(prefix="rollout-speed-"),
        **changes,
    )


def gsm_prompts(tokenizer, args: argparse.Namespace) -> list[list[int]]:
    problems = load_problems("gsm_symbolic", num_train=args.prompts, num_probe=0, num_eval=0, seed=0)
    words = PromptBuilder(
        tokenizer, max_prompt_length=512, max_completion_length=args.max_completion_length, context_length=8192
    )
    return [words.student(problem) for problem in problems.train]


def plain_generate(path: str, prompts: list[list[int]], pad_id: int, length: int, top_p: float, top_k: int):
    """transformers' own `generate`, left-padded, as a user would call it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    @torch.no_grad()
    def run() -> None:
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.1, top_p=top_p, top_k=top_k, pad_token_id=pad_id,
            min_new_tokens=length, max_new_tokens=length,
        )  # fmt: skip
        assert out.shape[1] == width + length

    return run


def speeds(args: argparse.Namespace, filters: dict) -> dict[str, list[float]]:
    """Seconds of each engine in each round, after one call that warms up. vLLM comes last: the others run in a process
    that it has not changed."""
    config = settings(args, **filters)
    model, tokenizer = load_model_and_tokenizer(config)
    prompts = gsm_prompts(tokenizer, args)
    hf = HFEngine(
        model, tokenizer, max_completion_length=args.max_completion_length, temperature=1.1, bf16=True, **filters
    )
    hf.stop_ids = [-1]
    path = model_path(config.model_name_or_path)
    plain = plain_generate(path, prompts, tokenizer.pad_token_id, args.max_completion_length, **filters)
    seconds = {"hf": timed(lambda: hf.generate(prompts), args.rounds), "generate": timed(plain, args.rounds)}
    vllm = VLLMEngine.from_config(config, model, tokenizer)
    vllm.stop_ids = []
    vllm.sync()
    seconds = {"vllm": timed(lambda: vllm.generate(prompts), args.rounds), **seconds}
    vllm.close()
    return seconds


def timed(run: Callable[[], object], rounds: int) -> list[float]:
    seconds = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def sync_share(args: argparse.Namespace, use_peft: bool) -> dict[str, float]:
    """Medians of a short run's steps, the first left out."""
    from atesd.trainer import train

    run_dir = train(settings(args, use_peft=use_peft))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][1:]
    names = ("seconds_weight_sync", "seconds_rollout", "seconds_step", "engine_logprob_diff")
    return {name: statistics.median(row[name] for row in rows) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max_completion_length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="of the speed measurement; 0: none")
    parser.add_argument("--steps", type=int, default=3, help="of the runs that measure the sync; 0: none")
    args = parser.parse_args()
    shape = {"prompts": args.prompts, "max_completion_length": args.max_completion_length}
    if args.rounds:
        seconds = {label: speeds(args, filters) for label, filters in SAMPLING.items()}
        rows = []
        for label, by_engine in seconds.items():
            rate = {
                name: args.prompts * args.max_completion_length / statistics.median(values)
                for name, values in by_engine.items()
            }
            rows.append([label, *(f"{value:.0f}" for value in rate.values()), f"{rate['vllm'] / rate['hf']:.2f}"])
        print(
            markdown(["sampling", "vLLM tokens/s", "HF engine tokens/s", "plain generate tokens/s", "vLLM / HF"], rows)
        )
        print(save("rollout_speed", {**shape, "seconds": seconds}))
    if args.steps:
        shares = {kind: sync_share(args, use_peft=kind == "lora") for kind in ("lora", "all weights")}
        for kind, share in shares.items():
            sync, step = share["seconds_weight_sync"], share["seconds_step"]
            print(f"{kind}: weight sync {sync:.2f} s of a step of {step:.1f} s, {100 * sync / step:.1f} %")
        print(save("weight_sync", {**shape, "steps": shares}))


if __name__ == "__main__":
    main()
