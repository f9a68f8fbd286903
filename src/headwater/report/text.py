"""Numbers and names as the report writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headwater.report.run import Interval, Run


def score_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def interval_text(interval: Interval | None, *, sign: str = "") -> str:
    if interval is None:
        return ""
    low, high = (f"{end:{sign}.3f}".replace("-", "−") for end in interval)
    return f"{low} to {high}" if sign or interval[0] < 0 else f"{low} – {high}"


def change_text(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def percent_text(value: float) -> str:
    return f"{100 * value:.1f} %"


def count_text(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def short_count_text(value: int) -> str:
    """`3,732,480` as `3.73 M`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.999995 * size:  # what rounds to a whole one is one
            return f"{value / size:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return str(value)


def memory_text(size: float) -> str:
    """Bytes in MiB; below ten of them with two digits, so that what is small is not 0."""
    mib = size / 2**20
    return f"{mib:,.0f} MiB" if mib >= 9.95 else f"{mib:.2g} MiB"


def duration_text(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plural(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def names_text(names: Sequence[str], most: int = 4) -> str:
    """The names with commas; of a long list its beginning and how many more there are."""
    rest = len(names) - most
    return ", ".join(names) if rest <= 0 else f"{', '.join(names[:most])} and {rest} more"


def value_text(value: Any) -> str:
    """A setting: lists with commas, everything else as Python writes it."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def missing_text(run: Run, file: str, what: str) -> str:
    """Why a section is empty: what is wrong with its file, or that the file does not say."""
    return run.notes.get(file) or f"{file} says nothing about {what}."
