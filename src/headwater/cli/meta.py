"""`headwater meta collect | train | generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from headwater.cli.console import err_console, out_console, quiet_libraries, table
from headwater.errors import HeadwaterError, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from headwater.generate import AdapterGenerator
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
    from headwater.generate.report import KINDS, write_meta_report

    run = _run(file, overrides)
    results = run.train()
    scores = results["scores"]
    kinds = [kind for kind in KINDS if kind in next(iter(scores.values()))]
    rows = [[task, results["extra"]["n"][task], *(f"{by[kind]:.3f}" for kind in kinds)] for task, by in scores.items()]
    means = [f"{sum(by[kind] for by in scores.values()) / len(scores):.3f}" for kind in kinds]
    out_console().print(table(["task", "rows", *(KINDS[kind] for kind in kinds)], [*rows, ["mean", "", *means]]))
    out_console().print(f"report: {write_meta_report(run.folder, results)}", soft_wrap=True, highlight=False)


def generate(
    source: str, output: str, *, task: str | None, examples: str | None, seed: int | None, overrides: Sequence[str]
) -> None:
    """Write the adapter of a known task, or of a new one from examples, as a PEFT LoRA folder.

    Args:
        source: a generator's folder, or the output folder of `headwater meta train`.

    Raises:
        HeadwaterError: no generator, an unknown task, or examples that cannot be read.
    """
    from headwater.export import check_output
    from headwater.generate import AdapterGenerator, write_adapter

    if (task is None) == (examples is None):
        raise HeadwaterError(Problem("give either --task NAME or --examples FILE", "headwater meta generate"))
    folder, target = Path(source), Path(output)
    folder = folder / "generator" if (folder / "generator").is_dir() else folder
    check_output(target)
    generator = AdapterGenerator.load(folder)
    if task is not None:
        weights = generator.for_task(task, seed=seed)
    else:
        weights = generator.generate(_vector_of(generator, folder, str(examples), overrides), seed=seed)
    write_adapter(target, generator.layout, weights)
    err_console().print(f"wrote {output}", soft_wrap=True, highlight=False)


def _vector_of(generator: AdapterGenerator, folder: Path, examples: str, overrides: Sequence[str]) -> Tensor:
    """The vector of a new task, under the settings that the known tasks' were made with."""
    from headwater.base_model import load_to_run
    from headwater.config import load_config
    from headwater.data.tasks import TaskSpec, load_tasks
    from headwater.generate.spec import MetaConfig
    from headwater.generate.task_vector import task_vector

    quiet_libraries()
    file = folder.parent / "config.yaml"
    if not file.is_file():
        fix = "give the output folder of `headwater meta train`, whose config.yaml names the base model"
        raise HeadwaterError(Problem("the generator alone does not say how examples are encoded", str(folder), fix))
    config = load_config(file, overrides, model=MetaConfig)
    (new,) = load_tasks([TaskSpec(name="new", test=examples)], Path.cwd())
    model, tokenizer = load_to_run(config.model_name_or_path, config.device, **config.model.model_dump())
    return task_vector(model, tokenizer, new.test, config.data, **generator.vector_settings)


def _run(file: str, overrides: Sequence[str]) -> MetaRun:
    from headwater.config import load_config
    from headwater.generate.spec import MetaConfig
    from headwater.generate.study import MetaRun

    quiet_libraries()
    config = load_config(file, overrides, model=MetaConfig)
    return MetaRun(cast(MetaConfig, config), out_console())
