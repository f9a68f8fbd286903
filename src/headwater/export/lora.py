"""PEFT's own LoRA as files that cannot be misread: copied as they are, or with one rank and the scaling 1."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..compose.adapter import CONFIG_FILE, WEIGHTS_FILE, config_problems, rank_and_scaling, read_config, read_tensors
from ..errors import HeadwaterError, Problem
from ..files import write_json

_OUT = "PEFT loads the adapter's folder as it is; where PEFT can merge it, headwater export --merge writes the model"


def rewrite_lora(adapter: Path, folder: Path) -> int:
    """Writes a LoRA adapter into `folder`, and returns its rank.

    Without patterns it is copied: the scaling is in `r`, `lora_alpha` and `use_rslora`, which every program reads. With
    `rank_pattern` or `alpha_pattern`, which not every program does, scalings go into B, in float32, and layers with
    fewer ranks are filled up with zeros. Modules trained beside it (`modules_to_save`) come along.

    Raises:
        HeadwaterError: the adapter does more than `scaling * B A x`: DoRA, say, or trained biases; or its weights are
            missing, pickled or damaged.
    """
    config = read_config(adapter)
    where = str(adapter / CONFIG_FILE)
    if problems := config_problems({**config, "modules_to_save": None}, where):
        raise HeadwaterError(*(Problem(p.what, p.where, p.fix or _OUT) for p in problems))
    tensors = read_tensors(adapter)
    if not (config.get("rank_pattern") or config.get("alpha_pattern")):
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(adapter / name, folder / name)
        return int(config.get("r", 8))
    tensors, rank = _levelled(tensors, config, str(adapter / WEIGHTS_FILE))
    plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, {**config, **plain})
    return rank


def _levelled(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> tuple[dict[str, Tensor], int]:
    """The tensors with all factors of the largest rank and the scaling in B, and that rank."""
    ends = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
    layers = [name.removesuffix(ends["A"]) for name in tensors if name.endswith(ends["A"])]
    factors = {layer + end for layer in layers for end in ends.values()}
    strange = [name for name in tensors if ".lora_" in name and (name not in factors or tensors[name].dim() != 2)]
    if strange or not factors <= set(tensors):
        what = f"it holds more than LoRA on linear layers: {', '.join(strange) or 'factors are missing'}"
        raise HeadwaterError(Problem(what, where, _OUT))
    found = dict(tensors)
    rank = max(tensors[layer + ends["A"]].shape[0] for layer in layers)
    for layer in layers:
        A, B = (tensors[layer + ends[letter]].float() for letter in "AB")
        said, scaling = rank_and_scaling(config, layer.removeprefix("base_model.model."))
        if not said == A.shape[0] == B.shape[1]:
            what = f"{layer} has rank {A.shape[0]}, and {CONFIG_FILE} says {said}"
            raise HeadwaterError(Problem(what, where, "save or fetch the adapter again"))
        more = rank - said
        found[layer + ends["A"]] = torch.cat([A, A.new_zeros(more, A.shape[1])])
        found[layer + ends["B"]] = torch.cat([B * scaling, B.new_zeros(B.shape[0], more)], 1)
    return found, rank
