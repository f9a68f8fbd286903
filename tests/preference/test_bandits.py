"""Bandits against the direct solve, the dual form, MABWiser and what their equations promise."""

import json

import numpy as np
import pytest

from headwater.errors import HeadwaterError
from headwater.preference.bandits import Exp3, LinUCB, Picker, QuantileScale, RoundRobin, Single


def history(rounds=60, arms=3, dim=7, seed=0):
    random = np.random.default_rng(seed)
    contexts = random.normal(size=(rounds, dim))
    return random.integers(arms, size=rounds), contexts, random.random(rounds)


def learned(pulled, contexts, rewards, arms=3, alpha=0.7):
    bandit = LinUCB([f"arm {k}" for k in range(arms)], contexts.shape[1], alpha)
    for arm, context, reward in zip(pulled, contexts, rewards, strict=True):
        bandit.update(arm, context, reward, bandit.probability(arm))
    return bandit


def direct(pulled, contexts, rewards, arms, alpha, c):
    """The equations, with A_k summed up and solved."""
    scores = []
    for k in range(arms):
        A, b = np.eye(len(c)), np.zeros(len(c))
        for arm, context, reward in zip(pulled, contexts, rewards, strict=True):
            if arm == k:
                A += np.outer(context, context)
                b += reward * context
        scores.append(c @ np.linalg.solve(A, b) + alpha * np.sqrt(c @ np.linalg.solve(A, c)))
    return scores


def dual(pulled, contexts, rewards, arms, alpha, c):
    """The same by the kernel of an arm's own contexts."""
    scores = []
    for k in range(arms):
        X, y = contexts[pulled == k], rewards[pulled == k]
        gram, row = X @ X.T + np.eye(len(X)), X @ c
        variance = c @ c - row @ np.linalg.solve(gram, row)
        scores.append(row @ np.linalg.solve(gram, y) + alpha * np.sqrt(variance))
    return scores


def test_linucb_equals_the_direct_solve_and_the_dual_form():
    rounds = history()
    bandit = learned(*rounds)
    for c in np.random.default_rng(1).normal(size=(5, 7)):
        np.testing.assert_allclose(bandit.scores(c), direct(*rounds, 3, 0.7, c), atol=1e-10)
        np.testing.assert_allclose(bandit.scores(c), dual(*rounds, 3, 0.7, c), atol=1e-10)


def test_linucb_equals_mabwiser():
    from mabwiser.mab import MAB, LearningPolicy

    pulled, contexts, rewards = history()
    other = MAB([0, 1, 2], LearningPolicy.LinUCB(alpha=0.7, l2_lambda=1.0))
    other.fit(pulled, rewards, contexts)
    bandit = learned(pulled, contexts, rewards)
    for c in np.random.default_rng(1).normal(size=(5, 7)):
        expected = other.predict_expectations(c[None])
        np.testing.assert_allclose(bandit.scores(c), [expected[k] for k in range(3)], atol=1e-10)


def test_alpha_zero_is_greedy_and_a_large_one_takes_the_least_explored():
    pulled, contexts, rewards = rounds = history()
    c = np.ones(7)
    greedy = learned(*rounds, alpha=0.0)
    ridge = [
        c @ np.linalg.solve(contexts[pulled == k].T @ contexts[pulled == k] + np.eye(7), contexts[pulled == k].T @ y)
        for k in range(3)
        if (y := rewards[pulled == k]) is not None
    ]
    assert greedy.choose(c) == int(np.argmax(ridge))
    curious = learned(*rounds, alpha=1e9)
    assert curious.choose(c) == int(np.argmax([c @ curious.inverse[k] @ c for k in range(3)]))


def test_before_any_update_every_arm_scores_alpha_times_the_length_and_ties_are_drawn():
    c = np.arange(4.0)
    np.testing.assert_allclose(LinUCB("abc", 4, alpha=0.3).scores(c), 0.3 * np.linalg.norm(c))
    first = [LinUCB("abc", 4, seed=seed).choose(c) for seed in range(40)]
    assert set(first) == {0, 1, 2}
    assert first == [LinUCB("abc", 4, seed=seed).choose(c) for seed in range(40)]


def test_variance_after_pulls_of_one_fixed_context_and_only_that_arm_moves():
    bandit, c = LinUCB("ab", 5), np.full(5, 0.4)
    for _ in range(9):
        bandit.update(1, c, 0.5, 1.0)
    assert c @ bandit.inverse[1] @ c == pytest.approx(c @ c / (1 + 9 * (c @ c)), abs=1e-14)
    assert np.array_equal(bandit.inverse[0], np.eye(5))
    assert not bandit.b[0].any()


def play(bandit, rounds, random, worth):
    """Unit contexts round two far centres; the reward is `worth[centre, arm]` and noise. Returns regrets and hits."""
    centres = np.eye(2, 8)
    regrets, hits = [], []
    for _ in range(rounds):
        kind = random.integers(2)
        c = centres[kind] + 0.1 * random.normal(size=8)
        c /= np.linalg.norm(c)
        arm = bandit.choose(c)
        bandit.update(arm, c, float(np.clip(worth[kind, arm] + 0.1 * random.normal(), 0, 1)), 1.0)
        regrets.append(worth[kind].max() - worth[kind, arm])
        hits.append(arm == worth[kind].argmax())
    return np.array(regrets), np.array(hits)


