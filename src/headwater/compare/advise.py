"""A short pilot on the user's own tasks: does a multi-head method pay here, and what would the whole run cost?"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from headwater.base_model import load_tokenizer, shape_of
from headwater.compare.budget import trainable_parameters
from headwater.compare.plan import Plan, make_plan
from headwater.compare.run import compare
from headwater.compare.selection import choosing_tasks
from headwater.data.encode import encode_rows
from headwater.data.sampler import batch_sizes
from headwater.data.tasks import load_tasks
from headwater.errors import HeadwaterError, Problem
from headwater.evaluation.forward import max_positions
from headwater.files import write_json
from headwater.training.arguments import total_steps
from headwater.training.folder import check_writable
from headwater.training.run import training_arguments

if TYPE_CHECKING:
    from headwater.config import RunConfig

PROBE_STEPS = 6
"""Steps of the run that only measures how long a step and a scoring take."""
LEAST_STEPS = 20
"""A pilot of fewer steps would compare beginnings."""
MOST_ROWS = 60
"""Validation rows a task is scored on."""
ANY_TOLERANCE = 1e9
"""Plain LoRA takes the rank that comes nearest, however far that is: the user did not choose it."""


def advise(
    config: RunConfig, *, minutes: float, seeds: list[int], method: str | None, console: Console
) -> dict[str, Any]:
    """Compares plain LoRA with a multi-head method on validation rows, in about the given time.

    Both have the same data order and seeds, and the same number of trainable parameters or the nearest that a rank of
    plain LoRA gives, which is then said. Test rows are not touched: what is trained
    on and scored are the tasks' training and validation rows. A pilot that was stopped goes on when called again.

    Args:
        config: the run that advice is wanted on.
        minutes: for the whole pilot.
        seeds: each method is trained once with each; at least two, or there is no interval.
        method: the method that is compared with plain LoRA; by default the config's own, or R-LoRA where that is LoRA.

    Returns:
        The content of `advice.json`: `verdict` ("multi-head", "plain" or "undecided"), `method`, `steps` and `seeds` of
        the pilot, `difference` of the mean scores and its `ci95`, `tasks` with the same for each, and
        `full_run_seconds` by method.

    Raises:
        HeadwaterError: if the time is too short for a pilot that could say anything, or whatever a run refuses.
    """
    from headwater.config import changed
    from headwater.config_keys import DEFAULT_METHOD

    if not math.isfinite(minutes * 60):
        raise HeadwaterError(Problem(f"this is no length of time: {minutes}", "--minutes", "give a number of minutes"))
    if twice := [str(seed) for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]:
        raise HeadwaterError(Problem(f"{', '.join(twice)} is given more than once", "--seeds", "give each seed once"))
    if len(seeds) < 2:
        raise HeadwaterError(Problem("one seed gives no interval", "--seeds", "give at least two, e.g. 0,1,2"))
    if method == "lora":
        fix = "name another; `headwater methods` lists them"
        raise HeadwaterError(Problem("plain LoRA is what a method is compared with", "--method lora", fix))
    try:
        check_writable(Path(config.output_dir))
    except HeadwaterError as error:
        raise config.placed(error) from None
    started = time.perf_counter()
    output = Path(config.output_dir) / "advice"
    tasks = choosing_tasks(config, output / "tasks", [config.method])
    if tasks and all(task["metric"] == "loss" for task in tasks):
        what, fix = "the tasks have no score to compare, only a loss", "give one of them choices or a metric"
        raise HeadwaterError(Problem(what, config.where("tasks"), fix))
    for task in tasks:
        task["max_test_rows"] = MOST_ROWS
    own = config.method["name"]
    name = method or (DEFAULT_METHOD if own == "lora" else own)
    variants: list[Any] = ["lora", {"method": {"name": name}}]
    probe = output / "probe"
    other = changed(config, {"method": {**_shared(config, name), "name": name}}, {})

    def pilot(steps: int, methods: list[Any], folder: Path) -> RunConfig:
        training = {**config.training, "max_steps": steps, "eval_strategy": "no", "save_steps": max(steps, 1)}
        for key in ("num_train_epochs", "eval_steps", "load_best_model_at_end", "metric_for_best_model"):
            training.pop(key, None)
        section = {
            "methods": methods,
            "seeds": seeds[:1] if folder == probe else seeds,
            # The method stays as the file has it; plain LoRA's rank is solved for.
            "parameters": trainable_parameters(other, other.method),
            "tolerance": ANY_TOLERANCE,
        }
        sections = {"tasks": tasks, "training": training, "compare": section, "output_dir": str(folder)}
        return changed(config, sections, {})

    full = full_steps(config)
    asked = {"minutes": minutes, "method": name, "full_steps": full}
    steps = _kept_steps(output, asked)
    if steps is None:
        console.print("measuring how long a step takes", highlight=False)
        shutil.rmtree(probe, ignore_errors=True)  # kept runs take no time: nothing could be measured
        measured = compare(make_plan(pilot(PROBE_STEPS, variants, probe)), console=Console(quiet=True))
        per_step = {entry["method"]: entry["extra"]["seconds_per_step"] for entry in measured["summary"]}
        spent = time.perf_counter() - started
        scoring = max(spent - PROBE_STEPS * sum(per_step.values()), 0.0) / (len(variants) + 1)  # the base's, too
        steps = _affordable(minutes * 60 - spent - scoring * (1 + len(variants) * len(seeds)), per_step, len(seeds))
        steps = min(steps, full)
        if steps < min(LEAST_STEPS, full):
            needed = spent + scoring * (1 + len(variants) * len(seeds))
            needed += LEAST_STEPS * len(seeds) * sum(per_step.values())
            fix = f"give --minutes {math.ceil(needed / 60)} or more, fewer --seeds, or tasks with shorter rows"
            what = f"{minutes:g} minutes are too short for a pilot of {LEAST_STEPS} steps"
            raise HeadwaterError(Problem(what, "--minutes", fix))
        write_json(output / "pilot.json", {"steps": steps, **asked})
    console.print(f"{len(variants)} methods, {len(seeds)} seeds, {steps} of {full} steps each", highlight=False)
    plan = make_plan(pilot(steps, variants, output / f"pilot-{name}-{steps}"))
    if unequal := _unequal(plan):
        console.print(unequal, highlight=False, soft_wrap=True)
    content = compare(plan, console=console)
    advice = advice_of(content, steps=steps, full=full)
    write_json(output / "advice.json", advice)
    return advice


def _shared(config: RunConfig, name: str) -> dict[str, Any]:
    """The fields of the config's `method:` section that a method has, too."""
    from headwater.config_keys import method_fields

    known = method_fields(name)
    return {key: value for key, value in config.method.items() if key in known}


