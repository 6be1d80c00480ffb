"""Exposure: floor(alpha * m) segments, exactly, and the whole solution at alpha = 1."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atesd.data.reading.context import exposed_text, num_exposed
from atesd.data.segmentation import Reference, split_reference

REFERENCE = Reference(segments=("One. ", "Two.\n", "Three. "), answer="6", tail="So $\\boxed{6}$.")


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(0, 2000))
def test_the_count_is_the_floor_of_the_exact_product_for_decimal_exposures(numerator, m):
    alpha = Fraction(numerator, 1000)
    assert num_exposed(float(alpha), m) == (alpha * m).__floor__()


@pytest.mark.parametrize(("alpha", "m", "expected"), [(0.3, 10, 3), (0.7, 10, 7), (0.29, 100, 29), (0.57, 100, 57)])
def test_rounding_of_alpha_costs_no_segment(alpha, m, expected):
    assert num_exposed(alpha, m) == expected
    float32 = pytest.importorskip("torch").tensor(alpha).item()
    assert num_exposed(float32, m) == expected


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 300))
def test_more_exposure_never_shows_fewer_segments(one, other, m):
    low, high = sorted((one, other))
    assert 0 <= num_exposed(low, m) <= num_exposed(high, m) <= m


@settings(deadline=None)
@given(st.integers(0, 5000))
def test_the_ends_are_exact(m):
    assert num_exposed(0.0, m) == 0
    assert num_exposed(1.0, m) == m
    assert m == 0 or num_exposed(1 - 1e-4, m) == m - (1 if m <= 10_000 else m // 10_000)


@settings(deadline=None)
@given(st.text(max_size=200), st.floats(0, 1))
def test_what_is_exposed_is_a_beginning_of_the_solution(solution, alpha):
    reference = split_reference(solution, "7")
    assert solution.startswith(exposed_text(reference, alpha))


def test_the_sentence_with_the_answer_is_exposed_at_full_exposure_only():
    assert exposed_text(REFERENCE, 0.999) == "One. Two.\n"
    assert exposed_text(REFERENCE, 1.0) == "One. Two.\nThree. So $\\boxed{6}$." == REFERENCE.solution


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), float("inf")])
def test_an_exposure_outside_zero_to_one_is_refused_with_its_value(alpha):
    with pytest.raises(ValueError, match=str(alpha)):
        num_exposed(alpha, 3)