def test_the_right_arm_is_found_in_each_context():
    worth = np.array([[0.8, 0.3, 0.5], [0.2, 0.7, 0.4]])
    regrets, hits = play(LinUCB("abc", 8), 3000, np.random.default_rng(0), worth)
    assert hits[100:].mean() > 0.95
    assert regrets[2000:].sum() < 0.5 * regrets[:1000].sum()  # sub-linear


def test_exp3_finds_the_best_arm_and_keeps_exploring():
    bandit, random = Exp3("abc", gamma=0.2), np.random.default_rng(0)
    worth = np.array([[0.1, 0.9, 0.2]] * 2)
    play(bandit, 600, random, worth)
    p = bandit.probabilities()
    assert p.sum() == pytest.approx(1)
    assert p.min() >= 0.2 / 3
    assert p.argmax() == 1


def test_exp3_update_is_its_equation():
    bandit = Exp3("ab", gamma=0.5)
    bandit.update(0, np.zeros(1), 0.8, bandit.probability(0))
    weight = np.exp(0.5 * 0.8 / (2 * 0.5))
    np.testing.assert_allclose(bandit.probabilities(), [0.5 * weight / (weight + 1) + 0.25, 0.5 / (weight + 1) + 0.25])


def test_exp3_divides_by_the_probability_of_the_pick_where_several_are_learned_at_once():
    bandit = Exp3("ab", gamma=0.5)
    arms = [bandit.choose(np.zeros(1)) for _ in range(6)]
    picked = [bandit.probability(arm) for arm in arms]
    for arm, p in zip(arms, picked, strict=True):
        bandit.update(arm, np.zeros(1), 0.8, p)
    np.testing.assert_allclose(bandit.log_weights, [arms.count(arm) * 0.5 * 0.8 / (2 * 0.5) for arm in range(2)])


def bandits():
    return [LinUCB("abc", 8, seed=3), Exp3("abc", seed=3), Picker("abc", seed=3), RoundRobin("abc"), Single("abc", "b")]


@pytest.mark.parametrize("kind", range(5), ids=lambda i: type(bandits()[i]).__name__)
def test_a_saved_picker_goes_on_exactly(kind):
    worth = np.array([[0.8, 0.3, 0.5], [0.2, 0.7, 0.4]])
    straight, stopped = bandits()[kind], bandits()[kind]
    random, again = np.random.default_rng(0), np.random.default_rng(0)
    play(straight, 20, random, worth)
    play(stopped, 20, again, worth)
    tensors, values = stopped.state()
    resumed = bandits()[kind]
    resumed.load({name: t.copy() for name, t in tensors.items()}, json.loads(json.dumps(values)))
    assert play(straight, 30, random, worth)[0].tolist() == play(resumed, 30, again, worth)[0].tolist()


@pytest.mark.parametrize("kind", range(4))
def test_a_dropped_arm_is_never_picked_again(kind):
    bandit = bandits()[kind]
    bandit.drop(1, "broken")
    assert {bandit.choose(np.ones(8)) for _ in range(40)} <= {0, 2}
    bandit.drop(0, "broken")
    assert {bandit.choose(np.ones(8)) for _ in range(5)} == {2}
    bandit.drop(2, "gone")
    with pytest.raises(HeadwaterError, match=r"no reward source is left.*gone"):
        bandit.choose(np.ones(8))


def test_controls():
    assert RoundRobin("abc").choose(np.ones(1)) == 0
    turn = RoundRobin("abc")
    assert [turn.choose(np.ones(1)) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    alone = Single("abc", "b")
    assert {alone.choose(np.ones(1)) for _ in range(5)} == {1}
    alone.drop(1, "broken")
    with pytest.raises(HeadwaterError, match=r"is left \(b: broken\)"):
        alone.choose(np.ones(1))
    draws = Picker("abc", seed=1)
    counts = np.bincount([draws.choose(np.ones(1)) for _ in range(300)])
    assert counts.min() > 60


def test_scaled_rewards():
    scale = QuantileScale()
    assert scale(-3.0) == 0.5  # a first one is neither good nor bad
    assert [scale(-3.0) for _ in range(3)] == [0.5] * 3  # all equal: no 0/0
    random = np.random.default_rng(0)
    for raw in random.normal(size=50):
        assert 0 <= scale(raw) <= 1
    known = list(scale.history)

    def given(raw):
        scale.history = list(known)
        return scale(raw)

    values = [given(raw) for raw in np.linspace(-4, 4, 60)]
    assert values == sorted(values)
    assert values[0] == 0
    assert values[-1] == 1
    low, high = np.quantile([*known, 0.1], (0.2, 0.8))
    assert given(0.1) == pytest.approx((0.1 - low) / (high - low))


def test_a_window_forgets():
    whole, recent = QuantileScale(), QuantileScale(window=10)
    for raw in [*np.linspace(0, 1, 50), *np.linspace(5, 6, 20)]:
        last = whole(raw), recent(raw)
    assert last == (1.0, 1.0)
    assert whole(5.5) == 1.0
    assert recent(5.5) < 0.5
