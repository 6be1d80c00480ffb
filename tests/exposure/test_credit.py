"""Delayed credit, checked against sums worked out by hand."""

import math

import pytest

from atesd.exposure.credit import Decision, Ledger, Trace, advantages, grounded_score, learning_progress, reward


def decision(start: int) -> Decision:
    return Decision(start, [[0.0] * 6], [0.5])


def test_learning_progress_is_the_discounted_sum_of_falls_and_a_rise_costs_nothing():
    # 1.0 -> 0.8 falls 0.2, 0.8 -> 0.9 rises, 0.9 -> 0.6 falls 0.3: 0.2 + 0 + 0.25 * 0.3
    assert learning_progress([1.0, 0.8, 0.9, 0.6], gamma=0.5) == pytest.approx(0.275, abs=1e-15)


def test_grounded_score_is_a_weighted_mean_so_a_constant_score_is_itself():
    assert grounded_score([-2.0] * 5, gamma=0.7) == pytest.approx(-2.0, abs=1e-15)
    assert grounded_score([-1.0, -2.0, -3.0], gamma=0.5) == pytest.approx(-2.75 / 1.75, abs=1e-15)


def test_gamma_zero_looks_one_step_ahead():
    assert learning_progress([1.0, 0.9, 0.0], gamma=0.0) == pytest.approx(0.1)
    assert grounded_score([-1.0, -9.0], gamma=0.0) == -1.0


def test_reward_adds_the_weighted_grounded_score():
    assert reward(0.275, -1.5, 0.1) == pytest.approx(0.125)


def test_a_truncated_decision_of_constant_progress_earns_what_a_full_one_does():
    full = learning_progress([1.0, 0.9, 0.8, 0.7, 0.6], gamma=0.5)
    assert learning_progress([1.0, 0.9, 0.8], gamma=0.5, lookahead=4) == pytest.approx(full)
    assert learning_progress([1.0, 0.9, 0.8], gamma=0.5) < 0.9 * full


def test_advantages_are_centred_and_scaled():
    # mean 2, deviations -1, 0, 1, std sqrt(2/3)
    assert advantages([1.0, 2.0, 3.0], eps=0.0) == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)])
    assert advantages([1.0, 3.0], eps=1.0) == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize("rewards", [[0.7], [0.1, 0.1, 0.1]])
def test_equal_rewards_prefer_nothing(rewards):
    assert advantages(rewards) == pytest.approx([0.0] * len(rewards), abs=1e-6)


def test_too_few_values_are_refused_with_what_is_missing():
    with pytest.raises(ValueError, match="at least one later step, got 1"):
        learning_progress([1.0], gamma=0.9)
    with pytest.raises(ValueError, match="at least one score"):
        grounded_score([], gamma=0.9)


def test_a_signal_measured_every_few_steps_is_linear_in_between():
    trace = Trace()
    for step, value in enumerate((None, 4.0, None, math.nan, 1.0, None)):
        trace.record(step, value)
    assert trace.known_until == 4
    assert trace.window(0, 4) == pytest.approx([4.0, 4.0, 3.0, 2.0, 1.0])


def test_a_signal_is_unknown_after_its_last_measurement():
    trace = Trace()
    trace.record(0, 1.0)
    trace.record(1, None)
    with pytest.raises(KeyError):
        trace.window(0, 1)


def test_measuring_backwards_is_refused():
    trace = Trace()
    trace.record(3, 1.0)
    with pytest.raises(ValueError, match="step 3 was measured after step 3"):
        trace.record(3, 1.0)


def test_forgetting_keeps_what_pending_decisions_and_the_next_line_need():
    trace = Trace()
    for step in range(6):
        trace.record(step, float(-step))
    trace.forget_before(4)
    assert trace.window(4, 5) == [-4.0, -5.0]
    assert len(trace.values) == 2
    trace.forget_before(100)
    trace.record(7, -9.0)
    assert trace.window(5, 7) == [-5.0, -7.0, -9.0]


def test_decisions_overlap_and_each_is_paid_exactly_when_its_last_step_is_known():
    ledger = Ledger(lookahead=3, gamma=1.0, lambda_gt=0.0)
    paid_at = {}
    for step in range(8):
        if step % 2 == 0:
            ledger.pending.append(decision(step))
        ledger.record(step, 10.0 - step, None)
        for paid, earned in ledger.settle()[0]:
            paid_at[paid.start] = step
            assert earned == pytest.approx(3.0)  # the signal falls by one a step
    assert paid_at == {0: 3, 2: 5, 4: 7}
    assert [d.start for d in ledger.pending] == [6]


def test_a_decision_waits_for_the_grounded_score_only_if_it_counts():
    for lambda_gt, expected in ((0.0, 1), (0.5, 0)):
        ledger = Ledger(lookahead=1, gamma=1.0, lambda_gt=lambda_gt)
        ledger.pending.append(decision(0))
        ledger.record(0, 1.0, None)
        ledger.record(1, 0.5, None)
        assert len(ledger.settle()[0]) == expected


def test_decisions_between_two_probes_share_the_change_evenly_whatever_their_phase():
    ledger = Ledger(lookahead=2, gamma=0.5, lambda_gt=0.0)
    earned = []
    for step in range(9):
        ledger.pending.append(decision(step))
        ledger.record(step, 8.0 - step if step % 4 == 0 else None, None)
        earned += [r for _, r in ledger.settle()[0]]
    assert earned == pytest.approx([1.5] * 7)


def test_a_falling_exposure_pays_in_distill_loss_and_not_in_probe_nll():
    """A student that learns nothing: the distillation loss is proportional to alpha, the probe NLL constant."""
    alphas = [0.9, 0.9, 0.1, 0.1, 0.9, 0.9]
    rewards = {}
    for name, signal in (("distill_loss", [0.1 * a for a in alphas]), ("probe_nll", [1.5] * 6)):
        ledger = Ledger(lookahead=2, gamma=1.0, lambda_gt=0.0)
        ledger.pending = [decision(0), decision(2)]
        for step, value in enumerate(signal):
            ledger.record(step, value, None)
        rewards[name] = [r for _, r in ledger.settle()[0]]
    assert rewards["probe_nll"] == [0.0, 0.0]
    assert rewards["distill_loss"] == pytest.approx([0.08, 0.0])  # 0.9 -> 0.1 is paid for, 0.1 -> 0.9 costs nothing


def test_inside_a_hold_window_distill_loss_is_not_confounded():
    ledger = Ledger(lookahead=1, gamma=1.0, lambda_gt=0.0)
    ledger.pending = [decision(0)]
    for step, alpha in enumerate([0.9, 0.9, 0.1]):
        ledger.record(step, 0.1 * alpha, None)
    assert ledger.settle()[0][0][1] == 0.0
