"""The commands and their arguments; what each does stands in the module it calls."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from headwater.cli.arguments import Adapter, AsJson, ConfigFile, Overrides, Prompts
from headwater.cli.ingredients_app import calibrate, import_, subspace
from headwater.cli.meta_app import meta_app
from headwater.cli.pool_app import pool_app

app = typer.Typer(
    help="Train one LoRA adapter on many tasks, and see that they do not fight.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at the tasks' data.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(pool_app, name="pool")
app.add_typer(meta_app, name="meta")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"headwater {version('headwater')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(file: ConfigFile, overrides: Overrides = None) -> None:
    """Train an adapter: score the tasks, train, score again, write the run folder and its report."""
    from headwater.cli.train import run

    run(file, overrides or [])


@app.command()
def compare(
    file: ConfigFile,
    methods: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="A,B,C", help="Methods, or labels of the file; the first is what others are compared to."),
    ] = None,
    seeds: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="0,1,2", help="Every method is trained with each of them."),
    ] = None,
    match: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Solve for this so that parameters are equal: rank (default), heads or none."),
    ] = None,
    parameters: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Trainable parameters of every method; by default the file's own method's."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show ranks and parameters; train nothing.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train several methods at equal trainable parameters over seeds, and compare them."""
    from headwater.cli.compare import run

    options = {"seeds": seeds, "match": match, "parameters": parameters}
    run(file, methods, options, overrides or [], dry_run=dry_run)


@app.command()
def advise(
    file: ConfigFile,
    minutes: Annotated[float, typer.Option(min=0.0, help="For the whole pilot, roughly.")] = 15.0,
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="Both methods are trained with each of them.")] = "0,1,2",
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Compared with plain LoRA; by default the file's method."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Find out on your own tasks, in minutes, whether a multi-head method pays, and what the whole run would cost."""
    from headwater.cli.advise import run

    run(file, minutes, seeds, method, overrides or [])


@app.command()
def evaluate(
    source: Adapter,
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="YAML file with the tasks to score; the run's own by default."),
    ] = None,
    split: Annotated[Optional[str], typer.Option(help="Which rows: test (default), validation or train.")] = None,  # noqa: UP045
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--output", "-o", metavar="FILE", help="Write the scores as JSON, too."),
    ] = None,
    overrides: Overrides = None,
    lm_eval: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--lm-eval", metavar="NAMES", help="Run lm-eval's tasks instead: names or files, with commas."),
    ] = None,
    include_path: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DIR", help="For --lm-eval: folder with task files of your own."),
    ] = None,
    num_fewshot: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="For --lm-eval: solved examples before each question; the task's own by default."),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="For --lm-eval: at most so many rows a task.")] = None,  # noqa: UP045
    task: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="For --lm-eval: the trained task, for methods that go by task."),
    ] = None,
    chat: Annotated[bool, typer.Option(help="For --lm-eval: use the model's chat template.")] = False,
) -> None:
    """Score an adapter on held-out rows, task by task; or on lm-eval's tasks."""
    from headwater.cli.evaluate import refuse, run

    if lm_eval is not None:
        from headwater.cli.lm_eval import run as run_lm_eval

        refuse({"--tasks": tasks, "--split": split}, "lm-eval's tasks bring their own rows: leave it out")
        run_lm_eval(
            source,
            [name for name in lm_eval.split(",") if name],
            include_path=include_path,
            num_fewshot=num_fewshot,
            limit=limit,
            task=task,
            chat=chat,
            output=output,
            overrides=overrides or [],
        )
        return
    theirs = {"--include-path": include_path, "--num-fewshot": num_fewshot, "--limit": limit, "--task": task}
    fix = "it is for lm-eval's tasks: name some with --lm-eval, or leave it out"
    refuse({**theirs, "--chat": chat}, fix)
    run(source, tasks, split or "test", output, overrides or [])


@app.command()
def generate(
    source: Adapter,
    prompt: Prompts = None,
    task: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="The task that the prompts belong to; needed by methods that go by task."),
    ] = None,
    chat: Annotated[
        bool, typer.Option(help="Put each prompt into the model's chat template as the user's turn.")
    ] = False,
    max_new_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Most tokens per answer; 256 by default, or what the model has room for."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="When sampling, the share of probability kept.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per answer, with its prompt.")] = False,
) -> None:
    """Answer prompts with an adapter."""
    from headwater.cli.generate import run

    run(
        source,
        prompt,
        task=task,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        as_json=as_json,
    )


