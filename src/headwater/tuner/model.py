"""The one PEFT tuner, for every method."""

from __future__ import annotations

import contextlib
import inspect
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..methods.base import LayerShape, MethodConfig
from ..methods.registry import Method
from ..methods.registry import method as registered
from .checkpoints import leave_checkpoints
from .context import Context, Observer, has_encoder
from .generation import unwrap_generate, wrap_generate
from .layer import MethodLayer, floating_weight, linear_sizes, wide_dtype
from .mlp import fuse_mlps, unfuse_mlps
from .targets import rank_of, settle_targets

_CONTEXT = "_headwater_context"
_HOOKS = "_headwater_hooks"
REFERENCE = "ref"
"""TRL's name of the frozen copy of an adapter that is trained on."""


class MethodModel(BaseTuner):
    """Wraps a base model's linear layers. PEFT makes it; the method-specific subclasses differ in name only."""

    tuner_layer_cls = MethodLayer
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    method: Method

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:  # PEFT drops it next, and all rows would use the active adapter
            raise HeadwaterError(
                Problem(
                    f"{self.method.title} cannot use another adapter for each row of a batch",
                    "adapter_names",
                    "run the rows of each adapter as a batch of their own, after model.set_adapter(name)",
                )
            )
        return contextlib.nullcontext()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a method's tensors do not add up to a weighted sum of updates, as LoRA's factors do."""
        raise HeadwaterError(
            Problem(
                f"{self.method.title} has no add_weighted_adapter",
                fix="make several active, model.base_model.set_adapter([...]), which adds them up; or write them as "
                "plain LoRA with `headwater export` and combine those with `headwater pool merge`",
            )
        )

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        if self.method.branch.by_prompt and has_encoder(model):
            raise HeadwaterError(
                Problem(
                    f"{self.method.title} goes by a row's prompt, and what an encoder-decoder writes has none",
                    fix="take another method for this model",
                )
            )

    def _prepare_model(self, peft_config: MethodConfig, model: nn.Module) -> None:  # type: ignore[override]
        settle_targets(self, peft_config, model)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: MethodConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, MethodLayer):
            layer = target
            if layer.method_name != self.method.name:
                raise HeadwaterError(
                    Problem(
                        f"{current_key} carries an adapter of {registered(layer.method_name).title} already",
                        fix=f"adapters of {self.method.title} need other layers, or a model of their own",
                    )
                )
        else:
            layer = MethodLayer(target, self.method.name, context_of(self.model), current_key)
        add_branch(layer, adapter_name, peft_config, self.method, self.__dict__["_shared"])
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: Any, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's also copies the child's weight, which a module that was trained in whole need not have, and moves the
        # adapter to the weight's device: `add_branch` has done that, and one on the meta device cannot be moved.
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with _whole_or_not_at_all(model, adapter_name):
            context = install_context(model)
            if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
                context.align = None  # of a plain LoRA that was merged since, which leaves the context where it is
            wrap_generate(model, context)
            self.__dict__["_shared"] = {}  # what this adapter's layers have in common while they are being made
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            for finish in self.__dict__.pop("_shared").get("finish", ()):
                finish()
        if adapter_name == REFERENCE and self.peft_config[adapter_name] is self.peft_config.get("default"):
            copy_default(model, adapter_name)
        fuse_mlps(model)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Branches are made in float32, which keeps the start exact. A file may bring half precision, which is widened,
        # unless the base's dtype is asked for. A base in float64 wants no less of its adapter.
        for module in self.model.modules():
            if isinstance(module, MethodLayer) and adapter_name in module.branches:
                weight = floating_weight(module.get_base_layer())
                if autocast_adapter_dtype:
                    module.branches[adapter_name].to(wide_dtype(weight))
                elif weight is not None:
                    module.branches[adapter_name].to(weight.dtype)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._rehearse_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _rehearse_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raises what merging would raise, before the first layer is touched: a refusal leaves the model whole."""
        merging = []
        for module in self.model.modules():
            if isinstance(module, MethodLayer):
                chosen = module.active_adapters if adapter_names is None else adapter_names
                names = [n for n in chosen if n in module.branches and n not in module.merged_adapters]
                if names:
                    module.merged_weight(names, safe_merge=safe_merge)
                    merging.append(module)
        refuse_shared(self.model, merging)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._rehearse_merge(adapter_names, safe_merge)
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        _remove_context(model)
        unfuse_mlps(model)
        return model


