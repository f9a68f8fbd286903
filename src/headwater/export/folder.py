"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import HeadwaterError, Problem


def check_output(output: Path) -> None:
    """Refuses to write where something is.

    Raises:
        HeadwaterError: if `output` is a file or a folder that holds anything.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise HeadwaterError(
            Problem(f"{output} is there already", "--output", "choose another folder, or remove this one")
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when the block is through, and is removed if the block raises.

    Raises:
        HeadwaterError: as `check_output`.
    """
    check_output(output)
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        temporary.replace(output)  # over an empty folder as well
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
