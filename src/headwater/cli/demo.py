"""`headwater demo`."""

from __future__ import annotations

from collections.abc import Sequence

from headwater.cli.console import out_console, quiet_libraries
from headwater.cli.train import resumable


def run(output_dir: str, overrides: Sequence[str]) -> None:
    """Train the packaged demo.

    Raises:
        HeadwaterError: what is needed cannot be had, or whatever training raises.
        typer.Exit: with 130 when interrupted; how to go on is then printed.
    """
    from headwater.demo import run_demo

    quiet_libraries()
    with resumable(output_dir, ["headwater", "demo", "--output-dir", output_dir], overrides):
        run_demo(output_dir, overrides, console=out_console())
