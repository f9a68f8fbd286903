"""`headwater export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.cli.adapters import (
    ADAPTER_FILE,
    Source,
    adapter_fields,
    attach_to_shape,
    load,
    locate,
)
from headwater.cli.console import err_console, out_console, table
from headwater.cli.evaluate import refuse
from headwater.errors import HeadwaterError, Problem

if TYPE_CHECKING:
    from headwater.export import Exported

RECORD = "export.json"


def run(source: str, output: str, *, merge: bool, per_task: bool, rows: int | None, score_rows: int | None) -> None:
    """Write an adapter for tools that do not know headwater.

    Raises:
        HeadwaterError: no adapter, a folder that is not empty, options that exclude each other, or a method that cannot
            be written that way.
    """
    if merge and per_task:
        raise HeadwaterError(Problem("--merge and --per-task exclude each other", "--merge", "give one of them"))
    if not per_task:
        refuse({"--rows": rows, "--score-rows": score_rows}, "it is about --per-task: leave it out, or give that")
    found, folder = locate(source), Path(output).absolute()
    method = str(adapter_fields(found.adapter).get("peft_type", "")).lower()

    from headwater.export import new_folder
    from headwater.files import write_json

    record: dict[str, Any] = {"schema": 1, "source": source, "method": method, "base_model": found.base_model}
    with new_folder(folder) as work:
        if merge:
            record |= _merged(found, method, work)
        elif per_task:
            record |= _per_task(found, method, work, rows, score_rows)
        else:
            record |= _plain(found, method, work)
        record["vllm"] = None if merge else _vllm(found, work, folder, [task["task"] for task in record["tasks"]])
        write_json(work / RECORD, record)
    console = out_console()
    console.print(f"wrote {folder} ({record['what']})", soft_wrap=True, highlight=False)
    if record["vllm"]:
        console.print("to serve with vLLM:", style="dim")
        console.print(record["vllm"], soft_wrap=True, highlight=False)


def _merged(found: Source, method: str, work: Path) -> dict[str, Any]:
    from headwater.export import write_merged
    from headwater.methods import NotMergeable

    model, tokenizer = load(found, on_cpu=True)  # it is only rewritten, and a GPU may lack the room
    with err_console().status("merging"):
        try:
            write_merged(model, tokenizer, work)
        except NotMergeable as error:
            raise _refusal(method, error) from error
    return {"kind": "merged", "what": "the merged model, exact up to rounding", "exact": True, "tasks": []}


def _plain(found: Source, method: str, work: Path) -> dict[str, Any]:
    from headwater.export import rewrite_lora, write_plain_lora
    from headwater.methods import NotMergeable

    if method == "lora":
        rank = rewrite_lora(found.adapter, work)
    else:
        try:
            rank = write_plain_lora(attach_to_shape(found), found.adapter, work)
        except NotMergeable as error:
            raise _refusal(method, error) from error
    return {"kind": "lora", "what": f"plain LoRA of rank {rank}, exact", "exact": True, "rank": rank, "tasks": []}


def _refusal(method: str, error: HeadwaterError) -> HeadwaterError:
    """The method's reason, with the ways out that this command has."""
    from headwater.methods import NotMergeable

    fix = "one plain LoRA per task: headwater export RUN --output DIR --per-task; or serve the adapter as it is: "
    return NotMergeable(*(Problem(problem.what, method, f"{fix}headwater serve RUN") for problem in error.problems))


def _per_task(found: Source, method: str, work: Path, rows: int | None, score_rows: int | None) -> dict[str, Any]:
    if found.config is None:
        what = "the adapter alone does not say which tasks there are"
        raise HeadwaterError(Problem(what, str(found.adapter), "give the run folder, whose config.yaml lists them"))
    if method == "lora":
        what = "plain LoRA is the same for every task"
        raise HeadwaterError(Problem(what, "--per-task", "leave --per-task out"))

    from headwater.export import by_task_id, check_differs_by_task
    from headwater.tuner import needs_task_ids

    model = attach_to_shape(found)
    if exact := needs_task_ids(model):
        exported = by_task_id(model, found.adapter, [task.name for task in found.config.tasks], work)
        out_console().print(table(["task", "rank"], [[e.task, e.rank] for e in exported]))
        what = f"one plain LoRA for each of {len(exported)} tasks, exact"
    else:
        check_differs_by_task(model)
        exported = _by_mean_gates(found, work, rows, score_rows)
        out_console().print(table(["task", "metric", "rows", "adapter", "plain LoRA", "lost", "95 % interval"],
                                  map(_line, exported)))  # fmt: skip
        what = f"one plain LoRA for each of {len(exported)} tasks, from mean gates"
    return {"kind": "per_task", "what": what, "exact": exact, "tasks": list(map(_as_json, exported))}


def _by_mean_gates(found: Source, work: Path, rows: int | None, score_rows: int | None) -> list[Exported]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from headwater.data.tasks import load_tasks
    from headwater.export import by_mean_gates

    config = found.config
    assert config is not None
    try:
        tasks = load_tasks(config.tasks, config.base_dir)
    except HeadwaterError as error:
        raise config.placed(error) from error
    model, tokenizer = load(found)
    text = TextColumn("{task.description}")
    with Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=err_console()) as bars:
        shown: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in shown:
                shown[what] = bars.add_task(what, total=total)
            bars.update(shown[what], completed=done, total=total)

        return by_mean_gates(
            model,
            found.adapter,
            tokenizer,
            tasks,
            config.evaluation,
            config.data,
            work,
            rows=rows or 64,
            score_rows=score_rows,
            progress=show,
        )


def _line(exported: Exported) -> list[object]:
    if exported.routed is None or exported.plain is None or exported.lost is None:
        return [exported.task, "not scored", "", "", "", "", ""]
    interval = exported.interval and f"{exported.interval[0]:+.3f} - {exported.interval[1]:+.3f}"
    scores = (f"{exported.routed.value:.3f}", f"{exported.plain.value:.3f}", f"{exported.lost:+.3f}")
    return [exported.task, exported.routed.metric, exported.routed.n, *scores, interval]


def _as_json(exported: Exported) -> dict[str, Any]:
    scored = exported.routed
    return {
        "task": exported.task,
        "rank": exported.rank,
        "gate_rows": exported.rows,
        "metric": scored and scored.metric,
        "n": scored and scored.n,
        "adapter": scored and scored.value,
        "plain": exported.plain and exported.plain.value,
        "lost": exported.lost,
        "interval": exported.interval,
    }


def _vllm(found: Source, work: Path, folder: Path, tasks: list[str]) -> str | None:
    from headwater.base_model import dequantise_gguf
    from headwater.export import serve_command
    from headwater.paths import expanded

    base = expanded(found.base_model, found.base_model)
    name = str(dequantise_gguf(base)) if base.is_file() else found.base_model
    places = {task: Path(task) for task in tasks} or {folder.name: Path()}
    return serve_command(
        name,
        {
            task: (folder / place, json.loads((work / place / ADAPTER_FILE).read_text()))
            for task, place in places.items()
        },
    )
