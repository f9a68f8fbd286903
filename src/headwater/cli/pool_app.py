"""The commands of `headwater pool` and their arguments."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from headwater.cli.arguments import AsJson, Overrides, Prompts

pool_app = typer.Typer(help="Keep many LoRA adapters of one base model, and combine them.", no_args_is_help=True)

Pool = Annotated[str, typer.Argument(metavar="POOL", help="The pool's folder.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Adapters of the pool.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Tasks = Annotated[str, typer.Option("--tasks", metavar="FILE", help="YAML file with the tasks.")]
SomeNames = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--adapter", metavar="NAME", help="An adapter to use; repeatable. All by default."),
]
Encoder = Annotated[str, typer.Option(metavar="NAME", help="Sentence encoder: folder or hub name; MiniLM by default.")]
Top = Annotated[int, typer.Option(min=1, help="Adapters to retrieve.")]
Split = Annotated[str, typer.Option(help="Which rows to score: test, validation or train.")]
MaxRows = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="At most so many rows of each task, the same ones every time."),
]
Scores = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--scores", metavar="FILE", help="Write the scores as JSON, too."),
]
Output = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="A new folder for the result.")]


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


@pool_app.command()
def cluster(
    pool: Pool,
    clusters: Annotated[int, typer.Option(min=1, help="How many.")],
    adapter: SomeNames = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Group adapters whose updates are alike: tasks that could share one adapter."""
    from headwater.cli.pool import cluster as run

    run(pool, adapter or [], clusters, seed, as_json=as_json)


@pool_app.command()
def retrieve(
    pool: Pool,
    prompt: Prompts = None,
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="Instead of prompts: how often rows find the adapter of their task's name."),
    ] = None,
    top: Top = 3,
    encoder: Encoder = "",
    split: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="For --tasks: which rows, test (default), validation or train."),
    ] = None,
    max_rows: MaxRows = None,
    as_json: AsJson = False,
) -> None:
    """Find the adapters whose sample texts are most like a prompt."""
    from headwater.cli.evaluate import refuse
    from headwater.cli.pool_compose import Scoring
    from headwater.cli.pool_compose import retrieve as run

    if tasks is None:
        refuse({"--split": split, "--max-rows": max_rows}, "it is about --tasks: leave it out, or give that")
    else:
        refuse({"--prompt": prompt or None}, "--tasks brings its own prompts: leave one of the two out")
    scoring = None if tasks is None else Scoring(tasks, split or "test", max_rows)
    run(pool, prompt, scoring, top=top, encoder=encoder, as_json=as_json)


@pool_app.command("tune-encoder")
def tune_encoder(
    pool: Pool,
    output: Output,
    adapter: SomeNames = None,
    encoder: Encoder = "",
    epochs: Annotated[int, typer.Option(min=1, help="How often each sample text is an anchor.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 2e-5,
    temperature: Annotated[float, typer.Option(help="Of the contrastive loss.")] = 0.01,
    seed: Seed = 0,
) -> None:
    """Fine-tune the sentence encoder on the pool's sample texts, to tell its adapters apart."""
    from headwater.cli.pool_compose import tune_encoder as run

    run(
        pool,
        output,
        adapter or [],
        encoder=encoder,
        epochs=epochs,
        learning_rate=learning_rate,
        temperature=temperature,
        seed=seed,
    )


@pool_app.command()
def flow(
    pool: Pool,
    tasks: Tasks,
    output: Output,
    adapter: SomeNames = None,
    start: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="The adapter that gates start at; the plain average by default."),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Most training rows to use, drawn at random.")] = 200,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over them.")] = 5,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 4,
    temperature: Annotated[float, typer.Option(help="Of the softmax.")] = 1.0,
    granularity: Annotated[
        str, typer.Option(help="A gate per decoder layer, one for all (step), or one per adapted linear (module).")
    ] = "layer",
    seed: Seed = 0,
    split: Split = "test",
    max_rows: MaxRows = None,
    scores: Scores = None,
    overrides: Overrides = None,
) -> None:
    """LoRA-Flow: train small gates that mix adapters token by token, and score them."""
    from headwater.cli.pool_compose import Scoring
    from headwater.cli.pool_compose import flow as run
    from headwater.compose.flow import FlowSpec

    scoring = Scoring(tasks, split, max_rows, scores, overrides or [])
    spec = FlowSpec(examples, epochs, learning_rate, batch_size, seed)
    run(pool, scoring, output, adapter or [], start, temperature, granularity, spec)


