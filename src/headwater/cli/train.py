"""`headwater train`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from headwater.cli.console import err_console, out_console, quiet_libraries
from headwater.errors import HeadwaterError

INTERRUPTED = 130
RESUME = "training.resume_from_checkpoint=true"


def run(file: str, overrides: Sequence[str]) -> None:
    """Train what a run's file describes and print the scores before and after.

    Raises:
        HeadwaterError: for whatever is wrong with the file, the data or the model, or a loss that is not finite.
        typer.Exit: with 130 when interrupted; how to go on is then printed.
    """
    from headwater.config import load_config

    config = load_config(file, overrides)
    quiet_libraries()
    console = out_console()
    with resumable(config.output_dir, ["headwater", "train", file], overrides):
        from headwater.training import train
        from headwater.training.table import show_scores

        try:
            result = train(config, console=console)
        except HeadwaterError as error:
            raise config.placed(error) from error
    show_scores(result.results, console)
    console.print(f"report: {result.output_dir / 'report.html'}", soft_wrap=True, highlight=False, markup=False)


@contextmanager
def resumable(output_dir: str, command: Sequence[str], overrides: Sequence[str]) -> Iterator[None]:
    """Turn Ctrl-C into exit status 130 and a line that says how to go on.

    Args:
        output_dir: the run folder.
        command, overrides: what was run.
    """
    try:
        yield
    except KeyboardInterrupt:
        console = err_console()
        if any(Path(output_dir).rglob("checkpoint-*")):
            kept = [part for override in overrides if override != RESUME for part in ("--set", override)]
            line = f"stopped; resume with: {shlex.join([*command, *kept, '--set', RESUME])}"
        else:
            line = "stopped; no checkpoint had been saved yet"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(INTERRUPTED) from None
