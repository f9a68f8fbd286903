"""YAML that remembers where each value stood, so that an error about it can name file, line and field."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from headwater.errors import HeadwaterError, Problem

KeyPath = tuple[str | int, ...]


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: `2e-4` is a number, `no`, `on`, `12:30` and `2024-01-01` are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute, emptied for this class)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
# YAML 1.1 reads a leading 0 as octal, which nobody who writes 010 today means.
_CoreLoader.add_constructor("tag:yaml.org,2002:int", lambda _loader, node: int(node.value))


class _CoreDumper(yaml.SafeDumper):
    """SafeDumper that puts quotes round text which any YAML, 1.1 or 1.2, would take for something else."""


for _first, _resolvers in _CoreLoader.yaml_implicit_resolvers.items():
    for _tag, _regexp in _resolvers:
        _CoreDumper.add_implicit_resolver(_tag, _regexp, [_first])


def dump(data: Any) -> str:
    """Plain values as YAML text, keys in their order."""
    text = yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=100)
    if _LOST.search(text):
        text = yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, width=100)
    return text


# PyYAML writes these as they are and reads them back as a space or not at all; escaped they survive.
_LOST = re.compile("[\x85\u2028\u2029\ufeff]")


def field_name(path: KeyPath) -> str:
    """A path as people write it: ``("tasks", 0, "train")`` is ``tasks[0].train``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


@dataclass
class Document:
    """A YAML mapping with the place of each of its values.

    Attributes:
        data: the values, as plain dicts, lists and scalars.
        source: the file's name, as the user gave it.
        places: for each key path the place to name in an error, ``file:line`` or an option such as ``--set a.b``.
    """

    data: dict[str, Any]
    source: str = ""
    places: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """``file:line: field`` for a value, or for the nearest enclosing one when it is missing."""
        for length in range(len(path), -1, -1):
            place = self.places.get(path[:length])
            if place is None:
                continue
            if place.startswith("--"):
                return place if length == len(path) else f"{place}: {field_name(path)}"
            return f"{place}: {field_name(path)}" if path else place
        return f"{self.source}: {field_name(path)}" if self.source else field_name(path)

    def line(self, where: str) -> float:
        """The line in a place that `where` gave; infinite for an override, so that sorting puts those last."""
        found = re.match(rf"{re.escape(self.source)}:(\d+)", where)
        return int(found[1]) if found else math.inf


def parse_value(text: str) -> Any:
    """One YAML value, typed as in a file: ``2e-4`` is a float, ``[a, b]`` a list, nothing is None.

    Raises:
        HeadwaterError: the text is not one YAML value.
    """
    return _parse(text, Document({}))


def read_document(path: str | os.PathLike[str]) -> Document:
    """Read a YAML mapping together with the line of every value.

    Raises:
        HeadwaterError: the file is missing or unreadable, is not YAML, is not a mapping, or names a key twice.
    """
    source = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise HeadwaterError(Problem("there is no such file", source, _neighbours(Path(path)))) from None
    except IsADirectoryError:
        inside = _neighbours(Path(path) / "any")
        raise HeadwaterError(Problem("this is a folder; a YAML file is needed here", source, inside)) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise HeadwaterError(Problem("the file is not UTF-8 text", f"{source}:{line}", "save it as UTF-8")) from None
    except OSError as error:
        raise HeadwaterError(Problem(f"the file cannot be read: {error}", source)) from None
    return parse_document(text, source)


def parse_document(text: str, source: str) -> Document:
    """`read_document` for text at hand; `source` is the name that errors use."""
    document = Document({}, source)
    data = _parse(text, document)
    if data is None:
        raise HeadwaterError(Problem("the file is empty", source, "docs/config.md shows what a run's file holds"))
    if not isinstance(data, dict):
        raise HeadwaterError(Problem("the file should be a mapping of keys to values", f"{source}:1"))
    document.data = data
    return document


