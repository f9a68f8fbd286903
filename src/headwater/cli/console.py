"""What the command line prints: results on standard output, everything else on standard error."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from headwater.errors import HeadwaterError, Problem

PIPE_WIDTH = 160
PLAIN: dict[str, Any] = {"markup": False, "emoji": False}
"""What is printed names files and tasks, in which brackets and colons are just that."""


def err_console() -> Console:
    """A console on the present standard error."""
    return Console(stderr=True, **PLAIN)


def out_console() -> Console:
    """A console on standard output: wide where that is a file or a pipe, silent on all ranks of a run but the first."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, quiet=os.environ.get("RANK", "0") != "0", **PLAIN)


def quiet_libraries() -> None:
    """Keep transformers' bars and hints to its own developers off the screen; downloads still show theirs."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def show_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    """`warnings.showwarning` without the place in the source, which is of no use to who runs a command."""
    print(f"warning: {message}", file=sys.stderr)


def show_error(error: HeadwaterError) -> None:
    """Print all problems of an error: a panel on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return
    parts = [part for problem in error.problems for part in _lines(problem)]
    title = "1 problem" if len(error.problems) == 1 else f"{len(error.problems)} problems"
    err_console().print(Panel(Group(*parts), title=title, title_align="left", border_style="red"))


def _lines(problem: Problem) -> Iterable[Text | Padding]:
    text = Text()
    if problem.where:
        text.append(problem.where, style="bold").append("\n")
    text.append(problem.what)
    yield text
    if problem.fix:
        yield Padding(Text(problem.fix, style="green"), (0, 0, 0, 2))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table whose columns are right-aligned except the first; None is an empty cell."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        result.add_column(Text(column), justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        result.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    return result
