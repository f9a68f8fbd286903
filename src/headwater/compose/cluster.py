"""Which adapters are alike, and so which tasks could share one: model-based clustering (MBC) of the Arrow paper.

    s(i, j)  = <dW_i, dW_j> / (|dW_i| |dW_j|)          dW: all layers' updates s B A, as one long vector
    clusters = k-means on the rows of s                                                     arXiv 2405.11157

No dW is formed: <B_i A_i, B_j A_j> is the sum of (B_i' B_j) * (A_i A_j'), r_i x r_j numbers. The authors' code compares
flattened factors, shortened by an SVD and made sparse. Factors of two adapters can differ where their updates do not,
(B R)(R^-1 A) = B A, and do so wherever trainings started differently; so updates are compared here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import HeadwaterError, Problem
from ..seeds import require_seed
from .adapter import Adapter
from .mixed import Stack


def similarity(adapters: Sequence[Adapter]) -> Tensor:
    """Cosines of the adapters' updates, `(adapters, adapters)` float64.

    Ranks, scalings and layers may differ. An adapter that changes nothing has 0 with all.
    """
    count = len(adapters)
    inner = torch.zeros(count, count, dtype=torch.float64)
    for layer in dict.fromkeys(layer for adapter in adapters for layer in adapter.layers):
        stack = Stack.of([(i, a.layers[layer]) for i, a in enumerate(adapters) if layer in a.layers])
        down, up, scale = stack.down.double(), stack.up.double(), stack.scale.double()
        member = F.one_hot(stack.owner, count).double() * scale.unsqueeze(1)
        inner += member.T @ ((down @ down.T) * (up @ up.T)) @ member
    lengths = inner.diagonal().clamp_min(0).sqrt()
    known = lengths > 0
    return torch.where(known.outer(known), inner / lengths.outer(lengths), 0.0).clamp(-1, 1)  # against rounding


def cluster(adapters: Sequence[Adapter], count: int, *, seed: int = 0) -> list[list[str]]:
    """Names of adapters that are alike, in clusters, in the order of their first members.

    Args:
        count: of clusters; 10 in the paper, for 256 tasks. Adapters that are the same stay together, so that there may
            be fewer.
        seed: of k-means' starts, of which the best of 10 is taken.

    Raises:
        HeadwaterError: scikit-learn is missing, `seed` is none, or `count` is not from 1 to the number of adapters.
    """
    require_seed(seed)
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
    except ImportError:
        what = "clustering needs the scikit-learn package"
        raise HeadwaterError(Problem(what, fix="pip install 'headwater[pool]'")) from None
    if not 1 <= count <= len(adapters):
        what = f"{len(adapters)} adapters cannot make {count} clusters"
        fix = f"give a number from 1 to {len(adapters)}" if adapters else "add adapters with headwater pool add"
        raise HeadwaterError(Problem(what, "clusters", fix))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different adapters than clusters
        labels = KMeans(count, n_init=10, random_state=seed).fit(similarity(adapters).numpy()).labels_
    found: dict[int, list[str]] = {}
    for adapter, label in zip(adapters, labels, strict=True):
        found.setdefault(int(label), []).append(adapter.name)
    return list(found.values())
