"""TRL's SDFT and SDPO with a teacher whose context is cut at alpha, and a policy that is told what came of it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from atesd.data.prompts import PromptTooLong
from atesd.exposure.policies import make_policy
from atesd.integrations.trl import exposed_context, use_exposure
from atesd_kernels.integrations.trl import use_linear_divergence

from .trl_trainers import SOLUTION, SDFTTrainer, make_trainer, user

PROBE = [{"prompt": user("a held-out problem"), "privileged_context": SOLUTION}]
RUN = {"max_steps": 6, "distillation_alpha": 0.0}


def teacher_prompt(trainer, batch) -> str:
    ids = batch["teacher_input_ids"][0, : -batch["completion_ids"].shape[1]]
    return trainer.processing_class.decode(ids, skip_special_tokens=True)


def batch_of(trainer):
    return trainer._prepare_training_batch([trainer.train_dataset[0]] * 2)


def fixed(alpha: float):
    return make_policy("fixed", fixed_alpha=alpha)


def learned(**options):
    return make_policy("atesd", max_steps=6, hold_window=1, lookahead=2, policy_batch_size=2, **options)


def exposures(trainer) -> list[float]:
    return [row["exposure/alpha"] for row in trainer.state.log_history if "exposure/alpha" in row]


def test_the_context_is_cut_at_alpha_and_is_trls_own_at_one(sharp_model_path, tmp_path):
    trainer = make_trainer("sdft", sharp_model_path, tmp_path)
    whole = teacher_prompt(trainer, batch_of(trainer))
    seen = []
    for alpha in (0.0, 0.4, 1.0):
        trainer = make_trainer("sdft", sharp_model_path, tmp_path)
        use_exposure(trainer, fixed(alpha), grounding="none")
        seen.append(teacher_prompt(trainer, batch_of(trainer)))
    assert seen[2] == whole and SOLUTION in whole
    assert "First we have two." in seen[1] and "Then" not in seen[1] and "The final answer is: 5" in seen[1]
    assert "First" not in seen[0] and "The final answer is: 5" in seen[0]


def test_sdpo_shows_a_prefix_of_the_successful_attempt(sharp_model_path, tmp_path):
    options = {"success_reward_threshold": 0.5, "solution_template": "<<{successful_previous_attempt}>>"}
    attempt = "Two and two.\nThat is four.\nI am done."
    trainer = make_trainer("sdpo", sharp_model_path, tmp_path, **options)
    use_exposure(trainer, fixed(0.7))
    trainer.processing_class.decode = lambda token_ids, **_: (
        [attempt] * len(token_ids) if torch.as_tensor(token_ids).ndim == 2 else attempt
    )
    built = []
    compose = trainer.teacher_context_builder._build_reprompt_text
    trainer.teacher_context_builder._build_reprompt_text = lambda *texts: built.append(compose(*texts)) or built[-1]
    batch_of(trainer)
    assert built and all("<<Two and two.\nThat is four.>>" in text and "done" not in text for text in built)


@pytest.mark.parametrize("kind", ["sdft", "sdpo"])
def test_a_learned_policy_is_paid_and_logged_by_trls_callbacks(kind, sharp_model_path, tmp_path):
    trainer = make_trainer(kind, sharp_model_path, tmp_path, lora=True, **RUN)
    assert use_linear_divergence(trainer)
    policy = learned(lambda_gt=0.01 if kind == "sdft" else 0.0)
    before = [p.clone() for p in policy.policy.parameters()]
    callback = use_exposure(trainer, policy, probe=PROBE)
    trainer.train()
    log = [row for row in trainer.state.log_history if "exposure/alpha" in row]
    assert len(log) == 6 and len(set(exposures(trainer))) == 6
    assert any("exposure/reward" in row for row in log) and any("exposure/policy_loss" in row for row in log)
    assert any(not a.equal(b) for a, b in zip(before, policy.policy.parameters(), strict=True))
    assert set(policy.signals.ema) == {"alpha", "loss", "mismatch", "probe_nll"}
    assert policy.signals.confidence is not None
    assert policy.window_start is None and callback.policy is policy  # finished


def test_the_policy_hears_the_losses_of_its_own_step(sharp_model_path, tmp_path):
    heard = []
    policy = fixed(0.5)
    policy.observe = lambda step, **measured: heard.append((step, measured["loss"])) or {}
    trainer = make_trainer("sdft", sharp_model_path, tmp_path, **RUN, logging_steps=2)
    use_exposure(trainer, policy, grounding="none")
    trainer.train()
    logged = [row["sdft/distillation_loss"] for row in trainer.state.log_history if "loss" in row]
    assert [step for step, _ in heard] == list(range(6))
    pairs = zip(heard[::2], heard[1::2], strict=True)
    assert [(a[1] + b[1]) / 2 for a, b in pairs] == pytest.approx(logged)


def test_scores_are_log_probabilities_of_the_reference(sharp_model_path, tmp_path):
    trainer = make_trainer("sdft", sharp_model_path, tmp_path, teacher_model_kind="live")
    callback = use_exposure(trainer, fixed(0.4), probe=[*PROBE, {**PROBE[0], "prompt": user("another one, longer")}])
    batch_of(trainer)
    tokenizer, model = trainer.processing_class, trainer.model
    model.eval()

    def logprobs(prompt, reply):
        context = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + reply])).logits[0, len(context) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]

    reply = [*tokenizer(SOLUTION, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    expected = torch.cat([logprobs(row["prompt"], reply) for row in callback.probe])
    assert callback.probe_nll() == pytest.approx(-expected.mean().item(), rel=1e-5)
    # at 0.4 the first of three segments is shown: it is not scored
    shown = len(tokenizer("First we have two.", add_special_tokens=False)["input_ids"])
    prompt = trainer.train_dataset[0]["prompt"][0]["content"]
    text = trainer.args.teacher_prompt_template.format(prompt=prompt, privileged_context=exposed_context(SOLUTION, 0.4))
    unseen = logprobs(user(text), reply)[shown + 1 :]  # the line break belongs to the segment
    assert callback.grounded(0.4) == pytest.approx(unseen.mean().item(), rel=1e-4)


def test_a_resumed_run_goes_on_with_the_policy_as_it_was(sharp_model_path, tmp_path):
    """TRL draws other rollouts after resuming, so only the exposure decided before they are seen can be the same."""
    options = {"lora": True, **RUN, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer("sdft", sharp_model_path, tmp_path, **options)
    use_exposure(whole, learned(progress_signal="distill_loss"))
    whole.train()
    resumed = make_trainer("sdft", sharp_model_path, tmp_path, **options)
    policy = learned(progress_signal="distill_loss")
    use_exposure(resumed, policy)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(exposures(resumed)) == len(set(exposures(resumed))) == 6
    assert exposures(resumed)[:4] == exposures(whole)[:4]
    assert policy.signals.steps_done == 6
    (tmp_path / "checkpoint-3" / "exposure.pt").unlink()
    again = make_trainer("sdft", sharp_model_path, tmp_path, **options)
    use_exposure(again, learned(progress_signal="distill_loss"))
    with pytest.raises(ValueError, match="exposure policy's state, is missing"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_what_would_go_wrong_later_is_refused_now(sharp_model_path, tmp_path):
    with pytest.raises(ValueError, match="neither TRL's SDFTTrainer"):
        use_exposure(object(), fixed(1.0))
    with pytest.raises(ValueError, match="grounding='reference' is not known"):
        use_exposure(make_trainer("sdpo", sharp_model_path, tmp_path), fixed(1.0), grounding="reference")
    with pytest.raises(PromptTooLong, match="TRL would cut it from the left"):
        use_exposure(make_trainer("sdft", sharp_model_path, tmp_path, max_prompt_length=60), fixed(1.0))
    with pytest.raises(ValueError, match="one generation serves 2 steps"):
        use_exposure(make_trainer("sdft", sharp_model_path, tmp_path, num_iterations=2), learned())

    class Changed(SDFTTrainer):
        def _tokenize_prompts(self, prompts):
            return super()._tokenize_prompts(prompts)

    trainer = make_trainer("sdft", sharp_model_path, tmp_path, trainer_class=Changed)
    told = r"_tokenize_prompts of Changed in the installed trl .* differ from trl 1\."
    with pytest.raises(RuntimeError, match=told):
        use_exposure(trainer, fixed(1.0))
    with pytest.warns(UserWarning, match=told):
        assert use_exposure(trainer, fixed(1.0), strict=False) is None
    assert not any("Exposure" in type(callback).__name__ for callback in trainer.callback_handler.callbacks)
