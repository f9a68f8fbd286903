"""One training run, from its config to its folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import TrainerCallback, set_seed

from .. import __version__
from ..analysis.routing import head_similarity, routing_by_task
from ..base_model import load_base_model
from ..data.encode import Encoded, encode_rows
from ..data.mixture import MixtureSpec
from ..data.tasks import Task, load_tasks
from ..errors import HeadwaterError, Problem
from ..evaluation.forward import max_positions, pad_id
from ..evaluation.scores import TaskScore, mean_score
from ..files import replace_folder, write_json, write_text
from ..marked_yaml import read_document
from ..tuner import align
from .adapter import add_adapter
from .arguments import HeadwaterArguments
from .folder import check_folder, checkpoint_to_resume, clear_folder, is_of, lock_folder
from .history import History, HistoryCallback
from .interrupt import SaveOnInterrupt
from .method_callback import check_steps, method_layers
from .origin import run_file
from .progress import ProgressDisplay
from .resume import check_checkpoint, digest, digests
from .scorer import NotTwiceAtTheEnd, Scorer, changes_nothing
from .trainer import HeadwaterTrainer
from .write_errors import explained_writes

if TYPE_CHECKING:
    from ..config import RunConfig


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Args:
        output_dir: the run folder.
        results: the content of `results.json`.
        before, after: task name -> score on all test rows, before and after training. A resumed run reads `before` from
            the history, without the values of single rows.
    """

    output_dir: Path
    results: dict[str, Any]
    before: dict[str, TaskScore]
    after: dict[str, TaskScore]

    @property
    def adapter_dir(self) -> Path:
        """The trained adapter, in PEFT's format."""
        return self.output_dir / "adapter"


def train(
    config: RunConfig, *, console: Console | None = None, base_scores: Mapping[str, TaskScore] | None = None
) -> RunResult:
    """Loads a base model and its tasks, scores it, trains an adapter, scores again, and writes the run folder.

    The folder holds `adapter/`, `config.yaml`, `results.json`, `history.jsonl`, `analysis.json`, `report.html` and the
    checkpoints; each file is written under a temporary name and then renamed. Started by torchrun or accelerate, every
    rank calls it; the first one writes.

    Args:
        config: the run.
        console: where progress is shown; standard output by default.
        base_scores: the base model's scores on these tasks, from an earlier run. They are taken for those before
            training where the fresh adapter is found to change nothing, which saves that scoring.

    Raises:
        HeadwaterError: whatever is wrong with the config, the data or the model; a folder that holds a run already, or
            that cannot be written; a checkpoint that was trained with other things; a loss that is not finite.
        KeyboardInterrupt: on Ctrl-C; during training a checkpoint of the current step is saved first.
    """
    with explained_writes(Path(config.output_dir)), ExitStack() as held:
        return _train(config, console, base_scores, held)


class _Start(TrainerCallback):
    """Begins the run folder, once: what an earlier run left there is replaced, or, where that run is resumed, kept.

    A resumed run's files change only when training begins, for by then its checkpoint is loaded. Until `held` is left,
    no other process can begin the folder.
    """

    def __init__(
        self,
        config: RunConfig,
        args: HeadwaterArguments,
        resume: Path | None,
        history: History,
        rows: Mapping[str, str],
        held: ExitStack,
    ):
        self.config, self.args, self.resume, self.held = config, args, resume, held
        self.history, self.rows = history, rows
        self.done = args.process_index != 0

    def now(self) -> None:
        if self.done:
            return
        self.done = True
        from ..config import dump_config

        output = Path(self.args.output_dir)
        self.held.enter_context(lock_folder(output))
        # Another process may have begun and ended a run here since the first look.
        check_folder(output, resume=self.resume, overwrite=self.args.overwrite_output_dir)
        clear_folder(output, resume=self.resume, overwrite=self.args.overwrite_output_dir)
        write_text(output / "config.yaml", dump_config(self.config))
        self.history.start(self.resume if is_of(self.resume, output) else None, self.rows)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now()


