"""A comparison: every method with every seed, each an ordinary run in a folder of its own, and what they come to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich.console import Console

from headwater.base_model import load_to_run
from headwater.compare.plan import Plan, Planned
from headwater.compare.selection import best_rate, choosing_tasks, quality
from headwater.compare.summary import summarise
from headwater.data.tasks import Task, load_tasks
from headwater.errors import DivergedError, HeadwaterError, Problem
from headwater.evaluation.scores import TaskScore
from headwater.files import write_json
from headwater.marked_yaml import parse_document, read_document
from headwater.report import PAGE, write_comparison_report, write_report
from headwater.training.folder import ELSEWHERE, check_writable, held_in, last_checkpoint, make_folder, named
from headwater.training.history import History
from headwater.training.memory import free_memory
from headwater.training.progress import ProgressDisplay, duration
from headwater.training.resume import digest, digests
from headwater.training.run import require_one_process, train, training_arguments
from headwater.training.scorer import Scorer

if TYPE_CHECKING:
    from headwater.config import RunConfig

CHOOSING = "learning-rate"
"""The folder of the runs that choose learning rates."""
LOCKS = ".locks"
"""The folder of files that say which runs a process is at."""
DIVERGED = "diverged.json"
"""In the place of a run's `results.json`: it tried a learning rate, and that one was too high."""
POLL = 1.0  # seconds between looks at the runs of other processes
_NOT_SETTINGS = {("output_dir",), ("training", "resume_from_checkpoint"), ("training", "overwrite_output_dir")}


@dataclass(frozen=True)
class Job:
    """One run to do: whose it is, its config, whose `output_dir` is its folder, and whether it only tries a learning
    rate, so that diverging is a result as well."""

    name: str
    config: RunConfig
    tries: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def finished(self) -> bool:
        return self.diverged or (self.folder / "results.json").is_file()

    @property
    def diverged(self) -> bool:
        return self.tries and (self.folder / DIVERGED).is_file()

    def results(self) -> dict[str, Any]:
        name = DIVERGED if self.diverged else "results.json"
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def compare(plan: Plan, *, console: Console | None = None) -> dict[str, Any]:
    """Trains every method with every seed, and writes `comparison.json`, a plot and a report to the `output_dir`.

    Runs that are finished are kept; one that is not goes on from its last checkpoint. So after an interruption of any
    kind the same call goes on, and ends as if it had never stopped. Several processes may make the same call at once:
    they share the runs, and each returns when all are done.

    Args:
        plan: from `make_plan`.
        console: where progress is shown; standard output by default.

    Returns:
        The content of `comparison.json`.

    Raises:
        HeadwaterError: if a run that is kept was made with other settings or rows; and all that
            `training.train` raises.
        KeyboardInterrupt: on Ctrl-C; the run under way has then saved a checkpoint.
    """
    require_one_process("headwater compare")
    console = console or Console()
    output = Path(plan.config.output_dir)
    try:
        check_writable(output)
        make_folder(output)
    except HeadwaterError as error:
        raise plan.config.placed(error) from None
    if others := [path for path in held_in(output) if path.name != "comparison.json"]:
        what = f"{output} holds a run of another command ({named(others, output)})"
        raise HeadwaterError(Problem(what, plan.config.where("output_dir"), ELSEWHERE))
    (output / LOCKS).mkdir(exist_ok=True)
    bench = _Bench(console)
    planned, chosen = _with_learning_rates(plan, output, bench)
    spec = plan.spec
    jobs = {
        (p.label, seed): Job(f"{p.label}, seed {seed}", p.run(seed, output / p.label / f"seed-{seed}"))
        for seed in spec.seeds  # seed by seed, so that what an interrupted comparison has is paired
        for p in planned
    }
    found = bench.run(list(jobs.values()), plan.config, output)
    results = {key: _labelled(found[job.name], key[0], job.folder, output) for key, job in jobs.items()}
    by_method = {p.label: [results[p.label, seed] for seed in spec.seeds] for p in planned}
    content = {
        "schema": 1,
        "runs": [run for runs in by_method.values() for run in runs],
        "summary": summarise(by_method),
        "extra": {
            "seeds": spec.seeds,
            "match": spec.match,
            "budget": plan.budget,
            "methods": [_described(plan, p) for p in planned],
            "learning_rate": chosen,
        },
    }
    with FileLock(output / LOCKS / "report"):  # all processes that shared the runs end with it
        if left_out := _left_out(output, by_method):
            bench.say(
                f"left out of comparison.json, as they were not asked for: {', '.join(left_out)}; their runs stay"
            )
        write_json(output / "comparison.json", content)
        write_comparison_report(output)
    return content


