"""The statistics against enumeration, hand values and simulation: nothing here shares code with what it checks."""

from itertools import combinations, permutations

import numpy as np
import pytest

from atesd.evaluation.statistics import estimate, majority_vote, pass_at, pass_at_levels, t_quantile


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_j_is_the_share_of_all_subsets_that_hold_a_right_sample(n):
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for j in range(1, n + 1):
            subsets = list(combinations(samples, j))
            assert pass_at(j, c, n) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_j_stays_exact_for_numbers_whose_binomials_overflow_a_float():
    assert pass_at(1000, 1, 2000) == 0.5
    assert pass_at(1, 0, 2000) == 0.0


def test_pass_at_j_of_more_samples_than_there_are_is_refused():
    with pytest.raises(ValueError, match="pass@5 of 1 right among 4"):
        pass_at(5, 1, 4)


def test_pass_levels_are_powers_of_two_and_k():
    assert [pass_at_levels(k) for k in (1, 2, 3, 8, 12)] == [[], [2], [2, 3], [2, 4, 8], [2, 4, 8, 12]]


@pytest.mark.parametrize(
    ("votes", "correct", "score"),
    [
        (["7", "7", "9"], [1, 1, 0], 1),
        (["9", "9", "7"], [0, 0, 1], 0),
        (["7", "9"], [1, 0], 1 / 2),
        (["7", "9", "4"], [1, 0, 0], 1 / 3),
        (["9", "9", "4", "4", "7"], [0, 0, 0, 0, 1], 0),
        ([None, None, "7"], [0, 0, 1], 1),
        ([None, None], [0, 0], 0),
        (["1/2", "0.5", "9", "9"], [1, 1, 0, 0], 1 / 2),  # right answers are one answer, however written
        ([], [], 0),
    ],
)
def test_the_majority_decides_and_ties_share(votes, correct, score):
    assert majority_vote(votes, [bool(c) for c in correct]) == pytest.approx(score)


def test_the_majority_does_not_depend_on_the_order_of_the_samples():
    samples = [("7", True), ("7", True), ("9", False), ("9", False), (None, False)]
    assert {majority_vote(*zip(*order, strict=True)) for order in permutations(samples)} == {0.5}


def test_a_tie_scores_what_drawing_lots_would_score_on_average():
    rng = np.random.default_rng(0)
    counts = {"right": 3, "a": 3, "b": 3, "c": 1}
    lots = [max(counts, key=lambda name: (counts[name], rng.random())) for _ in range(20_000)]
    votes = [name for name, count in counts.items() for _ in range(count)]
    assert majority_vote(votes, [v == "right" for v in votes]) == pytest.approx(lots.count("right") / 20_000, abs=0.015)


def test_the_interval_of_three_problems_is_that_of_all_twenty_seven_resamples():
    values = np.array([0.0, 0.25, 1.0])
    every = sorted(np.mean([a, b, c]) for a in values for b in values for c in values)
    got = estimate(values, confidence=0.5, num_bootstrap=200_000)[0]
    # level 0.5 with two degrees of freedom: t = 0.8165, times sqrt(3 / 2) is 1, so the tails are Phi(-1) = 0.159 each
    expected = np.quantile(every, [0.1587, 0.8413])
    assert got.value == pytest.approx(5 / 12)
    assert (got.low, got.high) == pytest.approx(tuple(expected), abs=0.05)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    truth, problems, k, rounds = 0.5, 8, 12, 2000
    hits = 0
    for r in range(rounds):
        skill = rng.beta(0.5, 0.5, problems)
        scores = rng.binomial(k, skill) / k
        got = estimate(scores, num_bootstrap=500, seed=r)[0]
        hits += got.low <= truth <= got.high
    assert 0.935 <= hits / rounds <= 0.975  # 95 % with a standard error of 0.5; plain percentiles reach 0.91


def test_a_paired_interval_sees_a_difference_that_separate_intervals_cannot():
    rng = np.random.default_rng(2)
    a = rng.random(40)
    b = a + 0.05 + rng.normal(0, 0.02, 40)
    (alone_a,), (alone_b,) = estimate(a), estimate(b)
    (paired,) = estimate(b - a)
    assert alone_a.high > alone_b.low  # they overlap
    assert 0 < paired.low < 0.05 < paired.high < 0.1


def test_the_same_seed_gives_the_same_interval_and_one_problem_gives_none():
    values = np.random.default_rng(3).random((12, 3))
    assert estimate(values) == estimate(values)
    assert estimate(np.array([0.4]))[0].low is None
    assert estimate(np.ones(5))[0] == estimate(np.ones(5), seed=1)[0]


@pytest.mark.parametrize(("degrees", "tabled"), [(3, 3.182), (5, 2.571), (10, 2.228), (29, 2.045), (1000, 1.962)])
def test_student_s_t_is_the_tabled_one(degrees, tabled):
    assert t_quantile(0.975, degrees) == pytest.approx(tabled, rel=0.01)
