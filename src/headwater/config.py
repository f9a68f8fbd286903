"""A run's file: what may stand in it, and how it is read so that every error names its file, line and field."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema
from typing_extensions import Self, TypedDict

from headwater.compare.spec import CompareSpec
from headwater.data.encode import DataSpec
from headwater.data.mixture import MixtureSpec
from headwater.data.tasks import TaskSpec
from headwater.errors import HeadwaterError, Problem
from headwater.evaluation.spec import EvaluationSpec
from headwater.marked_yaml import Document, KeyPath, apply_overrides, dump, field_name, read_document
from headwater.tuner.align import AlignSpec

DEFAULT_METHOD = "rlora"
# What a file gets that has no `method:`. Where it comes from, and how sure that is: docs/recommended.md.
RECOMMENDED = {"name": DEFAULT_METHOD, "r": 8, "num_heads": 3, "lora_alpha": 16, "target_modules": "all-linear"}
RECOMMENDED_LEARNING_RATE = 1e-3
# Written by PEFT into an adapter's own file; a run's file has no say in them.
_NOT_METHOD_KEYS = {
    "peft_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
}
# They stand at the top of the file, once.
_TOP_LEVEL_TRAINING_KEYS = {"output_dir", "seed"}


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


def _training_keys() -> Any:
    from headwater.training.arguments import HeadwaterArguments

    # Trainer takes True for "the last checkpoint", though its annotation does not say so.
    extra = {"resume_from_checkpoint": bool | str | None}
    return _keys_of(HeadwaterArguments, without=_TOP_LEVEL_TRAINING_KEYS, extra=extra)


def _method_configs() -> dict[str, type]:
    from peft import LoraConfig

    from headwater.methods.registry import methods

    return {**{m.name: m.config for m in methods()}, "lora": LoraConfig}


def method_fields(name: str) -> set[str]:
    """The keys that `method:` takes besides `name` for that method; none for a name that is no method's."""
    known = _method_configs().get(name)
    return set() if known is None else {*_method_keys(known).__annotations__} - {"name"}


def _method_keys(config_class: type) -> Any:
    # PEFT's LoRA takes any alpha, though its annotation says int.
    return _keys_of(config_class, without=_NOT_METHOD_KEYS, extra={"name": str, "lora_alpha": int | float})


def _method_name(value: Any) -> Any:
    return value.get("name", DEFAULT_METHOD) if isinstance(value, dict) else None


class _TrainingSchema:
    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return handler.generate_schema(_training_keys())