@contextlib.contextmanager
def _whole_or_not_at_all(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """On an error inside, the model is as before: what one layer refuses must not stay on the layers before it, where
    the next try would train it as its own."""
    context: Context | None = model.__dict__.get(_CONTEXT)
    needs = context and (context.branches_need_state, context.branches_need_batch, context.branches_meet_ranks)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = {m: dict(m.branches).get(adapter_name) for m in model.modules() if isinstance(m, MethodLayer)}
    try:
        yield
    except BaseException:
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, MethodLayer) and layer not in before:
                    setattr(parent, name, layer.get_base_layer())
        for layer, branch in before.items():
            if branch is not None:
                layer.drop_held()
                layer.branches[adapter_name] = branch
            elif adapter_name in layer.branches:
                layer.drop_held()
                del layer.branches[adapter_name]
        for parameter, learns in trained:
            parameter.requires_grad_(learns)
        if context is None:
            _remove_context(model)
        elif needs:
            context.branches_need_state, context.branches_need_batch, context.branches_meet_ranks = needs
        raise


def _remove_context(model: nn.Module) -> None:
    for hook in model.__dict__.pop(_HOOKS, ()):
        hook.remove()
    if model.__dict__.pop(_CONTEXT, None) is not None:
        leave_checkpoints(model)
    unwrap_generate(model)


def copy_default(model: nn.Module, adapter_name: str) -> None:
    """Makes an adapter what `default` is. TRL's trainers copy parameters only, and buffers, such as a start that is
    compensated or a frozen A, would be of another draw."""
    for module in model.modules():
        if isinstance(module, MethodLayer) and "default" in module.branches and adapter_name in module.branches:
            module.branches[adapter_name].load_state_dict(module.branches["default"].state_dict())


def add_branch(
    layer: MethodLayer, adapter_name: str, config: MethodConfig, method: Method, shared: dict[str, Any]
) -> None:
    """Makes an adapter's parameters on one layer, on the base weight's device."""
    base, r = layer.get_base_layer(), rank_of(config, layer.name)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), layer.name), config.lora_alpha)
    d_in, d_out = linear_sizes(base)
    weight = floating_weight(base)
    on_meta = weight is not None and weight.device.type == "meta"
    known_weight = None if weight is None or on_meta else weight.detach()
    shape = LayerShape(layer.name, d_in, d_out, r, alpha, known_weight, on_meta, shared)
    with torch.device("cpu"), _float32():  # whatever torch makes tensors of by default where it is called
        branch = method.branch(config, shape, generator_for(config, layer.name))
    device = _device_of(base)
    if device is not None and not any(p.device.type == "meta" for p in branch.parameters()):
        branch.to(device)
    branch.train(layer.training)
    layer.branches[adapter_name] = branch
    layer.context.branches_need_state |= branch.needs_state
    layer.context.branches_need_batch |= branch.has_losses
    layer.context.branches_meet_ranks |= branch.meets_ranks
    layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)


@contextlib.contextmanager
def _float32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def generator_for(config: MethodConfig, what: str) -> torch.Generator:
    """Draws the start of `what`, a layer: its name, not its turn, decides, so that the same layer starts the same
    whatever else is targeted."""
    seed = config.init_seed
    drawn = int(torch.randint(2**62, (), device="cpu")) if seed is None else zlib.crc32(f"{seed} {what}".encode())
    return torch.Generator().manual_seed(drawn)


def _device_of(base: nn.Module) -> torch.device | None:
    """Where a layer runs: its weight's device, whatever its quantisation calls that; an offloaded weight comes there
    only for as long as the layer runs."""
    named = (getattr(base, name, None) for name in ("weight", "qweight", "W_q"))
    weight = next((w for w in (*named, *base.parameters(), *base.buffers()) if isinstance(w, Tensor)), None)
    if weight is None or weight.device.type != "meta":
        return None if weight is None else weight.device
    runs_on = getattr(getattr(base, "_hf_hook", None), "execution_device", None)
    return weight.device if runs_on is None else torch.device(runs_on)


