"""`headwater pool retrieve | tune-encoder | flow | hub | arrow | evaluate`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.cli.console import err_console, out_console, quiet_libraries, table
from headwater.cli.generate import prompt_texts
from headwater.errors import HeadwaterError, Problem
from headwater.files import check_file, write_json

if TYPE_CHECKING:
    from headwater.compose import AdapterPool
    from headwater.compose.retriever import Retriever
    from headwater.compose.scoring import Composition
    from headwater.config import RunConfig
    from headwater.data.encode import Encoded
    from headwater.data.tasks import Task
    from headwater.evaluation import TaskScore

SPLITS = ("test", "validation", "train")


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What to score: a file of tasks, the split, at most so many rows of each task, and where to write the scores."""

    tasks: str
    split: str = "test"
    max_rows: int | None = None
    output: str | None = None
    overrides: Sequence[str] = ()

    def read(self) -> tuple[RunConfig, list[Task]]:
        """The file's settings and tasks.

        Raises:
            HeadwaterError: for whatever is wrong with them; no task has rows in the split.
        """
        from headwater.config import TasksFile, load_config
        from headwater.data.tasks import load_tasks

        if self.split not in SPLITS:
            raise HeadwaterError(Problem(f"unknown split {self.split!r}", "--split", f"one of {', '.join(SPLITS)}"))
        if self.output is not None:
            check_file(self.output, "--scores")
        config = load_config(self.tasks, self.overrides, model=TasksFile)
        try:
            tasks = load_tasks(config.tasks, config.base_dir)
        except HeadwaterError as error:
            raise config.placed(error) from error
        if not any(getattr(task, self.split) for task in tasks):  # said here, before anything is loaded or trained
            raise HeadwaterError(Problem(f"no task has {self.split} rows", self.tasks, "give --split"))
        return config, tasks


def retrieve(
    folder: str, prompts: Sequence[str] | None, scoring: Scoring | None, *, top: int, encoder: str, as_json: bool
) -> None:
    """Show which adapters are found for prompts, or how often each task's rows find the adapter of its name.

    Raises:
        HeadwaterError: no pool, no prompts, blank ones, or an encoder that cannot be had.
    """
    from headwater.compose import AdapterPool
    from headwater.compose.scoring import ranks_of_own
    from headwater.evaluation import interval

    quiet_libraries()
    pool = AdapterPool(folder)
    if scoring is not None:
        _, tasks = scoring.read()
        ranks = ranks_of_own(_retriever(pool, encoder), tasks, scoring.split, scoring.max_rows)
        if not ranks:
            fix = "name tasks and adapters alike"
            what = f"no task with {scoring.split} rows has the name of an adapter with sample texts"
            raise HeadwaterError(Problem(what, scoring.tasks, fix))
        left = [task.name for task in tasks if task.name not in ranks]
        if left:
            _note(f"not counted, without {scoring.split} rows or an adapter of that name: {', '.join(left)}")
        rows: list[list[object]] = []
        record: dict[str, dict[str, Any]] = {}
        for name, places in [*ranks.items(), ("all", [place for part in ranks.values() for place in part])]:
            hits = {k: [float(place <= k) for place in places] for k in sorted({1, top})}
            record[name] = {"n": len(places), **{f"top-{k}": sum(v) / len(v) for k, v in hits.items()}}
            record[name]["intervals"] = {f"top-{k}": interval(v) for k, v in hits.items()}
            rows.append([name, len(places), *(_share(values, interval(values)) for values in hits.values())])
        columns = ["task", "rows", "found first", *([f"among the first {top}"] if top > 1 else [])]
        if as_json:
            print(json.dumps(record))
        else:
            out_console().print(table(columns, rows))
        return
    texts = prompt_texts(prompts)
    if not all(text.strip() for text in texts):
        raise HeadwaterError(Problem("the prompt is blank", "--prompt", "give a text"))
    for text, found in zip(texts, _retriever(pool, encoder).retrieve(texts, top), strict=True):
        if as_json:
            print(json.dumps({"prompt": text, "adapters": dict(found)}, ensure_ascii=False))
        else:
            print("  ".join(f"{name} {score:.3f}" for name, score in found), text, sep="  <-  ")


