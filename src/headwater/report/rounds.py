"""What a run of `headwater prefer` leaves of its rounds: where, and which are its first and its last ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rounds = Sequence[Mapping[str, Any]]


def run_folder(output: Path, strategy: str, seed: int) -> Path:
    """The folder of one strategy's run with one seed."""
    return output / strategy.replace(":", "-") / f"seed-{seed}"


def early(rounds: Rounds) -> Rounds:
    """The first third of the rounds."""
    return rounds[: _third(rounds)]


def late(rounds: Rounds) -> Rounds:
    """The last third of the rounds."""
    return rounds[len(rounds) - _third(rounds) :]


def _third(rounds: Rounds) -> int:
    return -(-len(rounds) // 3)
