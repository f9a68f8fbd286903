"""Metrics of generated answers, and intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.evaluation import TaskScore, interval, mean_score
from headwater.evaluation.metrics import GENERATION_METRICS, exact_match, final_number, number_after_mark


@pytest.mark.parametrize(
    ("prediction", "reference", "wanted"),
    [
        (" aunt", "aunt", 1.0),
        ("aunt\n", " aunt", 1.0),
        ("Aunt", "aunt", 0.0),
        ("aunt and uncle", "aunt", 0.0),
        ("", "aunt", 0.0),
    ],
)
def test_exact_match(prediction, reference, wanted):
    assert exact_match(prediction, reference) == wanted


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234,567", "1234567"),
        ("####-3.50 dollars", "-3.5"),
        ("#### $12.", "12"),
        ("#### .5", "0.5"),
        ("#### none\n#### 8", "8"),
        ("#### 8\n#### 9", "8"),
        ("### 8", None),
        ("the answer is 8", None),
    ],
)
def test_number_after_mark(text, number):
    found = number_after_mark(text)
    assert (None if found is None else float(found)) == (None if number is None else float(number))


def test_final_number_compares_values_and_wants_the_mark():
    assert final_number("... #### 1,200.00", "60 * 20\n#### 1200") == 1.0
    assert final_number("#### 1201", "#### 1200") == 0.0
    assert final_number("1200", "#### 1200") == 0.0
    assert final_number("#### 42", " 42 ") == 0.0  # as in a task's file
    assert final_number("#### 42", "forty-two") == 0.0
    assert final_number("#### 42", "not 42") == 0.0


ALPHABET = st.text("#### 0123456789.,$-ab\n", max_size=40)


@given(st.sampled_from(sorted(GENERATION_METRICS)), ALPHABET, ALPHABET, st.sampled_from(["#### 12", "ab", "7"]))
def test_what_is_settled_no_longer_changes(name, text, more, reference):
    metric = GENERATION_METRICS[name]
    if metric.settled(text, reference):
        assert metric.score(text + more, reference) == metric.score(text + " ", reference)


def test_a_finished_number_settles():
    assert GENERATION_METRICS["final_number"].settled("#### 12\n", "#### 12")
    assert not GENERATION_METRICS["final_number"].settled("#### 12", "#### 12")
    assert not GENERATION_METRICS["final_number"].settled("#### 12.", "#### 12")


@given(st.integers(1, 400), st.data())
def test_wilson_ends_solve_its_equation(n, data):
    """At both ends p of the interval, the observed share lies 1.96 standard errors (of p itself) away."""
    right = data.draw(st.integers(0, n))
    share = right / n
    low, high = interval([1.0] * right + [0.0] * (n - right))
    for end, clipped in ((low, right == 0), (high, right == n)):
        if not clipped:
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-4)
    assert 0 <= low <= share <= high <= 1
    assert low < high


def test_other_values_get_a_bootstrap_interval_that_is_always_the_same():
    values = np.random.default_rng(1).normal(3, 1, size=400).tolist()
    low, high = interval(values)
    assert (low, high) == interval(values)
    half = 1.96 * np.std(values) / 20  # what the normal approximation gives
    assert low == pytest.approx(np.mean(values) - half, abs=0.02)
    assert high == pytest.approx(np.mean(values) + half, abs=0.02)


def test_the_bootstrap_interval_leaves_out_a_fortieth_at_either_end():
    """Of 40 fair coins at most 13 are heads with probability 0.019, at most 14 with 0.040 and at most 15 with 0.077."""
    assert interval([1.0, 3.0] * 20) == pytest.approx((1 + 2 * 14 / 40, 1 + 2 * 26 / 40))


def test_weights_count_like_repeated_evidence():
    low, high = interval([1.0, 3.0] * 50, [9.0, 1.0] * 50)
    assert low < 1.2 < high
    assert high < 1.5


def test_values_that_do_not_differ_have_no_bootstrap_interval():
    assert interval([6.071]) is None
    assert interval([6.071], [12.0]) is None
    assert interval([0.0] * 6, [1.0] * 6) is None  # differences row by row, of which none is another
    low, high = interval([1.0])  # Wilson's knows what one row may say
    assert low < 0.5 < high


def test_interval_of_nothing():
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_mean_leaves_losses_out():
    def score(metric, value):
        return TaskScore("t", metric, value, 1, None, [value])

    assert mean_score([score("exact_match", 0.2), score("loss", 7.0), score("choice_accuracy", 0.6)]) == pytest.approx(
        0.4
    )
    assert mean_score([score("loss", 7.0)]) is None
