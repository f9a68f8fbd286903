"""How alike the heads of a model in training are, for the log."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..analysis.weights import heads
from ..tuner import MethodLayer

HEAD_SIMILARITY, HEAD_UPDATE_SIMILARITY = HEAD_METRICS = ("head_similarity", "head_update_similarity")


class HeadMonitor:
    """Measures how alike heads are: the cosine between the up-projections of two heads as flat vectors, averaged over
    all pairs of different heads and over layers. A layer with a head that is zero has none yet and is left out.

    Two numbers, as heads that start at random are unlike before they have learnt anything:

    - `head_similarity`: of the up-projections B_i themselves, as in the figures of R-LoRA (2502.15455);
    - `head_update_similarity`: of B_i minus what B_i was when the monitor was made. For HydraLoRA, whose heads start at
      zero, the two are the same number; for R-LoRA only the second says whether heads learn different things. What
      R-LoRA subtracts to start as the base model, the mean of its heads at the start, is in neither.

    Args:
        model: with an adapter, as it starts; where its heads do not start at zero, a copy of them is kept. Methods
            without heads, or with one, have no numbers.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._start = {name: B.clone() for name, B in self._up_projections() if B.any()}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Both numbers now. The host waits for the device once; the work is small beside a training step's."""
        whole, updates = [], []
        for name, B in self._up_projections():
            whole.append(mean_cosine(B))
            updates.append(mean_cosine(B - self._start[name]) if name in self._start else whole[-1])
        if not whole:
            return {}
        measured = torch.stack([torch.stack(whole), torch.stack(updates)]).tolist()
        known = {
            name: [v for v in values if math.isfinite(v)] for name, values in zip(HEAD_METRICS, measured, strict=True)
        }
        return {name: sum(values) / len(values) for name, values in known.items() if values}

    def _up_projections(self) -> Iterator[tuple[str, Tensor]]:
        """Layer name, `[N, d_out, r]` with N > 1."""
        layer = next((m for m in self._model.modules() if isinstance(m, MethodLayer)), None)
        for name, held in heads(self._model, layer.active_adapters[0]).items() if layer is not None else ():
            if held.B.dim() == 3 and len(held.B) > 1 and held.B.numel():  # sharded parameters may be away
                yield name, held.B.detach()


def mean_cosine(heads: Tensor) -> Tensor:
    """The mean cosine between different heads `[N, ...]`, N > 1, as flat vectors; NaN if one of them is zero.

    The squared length of the sum of N unit vectors is N plus all cosines between different ones.
    """
    N = len(heads)
    unit = F.normalize(heads.flatten(1).float(), dim=1, eps=1e-30)
    mean = (unit.sum(0).square().sum() - N) / (N * (N - 1))
    return torch.where(unit.any(1).all(), mean, torch.nan)
