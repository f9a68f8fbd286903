"""Two methods over the seeds of several studies of one size, paired seed by seed.

python -m benchmarks.pooled study-claim-gpu study-claim-seeds --of rlora --minus hydralora
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from scipy import stats

from headwater.evaluation.intervals import t_interval

from .page import load, table


def differences(studies: Sequence[str], of: str, minus: str) -> dict[str, dict[int, float]]:
    """`mean` and every task -> seed -> how much further up one method is.

    Raises:
        SystemExit: a study has no such method, or two studies have one seed.
    """
    found: dict[str, dict[int, float]] = {}
    for study in studies:
        for part in load(study)["comparisons"]:
            runs: dict[str, Any] = {m["label"]: {r["seed"]: r for r in m["runs"]} for m in part["methods"]}
            if missing := {of, minus} - set(runs):
                raise SystemExit(f"{study} has no {', '.join(sorted(missing))}; it has {', '.join(runs)}")
            for seed, run in runs[of].items():
                other = runs[minus][seed]
                values = {"mean": run["mean"] - other["mean"]}
                values |= {task: value - other["tasks"][task] for task, value in run["tasks"].items()}
                for name, value in values.items():
                    if seed in found.setdefault(name, {}):
                        raise SystemExit(f"seed {seed} stands in more than one of the studies")
                    found[name][seed] = value
    return found


def line(values: dict[int, float]) -> list[str]:
    """How many seeds, the mean difference with its 95 % interval over seeds, and p of the paired t test."""
    differing = list(values.values())
    low, high = t_interval(differing) or (float("nan"), float("nan"))
    p = stats.ttest_1samp(differing, 0.0).pvalue
    text = f"{sum(differing) / len(differing):+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")
    return [str(len(differing)), text, "< 0.001" if p < 0.001 else f"{p:.3f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", help="names of files in benchmarks/results, without .json")
    parser.add_argument("--of", required=True, help="a method's label")
    parser.add_argument("--minus", required=True, help="the one that it is compared with")
    options = parser.parse_args(arguments)
    found = differences(options.studies, options.of, options.minus)
    head = ["", "seeds", f"{options.of} minus {options.minus} (95 %)", "p"]
    print(table(head, [[name, *line(values)] for name, values in found.items()]))


if __name__ == "__main__":
    main()
