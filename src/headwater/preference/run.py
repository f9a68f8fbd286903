"""`headwater prefer`: every strategy with every seed, from one file to one folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import TrainerCallback, TrainerState, set_seed

from headwater import __version__
from headwater.base_model import load_base_model, load_to_run
from headwater.config import RunConfig, dump_config
from headwater.data.tasks import Task, load_tasks, overlap
from headwater.errors import HeadwaterError, Problem
from headwater.evaluation.scores import TaskScore, mean_score
from headwater.evaluation.scoring import score_tasks
from headwater.files import whole_folder, write_json, write_text
from headwater.preference.bandits import Exp3, LinUCB, Picker, RoundRobin, Single
from headwater.preference.folder import FILE, check_folder
from headwater.preference.lengths import check_lengths
from headwater.preference.results import summary
from headwater.preference.sources import Source, make_sources
from headwater.preference.spec import BEST_SINGLE, SINGLE, PreferConfig, PreferenceSpec
from headwater.report.rounds import run_folder
from headwater.training.adapter import add_adapter
from headwater.training.arguments import HeadwaterArguments, total_steps
from headwater.training.folder import STATE, clear_folder, last_checkpoint, lock_folder
from headwater.training.interrupt import SaveOnInterrupt
from headwater.training.memory import free_memory
from headwater.training.progress import duration
from headwater.training.resume import check_files, digests
from headwater.training.run import require_one_process
from headwater.training.write_errors import explained_writes

RESULT = "result.json"


@dataclass(frozen=True)
class _Part:
    """One strategy with one seed, and its folder."""

    strategy: str
    seed: int
    folder: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """What it came to, once it is done."""
        path = self.folder / RESULT
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def checkpoint(self) -> Path | None:
        """Its last checkpoint that is whole."""
        return last_checkpoint(self.folder)


def _part(output: Path, strategy: str, seed: int) -> _Part:
    return _Part(strategy, seed, run_folder(output, strategy, seed))


def prefer(config: PreferConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Trains one adapter for each strategy and seed, scores them on the test rows, and writes the folder.

    `output_dir` then holds `results.json`, `report.html`, `adapter/` (of the first strategy and seed), `config.yaml`,
    `prefer.yaml`, and a folder for each run. With `training.resume_from_checkpoint: true` what is finished stays, and
    the run that was stopped goes on from its last checkpoint.

    Args:
        config: the file.
        console: where progress is shown; standard output by default.

    Returns:
        The content of `results.json`.

    Raises:
        HeadwaterError: whatever is wrong with the file, the data, the sources or the folder; test prompts that are also
            trained on; a run whose sources have all failed, or whose loss is not finite; a folder that cannot be
            written; TRL is not installed.
        KeyboardInterrupt: on Ctrl-C; a checkpoint is saved first.
    """
    require_one_process("headwater prefer")
    _check_trl()
    writes = explained_writes(Path(config.output_dir), "go on with it (training.resume_from_checkpoint: true)")
    with ExitStack() as held, writes:
        return _prefer(config, console or Console(), held)


def _prefer(config: PreferConfig, console: Console, held: ExitStack) -> dict[str, Any]:
    config.settle_models()
    output = Path(config.output_dir)
    parts = [_part(output, strategy, seed) for strategy in config.preference.strategies for seed in config.seeds]
    resume = check_folder(config, output)
    device = arguments(config, config.seed, output).device
    tasks = load_tasks(config.tasks, config.base_dir)
    _refuse_contamination(tasks)
    # Sources and the base model's scores take what training will take.
    model, tokenizer = load_to_run(config.model_name_or_path, device, **config.model.model_dump())
    check_lengths(model, tokenizer, tasks, config)
    sources = make_sources(config.preference.sources, config.data, config.base_dir, model.device)

    held.enter_context(lock_folder(output))
    resume = check_folder(config, output)  # another process may have ended a run here since the first look
    if not resume:
        clear_folder(output, resume=None, overwrite=bool(config.training.get("overwrite_output_dir")))
        write_text(output / FILE, dump_config(config))
        plain = RunConfig.model_validate(config.model_dump(include=set(RunConfig.model_fields), exclude_unset=True))
        plain._base_dir = config.base_dir
        write_text(output / "config.yaml", dump_config(plain))
    base = _base_scores(output, model, tokenizer, tasks, config, resume)
    del model
    free_memory()

    states: dict[tuple[int, int], np.ndarray] = {}

    def run(part: _Part, label: str) -> None:
        _run(part, config, tasks, sources, states, console, label)

    for number, part in enumerate(parts, start=1):
        label = f"[{number}/{len(parts)}] {part.strategy}, seed {part.seed}"
        if part.result is None:
            if part.strategy == BEST_SINGLE:
                _run_best_single(part, output, sources, run, label)
            else:
                run(part, label)
        mean = (part.result or {})["mean"]
        console.print(f"{label}: held-out score {mean:.3f}", highlight=False, soft_wrap=True, markup=False)
    results = summary(config, base, {(p.strategy, p.seed): p.result or {} for p in parts})
    _copy_adapter(parts[0].folder, output)
    write_json(output / "results.json", results)
    from headwater.report.preference import write_preference_report

    write_preference_report(output)
    return results


