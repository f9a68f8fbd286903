"""A run's file: what may stand in it, and how it is read so that every error names its file, line and field."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler  # pydantic itself has it since 2.11
from typing_extensions import Self

from headwater import base_model
from headwater.compare.spec import CompareSpec
from headwater.config_errors import explain
from headwater.config_keys import DEFAULT_METHOD, NOT_METHOD_KEYS, MethodSchema, TrainingSchema, method_configs
from headwater.data.encode import DataSpec
from headwater.data.mixture import MixtureSpec
from headwater.data.tasks import TaskSpec
from headwater.errors import HeadwaterError, Problem
from headwater.evaluation.spec import EvaluationSpec
from headwater.marked_yaml import Document, KeyPath, apply_overrides, dump, read_document
from headwater.paths import expanded
from headwater.seeds import Seed
from headwater.tuner.align import AlignSpec

if TYPE_CHECKING:
    import torch

# What a file gets that names no method. Where it comes from, and how sure that is: docs/recommended.md.
RECOMMENDED = {"name": DEFAULT_METHOD, "r": 8, "num_heads": 3, "lora_alpha": 16, "target_modules": "all-linear"}
RECOMMENDED_LEARNING_RATE = 1e-3


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
        model_name_or_path: hub id, local folder or GGUF file. Local ones become absolute: they start from the file's
            folder where there is something of that name, else from the current folder.
        model: how the base model is loaded.
        method: `name` and the fields of that method's config; without a name, `RECOMMENDED` but for the fields that are
            given, and `RECOMMENDED_LEARNING_RATE` unless `training` has one.
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
    method: Annotated[dict[str, Any], MethodSchema()] = RECOMMENDED
    tasks: list[TaskSpec] = Field(min_length=1)
    mixture: MixtureSpec = Field(default_factory=MixtureSpec)
    align: AlignSpec | None = None
    data: DataSpec = Field(default_factory=DataSpec)
    training: Annotated[dict[str, Any], TrainingSchema()] = {}
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    compare: CompareSpec | None = None
    output_dir: str = Field(min_length=1)
    seed: Seed = 0

    _base_dir: Path = PrivateAttr(default_factory=Path.cwd)
    _document: Document = PrivateAttr(default_factory=lambda: Document({}))
    _recommended: bool = PrivateAttr(default=False)
    _recommended_rate: ClassVar[float | None] = RECOMMENDED_LEARNING_RATE

    @model_validator(mode="wrap")
    @classmethod
    def _without_a_name_it_is_the_recommended_method(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        method = data.get("method", {}) if isinstance(data, dict) else None
        recommended = False
        if isinstance(method, dict) and "name" not in method:
            recommended = True
            data = {**data, "method": {**RECOMMENDED, **method}} if "method" in data else data
        config = handler(data)
        config._recommended = recommended
        if recommended and cls._recommended_rate is not None:
            config.training.setdefault("learning_rate", cls._recommended_rate)
        return config

    @field_validator("model_name_or_path", mode="after")
    @classmethod
    def _local_model_is_absolute(cls, name: str) -> str:
        return local_path(Path.cwd(), name)

    @field_validator("output_dir", mode="after")
    @classmethod
    def _home_is_written_out(cls, folder: str) -> str:
        # transformers does that in its arguments, and whoever else reads it must mean the same folder
        return str(expanded(folder)) if folder.startswith("~") else folder

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
        try:
            HeadwaterArguments(**{**training, "resume_from_checkpoint": None if isinstance(resume, bool) else resume})
        except (ImportError, TypeError) as error:  # no errors of pydantic's
            raise ValueError(str(error)) from error
        return training

    @model_validator(mode="after")
    def _method_knows_the_number_of_tasks(self) -> Self:
        from headwater.methods.base import MethodConfig
        from headwater.methods.registry import make_config

        if "num_tasks" in (field.name for field in dataclasses.fields(method_configs()[self.method["name"]])):
            self.method.setdefault("num_tasks", len(self.tasks))
        config = make_config(**self.method)
        if isinstance(config, MethodConfig):
            problems = [problem for problem in config.problems_with_tasks(len(self.tasks)) if problem is not None]
            if problems:
                raise HeadwaterError(*(dataclasses.replace(p, where=f"method.{p.where}") for p in problems))
        return self

    @property
    def recommended(self) -> bool:
        """Whether no method is named, so that it is the recommended one."""
        return self._recommended

    @property
    def base_dir(self) -> Path:
        """The folder that the tasks' relative paths start from: the file's, else the current one."""
        return self._base_dir

    @property
    def device(self) -> torch.device:
        """Where commands that do not train run the model, unless `model.device_map` says more."""
        return base_model.own_device(use_cpu=bool(self.training.get("use_cpu")))

    def where(self, *path: str | int) -> str:
        """``file:line: field`` of a value, e.g. ``where("tasks", 0, "train")``."""
        return self._document.where(path)

    def placed(self, error: HeadwaterError) -> HeadwaterError:
        """The same problems, with file and line where one names a key of the config or a file that the config names."""
        files: dict[str, KeyPath] = {
            spec: ("tasks", index, split)
            for index, task in enumerate(self.tasks)
            for split in ("train", "validation", "test")
            if (spec := getattr(task, split))
        }
        if self.model_name_or_path:
            files[self.model_name_or_path] = ("model_name_or_path",)
        problems = []
        for problem in error.problems:
            if (split := files.get(problem.where)) is not None:
                problem = dataclasses.replace(problem, where=f"{self.where(*split)}: {problem.where}")
            elif (path := self._path_of(problem.where)) is not None:
                problem = dataclasses.replace(problem, where=self.where(*path))
            problems.append(problem)
        return HeadwaterError(*problems)

    def _path_of(self, name: str) -> KeyPath | None:
        """The path of a key such as ``training.max_steps`` or ``tasks[0].name``, or of a method's field; else None."""
        if task := re.fullmatch(r"tasks\[(\d+)\]\.(\w+)", name):
            return "tasks", int(task[1]), task[2]
        first, _, rest = name.partition(".")
        if first in ("training", "method") and rest.isidentifier():
            return first, rest
        if name in RunConfig.model_fields:
            return (name,)
        known = typing.get_type_hints(method_configs()[self.method["name"]])
        return ("method", name) if name in known and name not in NOT_METHOD_KEYS else None


