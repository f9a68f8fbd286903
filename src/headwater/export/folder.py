"""New folders that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import HeadwaterError, Problem
from ..files import whole_folder
from ..training.folder import check_writable


def check_output(output: Path) -> None:
    """Refuses to write where something is, and where no folder can be made: before the work, which may take long.

    Raises:
        HeadwaterError: if `output` is a file or a folder that holds anything, or cannot be written.
    """
    where, fix = f"--output {output}", "choose another folder"
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise HeadwaterError(Problem("this is there already and not an empty folder", where, fix))
    check_writable(output, where, fix)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that takes the name `output` when the block is through, and is gone if the block raises.

    Raises:
        HeadwaterError: as `check_output`, before and after; or if it cannot be written.
    """
    check_output(output)
    with whole_folder(output) as work:
        yield work
        check_output(output)  # another process may have been faster
