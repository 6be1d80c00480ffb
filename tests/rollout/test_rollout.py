"""Rollouts: what transformers' own generate would write, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, MistralConfig
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from atesd.models.attention.packed import use_packed_attention
from atesd.rollout import Sampling
from atesd.rollout.decoding import cache
from atesd.rollout.decoding.cache import additive_mask, buffered_cache, read_prompts, takes_packed_prompts
from atesd.rollout.hf import HFEngine, cache_argument, candidates, sample
from atesd.rollout.seeds import ResponseSeeds

PROMPTS = [[5, 6, 7], [8, 40, 41, 42, 43, 44, 45, 46], [9, 10], [11, 12, 13, 14], [100, 101, 102]]


def uniform(generator, count):
    return torch.rand(count, dtype=torch.float64, generator=generator)


@pytest.fixture
def tokenizer(tiny_model_path):
    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.fixture
def model(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    # a random model with a tied head repeats its last token for ever; this one wanders
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    use_packed_attention(model)
    return model


def greedy(model, tokenizer, stop_ids, length=16):
    """transformers' own greedy decoding of each prompt alone, up to and including its end token."""
    responses = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=length,
            eos_token_id=stop_ids,
            pad_token_id=tokenizer.pad_token_id,
        )
        responses.append(out[0, len(prompt) :].tolist())
    return responses


@pytest.mark.parametrize("adapter", [False, True], ids=["bare", "lora"])
def test_decoding_with_one_candidate_is_greedy_decoding_of_each_prompt_alone(model, tokenizer, adapter):
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.5)
    engine = HFEngine(model, tokenizer, max_completion_length=16, top_k=1)
    model.eval()
    free = greedy(model, tokenizer, stop_ids=None)
    # end tokens that stop the prompts at different places, so that rows leave the batch on the way
    engine.stop_ids = sorted({free[0][2], free[1][5], free[3][9]})
    rollouts = engine.generate(PROMPTS)
    assert [r.response_ids for r in rollouts] == greedy(model, tokenizer, engine.stop_ids)
    assert [r.prompt_ids for r in rollouts] == PROMPTS
    assert len({len(r.response_ids) for r in rollouts}) > 1
    assert [r.truncated for r in rollouts] == [r.response_ids[-1] not in engine.stop_ids for r in rollouts]


def test_one_candidate_of_the_adapter_is_not_that_of_the_base(model, tokenizer):
    base = greedy(model, tokenizer, stop_ids=None)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    engine = HFEngine(model, tokenizer, max_completion_length=16, top_k=1)
    engine.stop_ids = [-1]
    assert [r.response_ids for r in engine.generate(PROMPTS)] != base


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (1.0, 7), (0.6, 7), (0.01, 50), (0.95, 20)])
def test_candidates_have_the_probabilities_transformers_gives_them(top_p, top_k):
    torch.manual_seed(0)
    logits = torch.randn(4, 300) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(1.1)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, logits.clone()).softmax(-1)
    probs, tokens = candidates(logits, 1.1, top_p, top_k)
    got = torch.zeros_like(logits).scatter(1, tokens.expand(4, -1), probs / probs.sum(-1, keepdim=True))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_tokens_are_drawn_with_their_probabilities_and_never_one_that_was_filtered_out():
    logits = torch.tensor([0.5, 0.05, 0.3, 0.15]).log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits, 1.0, 1.0, 0, uniform(generator, len(logits)))[0].bincount(minlength=4) / 20_000
    assert drawn.tolist() == pytest.approx([0.5, 0.05, 0.3, 0.15], abs=0.015)  # four standard deviations
    drawn = sample(logits, 1.0, 0.75, 0, uniform(generator, len(logits)))[0].bincount(minlength=4) / 20_000
    assert drawn.tolist() == pytest.approx([0.625, 0.0, 0.375, 0.0], abs=0.015)
    assert drawn[1] == drawn[3] == 0
    certain = torch.full((50, 300), -torch.inf).index_fill(1, torch.tensor([7]), 0.0)
    assert set(sample(certain, 1.1, 0.95, 20, uniform(generator, len(certain)))[0].tolist()) == {7}


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (0.9, 2)])
def test_a_row_without_a_distribution_is_named_and_the_others_are_drawn(top_p, top_k):
    nan, inf = torch.nan, torch.inf
    rows = torch.tensor([[0.0, -inf, -inf], [0.0, nan, 1.0], [0.0, inf, 1.0], [-inf] * 3, [-inf, -inf, 2.0]])
    tokens, finite = sample(rows, 1.0, top_p, top_k, uniform(torch.Generator().manual_seed(0), len(rows)))
    assert finite.tolist() == [True, False, False, False, True]
    assert tokens[finite].tolist() == [0, 2] and tokens.max() <= 2


