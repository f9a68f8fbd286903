"""Batches whose rows, or tokens, use different adapters, in one pass.

All adapters in use are stacked along their ranks, and what each row or token takes of them is a weight per rank:

    y = W x + B_cat ( w * (A_cat x) )          w (tokens, sum of ranks) = weight of the rank's adapter * its scaling

So ranks and scalings may differ, nothing of the size batch x tokens x adapters x d_out is ever made, and the forward
pass has no loop over adapters. This is the mixture of LoraRetriever (arXiv 2402.09997, sec. 3.3), evaluated in rank
space; LoRA-Flow and Arrow bring other weights to the same arithmetic.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..methods.call import Call
from ..ops import add_update, project
from ..tuner.layer import floating_weight
from ..tuner.model import install_context
from .adapter import Adapter, LowRank
from .base import linear_layers
from .merge import fuse

Mixture = Mapping[str, float]
"""Adapter name -> weight, for one row; empty for the base model alone."""


@dataclass(frozen=True)
class Stack:
    """Several adapters on one layer, side by side.

    Args:
        down: `(R, d_in)`, all A; R is the sum of the ranks. A gate may append rows of its own to read.
        up: `(R, d_out)`, all B transposed.
        owner: LongTensor `(R,)`, which adapter each rank belongs to.
        scale: `(R,)`, at least float32, that adapter's scaling.
        key: (adapter, rank, scaling) of each part: stacks of one key share their weights per rank.
    """

    down: Tensor
    up: Tensor
    owner: Tensor
    scale: Tensor
    key: tuple[tuple[int, int, float], ...]

    @classmethod
    def of(cls, parts: Sequence[tuple[int, LowRank]]) -> Stack:
        """Stacks `(adapter's position, factors)`."""
        factors = [part for _, part in parts]
        down, up = torch.cat([part.A for part in factors]), torch.cat([part.B.T for part in factors])
        ranks = torch.tensor([part.rank for part in factors])
        owner = torch.tensor([position for position, _ in parts]).repeat_interleave(ranks)
        scale = torch.tensor([part.scaling for part in factors], dtype=_scale_dtype(down)).repeat_interleave(ranks)
        key = tuple((position, part.rank, part.scaling) for position, part in parts)
        owner, scale = (t.to(down.device, non_blocking=True) for t in (owner, scale))
        return cls(down, up, owner, scale, key)

    @property
    def ranks(self) -> int:
        return self.up.shape[0]

    def spread(self, weights: Tensor) -> Tensor:
        """Weights of adapters, `(..., adapters)`, as weights of ranks, `(..., R)`, with the scalings."""
        return weights.index_select(-1, self.owner) * self.scale


class Gate(Protocol):
    """Says what each token takes of each adapter."""

    def mix(self, u: Tensor, x: Tensor, stack: Stack, call: Call) -> Tensor:
        """From what was read of x `(tokens, d_in)` to the weighted ranks `(tokens, R)`.

        u: `(tokens, rows of stack.down)`, at least float32.
        """
        ...


class RowGate:
    """One mixture per row of the batch, the same for all its tokens. weights: `(rows, adapters)`."""

    def __init__(self, weights: Tensor):
        self.weights = weights
        self.generating = False  # the model's `generate` runs, which repeats rows for beams and returned sequences
        self._by_rank: dict[tuple[Any, ...], Tensor] = {}

    def mix(self, u: Tensor, x: Tensor, stack: Stack, call: Call) -> Tensor:
        rows, state = self.weights.shape[0], call.state
        batch = call.shape[0] if state is None or not state.batch else state.batch
        shown = call.shape[0] == batch or (state is not None and call.tokens == batch * state.length)
        fits = batch == rows or rows == 1
        if not fits and batch % rows == 0:  # elsewhere more rows are a mistake, and whose they are would be a guess
            fits = self.generating or (state is not None and not state.begins)
        if not (fits and shown):
            what = f"{rows} mixtures of adapters do not fit a batch of {batch} rows"
            if not shown:
                what = f"the activations at {call.name}, {tuple(call.shape)}, do not show which row a token belongs to"
            raise HeadwaterError(Problem(what, fix="give one mixture per row of the batch, or a single one for all"))
        key = (stack.key, batch, u.device)
        if key not in self._by_rank:
            weights = self.weights.repeat_interleave(batch // rows, 0)  # beams and returned sequences
            self._by_rank[key] = stack.spread(weights.to(stack.scale, non_blocking=True)).unsqueeze(1)
        return (u.unflatten(0, (batch, -1)) * self._by_rank[key]).flatten(0, 1)


class PooledModel:
    """A base model that can run any of a pool's adapters, a different mixture in every row of a batch.

        pooled = PooledModel(model, pool.load)
        with pooled.rows([{"news": 1.0}, {"news": 0.5, "tweets": 0.5}, {}]):
            model.generate(**three_prompts)

    The model's weights and modules stay as they are, and outside `rows` it is the base model. Its layers get forward
    hooks, which `close` removes. Not for several threads at once.

    Args:
        model: a transformers model without adapters; quantised ones work too.
        load: name -> `Adapter`, e.g. `pool.load`. Check the model before, with `pool.fingerprint.require(model)`.
        keep: adapters to keep on the model's device, the ones used last.
    """

    def __init__(self, model: nn.Module, load: Callable[[str], Adapter], *, keep: int = 32):
        self.model = model
        self._load, self._keep = load, keep
        self._context = install_context(model)
        self._modules = {name: model.get_submodule(name) for name in linear_layers(model)}
        self._kept: OrderedDict[str, Adapter] = OrderedDict()
        self._hooks: dict[str | tuple[str], Any] = {}  # of layers, and (under a tuple) of places that a gate reads
        self._stacked: tuple[Any, ...] = ()  # what the stacks of `rows` hold: names, or whole mixtures that are fused
        self._row_stacks: dict[str, Stack] = {}
        self._gate: Gate | None = None
        self._places: Sequence[str] = ()
        self._stacks: Mapping[str, Stack] = {}

    @contextlib.contextmanager
    def rows(self, mixtures: Sequence[Mixture], *, fused: bool = False) -> Iterator[None]:
        """Forwards and `generate` inside give row i of the batch `sum_j mixtures[i][j] * adapter j`.

        In `generate` and behind a key-value cache a batch may have a whole multiple of the rows given here: beams and
        returned sequences of a row lie side by side. The adapters' stack is kept as long as the same ones, or fewer,
        are used.

        Args:
            mixtures: one per row, or a single one for all; adapter name -> weight; an empty one is the base model.
            fused: average the adapters' factors instead of their outputs (LoraRetriever's fusion; see `merge.fuse`).

        Raises:
            HeadwaterError: a mixture is no dictionary, an adapter cannot be loaded or does not fit the model, a weight
                is not a number, or ranks differ where factors are averaged.
        """
        if isinstance(mixtures, str | Mapping) or not all(isinstance(m, Mapping) for m in mixtures):
            what = f"{mixtures!r} is no list of mixtures, which are dictionaries from adapter name to weight"
            raise HeadwaterError(Problem(what, "mixtures", 'one for each row of the batch: [{"news": 1.0}, {}]'))
        bad = [f"{name}: {w!r}" for m in mixtures for name, w in m.items() if not _is_finite(w)]
        if bad or not mixtures:
            what = f"weights that are not finite numbers: {', '.join(bad)}" if bad else "there are no rows"
            raise HeadwaterError(Problem(what, "mixtures"))
        parts: Any = [{tuple(sorted(m.items())): 1.0} if m else {} for m in mixtures] if fused else mixtures
        needed: tuple[Any, ...] = tuple(sorted({part for row in parts for part in row}))
        if not set(needed) <= set(self._stacked) or len(self._stacked) > 2 * max(1, len(needed)):
            adapters = [self._fused(part) if fused else self.adapter(part) for part in needed]
            self._row_stacks, self._stacked = self.stack(adapters), needed
        weights = [[row.get(part, 0.0) for part in self._stacked] for row in parts]
        gate = RowGate(torch.tensor(weights, dtype=torch.float64))
        with self.use(self._row_stacks, gate), _telling(gate, self.model):
            yield

    @contextlib.contextmanager
    def all_rows(self, adapter: Adapter) -> Iterator[None]:
        """Forwards inside use one placed adapter for all rows, whether `load` knows it or not."""
        with self.use(self.stack([adapter]), RowGate(torch.ones(1, 1, dtype=torch.float64))):
            yield

    def _fused(self, mixture: tuple[tuple[str, float], ...]) -> Adapter:
        return fuse([self.adapter(name) for name, _ in mixture], [weight for _, weight in mixture])

    @contextlib.contextmanager
    def use(self, stacks: Mapping[str, Stack], gate: Gate, places: Sequence[str] = ()) -> Iterator[None]:
        """Forwards inside add what `gate` makes of `stacks`, layer by layer.

        Args:
            places: modules that tell the gate what enters them, `gate.enter(name, x)` with x `(..., d)`, before the
                layers inside them run.
        """
        self._hook_up(stacks, places)
        before = self._stacks, self._gate, self._places
        self._stacks, self._gate, self._places = stacks, gate, places
        try:
            yield
        finally:
            self._stacks, self._gate, self._places = before

    def _hook_up(self, layers: Iterable[str], places: Sequence[str]) -> None:
        new = [name for name in layers if name not in self._hooks]
        entered = [place for place in places if (place,) not in self._hooks]
        for name in new:
            self._hooks[name] = self._modules[name].register_forward_hook(_Hook(self, name))
        for place in entered:
            hook = functools.partial(self._enter, place)
            self._hooks[place,] = self.model.get_submodule(place).register_forward_pre_hook(hook, with_kwargs=True)
        # What torch.compile made does not ask for hooks: it would go on without these, as the base model. They stay,
        # and what is compiled with them asks which gate is in use.
        if (new or entered) and "torch._dynamo" in sys.modules:
            torch.compiler.reset()

    def adapter(self, name: str) -> Adapter:
        """The adapter on the model's device and in its dtype; kept for the next time."""
        if name in self._kept:
            self._kept.move_to_end(name)
        else:
            self._kept[name] = self.place(self._load(name))
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        return self._kept[name]

    def place(self, adapter: Adapter) -> Adapter:
        """An adapter's copy on the devices and in the dtypes of the layers.

        Raises:
            HeadwaterError: the model lacks one of its layers, or the adapter's numbers are too large for its dtype: 0
                times infinity would then spoil the rows that do not use it.
        """
        missing = [
            Problem(f"the model has no linear layer {n}", adapter.name)
            for n in adapter.layers
            if n not in self._modules
        ]
        if missing:
            raise HeadwaterError(*missing)
        layers = {}
        for name, factors in adapter.layers.items():
            weight: Any = self._modules[name].weight
            floating = floating_weight(self._modules[name]) is not None
            to = {"device": weight.device, "dtype": weight.dtype if floating else getattr(self.model, "dtype", None)}
            placed = LowRank(factors.A.to(**to), factors.B.to(**to), factors.scaling)
            most = torch.finfo(_scale_dtype(placed.A)).max
            if abs(placed.scaling) > most or not (placed.A.isfinite().all() and placed.B.isfinite().all()):
                what = f"its numbers at {name} are too large for this model's dtype, {placed.A.dtype}"
                fix = "load the base model in a wider dtype, or leave the adapter out"
                raise HeadwaterError(Problem(what, adapter.name, fix))
            layers[name] = placed
        return Adapter(adapter.name, layers)

    def stack(self, adapters: Sequence[Adapter]) -> dict[str, Stack]:
        """Placed adapters, stacked layer by layer."""
        names = dict.fromkeys(layer for adapter in adapters for layer in adapter.layers)
        return {
            layer: Stack.of([(i, a.layers[layer]) for i, a in enumerate(adapters) if layer in a.layers])
            for layer in names
        }

    def forget(self) -> None:
        """Drops all kept adapters; the next use reads them again."""
        self._kept.clear()
        self._row_stacks, self._stacked = {}, ()

    def close(self) -> None:
        """Takes the hooks off the model and drops the adapters."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self.forget()

    def _enter(self, place: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if place in self._places:
            gate: Any = self._gate
            gate.enter(place, args[0] if args else kwargs["hidden_states"])

    def _add(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        stack = self._stacks.get(name)
        if self._gate is None or stack is None:
            return None
        lead = tuple(x.shape[:-1])
        x = x.reshape(-1, x.shape[-1])
        (u,) = project(x, (stack.down,))
        h = self._gate.mix(u, x, stack, self._context.call(name, lead))
        # A plain linear layer's fresh output is nobody else's; with gradients, autograd would copy a view's.
        alone = type(module) is nn.Linear and len(module._forward_hooks) == 1 and not torch.is_grad_enabled()
        return add_update(y.reshape(-1, y.shape[-1]), h, stack.up, in_place=alone).reshape(y.shape)


class _Hook:
    """The forward hook of one layer."""

    def __init__(self, pooled: PooledModel, name: str):
        self.pooled, self.name = pooled, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return self.pooled._add(self.name, module, args[0], output)


def _scale_dtype(down: Tensor) -> torch.dtype:
    return torch.promote_types(down.dtype, torch.float32)


def _is_finite(weight: Any) -> bool:
    try:
        return math.isfinite(weight)
    except TypeError:
        return False


@contextlib.contextmanager
def _telling(gate: RowGate, model: Any) -> Iterator[None]:
    """Tells the gate when `model.generate` runs; a forward without a cache does not show it."""
    generate = getattr(model, "generate", None)
    if generate is None:
        yield
        return

    @functools.wraps(generate)
    def telling(*args: Any, **kwargs: Any) -> Any:
        gate.generating = True
        try:
            return generate(*args, **kwargs)
        finally:
            gate.generating = False

    own = vars(model)
    before = own.get("generate")
    own["generate"] = telling
    try:
        yield
    finally:
        if before is None:
            del own["generate"]
        else:
            own["generate"] = before
