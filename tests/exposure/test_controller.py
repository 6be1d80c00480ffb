"""The exposure controller against a trajectory worked out by hand, at every horizon, and interrupted anywhere."""

import io
import math
import warnings

import numpy as np
import pytest
import torch

from atesd.exposure.beta_policy import sample_beta
from atesd.exposure.controller import BetaPolicy, ExposureController


def measure(step: int, alpha: float) -> dict[str, float | None]:
    """A scripted student: every number is a function of the step and the exposure."""
    wave = math.sin(1.7 * step)
    return {
        "loss": 1 / (1 + 0.1 * step) + 0.2 * alpha + 0.05 * wave,
        "mismatch": 0.1 + 0.1 * alpha,
        "confidence": 0.6 + 0.1 * wave,
        "probe_nll": 2 - 0.03 * step + 0.02 * wave if step % 3 == 0 else None,
        "grounded": -1 + 0.5 * alpha,
    }


def drive(controller: ExposureController, steps) -> list[dict[str, float]]:
    return [controller.observe(step, **measure(step, controller.alpha(step))) for step in steps]


# --- a second, plain numpy account of the policy, its distribution and its gradient


def polygamma01(x: float) -> tuple[float, float]:
    """digamma and trigamma by recurrence up to 20 and the asymptotic series from there."""
    psi = psi1 = 0.0
    while x < 20:
        psi, psi1, x = psi - 1 / x, psi1 + 1 / x**2, x + 1
    psi += math.log(x) - 1 / (2 * x) - 1 / (12 * x**2) + 1 / (120 * x**4) - 1 / (252 * x**6)
    psi1 += 1 / x + 1 / (2 * x**2) + 1 / (6 * x**3) - 1 / (30 * x**5) + 1 / (42 * x**7)
    return psi, psi1


def beta_terms(a: float, b: float, x: float):
    """log density, entropy, and the gradients of both with respect to (a, b)."""
    log_B = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    (pa, ta), (pb, tb), (pc, tc) = polygamma01(a), polygamma01(b), polygamma01(a + b)
    log_density = (a - 1) * math.log(x) + (b - 1) * math.log(1 - x) - log_B
    entropy = log_B - (a - 1) * pa - (b - 1) * pb + (a + b - 2) * pc
    d_log = np.array([math.log(x) - pa + pc, math.log(1 - x) - pb + pc])
    d_entropy = np.array([(a + b - 2) * tc - (a - 1) * ta, (a + b - 2) * tc - (b - 1) * tb])
    return log_density, entropy, d_log, d_entropy


def numpy_loss_and_gradient(weights, states, samples, A, c_t, target):
    W1, b1, W2, b2 = weights
    B = len(samples)
    hidden = [np.tanh(W1 @ s + b1) for s in states]
    logits = [W2 @ h + b2 for h in hidden]
    terms = [beta_terms(*(1 + np.log1p(np.exp(z))), x) for z, x in zip(logits, samples, strict=True)]
    excess = max(0.0, np.mean([t[1] for t in terms]) - target)
    loss = -np.mean([A_j * t[0] for A_j, t in zip(A, terms, strict=True)]) + c_t * excess**2
    gradient = [np.zeros_like(w) for w in weights]
    for s, h, z, A_j, (_, _, d_log, d_entropy) in zip(states, hidden, logits, A, terms, strict=True):
        d_z = (-A_j * d_log + 2 * c_t * excess * d_entropy) / B / (1 + np.exp(-z))  # softplus' is the sigmoid
        d_pre = (W2.T @ d_z) * (1 - h**2)
        for g, part in zip(gradient, (np.outer(d_pre, s), d_pre, np.outer(d_z, h), d_z), strict=True):
            g += part
    return loss, gradient