def _unequal(plan: Plan) -> str:
    """What to say where no rank gives plain LoRA the other method's number of trainable parameters."""
    plain, other = plan.methods
    off = plan.deviation(plain)
    if not off:
        return ""
    return (
        f"plain LoRA has {plain.parameters:,} trainable parameters, {off:+.1%} from the {other.parameters:,} of "
        f"{other.label}: no rank comes nearer than {plain.config.method['r']}"
    )


def _kept_steps(output: Path, asked: dict[str, Any]) -> int | None:
    """The steps of such a pilot that was begun here, which goes on rather than being measured and trained anew."""
    file = output / "pilot.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return kept["steps"] if asked.items() <= kept.items() else None


def _affordable(seconds: float, per_step: dict[str, float], seeds: int) -> int:
    return max(int(seconds / (seeds * sum(per_step.values()))), 0)


def full_steps(config: RunConfig) -> int:
    """The optimiser steps that the run's file asks for."""
    args = training_arguments(config)
    rows = _trained_rows(config) if args.max_steps <= 0 else 0
    batches = batch_sizes(rows, args.per_device_train_batch_size, drop_last=args.dataloader_drop_last)
    return total_steps(args, len(batches))


def _trained_rows(config: RunConfig) -> int:
    """All training rows but those that are left out because they are too long, which takes a tokenizer to know."""
    tasks = load_tasks(config.tasks, config.base_dir)
    if config.data.on_too_long != "drop":
        return sum(len(task.train) for task in tasks)
    base, remote = config.model_name_or_path, config.model.trust_remote_code
    tokenizer = load_tokenizer(base, trust_remote_code=remote)
    limit = max_positions(shape_of(base, trust_remote_code=remote))
    return sum(len(encode_rows(task.train, tokenizer, config.data, task.index, limit)[0]) for task in tasks)


def advice_of(content: dict[str, Any], *, steps: int, full: int) -> dict[str, Any]:
    """What a comparison of plain LoRA with one other method says.

    The verdict is "multi-head" or "plain" only where the 95 % interval of the paired difference keeps off 0.
    """
    plain, other = content["summary"]
    difference, interval = other["paired_difference"], other["paired_ci95"]
    low, high = interval or (-math.inf, math.inf)  # seeds that agree to the last digit tell no spread
    verdict = "multi-head" if low > 0 else "plain" if high < 0 else "undecided"
    return {
        "schema": 1,
        "verdict": verdict,
        "method": other["method"],
        "seeds": content["extra"]["seeds"],
        "steps": steps,
        "full_steps": full,
        "mean": {plain["method"]: plain["mean"], other["method"]: other["mean"]},
        "difference": difference,
        "ci95": interval,
        "tasks": {
            name: {"difference": values["paired_difference"], "ci95": values["paired_ci95"]}
            for name, values in other["extra"]["tasks"].items()
            if values["metric"] != "loss"
        },
        "trainable_parameters": {entry["method"]: entry["trainable_parameters"] for entry in (plain, other)},
        "settings": {
            about["label"]: {"method": about["method"], "training": {"learning_rate": about["learning_rate"]}}
            for about in content["extra"]["methods"]
        },
        "full_run_seconds": {entry["method"]: entry["extra"]["seconds_per_step"] * full for entry in (plain, other)},
    }
