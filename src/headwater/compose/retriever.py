"""Finding the adapters for a text: LoraRetriever (arXiv 2402.09997, ACL Findings 2024).

    E(phi)    = mean of E(I + x) over a few texts x of adapter phi's kind          sec. 3.2
    s(x, phi) = cos(E(I + x), E(phi))
    Phi(x)    = the k adapters with the largest s(x, phi)

What is found is then put to a batch as `PooledModel.rows` takes it: selection (k = 1), mixture (the outputs' mean) or
fusion (the factors' mean; `fused=True`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import HeadwaterError, Problem
from ..files import NotWritten
from ..methods.files import write_tensors
from .encoder import PROMPT

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from .pool import AdapterPool

KEYS = "keys.safetensors"
"""A pool's keys as the encoder that was used last made them, by the digest of what they were made of."""

Found = list[tuple[str, float]]
"""Adapters and their scores for one text, best first."""


class Retriever:
    """Scores adapters for texts.

    Args:
        encoder: a sentence encoder, from `load_encoder`; its prompt "retrieval" is put before every text.
        samples: adapter name -> texts of the kind that it was trained on. One without texts cannot be found.
        known: keys that need not be made again.

    Attributes:
        names: the adapters that can be found.
        keys: `(adapters, d)` float32, of norm 1.

    Raises:
        HeadwaterError: no adapter has sample texts.
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        samples: Mapping[str, Sequence[str]],
        known: Mapping[str, Tensor] | None = None,
    ):
        self.encoder = encoder
        found = {name: texts for name, texts in samples.items() if texts}
        if not found:
            fix = "add adapters with sample texts: headwater pool add --samples FILE"
            raise HeadwaterError(Problem("no adapter has sample texts, by which retrieval could find it", fix=fix))
        self.names = list(found)
        keys = dict(known or {})
        new = {name: texts for name, texts in found.items() if name not in keys}
        if new:
            embedded = self.encode([text for texts in new.values() for text in texts])
            for name, part in zip(new, embedded.split([len(texts) for texts in new.values()]), strict=True):
                keys[name] = F.normalize(part.mean(0), dim=-1)
        self.keys = torch.stack([keys[name] for name in self.names])

    @classmethod
    def of(cls, pool: AdapterPool, encoder: SentenceTransformer) -> Retriever:
        """A retriever of a pool's adapters. Their keys are kept in the pool, for the next time."""
        samples = {name: entry.samples for name, entry in pool.entries.items()}
        made_by = _identity(encoder)
        digests = {
            name: hashlib.sha256(json.dumps([made_by, texts]).encode()).hexdigest() for name, texts in samples.items()
        }
        kept = _read_keys(pool.path / KEYS)
        found = cls(encoder, samples, {name: kept[d] for name, d in digests.items() if d in kept})
        now = {digests[name]: key for name, key in zip(found.names, found.keys, strict=True)}
        if now.keys() != kept.keys():
            _write_keys(pool.path / KEYS, now)
        return found

    def encode(self, texts: Sequence[str]) -> Tensor:
        """`(texts, d)` float32, of norm 1.

        Raises:
            HeadwaterError: `texts` is a single text, or the encoder gives numbers that are not finite.
        """
        if isinstance(texts, str):
            raise HeadwaterError(Problem(f"{texts!r} is one text, not a list of texts", "texts", "put it into a list"))
        prompt = self.encoder.prompts.get(PROMPT) or None
        found: Any = self.encoder.encode(list(texts), prompt=prompt, convert_to_tensor=True, show_progress_bar=False)
        vectors = found.float().cpu()
        if not vectors.isfinite().all():
            what = "the encoder gives numbers that are not finite, by which nothing can be ranked"
            raise HeadwaterError(Problem(what, fix="take another encoder, or fine-tune it with a lower learning rate"))
        return F.normalize(vectors, dim=-1)

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
            HeadwaterError: `k` is below 1, `exclude` has another length than `texts`, or a text is given where a list
                or a set is meant.
        """
        if k < 1:
            raise HeadwaterError(Problem(f"k is {k}, and at least one adapter has to be retrieved", "k"))
        single = [one for one in (exclude, *(exclude or ())) if isinstance(one, str)]
        if single:  # `in` would look for names that are a part of it
            what = f"{single[0]!r} is a text, where each text has a set of names"
            raise HeadwaterError(Problem(what, "exclude", 'give sets in a list: [{"news"}]'))
        if exclude is not None and not isinstance(texts, str) and len(exclude) != len(texts):
            raise HeadwaterError(Problem(f"{len(exclude)} sets of names for {len(texts)} texts", "exclude"))
        if not texts:
            return []
        found = []
        for row, values in enumerate(self.scores(texts).tolist()):
            barred = exclude[row] if exclude is not None else ()
            ranked = sorted(zip(self.names, values, strict=True), key=lambda pair: -pair[1])
            found.append([pair for pair in ranked if pair[0] not in barred][:k])
        return found


def _identity(encoder: SentenceTransformer) -> str:
    """Tells encoders apart, a fine-tuned one from what it was made of, too: modules, instruction and some weights."""
    digest = hashlib.sha256(repr((str(encoder), encoder.prompts.get(PROMPT))).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(repr((name, tuple(tensor.shape), tensor.flatten()[::997].tolist())).encode())
    return digest.hexdigest()


def _read_keys(file: Path) -> dict[str, Tensor]:
    """The keys in a file; none where it is missing or damaged, since they can be made again."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        keys = load_file(file)
    except (OSError, SafetensorError):
        return {}
    sound = len({key.shape for key in keys.values()}) <= 1
    return keys if sound and all(key.dim() == 1 and key.isfinite().all() for key in keys.values()) else {}


def _write_keys(file: Path, keys: Mapping[str, Tensor]) -> None:
    with contextlib.suppress(NotWritten):  # a pool that cannot be written to can be read
        write_tensors(keys, file, {})


def mixtures(found: Sequence[Found], temperature: float | None = None) -> list[dict[str, float]]:
    """Weights for `PooledModel.rows`, summing to 1 in each row; a row for which nothing was found is empty.

    Args:
        temperature: None gives every adapter found the same weight, as in the paper; a number above 0 gives
            softmax(score / temperature).

    Raises:
        HeadwaterError: `temperature` is not a finite number above 0.
    """
    if temperature is not None and not 0 < temperature < math.inf:
        raise HeadwaterError(Problem(f"{temperature} is not a finite number above 0", "temperature"))
    rows = []
    for pairs in found:
        best = max((score for _, score in pairs), default=0.0)
        raw = {name: 1.0 if temperature is None else math.exp((s - best) / temperature) for name, s in pairs}
        total = sum(raw.values())
        rows.append({name: value / total for name, value in raw.items()})
    return rows
