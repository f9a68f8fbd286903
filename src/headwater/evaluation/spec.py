"""How held-out rows are scored: the `evaluation:` section of a run's file."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ChoiceNormalization = Literal["none", "tokens", "bytes"]


class EvaluationSpec(BaseModel):
    """Settings of an evaluation.

    Args:
        batch_size: rows per forward, > 0; changes the cost, not the scores.
        max_new_tokens: most tokens that a generated answer may have, > 0; one that is longer is cut off.
        choice_normalization: what a choice's log-probability is divided by before choices are compared: nothing,
            its number of tokens, or its number of UTF-8 bytes.
        max_rows_during_training: rows per task that an evaluation *during* training scores, > 0; the evaluations
            before and after score all rows.
    """

    model_config = ConfigDict(extra="forbid")

    batch_size: int = Field(default=16, gt=0)
    max_new_tokens: int = Field(default=256, gt=0)
    choice_normalization: ChoiceNormalization = "none"
    max_rows_during_training: int = Field(default=100, gt=0)
