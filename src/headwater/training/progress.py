"""How a run is shown while it goes: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from transformers import TrainerCallback

from ..evaluation.scores import TaskScore
from .history import TASK_LOSS, named


class ProgressDisplay(TrainerCallback):
    """Shows steps, loss, tokens per second, time left, and each task's loss and last score.

    Args:
        console: where to.
        live: redraw in place; by default where the console is a terminal.
    """

    def __init__(self, console: Console, *, live: bool | None = None):
        self.console = console
        self.live = console.is_terminal if live is None else live
        self.losses: dict[str, float] = {}
        self.scores: dict[str, TaskScore] = {}
        self._shown: Live | None = None
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._training: TaskID | None = None
        self._scoring: TaskID | None = None

    def scoring(self, task: str, done: int, total: int) -> None:
        """Shows how far the scoring of one task is; called after every batch of rows."""
        if not self.live:
            return
        self._open()
        if self._scoring is None:
            self._scoring = self._bars.add_task("", note="")
        self._bars.update(self._scoring, description=f"scoring {task}", completed=done, total=total)
        self._draw()

    def scored(self, scores: Mapping[str, TaskScore], step: int) -> None:
        """Shows the scores of an evaluation."""
        self.scores.update(scores)
        if self._scoring is not None:
            self._bars.remove_task(self._scoring)
            self._scoring = None
        values = "  ".join(f"{name} {score.value:.3f}" for name, score in scores.items())
        if values:
            self.console.print(f"step {step}  scores  {values}", highlight=False, soft_wrap=True)
        self._draw()

    def close(self) -> None:
        """Stops redrawing; the last state stays on the screen."""
        if self._shown is not None:
            self._draw()
            self._shown.stop()
            self._shown = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = (time.monotonic(), state.global_step)
        self.live = self.live and not args.disable_tqdm and state.is_world_process_zero
        if self.live:
            self._open()
            self._training = self._bars.add_task(
                "training", total=state.max_steps, completed=state.global_step, note=""
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._bars.update(self._training, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        self.losses.update(named(logs, TASK_LOSS))
        note = f"loss {logs['loss']:.4f}  {logs['tokens_per_second']:,.0f} tokens/s"
        if self._training is not None:
            self._bars.update(self._training, note=note)
            self._draw()
            return
        tasks = "  ".join(f"{name} {loss:.4f}" for name, loss in self.losses.items())
        per_step = (time.monotonic() - self._began[0]) / max(state.global_step - self._began[1], 1)
        left = duration(per_step * (state.max_steps - state.global_step))
        self.console.print(
            f"step {state.global_step}/{state.max_steps}  {note}  {left} left  {tasks}",
            highlight=False,
            soft_wrap=True,
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._bars.update(self._training, completed=state.global_step)

    def _open(self) -> None:
        if self._shown is None:
            self._shown = Live(self._view(), console=self.console, refresh_per_second=4)
            self._shown.start()

    def _draw(self) -> None:
        if self._shown is not None:
            self._shown.update(self._view())

    def _view(self) -> Group:
        table = Table("task", "loss", "score", box=None, pad_edge=False)
        for name in dict.fromkeys([*self.losses, *self.scores]):
            loss, score = self.losses.get(name), self.scores.get(name)
            table.add_row(name, "" if loss is None else f"{loss:.4f}", "" if score is None else f"{score.value:.3f}")
        return Group(table, self._bars) if table.row_count else Group(self._bars)


def duration(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
