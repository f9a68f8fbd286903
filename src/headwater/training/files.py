"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
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


def replace_folder(new: Path, path: Path) -> None:
    """Puts the folder `new`, which lies beside `path`, in its place."""
    shutil.rmtree(path, ignore_errors=True)
    new.replace(path)
