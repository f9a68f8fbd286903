"""Decoding: layers and gated blocks as one function on held weights, for as long as nothing changes.

A decoded token costs a layer's few small products, and that much again to look up, module by module, what they are. So
that is done once, and each token only asks whether all of it is still so.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from ..methods.base import Branch
from ..methods.registry import method
from ..ops import FEW, Update, factor_updates, implementation, is_watched, mixed_update, routed_updates
from .context import Context

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MEMBERS = ("_modules", "_parameters", "_buffers")
_version = operator.attrgetter("_version")


class Watch:
    """Knows whether some adapted layers still compute what they did: the same modules and tensors, nothing written to
    the branches' own, the same mode, scaling and active adapters, no forward replaced; nobody hooks in or has merged.
    Other settings of a branch are taken for constant.

    It reads dictionaries and lists that it knows from the beginning, a whole kind at a time: among the products of the
    layers every attribute of a module would come from memory, one after the other.

    Args:
        layers: `MethodLayer`s, each with one branch in `branches`.
        others: the frozen layers, and what else is between.
        hooked: those modules whose hooks would be passed by.
    """

    def __init__(
        self, layers: Sequence[Any], branches: Sequence[nn.Module], others: Sequence[Any], hooked: Sequence[nn.Module]
    ):
        hooks = [vars(module)[name] for module in hooked for name in _HOOKS]
        everywhere = [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
        self._empty = (*hooks, *everywhere, *(layer.merged_adapters for layer in layers))
        self._fields = [
            (vars(module), name)
            for modules, names in (
                (layers, ("forward", "merged_adapters", "_active_adapter", "_disable_adapters")),
                (branches, ("forward", "training", "scaling")),
                (others, ("forward",)),
            )
            for module in modules
            for name in names
        ]
        modules = (*layers, *(layer.branches for layer in layers), *branches, *others)
        self._members = [vars(module)[name] for module in modules for name in _MEMBERS]
        self._tensors = [t for branch in branches for t in tensors_of(branch)]
        # kept, so that nothing else comes to lie at their addresses
        self._modules, self._memory = modules, [t.detach() for t in self._tensors]
        fields, *rest = self._now()
        self._before = ([list(v) if isinstance(v, list) else v for v in fields], *rest)  # PEFT keeps the caller's list

    def unchanged(self) -> bool:
        return not any(self._empty) and self._now() == self._before

    def _now(self) -> tuple[list[Any], ...]:
        return (
            [d.get(name) for d, name in self._fields],
            list(map(id, itertools.chain.from_iterable([d.values() for d in self._members]))),
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(_version, self._tensors)),
        )


def tensors_of(branch: nn.Module) -> list[Tensor]:
    """Parameters and buffers, which a branch has directly on it."""
    return [t for t in (*branch._parameters.values(), *branch._buffers.values()) if t is not None]


class Decoder:
    """`run(rows, lead)` on held copies of weights: x `(tokens, d_in)`, and the leading dimensions it had. A write that
    PyTorch does not see, as through `.data`, is missed until the next prompt (or many tokens, or a training step)."""

    def __init__(self, run: Callable[[Tensor, tuple[int, ...]], Tensor], watch: Watch, context: Context, like: Tensor):
        self.run, self._watch, self._context = run, watch, context
        self._dtype = like.dtype

    def fits(self, x: Tensor) -> bool:
        """Whether this is one more token of what it was made for."""
        return (
            not torch.is_grad_enabled()
            and type(x) is Tensor
            and x.dtype == self._dtype
            and x.numel() <= FEW * x.shape[-1]
            and not self._context.begins
            and not torch.is_autocast_enabled(x.device.type)
            and self._watch.unchanged()
        )

    def __call__(self, x: Tensor) -> Tensor:
        lead = x.shape[:-1]
        y = self.run(x.reshape(-1, x.shape[-1]), lead)
        return y.view(*lead, y.shape[-1])


class Held:
    """Where a layer or a block holds its decoder; copies hold none.

    One is made at the second token in a row that goes the same way, so that nobody who switches adapters with each
    token pays for it.
    """

    def __init__(self) -> None:
        self.decoder: Decoder | None = None
        self._last: Any = None

    def drop(self) -> Any:
        """Forgets the decoder, and what `repeats` was told; returns the latter."""
        last, self._last, self.decoder = self._last, None, None
        return last

    def repeats(self, branches: Sequence[Any], last: Any) -> bool:
        """Whether these branches also had the token before, by what `drop` returned."""
        key = tuple(map(id, branches))
        self._last = None if key == last else key
        return key == last

    def __reduce__(self) -> tuple[Any, ...]:
        return Held, ()


def may_decode(branch: Branch, context: Context, x: Tensor) -> bool:
    """Whether these are few tokens behind a prompt, without gradients, and what the branch does to them can be held."""
    return (
        not (torch.compiler.is_compiling() or torch.is_grad_enabled())
        and not (branch.training or branch.folds or context.begins)
        and type(x) is Tensor
        and x.numel() <= FEW * x.shape[-1]
        and not (is_watched(branch) or hooks_everywhere())
        and not torch.is_autocast_enabled(x.device.type)
        and implementation(x.device) != "reference"
    )


def hooks_everywhere() -> bool:
    """True if somebody hooks into all modules."""
    return bool(torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks)


def layer_decoder(layer: Any, branch: Branch, x: Tensor) -> Decoder | None:
    """The decoder of a `MethodLayer` on a plain layer; None where it cannot be held. Hooks on the layer itself run
    around it and do not matter."""
    update = _update([layer], [branch], x)
    if update is None:
        return None
    weight, bias = layer.base_layer.weight, layer.base_layer.bias

    def run(rows: Tensor, lead: tuple[int, ...]) -> Tensor:
        y = F.linear(rows, weight, bias)
        update([y], rows, lead)
        return y

    watch = Watch([layer], [branch], [layer.base_layer], [layer.base_layer, branch])
    return Decoder(run, watch, layer.context, x)


def block_decoder(mlp: Any, layers: Sequence[Any], branches: Sequence[Branch | None], x: Tensor) -> Decoder | None:
    """The decoder of a gated block of plain layers; None where it cannot be held.

    Args:
        layers, branches: of the gate, up and down projection; a branch is None where one has no adapter.
    """
    present = [i for i, branch in enumerate(branches) if branch is not None]
    read_x, read_product = [i for i in present if i < 2], [i for i in present if i == 2]
    above, below = (_update([layers[i] for i in g], [branches[i] for i in g], x) for g in (read_x, read_product))
    if above is None or below is None:
        return None
    plain = [layer if branch is None else layer.base_layer for layer, branch in zip(layers, branches, strict=True)]
    (W_gate, b_gate), (W_up, b_up), (W_down, b_down) = ((layer.weight, layer.bias) for layer in plain)
    act = mlp.act_fn

    def run(rows: Tensor, lead: tuple[int, ...]) -> Tensor:
        gate, up = F.linear(rows, W_gate, b_gate), F.linear(rows, W_up, b_up)
        above([(gate, up)[i] for i in read_x], rows, lead)
        product = act(gate) * up
        y = F.linear(product, W_down, b_down)
        below([y] if read_product else [], product, lead)
        return y

    adapted, own = [layers[i] for i in present], [branch for branch in branches if branch is not None]
    watch = Watch(adapted, own, [mlp, *plain], [*adapted, *own, *plain])
    return Decoder(run, watch, adapted[0].context, x)


def _update(layers: Sequence[Any], branches: Sequence[Any], like: Tensor) -> Update | None:
    """What layers that read the same x add to their outputs; None where nobody counts the writes to a tensor (inference
    mode)."""
    if any(t.is_inference() for branch in branches for t in tensors_of(branch)):
        return None
    if not branches:
        return lambda ys, x, lead: None
    if all(method(layer.method_name).mergeable for layer in layers):
        return factor_updates([branch.factors() for branch in branches], like)
    heads = [
        branch.gated_heads(layer.context.call(layer.name, ()), None)
        for layer, branch in zip(layers, branches, strict=True)
    ]
    kinds = {None if one is None or not one.routed else (one.r, one.num_heads, one.start) for one in heads}
    if len(kinds) == 1 and None not in kinds:
        reads = [[w for part in branch.reads() for w in part] for branch in branches]
        ups = [branch.writes_apart() for branch in branches]
        context = layers[0].context

        def show(gates: Tensor, lead: tuple[int, ...]) -> None:
            if context.observers or context.merging:
                for layer, gate in zip(layers, gates.unbind(1), strict=True):
                    context.call(layer.name, lead).saw_gate(gate)

        return routed_updates(reads, ups, [branch.scaling for branch in branches], heads[0].num_heads, show, like)
    each = [_of_any(layer, branch, like) for layer, branch in zip(layers, branches, strict=True)]

    def update(ys: Sequence[Tensor], x: Tensor, lead: tuple[int, ...]) -> None:
        for one, y in zip(each, ys, strict=True):
            one([y], x, lead)

    return update


def _of_any(layer: Any, branch: Branch, like: Tensor) -> Update:
    def mix(ranks: Sequence[Tensor], x: Tensor, lead: tuple[int, ...]) -> Tensor:
        return branch.mix(*branch.exact(ranks, x), call=layer.context.call(layer.name, lead))

    dropped, clean = branch.reads()
    return mixed_update((*dropped, *clean), mix, branch.writes(), branch.scaling, like)