@app.command()
def inspect(
    source: Adapter,
    rows: Annotated[
        int, typer.Option(min=0, help="Rows of each of the run's tasks to see the gates on; 0 reads no text.")
    ] = 4,
    text: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="See the gates on the lines of this file instead."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what an adapter is made of, how alike its heads are, and what its gates do on text."""
    from headwater.cli.inspect import run

    run(source, text=text, rows=rows, as_json=as_json)


@app.command()
def conflict(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or one of its checkpoints.")],
    rows: Annotated[int, typer.Option(min=1, help="Training rows of each task, the same ones every time.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Measure whether the tasks' gradients pull an adapter in opposite directions."""
    from headwater.cli.conflict import run

    run(source, rows, as_json=as_json)


@app.command()
def report(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="The output_dir of a run, a comparison, `prefer` or `meta train`.")
    ],
) -> None:
    """Write a folder's report anew, from what it holds now."""
    from headwater.cli.report import run

    run(folder)


@app.command()
def export(
    source: Adapter,
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="A folder that is not there yet.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write the base model with the adapter merged in.")] = False,
    per_task: Annotated[
        bool, typer.Option("--per-task", help="Write one plain LoRA for each task of the run.")
    ] = False,
    rows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Rows per task that --per-task averages gates over; 64 by default."),
    ] = None,
    score_rows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Test rows per task that --per-task scores; all by default, 0 for none."),
    ] = None,
) -> None:
    """Write an adapter as plain PEFT LoRA, or merged, for tools that do not know headwater."""
    from headwater.cli.export import run

    run(source, output, merge=merge, per_task=per_task, rows=rows, score_rows=score_rows)


@app.command()
def prefer(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A run's YAML file with a `preference` section; docs/prefer.md.")
    ],
    overrides: Overrides = None,
) -> None:
    """Train on preferences, with a bandit that picks which reward source judges each batch."""
    from headwater.cli.prefer import run

    run(file, overrides or [])


@app.command()
def serve(
    source: Annotated[
        str, typer.Argument(metavar="POOL_OR_RUN", help="An adapter pool, a run folder, or an adapter folder.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; only this machine can reach the default.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key_file: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="Ask for the key in this file; HEADWATER_API_KEY does the same."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that are answered at once.")] = 16,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are sent away with 429.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 1024,
    max_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=2, help="Most tokens of a prompt and its answer together; the model's own limit by default."),
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 1 << 20,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 120.0,
    encoder: Annotated[str, typer.Option(help="A pool's sentence encoder for `auto`: folder or hub name.")] = "",
    top: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Adapters of a pool that `auto` mixes, 3 by default."),
    ] = None,
    way: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="WAY",
            help="Answer everything with a pool's adapters combined one way: arrow, or a folder that `headwater pool "
            "flow`, `hub` or `arrow` wrote.",
        ),
    ] = None,
) -> None:
    """Answer requests of OpenAI's clients with a run's adapter or a pool's, many at once."""
    from headwater.cli.serve import run

    run(
        source,
        host=host,
        port=port,
        api_key_file=api_key_file,
        max_batch=max_batch,
        max_queue=max_queue,
        max_tokens=max_tokens,
        max_length=max_length,
        max_body=max_body,
        timeout=timeout,
        encoder=encoder,
        top=top,
        way=way,
    )


@data_app.command()
def check(file: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Read every row of every task and report what is there and what is wrong; trains nothing."""
    from headwater.cli.data import run_check

    run_check(file, overrides or [], as_json=as_json)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods that `method: {name: ...}` takes."""
    from headwater.cli.methods import run

    run(as_json=as_json)


app.command()(calibrate)
app.command()(subspace)
app.command("import")(import_)


@app.command("enable-autoload")
def enable_autoload(
    disable: Annotated[bool, typer.Option("--disable", help="Take it out again.")] = False,
) -> None:
    """Make every program in this Python environment that uses PEFT know headwater's methods.

    Writes two small files into site-packages. They load headwater after PEFT is imported, and at no other time.
    """
    from headwater.cli.autoload import run

    run(disable=disable)


@app.command()
def demo(
    output_dir: Annotated[str, typer.Option(help="The run folder.")] = "runs/demo",
    overrides: Overrides = None,
    fetch: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DIR", help="Train nothing: only put the model and the tasks into this folder."),
    ] = None,
) -> None:
    """Train on six real tasks with a small real model, on a CPU in minutes."""
    from headwater.cli.demo import fetch_only, run

    if fetch is not None:
        fetch_only(fetch)
    else:
        run(output_dir, overrides or [])
