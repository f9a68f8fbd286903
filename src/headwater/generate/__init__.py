"""ICM-LoRA: a generator that writes LoRA adapters from a task's vector (arXiv:2501.17635)."""

from .best import Best, best_of, score_adapter
from .collect import CollectAdapters, collected
from .fit import fit, new_generator
from .generator import AdapterGenerator
from .layout import Layout, read_adapter, write_adapter
from .task_vector import task_vector

__all__ = [
    "AdapterGenerator",
    "Best",
    "CollectAdapters",
    "Layout",
    "best_of",
    "collected",
    "fit",
    "new_generator",
    "read_adapter",
    "score_adapter",
    "task_vector",
    "write_adapter",
]