class _MethodSchema:
    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        choices = {name: handler.generate_schema(_method_keys(cls)) for name, cls in _method_configs().items()}
        return core_schema.tagged_union_schema(choices, discriminator=_method_name)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelSpec(_Strict):
    """How the base model is loaded; the arguments of `headwater.base_model.load_base_model`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    device_map: str | dict[str, int | str] | None = None
    attn_implementation: str | None = None


class RunConfig(BaseModel):
    """All that a run is told. Every key is described in docs/config.md.

    Args:
        model_name_or_path: hub id, local folder or GGUF file; relative to the current folder.
        model: how the base model is loaded.
        method: `name` and the fields of that method's config; where it is left out, `RECOMMENDED`, and then
            `RECOMMENDED_LEARNING_RATE` unless `training` has one.
        tasks: at least one; their paths are relative to `base_dir`. A task's position is its task id.
        mixture: how tasks are mixed.
        align: an alignment loss between tasks, with any method; it then draws balanced batches.
        data: how rows become tokens.
        training: keys of `transformers.TrainingArguments` and `headwater.training.HeadwaterArguments`.
        evaluation: how held-out rows are scored.
        compare: which methods `headwater compare` trains, and how; a single run has no use for it.
        output_dir: the run folder; relative to the current folder.
        seed: of the initial weights, the sampler and the dropout.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), defer_build=True)

    model_name_or_path: str = Field(min_length=1)
    model: ModelSpec = Field(default_factory=ModelSpec)
    method: Annotated[dict[str, Any], _MethodSchema()] = RECOMMENDED
    tasks: list[TaskSpec] = Field(min_length=1)
    mixture: MixtureSpec = Field(default_factory=MixtureSpec)
    align: AlignSpec | None = None
    data: DataSpec = Field(default_factory=DataSpec)
    training: Annotated[dict[str, Any], _TrainingSchema()] = {}
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    compare: CompareSpec | None = None
    output_dir: str = Field(min_length=1)
    seed: int = Field(0, ge=0)

    _base_dir: Path = PrivateAttr(default_factory=Path.cwd)
    _document: Document = PrivateAttr(default_factory=lambda: Document({}))

    @field_validator("method", mode="after")
    @classmethod
    def _method_is_sound(cls, method: dict[str, Any]) -> dict[str, Any]:
        from headwater.methods.registry import make_config

        name = method.get("name", DEFAULT_METHOD)
        fields = {key: value for key, value in method.items() if key != "name"}
        make_config(name, **fields)
        return {"name": name, **fields}

    @field_validator("training", mode="after")
    @classmethod
    def _training_is_sound(cls, training: dict[str, Any]) -> dict[str, Any]:
        from headwater.training.arguments import HeadwaterArguments

        # Settings that exclude each other show only when they meet; no folder is made by this.
        resume = training.get("resume_from_checkpoint")
        HeadwaterArguments(**{**training, "resume_from_checkpoint": None if isinstance(resume, bool) else resume})
        return training

    @model_validator(mode="after")
    def _learning_rate_is_the_methods(self) -> Self:
        if "method" not in self.model_fields_set:
            self.training.setdefault("learning_rate", RECOMMENDED_LEARNING_RATE)
        return self

    @model_validator(mode="after")
    def _method_knows_the_number_of_tasks(self) -> Self:
        from headwater.methods.base import MethodConfig
        from headwater.methods.registry import make_config

        if "num_tasks" in (field.name for field in dataclasses.fields(_method_configs()[self.method["name"]])):
            self.method.setdefault("num_tasks", len(self.tasks))
        config = make_config(**self.method)
        if isinstance(config, MethodConfig):
            problems = [problem for problem in config.problems_with_tasks(len(self.tasks)) if problem is not None]
            if problems:
                raise HeadwaterError(*(dataclasses.replace(p, where=f"method.{p.where}") for p in problems))
        return self

    @property
    def base_dir(self) -> Path:
        """The folder that the tasks' relative paths start from: the file's, else the current one."""
        return self._base_dir

    def where(self, *path: str | int) -> str:
        """``file:line: field`` of a value, e.g. ``where("tasks", 0, "train")``."""
        return self._document.where(path)

    def placed(self, error: HeadwaterError) -> HeadwaterError:
        """The same problems, with file and line where one names a key of the config or a file that the config names."""
        files = {
            spec: ("tasks", index, split)
            for index, task in enumerate(self.tasks)
            for split in ("train", "validation", "test")
            if (spec := getattr(task, split))
        }
        problems = []
        for problem in error.problems:
            path = files.get(problem.where) or self._path_of(problem.where)
            if path is not None:
                place = self.where(*path)
                problem = dataclasses.replace(
                    problem, where=f"{place}: {problem.where}" if path[0] == "tasks" else place
                )
            problems.append(problem)
        return HeadwaterError(*problems)

    def _path_of(self, name: str) -> KeyPath | None:
        """The path of a key named as in ``training.max_steps``, or by a field of the method; None if it is no key."""
        first, _, rest = name.partition(".")
        if first in ("training", "method") and rest.isidentifier():
            return first, rest
        if name in RunConfig.model_fields:
            return (name,)
        known = typing.get_type_hints(_method_configs()[self.method["name"]])
        return ("method", name) if name in known and name not in _NOT_METHOD_KEYS else None


class TasksFile(RunConfig):
    """A run's file of which only `tasks` is looked at, so that nothing else need be there."""

    model_name_or_path: str = ""
    output_dir: str = ""


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, model: type[RunConfig] = RunConfig
) -> RunConfig:
    """Read a run's YAML file.

    Args:
        path: the file. Its folder is the `base_dir`.
        overrides: texts like ``training.max_steps=10`` or ``tasks.0.weight=2``, applied in order on top of the file.
        model: which keys the file must have: those of a run, or only `tasks` (`TasksFile`).

    Raises:
        HeadwaterError: with every problem of the file and the overrides, each with file, line and field.
    """
    document = read_document(path)
    problems = apply_overrides(document, overrides)
    return _checked(document, Path(path).resolve().parent, model, problems)


def changed(config: RunConfig, sections: dict[str, Any], places: dict[KeyPath, str]) -> RunConfig:
    """The config with some sections replaced, checked like a file.

    Args:
        sections: top-level key -> its new value.
        places: where the values in these sections were given: key path -> e.g. ``run.yaml:12``, for errors.

    Raises:
        HeadwaterError: with every problem of the new config.
    """
    kept = {path: place for path, place in config._document.places.items() if path and path[0] not in sections}
    data = {**config.model_dump(exclude_unset=True), **sections}
    document = Document(data, config._document.source, {**kept, **places})
    return _checked(document, config.base_dir, type(config))


def _checked(document: Document, base_dir: Path, model: type[RunConfig], problems: Sequence[Problem] = ()) -> RunConfig:
    try:
        config = model.model_validate(document.data)
    except ValidationError as error:
        raise HeadwaterError(*explain(error, document, model), *problems) from None
    if problems:
        raise HeadwaterError(*problems)
    config._base_dir, config._document = base_dir, document
    return config


