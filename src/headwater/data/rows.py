"""One training or test row, and the four ways in which people write one."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headwater.data.sources import kind, place, read_records
from headwater.errors import HeadwaterError, Problem

SHOWN = 20
"""About how many malformed rows are listed; the rest are counted, so that the message stays on one screen."""
CHECK = "`headwater data check FILE` names them all"

FORMATS = "prompt and completion; messages; instruction and output; text"
RENAME = 'or keep your names, and say in the task how they make a row: prompt: "{question}", completion: " {answer}"'


@dataclass(frozen=True)
class Row:
    """A prompt and what should follow it.

    Args:
        prompt: text before the completion, joined to it as it stands, without a space in between. For `messages` rows
            what the user said last, for display and overlap checks only.
        completion: the text to learn, or to score. For `messages` rows the last assistant turn.
        choices: possible completions, of which `completion` is one; empty when the answer is free text.
        messages: the whole conversation as `{"role", "content"}`; empty for rows that are not conversations.
        source: file or data set that the row comes from.
        line: its line there, counted from 1; in formats without lines the number of the row.
    """

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    source: str = ""
    line: int = 0

    @property
    def where(self) -> str:
        """`source:line`, or `source: item 3` in a `.json` file; for messages to people."""
        return place(self.source, self.line) if self.source else ""


@dataclass(frozen=True)
class RowTemplate:
    """Makes rows of records whose fields have other names, in the syntax of `str.format`: `"Question: {question}"`.

    Args:
        prompt, completion: text with fields in braces.
        choices: the same for each choice; empty when the answer is free text.
    """

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()

    def fill(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The record with `prompt`, `completion` and `choices`.

        Raises:
            LookupError, ValueError, TypeError, AttributeError: the fields do not fit the template.
        """
        formatter = _NoNulls()
        prompt, completion, *choices = (
            formatter.vformat(text, (), fields) for text in (self.prompt, self.completion, *self.choices)
        )
        return {"prompt": prompt, "completion": completion, **({"choices": choices} if choices else {})}


class _NoNulls(string.Formatter):
    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        found = super().get_field(field_name, args, kwargs)
        if found[0] is None:
            raise ValueError(f"field '{field_name}' is null")
        return found


def read_rows(
    source: str | Path, *, split: str | None = None, subset: str | None = None, template: RowTemplate | None = None
) -> list[Row]:
    """Read all rows of a file or data set.

    Args:
        source: a `.jsonl`, `.json`, `.csv` or `.parquet` file, a folder that `datasets` can load, or a hub name.
        split: which split of a data set. Without it, the only one, or `train`.
        subset: which configuration of a hub data set.
        template: how to make rows of records with other fields.

    Raises:
        HeadwaterError: the source cannot be read, or rows are malformed. The first 20 are listed, the others counted.
    """
    rows, problems = collect_rows(source, split=split, subset=subset, template=template)
    if problems:
        raise HeadwaterError(*one_screen({str(source): problems}))
    return rows


def collect_rows(
    source: str | Path,
    *,
    split: str | None = None,
    subset: str | None = None,
    template: RowTemplate | None = None,
    name: str | None = None,
) -> tuple[list[Row], list[Problem]]:
    """As `read_rows`, but returns the good rows and every problem. `name` is what messages call the source."""
    records, problems = read_records(source, split=split, subset=subset)
    if name is not None:
        problems = [replace(p, where=p.where.replace(str(source), name, 1)) for p in problems]
    label = name or str(source)
    rows: list[Row] = []
    for record in records:
        row, errors = _fill(record.fields, template) if template else parse_row(record.fields)
        where = place(label, record.line)
        problems.extend(replace(error, where=where) for error in errors)
        if row is not None:
            rows.append(replace(row, source=label, line=record.line))
    return rows, sorted(problems, key=_line)


def _line(problem: Problem) -> int:
    number = re.search(r"[: ](\d+)$", problem.where)
    return int(number[1]) if number else 0


def _fill(fields: Mapping[str, Any], template: RowTemplate) -> tuple[Row | None, list[Problem]]:
    try:
        return parse_row(template.fill(fields))
    except KeyError as error:
        what = f"the task's template asks for field {error}; the row has {_names(fields)}"
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        what = f"the row does not fit the task's template: {error}"
    return None, [Problem(what)]


