"""The suggestion for the number of heads, on texts whose clusters are known."""

from __future__ import annotations

import random
import sys

import pytest

from headwater.data.heads import elbow, suggest_num_heads
from headwater.errors import HeadwaterError

TOPICS = {
    "cooking": "oven butter flour sugar recipe bake cream onion garlic pan",
    "sailing": "harbour sail mast anchor rudder wind tide hull deck rope",
    "chess": "knight bishop rook pawn castle gambit endgame checkmate opening board",
    "biology": "enzyme protein membrane nucleus ribosome genome bacteria plant tissue organ",
}


def corpus(topics: int) -> list[str]:
    rng = random.Random(0)
    words = [text.split() for text in list(TOPICS.values())[:topics]]
    return [" ".join(rng.sample(words[i % topics], 6)) for i in range(40 * topics)]


@pytest.mark.parametrize("topics", [2, 3, 4])
def test_as_many_heads_as_topics(topics):
    pytest.importorskip("sklearn")
    assert suggest_num_heads(corpus(topics), 8) == topics
    assert suggest_num_heads(corpus(topics), 8) == suggest_num_heads(corpus(topics), 8)


def test_elbow_of_known_curves():
    assert elbow([10, 4, 1, 0.9, 0.8]) == 3
    assert elbow([4, 3, 2, 1]) == 1
    assert elbow([1, 1, 1]) == 1


@pytest.mark.parametrize(
    ("texts", "k_max", "said"),
    [
        (["a"] * 100, 3, "1 different texts do not make 3 clusters"),
        (["one", "two"], 2, "k_max is 2"),
        (["!", "?", ".", ","], 4, "hold no words"),
    ],
)
def test_texts_that_tell_nothing(texts, k_max, said):
    pytest.importorskip("sklearn")
    with pytest.raises(HeadwaterError, match=said):
        suggest_num_heads(texts, k_max)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(HeadwaterError, match=r"headwater\[heads\]"):
        suggest_num_heads(["a"], 3)