def test_a_scripted_trajectory_gives_the_rewards_advantages_and_policy_gradient_worked_out_by_hand():
    controller = ExposureController(
        max_steps=12,
        hold_window=2,
        lookahead=3,
        policy_batch_size=2,
        reward_gamma=0.5,
        lambda_gt=0.1,
        progress_signal="distill_loss",
        policy_learning_rate=0.01,
        policy_hidden_size=5,
        entropy_target=-0.5,
        entropy_coef=0.8,
        seed=3,
    )
    with torch.no_grad():  # a policy with an opinion, so that the first layer has a gradient too
        controller.policy.output.weight.copy_(torch.linspace(-0.9, 0.7, 10, dtype=torch.float64).view(2, 5))
    weights = [p.detach().numpy().copy() for p in controller.policy.parameters()]
    losses = [1.0, 0.8, 0.9, 0.6, 0.5, 0.1]
    scores = [-9.0, -1.0, -2.0, -3.0, -4.0, -5.0]
    logs = []
    for step, (loss, grounded) in enumerate(zip(losses, scores, strict=True)):
        alpha = controller.alpha(step)
        logs.append(
            controller.observe(step, loss=loss, mismatch=0.5, confidence=0.7, grounded=grounded) | {"asked": alpha}
        )

    # t0 = 0: 1.0 .8 .9 .6 -> .2 + 0 + .3/4 = .275; (-1 - 2/2 - 3/4) / 1.75 = -2.75/1.75
    # t0 = 2: .9 .6 .5 .1   -> .3 + .1/2 + .4/4 = .45; (-3 - 4/2 - 5/4) / 1.75 = -6.25/1.75
    R = {3: 0.275 - 0.275 / 1.75, 5: 0.45 - 0.625 / 1.75}
    assert {step: log["reward"] for step, log in enumerate(logs) if "reward" in log} == pytest.approx(R, abs=1e-14)
    assert logs[3]["reward_progress"] == pytest.approx(0.275)
    assert logs[3]["reward_grounded"] == pytest.approx(-2.75 / 1.75)
    # two rewards: mean (R0+R2)/2, std half their distance, so A = +1 for the larger and -1 for the smaller
    assert R[3] > R[5]
    assert [step for step, log in enumerate(logs) if "policy_loss" in log] == [5]
    assert logs[5]["advantage"] == pytest.approx(-1.0, abs=1e-5)

    x0, x2 = logs[0]["asked"], logs[2]["asked"]
    s0 = np.array([-1.0, 0, 0, 0, 0, 0])
    s2 = np.array([2 * 2 / 12 - 1, 2 * x0 - 1, math.tanh(0.98 - 1.0), 0, 0, 2 * 0.7 - 1])
    half = (R[3] - R[5]) / 2
    A = [half / (half + 1e-8), -half / (half + 1e-8)]
    c_t = 0.8 * 6 / 12
    assert logs[5]["entropy_coef"] == pytest.approx(c_t)
    loss, gradient = numpy_loss_and_gradient(weights, [s0, s2], [x0, x2], A, c_t, -0.5)
    assert logs[5]["policy_loss"] == pytest.approx(loss, rel=1e-10)
    for parameter, before, g in zip(controller.policy.parameters(), weights, gradient, strict=True):
        assert np.abs(g).max() > 1e-4
        np.testing.assert_allclose(parameter.grad.numpy(), g, rtol=1e-8, atol=1e-12)
        # Adam's first step: lr * g / (|g| + eps)
        np.testing.assert_allclose(parameter.detach().numpy(), before - 0.01 * g / (np.abs(g) + 1e-8), atol=1e-12)


def test_the_policy_starts_at_beta_2_2_in_every_state_and_samples_it():
    policy = BetaPolicy()
    states = torch.empty(500, 6, dtype=torch.float64).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    a, b = policy(states)
    torch.testing.assert_close(torch.stack([a, b]), torch.full((2, 500), 2.0, dtype=torch.float64))
    x = sample_beta(a.repeat(40), b.repeat(40), torch.Generator().manual_seed(1))
    # Beta(2, 2): mean 1/2, variance 1/20; four standard errors at 20,000 draws
    assert abs(x.mean() - 0.5) < 4 * math.sqrt(0.05 / 20_000)
    assert abs(x.var() - 0.05) < 0.0014


def test_sampling_follows_an_asymmetric_beta():
    n = 20_000
    a, b = torch.full((n,), 5.0, dtype=torch.float64), torch.full((n,), 1.5, dtype=torch.float64)
    x = sample_beta(a, b, torch.Generator().manual_seed(2))
    mean, variance = 5 / 6.5, 5 * 1.5 / (6.5**2 * 7.5)
    assert abs(x.mean() - mean) < 4 * math.sqrt(variance / n)
    assert abs(x.var() / variance - 1) < 0.05


def set_beta(controller: ExposureController, a: float, b: float) -> None:
    with torch.no_grad():
        bias = torch.tensor([math.log(math.expm1(a - 1)), math.log(math.expm1(b - 1))], dtype=torch.float64)
        controller.policy.output.bias.copy_(bias)


def drive_without_progress(controller: ExposureController, steps: int) -> dict[str, float]:
    for step in range(steps):
        controller.alpha(step)
        log = controller.observe(step, loss=1.0, probe_nll=1.0)
    return log


