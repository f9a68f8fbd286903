"""Rows that are decoded together, which others join and leave between two tokens.

The key-value cache is padded on the left, so that all rows' newest token lies in the last slot. A row that joins is
read by itself first and then padded to the others' length, or the others to its own; positions are counted per row, so
slots mean nothing to the model, and padding is masked. Rows that leave take the slots with them that only they used.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..errors import HeadwaterError, Problem
from ..evaluation.forward import base_of, input_device, logits_at, pad
from ..tuner import is_adapted, observe
from .routes import Route, Routes


class Output:
    """Logits `(rows, vocabulary)` behind the last token, float32, and its mean gate over the layers, `(rows, N)`."""

    logits: Tensor

    def __init__(self, rows: int):
        self._rows, self._sum, self._layers = rows, torch.zeros(0), 0

    def see(self, name: str, gate: Tensor) -> None:
        if gate.dim() != 3 or gate.shape[0] != self._rows:
            return  # behind a token dispatch
        last = gate[:, -1]
        if self._layers == 0 or last.shape == self._sum.shape:
            # stays on the first layer's device until somebody asks, or every layer would be waited for
            self._sum = last.to(self._sum.device) + self._sum if self._layers else last
            self._layers += 1

    @property
    def gates(self) -> list[list[float]] | None:
        return (self._sum / self._layers).tolist() if self._layers else None


@dataclass(frozen=True)
class Read:
    """Rows whose prompts have been read: what follows them, and what is needed to go on."""

    output: Output
    routes: list[Route]
    cache: Any
    mask: Tensor
    following: Tensor


class Batch:
    """The tensors of the rows that are being decoded.

    Args:
        routes: which model runs, and how its rows differ.
        fill: a token id for padding.
    """

    def __init__(self, routes: Routes, fill: int):
        self.routes, self.fill = routes, fill
        self.model: nn.Module = routes.model
        self._observable = is_adapted(self.model)
        self.clear()

    def clear(self) -> None:
        """Forgets all rows."""
        self._routes: list[Route] = []
        self._cache: Any = None
        self._mask: Tensor | None = None  # int64 (rows, slots)
        self._next = torch.zeros(0, dtype=torch.long)  # (rows,) position of each row's next token

    def __len__(self) -> int:
        return len(self._routes)

    def read(self, prompts: Sequence[Sequence[int]], routes: Sequence[Route], *, gates: bool = False) -> Read:
        """Reads prompts of new rows, by themselves; nothing changes for those that are there."""
        padded = pad(prompts, self.fill, left=True).to(input_device(self.model))
        cache = DynamicCache()
        output = self._forward(cache, padded.input_ids, padded.attention_mask, padded.position_ids, routes, gates)
        if not cache.layers or not all(type(layer) is DynamicLayer for layer in cache.layers):
            kind = type(base_of(self.model)).__name__
            raise HeadwaterError(Problem(f"{kind} has another memory than keys and values, and cannot be served"))
        return Read(output, list(routes), cache, padded.attention_mask, padded.position_ids[:, -1] + 1)

    def add(self, new: Read) -> None:
        """Lets the rows join, behind those that are there."""
        if self._mask is None:
            self._cache, self._mask, self._next = new.cache, new.mask, new.following
        else:
            self._merge(new.cache, new.mask)
            self._next = torch.cat([self._next, new.following])
        self._routes += new.routes

    def step(self, tokens: Sequence[int], *, gates: bool = False) -> Output:
        """Takes each row's newest token; returns what follows."""
        assert self._mask is not None
        ids = torch.tensor(tokens, device=self._mask.device).unsqueeze(1)
        self._mask = F.pad(self._mask, (0, 1), value=1)
        output = self._forward(self._cache, ids, self._mask, self._next.unsqueeze(1), self._routes, gates)
        self._next = self._next + 1
        return output

    def keep(self, rows: Sequence[int]) -> None:
        """Lets all other rows go."""
        if len(rows) == len(self):
            return
        if not rows:
            self.clear()
            return
        assert self._mask is not None
        index = torch.tensor(rows, device=self._mask.device)
        self._mask, self._next = self._mask[index], self._next[index]
        self._routes = [self._routes[row] for row in rows]
        first = int(self._mask.any(0).int().argmax())  # slots before it are padding in all rows that stay
        self._mask = self._mask[:, first:]
        for layer in self._cache.layers:
            here = index.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[here, :, first:], layer.values[here, :, first:]
        memory = _memory(self._cache)
        for key, values in memory.items():
            memory[key] = tuple(value[index.to(value.device)] for value in values)

    def _merge(self, cache: Any, mask: Tensor) -> None:
        assert self._mask is not None
        width = max(self._mask.shape[1], mask.shape[1])
        self._mask = torch.cat([F.pad(m, (width - m.shape[1], 0)) for m in (self._mask, mask)])
        for ours, theirs in zip(self._cache.layers, cache.layers, strict=True):
            for name in ("keys", "values"):
                both = getattr(ours, name), getattr(theirs, name)
                setattr(ours, name, torch.cat([F.pad(t, (0, 0, width - t.shape[-2], 0)) for t in both]))
        memory, other = _memory(self._cache), _memory(cache)
        for key, values in memory.items():
            memory[key] = tuple(torch.cat(both) for both in zip(values, other[key], strict=True))

    def _forward(
        self, cache: Any, ids: Tensor, mask: Tensor, positions: Tensor, routes: Sequence[Route], gates: bool
    ) -> Output:
        output = Output(len(routes))
        watching = observe(self.model, output.see) if gates and self._observable else nullcontext()
        with torch.no_grad(), self.routes.apply(routes) as keywords, watching:
            logits, _ = logits_at(
                self.model,
                torch.full((len(routes), 1), ids.shape[1] - 1, device=ids.device),
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **keywords,
            )
        output.logits = logits[:, 0]
        return output


def _memory(cache: Any) -> dict[Any, tuple[Tensor, ...]]:
    """What methods remember per row for as long as the cache lives: tuples of tensors with one entry per row."""
    if not hasattr(cache, "headwater_memory"):
        cache.headwater_memory = {}
    return cache.headwater_memory
