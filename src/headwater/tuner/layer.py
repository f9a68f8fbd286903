"""The one adapted layer: a frozen linear layer plus the branches of its adapters."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import HeadwaterError, Problem
from ..methods.base import Branch
from ..ops import is_plain
from .context import Context
from .decoding import Held, layer_decoder, may_decode


class MethodLayer(nn.Module, BaseTunerLayer):
    """`base(x)` plus what the active adapters' branches add.

    Args:
        base_layer: any layer that maps `(..., d_in)` to `(..., d_out)` linearly: `nn.Linear`, quantised, `Conv1D`.
        method_name: names the attribute that holds the branches, `<method>_branch`, and so the keys in the file.
        context: the model's forward context.
        name: the layer's name in the model, for messages and observers.
    """

    def __init__(self, base_layer: nn.Module, method_name: str, context: Context, name: str):
        super().__init__()
        self.base_layer = base_layer
        self.method_name = method_name
        self.adapter_layer_names = (f"{method_name}_branch",)
        self.add_module(self.adapter_layer_names[0], nn.ModuleDict())
        self.context = context
        self.name = name
        self.merged_adapters: list[str] = []
        self._weight_before_merge: Tensor | None = None
        self.held = [Held()]  # its own, and that of the gated block it is in
        self.in_features, self.out_features = linear_sizes(self.get_base_layer())
        self.train(base_layer.training)  # a model in eval mode stays so, or dropout would run in it

    @property
    def branches(self) -> nn.ModuleDict:
        """The branches by adapter name."""
        return cast(nn.ModuleDict, self._modules[self.adapter_layer_names[0]])

    def branch(self, adapter_name: str) -> Branch:
        """One adapter's branch."""
        return cast(Branch, self.branches[adapter_name])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        last = None
        if not torch.compiler.is_compiling():
            decoder = self.held[0].decoder
            if decoder is not None and not (args or kwargs) and decoder.fits(x):
                return decoder(x)
            last = self.held[0].drop()
        if self.disable_adapters or self.merged:
            if self.disable_adapters and self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        active = [self.branch(name) for name in self.active_adapters if name in self.branches]
        if not active:
            return self.base_layer(x, *args, **kwargs)

        lead = x.shape[:-1]
        rows = x.reshape(-1, self.in_features)
        call = self.context.call(self.name, tuple(lead))
        # A plain layer runs inside the first branch, flat: its fresh output is nobody else's, so the update is added in
        # its memory, where autograd would copy what is written through a view.
        y: Any = self.base_layer
        holds = len(active) == 1 and not (args or kwargs) and may_decode(active[0], self.context, x) and is_plain(y)
        if holds and self.held[0].repeats(active, last):
            self.held[0].decoder = decoder = layer_decoder(self, active[0], x)
            if decoder is not None:
                return decoder(x)
        if args or kwargs or not is_plain(y) or any(branch.folds for branch in active):
            y = self._base_forward(active, x, *args, **kwargs).reshape(-1, self.out_features)
        for branch in active:
            y = branch(y, rows, call)
        return call.attach(y).reshape(*lead, self.out_features)

    def only_branch(self) -> Branch | None:
        """The branch whose update is all that the layer adds to its base; None if it adds none or several."""
        if self.disable_adapters or self.merged:
            return None
        branches = self.branches
        active = [branches[name] for name in self.active_adapters if name in branches]
        return cast(Branch, active[0]) if len(active) == 1 and not active[0].folds else None

    def _base_forward(self, active: list[Branch], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        weight: Any = getattr(base, "weight", None)
        copies = [branch.folded_weight(weight, transposed=isinstance(base, Conv1D)) for branch in active]
        folded = [copy for copy in copies if copy is not None]
        if not folded:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise HeadwaterError(
                Problem(
                    f"{self.name}: an adapter that folds into the base weight cannot be active together with another",
                    "mode",
                    "make it with mode: stack",
                )
            )
        return torch.func.functional_call(self.base_layer, {"weight": folded[0]}, (x, *args), kwargs)

    def drop_held(self) -> None:
        """Frees what decoding holds of the layer's adapters."""
        for held in self.held:
            held.drop()

    def delete_adapter(self, adapter_name: str) -> None:
        self.drop_held()
        super().delete_adapter(adapter_name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.drop_held()
        if self._weight_before_merge is not None:
            self._weight_before_merge = fn(self._weight_before_merge)
        return super()._apply(fn, recurse)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica.held, replica.merged_adapters = [Held()], list(self.merged_adapters)  # its own, not the original's
        return replica

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters to the base weight; the weight before is kept, so `unmerge` restores it bit for bit.

        Raises:
            NotMergeable: if a branch equals no single matrix.
            HeadwaterError: if the base is quantised, or (with `safe_merge`) the result is not finite.
        """
        self.merge_with(safe_merge=safe_merge, adapter_names=adapter_names)

    def merge_with(
        self,
        *,
        gate: Tensor | None = None,
        task: int | None = None,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """`merge`, with gates `(N,)` held fixed where they depend on the input, or for one task."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.branches]
        if not names:
            return
        merged = self.merged_weight(names, gate=gate, task=task, safe_merge=safe_merge)
        weight = cast(nn.Parameter, self.get_base_layer().weight)
        if self._weight_before_merge is None:
            self._weight_before_merge = weight.data
        weight.data = merged
        self.merged_adapters.extend(names)

    def merged_weight(
        self, names: list[str], *, gate: Tensor | None = None, task: int | None = None, safe_merge: bool = False
    ) -> Tensor:
        """What the base weight would be with the named adapters merged. Raises as `merge` does; changes nothing."""
        base = self.get_base_layer()
        weight = floating_weight(base)
        if weight is None:
            raise HeadwaterError(
                Problem(
                    f"cannot merge into {self.name}: its weight is quantised and would be rounded again",
                    fix="load the base model unquantised to merge, or keep the adapter unmerged",
                )
            )
        wide = wide_dtype(weight)
        delta = torch.zeros(self.out_features, self.in_features, dtype=wide, device=weight.device)
        for name in names:
            delta += self.branch(name).delta_weight(gate, task).detach().to(wide)
        merged = (weight.data.to(wide) + (delta.T if isinstance(base, Conv1D) else delta)).to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise HeadwaterError(f"merging into {self.name} gives values that are not finite; it is left unchanged")
        return merged

    def unmerge(self) -> None:
        """Puts back the weight from before the merge."""
        if self._weight_before_merge is not None:
            weight = cast(nn.Parameter, self.get_base_layer().weight)
            weight.data = self._weight_before_merge.to(weight)  # the base layer may have been cast or moved by itself
        self._weight_before_merge = None
        self.merged_adapters.clear()


def linear_sizes(layer: nn.Module) -> tuple[int, int]:
    """`(d_in, d_out)` of a linear layer.

    Raises:
        TypeError: if it is none.
    """
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    other = isinstance(layer, nn.modules.conv._ConvNd | nn.Embedding | nn.Bilinear)
    # routers to experts, which some models derive from nn.Linear, give back more than a product
    other |= type(layer).__name__.endswith("Router")
    if other or None in sizes:
        raise TypeError(
            f"cannot adapt a {type(layer).__name__}: headwater's methods adapt linear layers (also quantised ones); "
            "name only such layers in `target_modules`"
        )
    return sizes  # type: ignore[return-value]


def floating_weight(layer: nn.Module) -> nn.Parameter | None:
    """The layer's weight if it holds plain floating-point numbers of the layer's own shape, else None."""
    weight = getattr(layer, "weight", None)
    # some quantised weights are tensor subclasses that call themselves floating-point
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return None
    return weight if sorted(weight.shape) == sorted(linear_sizes(layer)) else None


def wide_dtype(weight: Tensor | None) -> torch.dtype:
    """What adapters are kept and merged in: float32, or float64 where the base weight is."""
    return torch.float64 if weight is not None and weight.dtype is torch.float64 else torch.float32
