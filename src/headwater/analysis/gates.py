"""What gates do: load, entropy and dead experts, from any forwards of any method that shows its gates."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import Branch
from ..methods.call import Call, State
from ..tuner import MethodLayer, context_of, observe

DEAD_BELOW = 0.1
"""An expert is dead when its load is below this share of an equal load."""
_MOST_PENDING = 1 << 22  # gate values held until they are summed up together: 16 MiB


@dataclass(frozen=True)
class GateStatistics:
    """One layer's gates over some tokens. A token's gate is read as shares `p_n = |g_n| / sum |g|`.

    Args:
        tokens: how many were counted; padding is not.
        mean_gate: float64 `(N,)`, mean of g.
        share: float64 `(N,)`, mean of p; adds up to 1.
        selected: float64 `(N,)`, share of tokens whose gate for the expert is not 0.
        top_k: the most experts that any token used; N for soft gates.
        gate_entropy: mean over tokens of p's entropy over log N: 0 when each token uses one expert, 1 when each uses
            all equally. At most log k / log N for top-k gates.
    """

    tokens: int
    mean_gate: Tensor
    share: Tensor
    selected: Tensor
    top_k: int
    gate_entropy: float

    @property
    def load(self) -> Tensor:
        """float64 `(N,)`: of top-k gates, the share of tokens that select the expert; of soft gates, its mean share."""
        return self.selected if self.top_k < len(self.selected) else self.share

    @property
    def relative_load(self) -> Tensor:
        """float64 `(N,)`: load over the mean load, so 1 is an equal load whatever k is."""
        return self.load / self.load.mean().clamp_min(torch.finfo(torch.float64).tiny)

    @property
    def load_entropy(self) -> float:
        """Entropy over log N of how the load spreads over experts: 1 when equal, 0 when one expert gets all.

        Unlike `gate_entropy` it stays high when every token is sure of its expert but tokens differ.
        """
        return _over_log(torch.special.entr(self.relative_load / len(self.load)).sum().item(), len(self.load))

    def dead(self, below: float = DEAD_BELOW) -> list[int]:
        """The experts, counted from 0, whose load is below `below` times an equal one."""
        return (self.relative_load < below).nonzero().squeeze(1).tolist()

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


def combined(parts: Sequence[GateStatistics]) -> GateStatistics:
    """The statistics over the tokens of all parts, which are of one layer."""
    weights = torch.tensor([part.tokens for part in parts], dtype=torch.float64)
    weights = weights / weights.sum()

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.tensordot(weights, torch.stack(list(values)), 1)

    return GateStatistics(
        sum(part.tokens for part in parts),
        mean([part.mean_gate for part in parts]),
        mean([part.share for part in parts]),
        mean([part.selected for part in parts]),
        max(part.top_k for part in parts),
        sum(w * part.gate_entropy for w, part in zip(weights.tolist(), parts, strict=True)),
    )


class GateRecorder:
    """Sums up the gates of every adapted layer in every forward that runs inside.

        with GateRecorder(model) as recorder:
            model(**batch)
        recorder.statistics()["model.layers.0.mlp.up_proj"].load

    Padding is left out where the forward has a 2-D attention mask and the layer sees tokens in the model's order.
    Nothing waits for an accelerator before `statistics`, and recomputation under gradient checkpointing does not count.
    In compiled code nothing is recorded.

    Args:
        model: a model with an adapter of headwater's.
        tokens_per_forward: at most about so many tokens of a forward are counted, evenly spread over the batch; all by
            default.

    Raises:
        HeadwaterError: if the model has no such adapter.
    """

    def __init__(self, model: nn.Module, *, tokens_per_forward: int | None = None):
        self._model, self._context = model, context_of(model)
        self._limit = tokens_per_forward
        self._watching: contextlib.ExitStack | None = None
        self._state: State | None = None
        self._forwards = 0
        # (size of a layer's gates, device) -> their layers, gates `(tokens, N)` and which tokens count
        self._pending: dict[Any, tuple[list[str], list[Tensor], Tensor | None]] = {}
        self._pending_values = 0
        self._sums: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}  # layers -> `(L, 3 N + 2)`, `(L,)`

    def start(self) -> None:
        """Begins, or goes on, to record; harmless while it does."""
        if self._watching is None:
            self._watching = contextlib.ExitStack()
            self._watching.enter_context(observe(self._model, self._see))

    def stop(self) -> None:
        """Stops recording; what was recorded stays."""
        if self._watching is not None:
            self._watching.close()
            self._watching = None
            self._sum_up()

    def __enter__(self) -> GateRecorder:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def clear(self) -> None:
        """Forgets what was recorded."""
        self._pending, self._pending_values, self._sums = {}, 0, {}

    def statistics(self, *, over_ranks: bool = False) -> dict[str, GateStatistics]:
        """What was recorded, by layer; empty when no layer showed a gate.

        Args:
            over_ranks: add up what all ranks of a distributed run recorded; every rank must call it.
        """
        self._sum_up()
        together = over_ranks and torch.distributed.is_available() and torch.distributed.is_initialized()
        rows: dict[str, tuple[Tensor, int]] = {}
        for names, (sums, most) in self._sums.items():
            if together:
                sums, most = sums.clone(), most.clone()
                torch.distributed.all_reduce(sums)
                torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            for name, row, k in zip(names, sums.double().cpu(), most.tolist(), strict=True):
                before, at_most = rows.get(name, (torch.zeros_like(row), 0))
                rows[name] = (before + row, max(at_most, int(k)))
        return {name: _statistics(row, k) for name, (row, k) in rows.items() if row[-1] > 0}

    def _see(self, name: str, gate: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        state = self._context.state
        if state is not self._state:
            self._sum_up()
            self._state, self._forwards = state, self._forwards + 1
        valid = None if state is None else state.valid
        flat = gate.reshape(-1, gate.shape[-1])
        if valid is not None:
            # A layer behind a token dispatch sees tokens in an order of its own; all of them count there.
            valid = valid.reshape(-1) if valid.numel() == len(flat) else None
        if self._limit is not None and len(flat) > self._limit:
            stride = -(-len(flat) // self._limit)
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
    p = g.abs() / g.abs().sum(-1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    used = (g != 0).to(g)
    each = torch.cat([g, p, used, torch.special.entr(p).sum(-1, keepdim=True), torch.ones_like(g[..., :1])], dim=-1)
    most = (used.sum(-1) * weight).amax(-1) if g.shape[1] else g.new_zeros(len(g))
    return torch.einsum("ltk,t->lk", each, weight), most


def _statistics(row: Tensor, top_k: int) -> GateStatistics:
    tokens, entropy = row[-1], row[-2]
    mean_gate, share, selected = (row[:-2] / tokens).chunk(3)
    return GateStatistics(
        round(tokens.item()), mean_gate, share, selected, top_k, _over_log((entropy / tokens).item(), len(share))
    )


def _over_log(entropy: float, N: int) -> float:
    return min(max(entropy / math.log(N), 0.0), 1.0) if N > 1 else 1.0


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