def one_screen(problems: Mapping[str, Sequence[Problem]], limit: int = SHOWN, more: str = "") -> list[Problem]:
    """At most about `limit` problems, shared among the sources; the rest are counted, and an advice is given once.

    Args:
        more: how to see those that are only counted.
    """
    wrong = {source: found for source, found in problems.items() if found}
    share = max(1, limit // max(1, len(wrong)))
    shown: list[Problem] = []
    given: set[str] = set()
    for source, found in list(wrong.items())[:limit]:
        for problem in found[:share]:
            shown.append(replace(problem, fix="") if problem.fix in given else problem)
            given.add(problem.fix)
        if len(found) > share:
            shown.append(Problem(f"and {len(found) - share:,} more problems", source, "" if more in given else more))
            given.add(more)
    if len(wrong) > limit:
        fix = "" if more in given else more
        shown.append(Problem(f"and problems with {len(wrong) - limit:,} more sources", fix=fix))
    return shown


def parse_row(fields: Mapping[str, Any]) -> tuple[Row | None, list[Problem]]:
    """Read one record as a row; None and the problems if it is not one.

    The format is told by the fields' names: `messages`; `instruction` and `output` (and `input`); `prompt` and
    `completion`; `text`. A row with both a prompt and a completion is that, whatever else it holds.
    """
    errors: list[Problem] = []
    if "prompt" in fields and "completion" in fields:
        row = _completion_row(fields, errors)
    elif "messages" in fields:
        row = _messages_row(fields, errors)
    elif "instruction" in fields or "output" in fields:
        row = _alpaca_row(fields, errors)
    elif "prompt" in fields or "completion" in fields:
        row = _completion_row(fields, errors)
    elif "text" in fields:
        row = Row("", _text(fields, "text", errors, may_be_empty=False))
    else:
        return None, [Problem(f"the row has {_names(fields)}", fix=f"name the fields {FORMATS}; {RENAME}")]
    row = replace(row, choices=_choices(fields, row, errors))
    return (None, errors) if errors else (row, [])


def _completion_row(fields: Mapping[str, Any], errors: list[Problem]) -> Row:
    return Row(_text(fields, "prompt", errors), _text(fields, "completion", errors, may_be_empty=False))


def _alpaca_row(fields: Mapping[str, Any], errors: list[Problem]) -> Row:
    _no_near_miss(fields, "input", errors)
    instruction = _text(fields, "instruction", errors, may_be_empty=False)
    more = _text(fields, "input", errors) if fields.get("input") is not None else ""
    prompt = f"### Instruction:\n{instruction}\n\n"
    if more:
        prompt += f"### Input:\n{more}\n\n"
    return Row(prompt + "### Response:\n", _text(fields, "output", errors, may_be_empty=False))


def _messages_row(fields: Mapping[str, Any], errors: list[Problem]) -> Row:
    turns = _list(fields, "messages", errors)
    messages: list[dict[str, str]] = []
    before = len(errors)
    for number, turn in enumerate(turns, 1):
        place = f"message {number}"
        if not isinstance(turn, dict):
            errors.append(Problem(f"{place} is {kind(turn)}, not an object with role and content"))
            continue
        # A table gives every message the same fields and fills those it lacks with null.
        if unread := sorted(k for k, v in turn.items() if k not in ("role", "content") and v is not None):
            errors.append(Problem(f"{place} has fields that are not read: {', '.join(unread)}"))
        role = _text(turn, "role", errors, place, may_be_empty=False)
        content = _text(turn, "content", errors, place, may_be_empty=role != "assistant")
        messages.append({"role": role, "content": content})
    if len(errors) == before and (not messages or messages[-1]["role"] != "assistant"):
        errors.append(Problem("the last message is not an assistant's, so there is nothing to learn or to score"))
    if errors:
        return Row("", "")
    asked = [m["content"] for m in messages if m["role"] == "user"]
    return Row(asked[-1] if asked else "", messages[-1]["content"], messages=tuple(messages))


def _choices(fields: Mapping[str, Any], row: Row, errors: list[Problem]) -> tuple[str, ...]:
    _no_near_miss(fields, "choices", errors)
    if fields.get("choices") in (None, ""):
        return ()
    given = _list(fields, "choices", errors)
    if not all(isinstance(c, str) and c and _encodable(c) for c in given):
        errors.append(Problem("field 'choices' holds something that is not text, or is empty"))
    elif len(given) < 2 or len(set(given)) < len(given):
        errors.append(Problem("field 'choices' does not hold two or more different texts"))
    elif row.completion and row.completion not in given:
        near = difflib.get_close_matches(row.completion, given, 1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        what = f"completion {_short(row.completion)} is not one of the choices {_short(given)}{hint}"
        errors.append(Problem(what, fix="the completion must equal one of the choices, spaces included"))
    else:
        return tuple(given)
    return ()


def _text(
    fields: Mapping[str, Any], name: str, errors: list[Problem], place: str = "", *, may_be_empty: bool = True
) -> str:
    label = f"{place}: field '{name}'" if place else f"field '{name}'"
    if name not in fields and place:
        errors.append(Problem(f"{label} is missing"))
    elif name not in fields:
        errors.append(Problem(f"{label} is missing; the row has {_names(fields)}", fix=f"rename one, {RENAME}"))
    elif not isinstance(value := fields[name], str):
        errors.append(Problem(f"{label} is {kind(value)}, not text"))
    elif not value and not may_be_empty:
        errors.append(Problem(f"{label} is empty"))
    elif not _encodable(value):
        errors.append(Problem(f"{label} holds half of a surrogate pair, which is not a character"))
    else:
        return value
    return ""


def _list(fields: Mapping[str, Any], name: str, errors: list[Problem]) -> list[Any]:
    """A list, or the JSON text of one: a CSV cell can hold nothing else."""
    value = fields[name]
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, list):
        return value
    errors.append(Problem(f"field '{name}' is {kind(value)}, not a list", fix='in a CSV cell, write ["a", "b"]'))
    return []


def _no_near_miss(fields: Mapping[str, Any], name: str, errors: list[Problem]) -> None:
    """An optional field whose name is mistyped would be lost without a word."""
    if name not in fields and (near := difflib.get_close_matches(name, map(str, fields), 1, cutoff=0.8)):
        errors.append(Problem(f"field '{near[0]}' is not known; did you mean '{name}'?"))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _names(fields: Mapping[str, Any]) -> str:
    return _cut(", ".join(repr(str(name)) for name in fields), 200) or "no fields"


def _short(value: Any) -> str:
    return _cut(repr(value), 60)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
