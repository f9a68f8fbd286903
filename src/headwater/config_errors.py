"""What pydantic finds wrong in a run's file, as problems with file, line and field."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from headwater.config_keys import (
    DEFAULT_METHOD,
    TOP_LEVEL_TRAINING_KEYS,
    method_configs,
    method_keys,
    method_name,
    training_keys,
)
from headwater.errors import HeadwaterError, Problem
from headwater.marked_yaml import Document, KeyPath, field_name

_NAME = "should begin with a letter or a digit and hold only letters, digits, `.`, `_`"
_PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": f"{_NAME} and `-`",
    r"^([A-Za-z0-9][A-Za-z0-9._+-]*)?$": f"{_NAME}, `+` and `-`",
    r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$": "should be `module:function`",
}


def explain(error: ValidationError, document: Document, model: type[BaseModel]) -> list[Problem]:
    """Pydantic's errors as problems with file, line and field, one per field, in the order of the file."""
    texts: dict[KeyPath, list[str]] = {}
    problems: list[Problem] = []
    items = error.errors(include_url=False)
    of_method = [item for item in items if item["loc"][:1] == ("method",)]
    if of_method and all(item["type"] == "extra_forbidden" for item in of_method):
        problems += _ranges_of_method(document, {str(item["loc"][-1]) for item in of_method})
    for item in items:
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
            problems.append(_nearest("method", name, list(method_configs()), document.where((*path, "name"))))
        elif isinstance(cause, HeadwaterError):
            for problem in cause.problems:
                name = problem.where.removeprefix(f"{field_name(path)}.")
                inner = (*path, *name.split(".")) if name else path
                problems.append(dataclasses.replace(problem, where=document.where(inner)))
        else:
            pattern = str(item.get("ctx", {}).get("pattern"))
            texts.setdefault(path, []).append(_PATTERNS.get(pattern) or _plain_text(item["msg"]))
    for path, found in texts.items():
        value = _at(document.data, path)
        given = f", not {value!r}" if not isinstance(value, dict | list) else ""
        what = " or ".join(dict.fromkeys(found)).replace(" or should be ", " or ") + given
        braces = isinstance(value, dict | list) and found == ["should be a valid string"]
        fix = "a text that begins with { or [ needs quotes" if braces else ""
        problems.append(Problem(what, document.where(path), fix))
    return sorted(problems, key=lambda problem: document.line(problem.where))


def _ranges_of_method(document: Document, unknown: set[str]) -> list[Problem]:
    """What else is wrong with a `method:` whose unknown keys kept its fields from being looked at together."""
    from headwater.methods.registry import make_config

    fields = {key: value for key, value in document.data["method"].items() if key not in unknown}
    try:
        make_config(fields.pop("name", DEFAULT_METHOD), **fields)
    except HeadwaterError as error:
        named = [problem for problem in error.problems if problem.where in fields]
        return [dataclasses.replace(p, where=document.where(("method", p.where))) for p in named]
    return []


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
        return sorted(training_keys().__annotations__)
    if path[:1] == ("method",):
        return list(method_keys(method_configs()[method_name(data["method"])]).__annotations__)
    for part in path:
        annotation = model.model_fields[part].annotation if isinstance(part, str) else None
        for candidate in (annotation, *typing.get_args(annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return list(model.model_fields)


def _unknown_key(path: KeyPath, where: str, model: type[BaseModel], data: Any) -> Problem:
    key = str(path[-1])
    if path[:-1] == ("training",) and key in TOP_LEVEL_TRAINING_KEYS:
        return Problem(f"`{key}` does not stand under training", where, f"move `{key}` to the top of the file")
    known = _known_keys(model, path[:-1], data)
    if len(path) == 1 and key not in known and key in _known_keys(model, ("training",), data):
        return Problem(f"unknown key `{key}`", where, f"write it under training: as training.{key}")
    of_ours = path[:1] == ("method",) and method_name(data["method"]) != "lora"
    page = f"methods/{method_name(data['method'])}.md" if of_ours else "config.md"
    return _nearest("key", key, known, where, page)


def _nearest(kind: str, name: Any, known: Sequence[str], where: str, page: str = "config.md") -> Problem:
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6) or _abbreviated(str(name), known)
    if close:
        fix = f"did you mean `{close[0]}`?"
    else:
        fix = f"known here: {', '.join(known)}" if len(known) <= 20 else f"docs/{page} lists all keys"
    return Problem(f"unknown {kind} `{name}`", where, fix)


def _abbreviated(name: str, known: Sequence[str]) -> list[str]:
    """The names whose words begin with these letters, as those of `learning_rate` do with `lr`, or that end with these
    words."""
    return [
        full for full in known if "".join(word[:1] for word in full.split("_")) == name or full.endswith(f"_{name}")
    ]
