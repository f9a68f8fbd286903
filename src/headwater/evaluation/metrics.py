"""What a single generated answer is worth: 1.0 when right, 0.0 when wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
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


GENERATION_METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "final_number": final_number}
