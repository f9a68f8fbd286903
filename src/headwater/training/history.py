"""`history.jsonl`: one line per log and per evaluation, written as the run goes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import HeadwaterError, Problem
from ..evaluation.scores import TaskScore
from ..files import finite, saying_why, write_text
from .gate_monitor import METRICS
from .head_monitor import HEAD_METRICS

TASK_LOSS = "task_loss/"
AUXILIARY_LOSS = "auxiliary_loss/"


class History:
    """The lines of a run, each appended in one write: a run that is killed leaves at most one torn line, the last."""

    def __init__(self, path: Path):
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines.

        Raises:
            HeadwaterError: if one is damaged.
        """
        if not self.path.exists():
            return []
        found = []
        for number, text in enumerate(self.path.read_bytes().split(b"\n")[:-1], 1):
            try:
                line = json.loads(text)
                found.append({**line, "kind": line["kind"], "step": int(line["step"])})
            except (ValueError, TypeError, KeyError) as error:
                fix = "take the line out of the file"
                raise HeadwaterError(Problem(f"this line is damaged: {error}", f"{self.path}:{number}", fix)) from error
        return found

    def start(self, checkpoint: Path | None = None, rows: Mapping[str, str] | None = None) -> None:
        """Begins a run: empty, or with what was written before the checkpoint that it is resumed from, but for scores
        before training of other test rows than `rows` tells."""
        step = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step if checkpoint else -1
        kept = [line for line in self.lines() if line["step"] <= step]
        known = rows or {}

        def stays(line: dict[str, Any]) -> bool:  # an evaluation of a part of the rows is no score before training
            scored = line.get("tasks", {}).items()
            return line["step"] > 0 or all(s["rows"] in (None, known.get(name)) for name, s in scored)

        kept = [line for line in kept if stays(line)]
        write_text(self.path, "".join(map(_line, sorted(kept, key=lambda line: line["step"]))))

    def append(self, entry: dict[str, Any]) -> None:
        """Adds one line; non-finite numbers become null."""
        with saying_why(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))

    def append_scores(self, step: int, scores: Mapping[str, TaskScore], rows: Mapping[str, str]) -> None:
        """Adds an evaluation after `step` steps; `rows` has what tells each task's test rows from others, where all of
        them were scored."""
        tasks = {
            name: {
                "metric": score.metric,
                "value": score.value,
                "n": score.n,
                "majority": score.majority,
                "interval": score.detail.get("interval"),
                "rows": rows.get(name),
            }
            for name, score in scores.items()
        }
        self.append({"kind": "eval", "step": step, "tasks": tasks})

    def scores(self, step: int, rows: Mapping[str, str]) -> dict[str, TaskScore]:
        """The first evaluation after `step` steps of tasks that have these test rows, without the values of single
        rows; empty if there was none."""
        for line in self.lines():
            tasks = line["tasks"] if line["kind"] == "eval" and line["step"] == step else {}
            if tasks and {name: s["rows"] for name, s in tasks.items()} == dict(rows):
                return {
                    name: TaskScore(
                        name, s["metric"], s["value"], s["n"], s["majority"], [], {"interval": s["interval"]}
                    )
                    for name, s in tasks.items()
                }
        return {}


def named(logs: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The entries of a log that begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in logs.items() if key.startswith(prefix)}


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(finite(entry), ensure_ascii=False) + "\n"


class HistoryCallback(TrainerCallback):
    """Writes each log of training losses to the history, on the first rank only."""

    def __init__(self, history: History):
        self.history = history

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        keys = ("epoch", "loss", "learning_rate", "tokens_per_second", "grad_norm", *METRICS, *HEAD_METRICS)
        self.history.append(
            {
                "kind": "train",
                "step": state.global_step,
                **{key: logs[key] for key in keys if key in logs},
                "task_losses": named(logs, TASK_LOSS),
                **({"auxiliary_losses": auxiliary} if (auxiliary := named(logs, AUXILIARY_LOSS)) else {}),
            }
        )
