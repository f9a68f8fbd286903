"""`headwater prefer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from headwater.cli.console import out_console, quiet_libraries, table
from headwater.cli.train import resumable
from headwater.errors import HeadwaterError


def run(file: str, overrides: Sequence[str]) -> None:
    """Train what a file with a `preference` section describes and print the strategies' scores.

    Raises:
        HeadwaterError: for whatever is wrong with the file, the data, the model or the sources.
        typer.Exit: with 130 when interrupted; how to go on is then printed.
    """
    from headwater.config import load_config
    from headwater.preference.spec import PreferConfig

    config = cast(PreferConfig, load_config(file, overrides, model=PreferConfig))
    quiet_libraries()
    console = out_console()
    with resumable(config.output_dir, ["headwater", "prefer", file], overrides):
        from headwater.preference.run import prefer

        try:
            results = prefer(config, console=console)
        except HeadwaterError as error:
            raise config.placed(error) from error
    _show(results, console)
    report = Path(config.output_dir) / "report.html"
    console.print(f"report: {report}", soft_wrap=True, highlight=False, markup=False)


def _show(results: dict[str, Any], console: Console) -> None:
    def interval(pair: Sequence[float] | None) -> str:
        return "" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"

    first = next(iter(results["scores"]))
    rates, differences = results["extra"]["late_good_pick_rates"], results["extra"]["differences"]
    rows = []
    for strategy, score in results["scores"].items():
        difference, rate = differences.get(strategy), rates[strategy]
        rows.append(
            (
                strategy,
                f"{score['mean']:.3f}",
                interval(score["ci95"]),
                "" if difference is None else f"{difference['mean']:+.3f}",
                "" if difference is None else interval(difference["ci95"]),
                "" if rate is None else f"{rate:.0%}",
            )
        )
    columns = [
        "strategy",
        "score",
        "95 % interval",
        f"{first} minus it",
        "95 % interval",
        "late picks of the good source",
    ]
    console.print(table(columns, rows))
    console.print(f"before training: {results['base']:.3f}; seeds: {results['seeds']}", highlight=False)
