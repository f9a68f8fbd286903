"""The registered methods, and their configs by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig

from ..errors import HeadwaterError, Problem

if TYPE_CHECKING:
    from .base import Branch, MethodConfig


@dataclass(frozen=True)
class Method:
    """One registered method.

    `peft_type` is the method's name in capitals, in the file format as well; `family` groups methods in listings.
    `rank_field` and `heads_field` name the config fields that set its size, for comparisons at equal parameters;
    a method without heads has no `heads_field`.
    """

    name: str
    title: str
    paper: str
    family: str
    config: type[MethodConfig]
    branch: type[Branch]
    needs_task_ids: bool = False
    mergeable: bool = False
    rank_field: str = "r"
    heads_field: str | None = None

    @property
    def peft_type(self) -> str:
        return self.name.upper()

    def as_dict(self) -> dict[str, Any]:
        """What `headwater methods --json` prints."""
        keys = ("name", "title", "paper", "family", "config", "peft_type", "needs_task_ids", "mergeable")
        return {key: self.config.__name__ if key == "config" else getattr(self, key) for key in keys}


_METHODS: dict[str, Method] = {}
_LISTENERS: list[Callable[[Method], None]] = []


def register(new: Method) -> None:
    """Makes a method known, to headwater and to PEFT. A third party's method file calls it just as ours do.

    Raises:
        HeadwaterError: if the name is taken by another config.
    """
    known = _METHODS.get(new.name)
    if known is not None:
        raise HeadwaterError(f"a method named {new.name!r} is registered already, by {known.config.__name__}")
    new.config.method_name = new.name
    _METHODS[new.name] = new
    for listener in _LISTENERS:
        listener(new)


def on_register(listener: Callable[[Method], None]) -> None:
    """Calls `listener` for every method known now and later. The tuner uses it to tell PEFT."""
    _LISTENERS.append(listener)
    for known in _METHODS.values():
        listener(known)


def methods() -> list[Method]:
    """All registered methods, in order of registration."""
    return list(_METHODS.values())


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        HeadwaterError: if there is none; names the nearest.
    """
    try:
        return _METHODS[name]
    except KeyError:
        raise HeadwaterError(Problem(f"unknown method {name!r}", fix=_nearest(name, [*_METHODS, "lora"]))) from None


def make_config(name: str, **fields: Any) -> PeftConfig:
    """The config of a method by name: `make_config("rlora", r=8, num_heads=3)`. Name "lora" gives PEFT's own LoRA.

    Raises:
        HeadwaterError: on an unknown name or field (names the nearest), or a field out of range.
    """
    config_class: type[PeftConfig] = LoraConfig if name == "lora" else method(name).config
    known = [f.name for f in dataclasses.fields(config_class) if f.init]
    unknown = [f for f in fields if f not in known]
    if unknown:
        raise HeadwaterError(
            *(Problem(f"unknown field {f!r} of method {name!r}", f, fix=_nearest(f, known)) for f in unknown)
        )
    try:
        return config_class(**fields)
    except HeadwaterError:
        raise
    except (TypeError, ValueError) as error:
        raise HeadwaterError(Problem(f"{error}", f"method {name!r}")) from error


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
