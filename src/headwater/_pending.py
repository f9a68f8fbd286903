"""Stand-ins until the data and training packages bring the real ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from transformers import TrainingArguments


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TaskSpec(_Strict):
    name: str
    train: str | None = None
    test: str | None = None
    validation: str | None = None
    metric: Literal["choice_accuracy", "exact_match", "final_number", "loss"] | None = None
    weight: float = Field(1.0, gt=0)
    max_train_rows: int | None = Field(None, gt=0)
    max_test_rows: int | None = Field(None, gt=0)


class MixtureSpec(_Strict):
    strategy: Literal["proportional", "temperature", "uniform", "weights"] = "proportional"
    temperature: float = Field(2.0, gt=0)
    batching: Literal["mixed", "homogeneous", "balanced"] = "mixed"


class DataSpec(_Strict):
    max_length: int = Field(1024, gt=0)
    chat_template: Literal["auto", "always", "never"] = "auto"


@dataclass
class HeadwaterArguments(TrainingArguments):
    loss_normalization: Literal["example", "token"] = "example"
