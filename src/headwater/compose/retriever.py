"""Finding the adapters for a text: LoraRetriever (arXiv 2402.09997, ACL Findings 2024).

    E(phi)    = mean of E(I + x) over a few texts x of adapter phi's kind          sec. 3.2
    s(x, phi) = cos(E(I + x), E(phi))
    Phi(x)    = the k adapters with the largest s(x, phi)

What is found is then put to a batch as `PooledModel.rows` takes it: selection (k = 1), mixture (the outputs' mean) or
fusion (the factors' mean; `fused=True`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import HeadwaterError, Problem
from .encoder import PROMPT

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from .pool import AdapterPool

Found = list[tuple[str, float]]
"""Adapters and their scores for one text, best first."""


class Retriever:
    """Scores adapters for texts.

    Args:
        encoder: a sentence encoder, from `load_encoder`; its prompt "retrieval" is put before every text.
        samples: adapter name -> texts of the kind that it was trained on. One without texts cannot be found.

    Attributes:
        names: the adapters that can be found.
        keys: `(adapters, d)` float32, of norm 1.

    Raises:
        HeadwaterError: no adapter has sample texts.
    """

    def __init__(self, encoder: SentenceTransformer, samples: Mapping[str, Sequence[str]]):
        self.encoder = encoder
        found = {name: texts for name, texts in samples.items() if texts}
        if not found:
            fix = "add adapters with sample texts: headwater pool add --samples FILE"
            raise HeadwaterError(Problem("no adapter has sample texts, by which retrieval could find it", fix=fix))
        self.names = list(found)
        embedded = self.encode([text for texts in found.values() for text in texts])
        parts = embedded.split([len(texts) for texts in found.values()])
        self.keys = F.normalize(torch.stack([part.mean(0) for part in parts]), dim=-1)

    @classmethod
    def of(cls, pool: AdapterPool, encoder: SentenceTransformer) -> Retriever:
        """A retriever of a pool's adapters."""
        return cls(encoder, {name: entry.samples for name, entry in pool.entries.items()})

    def encode(self, texts: Sequence[str]) -> Tensor:
        """`(texts, d)` float32, of norm 1."""
        prompt = self.encoder.prompts.get(PROMPT) or None
        found: Any = self.encoder.encode(list(texts), prompt=prompt, convert_to_tensor=True, show_progress_bar=False)
        return F.normalize(found.float().cpu(), dim=-1)

    def scores(self, texts: Sequence[str]) -> Tensor:
        """Cosines `(texts, adapters)`, in the order of `names`."""
        return self.encode(texts) @ self.keys.T

    def retrieve(
        self, texts: Sequence[str], k: int = 3, *, exclude: Sequence[Collection[str]] | None = None
    ) -> list[Found]:
        """The k best adapters of each text, best first; all of them where there are fewer.

        Args:
            exclude: per text, adapters that must not be found: its own task's, in the out-of-domain protocol.

        Raises:
            HeadwaterError: `k` is below 1, or `exclude` has another length than `texts`.
        """
        if k < 1:
            raise HeadwaterError(Problem(f"k is {k}, and at least one adapter has to be retrieved", "k"))
        if exclude is not None and len(exclude) != len(texts):
            raise HeadwaterError(Problem(f"{len(exclude)} sets of names for {len(texts)} texts", "exclude"))
        if not texts:
            return []
        found = []
        for row, values in enumerate(self.scores(texts).tolist()):
            barred = exclude[row] if exclude is not None else ()
            ranked = sorted(zip(self.names, values, strict=True), key=lambda pair: -pair[1])
            found.append([pair for pair in ranked if pair[0] not in barred][:k])
        return found


def mixtures(found: Sequence[Found], temperature: float | None = None) -> list[dict[str, float]]:
    """Weights for `PooledModel.rows`, summing to 1 in each row; a row for which nothing was found is empty.

    Args:
        temperature: None gives every adapter found the same weight, as in the paper; a number above 0 gives
            softmax(score / temperature).
    """
    rows = []
    for pairs in found:
        best = max((score for _, score in pairs), default=0.0)
        raw = {name: 1.0 if temperature is None else math.exp((s - best) / temperature) for name, s in pairs}
        total = sum(raw.values())
        rows.append({name: value / total for name, value in raw.items()})
    return rows
