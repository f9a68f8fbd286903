"""The commands of `headwater pool` and their arguments."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

pool_app = typer.Typer(help="Keep many LoRA adapters of one base model, and combine them.", no_args_is_help=True)

Pool = Annotated[str, typer.Argument(metavar="POOL", help="The pool's folder.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Adapters of the pool.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]


@pool_app.command()
def create(
    pool: Pool,
    model: Annotated[str, typer.Option(metavar="MODEL", help="Hub id, folder or GGUF file of the base model.")],
) -> None:
    """Make an empty pool for a base model."""
    from headwater.cli.pool import create as run

    run(pool, model)


@pool_app.command()
def add(
    pool: Pool,
    source: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A PEFT LoRA adapter, or a run with one.")],
    name: Annotated[
        Optional[str],  # noqa: UP045  (typer reads this at run time on Python 3.10)
        typer.Option(metavar="NAME", help="What the pool calls it; the folder's name by default."),
    ] = None,
    samples: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="Rows of the kind that it was trained on; a run's training rows by default."),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=0, help="Sample texts to keep, drawn at random.")] = 20,
    seed: Seed = 0,
    same_base: Annotated[
        bool, typer.Option("--same-base", help="It was trained on the pool's base model, whatever it names.")
    ] = False,
) -> None:
    """Copy a LoRA adapter into a pool, after checking it."""
    from headwater.cli.pool import add as run

    run(pool, source, name, samples, num_samples, seed, same_base=same_base)


@pool_app.command("list")
def list_(pool: Pool, as_json: AsJson = False) -> None:
    """List a pool's adapters."""
    from headwater.cli.pool import show as run

    run(pool, as_json=as_json)


@pool_app.command()
def remove(pool: Pool, names: Names) -> None:
    """Delete adapters from a pool."""
    from headwater.cli.pool import remove as run

    run(pool, names)


@pool_app.command()
def check(pool: Pool) -> None:
    """Read all of a pool's files and report everything that is wrong with them."""
    from headwater.cli.pool import check as run

    run(pool)


@pool_app.command()
def merge(
    pool: Pool,
    adapter: Annotated[list[str], typer.Option(metavar="NAME=WEIGHT", help="An adapter and its weight; repeatable.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The new adapter's folder.")],
    how: Annotated[str, typer.Option(help="concat (exact), fuse or linear (average the factors).")] = "concat",
) -> None:
    """Write one plain LoRA adapter made of several, with fixed weights."""
    from headwater.cli.pool import merge as run

    run(pool, adapter, how, output)
