"""Rows that are decoded together, which others join and leave between two tokens.

The key-value cache is padded on the left, so that all rows' newest token lies in the last slot. A row that joins is
read by itself first and then padded to the others' length, or the others to its own; positions are counted per row, so
slots mean nothing to the model, and padding is masked. Rows that leave take the slots with them that only they used.
Layers of linear attention have no slots: they keep one state for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from ..errors import HeadwaterError, Problem
from ..evaluation.forward import base_of, input_device, logits_at, pad
from ..tuner import is_adapted, observe
from ..tuner.context import keep_memory, memory_of
from .routes import BASE, Route, Routes

_NOTHING = getattr(cache_utils, "DummyLayer", ())  # newer than the oldest transformers that headwater runs with
_KNOWN = (DynamicLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)


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

    Raises:
        HeadwaterError: the model remembers what it has read in a way that lets no rows join or leave; that is tried.
    """

    def __init__(self, routes: Routes, fill: int):
        self.routes, self.fill = routes, fill
        self.model: nn.Module = routes.model
        self._observable = is_adapted(self.model)
        self.clear()
        self._try()

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
        cache = DynamicCache(config=base_of(self.model).config)
        # a window's layer would drop slots of its own; with all slots the mask alone says what is near
        windows = [type(layer) is DynamicSlidingWindowLayer for layer in cache.layers]
        cache.layers = [DynamicLayer() if w else layer for w, layer in zip(windows, cache.layers, strict=True)]
        output = self._forward(cache, padded.input_ids, padded.attention_mask, padded.position_ids, routes, gates)
        return Read(output, list(routes), cache, padded.attention_mask, padded.position_ids[:, -1] + 1)

    def _try(self) -> None:
        why = None
        try:
            layers = self.read([[self.fill]], [Route(BASE, task=0)]).cache.layers
        except HeadwaterError:
            raise
        except ValueError as error:  # as of a model that takes a cache of its own alone
            why, layers = error, []
        if not layers or not all(map(_is_kept, layers)):
            what = f"{type(base_of(self.model)).__name__} remembers what it has read in another way than the server can"
            fix = "`headwater generate` runs it, as transformers does"
            raise HeadwaterError(Problem(f"{what} keep apart for each request", fix=fix)) from why

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
            if _has_slots(layer):
                here = index.to(layer.keys.device)
                layer.keys, layer.values = layer.keys[here, :, first:], layer.values[here, :, first:]
            for states in _states(layer):
                states |= {key: state[index.to(state.device)] for key, state in states.items()}
        keep_memory(self._cache, index)

    def _merge(self, cache: Any, mask: Tensor) -> None:
        assert self._mask is not None
        width = max(self._mask.shape[1], mask.shape[1])
        self._mask = torch.cat([F.pad(m, (width - m.shape[1], 0)) for m in (self._mask, mask)])
        for ours, theirs in zip(self._cache.layers, cache.layers, strict=True):
            for name in ("keys", "values") if _has_slots(ours) else ():
                both = getattr(ours, name), getattr(theirs, name)
                setattr(ours, name, torch.cat([F.pad(t, (0, 0, width - t.shape[-2], 0)) for t in both]))
            for states, other in zip(_states(ours), _states(theirs), strict=True):
                states |= {key: torch.cat([state, other[key]]) for key, state in states.items()}
        memory, joining = memory_of(self._cache), memory_of(cache)
        for key, values in memory.items():
            memory[key] = tuple(torch.cat(both) for both in zip(values, joining[key], strict=True))

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


def _has_slots(layer: Any) -> bool:
    """Whether a layer keeps keys and values."""
    return isinstance(layer, DynamicLayer) and layer.is_initialized


def _states(layer: Any) -> list[dict[int, Tensor]]:
    """What a layer of linear attention keeps: tensors with one entry per row."""
    found = [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]
    return [states for states in found if None not in states.values()]


def _is_kept(layer: Any) -> bool:
    """Whether a layer of a cache is one whose rows are known, and the model has written to it."""
    return isinstance(layer, _NOTHING) or (type(layer) in _KNOWN and (_has_slots(layer) or any(_states(layer))))
