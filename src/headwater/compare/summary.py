"""What a comparison comes to: means over seeds, their intervals, and differences to the first method, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from headwater.evaluation.intervals import t_interval

Results = Mapping[str, Any]
"""The content of a run's `results.json`."""


def summarise(runs: Mapping[str, Sequence[Results]]) -> list[dict[str, Any]]:
    """One entry per method.

    Intervals are Student's t over seeds: how far the mean could be off because another seed gives another run. They say
    nothing about other test rows, which are the same for all. With one seed they are None.

    Args:
        runs: label -> its runs, one per seed, the same seeds in the same order for all.
    """
    first = next(iter(runs.values()))
    return [
        {
            "method": label,
            "n": len(results),
            "trainable_parameters": results[0]["trainable_parameters"],
            **_against(
                [r["mean"]["after"] for r in results], [r["mean"]["after"] for r in first], results is first, 1.0
            ),
            "extra": {
                "tasks": {
                    task: {"metric": results[0]["tasks"][task]["metric"], **_of_task(task, results, first)}
                    for task in results[0]["tasks"]
                },
                "before": _mean([r["mean"]["before"] for r in results]),
                "train_seconds": _mean([r["train_seconds"] for r in results]),
                "seconds_per_step": _mean([r["train_seconds"] / max(r["steps"], 1) for r in results]),
                "peak_memory_bytes": _mean([r["extra"].get("peak_memory_bytes") for r in results]),
                "activation_bytes": _mean([r["extra"].get("activation_bytes") for r in results]),
            },
        }
        for label, results in runs.items()
    ]


def _of_task(task: str, results: Sequence[Results], first: Sequence[Results]) -> dict[str, Any]:
    values, others = ([r["tasks"][task]["after"] for r in runs] for runs in (results, first))
    before = _mean([r["tasks"][task]["before"] for r in results])
    most = math.inf if results[0]["tasks"][task]["metric"] == "loss" else 1.0
    return {**_against(values, others, results is first, most), "before": before}


def _against(
    values: Sequence[float | None], first: Sequence[float | None], is_first: bool, most: float
) -> dict[str, Any]:
    """Mean, interval, and the same of the differences to the first method's values; all None where a value is.

    Args:
        most: values lie from 0 to this, and the intervals end there.
    """
    known = [v for v in values if v is not None]
    differences = [v - w for v, w in zip(values, first, strict=True) if v is not None and w is not None]
    whole = len(known) == len(values)
    paired = not is_first and len(differences) == len(values)
    return {
        "mean": _mean(known) if whole else None,
        "ci95": t_interval(known, (0.0, most)) if whole else None,
        "paired_difference": _mean(differences) if paired else None,
        "paired_ci95": t_interval(differences, (-most, most)) if paired else None,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
