"""Watches the gates of a model in training: numbers for the log, and words when experts die or heads stay the same."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..analysis.gates import DEAD_BELOW, GateRecorder, GateStatistics, GateSums, added, statistics_of
from ..analysis.weights import heads
from ..tuner import MethodLayer, is_adapted

GATE_ENTROPY, LOAD_ENTROPY, DEAD_EXPERTS = METRICS = ("gate_entropy", "load_entropy", "dead_experts")

LOW_LOAD_ENTROPY = 0.5
SAME_COSINE = 0.9999
LOOK_BACK = 50  # optimiser steps that a warning is about: fewer hold too few rows for gates that are one per row
_EVERY = 4  # optimiser steps from one that is recorded to the next
_VALUES = 2048  # of a layer's gates in a recorded batch: 682 tokens of 3 heads, 32 of 64
_LAYERS_NAMED = 5


class GateMonitor:
    """Records gates in the first batch of every fourth optimiser step, and of the first one after each log.

    It looks at forwards that run anyway and, between logs, never waits for an accelerator. Over several ranks, all
    ranks' batches count.

    Args:
        model: with an adapter of headwater's; one without gates costs nothing and gives no numbers.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._recorder = GateRecorder(model, values_per_layer=_VALUES, of_training=True)
        self._just_logged = True
        self._sums: GateSums = {}  # since the last look back
        self._looked_at: int | None = None
        self._said: set[tuple[str, str, int]] = set()

    def step_begins(self, step: int) -> None:
        """Called when `step` optimiser steps are done and the next one's first batch comes."""
        if self._looked_at is None:
            self._looked_at = step
        if self._just_logged or step % _EVERY == 0:
            self._recorder.start()
            self._just_logged = False

    def batch_ends(self) -> None:
        """Called after each batch's forward and backward."""
        self._recorder.stop()

    def close_window(self) -> dict[str, float]:
        """Means over layers of both entropies, and the number of dead experts, since the last call, which every rank
        makes. Empty when no gate was seen.
        """
        window = self._recorder.take()
        self._just_logged = True
        if not window:
            return {}
        self._sums = added([self._sums, window])
        gates = statistics_of(window).values()
        return {
            GATE_ENTROPY: sum(g.gate_entropy for g in gates) / len(gates),
            LOAD_ENTROPY: sum(g.load_entropy for g in gates) / len(gates),
            DEAD_EXPERTS: float(sum(len(g.dead()) for g in gates)),
        }

    def look_back(self, step: int) -> str | None:
        """What has collapsed since the last look, `LOOK_BACK` steps ago or more, and was not said before; else None."""
        if self._looked_at is None or step - self._looked_at < LOOK_BACK:
            return None
        steps, self._looked_at = step - self._looked_at, step
        gates, self._sums = statistics_of(self._sums), {}
        same = same_heads(self._model, gates)
        said = {name: words for name in {**gates, **same} if (words := self._words(name, gates, same))}
        if not said:
            return None
        shown = [f"{name}: {words}" for name, words in list(said.items())[:_LAYERS_NAMED]]
        rest = f"; and {len(said) - _LAYERS_NAMED} more layers" if len(said) > _LAYERS_NAMED else ""
        layers = f"{len(said)} layers have" if len(said) > 1 else "1 layer has"
        return (
            f"step {step}: {layers} collapsed gates or heads in the last {steps} steps. {'; '.join(shown)}{rest}. "
            "docs/gates.md says what helps"
        )

    def _words(self, name: str, gates: dict[str, GateStatistics], same: dict[str, list[int]]) -> str:
        words = []
        if name in gates:
            load, dead = gates[name].relative_load, self._new("dead", name, gates[name].dead())
            if dead:
                most = load[dead].max().item()
                words.append(f"{_heads(dead)} at most {most:.1%} of an equal load (dead below {DEAD_BELOW:.0%})")
            entropy = gates[name].load_entropy
            if entropy < LOW_LOAD_ENTROPY and self._new("few", name, [0]):
                words.append(f"most of the load goes to head {int(load.argmax()) + 1} (load entropy {entropy:.2f})")
        if alike := self._new("same", name, same.get(name, [])):
            words.append(f"{_heads(alike)} the same weights and gates as another")
        return ", ".join(words)

    def _new(self, kind: str, name: str, which: list[int]) -> list[int]:
        new = [n for n in which if (kind, name, n) not in self._said]
        self._said |= {(kind, name, n) for n in new}
        return new


def _heads(which: list[int]) -> str:
    shown = ", ".join(str(n + 1) for n in which[:6]) + (f" and {len(which) - 6} more" if len(which) > 6 else "")
    return f"head {shown} has" if len(which) == 1 else f"heads {shown} have"


@torch.no_grad()
def same_heads(model: nn.Module, gates: dict[str, GateStatistics]) -> dict[str, list[int]]:
    """Layer -> heads, counted from 0, that another head of the layer equals: up-projections of cosine above 0.9999
    behind equal mean gates. Such heads get the same gradients, so they will not part. Heads that are zero count not.

    Args:
        gates: statistics by layer; a layer without gates mixes its heads equally.
    """
    layer = next((m for m in model.modules() if isinstance(m, MethodLayer)), None)
    cosines: dict[str, Tensor] = {}
    for name, held in heads(model, layer.active_adapters[0]).items() if layer is not None else ():
        N = len(held.B) if held.B.dim() == 3 and held.B.numel() else 0  # sharded parameters may be away
        if N > 1 and (name not in gates or len(gates[name].load) == N):
            unit = F.normalize(held.B.detach().flatten(1).float(), dim=1)
            cosines[name] = unit @ unit.T
    found = {}
    for name, cosine in cosines.items():
        alike = cosine.cpu() > SAME_COSINE
        if name in gates:
            gate = gates[name].mean_gate
            alike &= (gate.unsqueeze(0) - gate.unsqueeze(1)).abs() < 1e-4 * gate.abs().mean()
        which = alike.fill_diagonal_(False).any(1).nonzero().squeeze(1).tolist()
        if which:
            found[name] = which
    return found


class GateCallback(TrainerCallback):
    """Adds `gate_entropy`, `load_entropy` and `dead_experts` to each log of the loss, and warns once of each collapse.

    See `GateMonitor`. A model without gates has neither; nor has one under `torch_compile` or DataParallel.
    """

    def __init__(self) -> None:
        self.gates: GateMonitor | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self.close()
        # DataParallel runs replicas in threads, whose gates would come in at once and out of order.
        if model is not None and is_adapted(model) and not args.torch_compile and args.n_gpu <= 1:
            self.gates = GateMonitor(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.gates is not None:
            self.gates.step_begins(state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.gates is not None:
            self.gates.batch_ends()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.gates is not None:
            self.gates.batch_ends()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.gates is None or logs is None or "loss" not in logs:
            return
        if GATE_ENTROPY not in logs:  # HeadwaterTrainer puts them there before any callback sees the log
            metrics = self.gates.close_window()
            logs.update(metrics)
            state.log_history[-1].update(metrics)
        message = self.gates.look_back(state.global_step)
        if message is not None and state.is_world_process_zero:
            warnings.warn(message, stacklevel=2)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops watching."""
        if self.gates is not None:
            self.gates.batch_ends()
            self.gates = None
