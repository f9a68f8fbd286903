"""`headwater advise`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import typer
import yaml

from headwater.cli.console import err_console, out_console, quiet_libraries, table
from headwater.cli.train import INTERRUPTED
from headwater.errors import HeadwaterError, Problem
from headwater.seeds import require_seed


def run(file: str, minutes: float, seeds: str, method: str | None, overrides: Sequence[str]) -> None:
    """Pilot plain LoRA against a multi-head method on the file's own tasks, and say what follows.

    Raises:
        HeadwaterError: whatever is wrong with the file, the data or the model; too little time.
        typer.Exit: with 130 when interrupted; the same command then goes on.
    """
    from headwater.config import load_config
    from headwater.training.progress import duration

    config = load_config(file, overrides)
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise HeadwaterError(Problem(f"{seeds!r} are not whole numbers", "--seeds", "e.g. 0,1,2")) from None
    for number in numbers:
        require_seed(number, "--seeds")
    quiet_libraries()
    console = out_console()

    from headwater.compare.advise import advise

    try:
        advice = advise(config, minutes=minutes, seeds=numbers, method=method, console=console)
    except KeyboardInterrupt:
        err_console().print("stopped; the same command goes on from here", highlight=False)
        raise typer.Exit(INTERRUPTED) from None
    name = advice["method"]
    rows = [[task, *_difference(values)] for task, values in advice["tasks"].items()]
    console.print(table(["task", f"{name} minus lora", "95 %"], [*rows, ["mean", *_difference(advice)]]))
    console.print(sentence(advice), highlight=False, soft_wrap=True)
    costs = ", ".join(f"{label} {duration(seconds)}" for label, seconds in advice["full_run_seconds"].items())
    console.print(f"training for all {advice['full_steps']} steps here: {costs}", highlight=False, soft_wrap=True)


def sentence(advice: dict[str, Any]) -> str:
    """The verdict in words, with what it rests on."""
    name, interval = advice["method"], advice["ci95"]
    rests = (
        f"on validation rows, after {advice['steps']} of {advice['full_steps']} steps, over {len(advice['seeds'])} "
        f"seeds: {advice['difference']:+.3f}"
    )
    if interval is None:
        return f"The pilot cannot tell {name} from plain LoRA {rests} with each, which tells no spread. Add --seeds."
    low, high = interval
    rests += f" ({low:+.3f} to {high:+.3f})"
    if advice["verdict"] == "multi-head":
        return f"{name} pays here {rests}."
    if advice["verdict"] == "plain":
        settings = yaml.safe_dump(advice["settings"]["lora"], default_flow_style=True, sort_keys=False, width=math.inf)
        return f"Plain LoRA is better here {rests}. What was compared, for the file: {settings.strip()[1:-1]}"
    return (
        f"The pilot cannot tell {name} from plain LoRA {rests}. A difference would have had to be about "
        f"{(high - low) / 2:.3f} to show. More --minutes or --seeds narrow that; if it is little to you, take either."
    )


def _difference(values: dict[str, Any]) -> list[str]:
    interval = values["ci95"]
    return [f"{values['difference']:+.3f}", "" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}"]
