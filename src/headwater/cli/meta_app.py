"""The commands of `headwater meta` and their arguments."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from headwater.cli.arguments import Overrides

meta_app = typer.Typer(help="ICM-LoRA: train a generator that writes adapters.", no_args_is_help=True)

MetaFile = Annotated[str, typer.Argument(metavar="FILE", help="A run's YAML file with a `meta:` section.")]


@meta_app.command()
def collect(file: MetaFile, overrides: Overrides = None) -> None:
    """Train plain LoRA on each task by itself and keep its late checkpoints."""
    from headwater.cli.meta import collect as run

    run(file, overrides or [])


@meta_app.command()
def train(file: MetaFile, overrides: Overrides = None) -> None:
    """Collect what is missing, train the generator, and score what it writes."""
    from headwater.cli.meta import train as run

    run(file, overrides or [])


@meta_app.command()
def generate(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_GENERATOR", help="What `headwater meta train` wrote.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The adapter's folder.")],
    task: Annotated[
        Optional[str],  # noqa: UP045  (typer reads this at run time on Python 3.10)
        typer.Option(metavar="NAME", help="A task that the generator was trained on."),
    ] = None,
    examples: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="Rows of a new task; its vector is made of their prompts."),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Draw an adapter instead of taking the likeliest."),
    ] = None,
    best_of: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=2, help="Make so many, the likeliest and draws, and keep the best on validation rows."),
    ] = None,
    validation: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="For --best-of: rows to choose by; the run's validation rows by default."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write an adapter for a known task, or for a new one from examples."""
    from headwater.cli.evaluate import refuse
    from headwater.cli.meta import generate as run

    if best_of is None:
        refuse({"--validation": validation}, "it is about --best-of: leave it out, or give that")
    run(
        source,
        output,
        task=task,
        examples=examples,
        seed=seed,
        best_of=best_of,
        validation=validation,
        overrides=overrides or [],
    )