class TasksFile(RunConfig):
    """A run's file of which only `tasks` is looked at, so that nothing else need be there.

    Sections of `headwater prefer` and `headwater meta` may stand in it; those commands check them.
    """

    model_name_or_path: str = ""
    output_dir: str = ""
    preference: Any = None
    meta: Any = None


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
    name = document.data.get("model_name_or_path")
    if isinstance(name, str):
        with contextlib.suppress(HeadwaterError):  # the field's own check will say it, beside all else that is wrong
            start = start_of(document, ("model_name_or_path",), base_dir)
            document.data["model_name_or_path"] = local_path(start, name)
    try:
        config = model.model_validate(document.data)
    except ValidationError as error:
        raise HeadwaterError(*explain(error, document, model), *problems) from None
    if problems:
        raise HeadwaterError(*problems)
    config._base_dir, config._document = base_dir, document
    for field in _files_of(config.method):
        path = ("method", field)
        start = start_of(document, path, base_dir)
        config.method[field] = local_path(start, config.method[field], document.where(path))
    return config


def start_of(document: Document, path: KeyPath, base_dir: Path) -> Path:
    """Where a path starts from: the file's folder, or the current one where it was given at the command line."""
    return Path.cwd() if document.where(path).startswith("--") else base_dir


def _files_of(method: dict[str, Any]) -> list[str]:
    """The fields of a `method:` section that name files or folders."""
    return [field for field in getattr(method_configs()[method["name"]], "files", ()) if method.get(field)]


def dump_config(config: RunConfig) -> str:
    """The config as YAML with all defaults written out and local paths made absolute, so that it can be moved."""
    data = config.model_dump(mode="json", exclude={"compare"})
    if "batching" not in config.mixture.model_fields_set:
        del data["mixture"]["batching"]  # left open, it is balanced where an alignment loss needs that
    data["model_name_or_path"] = local_path(Path.cwd(), data["model_name_or_path"])
    data["output_dir"] = str(Path(data["output_dir"]).absolute())
    for field in _files_of(data["method"]):
        data["method"][field] = local_path(Path.cwd(), data["method"][field])
    for task in data["tasks"]:
        for split in ("train", "validation", "test"):
            if task.get(split):
                task[split] = local_path(config.base_dir, task[split])
    return dump(data)


def local_path(base: Path, name: str, where: str = "") -> str:
    """A local path made absolute; a hub name, which is no path here, unchanged. `where` is that of an error."""
    path = base / expanded(name, where)
    return str(path.absolute()) if name and os.path.exists(path) else name  # Path.exists raises on long names
