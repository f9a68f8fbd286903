"""What several strategies and seeds came to: `results.json` of `headwater prefer`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from headwater import __version__
from headwater.evaluation.intervals import t_interval
from headwater.preference.spec import BEST_SINGLE, PreferConfig
from headwater.report.rounds import Rounds, late


def good_pick_rate(rounds: Rounds, good: Mapping[str, str]) -> float | None:
    """Share of rounds whose one source was the good one of their task; None where no round's task has one."""
    known = [r for r in rounds if r["task"] in good]
    if not known:
        return None
    return sum(r["queried"] == [good[r["task"]]] for r in known) / len(known)


def summary(
    config: PreferConfig, base: Mapping[str, Any], runs: Mapping[tuple[str, int], Mapping[str, Any]]
) -> dict[str, Any]:
    """`results.json`.

    Args:
        base: `mean` and `tasks` before training.
        runs: (strategy, seed) -> what its run came to.
    """
    spec, seeds = config.preference, config.seeds
    scores, rates, differences = {}, {}, {}
    first = spec.strategies[0]
    for strategy in spec.strategies:
        mine = [runs[strategy, seed] for seed in seeds]
        values = [run["mean"] for run in mine]
        scores[strategy] = {"mean": sum(values) / len(values), "ci95": t_interval(values, (0, 1)), "seeds": values}
        found = [rate for run in mine if (rate := good_pick_rate(late(run["rounds"]), spec.good)) is not None]
        rates[strategy] = sum(found) / len(found) if found else None
        if strategy != first:
            pairs = [runs[first, seed]["mean"] - runs[strategy, seed]["mean"] for seed in seeds]
            differences[strategy] = {"mean": sum(pairs) / len(pairs), "ci95": t_interval(pairs, (-1, 1))}
    learning = next((s for s in spec.strategies if s in ("linucb", "exp3")), None)
    some = runs[first, seeds[0]]
    return {
        "schema": 1,
        "late_good_pick_rate": rates[learning] if learning else None,
        "scores": scores,
        "base": base["mean"],
        "seeds": seeds,
        "method": config.method["name"],
        "base_model": config.model_name_or_path,
        "trainable_parameters": some["trainable_parameters"],
        "rounds": len(some["rounds"]),
        "bandit_reward": spec.bandit_reward,
        "sources": [source.name for source in spec.sources],
        "good": spec.good,
        "extra": {
            "differences": differences,  # of the first strategy to each other one, seed by seed
            "late_good_pick_rates": rates,
            "tasks": {
                task: {
                    "metric": score["metric"],
                    "n": score["n"],
                    "base": score["value"],
                    **{s: [runs[s, seed]["tasks"][task]["value"] for seed in seeds] for s in spec.strategies},
                }
                for task, score in base["tasks"].items()
            },
            "queries_per_round": {
                s: sum(len(r["queried"]) for seed in seeds for r in runs[s, seed]["rounds"])
                / max(1, sum(len(runs[s, seed]["rounds"]) for seed in seeds))
                for s in spec.strategies
            },
            "best_single": {str(seed): runs[BEST_SINGLE, seed]["source"] for seed in seeds if BEST_SINGLE in scores},
            "dropped": {f"{s} seed {seed}": run["dropped"] for (s, seed), run in runs.items() if run["dropped"]},
            "seconds": {s: sum(runs[s, seed]["seconds"] for seed in seeds) for s in spec.strategies},
            "versions": {
                "headwater": __version__,
                **{p: version(p) for p in ("torch", "transformers", "peft", "trl")},
            },
        },
    }
