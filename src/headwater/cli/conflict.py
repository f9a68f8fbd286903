"""`headwater conflict`."""

from __future__ import annotations

import json
from pathlib import Path

from headwater.cli.adapters import attach, locate
from headwater.cli.console import out_console, table
from headwater.errors import HeadwaterError, Problem

FILE = "conflict.json"


def run(source: str, rows: int, *, as_json: bool) -> None:
    """Measure a run's gradient conflict, print it, and write it into the run folder for its report.

    Raises:
        HeadwaterError: there is no run with an adapter there, or its base model or data cannot be loaded.
    """
    found = locate(source)
    if found.config is None:
        fix = "give the run folder, whose config.yaml lists the tasks"
        raise HeadwaterError(Problem("an adapter alone does not say what its tasks are", source, fix))

    from headwater.analysis.conflict import gradient_conflict
    from headwater.base_model import load_to_run
    from headwater.data.encode import encode_rows
    from headwater.data.tasks import load_tasks
    from headwater.evaluation.forward import max_positions, pad_id
    from headwater.evaluation.scoring import sample
    from headwater.files import finite, write_json

    config = found.config
    tasks = [task for task in load_tasks(config.tasks, config.base_dir) if task.train]
    base, tokenizer = load_to_run(config.model_name_or_path, config.device, **config.model.model_dump())
    model = attach(base, found.adapter, is_trainable=True)
    limit = max_positions(model)
    encoded = {t.name: encode_rows(sample(t.train, rows), tokenizer, config.data, t.index, limit)[0] for t in tasks}
    parts = gradient_conflict(model, encoded, fill=pad_id(tokenizer))
    content = {
        "schema": 1,
        "rows_per_task": rows,
        "tasks": list(encoded),
        "parts": {name: finite(conflict.as_dict()) for name, conflict in parts.items()},
    }
    folder = Path(source).resolve()
    if folder == found.run_folder:  # of a checkpoint, it would be taken for the finished run's
        write_json(folder / FILE, content)
    if as_json:
        print(json.dumps(content, indent=2))
        return
    console = out_console()
    whole = parts["all"]
    cosines = zip(whole.tasks, finite(whole.cosine), strict=True)
    lines = [[name, *(_number(v, "+.3f") for v in row)] for name, row in cosines]
    console.print("Cosine between the tasks' gradients, all parameters of the adapter:", highlight=False)
    console.print(table(["", *whole.tasks], lines))
    shares = [[name, _number(c.mean, "+.3f"), _number(c.negative, ".0%")] for name, c in parts.items()]
    console.print(table(["parameters", "mean cosine of pairs", "pairs below 0"], shares))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
