"""What can be told from rows' answers alone, before a model is there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal

_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
MARKED_NUMBER = re.compile(rf"####\s*\$?\s*({_NUMBER})")


def number_after_mark(text: str) -> Decimal | None:
    """The number that follows the first `####` with a number after it; None if there is none.

    Thousands separators and a dollar sign are ignored: `#### $1,200` is 1200.
    """
    found = MARKED_NUMBER.search(text)
    return Decimal(found[1].replace(",", "")) if found else None


def commonest_share(answers: Iterable[str]) -> float:
    """The share of the commonest of some answers, of one at least, white space at either end aside: what always giving
    the same one scores."""
    counts = Counter(answer.strip() for answer in answers)
    return max(counts.values()) / sum(counts.values())