def tune_encoder(
    folder: str,
    output: str,
    names: Sequence[str],
    *,
    encoder: str,
    epochs: int,
    learning_rate: float,
    temperature: float,
    seed: int,
) -> None:
    """Fine-tune the sentence encoder on the pool's sample texts and write it.

    Raises:
        HeadwaterError: too few adapters with texts, settings out of range, or an encoder that cannot be had or written.
    """
    from headwater.compose import AdapterPool
    from headwater.compose.contrastive import ContrastiveSpec, fine_tune, usable_texts
    from headwater.compose.encoder import load_encoder
    from headwater.export import check_output, new_folder

    quiet_libraries()
    spec = ContrastiveSpec(epochs=epochs, learning_rate=learning_rate, temperature=temperature, seed=seed)
    pool = AdapterPool(folder)
    check_output(Path(output))
    pool.require(*names)
    chosen = {name: pool[name].samples for name in (names or pool.names)}
    used = usable_texts(chosen)
    model = load_encoder(encoder, progress=_note)
    with err_console().status("fine-tuning the encoder"):
        loss = fine_tune(model, chosen, spec)
    with new_folder(Path(output)) as work:
        model.save_pretrained(str(work))
    if left := [name for name in chosen if name not in used]:
        _note(f"without two different sample texts, and so not learnt from: {', '.join(left)}")
    texts = sum(map(len, used.values()))
    _say(f"{output}: fine-tuned on {texts} texts of {len(used)} adapters, mean loss {loss:.3f}")


def flow(
    folder: str,
    scoring: Scoring,
    output: str,
    names: Sequence[str],
    start: str | None,
    temperature: float,
    granularity: Any,
    spec: Any,
) -> None:
    """Train LoRA-Flow's gates on the tasks' training rows, write them, score them.

    Raises:
        HeadwaterError: for whatever is wrong with the pool, the tasks or the settings.
    """
    from headwater.compose.flow import FlowGate, train_gates
    from headwater.evaluation.forward import pad_id
    from headwater.export import check_output

    config, tasks, found = _compose(folder, scoring)
    check_output(Path(output))
    chosen = list(names) or found.pool.names
    found.pool.require(*chosen)
    gate = FlowGate(found.pooled, chosen, start, temperature, granularity)
    rows = _training_rows(tasks, found, config)
    with err_console().status("training gates") as status:
        losses = train_gates(
            gate,
            rows,
            pad_id(found.tokenizer),
            spec,
            progress=lambda step, steps, loss: status.update(f"step {step} of {steps}, loss {loss:.3f}"),
        )
    check_output(Path(output))  # another process may have been faster
    gate.save(Path(output), found.pool, training={**dataclasses.asdict(spec), "steps": len(losses), "losses": losses})
    size = sum(parameter.numel() for parameter in gate.parameters())
    used = min(spec.examples, len(rows))
    _say(f"{output}: {size:,} numbers in gates for {', '.join(chosen)}, trained on {used} rows in {len(losses)} steps")
    _score_and_show([Path(output)], found, tasks, config, scoring)


def hub(folder: str, scoring: Scoring, output: str, names: Sequence[str], spec: Any) -> None:
    """Search LoRAHub's weights on a few training rows, write the adapter, score it.

    Raises:
        HeadwaterError: for whatever is wrong with the pool, the tasks or the settings.
    """
    import warnings

    from headwater.compose.hub import search
    from headwater.evaluation.forward import pad_id
    from headwater.export import check_output

    config, tasks, found = _compose(folder, scoring)
    check_output(Path(output))
    chosen = list(names) or found.pool.names
    found.pool.require(*chosen)
    # scipy's words about a small budget, in names that are none of headwater's options
    warnings.filterwarnings("ignore", module=r"scipy\._lib\.pyprima")
    with err_console().status("searching weights") as status:
        result = search(
            found.pooled,
            chosen,
            _training_rows(tasks, found, config),
            pad_id(found.tokenizer),
            spec,
            progress=lambda done, budget, best: status.update(f"evaluation {done} of {budget}, best {best:.3f}"),
        )
    check_output(Path(output))  # another process may have been faster
    result.save(Path(output), found.pool, search=dataclasses.asdict(spec), tasks=[task.name for task in tasks])
    weights = ", ".join(f"{weight:.2f} {name}" for name, weight in result.weights.items())
    _say(f"{output}: {weights}; objective {result.objective:.3f}, optimiser {result.optimiser}")
    _score_and_show([Path(output)], found, tasks, config, scoring)


def arrow(
    folder: str, scoring: Scoring, output: str | None, names: Sequence[str], general: Sequence[str], spec: Any
) -> None:
    """Score Arrow's routing among adapters, and write it where asked to.

    Raises:
        HeadwaterError: for whatever is wrong with the pool, the tasks or the settings.
    """
    from headwater.compose.arrow import Arrow
    from headwater.evaluation import score_tasks
    from headwater.export import check_output

    config, tasks, found = _compose(folder, scoring)
    if output is not None:
        check_output(Path(output))
    found.pool.require(*names, *general)
    routing = Arrow(found.pooled, found.pool, list(names) or None, spec, general)
    if output is not None:
        routing.save(Path(output))
        _say(f"{output}: prototypes of {', '.join(routing.names)} at {len(routing.prototypes)} layers")
    with err_console().status("scoring") as status, routing.on():
        scores = score_tasks(
            found.pooled.model,
            found.tokenizer,
            tasks,
            config.evaluation,
            config.data,
            split=scoring.split,
            max_rows=scoring.max_rows,
            progress=lambda task, done, total: status.update(f"{task}: {done} of {total} rows"),
        )
    _show({"arrow": scores}, scoring)


