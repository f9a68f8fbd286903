"""Scores of a pool's adapters combined in one way or another, on the rows of tasks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.encode import DataSpec, encode_rows
from ..data.rows import Row
from ..data.tasks import Task, majority
from ..errors import HeadwaterError, Problem
from ..evaluation import EvaluationSpec, Progress, TaskScore, interval, score_task
from ..evaluation.forward import max_positions
from ..evaluation.scoring import sample
from .adapter import read_adapter, read_config
from .arrow import Arrow
from .flow import FlowGate
from .merge import require_same_ranks
from .mixed import Mixture, PooledModel
from .pool import WAYS, AdapterPool
from .retriever import Retriever, mixtures
from .saved import kind_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

RETRIEVED = ("selection", "mixture", "fusion")
_COUNTS = ("tokens", "unfinished", "shortened_prompts", "end_scored")  # in a score's detail


@dataclass(frozen=True)
class Composition:
    """A pool on its model, and how its adapters are retrieved.

    Args:
        retriever: needed by `selection`, `mixture` and `fusion` only.
        top: adapters to retrieve for mixture and fusion.
        exclude_own: never retrieve the adapter that has the task's name: the out-of-domain protocol.
        temperature: weighs what is retrieved for mixture and fusion by softmax(score / temperature); None equally.
    """

    pool: AdapterPool
    pooled: PooledModel
    tokenizer: PreTrainedTokenizerBase
    retriever: Retriever | None = None
    top: int = 3
    exclude_own: bool = False
    temperature: float | None = None


def score_way(
    way: str | Path,
    composition: Composition,
    tasks: Sequence[Task],
    spec: EvaluationSpec,
    data_spec: DataSpec,
    *,
    split: str = "test",
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> dict[str, TaskScore]:
    """Score every task that has rows in `split`; the same rows for every way.

    Args:
        way: `base` (no adapter), `own` (the adapter of the task's name: the oracle), `uniform` (the mean of all
            adapters' outputs), `selection`, `mixture` or `fusion` (retrieved for each row), `arrow`, the name of an
            adapter, or a folder that `headwater pool flow`, `hub` or `arrow` wrote. A text that is a name and a folder
            is the name; a `Path` is always a folder.

    Raises:
        HeadwaterError: an unknown way, one that an adapter has the name of, a task without an adapter of its name, or
            rows that cannot be scored.
    """
    scores = {}
    with _ready(way, composition) as everywhere:
        for task in tasks:
            rows = sample(getattr(task, split), max_rows)
            if not rows:
                continue
            if everywhere:
                model, tokenizer = composition.pooled.model, composition.tokenizer
                scores[task.name] = score_task(model, tokenizer, task, rows, spec, data_spec, progress=progress)
            else:
                plan = plan_rows(str(way), composition, task.name, rows)
                scores[task.name] = score_mixtures(
                    composition, task, rows, plan, spec, data_spec, fused=way == "fusion", progress=progress
                )
    return scores


def check_ways(
    ways: Sequence[str],
    composition: Composition,
    tasks: Sequence[Task],
    *,
    split: str = "test",
    max_rows: int | None = None,
) -> None:
    """Tries what each way needs before the first one is scored, which may take long.

    Raises:
        HeadwaterError: all that is wrong with the ways.
    """
    problems = []
    for way in ways:
        try:
            with _ready(way, composition) as everywhere:
                for task in () if everywhere else tasks:
                    # The first row stands for all: to find the adapters of every one takes as long as to score it.
                    rows = sample(getattr(task, split), max_rows)[:1]
                    for mixture in plan_rows(way, composition, task.name, rows) if rows else ():
                        adapters = [composition.pooled.adapter(name) for name in mixture]
                        if way == "fusion":
                            require_same_ranks(adapters, "score mixture instead of fusion, or retrieve --top 1")
        except HeadwaterError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise HeadwaterError(*problems)


def plan_rows(way: str, composition: Composition, task: str, rows: Sequence[Row]) -> Sequence[Mixture]:
    """The mixture of adapters that each row gets.

    Raises:
        HeadwaterError: as `score_way`.
    """
    pool = composition.pool
    if way == "base":
        return [{}] * len(rows)
    if way == "uniform":
        return [{name: 1 / len(pool) for name in pool.names}] * len(rows)
    if way in RETRIEVED:
        if composition.retriever is None:
            raise HeadwaterError(Problem(f"{way} needs a retriever"))
        barred = [{task}] * len(rows) if composition.exclude_own else None
        top = 1 if way == "selection" else composition.top
        found = composition.retriever.retrieve([row.prompt for row in rows], top, exclude=barred)
        return mixtures(found, composition.temperature)
    name = task if way == "own" else way
    if name not in pool:
        fix = f"one of {', '.join(WAYS)}, an adapter ({', '.join(pool.names)}), or a folder"
        what = f"the pool has no adapter {name!r}" if way == "own" else f"unknown way {way!r}"
        raise HeadwaterError(Problem(what, "way", fix))
    return [{name: 1.0}] * len(rows)


def score_mixtures(
    composition: Composition,
    task: Task,
    rows: Sequence[Row],
    plan: Sequence[Mixture],
    spec: EvaluationSpec,
    data_spec: DataSpec,
    *,
    fused: bool = False,
    progress: Progress | None = None,
) -> TaskScore:
    """Score rows that each have a mixture of their own. Rows of one mixture share their batches.

    What a score's detail says of single answers, `examples` and `predicted_shares`, it has where all rows have the same
    mixture.

    Raises:
        HeadwaterError: as `score_task` and `PooledModel.rows`.
    """
    pooled, tokenizer = composition.pooled, composition.tokenizer
    kept = _fitting(pooled.model, tokenizer, task, rows, data_spec)
    groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for position in kept:
        groups.setdefault(tuple(sorted(plan[position].items())), []).append(position)
    if len(groups) < 2:
        with pooled.rows([dict(next(iter(groups), ()))], fused=fused):
            return score_task(pooled.model, tokenizer, task, rows, spec, data_spec, progress=progress)
    parts, values, tokens = [], dict.fromkeys(kept, 0.0), dict.fromkeys(kept, 0.0)
    done = len(rows) - len(kept)
    for mixture, positions in groups.items():
        with pooled.rows([dict(mixture)], fused=fused):
            part = score_task(pooled.model, tokenizer, task, [rows[i] for i in positions], spec, data_spec)
        parts.append(part)
        values.update(zip(positions, part.correct, strict=True))
        if part.weights is not None:
            tokens.update(zip(positions, part.weights, strict=True))
        done += len(positions)
        if progress is not None:
            progress(task.name, done, len(rows))
    correct, weights = list(values.values()), list(tokens.values()) if task.metric == "loss" else None
    ends = interval(correct, weights)
    detail = {"interval": ends and list(ends), **_joined(parts)}
    if len(kept) < len(rows):
        detail["dropped_rows"] = len(rows) - len(kept)
    value, share = float(np.average(correct, weights=weights)), majority(rows, task.metric)
    return TaskScore(task.name, task.metric, value, len(kept), share, correct, detail, weights)


def _fitting(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row], data_spec: DataSpec
) -> list[int]:
    """Positions of the rows that a loss does not leave out for their length: its score does not say which they were."""
    if task.metric != "loss" or data_spec.on_too_long != "drop":
        return list(range(len(rows)))
    whole = data_spec.model_copy(update={"max_length": sys.maxsize})
    encoded, _ = encode_rows(rows, tokenizer, whole, task.index)
    limit = min(data_spec.max_length, max_positions(model) or sys.maxsize)
    return [i for i, row in enumerate(encoded) if len(row) <= limit]


def _joined(parts: Sequence[TaskScore]) -> dict[str, Any]:
    """What the scores of several groups of rows say about how they were taken, as one."""
    details = [part.detail for part in parts]
    joined: dict[str, Any] = {k: v for detail in details for k, v in detail.items() if k == "normalization"}
    for key in _COUNTS:
        if any(key in detail for detail in details):
            joined[key] = sum(detail.get(key, 0) for detail in details)
    if "chance" in details[0]:
        chances = [detail["chance"] for detail in details]
        joined["chance"] = float(np.average(chances, weights=[part.n for part in parts]))
    return joined


@contextlib.contextmanager
def _ready(way: str | Path, composition: Composition) -> Iterator[bool]:
    """Puts a way that is the same for all rows on the model; yields whether it is one."""
    folder = Path(way)
    if way in WAYS and way in composition.pool:  # from before such names were refused
        what, where = f"{way!r} is a way, and this pool has an adapter of that name", str(composition.pool.path)
        raise HeadwaterError(Problem(what, where, "remove the adapter, and add it again under another name"))
    if way in WAYS[:-1] or way in composition.pool:
        yield False
        return
    if way != "arrow" and not folder.is_dir():
        plan_rows(str(way), composition, "", ())  # raises, and says what there is
    with on_model("arrow" if way == "arrow" else folder, composition.pool, composition.pooled):
        yield True


@contextlib.contextmanager
def on_model(way: str | Path, pool: AdapterPool, pooled: PooledModel) -> Iterator[None]:
    """Forwards inside use what was fitted on the pool: a folder that `headwater pool flow`, `hub` or `arrow` wrote, or
    "arrow" for Arrow's routing among all adapters.

    Raises:
        HeadwaterError: the folder holds nothing of the kind, or was fitted on other adapters or another base model.
    """
    kind = "arrow" if way == "arrow" else kind_of(Path(way))
    if kind == "hub":
        adapter = read_adapter(Path(way), "hub", pool.fingerprint.layers)
        # It is an adapter by itself: the pool's may have changed since, the model may not.
        base = read_config(Path(way)).get("base_model_name_or_path") or ""
        if problems := pool.base_problems(base, Path(way)):
            raise HeadwaterError(*problems)
        with pooled.all_rows(pooled.place(adapter)):
            yield
    elif kind == "flow":
        with FlowGate.load(Path(way), pool, pooled).on():
            yield
    else:
        with (Arrow(pooled, pool) if way == "arrow" else Arrow.load(Path(way), pool, pooled)).on():
            yield


def ranks_of_own(retriever: Retriever, tasks: Sequence[Task], split: str, max_rows: int | None) -> dict[str, list[int]]:
    """Per task that an adapter is named after, the place at which retrieval finds that adapter for each row, from 1."""
    found = {}
    for task in tasks:
        rows = sample(getattr(task, split), max_rows)
        if task.name in retriever.names and rows:
            ranked = retriever.retrieve([row.prompt for row in rows], len(retriever.names))
            found[task.name] = [[name for name, _ in row].index(task.name) + 1 for row in ranked]
    return found