def test_a_response_ends_where_the_logits_stop_being_finite_and_only_that_one(model, tokenizer):
    expected = HFEngine(model, tokenizer, max_completion_length=8, top_k=1).generate(PROMPTS)
    with torch.no_grad():
        model.model.embed_tokens.weight[PROMPTS[3][1]] = torch.nan  # a token of one prompt only
    rollouts = HFEngine(model, tokenizer, max_completion_length=8, top_k=1).generate(PROMPTS)
    assert [r.finite for r in rollouts] == [True, True, True, False, True]
    assert len(rollouts[3].response_ids) == 1 and not rollouts[3].truncated
    assert [r for r in rollouts if r.finite] == [r for i, r in enumerate(expected) if i != 3]


def test_a_seed_decides_the_responses_and_a_saved_state_continues_them(model, tokenizer):
    def engine(seed):
        return HFEngine(model, tokenizer, max_completion_length=8, temperature=1.5, seeds=ResponseSeeds(seed))

    first, again = engine(1), engine(1)
    assert first.generate(PROMPTS) == again.generate(PROMPTS)
    assert first.generate(PROMPTS) != engine(2).generate(PROMPTS)
    state, expected = first.state_dict(), first.generate(PROMPTS)
    fresh = engine(1)
    fresh.load_state_dict(state)
    assert fresh.generate(PROMPTS) == expected


def test_generating_draws_nothing_from_the_global_generator_and_leaves_the_model_as_it_was(model, tokenizer):
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    HFEngine(model, tokenizer, max_completion_length=4, bf16=True).generate(PROMPTS)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for name, p in model.named_parameters():
        assert p.requires_grad and p.dtype == torch.float32 and torch.equal(p, before[name]), name


def test_rollouts_follow_the_weights_as_they_are_now(model, tokenizer):
    engine = HFEngine(model, tokenizer, max_completion_length=8, top_k=1)
    engine.stop_ids = [-1]
    before = engine.generate(PROMPTS)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.add_(torch.randn_like(layer.mlp.down_proj.weight))
    assert engine.generate(PROMPTS) != before


def test_bf16_decoding_follows_the_distribution_of_the_autocast_student(model, tokenizer):
    engine = HFEngine(model, tokenizer, max_completion_length=6, top_k=1, bf16=True)
    engine.stop_ids = [-1]
    agree = total = 0
    for rollout in engine.generate(PROMPTS):
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            best = model(ids).logits[0].argmax(-1)[len(rollout.prompt_ids) - 1 : -1].tolist()
        agree += sum(a == b for a, b in zip(best, rollout.response_ids, strict=True))
        total += len(best)
    assert agree >= 0.9 * total


def test_a_call_that_samples_its_own_way_neither_uses_nor_moves_the_engine_s_random_state(model, tokenizer):
    sampling = Sampling(max_completion_length=5, temperature=2.0, top_p=0.9, top_k=0, seeds=(1, 2, 3, 4, 5))
    used, unused, other = (HFEngine(model, tokenizer, max_completion_length=8, top_k=0) for _ in range(3))
    evaluated = used.generate(PROMPTS, sampling)
    assert max(len(r.response_ids) for r in evaluated) == 5
    assert evaluated == unused.generate(PROMPTS, sampling)
    assert used.generate(PROMPTS) == other.generate(PROMPTS)


