"""The page of a study, from its JSON: see `study.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .page import filled, table

PAGES = Path(__file__).parents[1] / "docs" / "results"
PLACEHOLDERS = {"What was asked.", "What it says, and what it does not."}
"""Lines of a fresh page that its author replaces."""
SKELETON = """# {title}

What was asked.

<!-- setting -->
<!-- end -->

## Reading

What it says, and what it does not.

<!-- results -->
<!-- end -->
"""
ALT = {
    "comparison": "Mean scores and differences of all methods, with seeds and intervals",
    "task_differences": "Differences to the first method, task by task",
    "seesaw": "Shared minus single-task adapter, task by task",
    "head_similarity": "Mean cosine between heads after training, by method and layer",
    "head_diversity": "Mean cosine between heads over training",
    "diversity_score": "Mean score of each run against the mean cosine between its heads",
    **{f"head_map_{n}": "Map of one method's heads over training (t-SNE)" for n in range(1, 7)},
}
"""The pictures that a page has, by name, and what they show."""
PARTS = ("all", "A", "B")
"""The parameters whose gradients are compared."""
MEMORY = {"peak memory, MiB": "peak_memory_bytes", "activations, MiB": "activation_bytes"}
Found = Mapping[str, Any]


def written(content: Found, page: Path, *, title: str = "") -> str:
    """The page's text with its two written parts anew; a fresh page where there is none."""
    text = page.read_text(encoding="utf-8") if page.is_file() else SKELETON.format(title=title or content["name"])
    parts = content["comparisons"]
    return filled(text, {"setting": _parts(parts, setting), "results": _parts(parts, results)})


def _parts(parts: Sequence[Found], write: Any) -> str:
    return "\n\n".join(f"## {p['heading']}\n\n{write(p)}" if p["heading"] else write(p) for p in parts)


def setting(part: Found) -> str:
    """Model, tasks, settings and command, in words."""
    tasks = [
        [name, t["metric"], _count(t["most_train_rows"], "all"), _count(t["test_rows"]), _score(t["before"])]
        for name, t in part["tasks"].items()
    ]
    versions = ", ".join(f"{name} {number}" for name, number in part["versions"].items())
    steps = sorted(set(part["steps"].values()))
    matched = "as given" if part["budget"] is None else f"matched by {part['match']} to {part['budget']:,}"
    said = [
        f"- Model: {part['model']}; {_fields(part['settings'].get('model', {}))}",
        f"- Training: {' or '.join(f'{s:,}' for s in steps)} steps; {_fields(part['settings'].get('training', {}))}; "
        f"mixture {_fields(part['settings'].get('mixture', {}))}",
        f"- Seeds: {', '.join(map(str, part['seeds']))}; trainable parameters {matched}",
        f"- Ran on {part['date']}; {part['device']}; {versions}",
    ]
    command = f"\n\n    {part['command']}" if part["command"] else ""
    head = ["task", "metric", "training rows, at most", "test rows", "base model"]
    return "\n".join(said) + command + "\n\n" + table(head, tasks)


def results(part: Found) -> str:
    """Every table and picture."""
    parts = [scores(part), seeds(part), tasks(part), rates(part), interference(part), conflict(part), heads(part)]
    return "\n\n".join(filter(None, parts))


def scores(part: Found) -> str:
    methods = [m for m in part["methods"] if m["trained_on"] == part["methods"][0]["trained_on"]]
    first, n = methods[0]["label"], len(part["seeds"])
    sizes = {name: key for name, key in MEMORY.items() if any(m[key] for m in methods)}
    heads = {m["label"]: [r["head_similarity"] for r in m["runs"]] for m in methods}
    alike = any(v is not None for values in heads.values() for v in values)
    head = [
        "method",
        "parameters",
        "learning rate",
        "mean score (95 %)",
        f"minus {first} (95 %)",
        "p",
        "p, Holm",
    ]
    timed = any(m["seconds_per_step"] for m in methods)
    rows = []
    for m in methods:
        row = [
            m["label"],
            f"{m['parameters']:,}",
            "" if m["learning_rate"] is None else f"{m['learning_rate']:g}",
            _with_interval(m["mean"], m["ci95"]),
            _with_interval(m["difference"], m["difference_ci95"], "+"),
            _p(m["p"]),
            _p(m["p_holm"]),
        ]
        row += [f"{m['seconds_per_step']:.2f}"] if timed else []
        row += ["" if not m[key] else f"{m[key] / 2**20:,.0f}" for key in sizes.values()]
        if alike:
            known = [v for v in heads[m["label"]] if v is not None]
            row.append(f"{sum(known) / len(known):.2f}".replace("-", "−") if known else "")
        rows.append(row)
    head += [*(["s a step"] if timed else []), *sizes, *(["heads' cosine"] if alike else [])]
    note = (
        f"Mean over tasks and {n} seed{'s' if n > 1 else ''}; intervals by Student's t over seeds, of differences seed "
        "by seed; p of the paired t test, and by Holm's correction over the rows. The test rows are the same in all "
        "runs, so their own chance is not in the intervals."
    )
    if costs := part.get("costs"):
        rounds = f", mean and most of {costs['rounds']} rounds" if costs["rounds"] > 1 else ""
        note += " Times and peak memory (the whole process's) were measured apart, with nothing beside:"
        note += (
            f" {costs['steps']} steps with {costs['threads']} threads{rounds}, in shuffled order, on {costs['device']}"
        )
        note += f" (`{costs['command']}`)."
    elif timed:
        note += " A step's time is its mean, as the machine was."
    if "activations, MiB" in sizes:
        note += " Activations: what the forward of the first batch keeps for its backward."
    return "\n\n".join(["## Scores", *_pictures(part, "comparison"), table(head, rows), note])


