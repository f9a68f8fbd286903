"""ICM-LoRA: a generator that writes LoRA adapters from a task's vector (arXiv:2501.17635)."""

from .collect import CollectAdapters, collected
from .fit import fit, new_generator
from .generator import AdapterGenerator
from .layout import Layout, read_adapter, write_adapter
from .task_vector import task_vector

__all__ = [
    "AdapterGenerator",
    "CollectAdapters",
    "Layout",
    "collected",
    "fit",
    "new_generator",
    "read_adapter",
    "task_vector",
    "write_adapter",
]