def _parse(text: str, document: Document) -> Any:
    source = document.source
    try:
        loader = _CoreLoader(text)
    except yaml.reader.ReaderError as error:
        place = f"{source}:{text.count(chr(10), 0, error.position) + 1}" if source else ""
        raise HeadwaterError(
            Problem(f"not valid YAML: character {error.character!r} may not stand here", place)
        ) from None
    builder = _Builder(loader, document)
    try:
        node = loader.get_single_node()
        value = None if node is None else builder.build(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark and source else source
        column = f" (column {mark.column + 1})" if mark else ""
        what = f"not valid YAML{column}: {error.problem or error.context}"
        raise HeadwaterError(*builder.problems, Problem(what, place)) from None
    except RecursionError:
        raise HeadwaterError(Problem("this is nested too deeply", source)) from None
    finally:
        loader.dispose()
    if builder.problems:
        raise HeadwaterError(*builder.problems)
    return value


_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class _Builder:
    """Turns YAML nodes into plain values, noting the line of each and every key that is given twice."""

    def __init__(self, loader: _CoreLoader, document: Document):
        self.loader = loader
        self.document = document
        self.problems: list[Problem] = []
        self._inside: list[int] = []
        self._checked: set[int] = set()

    def build(self, node: Any, path: KeyPath) -> Any:
        self.document.places.setdefault(path, f"{self.document.source}:{node.start_mark.line + 1}")
        if id(node) in self._inside:
            raise yaml.constructor.ConstructorError(None, None, "a value contains itself", node.start_mark)
        self._inside.append(id(node))
        try:
            if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN_TAGS:
                raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag} has no use", node.start_mark)
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            return self.loader.construct_object(node, deep=True)
        except ValueError as error:  # such as !!int on a word
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None
        finally:
            self._inside.pop()

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        if id(node) not in self._checked:  # an aliased node comes by again with its merged keys written out
            self._checked.add(id(node))
            self._note_repeated_keys(node, path)
            self.loader.flatten_mapping(node)
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key should be plain text", key_node.start_mark)
            key = str(key_node.value)
            inner = (*path, key)
            self.document.places[inner] = f"{self.document.source}:{key_node.start_mark.line + 1}"
            mapping[key] = self.build(value_node, inner)
        return mapping

    def _note_repeated_keys(self, node: yaml.MappingNode, path: KeyPath) -> None:
        first: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in first and key != "<<":
                where = f"{self.document.source}:{line}: {field_name((*path, key))}"
                what = f"`{key}` is given twice, first in line {first[key]}"
                self.problems.append(Problem(what, where, "keep one of them"))
            first.setdefault(key, line)


def apply_overrides(document: Document, overrides: Sequence[str]) -> list[Problem]:
    """Set values in place from texts like ``training.max_steps=10`` or ``tasks.0.weight=2``.

    Values are typed as YAML. Missing mappings on the way are made; a list takes an index that it has, or its length,
    which appends.

    Returns:
        What was wrong with the overrides that could not be applied.
    """
    problems = []
    for override in overrides:
        name, equals, text = override.partition("=")
        place = f"--set {name.strip()}"
        keys = [key.strip() for key in name.split(".")]
        if not equals or not all(keys):
            fix = "e.g. --set training.max_steps=100"
            problems.append(Problem("an override should look like key=value", f"--set {override}", fix))
            continue
        try:
            value = parse_value(text)
        except HeadwaterError as error:
            fix = "put quotes round text with special characters"
            problems.append(Problem(f"{text!r}: {error.problems[0].what}", place, fix))
            continue
        problem = _set(document, keys, value, place)
        if problem:
            problems.append(problem)
    return problems


def _set(document: Document, keys: list[str], value: Any, place: str) -> Problem | None:
    target: Any = document.data
    path: KeyPath = ()
    for position, name in enumerate(keys):
        last = position == len(keys) - 1
        key: str | int = name
        if isinstance(target, list):
            if not name.isdecimal() or int(name) > len(target) - (not last):
                count = len(target)
                what = f"{field_name(path)} holds {count} items, so {name!r} is no position in it"
                return Problem(what, place, f"count from 0; {count} appends" if last else "count from 0")
            key = int(name)
        elif not isinstance(target, dict):
            return Problem(f"{field_name(path)} is not a mapping, so `{name}` cannot be set in it", place)
        path = (*path, key)
        if last:
            for known in [known for known in document.places if known[: len(path)] == path]:
                del document.places[known]
            document.places[path] = place
            if isinstance(target, list) and key == len(target):
                target.append(value)
            else:
                target[key] = value
        else:
            if isinstance(target, dict) and target.get(name) is None:
                target[name] = {}
                document.places.setdefault(path, place)
            target = target[key]
    return None


def _neighbours(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    names = sorted(p.name for p in folder.iterdir() if p.suffix in {".yaml", ".yml"})[:8]
    return f"YAML files there: {', '.join(names)}" if names else ""
