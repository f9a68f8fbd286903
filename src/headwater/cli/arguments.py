"""Arguments that several commands have."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

ConfigFile = Annotated[str, typer.Argument(metavar="FILE", help="The run's YAML file; docs/config.md lists its keys.")]
Adapter = Annotated[
    str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run folder, one of its checkpoints, or an adapter folder.")
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads this at run time on Python 3.10)
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. training.max_steps=100. May be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Prompts = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        help="A prompt; may be repeated. Without it, each line of standard input is one.",
    ),
]
