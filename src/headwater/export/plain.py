"""An adapter as plain PEFT LoRA of one rank, exactly, without headwater's types or keys.

Every layer's update is B A already (`Branch.factors`), so no matrix of the layer's size is made and none is decomposed.
The scaling is in B and every layer has the same rank: servers that ignore keys they do not know, such as
`rank_pattern`, `alpha_pattern` or `use_rslora`, cannot read another adapter out of these files.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..analysis.weights import meant_adapter
from ..errors import HeadwaterError, Problem
from ..methods.base import MethodConfig, NotMergeable
from ..tuner import MethodLayer
from ..tuner.merging import uniform_gate

WEIGHTS_FILE = "adapter_model.safetensors"


def as_plain_lora(
    model: nn.Module,
    *,
    gates: Mapping[str, Tensor] | str | None = None,
    task: int | None = None,
    adapter_name: str | None = None,
    only: Collection[str] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> A `(R, d_in)` and B `(d_out, R)`, float32; B A is the layer's whole update, R the same for all.

    Ranks that are zero in A or in B are left out; layers with fewer than the others are filled up with zeros.

    Args:
        model: a `PeftModel` with one of headwater's adapters.
        gates: layer name -> `(N,)`, gates to hold fixed where they depend on the input; or "uniform".
        task: the task, where the method has an update for each.
        adapter_name: by default the one that is active.
        only: names of the layers to write; by default all.

    Raises:
        NotMergeable: if the method needs gates or a task and none is given.
        HeadwaterError: if there is no such adapter, or `gates` is another text than "uniform".
    """
    if isinstance(gates, str) and gates != "uniform":
        what = f"gates are a dictionary from layer name to gate, or 'uniform', not {gates!r}"
        raise HeadwaterError(Problem(what, "gates"))
    name, layers = method_layers(model, adapter_name, only)
    by_task = getattr(getattr(model, "peft_config", {}).get(name), "needs_task_ids", False)
    found = {}
    for layer in layers:
        branch = layer.branch(name)
        gate = uniform_gate(branch) if isinstance(gates, str) else (gates or {}).get(layer.name)
        try:
            factors = branch.factors(gate, task)
        except NotMergeable as error:  # the way out that it names merges; here it is an argument
            fix = "give task=, a task's id" if by_task else "give gates=, for every layer, to hold them fixed"
            raise NotMergeable(*(Problem(problem.what, layer.name, fix) for problem in error.problems)) from error
        A, B = (factor.detach().float().cpu() for factor in factors)
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
    gates: Mapping[str, Tensor] | str | None = None,
    task: int | None = None,
    adapter_name: str | None = None,
    only: Collection[str] | None = None,
) -> int:
    """Writes the adapter as plain LoRA: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        model, gates, task, adapter_name, only: as in `as_plain_lora`.
        adapter: the folder that the adapter was loaded from; what it holds besides the method's tensors, such as a
            trained vocabulary head (`modules_to_save`), is taken along.
        folder: where to, made if need be; a caller that wants it whole or not at all uses `new_folder`.

    Returns:
        The rank.
    """
    adapter, folder = Path(adapter), Path(folder)
    layers = as_plain_lora(model, gates=gates, task=task, adapter_name=adapter_name, only=only)
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": tensor
        for name, factors in layers.items()
        for letter, tensor in zip("AB", factors, strict=True)
    }
    beside = {k: t for k, t in load_file(adapter / WEIGHTS_FILE).items() if "_branch." not in k}
    rank = len(next(iter(layers.values()))[0])
    folder.mkdir(parents=True, exist_ok=True)
    plain_config(model, rank, adapter_name, only).save_pretrained(str(folder))
    save_file({**tensors, **beside}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return rank


def plain_config(
    model: Any, rank: int, adapter_name: str | None = None, only: Collection[str] | None = None
) -> LoraConfig:
    """PEFT's config of the written adapter: the scaling `lora_alpha / r` is 1."""
    name, layers = method_layers(model, adapter_name, only)
    config: MethodConfig = model.peft_config[name]
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


def method_layers(
    model: nn.Module, adapter_name: str | None = None, only: Collection[str] | None = None
) -> tuple[str, list[MethodLayer]]:
    """The adapter of that name, by default the active one, and the layers that it is on, or those of them in `only`.

    Raises:
        HeadwaterError: if there is no such adapter, or it is not one of headwater's.
    """
    name = meant_adapter(model, adapter_name)
    layers = [m for m in model.modules() if isinstance(m, MethodLayer) and name in m.branches]
    if not layers:
        raise HeadwaterError(Problem("this model has no headwater adapter", fix="load one with PeftModel first"))
    return name, [layer for layer in layers if only is None or layer.name in only]


def _targets(model: Any, names: list[str]) -> list[str]:
    """The layers' last names where those mean exactly these layers, else their full names."""
    last = sorted({name.rpartition(".")[2] for name in names})
    meant = {
        name
        for name, module in model.get_base_model().named_modules()
        if name.rpartition(".")[2] in last and not isinstance(module, nn.ModuleDict)
    }
    return last if meant == set(names) else sorted(names)
