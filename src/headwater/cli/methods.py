"""`headwater methods`."""

from __future__ import annotations

import json

from headwater.cli.console import out_console, table


def run(*, as_json: bool) -> None:
    """Print the registered methods."""
    from headwater.methods import methods

    found = [method.as_dict() for method in methods()]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    rows = (
        [m["name"], m["title"], m["family"], _yes(m["needs_task_ids"]), _yes(m["mergeable"]), m["paper"]] for m in found
    )
    columns = ["name", "title", "family", "task ids", "mergeable", "paper"]
    out_console().print(table(columns, rows))
    out_console().print("`lora` is PEFT's own LoRA and can be used wherever these can.", style="dim")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
