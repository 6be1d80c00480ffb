"""The six signals the exposure policy reads: their formulas, their bounds, and what a missing measurement does."""

import math

import pytest

from atesd.exposure.signals import SIGNAL_NAMES, TrainingSignals


def test_each_signal_follows_its_formula_on_two_steps_worked_out_by_hand():
    signals = TrainingSignals(decay=0.9)
    signals.update(0, alpha=0.5, loss=2.0, mismatch=0.1, confidence=0.6, probe_nll=1.0)
    signals.update(1, alpha=1.0, loss=1.0, mismatch=0.3, confidence=0.9, probe_nll=0.5)
    expected = {
        "step": 2 * 2 / 8 - 1,
        "alpha": 2 * 0.55 - 1,  # ema 0.9 * 0.5 + 0.1 * 1.0
        "loss": math.tanh((1.9 - 2.0) / 2.0),
        "mismatch": math.tanh((0.12 - 0.1) / 0.1),
        "probe_nll": math.tanh((0.95 - 1.0) / 1.0),
        "confidence": 2 * 0.9 - 1,
    }
    state = dict(zip(SIGNAL_NAMES, signals.state(max_steps=8), strict=True))
    assert state == pytest.approx(expected, abs=1e-12)


def test_signals_stay_in_bounds_for_extreme_values():
    signals = TrainingSignals()
    for step, value in enumerate((0.0, 1e30, -1e30, 1e-30, 5.0)):
        signals.update(step, alpha=1.0, loss=value, mismatch=value, confidence=7.0, probe_nll=value)
        assert all(-1 <= s <= 1 for s in signals.state(max_steps=2))


def test_a_scaled_loss_gives_the_same_signals():
    states = []
    for scale in (1.0, 1000.0):
        signals = TrainingSignals()
        for step, value in enumerate((0.3, 0.2, 0.25)):
            signals.update(step, 0.5, scale * value, scale * value, 0.5, scale * value)
        states.append(signals.state(max_steps=10))
    assert states[0] == pytest.approx(states[1], abs=1e-12)
    assert states[0][2] < 0  # and they say that the loss fell


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_missing_or_non_finite_measurement_leaves_its_signal_as_it_was(missing):
    signals = TrainingSignals()
    signals.update(0, alpha=0.5, loss=1.0, mismatch=1.0, confidence=0.5, probe_nll=1.0)
    signals.update(1, alpha=0.5, loss=0.5, mismatch=2.0, confidence=0.9, probe_nll=0.7)
    before = signals.state(max_steps=10)
    signals.update(2, alpha=0.5, loss=missing, mismatch=missing, confidence=missing, probe_nll=missing)
    assert signals.state(max_steps=10)[1:] == before[1:]
    assert signals.state(max_steps=10)[0] > before[0]


def test_nothing_measured_yet_is_the_neutral_state():
    assert TrainingSignals().state(max_steps=10) == [-1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_loaded_signals_continue_to_the_last_bit_and_share_nothing_with_their_source():
    one, two = TrainingSignals(), TrainingSignals()
    one.update(0, 0.3, 0.7, 0.2, 0.4, None)
    two.load_state_dict(one.state_dict())
    for signals in (one, two):
        signals.update(1, 0.4, 0.6, 0.1, 0.5, 1.1)
    assert one.state(7) == two.state(7)
    assert one.ema is not two.ema
