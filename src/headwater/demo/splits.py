"""From labelled texts to train, validation and test rows: deduplicated, balanced, and never overlapping."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.answers import commonest_share
from ..files import write_text

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One labelled text.

    Args:
        prompt: what the model sees, without the answer.
        label: the answer, one of the task's choices.
        group: texts of one group (sentences of one review) never land in different splits; "" is a group of its own.
        pool: ``train`` or ``test`` where the source has its own split, which is kept; "" where it has none.
    """

    prompt: str
    label: str
    group: str = ""
    pool: str = ""


def split(
    examples: Iterable[Example], labels: Sequence[str], *, rows: dict[str, int], seed: int
) -> dict[str, list[Example]]:
    """Choose a class-balanced train, validation and test set.

    Texts that differ only in case, spaces or punctuation count as one; texts that carry two labels are left out. The
    order, and so the choice, follows a hash of the text and the seed: it is the same on every machine and Python.

    Args:
        examples: all labelled texts; labels that are not in `labels` are left out.
        labels: the classes.
        rows: how many rows each of ``train``, ``validation`` and ``test`` should hold; divided evenly over the
            classes (rounded up). A class with fewer texts gives what it has.
        seed: of the choice.
    """
    quota = {name: -(-rows[name] // len(labels)) for name in SPLITS}
    chosen: dict[str, list[Example]] = {name: [] for name in SPLITS}
    counts: Counter[tuple[str, str]] = Counter()
    home: dict[str, str] = {}

    def order(example: Example) -> tuple[str, str]:
        key = text_key(example.prompt)
        return _digest(f"{seed}:{example.group or key}"), _digest(f"{seed}:{key}")

    for example in sorted(_unique(examples, labels), key=order):
        group = example.group or text_key(example.prompt)
        open_splits = [name for name in _allowed(example.pool) if counts[name, example.label] < quota[name]]
        if group in home:
            open_splits = [name for name in open_splits if name == home[group]]
        if open_splits:
            home[group] = open_splits[0]
            counts[open_splits[0], example.label] += 1
            chosen[open_splits[0]].append(example)
    return chosen


def text_key(text: str) -> str:
    """What is left of a text without case, spaces and punctuation: equal keys count as the same text."""
    return "".join(character for character in text.casefold() if character.isalnum())


def majority_share(examples: Sequence[Example]) -> float:
    """The share of the most common label, in [0, 1]: what always giving one answer would score."""
    return commonest_share(example.label for example in examples)


def write_rows(examples: Sequence[Example], labels: Sequence[str], path: Path) -> None:
    """Write JSONL rows of prompt, completion and choices; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    choices = [f" {label}" for label in labels]
    lines = (
        json.dumps({"prompt": e.prompt, "completion": f" {e.label}", "choices": choices}, ensure_ascii=False)
        for e in examples
    )
    write_text(path, "".join(f"{line}\n" for line in lines))


def _allowed(pool: str) -> tuple[str, ...]:
    """The splits a text of a source's own `pool` may go to, the first to be filled first."""
    return {"test": ("test",), "train": ("validation", "train"), "": ("test", "validation", "train")}[pool]


def _unique(examples: Iterable[Example], labels: Sequence[str]) -> list[Example]:
    """One example per text; of a text in both of a source's own splits the held-out one stays."""
    same: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        same[text_key(example.prompt)].append(example)
    kept = []
    for copies in same.values():
        if len({copy.label for copy in copies}) == 1 and copies[0].label in labels:
            kept.append(min(copies, key=lambda copy: (copy.pool != "test", copy.pool, copy.prompt, copy.group)))
    return kept


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
