"""Splits never overlap, are balanced, keep groups and pools together, and depend on nothing but texts and seed."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.demo.splits import Example, majority_share, split, text_key, write_rows
from headwater.errors import HeadwaterError

LABELS = ("yes", "no", "maybe")
ROWS = {"train": 9, "validation": 3, "test": 6}

examples = st.lists(
    st.builds(
        Example,
        prompt=st.text("abc ,.", min_size=1, max_size=4),
        label=st.sampled_from((*LABELS, "other")),
        group=st.sampled_from(("", "g1", "g2")),
        pool=st.sampled_from(("", "train", "test")),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(examples, st.integers(0, 5), st.randoms(use_true_random=False))
def test_split_rules(pool, seed, rng):
    parts = split(pool, LABELS, rows=ROWS, seed=seed)
    chosen = [(name, example) for name, part in parts.items() for example in part]

    keys = [text_key(example.prompt) for _, example in chosen]
    assert len(keys) == len(set(keys)), "a text appears twice"
    homes = {(example.group, name) for name, example in chosen if example.group}
    assert len(homes) == len({group for group, _ in homes}), "a group is spread over splits"
    for name, example in chosen:
        assert example in pool
        assert example.label in LABELS
        assert example.pool in {"test": ("", "test")}.get(name, ("", "train"))
        assert {other.label for other in pool if text_key(other.prompt) == text_key(example.prompt)} == {example.label}
    for name, part in parts.items():
        assert max(Counter(e.label for e in part).values(), default=0) <= -(-ROWS[name] // len(LABELS))

    shuffled = list(pool)
    rng.shuffle(shuffled)
    again = split(shuffled, LABELS, rows=ROWS, seed=seed)
    assert {name: [text_key(e.prompt) for e in part] for name, part in again.items()} == {
        name: [text_key(e.prompt) for e in part] for name, part in parts.items()
    }


def many(label_sizes):
    return [Example(f"text {label} {i}", label) for label, n in label_sizes.items() for i in range(n)]


def test_enough_texts_fill_every_class_of_every_split():
    parts = split(many({"yes": 50, "no": 50, "maybe": 50}), LABELS, rows=ROWS, seed=0)
    for name, part in parts.items():
        assert Counter(e.label for e in part) == dict.fromkeys(LABELS, ROWS[name] // 3)
    assert majority_share(parts["test"]) == pytest.approx(1 / 3)


def test_a_small_class_gives_what_it_has_and_is_counted():
    parts = split(many({"yes": 50, "no": 50, "maybe": 1}), LABELS, rows=ROWS, seed=0)
    assert Counter(e.label for e in parts["test"]) == {"yes": 2, "no": 2, "maybe": 1}
    assert majority_share(parts["test"]) == pytest.approx(2 / 5)


def test_a_source_with_its_own_test_set_keeps_it_and_loses_the_copies_in_train():
    own = [Example(f"t{i}", "yes", pool="train") for i in range(20)] + [
        Example(f"T{i}!", "yes", pool="test") for i in range(5)
    ]
    parts = split(own, ("yes",), rows={"train": 100, "validation": 2, "test": 100}, seed=0)
    assert {text_key(e.prompt) for e in parts["test"]} == {f"t{i}" for i in range(5)}
    assert len(parts["train"]) + len(parts["validation"]) == 15


def test_the_seed_changes_the_choice():
    pool = many({"yes": 200, "no": 200, "maybe": 200})
    tests = [{e.prompt for e in split(pool, LABELS, rows=ROWS, seed=seed)["test"]} for seed in (0, 1)]
    assert tests[0] != tests[1]


def test_the_choice_is_the_same_on_every_machine():
    """Written down once; random numbers or hash() would not give it everywhere."""
    pool = many({"yes": 30, "no": 30, "maybe": 30})
    random.Random(3).shuffle(pool)
    parts = split(pool, LABELS, rows=ROWS, seed=0)
    assert [e.prompt for e in parts["validation"]] == ["text no 20", "text maybe 3", "text yes 27"]


def test_rows_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "test.jsonl"
    write_rows([Example("Zürich?\n", "yes")], LABELS, path)
    assert path.read_text(encoding="utf-8").count("\n") == 1
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "prompt": "Zürich?\n",
        "completion": " yes",
        "choices": [" yes", " no", " maybe"],
    }
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(HeadwaterError, match="disk"):
        write_rows([Example("other", "yes")], LABELS, path)
    assert "Zürich" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["test.jsonl"]
