"""Adapters for tools that know nothing of headwater: merged models, plain LoRA, one plain LoRA per task."""

from .folder import check_output, new_folder
from .lora import rewrite_lora
from .merged import write_merged
from .per_task import Exported, by_mean_gates, by_task_id, check_differs_by_task
from .plain import as_plain_lora, write_plain_lora
from .vllm import serve_command

__all__ = [
    "Exported",
    "as_plain_lora",
    "by_mean_gates",
    "by_task_id",
    "check_differs_by_task",
    "check_output",
    "new_folder",
    "rewrite_lora",
    "serve_command",
    "write_merged",
    "write_plain_lora",
]