def _left_out(output: Path, labels: Iterable[str]) -> list[str]:
    """The methods that the folder's comparison has, and the one to be written has not."""
    path = output / "comparison.json"
    if not path.is_file():
        return []
    had = [entry["method"] for entry in json.loads(path.read_text(encoding="utf-8"))["summary"]]
    return [label for label in had if label not in labels]


def _with_learning_rates(plan: Plan, output: Path, bench: _Bench) -> tuple[list[Planned], dict[str, Any]]:
    """The methods with the learning rates that did best on validation rows, and how each was chosen."""
    asked = {p.label: p for p in plan.methods if p.learning_rates}
    if not asked:
        return plan.methods, {}
    from headwater.config import changed

    folder, seed = output / CHOOSING, plan.spec.selection_seed
    tasks = choosing_tasks(plan.config, folder / "tasks", [p.config.method for p in asked.values()])
    base = changed(plan.config, {"tasks": tasks, "compare": None}, {})
    jobs: dict[tuple[str, float], Job] = {}
    trained: dict[str, list[str]] = {}
    for label, p in asked.items():
        trained[label] = [task.name for task in p.config.tasks if task.train]
        own = [{**t, "train": t.get("train") if t["name"] in trained[label] else None} for t in tasks]
        config = changed(p.config, {"tasks": own}, {})
        for rate in p.learning_rates:
            run = dataclasses.replace(p, config=config).with_learning_rate(rate).run(seed, folder / label / f"{rate:g}")
            jobs[label, rate] = Job(f"{label}, learning rate {rate:g}", run, tries=True)
    found = bench.run(list(jobs.values()), base, folder)
    chosen: dict[str, Any] = {}
    for label, p in asked.items():
        scores = {rate: quality(found[jobs[label, rate].name], trained[label]) for rate in p.learning_rates}
        if all(score is None for score in scores.values()):
            what = f"the runs of {label} diverged at every learning rate that was tried"
            raise HeadwaterError(Problem(what, plan.config.where("compare", "learning_rate"), "add a lower one"))
        best, said = best_rate(scores)
        chosen[label] = {"seed": seed, "scores": {f"{rate:g}": s for rate, s in scores.items()}, "chosen": best}
        bench.say(f"{label}: learning rate {best:g}{said}")
    replaced = {label: p.with_learning_rate(chosen[label]["chosen"]) for label, p in asked.items()}
    return [replaced.get(p.label, p) for p in plan.methods], chosen


