"""Rollouts by Hugging Face `generate`.

`generate` prepares prompts, masks and cache. The decoding loop is ours (`custom_generate`), because the built-in one
sorts the full vocabulary for top-p and copies the cache at every token. On a CPU, decoding is bound by reading weights,
so each call packs them once for the processor's matrix units, with adapters merged. There a student that trains on
packed rows reads the prompts as one row too (`decoding/cache.py`).

On a GPU the loop runs ahead of the device. It reads the decoded tokens only every `CHECK_INTERVAL` tokens, because each
read synchronises with the GPU.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from atesd.errors import ModelError
from atesd.models.attention.one_token import folded_heads, replaced
from atesd.models.batching import to_device
from atesd.models.merging import check_decodable, merge_problems
from atesd.parallel.sharding import is_sharded, unsharded
from atesd.rollout.decoding.cache import additive_mask, buffered_cache, read_prompts, takes_packed_prompts
from atesd.rollout.decoding.layers import decoding_model, packable_layers
from atesd.rollout.engine import Rollout, Sampling
from atesd.rollout.seeds import ResponseSeeds
from atesd.terminal import advance
from atesd_kernels.integrations.backbone import wants_aux_loss
from atesd_kernels.integrations.head import unwrap

# Tokens a GPU decodes between two checks for ended responses (our choice). At most this many minus one are wasted.
CHECK_INTERVAL = 8


class HFEngine:
    """Samples from `model` in this process.

    Args:
        model: the student, bare or under peft.
        tokenizer: provides the pad and end tokens.
        max_completion_length: maximum number of new tokens.
        temperature, top_p, top_k: sampling; `top_k=0` and `top_p=1.0` switch the filters off.
        seeds: seeds of training rollouts; checkpoints include their count.
        bf16: decode in bfloat16 like autocast (the residual stream stays float32).
        entries: sample only tokens with an id below it; None: every entry of the head.

    Raises:
        ModelError: an adapter that acts outside the model's layers, or that mixes tokens (aLoRA).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_completion_length: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seeds: ResponseSeeds | None = None,
        bf16: bool = False,
        entries: int | None = None,
    ):
        problems = {} if is_sharded(model) else merge_problems(model)
        check_decodable(model, problems)
        self.model, self.bf16 = model, bf16
        self.packed = packable_layers(model, problems)
        self.device = next(model.parameters()).device
        self.runs_ahead = self.device.type != "cpu"  # a CPU has no synchronisation cost, and wasted tokens take time
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.entries = entries
        self.pad_id, self.stop_ids = tokenizer.pad_token_id, stop_token_ids(unwrap(model), tokenizer)
        self.seeds = ResponseSeeds(0) if seeds is None else seeds
        self.gathered_weights = contextlib.ExitStack()
        self.config = GenerationConfig(
            max_new_tokens=max_completion_length,
            do_sample=True,
            pad_token_id=self.pad_id,
            eos_token_id=self.stop_ids,
            bos_token_id=tokenizer.bos_token_id,
        )

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampling: Sampling | None = None) -> list[Rollout]:
        """Returns one response per prompt, all decoded as one left-padded batch."""
        if sampling is not None:
            return self.sampling_as(sampling).decode_batch(prompts)
        seeds = self.seeds.following(len(prompts))
        own = Sampling(self.config.max_new_tokens, self.temperature, self.top_p, self.top_k, seeds)
        rollouts = self.sampling_as(own).decode_batch(prompts)
        self.seeds.count(len(prompts))
        return rollouts

    def decode_batch(self, prompts: list[list[int]]) -> list[Rollout]:
        width = max(map(len, prompts))
        self.padding = [width - len(p) for p in prompts]
        input_ids, mask = to_device(
            torch.tensor(
                [
                    [[self.pad_id] * n + p for n, p in zip(self.padding, prompts, strict=True)],
                    [[0] * n + [1] * len(p) for n, p in zip(self.padding, prompts, strict=True)],
                ]
            ),
            self.device,
        )
        dtype = torch.bfloat16 if self.bf16 else next(self.model.parameters()).dtype
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        attention = masks_built_unread(unwrap(self.model).config) if self.runs_ahead else folded_heads()
        with decoding_model(self.model, dtype, self.packed) as model, autocast, attention, attention_of_any_length():
            cache = buffered_cache(unwrap(model).config, dtype, self.config.max_new_tokens)
            responses = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=self.config,
                custom_generate=self.decode,
                **{cache_argument(unwrap(model)): cache},
            )
        return [
            Rollout(prompt, response, truncated=finite and response[-1] not in self.stop_ids, finite=finite)
            for prompt, (response, finite) in zip(prompts, responses, strict=True)
        ]

    def sampling_as(self, sampling: Sampling) -> HFEngine:
        """Returns a copy of this engine with `sampling`. Each response uses its own seed, independent of its batch."""
        other = copy.copy(self)
        other.temperature, other.top_p, other.top_k = sampling.temperature, sampling.top_p, sampling.top_k
        other.config = copy.deepcopy(self.config)
        other.config.max_new_tokens = sampling.max_completion_length
        # generated in advance and on the CPU: the same numbers for every device, length and batch
        rows = [
            torch.rand(other.config.max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in sampling.seeds
        ]
        other.uniforms = to_device(torch.stack(rows), self.device)  # (prompts, tokens)
        return other

    def decode(
        self, model: nn.Module, input_ids: Tensor, generation_config: GenerationConfig, **inputs: Any
    ) -> list[tuple[list[int], bool]]:
        """The decoding loop, called by `generate`. Returns each response, and whether its logits were finite.

        Ended rows write the pad token. They are removed at the first check that finds half of the batch ended. A row
        ends if its logits are not finite.
        """
        base = unwrap(model)
        name = cache_argument(base)
        # an auxiliary loss of experts belongs to training; its mask does not fit one new token after a cache
        no_aux_loss = {"output_router_logits": False} if wants_aux_loss(base) else {}
        mask, cache, padding = inputs.get("attention_mask"), inputs[name], self.padding
        if mask is None:  # generate drops a mask without padding
            mask = torch.ones_like(input_ids)
        limit, check_interval = generation_config.max_new_tokens, CHECK_INTERVAL if self.runs_ahead else 1
        stop_ids = to_device(torch.tensor(self.stop_ids), self.device)
        tokens, position = input_ids, mask.cumsum(1).sub(1).clamp(min=0)
        running = torch.arange(len(input_ids), device=self.device)  # the response that each row of the batch writes
        ended = torch.zeros_like(running, dtype=torch.bool)
        responses = input_ids.new_full((len(input_ids), limit), self.pad_id)
        lengths = torch.full_like(running, limit)
        finite, counted = torch.ones_like(ended), len(input_ids)
        packs_prompts = not self.runs_ahead and takes_packed_prompts(base, cache)
        for step in range(limit):
            if step == 0 and packs_prompts:
                logits = read_prompts(model, input_ids, padding, name, cache, **no_aux_loss)
            else:
                seen = None  # all keys
                if any(padding):
                    seen = additive_mask(mask, cache) if packs_prompts else mask
                logits = model(
                    input_ids=tokens,
                    attention_mask=seen,
                    position_ids=position,
                    use_cache=True,
                    logits_to_keep=1,
                    **{name: cache},
                    **no_aux_loss,
                ).logits[:, -1]
            u = self.uniforms[running, step]  # (batch,)
            sampled, drawn = sample(logits[:, : self.entries], self.temperature, self.top_p, self.top_k, u)
            sampled = torch.where(ended | ~drawn, self.pad_id, sampled)
            responses[running, step] = sampled
            finite[running] &= drawn | ended
            stopped = (sampled[:, None] == stop_ids).any(1)  # isin would sort many ids and synchronise
            ending = (stopped | ~drawn) & ~ended  # the pad token may itself be an end token
            lengths[running] = torch.where(ending, step + 1, lengths[running])
            ended |= ending
            if (step + 1) % check_interval == 0:
                left = [row for row, done in enumerate(ended.tolist()) if not done]
                advance(counted - len(left), f"token {step + 1} of {limit}")
                counted = len(left)
                if not left:
                    break
                if 2 * len(left) <= len(running):
                    keep = to_device(torch.tensor(left), self.device)
                    cache.batch_select_indices(keep)
                    running, ended, sampled = running[keep], ended[keep], sampled[keep]
                    mask, position, padding = mask[keep], position[keep], [padding[row] for row in left]
            tokens, position = sampled[:, None], position[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        advance(counted)
        rows = zip(responses.tolist(), lengths.tolist(), finite.tolist(), strict=True)
        return [(row[:n], drawn) for row, n, drawn in rows]

    def sync(self) -> None:
        """Gathers sharded weights until `release`: this engine decodes with the student itself. Processes then need no
        collectives while they decode responses of different lengths."""
        self.gathered_weights.close()
        self.gathered_weights.enter_context(unsharded(self.model))

    def release(self) -> None:
        """Frees the gathered weights. `generate` has already freed cache and packed matrices."""
        self.gathered_weights.close()

    def close(self) -> None:
        """No-op: the engine owns no resources."""

    def state_dict(self) -> dict[str, Any]:
        return self.seeds.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seeds.load_state_dict(state)


def masks_built_unread(config: Any) -> contextlib.AbstractContextManager[None]:
    """Context in which transformers builds the mask of a padded batch without reading from the GPU if it is all ones.

    `decode` passes no mask for a batch without padding, so the answer would always be no. flash-attn still reads.
    """
    name = config._attn_implementation
    build = ALL_MASK_ATTENTION_FUNCTIONS[name]

    def build_unread(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None:
            kwargs["allow_is_causal_skip"] = False
        return build(*args, attention_mask=attention_mask, **kwargs)

    return replaced(ALL_MASK_ATTENTION_FUNCTIONS, name, build_unread)


@contextlib.contextmanager
def attention_of_any_length() -> Iterator[None]:
    """Context in which sdpa does not use cuDNN, which makes a plan for each new length: in decoding, at each token."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def cache_argument(model: nn.Module) -> str:
    """Returns the name of the cache argument of `forward` and `generate`: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def stop_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Returns all ids that end a response: the tokenizer's, and the model's generation config's (end of turn)."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    ids = dict.fromkeys(i for i in [tokenizer.eos_token_id, *declared] if i is not None)
    if not ids:
        raise ModelError("neither the tokenizer nor the generation config names an end-of-sequence token.")
    return list(ids)


def candidates(logits: Tensor, temperature: float, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Filters logits `(batch, vocab)`: temperature, then top-k, then top-p among those, as in transformers.

    Sorts only the `top_k` best. top-p keeps the smallest set of tokens whose mass reaches `top_p`. Returns weights
    `(batch, k)`, which are 0 for removed tokens and need not sum to 1, and tokens `(batch, k)` or `(1, k)`.
    """
    if not top_k and top_p == 1.0:
        return (logits.float() / temperature).softmax(-1), torch.arange(logits.shape[-1], device=logits.device)[None]
    values, tokens = (logits.float() / temperature).topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    probs = values.softmax(-1)
    if top_p < 1.0:
        probs = torch.where(probs.cumsum(-1) - probs >= top_p, 0.0, probs)  # this order of arguments keeps NaN
    return probs, tokens


def sample(logits: Tensor, temperature: float, top_p: float, top_k: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Samples from logits `(batch, vocab)` with `uniform` `(batch,)`, float64 in [0, 1). Returns tokens `(batch,)`, and
    whether each row's logits were finite, `(batch,)`.

    A row with a NaN or an infinity among its candidates, or only -inf, has no distribution: its token is arbitrary.
    """
    probs, tokens = candidates(logits, temperature, top_p, top_k)
    # compares one uniform number per row with the cumulative sum: multinomial on a full vocabulary is far slower
    mass = probs.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    u = uniform[:, None] * total
    u = torch.minimum(u, total.nextafter(torch.zeros_like(total)))  # uniform * total may round up to the total
    choice = torch.searchsorted(mass, u, right=True)  # right: an entry of weight 0 is never the first to exceed u
    choice = choice.clamp(max=mass.shape[1] - 1)  # no comparison with NaN is true
    return tokens.expand(len(probs), -1).gather(1, choice).flatten(), total.flatten().isfinite()
