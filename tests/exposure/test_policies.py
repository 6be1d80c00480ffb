"""Every exposure policy behind the one interface: what it chooses, and that it resumes exactly."""

import pytest
import torch

from atesd.exposure.controller import ExposureController
from atesd.exposure.policies import POLICY_NAMES, make_policy

SETTINGS = {"max_steps": 12, "hold_window": 3, "lookahead": 4, "policy_batch_size": 2, "fixed_alpha": 0.3, "seed": 5}


def drive(policy, steps):
    trail = []
    for step in steps:
        alpha = policy.alpha(step)
        measured = {"loss": 1 / (1 + step) + alpha, "mismatch": 0.2, "confidence": 0.6, "grounded": -alpha}
        trail.append((alpha, policy.observe(step, probe_nll=2 - 0.1 * step * alpha, **measured)))
    return trail


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_policy_holds_its_exposure_within_a_window_and_stays_in_range(name):
    alphas = [alpha for alpha, _ in drive(make_policy(name, **SETTINGS), range(12))]
    assert all(0 <= alpha <= 1 for alpha in alphas)
    assert all(alphas[step] == alphas[step - step % 3] for step in range(12))


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("cut", [1, 3, 7])
def test_every_policy_resumes_to_the_last_bit(name, cut):
    whole = make_policy(name, **SETTINGS)
    expected = drive(whole, range(12))
    first = make_policy(name, **SETTINGS)
    drive(first, range(cut))
    state = first.state_dict()
    drive(first, range(cut, 12))  # going on with the first must not reach into the saved state
    second = make_policy(name, **{**SETTINGS, "seed": 99})
    second.load_state_dict(state)
    assert drive(second, range(cut, 12)) == expected[cut:]
    assert second.finish() == whole.finish()


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_policy_leaves_the_global_random_state_alone(name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drive(make_policy(name, **SETTINGS), range(12))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_asking_for_the_deterministic_exposure_changes_nothing(name):
    asked, unasked = make_policy(name, **SETTINGS), make_policy(name, **SETTINGS)
    trail = []
    for step in range(12):
        assert 0 <= asked.alpha(step, deterministic=True) <= 1
        trail += drive(asked, [step])
    assert trail == drive(unasked, range(12))


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_checkpoint_of_another_policy_is_refused_by_name(name):
    other = "full" if name != "full" else "fixed"
    with pytest.raises(ValueError, match=f"'{other}'.*'{name}'"):
        make_policy(name, **SETTINGS).load_state_dict(make_policy(other, **SETTINGS).state_dict())


def test_full_is_one_exactly_whatever_the_clip_says():
    assert make_policy("full", **SETTINGS, alpha_max=0.9).alpha(5) == 1.0


def test_fixed_is_its_setting_exactly():
    for alpha in (0.0, 0.25, 0.3, 1.0):
        assert make_policy("fixed", fixed_alpha=alpha).alpha(7) == alpha


def test_schedules_start_and_end_where_they_say():
    linear = [make_policy("linear", max_steps=10, hold_window=2, alpha_min=0.2).alpha(t) for t in range(12)]
    assert linear == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8, 1.0, 1.0, 1.0, 1.0])
    cosine = [
        make_policy("cosine", max_steps=5, hold_window=1, start_alpha=1.0, end_alpha=0.0).alpha(t) for t in range(5)
    ]
    assert cosine == pytest.approx([1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0.0])


def test_a_schedule_of_a_single_window_stays_at_its_start():
    assert make_policy("linear", max_steps=2, hold_window=5, alpha_min=0.1).alpha(1) == 0.1


def test_random_covers_its_range_uniformly_and_differs_by_seed():
    policy = make_policy("random", alpha_min=0.2, alpha_max=0.6, hold_window=1, seed=1)
    draws = torch.tensor([policy.alpha(t) for t in range(2000)])
    # uniform on [0.2, 0.6]: mean 0.4, deviation 0.1155; four standard errors of 2000 draws are 0.0104
    assert abs(draws.mean() - 0.4) < 0.0104
    assert 0.2 <= draws.min() < 0.21
    assert 0.59 < draws.max() <= 0.6
    assert make_policy("random", seed=2).alpha(0) != make_policy("random", seed=3).alpha(0)


def test_one_step_is_the_controller_with_a_lookahead_of_one():
    policy = make_policy("one_step", **SETTINGS)
    assert isinstance(policy, ExposureController)
    assert (policy.name, policy.L) == ("one_step", 1)
    rewarded = [step for step, (_, metrics) in enumerate(drive(policy, range(8))) if "reward" in metrics]
    assert rewarded == [1, 4, 7]


def test_an_unknown_policy_or_setting_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown exposure policy 'adaptive'.*atesd"):
        make_policy("adaptive")
    with pytest.raises(TypeError, match=r"holdwindow.*hold_window"):
        make_policy("full", holdwindow=2)


def test_an_exposure_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"'fixed'.*1\.5"):
        make_policy("fixed", fixed_alpha=1.5)