class _Bench:
    """Runs jobs one after the other, but those that another process is at, and says how far the whole is."""

    def __init__(self, console: Console):
        self.console = console
        self.seconds: list[float] = []  # of the runs done here, evaluations included

    def say(self, text: str) -> None:
        self.console.print(text, style="bold", highlight=False, soft_wrap=True, markup=False)

    def run(self, jobs: Sequence[Job], base: RunConfig, folder: Path) -> dict[str, dict[str, Any]]:
        """The results of all jobs, by name; `base` has their base model, tasks and evaluation.

        Raises:
            HeadwaterError: before the first run, for every kept run that was made with other settings or rows; in the
                end, for those that another process has made so meanwhile, or whose data have changed since.
        """
        _refuse_other_runs(jobs, base)
        left = [job for job in jobs if not job.finished]
        if len(left) < len(jobs):
            self.say(f"{len(jobs) - len(left)} of {len(jobs)} runs are finished and kept")
        if left:
            self._share(left, len(jobs), base, folder)
            _refuse_other_runs(jobs, base)
        for job in jobs:  # a run's report is written last: a kept run that was killed there has none
            if not job.diverged and not (job.folder / PAGE).is_file():
                write_report(job.folder)
        return {job.name: job.results() for job in jobs}

    def _share(self, left: Sequence[Job], count: int, base: RunConfig, folder: Path) -> None:
        """Does what is left of `count` jobs, and waits for what other processes do of it."""
        (folder / LOCKS).mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCKS / "before"):  # one process finds them, the others read them
            scores = _base_scores(base, folder, self.console)
        free_memory()
        waits = False
        while left := [job for job in left if not job.finished]:
            place = f"run {count - len(left) + 1} of {count}"
            if any(self._take(job, folder, scores, f"{place}: {job.name}{self._time_left(len(left))}") for job in left):
                waits = False
                continue
            if not waits:
                self.say(f"waiting for {len(left)} runs that other processes are at")
            waits = True
            time.sleep(POLL)

    def _take(self, job: Job, folder: Path, base_scores: Mapping[str, TaskScore], title: str) -> bool:
        """Does the job, if no other process is at it or has done it."""
        lock = "-".join(job.folder.relative_to(folder).parts)
        try:
            held = FileLock(folder / LOCKS / lock).acquire(timeout=0)
        except Timeout:
            return False
        with held:
            if job.finished:
                return False
            self.say(title)
            started = time.perf_counter()
            _run(job, base_scores, self.console)
            self.seconds.append(time.perf_counter() - started)
            return True

    def _time_left(self, runs: int) -> str:
        if not self.seconds:
            return ""
        return f", about {duration(sum(self.seconds) / len(self.seconds) * runs)} left in all"


def _run(job: Job, base_scores: Mapping[str, TaskScore], console: Console) -> None:
    """Trains a job's run, from its last checkpoint if it has one.

    The base model is loaded anew: that takes a second, sharing it would not make runs faster by more than that, and
    every run is the one that `headwater train` would make of its config.
    """
    # Of weights alone no run goes on as if it had not been stopped.
    checkpoint = None if job.config.training.get("save_only_model") else last_checkpoint(job.folder)
    # Without a checkpoint, what a killed run left there is of no use.
    key, value = ("resume_from_checkpoint", str(checkpoint)) if checkpoint else ("overwrite_output_dir", True)
    config = job.config.model_copy(update={"training": {**job.config.training, key: value}})
    try:
        train(config, console=console, base_scores=base_scores)
    except HeadwaterError as error:
        if not (job.tries and isinstance(error, DivergedError)):
            named = [dataclasses.replace(p, what=f"{job.name}: {p.what}") for p in config.placed(error).problems]
            raise HeadwaterError(*named) from error.__cause__
        what = error.problems[0].what
        console.print(f"it diverged: {what}", highlight=False, soft_wrap=True, markup=False)
        write_json(job.folder / DIVERGED, {"diverged": what, "extra": {"digests": digests(_tasks(config))}})
    free_memory()


