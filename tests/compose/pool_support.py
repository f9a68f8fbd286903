"""Stock PEFT LoRA adapters on a tiny model, a pool of them, and the model with updates merged in by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_tiny_llama, make_tiny_tokenizer

from headwater.compose import AdapterPool

MLP = ["up_proj", "down_proj"]
PLANS = {  # ranks, scalings and layers all differ
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": MLP},
    "rs": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", *MLP]},
    "patterns": {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["up_proj", "v_proj"],
        "rank_pattern": {"layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"v_proj": 2},
    },
    "twin": {"r": 4, "lora_alpha": 8, "target_modules": MLP},
}


def save_base(folder: Path) -> Path:
    make_tiny_llama().save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def save_lora(folder: Path, base: Path | str, seed: int = 0, *, size: float = 0.2, **fields) -> Path:
    """A stock LoRA adapter whose factors are random, so that it does something."""
    model = get_peft_model(make_tiny_llama(), LoraConfig(**{**PLANS["plain"], "task_type": "CAUSAL_LM", **fields}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


def make_pool(folder: Path, plans: dict[str, dict] = PLANS) -> AdapterPool:
    base = save_base(folder / "base")
    pool = AdapterPool.create(folder / "pool", str(base))
    for seed, (name, fields) in enumerate(plans.items()):
        pool.add(save_lora(folder / name, base, seed, **fields), name, samples=[f"{name} text {i}" for i in range(3)])
    return pool


def add_again(pool: AdapterPool, name: str, scratch: Path, **changes) -> None:
    """The adapter anew in the pool: the same weights, with `changes` in its config."""
    shutil.copytree(pool.folder(name), scratch)
    file = scratch / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    pool.remove(name)
    pool.add(scratch, name, same_base=True)


def merged(model, *weighted):
    """The model with `sum w s B A` added to its weights by hand; `weighted` are (weight, adapter)."""
    with torch.no_grad():
        for weight, adapter in weighted:
            for layer, factors in adapter.layers.items():
                W = model.get_submodule(layer).weight
                for rank in range(factors.A.shape[0]):
                    W += weight * factors.scaling * torch.outer(factors.B[:, rank].to(W), factors.A[rank].to(W))
    return model
