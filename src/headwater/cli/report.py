"""`headwater report`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from headwater.cli.console import out_console
from headwater.errors import HeadwaterError, Problem
from headwater.files import NotWritten


def run(folder: str) -> None:
    """Write the report of a run or a comparison anew, from what its folder holds now.

    Raises:
        HeadwaterError: the folder holds neither, or a run of `headwater prefer` or `headwater meta` that is not whole.
    """
    from headwater.report import write_comparison_report, write_report

    path = Path(folder)
    if (path / "comparison.json").is_file():
        page = write_comparison_report(path)
    elif (path / "prefer.yaml").is_file():
        page = _of_whole(path, "headwater prefer", _preference_report)
    elif (path / "generator").is_dir():
        page = _of_whole(path, "headwater meta train", _meta_report)
    else:
        page = write_report(path)
    out_console().print(f"report: {page}", soft_wrap=True, highlight=False, markup=False)


def _of_whole(folder: Path, command: str, write: Callable[[Path], Path]) -> Path:
    try:
        return write(folder)
    except FileNotFoundError as error:
        what = f"this run of `{command}` is not finished: {error.filename} is not there"
        raise HeadwaterError(Problem(what, str(folder), "go on with it; its end writes the report")) from error
    except NotWritten:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"the report of this run of `{command}` cannot be made: {type(error).__name__}: {error}"
        fix = "make the folder writable; if files in it are damaged, run it again"
        raise HeadwaterError(Problem(what, str(folder), fix)) from error


def _preference_report(folder: Path) -> Path:
    from headwater.report.preference import write_preference_report

    return write_preference_report(folder)


def _meta_report(folder: Path) -> Path:
    from headwater.generate.report import write_meta_report

    return write_meta_report(folder, json.loads((folder / "results.json").read_text(encoding="utf-8")))
