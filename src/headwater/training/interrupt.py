"""Ctrl-C during training: finish the step, save a checkpoint, stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback


class SaveOnInterrupt(TrainerCallback):
    """While training runs, the first Ctrl-C ends it after the current step with a checkpoint; a second ends it at once.

    Ranks would not stop at the same step, so a run over several is interrupted as usual.
    """

    def __init__(self) -> None:
        self.asked = False
        self._saved: int | None = None  # the step of the last checkpoint
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread() and PartialState().num_processes == 1:
            self._before = signal.signal(signal.SIGINT, self._ask)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = self._saved != state.global_step
            control.should_training_stop = True
            control.should_evaluate = False

    # It comes after an epoch's last step and where training stops within one, and is when `eval_strategy: epoch` and
    # `save_strategy: epoch` ask. The step is saved by then, unless Ctrl-C came too late for it, as in its evaluation.
    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = state.global_step

    def release(self) -> None:
        """Gives Ctrl-C back its meaning.

        Raises:
            KeyboardInterrupt: if training ended because of it.
        """
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
        if self.asked:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
