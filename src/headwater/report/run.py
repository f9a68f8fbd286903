"""Reading a run folder: files to plain values. A file that is missing or broken becomes a note, not an error."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from headwater.errors import HeadwaterError, Problem
from headwater.evaluation.intervals import interval

FILES = ("results.json", "history.jsonl", "analysis.json", "config.yaml")

Interval = tuple[float, float]
_Model = TypeVar("_Model", bound=BaseModel)


class TaskResult(BaseModel):
    metric: str = ""
    n: int = 0
    before: float | None = None
    after: float | None = None


class TaskIntervals(BaseModel):
    before: Interval | None = None
    after: Interval | None = None


class RealisedShare(BaseModel):
    rows: int | None = None
    row_share: float | None = None
    tokens: int | None = None
    token_share: float | None = None


class Extra(BaseModel):
    """What `results.json` may say beyond its schema."""

    tokens: int | None = None
    padding_share: float | None = None
    realised_shares: dict[str, RealisedShare] = {}
    intervals: dict[str, TaskIntervals] = {}
    majority: dict[str, float | None] = {}
    versions: dict[str, str] = {}


class Mean(BaseModel):
    before: float | None = None
    after: float | None = None


class Results(BaseModel):
    method: str = ""
    base_model: str = ""
    seed: int | None = None
    trainable_parameters: int | None = None
    steps: int | None = None
    train_seconds: float | None = None
    tokens_per_second: float | None = None
    tasks: dict[str, TaskResult] = {}
    mean: Mean = Mean()
    extra: Extra = Extra()


class TrainRecord(BaseModel):
    step: int
    loss: float | None = None
    task_losses: dict[str, float | None] = {}
    head_similarity: float | None = None
    head_update_similarity: float | None = None


class EvalValue(BaseModel):
    metric: str = ""
    value: float | None = None
    n: int = 0
    interval: Interval | None = None


class EvalRecord(BaseModel):
    step: int
    tasks: dict[str, EvalValue] = {}


class Gates(BaseModel):
    load: list[float] = []
    gate_entropy: float | None = None
    load_entropy: float | None = None
    dead_experts: list[int] = []


class Analysis(BaseModel):
    head_similarity: dict[str, list[list[float]]] = {}
    routing: dict[str, dict[str, list[float]]] = {}
    gates: dict[str, Gates] = {}


class ConflictPart(BaseModel):
    cosine: list[list[float | None]] = []
    mean: float | None = None
    negative: float | None = None


class Conflicts(BaseModel):
    """What `headwater conflict` wrote; not every run has it."""

    rows_per_task: int = 0
    tasks: list[str] = []
    parts: dict[str, ConflictPart] = {}


@dataclass(frozen=True)
class Score:
    """One task before and after training. A value that is missing or not finite is None.

    Args:
        metric: `loss` counts down and is in nats; every other metric counts up and is in [0, 1].
        n: rows scored.
        majority: what always giving the most frequent answer would score.
    """

    task: str
    metric: str
    n: int
    before: float | None
    after: float | None
    before_interval: Interval | None
    after_interval: Interval | None
    majority: float | None

    @property
    def is_loss(self) -> bool:
        return self.metric == "loss"

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def clear(self) -> bool | None:
        """Whether the two intervals keep apart; None without both."""
        if self.before_interval is None or self.after_interval is None:
            return None
        return self.after_interval[0] > self.before_interval[1] or self.after_interval[1] < self.before_interval[0]


@dataclass(frozen=True)
class Run:
    """What a run folder holds. `notes` says what was missing or unreadable, in whole sentences, by file name."""

    folder: Path
    results: Results | None
    train: list[TrainRecord]
    evals: list[EvalRecord]
    analysis: Analysis | None
    config_text: str | None
    config: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    conflicts: Conflicts | None = None

    @property
    def tasks(self) -> list[str]:
        """Every task that any file names, in the order of `results.json`, then of the others."""
        names: dict[str, None] = dict.fromkeys(self.results.tasks if self.results else [])
        for evaluation in self.evals:
            names |= dict.fromkeys(evaluation.tasks)
        for record in self.train:
            names |= dict.fromkeys(record.task_losses)
        names |= dict.fromkeys(self.analysis.routing if self.analysis else [])
        return list(names)

    @property
    def scores(self) -> list[Score]:
        if self.results is None:
            return []
        extra = self.results.extra
        scores = []
        for task, result in self.results.tasks.items():
            known = extra.intervals.get(task, TaskIntervals())
            before, after = finite(result.before), finite(result.after)
            scores.append(
                Score(
                    task=task,
                    metric=result.metric,
                    n=result.n,
                    before=before,
                    after=after,
                    before_interval=finite_pair(known.before) or score_interval(result.metric, before, result.n),
                    after_interval=finite_pair(known.after) or score_interval(result.metric, after, result.n),
                    majority=finite(extra.majority.get(task)),
                )
            )
        return scores


def finite(value: float | None) -> float | None:
    """`value`, or None for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def finite_pair(pair: Interval | None) -> Interval | None:
    return pair if pair is not None and all(map(math.isfinite, pair)) else None