def dump_config(config: RunConfig) -> str:
    """The config as YAML with all defaults written out and local paths made absolute, so that it can be moved."""
    data = config.model_dump(mode="json", exclude={"compare"})
    if "batching" not in config.mixture.model_fields_set:
        del data["mixture"]["batching"]  # left open, it is balanced where an alignment loss needs that
    data["model_name_or_path"] = _absolute(Path.cwd(), data["model_name_or_path"])
    data["output_dir"] = str(Path(data["output_dir"]).absolute())
    for field in getattr(_method_configs()[data["method"]["name"]], "files", ()):
        if data["method"].get(field):
            data["method"][field] = _absolute(Path.cwd(), data["method"][field])
    for task in data["tasks"]:
        for split in ("train", "validation", "test"):
            if task.get(split):
                task[split] = _absolute(config.base_dir, task[split])
    return dump(data)


def _absolute(base: Path, name: str) -> str:
    """A local path made absolute; a hub name, which is no path here, unchanged."""
    path = base / Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def explain(error: ValidationError, document: Document, model: type[BaseModel]) -> list[Problem]:
    """Pydantic's errors as problems with file, line and field, one per field, in the order of the file."""
    texts: dict[KeyPath, list[str]] = {}
    problems: list[Problem] = []
    for item in error.errors(include_url=False):
        path = _path_in(document.data, item["loc"], missing=item["type"] == "missing")
        where = document.where(path)
        cause = item.get("ctx", {}).get("error")
        if item["type"] == "extra_forbidden":
            problems.append(_unknown_key(path, where, model, document.data))
        elif item["type"] == "missing":
            problems.append(Problem(f"`{path[-1]}` is missing", where))
        elif item["type"] == "union_tag_not_found":
            problems.append(Problem("should be a mapping with a `name`", where, "e.g. method: {name: rlora, r: 8}"))
        elif item["type"] == "union_tag_invalid":
            name = item["ctx"]["tag"]
            problems.append(_nearest("method", name, list(_method_configs()), document.where((*path, "name"))))
        elif isinstance(cause, HeadwaterError):
            for problem in cause.problems:
                name = problem.where.removeprefix(f"{field_name(path)}.")
                inner = (*path, *name.split(".")) if name else path
                problems.append(dataclasses.replace(problem, where=document.where(inner)))
        else:
            texts.setdefault(path, []).append(_plain_text(item["msg"]))
    for path, found in texts.items():
        value = _at(document.data, path)
        given = f", not {value!r}" if not isinstance(value, dict | list) else ""
        problems.append(
            Problem(" or ".join(dict.fromkeys(found)).replace(" or should be ", " or ") + given, document.where(path))
        )
    return sorted(problems, key=lambda problem: document.line(problem.where))


def _plain_text(message: str) -> str:
    message = " ".join(message.removeprefix("Value error, ").removeprefix("Input ").split())
    return message.partition(", unable to parse")[0]


def _path_in(data: Any, loc: tuple[str | int, ...], *, missing: bool) -> KeyPath:
    """The part of a pydantic location that names values of the file, without the names of union arms."""
    path: KeyPath = ()
    for part in loc[:-1] if missing else loc:
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]  # type: ignore[index]
            path = (*path, part)
    return (*path, loc[-1]) if missing else path


def _at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part]
    return data


def _known_keys(model: type[BaseModel], path: KeyPath, data: Any) -> list[str]:
    """The keys that may stand in the mapping at `path`."""
    if path[:1] == ("training",):
        return sorted(_training_keys().__annotations__)
    if path[:1] == ("method",):
        return list(_method_keys(_method_configs()[_method_name(data["method"])]).__annotations__)
    for part in path:
        annotation = model.model_fields[part].annotation if isinstance(part, str) else None
        for candidate in (annotation, *typing.get_args(annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return list(model.model_fields)


def _unknown_key(path: KeyPath, where: str, model: type[BaseModel], data: Any) -> Problem:
    key = str(path[-1])
    if path[:-1] == ("training",) and key in _TOP_LEVEL_TRAINING_KEYS:
        return Problem(f"`{key}` does not stand under training", where, f"move `{key}` to the top of the file")
    known = _known_keys(model, path[:-1], data)
    if len(path) == 1 and key not in known and key in _known_keys(model, ("training",), data):
        return Problem(f"unknown key `{key}`", where, f"write it under training: as training.{key}")
    return _nearest("key", key, known, where)


def _nearest(kind: str, name: Any, known: Sequence[str], where: str) -> Problem:
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if close:
        fix = f"did you mean `{close[0]}`?"
    else:
        fix = f"known here: {', '.join(known)}" if len(known) <= 20 else "docs/config.md lists all keys"
    return Problem(f"unknown {kind} `{name}`", where, fix)