def evaluate(
    folder: str,
    scoring: Scoring,
    ways: Sequence[str],
    *,
    top: int,
    encoder: str,
    exclude_own: bool,
    temperature: float | None,
) -> None:
    """Score tasks with the pool's adapters, in one or several ways.

    Raises:
        HeadwaterError: for whatever is wrong with the pool, the tasks or the ways.
    """
    from headwater.compose.retriever import mixtures
    from headwater.compose.scoring import RETRIEVED, check_ways

    mixtures([], temperature)  # refuses one that cannot be before anything is loaded or scored
    config, tasks, found = _compose(folder, scoring)
    retriever = _retriever(found.pool, encoder) if set(ways) & set(RETRIEVED) else None
    composition = dataclasses.replace(
        found, retriever=retriever, top=top, exclude_own=exclude_own, temperature=temperature
    )
    check_ways(ways, composition, tasks, split=scoring.split, max_rows=scoring.max_rows)
    _score_and_show(ways, composition, tasks, config, scoring)


def _compose(folder: str, scoring: Scoring) -> tuple[RunConfig, list[Task], Composition]:
    from headwater.base_model import load_to_run
    from headwater.compose import AdapterPool, PooledModel
    from headwater.compose.scoring import Composition
    from headwater.evaluation.scoring import check_rows

    quiet_libraries()
    pool = AdapterPool(folder)
    config, tasks = scoring.read()
    model, tokenizer = load_to_run(pool.base_model, config.device, **config.model.model_dump())
    pool.fingerprint.require(model, pool.base_model)
    # before anything is fitted or scored, which may take long
    how = (config.evaluation, config.data)
    check_rows(model, tokenizer, tasks, *how, split=scoring.split, max_rows=scoring.max_rows)
    return config, tasks, Composition(pool, PooledModel(model, pool.load), tokenizer)


def _retriever(pool: AdapterPool, encoder: str) -> Retriever:
    from headwater.compose.encoder import load_encoder
    from headwater.compose.retriever import Retriever

    found = Retriever.of(pool, load_encoder(encoder, progress=_note))
    bare = [name for name in pool.names if name not in found.names]
    if bare:
        _note(f"without sample texts, and so never found: {', '.join(bare)}")
    return found


def _training_rows(tasks: Sequence[Task], found: Composition, config: RunConfig) -> list[Encoded]:
    from headwater.data.encode import encode_rows
    from headwater.evaluation.forward import max_positions

    bare = [task.name for task in tasks if not task.train]
    if bare:
        what = "the task has no training rows to learn from"
        raise HeadwaterError(*(Problem(what, name, "give it `train`") for name in bare))
    how = (found.tokenizer, config.data)
    limit = max_positions(found.pooled.model)
    return [row for task in tasks for row in encode_rows(task.train, *how, task.index, limit)[0]]


def _score_and_show(
    ways: Sequence[str | Path], found: Composition, tasks: Sequence[Task], config: RunConfig, scoring: Scoring
) -> None:
    from headwater.compose.scoring import score_way

    scores = {}
    with err_console().status("scoring") as status:
        for way in ways:

            def show(task: str, done: int, total: int, way: str | Path = way) -> None:
                status.update(f"{way}, {task}: {done} of {total} rows")

            scores[str(way)] = score_way(
                way,
                found,
                tasks,
                config.evaluation,
                config.data,
                split=scoring.split,
                max_rows=scoring.max_rows,
                progress=show,
            )
    _show(scores, scoring)


def _show(scores: dict[str, dict[str, TaskScore]], scoring: Scoring) -> None:
    from headwater.evaluation import mean_score

    rows: list[list[object]] = []
    record: dict[str, Any] = {"schema": 1, "split": scoring.split, "ways": {}}
    for way, found in scores.items():
        for score in found.values():
            rows.append([way, score.task, score.metric, score.n, f"{score.value:.3f}", _ends(score.detail["interval"])])
        mean = mean_score(found.values())
        if mean is not None and len(found) > 1:
            rows.append([way, "mean", "", "", f"{mean:.3f}", ""])
        tasks = {s.task: {"metric": s.metric, "n": s.n, "value": s.value, **s.detail} for s in found.values()}
        record["ways"][way] = {"tasks": tasks, "mean": mean}
    out_console().print(table(["way", "task", "metric", "rows", "score", "95 % interval"], rows))
    if scoring.output is not None:
        write_json(Path(scoring.output), record)
        _note(f"wrote {scoring.output}")


def _share(values: Sequence[float], ends: Sequence[float] | None) -> str:
    return f"{sum(values) / len(values):.3f} ({_ends(ends)})"


def _ends(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} - {interval[1]:.3f}"


def _say(text: str) -> None:
    out_console().print(text, soft_wrap=True, highlight=False, markup=False)


def _note(text: str) -> None:
    err_console().print(text, soft_wrap=True, highlight=False, markup=False)
