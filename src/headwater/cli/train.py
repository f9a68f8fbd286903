"""`headwater train`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from headwater.cli.console import err_console, out_console, quiet_libraries
from headwater.errors import HeadwaterError, Problem

if TYPE_CHECKING:
    from torch import nn

    from headwater.config import RunConfig

INTERRUPTED = 130
RESUME = "training.resume_from_checkpoint=true"


def run(file: str, overrides: Sequence[str]) -> None:
    """Train what a run's file describes and print the scores before and after.

    Raises:
        HeadwaterError: for whatever is wrong with the file, the data or the model, or a loss that is not finite.
        typer.Exit: with 130 when interrupted; how to go on is then printed.
    """
    from headwater.config import load_config

    config = load_config(file, overrides)
    quiet_libraries()
    console = out_console()
    with resumable(config.output_dir, ["headwater", "train", file], overrides):
        from headwater.training import train
        from headwater.training.table import show_scores

        try:
            result = train(config, console=console)
        except HeadwaterError as error:
            raise with_layer_names(config.placed(error), error.__cause__, config) from error
    show_scores(result.results, console)
    console.print(f"report: {result.output_dir / 'report.html'}", soft_wrap=True, highlight=False, markup=False)


def with_layer_names(error: HeadwaterError, cause: BaseException | None, config: RunConfig) -> HeadwaterError:
    """The error; where PEFT found none of the target modules, with the names that it would have found."""
    if not str(cause).startswith(("Target modules", "No modules were targeted")):
        return error
    from headwater.base_model import shape_of

    model = shape_of(config.model_name_or_path, trust_remote_code=config.model.trust_remote_code)
    names = linear_names(model)
    what = f"no layer of {config.model_name_or_path} matches target_modules {config.method.get('target_modules')!r}"
    fix = f"its linear layers are: {', '.join(names)}; or give all-linear"
    return HeadwaterError(Problem(what, config.where("method", "target_modules"), fix))


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of a model's linear layers, in the order of the model, without its output layer."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    output = getattr(model, "get_output_embeddings", lambda: None)()
    return list(
        dict.fromkeys(
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, Linear | Conv1D) and module is not output
        )
    )


@contextmanager
def resumable(output_dir: str, command: Sequence[str], overrides: Sequence[str]) -> Iterator[None]:
    """Turn Ctrl-C into exit status 130 and a line that says how to go on.

    Args:
        output_dir: the run folder.
        command, overrides: what was run.
    """
    try:
        yield
    except KeyboardInterrupt:
        console = err_console()
        if any(Path(output_dir).rglob("checkpoint-*")):
            kept = [part for override in overrides if override != RESUME for part in ("--set", override)]
            line = f"stopped; resume with: {shlex.join([*command, *kept, '--set', RESUME])}"
        else:
            line = "stopped; no checkpoint had been saved yet"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(INTERRUPTED) from None
