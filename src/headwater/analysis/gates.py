"""What gates do: load, entropy and dead experts, from any forwards of any method that shows its gates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..methods.base import Branch
from ..methods.call import Call, State
from ..tuner import MethodLayer, context_of

DEAD_BELOW = 0.1
"""An expert is dead when its load is below this share of an equal load."""
_MOST_PENDING = 1 << 22  # gate values held until they are summed up together: 16 MiB


@dataclass(frozen=True)
class GateStatistics:
    """One layer's gates over some tokens. A token's gate g is read as shares `p_n = |g_n| / sum |g|`.

    Args:
        tokens: how many were counted; padding is not.
        top_k: the most experts that any token used, its gate for them not being 0; N for soft gates.
        mean_gate: float64 `(N,)`, mean of g.
        load: float64 `(N,)`: of top-k gates, the share of tokens that use the expert; of soft gates, the mean of p.
        relative_load: float64 `(N,)`: load over its mean, so 1 is an equal load whatever k is.
        gate_entropy: mean over tokens of p's entropy over log N: 0 when each token uses one expert, 1 when each uses
            all equally. At most log k / log N for top-k gates.
        load_entropy: entropy over log N of how the load spreads over experts: 1 when equal, 0 when one expert gets all.
            Unlike `gate_entropy` it stays high when every token is sure of its expert but tokens differ.
    """

    tokens: int
    top_k: int
    mean_gate: Tensor
    load: Tensor
    relative_load: Tensor
    gate_entropy: float
    load_entropy: float

    def dead(self, below: float = DEAD_BELOW) -> list[int]:
        """The experts, counted from 0, whose load is below `below` times an equal one."""
        return [n for n, load in enumerate(self.relative_load.tolist()) if load < below]

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        return {
            "tokens": self.tokens,
            "top_k": self.top_k,
            "load": self.load.tolist(),
            "mean_gate": self.mean_gate.tolist(),
            "gate_entropy": self.gate_entropy,
            "load_entropy": self.load_entropy,
            "dead_experts": self.dead(),
        }


GateSums = dict[str, tuple[Tensor, float]]
"""Layer -> sums over tokens of g, p, [g is not 0], p's entropy and 1, float64 `(3 N + 2,)`, and the most experts that a
token used. What `GateStatistics` are made of; unlike those they can be added up."""


def added(parts: Iterable[GateSums]) -> GateSums:
    """The sums over the tokens of all parts."""
    whole: GateSums = {}
    for part in parts:
        for name, (row, most) in part.items():
            before = whole.get(name)
            whole[name] = (row, most) if before is None else (before[0] + row, max(before[1], most))
    return whole


def statistics_of(sums: GateSums) -> dict[str, GateStatistics]:
    """The statistics of every layer that saw a token."""
    by_width: dict[int, list[str]] = {}
    for name, (row, _) in sums.items():
        if row[-1] > 0:
            by_width.setdefault(len(row), []).append(name)
    found = {}
    for width, names in by_width.items():  # all layers with as many experts at once
        N = (width - 2) // 3
        rows = torch.stack([sums[name][0] for name in names])
        most = torch.tensor([sums[name][1] for name in names])
        mean_gate, share, selected = (rows[:, :-2] / rows[:, -1:]).chunk(3, dim=1)
        load = torch.where((most < N).unsqueeze(1), selected, share)
        relative = load / load.mean(1, keepdim=True).clamp_min(torch.finfo(load.dtype).tiny)
        gate_entropy = _over_log(rows[:, -2] / rows[:, -1], N)
        load_entropy = _over_log(torch.special.entr(relative / N).sum(1), N)
        numbers = zip(rows[:, -1].tolist(), most.tolist(), gate_entropy.tolist(), load_entropy.tolist(), strict=True)
        for n, (name, (tokens, k, of_gates, of_load)) in enumerate(zip(names, numbers, strict=True)):
            found[name] = GateStatistics(round(tokens), int(k), mean_gate[n], load[n], relative[n], of_gates, of_load)
    return {name: found[name] for name in sums if name in found}


def _over_log(entropy: Tensor, N: int) -> Tensor:
    return (entropy / math.log(N)).clamp(0, 1) if N > 1 else torch.ones_like(entropy)


class GateRecorder:
    """Sums up the gates of every adapted layer in every forward that runs inside.

        with GateRecorder(model) as recorder:
            model(**batch)
        recorder.statistics()["model.layers.0.mlp.up_proj"].load

    Padding is left out where the forward has a 2-D attention mask and the layer sees tokens in the model's order.
    Nothing waits for an accelerator before `statistics` or `take`. Recomputation under gradient checkpointing does not
    count. In compiled code nothing is recorded.

    Args:
        model: a model with an adapter of headwater's.
        values_per_layer: at most about so many gate values of a layer in one forward are counted, of tokens evenly
            spread over the batch; all by default.
        of_training: count only forwards in training mode of the adapters that are active at the start, and so neither
            evaluations and sampling in the middle of training nor a reference adapter.

    Raises:
        HeadwaterError: if the model has no such adapter; in the forward, if several active ones show gates.
    """

    def __init__(self, model: nn.Module, *, values_per_layer: int | None = None, of_training: bool = False):
        self._context = context_of(model)
        self._layers = {module.name: module for module in model.modules() if isinstance(module, MethodLayer)}
        self._shown: tuple[State | None, set[str]] = (None, set())  # a forward and the layers that showed a gate in it
        self._limit, self._of_training = values_per_layer, of_training
        self._active: dict[str, list[str]] = {}
        self._recording = False
        self._state: State | None = None
        self._forwards = 0
        # (size of a layer's gates, device) -> their layers, gates `(tokens, N)` and which tokens count
        self._pending: dict[Any, tuple[list[str], list[Tensor], Tensor | None]] = {}
        self._pending_values = 0
        self._sums: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}  # layers -> `(L, 3 N + 2)`, `(L,)`

    def start(self) -> None:
        """Begins, or goes on, to record; harmless while it does."""
        if not self._recording:
            self._active = {name: list(layer.active_adapters) for name, layer in self._layers.items()}
            self._context.observers.append(self._see)
            self._recording = True

    def stop(self) -> None:
        """Stops recording; what was recorded stays."""
        if self._recording:
            self._context.observers.remove(self._see)
            self._recording = False
            self._shown = (None, set())
            self._sum_up()

    def __enter__(self) -> GateRecorder:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def statistics(self) -> dict[str, GateStatistics]:
        """What was recorded, by layer; empty when no layer showed a gate."""
        return statistics_of(self._by_layer())

    def take(self) -> GateSums:
        """What was recorded, by all ranks of a distributed run, and forgets it. Every rank must call it."""
        sums = self._by_layer()
        self._sums = {}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, sums)  # by name: behind a token dispatch, a rank may lack a layer
            sums = added(parts)
        return sums

    def _by_layer(self) -> GateSums:
        self._sum_up()
        return added(
            {name: (row, most)}
            for names, (sums, k) in self._sums.items()
            for name, row, most in zip(names, sums.double().cpu(), k.tolist(), strict=True)
        )

    def _see(self, name: str, gate: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        layer = self._layers.get(name)
        if self._of_training and layer and not (layer.training and layer.active_adapters == self._active[name]):
            return
        state = self._context.state
        if state is not self._shown[0]:
            self._shown = (state, set())
        if name in self._shown[1] and layer and len(layer.active_adapters) > 1:
            raise HeadwaterError(  # a layer that a model runs at several depths shows its gate again, too, and is fine
                Problem(
                    f"{name} shows the gates of several active adapters, whose statistics would be mixed",
                    fix="record them one after another, each made active by model.set_adapter(name)",
                )
            )
        self._shown[1].add(name)
        if state is not self._state:
            self._sum_up()
            self._state, self._forwards = state, self._forwards + 1
        valid = None if state is None else state.valid
        flat = gate.reshape(-1, gate.shape[-1])
        if valid is not None:
            # A layer behind a token dispatch sees tokens in an order of its own; all of them count there.
            valid = valid.reshape(-1) if valid.numel() == len(flat) else None
        if self._limit is not None and flat.numel() > self._limit:
            stride = min(-(-flat.numel() // self._limit), len(flat))
            every = slice(self._forwards % stride, None, stride)
            flat = flat[every].clone()  # a view would keep the whole gate alive
            valid = None if valid is None else valid[every]
        names, gates, _ = self._pending.setdefault((flat.shape, flat.device), ([], [], valid))
        names.append(name)
        gates.append(flat)
        self._pending_values += flat.numel()
        if self._pending_values > _MOST_PENDING:
            self._sum_up()

    def _sum_up(self) -> None:
        # All layers at once: a handful of operations for a forward, however deep the model.
        for names, gates, valid in self._pending.values():
            sums, most = _sums(torch.stack(gates), valid)
            before = self._sums.get(tuple(names))
            self._sums[tuple(names)] = (
                (sums, most) if before is None else (before[0] + sums, torch.maximum(before[1], most))
            )
        self._pending, self._pending_values, self._state = {}, 0, None


def _sums(gates: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """From gates `(L, tokens, N)`: per layer sums of g, p and [g is not 0], of p's entropy, and the number of tokens,
    `(L, 3 N + 2)`; and the most experts that a token used, `(L,)`.
    """
    g = gates.to(torch.float32 if gates.device.type == "mps" else torch.float64)
    weight = g.new_ones(g.shape[1]) if valid is None else valid.to(g)
    used = (g != 0).to(g)
    p = g.abs()
    p = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    sums = (
        *(torch.einsum("ltn,t->ln", each, weight) for each in (g, p, used)),
        (torch.special.entr(p).sum(-1) @ weight).unsqueeze(1),
        weight.sum().expand(len(g), 1),
    )
    return torch.cat(sums, dim=1), (used.sum(-1) * weight).amax(-1) if g.shape[1] else g.new_zeros(len(g))


@torch.no_grad()
def shows_gates(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether the adapter has gates to observe. Asked of its branches themselves, with one zero token.

    The adapter's tensors must be there; the base model's need not.
    """
    seen: list[str] = []
    for module in model.modules():
        if isinstance(module, MethodLayer) and adapter_name in module.branches:
            branch: Branch = module.branch(adapter_name)
            device = next((t.device for t in (*branch.parameters(), *branch.buffers())), torch.device("cpu"))
            state = State(1, 1, task_ids=torch.zeros(1, dtype=torch.long, device=device))
            call = Call(module.name, (1, 1), state, [lambda name, gate: seen.append(name)])
            x = torch.zeros(1, module.in_features, device=device)
            training, branch.training = branch.training, False
            try:
                branch(torch.zeros(1, module.out_features, device=device), x, call)
            finally:
                branch.training = training
            if seen:
                return True
    return False