def seeds(part: Found) -> str:
    """The mean score of every single run."""
    head = ["method", *(f"seed {seed}" for seed in part["seeds"])]
    rows = [[m["label"], *(_score(r["mean"]) for r in m["runs"])] for m in part["methods"]]
    return f"### Seed by seed\n\n{table(head, rows)}"


def tasks(part: Found) -> str:
    names = list(part["tasks"])
    rows = [[m["label"], *(_half(m["tasks"].get(t, {})) for t in names)] for m in part["methods"]]
    head = ["method", *names]
    base = ["base model", *(_score(part["tasks"][t]["before"]) for t in names)]
    note = "Mean over seeds ± half of its 95 % interval. A score counts up and is in [0, 1], a loss is in nats a token."
    return "\n\n".join(["## Task by task", *_pictures(part, "task_differences"), table(head, [base, *rows]), note])


def rates(part: Found) -> str:
    """All learning rates that were tried, with their scores on validation rows."""
    tried = {m["label"]: m for m in part["methods"] if m["learning_rates_tried"]}
    if not tried:
        return ""
    every = sorted({rate for m in tried.values() for rate in m["learning_rates_tried"]}, key=float)
    rows = []
    for label, m in tried.items():
        cells = {rate: _score(m["learning_rates_tried"].get(rate)) for rate in every}
        taken = f"{m['learning_rate']:g}"
        rows.append([label, *(f"**{text}**" if rate == taken else text for rate, text in cells.items())])
    note = "Mean score on validation rows taken out of the training rows; one run each. Bold: taken."
    return f"## Choice of the learning rate\n\n{table(['method', *every], rows)}\n\n{note}"


def interference(part: Found) -> str:
    if "seesaw" not in part:
        return ""
    names = list(part["tasks"])
    rows = [
        [label, *(_with_interval(g["difference"], g["ci95"], "+") if (g := row.get(t)) else "" for t in names)]
        for label, row in part["seesaw"].items()
    ]
    note = "Score of the adapter that all tasks share minus that of an adapter for this task alone (95 %)."
    title = "## One adapter for all against one for each"
    texts = [title, *_pictures(part, "seesaw"), table(["method", *names], rows), note]
    for label, gains in part["transfer"].items():
        cells = [[task, *(_signed(row.get(t)) for t in names)] for task, row in gains.items()]
        texts.append(
            f"### Transfer with {label}\n\nTrained on one task (rows), scored on each, minus the base model.\n\n"
            f"{table(['trained on', *names], cells)}"
        )
    return "\n\n".join(texts)


def heads(part: Found) -> str:
    pictures = _pictures(part, *(name for name in ALT if name.startswith(("head_", "diversity_"))))
    if not pictures:
        return ""
    found = part["diversity"]
    texts = ["## How alike the heads are", *pictures]
    if found["spearman"] is not None:
        middle = found["spearman_of_means"]
        means = "" if middle is None else f", over the means of {found['methods']} methods {_signed(middle)}"
        texts.append(
            "Spearman's rank correlation between the mean cosine of a run's heads and its mean score: "
            f"{_signed(found['spearman'])} over {found['runs']} runs{means}. "
            "Below 0, heads that differ more go with higher scores."
        )
    return "\n\n".join(texts)


def conflict(part: Found) -> str:
    """Cosines between the tasks' gradients, where they were measured."""
    if not part["conflict"]:
        return ""
    rows = []
    for label, measured in part["conflict"].items():
        numbers = [measured[name] for name in PARTS]
        cells = [
            text for cosine, share in numbers for text in (_signed(cosine), "" if share is None else f"{share:.0%}")
        ]
        rows.append([label, str(len(measured["seeds"])), *cells])
    head = ["method", "runs", *(f"{what} ({name})" for name in PARTS for what in ("cosine", "below 0"))]
    note = (
        "Mean cosine between the gradients of two tasks on the trained adapter, and the share of pairs below 0, for "
        "all of its parameters, its down-projections (A) and its up-projections (B)."
    )
    return f"## Do the tasks' gradients conflict\n\n{table(head, rows)}\n\n{note}"


def _pictures(part: Found, *names: str) -> list[str]:
    """Those of the named pictures that are there."""
    return [
        f"![{ALT[name]}]({file})"
        for name in names
        for file in part["figures"]
        if file.rpartition(".")[0].endswith(f"-{name}")
    ]


def _fields(section: Found) -> str:
    return ", ".join(f"{key} {value}" for key, value in section.items()) or "defaults"


def _count(value: int | None, none: str = "") -> str:
    return none if value is None else f"{value:,}"


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}".replace("-", "−")


def _with_interval(value: float | None, ends: Sequence[float] | None, sign: str = "") -> str:
    if value is None:
        return ""
    text = f"{value:{sign}.3f}" + (f" ({ends[0]:{sign}.3f} to {ends[1]:{sign}.3f})" if ends else "")
    return text.replace("-", "−")


def _half(entry: Found) -> str:
    if entry.get("mean") is None:
        return ""
    half = f" ± {(entry['ci95'][1] - entry['ci95'][0]) / 2:.3f}" if entry["ci95"] else ""
    return f"{entry['mean']:.3f}{half}"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
