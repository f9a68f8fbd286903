"""Pairs within prompts, from the order of the scores alone."""

import math
import random

import pytest

from headwater.preference.pairs import make_pairs, mean_of_standardised


def scored(prompts=5, responses=6, seed=0):
    draw = random.Random(seed)
    return [[draw.random() for _ in range(responses)] for _ in range(prompts)]


def test_pairs_never_cross_prompts_and_the_better_one_is_chosen():
    """Sorting the whole batch at once would pair the best prompt's responses with all others'."""
    scores = [[10.0, 11.0], [0.0, 1.0], [5.0, 5.0]]
    pairs = make_pairs(scores, per_prompt=4)
    assert [(p.prompt, p.chosen, p.rejected, p.gap) for p in pairs] == [(0, 1, 0, 1.0), (1, 1, 0, 1.0)]
    for pair in make_pairs(scored(), per_prompt=9):
        assert scored()[pair.prompt][pair.chosen] > scored()[pair.prompt][pair.rejected]


def test_as_many_as_asked_for_each_prompt_without_repeats():
    pairs = make_pairs(scored(), per_prompt=7)
    for prompt in range(5):
        mine = [(p.chosen, p.rejected) for p in pairs if p.prompt == prompt]
        assert len(mine) == len(set(mine)) == 7
    assert len(make_pairs(scored(responses=3), per_prompt=7)) == 5 * 3  # three ordered pairs are all there are


def test_only_the_order_counts():
    scores = scored()
    transformed = [[math.exp(5 * v) - 3 for v in values] for values in scores]
    assert [(p.chosen, p.rejected) for p in make_pairs(scores, per_prompt=4, seed=3)] == [
        (p.chosen, p.rejected) for p in make_pairs(transformed, per_prompt=4, seed=3)
    ]
    other = make_pairs(scores, per_prompt=4, seed=4)
    assert make_pairs(scores, per_prompt=4, seed=3) != other
    assert make_pairs(scores, per_prompt=4, seed=4) == other


def test_the_gap_is_enforced():
    scores = [[0.0, 0.1, 0.5]]
    gaps = sorted(p.gap for p in make_pairs(scores, per_prompt=9, min_gap=0.1))
    assert gaps == pytest.approx([0.4, 0.5])
    assert make_pairs([[1.0, 1.0], [2.0]], per_prompt=9) == []
    assert make_pairs([[]], per_prompt=9) == []


def test_best_only_pairs_the_best_response_once():
    for seed in range(8):
        pairs = make_pairs(scored(), per_prompt=9, best_only=True, seed=seed)
        assert [p.prompt for p in pairs] == [0, 1, 2, 3, 4]
        assert all(scored()[p.prompt][p.chosen] == max(scored()[p.prompt]) for p in pairs)


def test_an_ensemble_is_not_ruled_by_the_source_with_the_largest_numbers():
    loud, quiet, silent = [[100.0, 0.0, 0.0]], [[0.0, 0.1, 0.1]], [[3.0, 3.0, 3.0]]
    (mean,) = mean_of_standardised([loud, quiet, silent])
    assert mean == pytest.approx([0.0, 0.0, 0.0])
    (mean,) = mean_of_standardised([loud, silent])
    assert mean == pytest.approx([math.sqrt(2) / 2, -math.sqrt(2) / 4, -math.sqrt(2) / 4])
