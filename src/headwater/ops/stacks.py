"""The stacked weights of all layers of a forward, made together at its beginning.

The products of `by_kernels` take a layer's small matrices as one, filled up with zeros and in x's dtype. Made layer by
layer, that is some ten launches for a gated block, and a GPU waits for the program at each of them. The weights stay as
they are for the length of a forward, so one concatenation and one cast for each width do for all layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adapter import Tensors
from .lowrank import stack, with_rows_of_zeros

Stacked = tuple[Tensor | None, ...]


class Wanted(NamedTuple):
    """Some layers' weights as one `by_kernels.ByKernels` takes them.

    Args:
        at_rest: give the tensors of each layer's branch between forwards; None where these are not whole then.
        drops: there is dropout on x.
        dtype: x's.
    """

    at_rest: tuple[Callable[[], Tensors | None], ...]
    drops: bool
    dtype: torch.dtype


class _Width(NamedTuple):
    """What matrices that are put together have in common; `dtype` is that of the result."""

    columns: int
    given: torch.dtype
    device: torch.device
    dtype: torch.dtype


class Stacks:
    """Those of one forward.

    What is made is what the forward before took. Layers that it did not ask for, or whose tensors were not plain and
    whole when this forward began (FSDP, ZeRO, offloading) or are others by now, find nothing here and stack their own.

    Args:
        before: `wanted` of the forward before.
    """

    def __init__(self, before: dict[Wanted, None]):
        self.wanted: dict[Wanted, None] = {}
        self.made = _make(before) if before else {}

    def take(self, wanted: Wanted, tensors: Sequence[Tensors], device: torch.device) -> Stacked | None:
        """The layers' down-projections as in `matrices`, None if there are none, and each one's up-projections; None
        for layers that are to stack their own. `tensors` are the layers' as they are now."""
        made = self.made.get(wanted)
        if made is not None or all(ask() is not None for ask in wanted.at_rest):
            self.wanted[wanted] = None
        if made is None or made[1][-1].device != device or made[0] != _state(tensors):  # type: ignore[union-attr]
            return None
        return made[1]


def matrices(tensors: Sequence[Tensors], drops: bool) -> list[list[Tensor]]:
    """What is stacked: the down-projections that read x as it is, in the order of u's rows, then each layer's
    up-projections."""
    weights = [t.clean if drops else (*t.dropped, *t.clean) for t in tensors]
    return [[w for kind in zip(*weights, strict=True) for w in kind], *(list(t.up) for t in tensors)]


def stack_now(tensors: Sequence[Tensors], drops: bool, like: Tensor) -> Stacked:
    """The weights of layers that find none made; the first is None if there are no such down-projections."""
    return tuple([stack(parts, like, fill=True) if parts else None for parts in matrices(tensors, drops)])


def _state(tensors: Sequence[Tensors]) -> list[tuple[int, int]]:
    """Changes with what tensors hold, but for writes that PyTorch does not see, as through `.data`."""
    return [(w.data_ptr(), w._version) for t in tensors for w in t.flat()]


@torch.no_grad()
def _make(wanted: dict[Wanted, None]) -> dict[Wanted, tuple[list[tuple[int, int]], Stacked]]:
    parts: dict[_Width, list[Tensor]] = defaultdict(list)
    places: dict[_Width, list[tuple[Wanted, int, int]]] = defaultdict(list)
    found: dict[Wanted, list[Tensor | None]] = {}
    states: dict[Wanted, list[tuple[int, int]]] = {}
    for one in wanted:
        tensors = [t for ask in one.at_rest if (t := ask()) is not None]
        if len(tensors) < len(one.at_rest):
            continue
        kinds = matrices(tensors, one.drops)
        found[one], states[one] = [None] * len(kinds), _state(tensors)
        for i, kind in enumerate(kinds):
            if kind:
                like = kind[0]
                width = _Width(like.shape[1], like.dtype, like.device, one.dtype)
                filled = with_rows_of_zeros(kind)
                parts[width] += filled
                places[width].append((one, i, sum([w.shape[0] for w in filled])))
    for width, all_parts in parts.items():
        stacked = torch.cat(all_parts).to(width.dtype).split_with_sizes([rows for *_, rows in places[width]])
        for (one, i, _), rows in zip(places[width], stacked, strict=True):
            found[one][i] = rows
    return {one: (states[one], tuple(stacks)) for one, stacks in found.items()}


def whole(module: nn.Module) -> bool:
    """Whether a module's parameters are ordinary ones with all their values, in memory: no shards, flat or not, no
    views of them, none taken away, none made by a parametrization."""
    return not module._modules and all(
        p is None or (type(p) is nn.Parameter and p.numel() > 0 and p.dim() > 1 and not p.is_meta)
        for p in module._parameters.values()
    )


def are_own(tensors: Tensors, module: nn.Module) -> bool:
    """Whether tensors are a module's parameters and buffers, or views of them. FSDP puts others in a parameter's place,
    whose memory is gone after the forward. Those of inference mode do not count their writes."""
    own = set(map(id, (*module._parameters.values(), *module._buffers.values())))
    return all(id(w if w._base is None else w._base) in own and not w.is_inference() for w in tensors.flat())
