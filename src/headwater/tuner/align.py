"""Align-LoRA: an auxiliary loss that pulls the tasks' distributions of A x together, for any method that has an A.

Liu et al., arXiv:2508.05078. No new parameters, nothing at inference; plain PEFT LoRA takes it as well.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import HeadwaterError, Problem
from ..methods.call import Call
from ..ops import attach_loss, widened
from ..ops.alignment import kl_alignment, kl_alignment_per_position, membership, mmd_alignment, over_pairs, sample
from .context import Context
from .layer import MethodLayer
from .model import context_of, install_context

LOSS_NAME = "align"


class AlignSpec(BaseModel):
    """How tasks are aligned.

    Args:
        kind: "kl" between Gaussians fitted to each task, or "mmd" (many Gaussian kernels, at most 256 tokens a task).
        weight: lambda, the weight of the loss, which is averaged over the adapted layers. Sweep it: published values
            come from code in which the loss had no gradient.
        reduction: "mean" over pairs of tasks, or "sum", the paper's Eq. 5.
        token_mode: "pooled" takes all of a task's tokens as one sample; "per_position" compares rows at each position,
            as the released code does, for "kl" only.
        tokens: which of a row's tokens take part: "all" but padding, those of its "prompt", or its "answer", which are
            those that are learned.
        detach_input: stop the gradient at the layer's input, so that only this layer's A is moved.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["kl", "mmd"] = "kl"
    weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    reduction: Literal["mean", "sum"] = "mean"
    token_mode: Literal["pooled", "per_position"] = "pooled"
    tokens: Literal["all", "prompt", "answer"] = "all"
    detach_input: bool = False

    @model_validator(mode="after")
    def _positions_are_for_kl(self) -> Self:
        if self.kind == "mmd" and self.token_mode == "per_position":
            raise HeadwaterError(Problem("per_position is for kind: kl", "token_mode", "leave token_mode out"))
        if self.tokens != "all" and self.token_mode == "per_position":
            raise HeadwaterError(Problem("per_position compares all tokens", "tokens", "leave token_mode out"))
        return self


