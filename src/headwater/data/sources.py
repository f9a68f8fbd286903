"""Where rows come from: JSONL, JSON, CSV and Parquet files, and data sets that the `datasets` library knows.

Every reader returns numbered records and *all* problems it met, so that one reading shows everything that is wrong.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.errors import Problem

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Record:
    """The fields of one row before they are read as anything.

    Args:
        line: line of the file where the row starts, counted from 1; in formats without lines the number of the row.
        fields: field name to value.
    """

    line: int
    fields: dict[str, Any]


def place(source: str, number: int) -> str:
    """Where a row is, for messages to people. A `.json` file has lines, too, but its rows are not counted by them."""
    return f"{source}: item {number}" if Path(source).suffix == ".json" else f"{source}:{number}"


Read = tuple[list[Record], list[Problem]]


def read_records(source: str | Path, *, split: str | None = None, subset: str | None = None) -> Read:
    """Read every record of a file, a folder or a hub data set.

    Args:
        source: a `.jsonl`, `.json`, `.csv` or `.parquet` file, a folder that `datasets` can load, or a hub name.
        split: which split of a data set; files have none.
        subset: which configuration of a hub data set.
    """
    path = Path(source)
    name = str(source)
    if os.path.isdir(path):  # Path.is_dir raises on long names
        return _read_dataset(name, split, subset)
    if path.suffix in SUFFIXES:
        return _read_file(path, name)
    if os.path.exists(path):
        return [], [
            Problem(f"the ending '{path.suffix}' is not one that can be read", name, f"use {_listed(SUFFIXES)}")
        ]
    if HUB_NAME.fullmatch(name):
        return _read_dataset(name, split, subset)
    return [], [Problem("no such file or folder", name)]


def _read_file(path: Path, name: str) -> Read:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], [Problem("no such file", name)]
    except OSError as error:
        return [], [Problem(f"cannot be read: {error.strerror}", name)]
    if path.suffix == ".parquet":
        return _parquet(data, name)
    if data.startswith(UTF16_MARKS):
        return [], [Problem("is UTF-16 text, not UTF-8", name, "save it as UTF-8")]
    data = data.removeprefix(b"\xef\xbb\xbf")
    return {".jsonl": _jsonl, ".json": _json, ".csv": _csv}[path.suffix](data, name)


def _jsonl(data: bytes, name: str) -> Read:
    records: list[Record] = []
    problems: list[Problem] = []
    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        where = f"{name}:{number}"
        try:
            fields = json.loads(raw.decode())
        except UnicodeDecodeError as error:
            problems.append(Problem(f"byte {error.start + 1} of the line is not UTF-8", where))
        except json.JSONDecodeError as error:
            problems.append(Problem(f"not JSON: {error.msg} at column {error.colno}", where))
        except (ValueError, RecursionError) as error:
            problems.append(Problem(f"not JSON that can be read: {error}", where))
        else:
            _add(records, problems, number, fields, where)
    return records, problems


def _json(data: bytes, name: str) -> Read:
    try:
        rows = json.loads(data.decode())
    except UnicodeDecodeError as error:
        return [], [_not_utf8(data, error, name)]
    except json.JSONDecodeError as error:
        fix = "a file with one row a line ends in .jsonl" if error.msg == "Extra data" else ""
        return [], [Problem(f"not JSON: {error.msg} at column {error.colno}", f"{name}:{error.lineno}", fix)]
    except (ValueError, RecursionError) as error:
        return [], [Problem(f"not JSON that can be read: {error}", name)]
    if not isinstance(rows, list):
        return [], [Problem(f"holds {kind(rows)}, not a list of rows", name)]
    records: list[Record] = []
    problems: list[Problem] = []
    for number, fields in enumerate(rows, 1):
        _add(records, problems, number, fields, place(name, number))
    return records, problems


def _add(records: list[Record], problems: list[Problem], number: int, fields: Any, where: str) -> None:
    if isinstance(fields, dict):
        records.append(Record(number, fields))
    else:
        problems.append(Problem(f"the row is {kind(fields)}, not an object with named fields", where))


def _csv(data: bytes, name: str) -> Read:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return [], [_not_utf8(data, error, name)]
    # A cell may be as long as the file; the limit holds for the whole process, so it is given back.
    usual = csv.field_size_limit(len(text) + 1)
    try:
        return _cells(text, name)
    finally:
        csv.field_size_limit(usual)


def _cells(text: str, name: str) -> Read:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    records, problems = [], []
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                if doubled := sorted({c for c in cells if cells.count(c) > 1}):
                    return [], [Problem(f"the header names {_listed(doubled)} more than once", f"{name}:{line}")]
            elif len(cells) != len(header):
                problems.append(Problem(f"the header has {len(header)} cells, the row {len(cells)}", f"{name}:{line}"))
            else:
                records.append(Record(line, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        problems.append(Problem(f"not CSV: {error}; what follows was not read", f"{name}:{start}"))
    return records, problems


def _parquet(data: bytes, name: str) -> Read:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        return [], [Problem(f"not a Parquet file that can be read: {error}", name)]
    return [Record(number, fields) for number, fields in enumerate(rows, 1)], []


def _read_dataset(name: str, split: str | None, subset: str | None) -> Read:
    import datasets
    from datasets.exceptions import DatasetsError

    folder = Path(name)
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, subset)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:  # the last is of data sets with a script
        if folder.is_dir():
            return [], [Problem(f"`datasets` cannot load this folder: {error}", name)]
        fix = "give a path that exists, or the name of a hub data set that this machine can reach"
        return [], [Problem(f"no such file or folder, and as a hub data set: {error}", name, fix)]
    if isinstance(data, datasets.DatasetDict):
        chosen = split or (next(iter(data)) if len(data) == 1 else "train")
        if chosen not in data:
            return [], [Problem(f"there is no split '{chosen}'", name, f"it has {_listed(data)}")]
        data = data[chosen]
    labels = {key: feature for key, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)}
    records = []
    for number, fields in enumerate(data, 1):
        for key, feature in labels.items():
            # A class number means nothing in a prompt; -1 or None stand for "not labelled".
            fields[key] = feature.int2str(fields[key]) if (fields[key] or 0) >= 0 and fields[key] is not None else None
        records.append(Record(number, fields))
    return records, []


def _not_utf8(data: bytes, error: UnicodeDecodeError, name: str) -> Problem:
    line = data.count(b"\n", 0, error.start) + 1
    return Problem(f"byte {error.start + 1} of the file is not UTF-8", f"{name}:{line}")


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))


def kind(value: Any) -> str:
    """What a JSON value is, in words for an error message."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")
