"""Rollouts per second: vLLM in the training process beside the HF engine, and what the weight sync costs a step.

    make test-vllm                                    # makes the environment
    .venv-vllm/bin/python -m bench.rollout_speed [--prompts 16] [--max_completion_length 128] [--rounds 3]

One process, one model (SmolLM2), one precision (bf16 where the processor multiplies it, else fp32), one list of
gsm_symbolic prompts, and no token ends a response, so that all engines write the same number. vLLM returns
log-probabilities, as training asks it to. The HF engine is this project's own decoding loop; plain `generate` of
transformers, its weights in the same precision, stands beside it.
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
from atesd.data.problems import load_problems
from atesd.data.prompts import PromptBuilder
from atesd.models.loading import load_model_and_tokenizer, model_path
from atesd.models.precision import has_fast_bf16
from atesd.rollout.hf import HFEngine
from atesd.rollout.vllm import VLLMEngine
from bench.machine import markdown, save

SAMPLING = {"unfiltered": {"top_p": 1.0, "top_k": 0}, "top-p 0.95, top-k 20": {"top_p": 0.95, "top_k": 20}}


def settings(args: argparse.Namespace, **changes) -> ATESDConfig:
    return ATESDConfig(
        model_name_or_path=args.model,
        bf16=args.dtype == "bfloat16",
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


def plain_generate(
    path: str, dtype: str, prompts: list[list[int]], pad_id: int, length: int, top_p: float, top_k: int
) -> Callable[[], None]:
    """transformers' own `generate`, left-padded, as a user would call it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
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
        model, tokenizer, max_completion_length=args.max_completion_length, temperature=1.1, bf16=config.bf16, **filters
    )
    hf.stop_ids = [-1]
    path = model_path(config.model_name_or_path)
    plain = plain_generate(path, args.dtype, prompts, tokenizer.pad_token_id, args.max_completion_length, **filters)
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


def speed_table(result: dict) -> str:
    """Tokens per second, medians over the rounds, and how many times the others' vLLM's are."""
    rows = []
    for label, by_engine in result["seconds"].items():
        tokens = result["prompts"] * result["max_completion_length"]
        rate = {name: tokens / statistics.median(values) for name, values in by_engine.items()}
        speeds = [f"{rate[name]:.0f}" for name in ("vllm", "hf", "generate")]
        rows.append([label, *speeds, *(f"{rate['vllm'] / rate[name]:.2f}" for name in ("hf", "generate"))])
    header = [f"sampling, {result['dtype']}, {result['prompts']} sequences of {result['max_completion_length']} tokens"]
    header += ["vLLM tokens/s", "HF engine tokens/s", "plain `generate` tokens/s", "vLLM / HF engine", "vLLM / plain"]
    return markdown(header, rows)


def sync_table(result: dict) -> str:
    rows = []
    for kind, share in result["steps"].items():
        sync, step = share["seconds_weight_sync"], share["seconds_step"]
        numbers = [f"{sync:.2f}", f"{share['seconds_rollout']:.1f}", f"{step:.1f}", f"{100 * sync / step:.1f} %"]
        rows.append([kind, *numbers, f"{share['engine_logprob_diff']:.5f}"])
    header = [f"trained, {result['dtype']}", "weight sync, s", "rollout, s", "step, s", "sync / step"]
    return markdown([*header, "mean log-prob difference"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16" if has_fast_bf16() else "float32"
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max_completion_length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="of the speed measurement; 0: none")
    parser.add_argument("--steps", type=int, default=3, help="of the runs that measure the sync; 0: none")
    args = parser.parse_args()
    shape = {name: getattr(args, name) for name in ("dtype", "prompts", "max_completion_length")}
    if args.rounds:
        result = {**shape, "seconds": {label: speeds(args, filters) for label, filters in SAMPLING.items()}}
        print(speed_table(result))
        print(save("rollout_speed", result))
    if args.steps:
        result = {**shape, "steps": {kind: sync_share(args, kind == "LoRA") for kind in ("LoRA", "all weights")}}
        print(sync_table(result))
        print(save("weight_sync", result))


if __name__ == "__main__":
    main()
