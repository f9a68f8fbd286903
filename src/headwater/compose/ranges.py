"""Refusing settings that are out of range, all of them at once."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import HeadwaterError, Problem
from ..seeds import RANGE, is_seed


def require(settings: Any, should: Mapping[str, tuple[bool, str]]) -> None:
    """Refuses settings whose fields are not what they should be.

    Args:
        settings: whose fields are looked at.
        should: field -> whether it is as it should be, and how that is.

    Raises:
        HeadwaterError: naming every one that is not.
    """
    problems = [
        Problem(f"it is {getattr(settings, field)}, and should be {how}", field)
        for field, (good, how) in should.items()
        if not good
    ]
    if problems:
        raise HeadwaterError(*problems)


def require_once(names: Sequence[str]) -> None:
    """Raises HeadwaterError if an adapter is named twice."""
    if len(set(names)) < len(names):
        raise HeadwaterError(Problem(f"the adapters are {', '.join(names)}", fix="name each once"))


# Values may be of any type: they are read from files, too.
def at_least(least: int, value: Any) -> tuple[bool, str]:
    return isinstance(value, numbers.Integral) and int(value) >= least, f"a whole number, at least {least}"


def one_of(known: Collection[str], value: str) -> tuple[bool, str]:
    *before, last = known
    return value in known, f"{', '.join(before)} or {last}"


def seed(value: int) -> tuple[bool, str]:
    return is_seed(value), RANGE


def rate(value: Any) -> tuple[bool, str]:
    return isinstance(value, numbers.Real) and 0 <= float(value) < math.inf, "a finite number, at least 0"


def positive(value: Any) -> tuple[bool, str]:
    return isinstance(value, numbers.Real) and 0 < float(value) < math.inf, "a finite number above 0"
