"""What `atesd train` and `atesd eval` print without arguments: one page. `--help` has every setting."""

from __future__ import annotations

from textwrap import fill

from atesd.config.load import recipes

TRAIN = """\
atesd train: a model learns from its own answers, taught by itself reading part of the solutions.

  atesd train quickstart                    SmolLM2-135M learns to compare numbers, two CPU cores
  atesd train my_run.yaml --max_steps 500   your file; `extends: quickstart` takes over a recipe
  atesd train --resume runs/my_run          go on with a run

{recipes}

The settings that people change, as flags or as lines of the YAML file:
  --model_name_or_path     a folder or a Hub id
  --dataset_name           a JSON, JSONL, CSV or parquet file, a saved dataset, or a Hub name
  --problem_column, --solution_column, --answer_column   where the data has other names for them
  --num_train_problems     problems to keep
  --max_steps              optimizer steps
  --per_device_train_batch_size, --gradient_accumulation_steps   problems of a step: their product
  --learning_rate          peak of AdamW's
  --max_completion_length  longest response in tokens
  --exposure_policy        atesd (learned), full (OPSD), fixed with --fixed_alpha, and others
  --use_peft, --lora_r     a LoRA adapter and its rank; --use_peft false trains all weights
  --rollout_engine         hf, vllm or vllm_server
  --eval_steps             steps between evaluations on --num_eval_problems held out
  --report_to              tensorboard, wandb and other trackers
  --output_dir             the run's folder

--dry-run plans memory and shows the prompts without training. --help has all settings."""

EVAL = """\
atesd eval: samples answers, grades them, and reports Average@k, pass@k and maj@k with intervals.

  atesd eval --adapter runs/my_run --data aime24            a run's adapter on its base model
  atesd eval --model Qwen/Qwen3-1.7B --data my.jsonl        a model on your problems and answers
  atesd eval --compare evals/A evals/B                      paired difference of two evaluations

Data: aime24, aime25, hmmt25, gsm_symbolic, a JSON, JSONL, CSV or parquet file, or a Hub name.
The defaults are OPSD's published protocol: 12 samples of each problem at temperature 1.

The settings that people change:
  --model                  a folder or a Hub id; absent, the model that the adapter was trained on
  --adapter                a run directory, one of its checkpoints, or peft's folder
  --data                   the problems
  --problem_column, --answer_column   where the data has other names for them
  --num_problems           problems to draw; absent, all
  --k                      samples of each problem
  --max_new_tokens         longest answer; absent, 38,912 tokens or what the model's context leaves
  --temperature, --top_p, --top_k
  --rollout_engine         hf, vllm or vllm_server
  --no_box_only            also take an answer that is not in a \\boxed{}
  --output_dir             the folder of the results; an evaluation found there goes on

--help has all settings."""


def train_page() -> str:
    names = f"Recipes: {', '.join(recipes())}"
    return TRAIN.format(recipes=fill(names, 98, subsequent_indent="  ", break_on_hyphens=False))
