"""The keys of a run's `training:` and `method:`: those of the dataclasses that take them, checked one by one."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any, Union

from pydantic import ConfigDict, GetCoreSchemaHandler
from pydantic_core import core_schema
from typing_extensions import TypedDict

DEFAULT_METHOD = "rlora"
# Written by PEFT into an adapter's own file; a run's file has no say in them.
NOT_METHOD_KEYS = {
    "peft_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
}
# They stand at the top of the file, once.
TOP_LEVEL_TRAINING_KEYS = {"output_dir", "seed"}


def _plain(annotation: Any) -> Any:
    """The type without its `str` arm where it has an enum: `IntervalStrategy | str` would take any text."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        arms = typing.get_args(annotation)
        if any(isinstance(arm, type) and issubclass(arm, enum.Enum) for arm in arms):
            arms = tuple(arm for arm in arms if arm is not str)
        return Union[arms]  # noqa: UP007  (arms are only known here)
    return annotation


def _keys_of(config_class: type, *, without: set[str], extra: dict[str, Any] | None = None) -> Any:
    """A TypedDict whose keys are a dataclass's fields, all optional: pydantic then checks keys and types one by one."""
    hints = typing.get_type_hints(config_class)
    names = [f.name for f in dataclasses.fields(config_class) if f.init and f.name not in without]
    keys = TypedDict("Keys", {**{n: _plain(hints[n]) for n in names}, **(extra or {})}, total=False)  # type: ignore[misc]
    keys.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True, use_enum_values=True)  # type: ignore[attr-defined]
    return keys


def training_keys() -> Any:
    from headwater.training.arguments import HeadwaterArguments

    # Trainer takes True for "the last checkpoint", though its annotation does not say so.
    extra = {"resume_from_checkpoint": bool | str | None}
    return _keys_of(HeadwaterArguments, without=TOP_LEVEL_TRAINING_KEYS, extra=extra)


def method_configs() -> dict[str, type]:
    from peft import LoraConfig

    from headwater.methods.registry import methods

    return {**{m.name: m.config for m in methods()}, "lora": LoraConfig}


def method_fields(name: str) -> set[str]:
    """The keys that `method:` takes besides `name` for that method; none for a name that is no method's."""
    known = method_configs().get(name)
    return set() if known is None else {*method_keys(known).__annotations__} - {"name"}


def method_keys(config_class: type) -> Any:
    # PEFT's LoRA takes any alpha, though its annotation says int.
    return _keys_of(config_class, without=NOT_METHOD_KEYS, extra={"name": str, "lora_alpha": int | float})


def method_name(value: Any) -> Any:
    return value.get("name", DEFAULT_METHOD) if isinstance(value, dict) else None


class TrainingSchema:
    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return handler.generate_schema(training_keys())


class MethodSchema:
    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        choices = {name: handler.generate_schema(method_keys(cls)) for name, cls in method_configs().items()}
        return core_schema.tagged_union_schema(choices, discriminator=method_name)