def _train(
    config: RunConfig, console: Console | None, base_scores: Mapping[str, TaskScore] | None, held: ExitStack
) -> RunResult:
    args = training_arguments(config)
    output = Path(args.output_dir)
    resume = checkpoint_to_resume(args)
    check_folder(output, resume=resume, overwrite=args.overwrite_output_dir)
    check_continued_tasks(config)
    tasks = load_tasks(config.tasks, config.base_dir)
    _settle_best(args, config.training, tasks)
    model, tokenizer = load_base_model(config.model_name_or_path, **config.model.model_dump())
    limit = max_positions(model)
    encoded = {task.name: encode_rows(task.train, tokenizer, config.data, task.index, limit)[0] for task in tasks}
    mixture = mixture_of(config, args.per_device_train_batch_size)
    set_seed(config.seed)
    adapted = add_adapter(model, config.method)
    if config.align is not None:
        align(adapted, config.align)

    first = args.process_index == 0
    console = (console or Console()) if first else Console(quiet=True)
    history = History(output / "history.jsonl")
    display, interrupt = ProgressDisplay(console), SaveOnInterrupt()
    scorer = Scorer(tokenizer, tasks, config.evaluation, config.data, history if first else None, display)
    scorer.check(adapted, during=args.eval_strategy != "no")
    try:
        trainer = HeadwaterTrainer(
            adapted,
            args,
            train=encoded,
            pad_token_id=pad_id(tokenizer),
            mixture=mixture,
            weights={task.name: task.weight for task in tasks},
            digests={task.name: digest(task.train) for task in tasks},
            evaluator=scorer.during,
            callbacks=[HistoryCallback(history), NotTwiceAtTheEnd(), interrupt, display],
        )
        trainer.total_steps()  # makes the loader, which refuses some settings, too
    except HeadwaterError:
        raise
    except (ValueError, ImportError, OSError) as error:  # what the settings want is not there
        raise HeadwaterError(Problem(str(error), "training")) from error
    if resume is not None:
        check_checkpoint(trainer, resume)
    trainer.check_optimizer()
    start = _Start(config, args, resume, history, scorer.rows, held)
    trainer.add_callback(start)
    goes_on = is_of(resume, output)
    if not goes_on:
        check_steps(method_layers(adapted), trainer.total_steps())
        start.now()
    _say_what_is_trained(console, config, tasks, encoded, trainer)
    try:
        before = history.scores(0, scorer.rows) if goes_on else {}
        if not before and base_scores and changes_nothing(trainer.model, encoded, pad_id(tokenizer)):
            before = scorer.known(base_scores, 0)
        before = before or scorer.all_rows(trainer.model, 0)
        cuda = args.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(args.device)
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            start.now()  # a checkpoint that has all steps is not trained further
        finally:
            interrupt.release()
        peak = torch.cuda.max_memory_allocated(args.device) if cuda else None
        steps = trainer.state.global_step
        # bf16 and fp16 training wrap the model's forward; what is scored is the model as it is saved.
        adapted = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        after = scorer.all_rows(adapted, steps)
    finally:
        display.close()
    results = _results(config, tasks, trainer, before, after, peak)
    temporary = output / ".adapter"
    try:
        trainer.save_model(str(temporary))  # every rank: weights that are sharded are gathered
        if first:
            (temporary / "training_args.bin").unlink(missing_ok=True)  # pickled, and said by config.yaml
            replace_folder(temporary, output / "adapter")
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
    if first:
        routing = routing_by_task(adapted, tokenizer, tasks, config.data)
        write_json(output / "analysis.json", {"head_similarity": head_similarity(adapted), **routing})
        write_json(output / "results.json", results)
        from ..report import write_report

        write_report(output)
    return RunResult(output, results, before, after)


