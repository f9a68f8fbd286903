"""What is compared: the `compare:` section of a run's file."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, field_validator, model_validator

from headwater.seeds import InRange
from headwater.tuner.align import AlignSpec

OWN_FOLDERS = ("figures", "learning-rate", "adapter")
"""What a comparison's folder holds besides its runs, and what tells a single run's; so no method may be labelled so."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Variant(BaseModel):
    """One method of a comparison: what it changes in the run's file. A text alone is the method's name.

    Args:
        label: its name in tables and its folder's name; the method's name by default.
        method: `name`, by default the file's, and fields; those that the method shares with the file's `method:` are
            taken from there unless they stand here.
        training: keys that differ, e.g. `learning_rate`, which is then not chosen on validation rows.
        align: an alignment loss for this one alone; null switches the file's off.
        mixture: keys of the mixture that differ, e.g. `batching`.
        train_on: names of the tasks it is trained on; it is scored on all.
        match: the field that is solved for, e.g. `num_experts`, or `none`; by default as the comparison says.
    """

    model_config = ConfigDict(extra="forbid")

    label: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9._+-]*)?$")
    method: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    align: AlignSpec | None = None
    mixture: dict[str, Any] = Field(default_factory=dict)
    train_on: list[str] | None = Field(None, min_length=1)
    match: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        value = {"method": value} if isinstance(value, str) else value
        if isinstance(value, dict) and isinstance(value.get("method"), str):
            value = {**value, "method": {"name": value["method"]}}
        return value

    @field_validator("label")
    @classmethod
    def _folder_is_free(cls, label: str) -> str:
        if label in OWN_FOLDERS:
            raise ValueError("this name is taken by a folder of headwater's own; choose another")
        return label


class CompareSpec(BaseModel):
    """What is compared and how.

    Args:
        methods: the first is the one that the others are compared with.
        seeds: every method is trained once with each.
        match: what is solved for so that all methods have the same number of trainable parameters: `rank` or `heads`,
            in the field that each method declares for it, or `none`.
        parameters: that number; by default that of the file's own method where it is among them by its bare name and
            the first one has no fields of its own either, else that of the first, as it is given.
        tolerance: how far from it a method may be, as a share; farther is an error.
        learning_rate: learning rates to choose from, for each method by itself, on validation rows.
        selection_seed: the seed of the runs that choose; not one of `seeds`.
    """

    model_config = ConfigDict(extra="forbid")

    methods: list[Variant] = Field(default_factory=list)
    seeds: list[Annotated[StrictInt, InRange]] = Field([0, 1, 2], min_length=1)
    match: Literal["rank", "heads", "none"] = "rank"
    parameters: int | None = Field(None, gt=0)
    tolerance: float = Field(0.05, ge=0, allow_inf_nan=False)
    learning_rate: list[Positive] = Field(default_factory=list)
    selection_seed: Annotated[StrictInt, InRange] = 1000

    @field_validator("seeds", "learning_rate")
    @classmethod
    def _distinct(cls, values: list[Any]) -> list[Any]:
        repeated = [value for value, count in Counter(values).items() if count > 1]
        if repeated:
            raise ValueError(f"{', '.join(map(str, repeated))} is given more than once")
        return values

    @model_validator(mode="after")
    def _selection_has_its_own_seed(self) -> CompareSpec:
        if self.learning_rate and self.selection_seed in self.seeds:
            raise ValueError(
                f"selection_seed {self.selection_seed} is one of seeds; what chooses the learning rate must not be "
                "what is reported"
            )
        return self
