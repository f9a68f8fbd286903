"""Reading a comparison's folder: `comparison.json` and the folders of its runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel

from headwater.errors import HeadwaterError, Problem
from headwater.report.run import Interval, Results, Run, finite, finite_pair, is_run, read_json, read_run

# What is not finite is shown as missing, as in a run's report.
_Number = Annotated[float | None, AfterValidator(finite)]
_Ends = Annotated[Interval | None, AfterValidator(finite_pair)]


class TaskSummary(BaseModel):
    metric: str = ""
    before: _Number = None
    mean: _Number = None
    ci95: _Ends = None
    paired_difference: _Number = None
    paired_ci95: _Ends = None


class SummaryExtra(BaseModel):
    tasks: dict[str, TaskSummary] = {}
    before: _Number = None
    train_seconds: _Number = None
    seconds_per_step: _Number = None
    peak_memory_bytes: _Number = None
    activation_bytes: _Number = None


class Summary(BaseModel):
    method: str
    n: int
    trainable_parameters: int
    mean: _Number = None
    ci95: _Ends = None
    paired_difference: _Number = None
    paired_ci95: _Ends = None
    extra: SummaryExtra = SummaryExtra()


class MethodAbout(BaseModel):
    label: str
    method: dict[str, Any] = {}
    solved: str | None = None
    deviation: _Number = None
    learning_rate: _Number = None
    align: dict[str, Any] | None = None


class Choice(BaseModel):
    seed: int | None = None
    scores: dict[str, _Number] = {}
    chosen: _Number = None


class ComparisonExtra(BaseModel):
    seeds: list[int] = []
    match: str = ""
    budget: int | None = None
    methods: list[MethodAbout] = []
    learning_rate: dict[str, Choice] = {}


class Content(BaseModel):
    runs: list[dict[str, Any]] = []
    summary: list[Summary] = []
    extra: ComparisonExtra = ComparisonExtra()


@dataclass(frozen=True)
class Comparison:
    """What a comparison's folder holds.

    Args:
        results: label -> the results of its runs, in the order of the seeds.
        folders: label -> the folders of its runs, in the same order.
    """

    folder: Path
    content: Content
    results: dict[str, list[Results]]
    folders: dict[str, list[Path]]

    @property
    def labels(self) -> list[str]:
        return [entry.method for entry in self.content.summary]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for entry in self.content.summary for task in entry.extra.tasks))

    def about(self, label: str) -> MethodAbout:
        return next((m for m in self.content.extra.methods if m.label == label), MethodAbout(label=label))

    @cached_property
    def runs(self) -> dict[str, list[Run]]:
        """label -> what is still there of its run folders."""
        return {label: [read_run(f) for f in folders if is_run(f)] for label, folders in self.folders.items()}


def read_comparison(folder: Path) -> Comparison:
    """Reads `comparison.json`.

    Raises:
        HeadwaterError: the folder holds none, or one that cannot be read.
    """
    notes: dict[str, str] = {}
    content = read_json(folder / "comparison.json", Content, notes)
    if content is None or not content.summary:
        what = notes.get("comparison.json", "comparison.json names no method.")
        raise HeadwaterError(Problem(what.rstrip("."), str(folder), "give the output_dir of headwater compare"))
    results: dict[str, list[Results]] = {entry.method: [] for entry in content.summary}
    folders: dict[str, list[Path]] = {entry.method: [] for entry in content.summary}
    for run in content.runs:
        about = run.get("extra", {})
        label = str(about.get("label", run.get("method")))
        if label in results:
            results[label].append(Results.model_validate(run))
            folders[label].append(folder / str(about.get("folder", "")))
    return Comparison(folder, content, results, folders)