class AlignLoss:
    """The loss on one layer's A x; one object for all layers of a model."""

    def __init__(self, spec: AlignSpec, layers: int):
        self.spec, self.layers = spec, layers
        self.needs_padding = spec.token_mode == "per_position"

    def __call__(self, call: Call, z: Tensor, again: Any) -> Tensor:
        """Returns z with the loss attached.

        Args:
            call: the layer's view of the forward.
            z: A x, `(tokens, r)`. again: computes A x from a detached x.
        """
        if self.spec.weight == 0:
            return z
        loss = self.loss(call, again() if self.spec.detach_input else z)
        call.log_loss(LOSS_NAME, loss)
        return attach_loss(z, call.weighted(loss, self.spec.weight / self.layers))

    def loss(self, call: Call, z: Tensor) -> Tensor:
        """The unweighted loss of one layer; 0 where fewer than two tasks have two rows and 4 r tokens each."""
        tasks, num_tasks = call.numbered_tasks()
        task_of_row, task_of_token = tasks.to(z.device), call.to_tokens(tasks).to(z.device)
        z = widened(z)
        counted = self.counted(call)
        counted = None if counted is None else counted.to(z.device)
        member = membership(task_of_token, counted, num_tasks).to(z.dtype)
        usable = membership(task_of_row, None, num_tasks).sum(1) >= 2
        if self.spec.token_mode == "per_position":
            distances = kl_alignment_per_position(call.by_row(z), task_of_row, num_tasks)
        else:
            usable = usable & (member.sum(1) >= 4 * z.shape[1])
            member = member * usable.unsqueeze(1)  # the others have no part in the floor under variances either
            if self.spec.kind == "kl":
                distances = kl_alignment(z, member)
            else:
                distances = mmd_alignment(z, *self.sampled(call, member, z.shape[1]))
        return over_pairs(distances, usable, reduction=self.spec.reduction)

    def sampled(self, call: Call, member: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """What `sample` makes of `member`. Layers of rank r have the same tokens, so the first one's are theirs, too:
        how many those are is read from the device."""
        assert call.state is not None
        key = "align", r, *member.shape, member.dtype, member.device
        if key not in call.state.memory:
            call.state.memory[key] = sample(member)
        return call.state.memory[key]

    def counted(self, call: Call) -> Tensor | None:
        """bool `(tokens,)`, True on those that take part; None for all."""
        valid = call.valid_tokens()
        if self.spec.tokens == "all":
            return valid
        prompt = None if call.state is None else call.state.prompt
        if prompt is None or prompt.numel() != call.tokens:
            raise HeadwaterError(
                Problem(
                    f"tokens: {self.spec.tokens} needs to know what is learned",
                    "align.tokens",
                    "pass labels; an encoder-decoder has its prompt elsewhere, take tokens: all there",
                )
            )
        if self.spec.tokens == "prompt":
            return prompt.reshape(-1)
        return ~prompt.reshape(-1) if valid is None else valid & ~prompt.reshape(-1)


def align(model: nn.Module, spec: AlignSpec | None = None, **fields: Any) -> None:
    """Adds the alignment loss to a model's training, in whatever trainer: it rides on the layers' own backward.

    Every training batch must carry `headwater_task_ids` and should hold at least two rows of two tasks. The loss is
    averaged over what active adapters are on now: call it again when others are made active, or added on other layers.

    Args:
        model: a model with one of headwater's adapters or with PEFT's LoRA. Where that computes no A x, on parameters
            and `nn.MultiheadAttention`, it is left out with a warning.
        spec: the loss; or give its fields as keywords. `weight=0` switches it off.

    Raises:
        HeadwaterError: if the model has no adapter that computes A x, an active one is PEFT's DoRA, a field is out of
            range, or both a spec and fields are given.
    """
    if spec is not None and fields:
        what = f"{' and '.join(sorted(fields))} would be ignored beside the spec"
        raise HeadwaterError(Problem(what, "align", "give one AlignSpec with all fields, or all fields as keywords"))
    try:
        spec = spec or AlignSpec(**fields)
    except ValidationError as error:
        problems = (Problem(e["msg"], ".".join(map(str, ("align", *e["loc"])))) for e in error.errors())
        raise HeadwaterError(*problems) from None
    adapted = [m for m in model.modules() if isinstance(m, MethodLayer)]
    if adapted:
        active = [name for m in adapted for name in m.active_adapters if name in m.branches]
        context = context_of(model)
        context.align = AlignLoss(spec, len(active or adapted)) if spec.weight > 0 else None
    else:
        lora: list[tuple[str, Any]] = [
            (name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer) and m.lora_A
        ]
        silent = _without_activations(lora)
        left_out = ", ".join(name for name, m in lora if m in silent)
        lora = [(name, m) for name, m in lora if m not in silent]
        if not lora:
            why = f": no tokens pass through the A of {left_out}" if left_out else ""
            fix = "target linear layers by target_modules" if left_out else "add one with get_peft_model first"
            raise HeadwaterError(Problem(f"this model has no adapter to align{why}", fix=fix))
        if spec.weight > 0:
            _refuse_dora(lora)
            if left_out:
                warnings.warn(f"align leaves out what passes no tokens through its A: {left_out}", stacklevel=2)
        active = [name for _, m in lora for name in m.active_adapters if name in m.lora_A]
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        context = install_context(base)
        context.align = AlignLoss(spec, len(active or lora)) if spec.weight > 0 else None
        for name, module in lora:
            if not any(isinstance(hook, _LoraHook) for hook in module._forward_pre_hooks.values()):
                hook = _LoraHook(context, name)
                module.register_forward_pre_hook(hook)
                hook(module, ())


def _without_activations(lora: list[tuple[str, Any]]) -> list[Any]:
    """The layers for which PEFT adds B A to the weight instead of running A."""
    whole = [m for _, m in lora if isinstance(m, MultiheadAttention)]
    parameters = [m for _, m in lora if isinstance(m, ParamWrapper) or not isinstance(m.lora_A, nn.ModuleDict)]
    return [*whole, *(m.base_layer.out_proj for m in whole), *parameters]  # A of AdaLoRA is a parameter


def _refuse_dora(lora: list[tuple[str, Any]]) -> None:
    dora = {name for _, m in lora for name in m.active_adapters if m.use_dora.get(name)}
    if dora:
        what = f"{' and '.join(sorted(dora))}: PEFT's DoRA passes more than tokens through its A"
        raise HeadwaterError(Problem(what, "align", "train it without use_dora, or without align"))


class _LoraHook:
    """On PEFT's `LoraLayer`: sees to it that each `lora_A` attaches the loss, those that are added later as well."""

    def __init__(self, context: Context, name: str):
        self.context, self.name = context, name

    def __call__(self, layer: Any, args: tuple[Tensor, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        for adapter, A in layer.lora_A.items():
            if not any(isinstance(hook, _AttachHook) for hook in A._forward_hooks.values()):
                # each adapter's runs are counted by themselves; the layer's name stays last, where it is matched
                A.register_forward_hook(_AttachHook(self.context, f"lora_A.{adapter} of {self.name}"))


class _AttachHook:
    """On a `lora_A`: attaches the loss to its output."""

    def __init__(self, context: Context, name: str):
        self.context, self.name = context, name

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], z: Tensor) -> Tensor:
        if self.context.align is None or not module.training:
            return z
        call = self.context.call(self.name, tuple(z.shape[:-1]))
        flat = z.reshape(-1, z.shape[-1])

        def again() -> Tensor:
            return torch.nn.functional.linear(args[0].detach(), module.weight).reshape(flat.shape)  # type: ignore[arg-type]

        return self.context.align(call, flat, again).reshape(z.shape)