def require_one_process(command: str) -> None:
    """Raises HeadwaterError under torchrun, for commands that train one run after the other."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        fix = "start it without torchrun; it trains one run after the other, each on one device"
        raise HeadwaterError(Problem("runs in one process", command, fix))


def training_arguments(config: RunConfig) -> HeadwaterArguments:
    """The `training:` section as arguments, with the run's folder and seed.

    Raises:
        HeadwaterError: on keys that do not exist and settings that exclude each other.
    """
    keys = {key: value for key, value in config.training.items() if key not in ("output_dir", "seed")}
    try:
        return HeadwaterArguments(output_dir=config.output_dir, seed=config.seed, **keys)
    except HeadwaterError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise HeadwaterError(Problem(str(error), "training")) from error


def check_continued_tasks(config: RunConfig) -> None:
    """Where a run goes on from the adapter of another run, and by task ids: that its first tasks are that one's.

    Raises:
        HeadwaterError: if they are not, as their ids would mean other tasks; or if that run's config does not say.
    """
    continued = config.method.get("continue_from")
    if not continued or "num_tasks" not in config.method:
        return
    places = (Path(continued).parent, Path(continued).resolve().parent)  # a link may lead to it, or from it
    file = next((found for place in places if (found := run_file(place))), None)
    if file is None:
        return
    try:
        known = [str(task["name"]) for task in read_document(file).data["tasks"]]
    except (KeyError, TypeError):
        what, fix = f"{file} does not name the tasks of {continued}", "put them right, in the order of their ids"
        raise HeadwaterError(Problem(what, "continue_from", fix)) from None
    first = [task.name for task in config.tasks[: len(known)]]
    if first != known:
        what = f"the tasks of {continued} are {', '.join(known)}; those of this run begin with {', '.join(first)}"
        raise HeadwaterError(
            Problem(what, "continue_from", "list its tasks first, in their order; new ones after them")
        )


def mixture_of(config: RunConfig, batch_size: int) -> MixtureSpec:
    """The run's mixture; with an alignment loss, batches hold rows of all tasks unless the file says otherwise.

    Raises:
        HeadwaterError: if a balanced batch cannot hold two rows of two tasks, which the alignment loss needs, or cannot
            have the shares that the file asks for.
    """
    tasks, strategy = len(config.tasks), config.mixture.strategy
    if config.align is None or "batching" in config.mixture.model_fields_set:
        return config.mixture
    problems = []
    if strategy in ("temperature", "weights"):
        what = f"with align every batch has an equal share of each task, which strategy: {strategy} is not"
        fix = "leave it out, or set mixture.batching: mixed, where a batch may hold too few rows of a task to compare"
        problems.append(Problem(what, config.where("mixture", "strategy"), fix))
    least = min(2 * tasks, tasks + 2)
    if tasks < 2 or batch_size < least:
        what = "the alignment loss compares tasks within a batch, by at least two rows each"
        fix = "it needs two tasks or more" if tasks < 2 else f"use at least {least} rows, or leave align out"
        problems.append(Problem(what, "training.per_device_train_batch_size", fix))
    if problems:
        raise HeadwaterError(*problems)
    return config.mixture.model_copy(update={"batching": "balanced"})


def _settle_best(args: HeadwaterArguments, given: Mapping[str, Any], tasks: Sequence[Task]) -> None:
    """Which score the best model is chosen by: unless the file says, the mean, or the loss where there is no mean.

    Raises:
        HeadwaterError: if there is no such score.
    """
    if args.metric_for_best_model is None:
        return
    metrics = {task.name: task.metric for task in tasks if task.validation or task.test}
    losses = [metric == "loss" for metric in metrics.values()]
    known = [*metrics, *(["loss"] if any(losses) else []), *(["mean"] if not all(losses) else [])]
    usual = known[-1] if known and args.load_best_model_at_end else "loss"  # the plateau of a schedule is the loss's
    name = given.get("metric_for_best_model") or usual
    name = name if name in known else name.removeprefix("eval_")
    if name not in known:
        fix = f"one of: {', '.join(known)}" if known else "give the tasks validation or test rows"
        raise HeadwaterError(Problem(f"no score is called {name!r}", "training.metric_for_best_model", fix))
    # All scores are logged under `eval_`, which transformers adds to a name that does not begin so.
    args.metric_for_best_model = f"eval_{name}" if name.startswith("eval_") else name
    if given.get("greater_is_better") is None:  # transformers goes by the name's end, which for a task says nothing
        args.greater_is_better = metrics.get(name, name) != "loss"


def _say_what_is_trained(
    console: Console,
    config: RunConfig,
    tasks: list[Task],
    encoded: dict[str, list[Encoded]],
    trainer: HeadwaterTrainer,
) -> None:
    if config.recommended:
        fields = ", ".join(f"{key} {value}" for key, value in config.method.items() if key != "name")
        rate = f"learning rate {trainer.args.learning_rate:g}"
        text = f"no method is named, so the recommended one is trained: {config.method['name']}, {fields}; {rate}"
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    for task, share in zip(tasks, trainer.shares, strict=True):
        rows = f"{len(encoded[task.name]):,} training rows, {share:.1%} of draws; {len(task.test):,} test rows"
        console.print(f"task {task.name}: {rows}", highlight=False, soft_wrap=True, markup=False)
        for note in (*task.notes, *task.warnings):
            console.print(f"task {task.name}: {note}", highlight=False, soft_wrap=True, markup=False, style="dim")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _results(
    config: RunConfig,
    tasks: Sequence[Task],
    trainer: HeadwaterTrainer,
    before: dict[str, TaskScore],
    after: dict[str, TaskScore],
    peak_memory: int | None,
) -> dict[str, Any]:
    accounts, steps = trainer.accounts, trainer.state.global_step
    return {
        "schema": 1,
        "method": config.method["name"],
        "base_model": config.model_name_or_path,
        "seed": config.seed,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "steps": steps,
        "train_seconds": accounts.seconds,
        "tokens_per_second": accounts.tokens / max(accounts.seconds, 1e-9),
        "tasks": {
            name: {
                "metric": score.metric,
                "n": score.n,
                "before": before[name].value,
                "after": score.value,
            }
            for name, score in after.items()
        },
        "mean": {"before": mean_score(before.values()), "after": mean_score(after.values())},
        "extra": {
            "tokens": accounts.tokens,
            "device": _device_name(trainer.args.device),
            "peak_memory_bytes": peak_memory,  # of training, on a GPU; a CPU process does not tell
            "activation_bytes": trainer.activation_bytes,  # of the first batch; the same rows for every method
            "padding_share": 1 - accounts.tokens / max(accounts.slots, 1),
            "realised_shares": trainer.realised_shares(steps),
            "intervals": {
                name: {"before": before[name].detail.get("interval"), "after": score.detail.get("interval")}
                for name, score in after.items()
            },
            "majority": {name: score.majority for name, score in after.items()},
            "digests": digests(tasks),
            "versions": {"headwater": __version__, **{p: version(p) for p in ("torch", "transformers", "peft")}},
        },
    }
