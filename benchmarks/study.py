"""Writes down what finished comparisons found: `results/study-NAME.json` and `docs/results/NAME.md`.

    headwater compare examples/studies/claim.yaml --set output_dir=runs/claim
    python -m benchmarks.study claim runs/claim --command "headwater compare examples/studies/claim.yaml" \\
        --title "Does R-LoRA help?"
    python -m benchmarks.study claim          # only the page anew, from the JSON

The JSON has every run of every comparison named. In the page, what stands between `<!-- setting -->` or
`<!-- results -->` and `<!-- end -->` is written from it; everything else is the author's and is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from scipy import stats

from headwater.report.comparison import Comparison, read_comparison
from headwater.report.comparison_heads import correlations, diversity_and_score, mean_similarity
from headwater.report.comparison_interference import seesaw, trained_on, transfer
from headwater.report.conflicts import means

from .measure import RESULTS, device_name, write
from .study_page import ALT, PAGES, PARTS, written

LARGEST = 200_000  # bytes of a picture that is kept
_SETTINGS = ("model", "mixture", "data", "training", "evaluation")
_NOT_SETTINGS = ("report_to", "overwrite_output_dir", "resume_from_checkpoint", "learning_rate", "logging_steps",
                 "save_steps", "save_total_limit", "disable_tqdm")  # fmt: skip


def found(folder: Path, *, command: str = "", model: str = "", device: str = "", timed: bool = True) -> dict[str, Any]:
    """What one finished comparison says, without paths of this machine.

    Args:
        command: how it was run.
        model: the base model's name; by default its hub id, or the last part of its path.
        device: what it ran on; by default what its runs say, or this machine's processor.
        timed: whether times are worth keeping.

    Raises:
        headwater.errors.HeadwaterError: if the folder holds no finished comparison.
    """
    comparison = read_comparison(folder)
    extra, first = comparison.content.extra, comparison.content.runs[0]
    folders = [run for runs in comparison.runs.values() for run in runs]
    config = folders[0].config if folders else {}
    on = first["extra"].get("device", "cpu")
    about = {
        "command": command,
        "date": datetime.fromtimestamp((folder / "comparison.json").stat().st_mtime, timezone.utc).date().isoformat(),
        "model": model or _name(config.get("model_name_or_path", first["base_model"])),
        "device": device or (device_name("cpu") if on == "cpu" else on),
        "versions": first["extra"].get("versions", {}),
        "settings": _settings(config),
        "steps": {label: runs[0].steps for label, runs in comparison.results.items()},
        "tasks": _tasks(comparison, config),
        "seeds": extra.seeds,
        "match": extra.match,
        "budget": extra.budget,
        "methods": _methods(comparison, timed),
    }
    points = diversity_and_score(comparison)
    over_runs, over_means = correlations(points)
    about["diversity"] = {
        "runs": sum(map(len, points.values())),
        "methods": len(points),
        "spearman": over_runs,
        "spearman_of_means": over_means,
    }
    about["conflict"] = _conflict(comparison)
    if gaps := seesaw(comparison):
        about["seesaw"] = {
            label: {
                task: {"shared": g.shared, "single": g.single, "difference": g.mean, "ci95": g.ci95, "seeds": g.values}
                for task, g in row.items()
            }
            for label, row in gaps.items()
        }
        about["transfer"] = transfer(comparison)
    return _rounded(_without_paths(about))


def _conflict(comparison: Comparison) -> dict[str, Any]:
    """What `headwater conflict` measured: label -> seeds, and for each part of the parameters the means over runs."""
    measured = {
        label: {run.results.seed: run.conflicts for run in runs if run.conflicts is not None and run.results}
        for label, runs in comparison.runs.items()
    }
    return {
        label: {"seeds": list(found), **{part: means(list(found.values()), part) for part in PARTS}}
        for label, found in measured.items()
        if found
    }


def _methods(comparison: Comparison, timed: bool) -> list[dict[str, Any]]:
    summary, extra = comparison.content.summary, comparison.content.extra
    tasks = {label: trained_on(comparison, label) for label in comparison.labels}
    # Adapters for one task are there to be subtracted from those for all; they are no claim of their own.
    asked = [label for label in comparison.labels if tasks[label] == tasks[comparison.labels[0]]]
    tests = paired_tests({label: [r.mean.after for r in comparison.results[label]] for label in asked})
    methods = []
    for entry in summary:
        about, choice = comparison.about(entry.method), extra.learning_rate.get(entry.method)
        p, holm = tests.get(entry.method, (None, None))
        methods.append(
            {
                "label": entry.method,
                "method": about.method,
                "align": about.align,
                "trained_on": tasks[entry.method],
                "parameters": entry.trainable_parameters,
                "deviation": about.deviation,
                "learning_rate": about.learning_rate,
                "learning_rates_tried": choice.scores if choice else {},
                **_compared(entry),
                "p": p,
                "p_holm": holm,
                "tasks": {task: _compared(of_task) for task, of_task in entry.extra.tasks.items()},
                "seconds_per_step": entry.extra.seconds_per_step if timed else None,
                "peak_memory_bytes": entry.extra.peak_memory_bytes,
                "activation_bytes": entry.extra.activation_bytes,
                "runs": _runs(comparison, entry.method, timed),
            }
        )
    return methods


def _compared(entry: Any) -> dict[str, Any]:
    return {
        "mean": entry.mean,
        "ci95": entry.ci95,
        "difference": entry.paired_difference,
        "difference_ci95": entry.paired_ci95,
    }


def _runs(comparison: Comparison, label: str, timed: bool) -> list[dict[str, Any]]:
    """Every run of a method, in the order of the seeds."""
    raw = [run for run in comparison.content.runs if run["extra"].get("label", run["method"]) == label]
    runs = []
    for run, folder in zip(raw, comparison.folders[label], strict=True):
        similarity = mean_similarity(next((r for r in comparison.runs[label] if r.folder == folder), None))
        runs.append(
            {
                "seed": run["seed"],
                "mean": run["mean"]["after"],
                "tasks": {task: values["after"] for task, values in run["tasks"].items()},
                "seconds_per_step": run["train_seconds"] / max(run["steps"], 1) if timed else None,
                "tokens_per_second": run["tokens_per_second"] if timed else None,
                "peak_memory_bytes": run["extra"].get("peak_memory_bytes"),
                "activation_bytes": run["extra"].get("activation_bytes"),
                "head_similarity": similarity,
            }
        )
    return runs


def paired_tests(scores: Mapping[str, Sequence[float | None]]) -> dict[str, tuple[float | None, float | None]]:
    """Two-sided p of Student's paired t test over seeds against the first method, plain and by Holm's correction.

    None where there is nothing to test: the first method, one seed, a missing score, or differences that are all equal.
    """
    (_, base), *others = scores.items()
    p: dict[str, float] = {}
    for label, values in others:
        if None in (*values, *base) or len(values) < 2 or len({a - b for a, b in zip(values, base, strict=True)}) < 2:  # type: ignore[operator]
            continue
        p[label] = float(stats.ttest_rel(values, base).pvalue)
    corrected: dict[str, float] = {}
    least = 0.0
    for rank, label in enumerate(sorted(p, key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - rank) * p[label]))
        corrected[label] = least
    return {label: (p.get(label), corrected.get(label)) for label in scores}


def _tasks(comparison: Comparison, config: Mapping[str, Any]) -> dict[str, Any]:
    asked = {task["name"]: task for task in config.get("tasks", [])}
    first = comparison.content.runs[0]["tasks"]
    return {
        task: {
            "metric": values["metric"],
            "test_rows": values["n"],
            "most_train_rows": asked.get(task, {}).get("max_train_rows"),
            "before": values["before"],
        }
        for task, values in first.items()
    }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: config[name] for name in _SETTINGS if config.get(name)}
    return {
        name: {key: value for key, value in section.items() if key not in _NOT_SETTINGS and value is not None}
        for name, section in kept.items()
    }


def _name(model: str) -> str:
    path = Path(model)
    return path.resolve().name if path.is_absolute() else model


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _rounded(value: Any) -> Any:
    """Five significant digits, more than any of this is good for."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def copy_figures(folder: Path, name: str) -> list[str]:
    """Copies the pictures of a comparison's report beside the page, and returns their names there."""
    copied = []
    for figure in ALT:
        sources = [folder / "figures" / f"{figure}.{ending}" for ending in ("svg", "png")]
        source = next((s for s in sources if s.is_file() and s.stat().st_size <= LARGEST), None)
        if source is not None:
            PAGES.mkdir(parents=True, exist_ok=True)
            target = PAGES / f"{name}-{source.name}"
            shutil.copyfile(source, target)
            copied.append(target.name)
    return copied


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the JSON file and of the page")
    parser.add_argument("folders", nargs="*", type=Path, help="output_dirs of headwater compare; none: only the page")
    parser.add_argument("--command", action="append", default=[], help="how it was run; one for each folder, in order")
    parser.add_argument("--heading", action="append", default=[], help="of each folder's part, where there are several")
    parser.add_argument("--model", default="", help="the base model's name; by default as the runs have it")
    parser.add_argument("--device", default="", help="what it ran on; by default this processor")
    parser.add_argument(
        "--untimed", action="store_true", help="leave out steps' times: runs were paused, or shared cores"
    )
    parser.add_argument("--title", default="", help="of a page that is not there yet")
    options = parser.parse_args(arguments)
    path = RESULTS / f"study-{options.name}.json"
    if options.folders:
        parts = []
        for i, folder in enumerate(options.folders):
            command, heading = (given[i] if i < len(given) else "" for given in (options.command, options.heading))
            about = {"model": options.model, "device": options.device, "timed": not options.untimed}
            part = found(folder, command=command, **about)
            prefix = options.name if len(options.folders) == 1 else f"{options.name}-{i + 1}"
            heading = heading or (folder.resolve().name if len(options.folders) > 1 else "")
            parts.append({"heading": heading, **part, "figures": copy_figures(folder, prefix)})
        write(path, {"name": options.name, "comparisons": parts})
    content = json.loads(path.read_text(encoding="utf-8"))
    PAGES.mkdir(parents=True, exist_ok=True)
    page = PAGES / f"{options.name}.md"
    page.write_text(written(content, page, title=options.title), encoding="utf-8")
    print(f"{path}\n{page}")


if __name__ == "__main__":
    main()