def _base_scores(config: RunConfig, folder: Path, console: Console) -> dict[str, TaskScore]:
    """The base model's scores on all test rows, found once and kept in `folder` for as long as nothing they depend on
    changes."""
    about = _settings(config)
    for task in about["tasks"]:
        for key in ("train", "train_split", "validation", "validation_split", "weight", "max_train_rows"):
            task.pop(key, None)
    known = {key: about[key] for key in ("model_name_or_path", "model", "tasks", "data", "evaluation")}
    tasks = _tasks(config)
    known["rows"] = {task.name: digest(task.test) for task in tasks if task.test}
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
    history = History(folder / f"before-{name}.jsonl")
    if scores := history.scores(0, known["rows"]):
        return scores
    history.start()  # a process that stopped while it wrote may have left half a line
    device = training_arguments(config).device
    model, tokenizer = load_to_run(config.model_name_or_path, device, **config.model.model_dump())
    console.print("scoring the base model, once for all runs", highlight=False)
    display = ProgressDisplay(console)
    try:
        return Scorer(tokenizer, tasks, config.evaluation, config.data, history, display).all_rows(model, 0)
    finally:
        display.close()


def _tasks(config: RunConfig) -> list[Task]:
    try:
        return load_tasks(config.tasks, config.base_dir)
    except HeadwaterError as error:
        raise config.placed(error) from error


def _settings(config: RunConfig) -> dict[str, Any]:
    from headwater.config import dump_config

    return parse_document(dump_config(config), "").data


def _refuse_other_runs(jobs: Sequence[Job], base: RunConfig) -> None:
    """Raises:
    HeadwaterError: for kept runs that were made with other settings or rows; one problem for the same differences.
    """
    settings = {job.name: f"other settings: {changes}" for job in jobs if (changes := _changes(job))}
    others = settings or _other_rows(jobs, base)  # other settings may be why rows are others
    folders: dict[str, list[Path]] = {}
    for job in jobs:
        if job.name in others:
            folders.setdefault(others[job.name], []).append(job.folder)
    problems = [
        Problem(
            f"the run there has {what}",
            f"{first}" + (f" and {len(more)} more" if more else ""),
            "choose another output_dir, take the change back, or delete such a folder to have its run made again",
        )
        for what, (first, *more) in folders.items()
    ]
    if problems:
        raise HeadwaterError(*problems)


def _other_rows(jobs: Sequence[Job], base: RunConfig) -> dict[str, str]:
    """Of each finished job whose rows have changed since, which."""
    kept = {job.name: job.results()["extra"]["digests"] for job in jobs if job.finished}
    now = digests(_tasks(base)) if kept else {}
    changed = {
        name: [
            f"{split} rows of {task}"
            for task, splits in then.items()
            for split, was in splits.items()
            if was != now.get(task, {}).get(split)
        ]
        for name, then in kept.items()
    }
    return {
        name: f"other data: the {', the '.join(parts)} have changed since" for name, parts in changed.items() if parts
    }


def _changes(job: Job) -> str:
    path = job.folder / "config.yaml"
    if not path.is_file() or not (job.finished or last_checkpoint(job.folder)):
        return ""
    kept, asked = _flat(read_document(path).data), _flat(_settings(job.config))
    keys = [k for k in dict.fromkeys([*kept, *asked]) if k not in _NOT_SETTINGS and kept.get(k) != asked.get(k)]
    changes = [f"{'.'.join(map(str, key))} was {kept.get(key)!r}, now {asked.get(key)!r}" for key in keys]
    more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
    return "; ".join(changes[:4]) + more


def _flat(value: Any, path: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], Any]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    parts = [_flat(item, (*path, key)) for key, item in inner]
    return {key: item for part in parts for key, item in part.items()} if parts else {path: value}


def _labelled(results: dict[str, Any], label: str, folder: Path, output: Path) -> dict[str, Any]:
    about = {"label": label, "folder": folder.relative_to(output).as_posix()}
    return {**results, "extra": {**about, **results["extra"]}}


def _described(plan: Plan, planned: Planned) -> dict[str, Any]:
    method, training = planned.config.method, training_arguments(planned.config)
    return {
        "label": planned.label,
        "method": method,
        "solved": planned.field or None,
        "parameters": planned.parameters,
        "deviation": plan.deviation(planned),
        "learning_rate": training.learning_rate,
        "align": planned.config.align and planned.config.align.model_dump(),
    }