def test_a_seeded_response_is_the_same_in_any_batch_and_the_beginning_of_a_longer_one(model, tokenizer):
    engine = HFEngine(model, tokenizer, max_completion_length=8)
    engine.stop_ids = [-1]

    def responses(prompts, seeds, length=6):
        sampling = Sampling(length, temperature=1.0, top_p=1.0, top_k=0, seeds=seeds)
        return [r.response_ids for r in engine.generate(prompts, sampling)]

    together = responses(PROMPTS, (1, 2, 3, 4, 5))
    alone = [responses([prompt], (seed,))[0] for seed, prompt in enumerate(PROMPTS, start=1)]
    assert together == alone
    assert responses(PROMPTS[::-1], (5, 4, 3, 2, 1)) == together[::-1]
    longer = responses(PROMPTS, (1, 2, 3, 4, 5), length=40)
    assert [ids[:6] for ids in longer] == together
    assert responses([PROMPTS[0]] * 2, (1, 2))[0] != responses([PROMPTS[0]] * 2, (1, 2))[1]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_read_as_one_row_leave_what_a_padded_batch_leaves(model, dtype):
    model.eval().to(dtype)
    name, width = cache_argument(model), max(map(len, PROMPTS))
    padding = [width - len(p) for p in PROMPTS]
    ids = torch.tensor([[0] * n + p for n, p in zip(padding, PROMPTS, strict=True)])
    mask = torch.tensor([[0] * n + [1] * len(p) for n, p in zip(padding, PROMPTS, strict=True)])
    position = mask.cumsum(1).sub(1).clamp(min=0)
    ours, theirs = (buffered_cache(model.config, dtype, 4) for _ in range(2))

    def assert_close(got, want):  # some units in the last place of the largest entry
        share = 1e-5 if dtype == torch.float32 else 2**-6
        torch.testing.assert_close(got, want, rtol=0.0, atol=share * float(want.abs().max()))

    assert takes_packed_prompts(model, ours)
    logits = read_prompts(model, ids, padding, name, ours)
    expected = model(ids, attention_mask=mask, position_ids=position, **{name: theirs}).logits[:, -1]
    assert_close(logits, expected)
    seen = mask[:, None, :, None].bool()
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        for got, want in ((a.keys, b.keys), (a.values, b.values)):
            assert_close(got, torch.where(seen, want, 0))
    token, mask = logits.argmax(-1, keepdim=True), torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
    for _ in range(6):  # more than there is room for
        masks, at = (additive_mask(mask, ours), mask), mask.sum(1, keepdim=True) - 1
        got, want = (
            model(token, attention_mask=m, position_ids=at, **{name: c}).logits[:, -1]
            for m, c in zip(masks, (ours, theirs), strict=True)
        )
        assert_close(got, want)
        token, mask = want.argmax(-1, keepdim=True), torch.cat([mask, mask[:, -1:]], 1)


def test_a_model_that_forgets_or_was_not_made_for_packed_rows_reads_a_padded_batch(model, tiny_model_path):
    sliding = MistralConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, sliding_window=4
    )
    other = AutoModelForCausalLM.from_config(sliding)
    use_packed_attention(other)
    assert not takes_packed_prompts(other, buffered_cache(sliding, torch.float32, 4))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    assert not takes_packed_prompts(plain, buffered_cache(plain.config, torch.float32, 4))
    assert takes_packed_prompts(model, buffered_cache(model.config, torch.float32, 4))


def test_a_layer_that_the_model_does_not_run_stays_empty(model):
    (layer, *_) = buffered_cache(model.config, torch.float32, 4).layers
    layer.pad_left([2, 3])
    assert not layer.is_initialized


def test_a_cache_that_grows_on_the_way_changes_nothing(model, tokenizer, monkeypatch):
    engine = HFEngine(model, tokenizer, max_completion_length=24, top_k=1)
    engine.stop_ids = [-1]
    expected = engine.generate(PROMPTS)
    monkeypatch.setattr(cache, "ROOM", 5)
    assert engine.generate(PROMPTS) == expected
