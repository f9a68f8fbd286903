"""`headwater meta collect | train | generate`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from headwater.cli.console import err_console, out_console, quiet_libraries, table
from headwater.errors import HeadwaterError, Problem
from headwater.seeds import require_seed

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headwater.config import RunConfig
    from headwater.data.tasks import Task
    from headwater.generate import AdapterGenerator, Layout
    from headwater.generate.best import Draw
    from headwater.generate.study import MetaRun


def collect(file: str, overrides: Sequence[str]) -> None:
    """Train every task by itself and keep its late checkpoints.

    Raises:
        HeadwaterError: whatever is wrong with the file, the data, the model or an earlier collection.
    """
    _run(file, overrides).collect()
    out_console().print("collected; next: headwater meta train", highlight=False)


def train(file: str, overrides: Sequence[str]) -> None:
    """Collect what is missing, train the generator, score what it writes, print the table.

    Raises:
        HeadwaterError: as `collect`; or adapters of different layouts; or a loss that is not finite.
    """
    from headwater.generate.report import KINDS, mean_of, write_meta_report

    run = _run(file, overrides)
    results = run.train()
    scores, extra = results["scores"], results["extra"]
    name, means = mean_of(results)
    rows = [
        [task, extra["metrics"][task], extra["n"][task], *(f"{by[kind]:.3f}" for kind in means)]
        for task, by in scores.items()
    ]
    rows.append([name, "", "", *(f"{mean:.3f}" for mean in means.values())])
    out_console().print(table(["task", "metric", "rows", *(KINDS[kind] for kind in means)], rows))
    out_console().print(f"report: {write_meta_report(run.folder, results)}", soft_wrap=True, highlight=False)


def generate(
    source: str,
    output: str,
    *,
    task: str | None,
    examples: str | None,
    seed: int | None,
    best_of: int | None,
    validation: str | None,
    overrides: Sequence[str],
) -> None:
    """Write the adapter of a known task, or of a new one from examples, as a PEFT LoRA folder.

    Args:
        source: a generator's folder, or the output folder of `headwater meta train`.
        best_of: make so many and keep the best on the rows of `validation`, else on the run's validation rows.

    Raises:
        HeadwaterError: no generator, an unknown task, examples that cannot be read, a seed that is none, or no rows to
            choose by.
    """
    from headwater.export import check_output
    from headwater.generate import AdapterGenerator, write_adapter

    if (task is None) == (examples is None):
        raise HeadwaterError(Problem("give either --task NAME or --examples FILE", "headwater meta generate"))
    for option, file in (("--examples", examples), ("--validation", validation)):
        if file == "":
            raise HeadwaterError(Problem("names no file", option))
    if seed is not None:
        require_seed(seed, "--seed")
    if best_of is not None:
        require_seed((seed or 0) + best_of - 2, "--seed of the last draw")  # the first of so many is no draw
    folder, target = Path(source), Path(output)
    folder = folder / "generator" if (folder / "generator").is_dir() else folder
    check_output(target)
    generator = AdapterGenerator.load(folder)
    how = ""
    if task is not None and best_of is None:
        weights = generator.for_task(task, seed=seed)
    else:
        if task is not None:
            generator.require(task)
        config = _config_of(folder, overrides)
        held_out = None if best_of is None else _held_out(config, task, validation)
        model, tokenizer = _load(config)
        if task is not None:
            draw: Draw = functools.partial(generator.for_task, task)
        else:
            vector = _vector_of(generator, config, model, tokenizer, str(examples))
            draw = functools.partial(generator.generate, vector)
        if held_out is None or best_of is None:
            weights = draw(seed=seed)
        else:
            weights, how = _best(draw, best_of, seed or 0, generator.layout, config, model, tokenizer, held_out)
    write_adapter(target, generator.layout, weights)
    err_console().print(f"wrote {output}{how}", soft_wrap=True, highlight=False)


def _best(
    draw: Draw,
    count: int,
    seed: int,
    layout: Layout,
    config: RunConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Task,
) -> tuple[Tensor, str]:
    """The best of so many adapters on a task's rows, and a few words about it."""
    from headwater.generate import best_of, score_adapter

    sign = -1 if held_out.metric == "loss" else 1

    def score(weights: Tensor) -> float:
        return sign * score_adapter(model, tokenizer, layout, weights, held_out, config.evaluation, config.data).value

    with err_console().status(f"scoring {count} adapters"):
        best = best_of(draw, count, score, seed=seed)
    which = "z = 0" if best.seed is None else f"seed {best.seed}; z = 0 has {sign * best.scores[0]:.3f}"
    shown = f"{held_out.metric} {sign * best.score:.3f} on {len(held_out.test)} validation rows"
    return best.weights, f": the best of {count}, {which}: {shown}"


def _config_of(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """The config of the run that a generator is from."""
    from headwater.config import load_config
    from headwater.generate.spec import MetaConfig

    file = folder.parent / "config.yaml"
    if not file.is_file():
        fix = "give the output folder of `headwater meta train`, whose config.yaml names the base model"
        raise HeadwaterError(Problem("the generator alone does not say how examples are encoded", str(folder), fix))
    return load_config(file, overrides, model=MetaConfig)


def _load(config: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from headwater.base_model import load_to_run

    quiet_libraries()
    return load_to_run(config.model_name_or_path, config.device, **config.model.model_dump())


def _held_out(config: RunConfig, name: str | None, file: str | None) -> Task:
    """The task whose test rows choose among adapters: those of `file`, else the run's validation rows of the task."""
    from headwater.data.tasks import TaskSpec, load_tasks

    known = {spec.name: spec for spec in config.tasks}
    spec = known.get(name or "", TaskSpec(name=name or "new"))
    source = spec.validation if file is None else file
    if source is None:
        what = f"there are no rows to choose by: {'a new task' if name is None else name} has no validation rows"
        raise HeadwaterError(Problem(what, "--best-of", "give --validation FILE"))
    split = spec.validation_split if file is None else spec.test_split
    rows = {"train": None, "validation": None, "test": source, "test_split": split}
    (task,) = load_tasks([spec.model_copy(update=rows)], config.base_dir if file is None else Path.cwd())
    return task


def _vector_of(
    generator: AdapterGenerator,
    config: RunConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: str,
) -> Tensor:
    """The vector of a new task, under the settings that the known tasks' were made with."""
    from headwater.data.tasks import TaskSpec, load_tasks
    from headwater.generate.task_vector import task_vector

    (new,) = load_tasks([TaskSpec(name="new", test=examples)], Path.cwd())
    return task_vector(model, tokenizer, new.test, config.data, **generator.vector_settings)


def _run(file: str, overrides: Sequence[str]) -> MetaRun:
    from headwater.config import load_config
    from headwater.generate.spec import MetaConfig
    from headwater.generate.study import MetaRun

    quiet_libraries()
    config = load_config(file, overrides, model=MetaConfig)
    return MetaRun(cast(MetaConfig, config), out_console())
