"""What a single generated answer is worth: 1.0 when right, 0.0 when wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headwater.data.answers import MARKED_NUMBER, number_after_mark


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if both texts are equal but for white space at either end."""
    return float(prediction.strip() == reference.strip())


def final_number(prediction: str, reference: str) -> float:
    """1.0 if the number after `####` in the prediction equals that in the reference by value (`3.0` equals `3`)."""
    wanted = number_after_mark(reference)
    return float(wanted is not None and number_after_mark(prediction) == wanted)


def exact_match_settled(text: str, reference: str) -> bool:
    """Whether `text`, generated so far, is longer than the reference, so that no further token can make it equal.

    A little more than that is waited for: it covers characters of which only some bytes are there yet, and leaves
    enough to read in a report.
    """
    return len(text.strip()) > len(reference.strip()) + 16


def final_number_settled(text: str, reference: str) -> bool:
    """Whether `text`, generated so far, holds a number after `####` that no further token can change."""
    found = MARKED_NUMBER.search(text)
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
