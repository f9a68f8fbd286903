"""Training: one adapter on many tasks, on transformers' Trainer."""

from .arguments import HeadwaterArguments
from .method_callback import MethodCallback
from .run import RunResult, train
from .trainer import HeadwaterTrainer

__all__ = ["HeadwaterArguments", "HeadwaterTrainer", "MethodCallback", "RunResult", "train"]
