"""Held-out scores per task: choices by likelihood, generated answers, loss, each with an interval."""

from headwater.evaluation.generate import generate_text
from headwater.evaluation.intervals import interval
from headwater.evaluation.scores import Progress, TaskScore, mean_score
from headwater.evaluation.scoring import score_task, score_tasks
from headwater.evaluation.spec import EvaluationSpec

__all__ = [
    "EvaluationSpec",
    "Progress",
    "TaskScore",
    "generate_text",
    "interval",
    "mean_score",
    "score_task",
    "score_tasks",
]
