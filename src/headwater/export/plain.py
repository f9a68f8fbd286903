"""An adapter as plain PEFT LoRA of one rank, exactly, without headwater's types or keys.

Every layer's update is B A already (`Branch.factors`), so no matrix of the layer's size is made and none is decomposed.
The scaling is in B and every layer has the same rank: servers that ignore keys they do not know, such as
`rank_pattern`, `alpha_pattern` or `use_rslora`, cannot read another adapter out of these files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import HeadwaterError, Problem
from ..methods.base import MethodConfig
from ..tuner import MethodLayer

ADAPTER = "default"
WEIGHTS_FILE = "adapter_model.safetensors"


def as_plain_lora(
    model: nn.Module, *, gates: Mapping[str, Tensor] | None = None, task: int | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> A `(R, d_in)` and B `(d_out, R)`, float32; B A is the layer's whole update, R the same for all.

    Ranks that are zero in A or in B are left out; layers with fewer than the others are filled up with zeros.

    Args:
        model: a `PeftModel` with one of headwater's adapters.
        gates: layer name -> `(N,)`, gates to hold fixed where they depend on the input.
        task: the task, where the method has an update for each.

    Raises:
        NotMergeable: if the method needs gates or a task and none is given.
    """
    found = {}
    for layer in method_layers(model):
        gate = None if gates is None else gates.get(layer.name)
        A, B = (factor.detach().float().cpu() for factor in layer.branch(ADAPTER).factors(gate, task))
        used = A.any(dim=1) & B.any(dim=0)
        found[layer.name] = (A[used], B[:, used])
    rank = max(1, *(len(A) for A, _ in found.values()))
    return {
        name: (
            nn.functional.pad(A, (0, 0, 0, rank - len(A))).contiguous(),
            nn.functional.pad(B, (0, rank - len(A))).contiguous(),
        )
        for name, (A, B) in found.items()
    }


def write_plain_lora(
    model: nn.Module,
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    gates: Mapping[str, Tensor] | None = None,
    task: int | None = None,
) -> int:
    """Writes the adapter as plain LoRA: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        model, gates, task: as in `as_plain_lora`.
        adapter: the folder that the adapter was loaded from; what it holds besides the method's tensors, such as a
            trained vocabulary head (`modules_to_save`), is taken along.
        folder: where to, made if need be; a caller that wants it whole or not at all uses `new_folder`.

    Returns:
        The rank.
    """
    adapter, folder = Path(adapter), Path(folder)
    layers = as_plain_lora(model, gates=gates, task=task)
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": tensor
        for name, factors in layers.items()
        for letter, tensor in zip("AB", factors, strict=True)
    }
    beside = {k: t for k, t in load_file(adapter / WEIGHTS_FILE).items() if "_branch." not in k}
    rank = len(next(iter(layers.values()))[0])
    folder.mkdir(parents=True, exist_ok=True)
    plain_config(model, rank).save_pretrained(str(folder))
    save_file({**tensors, **beside}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return rank


def plain_config(model: Any, rank: int) -> LoraConfig:
    """PEFT's config of the written adapter: the scaling `lora_alpha / r` is 1."""
    config: MethodConfig = model.peft_config[ADAPTER]
    layers = list(method_layers(model))
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(model, [layer.name for layer in layers]),
        modules_to_save=config.modules_to_save,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def method_layers(model: nn.Module) -> list[MethodLayer]:
    """The layers that headwater's adapter is on.

    Raises:
        HeadwaterError: if there are none.
    """
    layers = [m for m in model.modules() if isinstance(m, MethodLayer) and ADAPTER in m.branches]
    if not layers:
        raise HeadwaterError(Problem("this model has no headwater adapter", fix="load one with PeftModel first"))
    return layers


def _targets(model: Any, names: list[str]) -> list[str]:
    """The layers' last names where those mean exactly these layers, else their full names."""
    last = sorted({name.rpartition(".")[2] for name in names})
    meant = {
        name
        for name, module in model.get_base_model().named_modules()
        if name.rpartition(".")[2] in last and not isinstance(module, nn.ModuleDict)
    }
    return last if meant == set(names) else sorted(names)