@pool_app.command()
def hub(
    pool: Pool,
    tasks: Tasks,
    output: Output,
    adapter: SomeNames = None,
    examples: Annotated[int, typer.Option(min=1, help="Training rows to search on, drawn at random.")] = 5,
    budget: Annotated[int, typer.Option(min=1, help="Evaluations of the objective.")] = 40,
    optimiser: Annotated[str, typer.Option(metavar="NAME", help="Of nevergrad: NGOpt, CMA, ...")] = "NGOpt",
    penalty: Annotated[str, typer.Option(help="paper, or official: as the authors' code scales the loss.")] = "paper",
    seed: Seed = 0,
    split: Split = "test",
    max_rows: MaxRows = None,
    scores: Scores = None,
    overrides: Overrides = None,
) -> None:
    """LoRAHub: search one weight per adapter on a few examples, write the result as one adapter, and score it."""
    from headwater.cli.pool_compose import Scoring
    from headwater.cli.pool_compose import hub as run
    from headwater.compose.hub import HubSpec

    scoring = Scoring(tasks, split, max_rows, scores, overrides or [])
    run(pool, scoring, output, adapter or [], HubSpec(examples, budget, optimiser, penalty, seed))  # type: ignore[arg-type]


@pool_app.command()
def arrow(
    pool: Pool,
    tasks: Tasks,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--output", "-o", metavar="DIR", help="Keep the routing in a new folder."),
    ] = None,
    adapter: SomeNames = None,
    top_k: Annotated[int, typer.Option(help="Adapters per token and layer.")] = 3,
    temperature: Annotated[float, typer.Option(help="Of the softmax over them.")] = 1.0,
    input_norm: Annotated[str, typer.Option(help="What a token is divided by: none, unit or sqrt_d.")] = "none",
    combine: Annotated[str, typer.Option(help="What is mixed: output, or factors (the authors' code).")] = "output",
    general: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="NAME", help="An adapter of general knowledge, to take off the others; repeatable."),
    ] = None,
    subtract: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="For --general: of updates (default), or of factors as PEFT does."),
    ] = None,
    split: Split = "test",
    max_rows: MaxRows = None,
    scores: Scores = None,
    overrides: Overrides = None,
) -> None:
    """Arrow: route every token at every layer by the adapters' own directions, without training, and score it."""
    from headwater.cli.evaluate import refuse
    from headwater.cli.pool_compose import Scoring
    from headwater.cli.pool_compose import arrow as run
    from headwater.compose.arrow import ArrowSpec

    if not general:
        refuse({"--subtract": subtract}, "it is about --general: leave it out, or give that")
    scoring = Scoring(tasks, split, max_rows, scores, overrides or [])
    spec = ArrowSpec(top_k, temperature, input_norm, combine, subtract or "updates")  # type: ignore[arg-type]
    run(pool, scoring, output, adapter or [], general or [], spec)


@pool_app.command()
def evaluate(
    pool: Pool,
    tasks: Tasks,
    way: Annotated[
        list[str],
        typer.Option(
            metavar="WAY",
            help="base, own, uniform, selection, mixture, fusion, arrow, an adapter's name, or a folder that flow, hub "
            "or arrow wrote; repeatable.",
        ),
    ],
    top: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Adapters to retrieve for mixture and fusion, 3 by default."),
    ] = None,
    encoder: Encoder = "",
    exclude_own: Annotated[
        bool, typer.Option("--exclude-own", help="Never retrieve the adapter of the task's own name.")
    ] = False,
    temperature: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Weigh what is retrieved by softmax(score / temperature), not equally."),
    ] = None,
    split: Split = "test",
    max_rows: MaxRows = None,
    scores: Scores = None,
    overrides: Overrides = None,
) -> None:
    """Score tasks with the pool's adapters, combined in one or several ways."""
    from headwater.cli.evaluate import refuse
    from headwater.cli.pool_compose import Scoring
    from headwater.cli.pool_compose import evaluate as run
    from headwater.compose.scoring import RETRIEVED

    if not {"mixture", "fusion"} & set(way):
        fix = "it is about --way mixture and fusion: leave it out, or give one of them"
        refuse({"--temperature": temperature, "--top": top}, fix)
    if not set(RETRIEVED) & set(way):
        fix = "it is about --way selection, mixture and fusion: leave it out, or give one of them"
        refuse({"--encoder": encoder or None, "--exclude-own": exclude_own}, fix)
    scoring = Scoring(tasks, split, max_rows, scores, overrides or [])
    run(pool, scoring, way, top=top or 3, encoder=encoder, exclude_own=exclude_own, temperature=temperature)
