"""`headwater demo`."""

from __future__ import annotations

from collections.abc import Sequence

from headwater.cli.console import out_console, quiet_libraries
from headwater.cli.train import resumable
from headwater.paths import expanded


def run(output_dir: str, overrides: Sequence[str]) -> None:
    """Train the packaged demo.

    Raises:
        HeadwaterError: what is needed cannot be had, or whatever training raises.
        typer.Exit: with 130 when interrupted; how to go on is then printed.
    """
    from headwater.demo import run_demo

    quiet_libraries()
    folder = str(expanded(output_dir, "--output-dir"))
    with resumable(folder, ["headwater", "demo", "--output-dir", output_dir], overrides):
        run_demo(folder, overrides, console=out_console())


def fetch_only(folder: str) -> None:
    """Put the demo's model and tasks into a folder, for files of one's own to name.

    Raises:
        HeadwaterError: what is needed cannot be had, or something else is in the folder's place.
    """
    from headwater.demo.run import fetch_demo

    quiet_libraries()
    console = out_console()

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, highlight=False, soft_wrap=True)

    fetch_demo(folder, progress=lambda text: say(text, "dim"))
    say(f"{folder} has model and tasks")
