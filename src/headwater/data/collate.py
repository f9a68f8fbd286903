"""Encoded rows to a padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.data.encode import IGNORED, Encoded


@dataclass(frozen=True)
class Collator:
    """Pads on the right and marks padding by length, never by id: some models pad with the end token, a real target.

    Args:
        pad_token_id: what to fill `input_ids` with.
        pad_to_multiple_of: round the width up to a multiple of this; None for the longest row's length.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels`: int64 `[batch, width]`; `headwater_task_ids`: int64 `[batch]`."""
        width = max(map(len, rows))
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), width)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        for i, row in enumerate(rows):
            batch["input_ids"][i, : len(row)] = torch.tensor(row.input_ids)
            batch["attention_mask"][i, : len(row)] = 1
            batch["labels"][i, : len(row)] = torch.tensor(row.labels)
        return {**batch, "headwater_task_ids": torch.tensor([row.task for row in rows])}
