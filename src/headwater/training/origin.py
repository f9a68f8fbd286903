"""Which run an adapter is from."""

from __future__ import annotations

from pathlib import Path

from ..marked_yaml import read_document


def run_file(folder: Path) -> Path | None:
    """The `config.yaml` of the run in `folder`, as headwater wrote it; None where there is none, or another tool's.

    It is another tool's if it has neither a method nor tasks. A run's that is damaged is for its reader to refuse.

    Raises:
        HeadwaterError: if it cannot be read at all, so that it may be a run's.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    return file if {"method", "tasks"} & read_document(file).data.keys() else None
