"""What a single generated answer is worth: 1.0 when right, 0.0 when wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED_NUMBER = re.compile(rf"####\s*\$?\s*({_NUMBER})")
_ONLY_NUMBER = re.compile(rf"\s*\$?\s*({_NUMBER})\s*")


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if both texts are equal but for white space at either end."""
    return float(prediction.strip() == reference.strip())


def number_after_mark(text: str) -> Decimal | None:
    """The number that follows the first `####` with a number after it; None if there is none.

    Thousands separators and a dollar sign are ignored: `#### $1,200` is 1200.
    """
    found = _MARKED_NUMBER.search(text)
    return Decimal(found[1].replace(",", "")) if found else None


def reference_number(text: str) -> Decimal | None:
    """The number of a reference answer: after `####`, or the whole text if it is nothing but a number."""
    marked = number_after_mark(text)
    if marked is not None:
        return marked
    found = _ONLY_NUMBER.fullmatch(text)
    return Decimal(found[1].replace(",", "")) if found else None


def final_number(prediction: str, reference: str) -> float:
    """1.0 if the number after `####` in the prediction equals the reference's number by value (`3.0` equals `3`)."""
    wanted = reference_number(reference)
    return float(wanted is not None and number_after_mark(prediction) == wanted)


def exact_match_settled(text: str, reference: str) -> bool:
    """Whether `text`, generated so far, is longer than the reference, so that no further token can make it equal.

    A little more than that is waited for: it covers characters of which only some bytes are there yet, and leaves
    enough to read in a report.
    """
    return len(text.strip()) > len(reference.strip()) + 16


def final_number_settled(text: str, reference: str) -> bool:
    """Whether `text`, generated so far, holds a number after `####` that no further token can change."""
    found = _MARKED_NUMBER.search(text)
    return found is not None and text[found.end() :] not in ("", ".")


@dataclass(frozen=True)
class GenerationMetric:
    """How a generated answer is scored.

    Args:
        score: (prediction, reference) -> 1.0 or 0.0.
        settled: (text so far, reference) -> whether whatever follows leaves the score as it is, so that generation
            of this row may stop.
    """

    score: Callable[[str, str], float]
    settled: Callable[[str, str], bool]


GENERATION_METRICS = {
    "exact_match": GenerationMetric(exact_match, exact_match_settled),
    "final_number": GenerationMetric(final_number, final_number_settled),
}
