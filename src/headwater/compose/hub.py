"""LoRAHub (arXiv 2307.13269, COLM 2024): one weight per adapter, searched without gradients on a few examples.

    A(w) = sum_i w_i A_i,  B(w) = sum_i w_i B_i,  dW(w) = s B(w) A(w),  w in [-1.5, 1.5]^N
    J(w) = mean over the examples' completion tokens of -log p + 0.05 sum_i |w_i|

The result is one plain adapter. Factors are added, not updates, so dW has cross terms, dW(-w) = dW(w), and w = 0, where
the search starts, is a flat point: what the search finds depends on its first jumps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..data.encode import Encoded
from ..errors import HeadwaterError, Problem
from . import ranges
from .adapter import Adapter
from .merge import fuse, require_one_shape
from .mixed import PooledModel
from .pool import AdapterPool
from .saved import write_fitted

KIND = "hub"
Loss = Callable[[nn.Module, Sequence[Encoded]], float]
"""What a search lowers: a number made of the model, a composed adapter on it, and the rows that were drawn."""
BOX = 1.5


@dataclass(frozen=True)
class HubSpec:
    """How weights are searched.

    Args:
        examples: most rows to search on, drawn at random; 5 in the paper.
        budget: evaluations of J.
        optimiser: a name in nevergrad's registry. `NGOpt`, the authors' choice, picks another optimiser itself (the
            result says which; at this budget Cobyla, not the CMA-ES that the paper names).
        penalty: `paper` is J above; `official` what the authors' code computes, the mean token loss divided by the
            number of examples, plus 0.05 times the *mean* of |w|.
        seed: of the examples and the search. Cobyla draws nothing.

    Raises:
        HeadwaterError: naming everything that is out of range.
    """

    examples: int = 5
    budget: int = 40
    optimiser: str = "NGOpt"
    penalty: Literal["paper", "official"] = "paper"
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.require(
            self,
            {
                "examples": ranges.at_least(1, self.examples),
                "budget": ranges.at_least(1, self.budget),
                "penalty": ranges.one_of(("paper", "official"), self.penalty),
                "seed": ranges.seed(self.seed),
            },
        )


@dataclass(frozen=True)
class HubResult:
    """What a search found.

    Args:
        weights: adapter -> weight, those of the smallest J that was seen.
        adapter: the adapters with these weights, as one.
        objective: that J.
        optimiser: the one that really ran.
        evaluations: weights, loss (mean -log p, in nats, or what the search was given) and J of every evaluation, in
            order; J is 1e9 where the loss is not finite.
    """

    weights: dict[str, float]
    adapter: Adapter
    objective: float
    optimiser: str
    evaluations: list[dict[str, Any]]

    def save(self, folder: str | Path, pool: AdapterPool, **fields: Any) -> None:
        """Write the record of the search, `hub.json`, and the adapter, which PEFT loads from the same folder."""
        record = {"weights": self.weights, "objective": self.objective, "optimiser": self.optimiser}
        kept = {**record, "evaluations": self.evaluations, **fields}
        write_fitted(folder, KIND, pool, list(self.weights), kept, adapter=self.adapter)


def compose(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The adapters' factors with these weights, as one adapter.

    Raises:
        HeadwaterError: layers, ranks or scalings differ between the adapters.
    """
    require_one_shape(adapters, "LoRAHub adds adapters factor by factor; choose adapters of one shape with --adapter")
    return fuse(adapters, weights, "hub")


def search(
    pooled: PooledModel,
    names: Sequence[str],
    rows: Sequence[Encoded],
    pad_token_id: int,
    spec: HubSpec,
    *,
    loss: Loss | None = None,
    progress: Callable[[int, int, float], None] = lambda done, budget, best: None,
) -> HubResult:
    """Search the weights.

    Args:
        names: the adapters.
        rows: encoded rows; `spec.examples` of them are used.
        loss: to lower instead of the mean of -log p over the rows' completion tokens, e.g. 1 - accuracy. The penalty is
            added to it as to that. It is called without gradients, in eval mode.
        progress: called after each evaluation with its number, the budget and the best J so far.

    Raises:
        HeadwaterError: nevergrad is missing or does not know the optimiser, there are no rows or adapters, adapters are
            named twice or differ in layers, ranks or scalings, or no loss is finite.
    """
    from ..evaluation.forward import evaluating

    if not names:
        raise HeadwaterError(Problem("there are no adapters to compose"))
    ranges.require_once(names)
    optimiser = _optimiser(len(names), spec)
    if not rows:
        raise HeadwaterError(Problem("there are no rows to search on"))
    adapters = [pooled.adapter(name) for name in names]
    compose(adapters, [0.0] * len(adapters))  # refuses adapters that do not fit before anything is run
    draw = torch.Generator().manual_seed(spec.seed)
    chosen = [rows[i] for i in torch.randperm(len(rows), generator=draw)[: spec.examples].tolist()]
    loss = loss or functools.partial(_mean_loss, pad_token_id=pad_token_id)
    evaluations: list[dict[str, Any]] = []
    with evaluating(pooled.model):
        for done in range(1, spec.budget + 1):
            asked = optimiser.ask()
            weights = [float(w) for w in asked.value]
            with pooled.all_rows(compose(adapters, weights)):
                value = float(loss(pooled.model, chosen))
            objective = _objective(value, weights, len(chosen), spec.penalty)
            if not np.isfinite(objective):
                objective = 1e9
            optimiser.tell(asked, objective)
            evaluations.append({"weights": weights, "loss": value, "objective": objective})
            best = min(evaluations, key=lambda e: (not np.isfinite(e["loss"]), e["objective"]))
            progress(done, spec.budget, best["objective"])
    if not np.isfinite(best["loss"]):
        raise HeadwaterError(Problem("no weights that were tried gave a finite loss", fix="check the adapters"))
    resolved = getattr(optimiser, "optim", optimiser)
    result = compose(adapters, best["weights"])
    found_weights = dict(zip(names, best["weights"], strict=True))
    return HubResult(found_weights, result, best["objective"], f"{spec.optimiser} -> {resolved.name}", evaluations)


def _mean_loss(model: nn.Module, rows: Sequence[Encoded], pad_token_id: int) -> float:
    from ..evaluation.likelihood import completion_losses

    ids, labels = [row.input_ids for row in rows], [row.labels for row in rows]
    found = completion_losses(model, ids, labels, fill=pad_token_id, batch_size=len(rows))
    return sum(total for total, _ in found) / max(1, sum(count for _, count in found))


def _objective(loss: float, weights: Sequence[float], examples: int, penalty: str) -> float:
    size = sum(abs(w) for w in weights)
    if penalty == "official":
        return loss / examples + 0.05 * size / len(weights)
    return loss + 0.05 * size


def _optimiser(dimensions: int, spec: HubSpec) -> Any:
    try:
        import nevergrad
    except ImportError:
        what = "LoRAHub's search needs the nevergrad package"
        raise HeadwaterError(Problem(what, fix="pip install 'headwater[pool]'")) from None
    if spec.optimiser not in nevergrad.optimizers.registry:
        raise HeadwaterError(Problem(f"nevergrad has no optimiser {spec.optimiser!r}", "optimiser", "NGOpt, CMA, ..."))
    space = nevergrad.p.Array(init=np.zeros(dimensions), lower=-BOX, upper=BOX)
    space.random_state.seed(spec.seed)
    return nevergrad.optimizers.registry[spec.optimiser](space, budget=spec.budget, num_workers=1)
