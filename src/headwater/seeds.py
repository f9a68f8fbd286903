"""Which numbers are seeds: those that all generators take. NumPy's, which is seeded with torch's, takes 32 bits."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from .errors import HeadwaterError, Problem

END = 2**32
RANGE = "from 0 to 2**32 - 1"


def is_seed(value: int) -> bool:
    """Whether a number can be a seed."""
    return 0 <= value < END


def require_seed(value: int, where: str = "seed") -> None:
    """Raises HeadwaterError, with its place, if a number cannot be a seed."""
    if not is_seed(value):
        raise HeadwaterError(Problem(f"should be {RANGE}, not {value}", where))


def _in_range(value: int) -> int:
    if not is_seed(value):
        raise ValueError(f"should be {RANGE}")  # pydantic's errors are shown with the value
    return value


InRange = AfterValidator(_in_range)
"""Of a pydantic field that holds a seed: `Annotated[int, InRange]`."""
Seed = Annotated[int, InRange]
