"""Tells stock PEFT of a method: a member of its `PeftType` enum, then its official registration call."""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType, register_peft_method

from ..methods.registry import Method
from .model import MethodModel


def register_with_peft(method: Method) -> None:
    """Registers one method. Harmless to call again for the same one."""
    name = method.peft_type
    if name in PeftType.__members__:
        return
    _add_member(name)
    tuner = type(
        f"{method.config.__name__.removesuffix('Config')}Model",
        (MethodModel,),
        {
            "__doc__": f"PEFT tuner of {method.title} ({method.paper}).",
            "__module__": __name__,
            "prefix": f"{method.name}_",
            "method": method,
        },
    )
    globals()[tuner.__name__] = tuner  # pickle and copy look classes up by module and name
    register_peft_method(name=method.name, config_cls=method.config, model_cls=tuner)


def _add_member(name: str) -> None:
    # PEFT has no entry point for third parties, and parts of PEFT and transformers read `.value`, so a plain string
    # will not do. An enum has no public way to grow; these tables are what `EnumType` itself fills.
    member: Any = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    if PeftType(name) is not member or PeftType[name] is not member:
        raise RuntimeError(f"this Python's enum does not accept a new PeftType member ({name}); please report it")
