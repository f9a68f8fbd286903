"""Errors that a user can act on: what was wrong, where, and what to do. The command line exits with 2 on them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        what: what is wrong, as one sentence without a full stop.
        where: file, line and field, e.g. ``run.yaml:12: tasks[0].train``; empty when there is no place to point at.
        fix: what to do about it, as one sentence; empty when `what` says it all.
    """

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}" + (f"\n    {self.fix}" if self.fix else "")


class HeadwaterError(ValueError):
    """An expected error, shown without a traceback. Carries every problem found, not only the first."""

    def __init__(self, *problems: Problem | str):
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
        super().__init__("\n".join(map(str, self.problems)))


class DivergedError(HeadwaterError):
    """A loss, a gradient or a model's outputs are not finite numbers, most often by too high a learning rate."""
