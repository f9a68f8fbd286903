"""What every method's config has: PEFT's fields under PEFT's names, and checks that name every mistake at once."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig, PeftType

from ..errors import HeadwaterError, Problem
from .registry import method

_TYPES: dict[str, tuple[tuple[type, ...], str]] = {  # by annotation, of those fields that a range check would trip over
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a finite number"),
    "bool": ((bool,), "true or false"),
    "int | None": ((int, type(None)), "a whole number or nothing"),
}


@dataclass
class MethodConfig(PeftConfig):
    """Fields that every method has. Names are PEFT's wherever PEFT has the field.

    Args:
        r: rank of the down-projection.
        lora_alpha: numerator of the scaling.
        use_rslora: scaling is `lora_alpha / sqrt(r)` instead of `lora_alpha / r`.
        lora_dropout: dropout on the layer's input x, before the down-projection.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in `peft.LoraConfig`.
        rank_pattern, alpha_pattern: module name or regular expression -> rank or alpha there.
        init_seed: seed of the initial draw; None draws from torch's global generator, so `torch.manual_seed` rules it.
    """

    r: int = 8
    lora_alpha: float = 16
    use_rslora: bool = False
    lora_dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_seed: int | None = None

    method_name: ClassVar[str] = ""
    files: ClassVar[tuple[str, ...]] = ()
    """Fields that name files or folders, from which the adapter is made."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method_name:
            self.peft_type = PeftType(method(self.method_name).peft_type)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
        problems = [*self._wrong_types(), *(p for p in self.problems() if p is not None)]
        if problems:
            raise HeadwaterError(*problems)

    def _wrong_types(self) -> list[Problem]:
        """Fields of the wrong type; set to their defaults, so that `problems` can go on to check the others."""
        wrong = []
        for known in dataclasses.fields(self):
            kinds, called = _TYPES.get(str(known.type), ((), ""))
            value = getattr(self, known.name)
            fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
            if called and not (fits and (not isinstance(value, float) or math.isfinite(value))):
                wrong.append(Problem(f"{known.name} must be {called}, not {value!r}", known.name))
                setattr(self, known.name, known.default)
        return wrong

    def problems(self) -> list[Problem | None]:
        """What is wrong with the fields; a method extends the list with checks of its own."""
        return [
            self.check("r", self.r >= 1, "must be at least 1"),
            self.check("lora_dropout", 0 <= self.lora_dropout < 1, "must be in [0, 1)"),
            self.check("lora_alpha", self.lora_alpha > 0, "must be positive"),
            *(
                Problem(f"rank {rank!r} for {key!r} is not a positive whole number", "rank_pattern")
                for key, rank in self.rank_pattern.items()
                if not isinstance(rank, int) or rank < 1
            ),
            *(
                Problem(f"alpha {alpha!r} for {key!r} is not a positive number", "alpha_pattern")
                for key, alpha in self.alpha_pattern.items()
                if not isinstance(alpha, int | float) or not 0 < alpha < math.inf
            ),
            Problem("cannot be used when `target_modules` is a regular expression", "layers_to_transform")
            if isinstance(self.target_modules, str)
            and self.target_modules.lower() != "all-linear"
            and (self.layers_to_transform is not None or self.layers_pattern is not None)
            else None,
            Problem("needs `layers_to_transform`, which says which layers", "layers_pattern")
            if self.layers_pattern and self.layers_to_transform is None
            else None,
        ]

    def problems_with_tasks(self, count: int) -> list[Problem | None]:
        """What is wrong with the fields when a run has `count` tasks."""
        known = getattr(self, "num_tasks", count)
        return [
            Problem(
                f"num_tasks is {known}, but there are {count} tasks", "num_tasks", "leave it out to have it counted"
            )
            if known < count
            else None
        ]

    def check(self, name: str, ok: bool, rule: str) -> Problem | None:
        """A `Problem` that names the field and its value unless `ok`."""
        return None if ok else Problem(f"{name} {rule}, not {getattr(self, name)!r}", name)

    def one_of(self, name: str, allowed: tuple[str, ...]) -> Problem | None:
        """A `Problem` unless the field has one of the `allowed` values."""
        value = getattr(self, name)
        return None if value in allowed else Problem(f"{name} is one of {', '.join(allowed)}, not {value!r}", name)

    @property
    def needs_task_ids(self) -> bool:
        """Whether every forward needs the tasks of the rows."""
        return method(self.method_name).needs_task_ids

    def scaling(self, r: int, alpha: float) -> float:
        """The factor s on the whole update, for a layer of rank r."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r