def score_interval(metric: str, value: float | None, n: int) -> Interval | None:
    """95 % interval of a share of right answers out of `n`; None for a loss, whose spread the mean does not tell."""
    if value is None or n < 1 or metric == "loss" or not 0 <= value <= 1:
        return None
    right = round(value * n)
    if abs(right - value * n) > 1e-3:  # some rows scored between 0 and 1, so the mean alone does not fix the interval
        return None
    return interval([1.0] * right + [0.0] * (n - right))


def _read(path: Path, notes: dict[str, str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        notes[path.name] = f"The run folder has no {path.name}."
    except (OSError, UnicodeDecodeError) as error:
        notes[path.name] = f"{path.name} could not be read: {error}."
    return None


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def read_json(path: Path, model: type[_Model], notes: dict[str, str]) -> _Model | None:
    """A JSON file as `model`; None, and a sentence in `notes` that says why, where that cannot be."""
    text = _read(path, notes)
    if text is None:
        return None
    try:
        return model.model_validate(json.loads(text))
    except ValidationError as error:
        notes[path.name] = f"{path.name} is not what it should be ({_first_error(error)})."
    except (ValueError, RecursionError) as error:
        notes[path.name] = f"{path.name} is not valid JSON ({error})."
    return None


def _read_history(path: Path, notes: dict[str, str]) -> tuple[list[TrainRecord], list[EvalRecord]]:
    train: dict[int, TrainRecord] = {}
    evals: dict[int, EvalRecord] = {}
    broken = []
    for number, line in enumerate((_read(path, notes) or "").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            kind = record.get("kind") if isinstance(record, dict) else None
            # A resumed run writes some steps again; the last word counts.
            if kind == "train":
                step = TrainRecord.model_validate(record)
                train[step.step] = step
            elif kind == "eval":
                evaluation = EvalRecord.model_validate(record)
                evals[evaluation.step] = evaluation
        except (ValueError, RecursionError):
            broken.append(number)
    if broken:
        lines = ", ".join(map(str, broken[:5])) + (", …" if len(broken) > 5 else "")
        notes[path.name] = f"Lines of {path.name} that could not be read are left out: {lines}."
    return [train[s] for s in sorted(train)], [evals[s] for s in sorted(evals)]


def is_run(folder: Path) -> bool:
    """Whether `read_run` finds something in a folder."""
    return any((folder / name).is_file() for name in FILES)


def read_run(folder: Path) -> Run:
    """Reads what there is of `results.json`, `history.jsonl`, `analysis.json` and `config.yaml`.

    Raises:
        HeadwaterError: `folder` is no folder, or holds none of the four files.
    """
    if not folder.is_dir():
        raise HeadwaterError(Problem("there is no such folder", str(folder), "give the output_dir of a run"))
    if not is_run(folder):
        fix = f"give the output_dir of a run, which holds {', '.join(FILES)}"
        raise HeadwaterError(Problem("this folder is not a run", str(folder), fix))
    notes: dict[str, str] = {}
    results = read_json(folder / "results.json", Results, notes)
    train, evals = _read_history(folder / "history.jsonl", notes)
    analysis = read_json(folder / "analysis.json", Analysis, notes)
    config_text = _read(folder / "config.yaml", notes)
    config: dict[str, Any] = {}
    if config_text is not None:
        try:
            loaded = yaml.safe_load(config_text)
            config = loaded if isinstance(loaded, dict) else {}
        except (yaml.YAMLError, ValueError, RecursionError):
            notes["config.yaml"] = "config.yaml is not valid YAML; it is shown as it is."
    conflicts = read_json(folder / "conflict.json", Conflicts, {})
    return Run(folder, results, train, evals, analysis, config_text, config, notes, conflicts)
