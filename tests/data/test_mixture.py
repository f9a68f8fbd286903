"""Shares and their apportionment, against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from headwater.data.mixture import MixtureSpec, apportion, shares
from headwater.errors import HeadwaterError

quick = settings(max_examples=60, deadline=None)

sizes_and_weights = st.lists(st.tuples(st.integers(0, 10**6), st.floats(0.01, 100)), min_size=1, max_size=8).filter(
    lambda pairs: any(n for n, _ in pairs)
)


@quick
@given(sizes_and_weights, st.floats(0.2, 20))
def test_shares_follow_their_formula(pairs, temperature):
    sizes, weights = zip(*pairs, strict=True)
    formulas = {
        "proportional": lambda n, w: w * n,
        "temperature": lambda n, w: w * n ** (1 / temperature),
        "uniform": lambda n, w: w * (n > 0),
        "weights": lambda n, w: w * (n > 0),
    }
    for strategy, formula in formulas.items():
        parts = [formula(n, w) for n, w in pairs]
        spec = MixtureSpec(strategy=strategy, temperature=temperature)
        assert shares(sizes, weights, spec) == pytest.approx([p / sum(parts) for p in parts], rel=1e-9, abs=1e-15)


def test_limits_of_temperature():
    sizes, even = [10, 1000, 200], [1.0] * 3
    hot = shares(sizes, even, MixtureSpec(strategy="temperature", temperature=1e9))
    assert hot == pytest.approx([1 / 3] * 3)
    one = shares(sizes, even, MixtureSpec(strategy="temperature", temperature=1))
    assert one == pytest.approx(shares(sizes, even, MixtureSpec()))
    cold = shares(sizes, even, MixtureSpec(strategy="temperature", temperature=1e-4))
    assert cold == pytest.approx([0, 1, 0])


def test_balanced_batches_leave_no_room_for_other_shares():
    balanced = MixtureSpec(batching="balanced")
    assert shares([10, 0, 1000], [1.0] * 3, balanced) == [0.5, 0, 0.5]
    with pytest.raises(HeadwaterError, match="weights differ"):
        shares([10, 10], [1.0, 2.0], balanced)
    for strategy in ("temperature", "weights"):
        with pytest.raises(ValidationError, match="balanced batches"):
            MixtureSpec(strategy=strategy, batching="balanced")


def test_no_rows_at_all():
    with pytest.raises(HeadwaterError, match="no task has training rows"):
        shares([0, 0], [1.0, 1.0], MixtureSpec())


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": float("nan")}, {"strategy": "x"}, {"temp": 1}])
def test_specs_that_are_refused(fields):
    with pytest.raises(ValidationError):
        MixtureSpec(**fields)


@quick
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=10).filter(any), st.integers(1, 5000))
def test_apportionment_is_that_of_largest_remainders(parts, total):
    exact = [Fraction(part, sum(parts)) * total for part in parts]
    assume(all(quota >= 1 or quota == 0 for quota in exact))
    floors = [int(quota) for quota in exact]
    by_remainder = sorted(range(len(parts)), key=lambda t: (floors[t] - exact[t], t))
    for t in by_remainder[: total - sum(floors)]:
        floors[t] += 1
    assert apportion([part / sum(parts) for part in parts], total) == floors


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=10).filter(any), st.integers(1, 5000))
def test_every_task_with_a_share_is_seen(parts, total):
    given_shares = [part / sum(parts) for part in parts]
    with_a_share = sum(share > 0 for share in given_shares)
    if total < with_a_share:
        with pytest.raises(HeadwaterError, match=f"{total} draws cannot hold all of {with_a_share} tasks"):
            apportion(given_shares, total)
        return
    counts = apportion(given_shares, total)
    assert sum(counts) == total
    assert all((count > 0) == (share > 0) for count, share in zip(counts, given_shares, strict=True))
    assert all(count < share * total + 1 + 1e-6 for count, share in zip(counts, given_shares, strict=True))


@quick
@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=20))
def test_proportional_shares_of_as_many_draws_as_rows_give_every_row_one_draw(sizes):
    assert apportion(shares(sizes, [1.0] * len(sizes), MixtureSpec()), sum(sizes)) == sizes