def _check_trl() -> None:
    try:
        import trl  # noqa: F401
    except ImportError as error:
        what = "preference training needs TRL"
        raise HeadwaterError(Problem(what, "", "pip install 'headwater[trl]'")) from error


def _refuse_contamination(tasks: Sequence[Task]) -> None:
    problems = [
        Problem(
            f"{count:,} of {len(task.test):,} test rows of {task.name} ask what is also trained or validated on",
            "tasks",
            "take them out of one of the files: the scores would not be held out",
        )
        for task in tasks
        if (count := overlap(task))
    ]
    problems += [
        Problem(f"no task has {split} rows", "tasks")
        for split in ("train", "test")
        if not any(getattr(task, split) for task in tasks)
    ]
    if problems:
        raise HeadwaterError(*problems)


def arguments(config: PreferConfig, seed: int, folder: Path) -> Any:
    """TRL's settings: those of the `training` section on headwater's defaults.

    Raises:
        HeadwaterError: settings that exclude each other.
    """
    from trl import DPOConfig

    from headwater.preference.trainer import LOSSES

    known = {field.name for field in dataclasses.fields(DPOConfig) if field.init}
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(HeadwaterArguments)
        if field.init and field.name in known and field.default is not dataclasses.MISSING
    }
    given = {key: value for key, value in config.training.items() if key in known}
    fixed = {
        "output_dir": str(folder),
        "seed": seed,
        "resume_from_checkpoint": None,
        "remove_unused_columns": False,
        "loss_type": LOSSES[config.preference.objective],
        "beta": config.preference.beta,
        "max_length": config.data.max_length,
        "disable_tqdm": True,
    }
    try:
        return DPOConfig(**{**defaults, **given, **fixed})
    except (TypeError, ValueError, ImportError) as error:
        raise HeadwaterError(Problem(str(error), "training")) from error


def make_picker(strategy: str, names: Sequence[str], spec: PreferenceSpec, seed: int) -> Picker:
    """What decides in a strategy; for `ensemble`, which asks all sources, one that only keeps account of them."""
    if strategy.startswith(SINGLE):
        return Single(names, strategy.removeprefix(SINGLE), seed)
    if strategy == "linucb":
        return LinUCB(names, spec.context_dim + 1, spec.alpha, seed)  # the directions and a constant
    if strategy == "exp3":
        return Exp3(names, spec.gamma, seed)
    return RoundRobin(names, seed) if strategy == "round_robin" else Picker(names, seed)


def _scores(scores: Mapping[str, TaskScore]) -> dict[str, Any]:
    return {
        name: {"metric": score.metric, "n": score.n, "value": score.value, "interval": score.detail.get("interval")}
        for name, score in scores.items()
    }


def _base_scores(
    output: Path, model: Any, tokenizer: Any, tasks: list[Task], config: PreferConfig, resume: bool
) -> dict[str, Any]:
    """Before training; the adapters start where the base model is.

    Raises:
        HeadwaterError: the folder's are of other rows.
    """
    path = output / "base.json"
    rows = digests(tasks)
    if not (resume and path.is_file()):
        scores = score_tasks(model, tokenizer, tasks, config.evaluation, config.data)
        write_json(path, {"tasks": _scores(scores), "mean": mean_score(scores.values()), "rows": rows})
    found = json.loads(path.read_text(encoding="utf-8"))
    what = "are not those that the run began with"
    fix = "bring them back, or start anew (training.overwrite_output_dir: true)"
    then = found["rows"]
    if other := [Problem(f"the rows of {name} {what}", "tasks", fix) for name in rows if then.get(name) != rows[name]]:
        raise HeadwaterError(*other)
    return found


