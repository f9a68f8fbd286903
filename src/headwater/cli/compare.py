"""`headwater compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from headwater.cli.console import err_console, out_console, quiet_libraries, table
from headwater.cli.train import INTERRUPTED

if TYPE_CHECKING:
    from headwater.compare.plan import Plan


def run(file: str, names: str | None, options: dict[str, Any], overrides: Sequence[str], *, dry_run: bool) -> None:
    """Compare methods at equal trainable parameters, and print their means over seeds.

    Args:
        names: labels or methods, with commas between; None for the file's.
        options: fields of the `compare:` section as given on the command line; None where not given.
        dry_run: print what would be trained, and stop.

    Raises:
        HeadwaterError: for whatever is wrong with the file, the data, the model or a method.
        typer.Exit: with 130 when interrupted; the same command then goes on.
    """
    from headwater.config import load_config
    from headwater.marked_yaml import parse_value

    config = load_config(file, overrides)
    quiet_libraries()
    console = out_console()

    from headwater.compare.plan import choose, make_plan

    given = {key: value for key, value in options.items() if value is not None}
    if "seeds" in given:
        given["seeds"] = parse_value(f"[{given['seeds']}]")
    if given or names is not None:
        config = choose(config, None if names is None else [n.strip() for n in names.split(",")], given)
    plan = make_plan(config)
    show_plan(plan, console)
    if dry_run:
        return

    from headwater.compare.run import compare

    try:
        content = compare(plan, console=console)
    except KeyboardInterrupt:
        err_console().print("stopped; the same command goes on from here", highlight=False)
        raise typer.Exit(INTERRUPTED) from None
    show_summary(content, console)
    console.print(f"report: {Path(config.output_dir) / 'report.html'}", soft_wrap=True, highlight=False, markup=False)


def show_plan(plan: Plan, console: Console) -> None:
    """Print what each method trains, and how far that is from the common number."""
    rows = []
    for planned in plan.methods:
        section, deviation = planned.config.method, plan.deviation(planned)
        size = ", ".join(f"{key} {_number(section[key])}" for key in _sizes(section, planned.field))
        off = "" if deviation is None else f"{deviation:+.1%}"
        rows.append([planned.label, section["name"], size, f"{planned.parameters:,}", off])
    console.print(table(["label", "method", "size", "trainable parameters", "off"], rows))
    if plan.budget is None:
        console.print("Trainable parameters are as given: nothing is matched.", highlight=False)


def show_summary(content: dict[str, Any], console: Console) -> None:
    """Print the one table: mean over seeds, its interval, and the difference to the first method, seed by seed."""
    summary, about = content["summary"], {m["label"]: m for m in content["extra"]["methods"]}
    rows = []
    for entry in summary:
        deviation = about[entry["method"]]["deviation"]
        rows.append(
            [
                entry["method"],
                _stacked(f"{entry['trainable_parameters']:,}", "" if deviation is None else f"{deviation:+.1%}"),
                f"{about[entry['method']]['learning_rate']:g}",
                entry["n"],
                _stacked(_score(entry["mean"]), _interval(entry["ci95"], "")),
                _stacked(_score(entry["paired_difference"], "+"), _interval(entry["paired_ci95"], "+")),
            ]
        )
    mean, apart = _stacked("mean", "95 %"), _stacked(f"minus {summary[0]['method']}", "95 %")
    columns = ["method", _stacked("parameters", "off"), _stacked("learning", "rate"), "seeds", mean, apart]
    console.print(table(columns, rows))
    if all(entry["mean"] is None for entry in summary):
        said = "No task has a score; losses are compared task by task in the report."
    elif summary[0]["n"] == 1:
        said = "One seed: there is no interval over seeds, and differences of a few points may be chance."
    else:
        said = (
            f"Mean over tasks of the scores on test rows; intervals are Student's t over {summary[0]['n']} seeds, "
            "those of differences seed by seed. The test rows are the same in all runs, so their own chance is not in "
            "the intervals."
        )
    console.print(said, highlight=False)


def _sizes(section: dict[str, Any], field: str) -> list[str]:
    """The fields that say how large a method is."""
    known = ("r", "num_heads", "num_experts", "num_factors", "shared_rank", "lora_alpha")
    return [key for key in dict.fromkeys([*known, field]) if key in section]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _score(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.3f}"


def _stacked(number: str, about: str) -> str:
    """One below the other: side by side they do not fit into 80 columns, and would be broken anywhere."""
    return f"{number}\n{about}".rstrip()


def _interval(pair: Sequence[float] | None, sign: str) -> str:
    return "" if pair is None else f"{pair[0]:{sign}.3f} to {pair[1]:{sign}.3f}"
