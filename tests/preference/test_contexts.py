"""Contexts: the last token's state whatever the padding, and a projection that keeps kinds of prompts apart."""

import numpy as np
import pytest
import torch

from headwater.evaluation.forward import evaluating
from headwater.preference.bandits import LinUCB
from headwater.preference.contexts import Projection, prompt_states


def test_states_are_the_last_tokens_whatever_the_padding(tiny_llama):
    model = tiny_llama()
    prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6], [40, 41]]
    with evaluating(model):
        found = prompt_states(model, prompts, fill=258, batch_size=3)
        for prompt, state in zip(prompts, found, strict=True):
            expected = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
            np.testing.assert_allclose(state, expected.double().numpy(), atol=1e-6)


def test_projection_centres_and_separates_kinds_that_share_a_large_direction():
    random = np.random.default_rng(0)
    common = 30 * random.normal(size=20)
    kinds = random.normal(size=(2, 20))
    states = np.concatenate([common + kind + 0.1 * random.normal(size=(30, 20)) for kind in kinds])
    raw = [states[:8].mean(0), states[30:38].mean(0)]
    cosine = raw[0] @ raw[1] / np.linalg.norm(raw[0]) / np.linalg.norm(raw[1])
    assert cosine > 0.99
    projection = Projection(states, 6)
    first, other, second = projection(states[:8]), projection(states[8:16]), projection(states[30:38])
    assert abs(np.linalg.norm(first) - 1) < 1e-12
    assert first @ other > 0.95
    np.testing.assert_allclose(first, projection(states[:8].mean(0)[None]), atol=1e-12)
    assert abs(first @ second) < 0.1  # opposite kinds have nothing to do with each other
    assert np.isclose(first[-1], 0.5**0.5)


def test_projection_of_few_or_equal_states():
    assert Projection(np.ones((3, 5)), 4)(np.ones((2, 5))).tolist() == [0.0] * 4 + [1.0]
    states = np.random.default_rng(0).normal(size=(3, 5))  # three centred points span a plane
    assert np.count_nonzero(Projection(states, 64)(states[:1])) == 2 + 1


@pytest.mark.parametrize(
    "worth", [[[0.9, 0.1, 0.4]] * 2, [[0.9, 0.1, 0.4], [0.4, 0.9, 0.1]]], ids=["same", "different"]
)
def test_linucb_finds_what_is_good_for_all_kinds_and_for_each(worth):
    """Centred contexts of two kinds are opposite: without the constant, worth in one would be its lack in the other."""
    late = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        kinds = np.repeat(random.normal(size=(2, 16)), 40, 0)
        states = kinds + 0.3 * random.normal(size=kinds.shape)
        projection, bandit = Projection(states, 8), LinUCB("abc", 9, seed=seed)
        for turn in range(30):
            kind = turn % 2
            context = projection(states[kind * 40 + random.integers(40, size=6)])
            arm = bandit.choose(context)
            bandit.update(arm, context, float(np.clip(worth[kind][arm] + 0.2 * random.normal(), 0, 1)), 1.0)
            late += [arm == np.argmax(worth[kind])] if turn >= 20 else []
    assert np.mean(late) > 0.85
