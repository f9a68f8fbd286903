"""Which heads each task uses, and how alike the heads have become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from headwater.data.encode import DataSpec
    from headwater.data.tasks import Task


def routing_by_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    data_spec: DataSpec,
    rows_per_task: int = 16,
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Mean gate of each head: `{"routing": {task: {module: [N]}}}`."""
    raise NotImplementedError


def head_similarity(model: nn.Module, adapter_name: str = "default") -> dict[str, list[list[float]]]:
    """Cosine between the up-projections of each two heads: `{module: [N][N]}`."""
    raise NotImplementedError
