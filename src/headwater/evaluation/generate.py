"""Generate text for a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from headwater.data.encode import DataSpec
    from headwater.data.rows import Row


def generate_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Row],
    *,
    task_index: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    data_spec: DataSpec | None = None,
) -> list[str]:
    """Continue each prompt; returns the continuations only, in the order of the prompts."""
    raise NotImplementedError
