"""The demo's language model in every variant that is compared, all of them on the same base weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from headwater.base_model import cache_dir
from headwater.demo.assets import model_folder

from .layers import PublicLoop, config_of

MLP = ["gate_proj", "up_proj", "down_proj"]


def demo_model() -> Path:
    """Where `headwater demo` puts its model; run the demo once to have it."""
    return model_folder(cache_dir() / "demo")


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules on the same weights, so that many variants fit in memory."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    return sharing(model).requires_grad_(False)


def adapted(model: PreTrainedModel, config: Any, *, share: bool = True) -> nn.Module:
    """The model with an adapter on all MLP projections, every trainable tensor moved from its start."""
    config.target_modules, config.task_type = set(MLP), "CAUSAL_LM"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*head dropout on heads of this starting size")
        wrapped = get_peft_model(sharing(model) if share else copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 1e-3 * torch.randn_like(parameter)
    return wrapped


def peft_lora(model: PreTrainedModel, r: int, dropout: float) -> nn.Module:
    return adapted(model, LoraConfig(r=r, lora_alpha=r, lora_dropout=dropout))


def ours(
    model: PreTrainedModel, name: str, *, r: int, N: int, dropout: float, num_tasks: int, share: bool = True
) -> Any:
    return adapted(model, config_of(name, r=r, N=N, dropout=dropout, num_tasks=num_tasks), share=share)


def public_loop(model: PreTrainedModel, *, r: int, N: int, dropout: float) -> PreTrainedModel:
    looped = frozen(model)
    for name, module in list(looped.named_modules()):
        if name.rpartition(".")[2] in MLP:
            parent = looped.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], PublicLoop(module, r, N, dropout))  # type: ignore[arg-type]
    return looped
