"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def finite(value: Any) -> Any:
    """`value` with non-finite floats as None, since JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_text(path: Path, text: str) -> None:
    """Writes `path` under a temporary name beside it, then renames."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON as `write_text` does; non-finite numbers become null."""
    write_text(path, json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Has `fill` write a new folder under a temporary name, then puts it in place of `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    fill(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.replace(path)
