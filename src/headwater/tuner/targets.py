"""Which layers an adapter goes on: what cannot carry it is left out of "all-linear", and refused where it is named."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn

from ..errors import HeadwaterError, Problem
from ..methods.base import MethodConfig
from .layer import MethodLayer, linear_sizes

# By model type, the layers whose weights the model's code takes, everywhere, in training or in its kernels on a GPU, so
# that their forward does not run there. PEFT refuses some of them for its LoRA.
_MAMBA, _MAMBA2 = {"x_proj", "dt_proj", "out_proj", "conv1d"}, {"out_proj", "conv1d"}
_BYPASSED = {
    **dict.fromkeys(("mamba", "falcon_mamba"), _MAMBA),
    **dict.fromkeys(("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"), _MAMBA2),
    "jamba": {"dt_proj"},
    **{kind: {"correction_coefs"} for kind in ("gemma3n", "gemma3n_text")},
    "longcat_flash": {"classifier"},
    "wavlm": {"q_proj", "k_proj", "v_proj", "out_proj"},
}
_CARRIES = "carries"
# What PEFT trains in whole for a task, and writes into `modules_to_save` only after the layers are adapted.
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def settle_targets(tuner: BaseTuner, config: MethodConfig, model: nn.Module) -> None:
    """Makes "all-linear" the layers that can carry the adapter, with one warning about the others.

    Raises:
        HeadwaterError: if a layer that is named cannot carry it, or none of all can; nothing is changed then.
    """
    chosen = config.target_modules
    everything = isinstance(chosen, str) and chosen.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    if everything:
        _maybe_include_all_linear_layers(config, model)
        # PEFT takes what only ends on such a name, as "pre_classifier" does, for trained in whole as well
        whole = (*(config.modules_to_save or ()), *_HEADS.get(config.task_type or "", ()))
        meant = {*(config.target_modules or ()), *_adapted_layers(model)}
        meant = {name for name in meant if not name.endswith(whole)}
        config.target_modules = {name for name in meant if _in_layers(config, name)}
        if meant and not config.target_modules:
            config.target_modules = chosen
            of = f" of {config.layers_pattern}" if config.layers_pattern else ""
            what = f"no linear layer is in layers {config.layers_to_transform}{of}"
            raise HeadwaterError(Problem(what, "layers_to_transform", "layers count from 0"))
    unfit = _unfit(tuner, config, model)
    if not unfit:
        return
    problems = _problems(config, unfit, model)
    if not everything or not set(config.target_modules or ()) - unfit.keys():
        config.target_modules = chosen
        raise HeadwaterError(*problems)
    config.target_modules = set(config.target_modules or ()) - unfit.keys()
    left_out = "; ".join(problem.what for problem in problems)
    warnings.warn(f"target_modules='all-linear' leaves out what cannot carry the adapter: {left_out}", stacklevel=2)


def _in_layers(config: MethodConfig, name: str) -> bool:
    """Whether `layers_to_transform` means a layer. PEFT does not ask where a layer is named in full."""
    if config.layers_to_transform is None:
        return True
    parent, _, last = name.rpartition(".")
    named_by_its_end = copy.copy(config)
    named_by_its_end.target_modules = {last}
    return bool(parent and check_target_module_exists(named_by_its_end, name))


def rank_of(config: MethodConfig, name: str) -> int:
    """The rank on the layer of that name."""
    return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)


def _adapted_layers(model: Any) -> list[str]:
    """Linear layers that carry adapters already, which PEFT knows by a class name that ours has not."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [name for name, module in model.named_modules() if isinstance(module, MethodLayer) and module is not head]


def _unfit(tuner: BaseTuner, config: MethodConfig, model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Layers that are meant and cannot carry the adapter, and why: their rank and sizes, a hint where they are gone
    around, or what they are: no linear layer, or one that carries an adapter of another tuner."""
    bypassed, hints = _BYPASSED.get(getattr(getattr(model, "config", None), "model_type", ""), set()), _hints(model)
    unfit: dict[str, tuple[Any, ...]] = {}
    inside: tuple[str, ...] = ()  # the last adapted layer; its parts come right behind it
    for name, module in model.named_modules():
        if not name or name.startswith(inside):  # as PEFT: the model itself, and what other adapters are made of
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (f"{name}.",)
        if isinstance(module, BaseTunerLayer) and not isinstance(module, MethodLayer):
            unfit[name] = (_CARRIES, type(module).__module__.split(".")[-2])
        elif name.rpartition(".")[2] in bypassed or id(module) in hints:
            unfit[name] = (hints.get(id(module), ""),)
        elif (sizes := _sizes(module)) is None:
            unfit[name] = ("", type(module).__name__)
        elif rank_of(config, name) > min(sizes):
            unfit[name] = (rank_of(config, name), *sizes)
    return {name: why for name, why in unfit.items() if tuner._check_target_module_exists(config, name)}


def _hints(model: nn.Module) -> dict[int, str]:
    """The layers that PyTorch's own blocks go around, by id, and what else there is to do about it."""
    hints: dict[int, str] = {}
    fast = torch.backends.mha.get_fastpath_enabled()  # a block's feed-forward layers then run in training alone
    for module in model.modules():
        forward = getattr(type(module), "forward", None)
        if forward is nn.MultiheadAttention.forward:
            hints[id(module.out_proj)] = ""
        elif forward is nn.TransformerEncoderLayer.forward and fast:
            switch = ", or call torch.backends.mha.set_fastpath_enabled(False) here and wherever the model runs"
            hints |= {id(module.linear1): switch, id(module.linear2): switch}
    return hints


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    try:
        return linear_sizes(module)
    except TypeError:
        return None


def _problems(config: MethodConfig, unfit: dict[str, tuple[Any, ...]], model: nn.Module) -> list[Problem]:
    """One for layers of the same last name, sizes and rank: a deep model has hundreds of layers."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, why in unfit.items():
        alike.setdefault((name.rpartition(".")[2], *why), []).append(name)
    fitting = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name not in unfit and _sizes(module) is not None
    }
    last = {name: name.rpartition(".")[2] for name in unfit}
    leave_out = ", ".join(sorted({name if last[name] in fitting else last[name] for name in unfit}))
    problems = []
    for (_, *sizes), names in alike.items():
        more = f", and {len(names) - 1} more of this name" if len(names) > 1 else ""
        if len(sizes) == 1:
            what = f"layer {names[0]} cannot be adapted: the model reads its weight and goes around it{more}"
            problems.append(Problem(what, "target_modules", f"leave it out, exclude_modules: [{leave_out}]{sizes[0]}"))
            continue
        if sizes[0] == _CARRIES:  # its adapter's tensors would be saved under names that no other model has
            what = f"{names[0]} carries an adapter of another kind already ({sizes[1]}){more}"
            fix = f"leave it out, exclude_modules: [{leave_out}], or adapt a model of its own"
            problems.append(Problem(what, "target_modules", fix))
            continue
        if len(sizes) == 2:
            what = f"{names[0]} is no linear layer but a {sizes[1]}, which cannot be adapted{more}"
            problems.append(Problem(what, "target_modules", "name linear layers only; quantised ones are among them"))
            continue
        r, d_in, d_out = sizes
        these = "these layers" if more else "this layer"
        problems.append(
            Problem(
                f"rank {r} is larger than layer {names[0]} ({d_in} -> {d_out}) allows{more}",
                "r",
                f"use r <= {min(d_in, d_out)}, lower it for {these} alone with rank_pattern, or leave out what is too "
                f"small, exclude_modules: [{leave_out}]",
            )
        )
    return problems
