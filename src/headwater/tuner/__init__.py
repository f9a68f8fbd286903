"""The PEFT side, written once for all methods."""

from ..methods.registry import on_register
from .align import AlignLoss, AlignSpec, align
from .context import Context
from .layer import MethodLayer
from .merging import merge_task, merge_with_gates
from .model import (
    MethodModel,
    context_of,
    follow_loss,
    is_adapted,
    needs_task_ids,
    observe,
    task_ids,
)
from .new_task import add_task
from .registration import register_with_peft

on_register(register_with_peft)

__all__ = [
    "AlignLoss",
    "AlignSpec",
    "Context",
    "MethodLayer",
    "MethodModel",
    "add_task",
    "align",
    "context_of",
    "follow_loss",
    "is_adapted",
    "merge_task",
    "merge_with_gates",
    "needs_task_ids",
    "observe",
    "task_ids",
]
