"""What an adapter's gates do on text, for `headwater inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.cli.adapters import Source, adapter_fields, load
from headwater.cli.console import err_console
from headwater.errors import HeadwaterError, Problem

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from headwater.analysis import GateStatistics
    from headwater.analysis.routing import Texts


@dataclass(frozen=True)
class GatesOnText:
    """Statistics by layer of each task's text and of all text together; how many texts each task had."""

    by_task: dict[str, dict[str, GateStatistics]]
    together: dict[str, GateStatistics]
    texts: dict[str, int]

    @property
    def tokens(self) -> int:
        return max((gates.tokens for gates in self.together.values()), default=0)

    def of_layer(self, name: str) -> dict[str, Any] | None:
        """What JSON says of one layer; None where it showed no gate."""
        if name not in self.together:
            return None
        load_by_task = {task: of[name].load.tolist() for task, of in self.by_task.items() if name in of}
        return {**self.together[name].as_dict(), "load_by_task": load_by_task}


def read_gates(found: Source, text: str | None, rows: int) -> GatesOnText | None:
    """Runs the base model with the adapter on text: the file's, or some rows of each of the run's tasks.

    Returns:
        None, after saying so, when the run's rows or its base model cannot be read any more.

    Raises:
        HeadwaterError: if a text file was asked for and cannot be used.
    """
    from headwater.analysis.routing import gates_by_task
    from headwater.evaluation.forward import pad_id

    lines = None if text is None else _lines(text)
    try:
        with err_console().status("reading gates"):
            model, tokenizer = load(found)
            texts = _rows(found, model, tokenizer, rows) if lines is None else _texts(found, model, tokenizer, lines)
            by_task, together = gates_by_task(model, texts, pad_id(tokenizer))
    except HeadwaterError as error:
        if lines is not None:
            raise
        why = f"what the gates do is not shown: {error.problems[0]}"
        err_console().print(why, markup=False, highlight=False, soft_wrap=True)
        return None
    return GatesOnText(by_task, together, {name: len(some.sequences) for name, some in texts.items()})


def _rows(found: Source, model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Texts]:
    from headwater.analysis.routing import task_texts
    from headwater.data.tasks import load_tasks

    assert found.config is not None
    tasks = load_tasks(found.config.tasks, found.config.base_dir)
    return {task.name: task_texts(model, tokenizer, task, found.config.data, rows) for task in tasks}


def _lines(path: str) -> list[str]:
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise HeadwaterError(Problem(f"cannot be read as text: {error}", f"--text {path}")) from None
    if not lines:
        raise HeadwaterError(Problem("there is no text in this file", f"--text {path}", "write one text per line"))
    return lines


def _texts(found: Source, model: PeftModel, tokenizer: PreTrainedTokenizerBase, lines: list[str]) -> dict[str, Texts]:
    """The lines once; or once under each task the adapter knows, if it goes by task."""
    from headwater.analysis.routing import Texts
    from headwater.evaluation.forward import max_positions
    from headwater.tuner import needs_task_ids

    limit = max_positions(model)
    sequences = [ids for line in lines if (ids := tokenizer(line)["input_ids"][:limit])]
    if not needs_task_ids(model):
        return {"text": Texts(sequences)}
    if found.config is not None:
        names = [task.name for task in found.config.tasks]
    else:
        names = [f"task {n}" for n in range(adapter_fields(found.adapter).get("num_tasks") or 0)]
    if not names:
        fix = "give the run folder, whose config.yaml lists the tasks"
        raise HeadwaterError(Problem("the adapter goes by task and does not say which tasks", str(found.adapter), fix))
    return {name: Texts(sequences, task_index=index) for index, name in enumerate(names)}