def test_the_entropy_bound_acts_above_its_target_and_only_there():
    settings = {"max_steps": 40, "hold_window": 1, "lookahead": 1, "policy_batch_size": 2, "lambda_gt": 0.0}
    above = ExposureController(**settings)
    set_beta(above, 2.0, 2.0)  # entropy -0.125, target -0.5
    assert drive_without_progress(above, 40)["policy_entropy"] < -0.3
    below = ExposureController(**settings)
    set_beta(below, 12.0, 12.0)  # entropy -0.87
    before = [p.detach().clone() for p in below.policy.parameters()]
    drive_without_progress(below, 40)
    assert all(torch.equal(p, q) for p, q in zip(below.policy.parameters(), before, strict=True))


def test_the_entropy_coefficient_rises_linearly_to_its_setting():
    controller = ExposureController(
        max_steps=10, hold_window=1, lookahead=1, policy_batch_size=1, lambda_gt=0.0, entropy_coef=2.0
    )
    coefs = []
    for step in range(12):
        controller.alpha(step)
        coefs.append(controller.observe(step, loss=1.0, probe_nll=1.0).get("entropy_coef"))
    assert coefs[0] is None
    assert coefs[1:] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.0, 2.0])


def test_alpha_is_clipped_and_the_policy_learns_from_the_sample_before_the_clip():
    controller = ExposureController(
        max_steps=50, hold_window=1, lookahead=50, lambda_gt=0.0, alpha_min=0.45, alpha_max=0.55
    )
    alphas = [m["alpha"] for m in drive(controller, range(40))]
    samples = [d.samples[0] for d in controller.ledger.pending]
    assert min(alphas) == 0.45 and max(alphas) == 0.55
    assert min(samples) < 0.4 and max(samples) > 0.6
    assert alphas == [min(0.55, max(0.45, x)) for x in samples]


def test_the_deterministic_exposure_is_the_clipped_mean():
    controller = ExposureController(max_steps=10)
    set_beta(controller, 6.0, 2.0)
    assert controller.alpha(0, deterministic=True) == pytest.approx(0.75)
    controller.alpha_max = 0.7
    assert controller.alpha(0, deterministic=True) == 0.7
    assert controller.window_start is None


@pytest.mark.parametrize("signal", ["probe_nll", "distill_loss"])
@pytest.mark.parametrize("between_calls", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 2, 5, 8, 13])
def test_a_controller_resumed_anywhere_continues_to_the_last_bit(signal, between_calls, cut):
    settings = {"max_steps": 30, "hold_window": 3, "lookahead": 7, "policy_batch_size": 2, "progress_signal": signal}
    whole = ExposureController(**settings, seed=1)
    expected = drive(whole, range(30))
    assert sum("policy_loss" in log for log in expected) >= 3
    first = ExposureController(**settings, seed=1)
    drive(first, range(cut))
    if between_calls:
        first.alpha(cut)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second = ExposureController(**settings, seed=77)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert drive(second, range(cut, 30)) == expected[cut:]
    assert second.finish() == whole.finish()
    for p, q in zip(second.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_kept_state_does_not_change_when_training_goes_on():
    controller = ExposureController(max_steps=30, lookahead=2, policy_batch_size=2)
    drive(controller, range(9))
    state = controller.state_dict()
    weights = {name: w.clone() for name, w in state["policy"].items()}
    moments = state["optimizer"]["state"][0]["exp_avg"].clone()
    drive(controller, range(9, 30))
    assert not torch.equal(controller.policy.output.weight, weights["output.weight"])
    assert all(torch.equal(state["policy"][name], w) for name, w in weights.items())
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], moments)


@pytest.mark.parametrize(
    ("max_steps", "H", "L", "B"),
    [
        (1, 1, 1, 1),
        (1, 5, 5, 4),
        (3, 5, 9, 4),
        (12, 2, 4, 4),
        (12, 1, 30, 3),
        (13, 4, 1, 2),
        (30, 1, 6, 1),
        (31, 3, 7, 4),
    ],
)
def test_every_decision_of_any_horizon_is_learned_from_or_counted_as_dropped(max_steps, H, L, B, monkeypatch):
    controller = ExposureController(max_steps=max_steps, hold_window=H, lookahead=L, policy_batch_size=B)
    learned, update = [], controller._update
    monkeypatch.setattr(controller, "_update", lambda batch: learned.extend(d.start for d, _ in batch) or update(batch))
    for step in range(max_steps):
        controller.observe(step, **measure(step, controller.alpha(step)) | {"probe_nll": 3 - 0.1 * step})
    last = controller.finish()
    windows = list(range(0, max_steps, H))
    assert sorted(learned) == learned == windows[: len(learned)]
    assert len(learned) + last["decisions_dropped"] == len(windows)
    # Only what has no known step, or no other decision to be compared with, is dropped
    assert last["decisions_dropped"] <= 2
    assert all(math.isfinite(v) for v in last.values())
    assert controller.finish() == {"decisions_truncated": 0, "decisions_dropped": 0}