def install_context(model: nn.Module) -> Context:
    """The base model's forward context, made and hooked up if it has none yet."""
    if _CONTEXT not in model.__dict__:
        context = Context(tuple(inspect.signature(type(model).forward).parameters)[1:])
        model.__dict__[_CONTEXT] = context
        model.__dict__[_HOOKS] = (
            model.register_forward_pre_hook(context.open, with_kwargs=True),
            model.register_forward_hook(context.close, with_kwargs=True, always_call=True),
        )
        encoder = _encoder_of(model)
        if encoder is not None:
            model.__dict__[_HOOKS] += (
                encoder.register_forward_pre_hook(context.open_encoder, with_kwargs=True),
                encoder.register_forward_hook(context.close_encoder, with_kwargs=True, always_call=True),
            )
    return model.__dict__[_CONTEXT]


def _encoder_of(model: Any) -> nn.Module | None:
    if not has_encoder(model):
        return None
    try:
        encoder = model.get_encoder()
    except (AttributeError, NotImplementedError):
        return None
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def context_of(model: nn.Module) -> Context:
    """The forward context of a model adapted by headwater, wrapped in PEFT or not.

    Raises:
        HeadwaterError: if it has none.
    """
    for module in (model, *(getattr(model, "modules", list)())):
        if hasattr(module, "__dict__") and _CONTEXT in module.__dict__:
            return module.__dict__[_CONTEXT]
    raise HeadwaterError("this model has no headwater adapter")


def follow_loss(model: nn.Module, loss: Tensor) -> None:
    """Tells the auxiliary losses of a model's last forward which loss they belong to, before its backward.

    They ride on the layers' own backward. What is done to `outputs.loss` on its way there (divided by the number of
    accumulated batches, multiplied by a gradient scaler) is done to them by itself; this is for a training loop that
    computes its loss from the logits. Without it they count in full in each backward.

    Args:
        loss: the loss of that forward alone, as it is before it is scaled.

    Raises:
        HeadwaterError: if the model has no headwater adapter or loss.
    """
    context_of(model).follow(loss)


def is_adapted(model: nn.Module) -> bool:
    """True if the model carries an adapter of one of headwater's methods."""
    return any(_CONTEXT in module.__dict__ for module in model.modules())


def sees_batch(model: nn.Module, layer: Any) -> bool:
    """True if an adapter on `layer` may have to see its tokens where they are in the batch, and so all of them."""
    return isinstance(layer, BaseTunerLayer) and is_adapted(model) and context_of(model).needs_state


def needs_task_ids(model: nn.Module) -> bool:
    """True if the model's active adapter needs the task of every row."""
    layer = next((m for m in model.modules() if isinstance(m, MethodLayer)), None)
    if layer is None:
        return False
    configs = getattr(model, "peft_config", {})
    active = (configs.get(name) for name in layer.active_adapters)
    return any(isinstance(config, MethodConfig) and config.needs_task_ids for config in active)


@contextlib.contextmanager
def task_ids(model: nn.Module, ids: Any) -> Iterator[None]:
    """Gives the rows' task ids to every forward and `generate` inside, for code that cannot pass keywords.

    Args:
        ids: one integer per row, or a single one for all rows; repeated for beams and returned sequences.
    """
    with context_of(model).task_ids(ids):
        yield


@contextlib.contextmanager
def observe(model: nn.Module, observer: Observer, *, merging: bool = False) -> Iterator[None]:
    """Calls `observer(layer name, gate)` for every adapted layer of every forward inside.

    The gate is detached float32, in the layer's leading shape plus the number of heads, e.g. `(batch, length, N)`.

    Args:
        merging: show what `merge_with_gates` takes, averaged over tokens, instead. That is the gate itself but for
            Conditional MixLoRA, where it is the pairing of factors, `(batch, length, E, E)`.
    """
    context = context_of(model)
    observers = context.merging if merging else context.observers
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


def refuse_shared(model: nn.Module, layers: list[MethodLayer]) -> None:
    """Raises if merging into a layer would also change another module, as an output layer tied to the embeddings."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for tensor in module._parameters.values():
            holders.setdefault(id(tensor), []).append(name.removeprefix("base_model.model."))
    own = {id(layer.get_base_layer()._parameters.get("weight")): layer.name for layer in layers}
    shared = [(name, holders[key]) for key, name in own.items() if len(holders.get(key, ())) > 1]
    if shared:
        raise HeadwaterError(
            *(
                Problem(
                    f"cannot merge into {name}: {' and '.join(n.removesuffix('.base_layer') for n in names)} have one "
                    "weight, so all of them would change",
                    fix="keep the adapter unmerged, or give each a weight of its own before adapting the model",
                )
                for name, names in shared
            )
        )
