"""Training: one adapter on many tasks, on transformers' Trainer."""

from .arguments import HeadwaterArguments
from .run import RunResult, train
from .trainer import HeadwaterTrainer

__all__ = ["HeadwaterArguments", "HeadwaterTrainer", "RunResult", "train"]