def _run(
    part: _Part,
    config: PreferConfig,
    tasks: list[Task],
    sources: list[Source],
    states: dict[tuple[int, int], np.ndarray],
    console: Console,
    label: str,
) -> None:
    from headwater.preference.trainer import STATE as BANDIT
    from headwater.preference.trainer import TENSORS, PreferenceTrainer

    model, tokenizer = load_base_model(config.model_name_or_path, **config.model.model_dump())
    set_seed(part.seed)
    interrupt = SaveOnInterrupt()
    trainer = PreferenceTrainer(
        add_adapter(model, config.method),  # type: ignore[arg-type]
        arguments(config, part.seed, part.folder),
        tasks=tasks,
        tokenizer=tokenizer,
        sources=sources,
        picker=make_picker(part.strategy, [source.name for source in sources], config.preference, part.seed),
        ensemble=part.strategy == "ensemble",
        spec=config.preference,
        data=config.data,
        mixture=config.mixture,
        states=states,
        callbacks=[interrupt],
    )
    trainer.add_callback(_Lines(trainer, console, label))
    checkpoint = part.checkpoint
    started = time.perf_counter()
    try:
        complete = checkpoint is not None and _is_complete(checkpoint, trainer)
        if checkpoint is not None:
            check_files(trainer, checkpoint, complete=complete, also=(BANDIT, TENSORS))
        if complete:
            trainer._load_from_checkpoint(str(checkpoint))  # Trainer would add one more step
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        interrupt.release()
    scores = score_tasks(trainer.model, tokenizer, tasks, config.evaluation, config.data)
    mean = mean_score(scores.values())
    if mean is None:
        raise HeadwaterError(
            Problem("no task has a score between 0 and 1", "tasks", "give one a metric other than loss")
        )
    chosen_by = {}
    if part.strategy.startswith(SINGLE) and BEST_SINGLE in config.preference.strategies:
        held = score_tasks(trainer.model, tokenizer, tasks, config.evaluation, config.data, split="validation")
        chosen_by = {"validation": mean_score(held.values())}
    with whole_folder(part.folder / "adapter") as work:
        trainer.model.save_pretrained(str(work), selected_adapters=["default"])
    write_json(
        part.folder / RESULT,
        {
            "mean": mean,
            "tasks": _scores(scores),
            **chosen_by,
            "dropped": trainer.picker.dropped,
            "seconds": time.perf_counter() - started,
            "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "rounds": [dataclasses.asdict(r) for r in trainer.rounds],
            "headwater": __version__,
        },
    )
    del trainer, model
    free_memory()


def _run_best_single(
    part: _Part, output: Path, sources: list[Source], run: Callable[[_Part, str], None], label: str
) -> None:
    """Runs each source alone, unless that is done, and takes the run that scores best on the validation rows."""
    alone = [_part(output, f"{SINGLE}{source.name}", part.seed) for source in sources]
    for one in alone:
        if one.result is None:
            run(one, f"{label}, {one.strategy}")
    results = {one: one.result or {} for one in alone}
    best = max(alone, key=lambda one: results[one]["validation"])
    _copy_adapter(best.folder, part.folder)
    seconds = sum(result["seconds"] for result in results.values())
    write_json(
        part.folder / RESULT, {**results[best], "source": best.strategy.removeprefix(SINGLE), "seconds": seconds}
    )


def _copy_adapter(source: Path, target: Path) -> None:
    """Copies a run's adapter into another folder, whole or not at all."""
    with whole_folder(target / "adapter") as work:
        for file in (source / "adapter").iterdir():  # no copytree, whose error does not say that the disk is full
            shutil.copyfile(file, work / file.name)


def _is_complete(checkpoint: Path, trainer: Any) -> bool:
    steps = total_steps(trainer.args, len(trainer.get_train_dataloader()))
    return TrainerState.load_from_json(str(checkpoint / STATE)).global_step >= steps


class _Lines(TrainerCallback):
    """One line per log: how far the run is, what the last batches were, and the time left of this run."""

    def __init__(self, trainer: Any, console: Console, label: str):
        self.trainer, self.console, self.label = trainer, console, label
        self._shown = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = (time.monotonic(), state.global_step)
        self._shown = len(self.trainer.rounds)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        rounds = self.trainer.rounds[self._shown :]
        if not logs or "loss" not in logs or not rounds:
            return
        self._shown = len(self.trainer.rounds)
        per_step = (time.monotonic() - self._began[0]) / max(state.global_step - self._began[1], 1)
        left = duration(per_step * (state.max_steps - state.global_step))
        losses = [r.loss for r in rounds if r.loss is not None]
        loss = f"{sum(losses) / len(losses):.3f}" if losses else "none"
        picks = [f"{r.task}:{'+'.join(r.queried)}" for r in rounds]
        counted = ", ".join(f"{p} {picks.count(p)}x" for p in dict.fromkeys(picks))
        self.console.print(
            f"{self.label}  step {state.global_step}/{state.max_steps}  loss {loss}  "
            f"{sum(r.pairs for r in rounds)} pairs  {counted}  {left} left",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
