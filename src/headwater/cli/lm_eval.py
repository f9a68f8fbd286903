"""`headwater evaluate --lm-eval`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from headwater.cli.adapters import adapter_fields, load, locate
from headwater.cli.console import err_console, out_console, table
from headwater.cli.evaluate import require_effect
from headwater.errors import HeadwaterError, Problem
from headwater.files import check_file, write_json

READ = ("model_name_or_path", "model", "evaluation.batch_size", "training.use_cpu")
"""The keys of a run's file that lm-eval's tasks are scored by."""


def run(
    source: str,
    names: Sequence[str],
    *,
    include_path: str | None,
    num_fewshot: int | None,
    limit: int | None,
    task: str | None,
    chat: bool,
    output: str | None,
    overrides: Sequence[str],
) -> None:
    """Run lm-eval's tasks on an adapter; print a table, write JSON where asked to.

    Raises:
        HeadwaterError: no adapter, overrides that have no effect, or whatever `lm_eval_scores` refuses.
    """
    if not names:
        raise HeadwaterError(Problem("names no task", "--lm-eval", "e.g. --lm-eval bbh,mmlu"))
    if output is not None:
        check_file(output, "--output")
    from headwater.config import load_config
    from headwater.evaluation.lm_eval import lm_eval_scores

    require_effect(overrides, READ)
    found = locate(source)
    config = found.config
    if overrides and found.run_file is None:
        what, fix = "the adapter alone has no config to override", "give the run folder, or leave --set out"
        raise HeadwaterError(Problem(what, str(found.adapter), fix))
    if overrides and found.run_file is not None:
        config = load_config(found.run_file, overrides)
        found = dataclasses.replace(found, other_base=config.model_name_or_path)
    index = None if task is None else found.task_index(task)
    model, tokenizer = load(found, config)
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    scores = lm_eval_scores(
        model,
        tokenizer,
        names,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=config.evaluation.batch_size if config else 16,
        apply_chat_template=chat,
        task_index=index,
    )
    rows = [
        [s.task, s.metric, s.filter, s.shots, s.n, f"{s.value:.4f}", None if s.stderr is None else f"{s.stderr:.4f}"]
        for s in scores
    ]
    out_console().print(table(["task", "metric", "filter", "shots", "rows", "value", "standard error"], rows))
    if output is not None:
        from importlib.metadata import version

        fields = adapter_fields(found.adapter)
        document = {
            "schema": 1,
            "adapter": str(found.adapter),
            "method": str(fields.get("peft_type", "")).lower(),
            "base_model": found.base_model,
            "lm_eval": version("lm-eval"),
            "scores": [dataclasses.asdict(score) for score in scores],
        }
        write_json(Path(output), document)
        err_console().print(f"wrote {output}", soft_wrap=True, highlight=False)
