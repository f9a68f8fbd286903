"""Short words for what nearly every test here does."""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_models import make_tiny_llama
from torch import Tensor, nn

import headwater
from headwater.methods.files import write_tensors

from .rows import Row

TARGETS = ["gate_proj", "up_proj", "down_proj"]
DEFAULTS = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": TARGETS,
    "task_type": "CAUSAL_LM",
    "init_seed": 1,
}
LAYERS = {  # the tiny llama's, by module name: d_in, d_out
    f"model.layers.{n}.mlp.{name}": (48, 32) if name == "down_proj" else (32, 48) for n in range(2) for name in TARGETS
}


FILES = tempfile.TemporaryDirectory()  # of what some methods are made from


def config(row: Row, base: nn.Module | None = None, **fields: Any) -> PeftConfig:
    """The row's config; where it is made from a file, a file for the layers of `base`, by default the tiny llama's."""
    fields = {**DEFAULTS, **row.fields, **fields}
    if row.ingredient is not None:
        name, tensors_of = row.ingredient
        shared = {
            key: value for key, value in fields.items() if key in {f.name for f in dataclasses.fields(LoraConfig)}
        }
        plain = get_peft_model(copy.deepcopy(base or make_tiny_llama()), LoraConfig(**shared))
        tensors = {}
        for key, layer in plain.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                tensors |= tensors_of(key, layer.r["default"], layer.in_features, layer.out_features)
        number = f"{os.getpid()}-{len(os.listdir(FILES.name))}"  # forked ranks share the folder
        fields[name] = f"{FILES.name}/{row.id}-{number}.safetensors"
        write_tensors(tensors, fields[name], {})
    return headwater.make_config(row.name, **fields)


def adapt(row: Row, base: nn.Module, *, stirred: bool = True, autocast: bool = True, **fields: Any) -> PeftModel:
    """The base model with the row's method; `stirred` moves the adapter away from its start, as training would."""
    model = get_peft_model(base, config(row, base, **fields), autocast_adapter_dtype=autocast)
    if stirred:
        stir(model)
    return model


def stir(model: nn.Module, adapter: str = "default", seed: int = 0) -> None:
    """Adds noise to each of an adapter's parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"_branch.{adapter}." in name:
                noise = torch.empty(parameter.shape).normal_(0, 0.3, generator=generator)
                parameter.add_(noise.to(parameter.dtype))


def tokens(rows: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    """Token ids below the tiny model's special ones, `(rows, length)`."""
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def task_kwargs(row: Row, rows: int = 2, first: int = 0) -> dict[str, Tensor]:
    """The keyword with tasks `first, first + 1, ...`, where the row's method needs it."""
    return {"headwater_task_ids": (torch.arange(rows) + first) % 3} if row.needs_task_ids else {}


@torch.no_grad()
def logits(row: Row, model: nn.Module, x: Tensor | None = None, **kwargs: Any) -> Tensor:
    x = tokens() if x is None else x
    return model(input_ids=x, **task_kwargs(row, x.shape[0]), **kwargs).logits


def layer_output(row: Row, model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What the adapted layer makes of x, `(rows, length, d_in)`, as part of a forward pass of the whole model."""
    layer, seen = model.get_submodule(f"base_model.model.{name}"), []
    hooks = (
        layer.register_forward_pre_hook(lambda module, args: (x,)),
        layer.register_forward_hook(lambda module, args, y: seen.append(y)),
    )
    model(input_ids=tokens(*x.shape[:2]), **task_kwargs(row, x.shape[0]))
    for hook in hooks:
        hook.remove()
    return seen[0]


def train_loss(row: Row, model: nn.Module, *, seed: int = 0, first_task: int = 0) -> Tensor:
    x = tokens(seed=seed)
    return model(input_ids=x, labels=x, **task_kwargs(row, x.shape[0], first_task)).loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float = 0.0, rtol: float = 0.0) -> None:
    """Same keys; same values, bit for bit unless a tolerance is given."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], *, relative: float = 1e-4) -> None:
    """Same keys; each tensor's difference is at most this part of its length."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= relative * value.norm() + 1e-7, name


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors that are not an adapter's, by their name in the bare model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "_branch." not in name
    }