def test_finish_pays_a_truncated_decision_for_the_steps_it_has():
    controller = ExposureController(max_steps=4, hold_window=1, lookahead=3, reward_gamma=0.5, lambda_gt=0.0)
    for step, nll in enumerate([1.0, 0.9, 0.7, 0.7]):
        controller.alpha(step)
        log = controller.observe(step, loss=1.0, probe_nll=nll)
    # step 0 is complete: .1 + .2/2 + 0. Of the others, scaled to 1 + 1/2 + 1/4 = 1.75:
    # step 1 has .2 + 0 over 1.5, step 2 has 0 over 1, step 3 has nothing
    assert log["reward"] == pytest.approx(0.2)
    last = controller.finish()
    assert last["reward"] == pytest.approx((0.2 * 1.75 / 1.5 + 0.0) / 2)
    assert (last["decisions_truncated"], last["decisions_dropped"]) == (2, 1)
    assert "policy_loss" in last


def test_a_skipped_step_does_not_stop_learning():
    controller = ExposureController(max_steps=20, hold_window=2, lookahead=2, policy_batch_size=2)
    logs = []
    for step in range(20):
        measured = measure(step, controller.alpha(step)) | {"probe_nll": 3 - 0.1 * step}
        if step == 5:
            measured = {"loss": math.nan, "mismatch": math.nan, "grounded": None}
        if step != 9:  # not even reported
            logs.append(controller.observe(step, **measured))
    assert sum("policy_loss" in log for log in logs) == 4
    assert all(torch.isfinite(p).all() for p in controller.policy.parameters())


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"lambda_gt": 0.1}, "grounded"), ({"lambda_gt": 0.0, "progress_signal": "probe_nll"}, "probe_nll")],
)
def test_a_signal_that_never_comes_is_warned_about_once_by_name(settings, named):
    controller = ExposureController(max_steps=30, lookahead=3, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(20):
            controller.alpha(step)
            controller.observe(step, loss=1.0, probe_nll=1.0 if named == "grounded" else None)
    assert len(caught) == 1
    assert f"no {named} was observed up to step 3" in str(caught[0].message)


def test_calls_out_of_order_are_refused():
    controller = ExposureController(max_steps=10, hold_window=2)
    with pytest.raises(ValueError, match=r"observe\(0\) without alpha\(0\)"):
        controller.observe(0, loss=1.0)
    controller.alpha(4)
    with pytest.raises(ValueError, match="step 3 is before"):
        controller.alpha(3)
    with pytest.raises(ValueError, match=r"observe\(6\) without alpha\(6\)"):
        controller.observe(6, loss=1.0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("hold_window", 0), ("lookahead", 0), ("policy_batch_size", 0), ("max_steps", 0), ("reward_gamma", 1.5)]
    + [("alpha_min", -0.1), ("alpha_max", 1.1), ("progress_signal", "accuracy")],
)
def test_an_impossible_setting_is_refused_by_name_and_value(setting, value):
    with pytest.raises(ValueError, match=rf"{setting}.*{value}"):
        ExposureController(**{"max_steps": 10, setting: value})


def test_without_per_example_every_problem_gets_the_exposure_of_the_step():
    controller = ExposureController(max_steps=10)
    assert controller.alphas(0, [0.5, -2.0, 0.0]) == [controller.alpha(0)] * 3


def test_a_per_example_decision_weighs_its_problems_equally_and_ignores_what_came_after_its_reward():
    settings = {"max_steps": 10, "hold_window": 2, "lookahead": 1, "policy_batch_size": 2, "lambda_gt": 0.0}
    controller = ExposureController(**settings, per_example=True)
    drawn = {}
    for step in range(4):
        drawn[step] = controller.alphas(step, [1.0, -1.0, 0.0][: 2 + step % 2])
        log = controller.observe(step, loss=1.0, probe_nll=[2.0, 1.0, 0.9, 0.8][step])
    assert len(set(drawn[0] + drawn[1])) == 5
    # Rewards 1.0 (t0 = 0) and 0.1 (t0 = 2): advantages 1 and -1. Problems of steps 1 and 3 were drawn after the reward.
    assert log["advantage"] == pytest.approx(-1.0, abs=1e-5)
    log_pi = [np.mean([beta_terms(2.0, 2.0, x)[0] for x in drawn[step]]) for step in (0, 2)]
    penalty = log["entropy_coef"] * (beta_terms(2.0, 2.0, 0.5)[1] + 0.5) ** 2
    assert log["policy_loss"] == pytest.approx(-(log_pi[0] - log_pi[1]) / 2 + penalty, abs=1e-6)
