"""Adapters as their authors' code saved them, turned into headwater's: R-LoRA, HydraLoRA and LoRI.

Formats, per adapted linear layer `d_in -> d_out`, in `adapter_model.safetensors` beside `adapter_config.json`:

    R-LoRA, HydraLoRA   base_model.model.<layer>.lora_A.weight (r, d_in), .lora_B0.weight ... (d_out, r),
                        .lora_route.weight (N, d_in); the config calls itself LORA and has `lora_nums`
    LoRI                base_model.model.<layer>.lora_A.weight, .lora_B.weight: PEFT's own LoRA, dense

What is written computes what the authors' code computes when it loads the same files. For R-LoRA that is not quite what
was trained, see `Imported.notes`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import HeadwaterError, Problem
from .export.folder import check_output, new_folder
from .methods import make_config

METHODS = ("rlora", "hydralora", "lori")
WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>A|B|B\d+|route)\.weight")
_CONVERT = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "t = torch.load('adapter_model.bin', map_location='cpu', weights_only=True); "
    "save_file({k: v.contiguous() for k, v in t.items()}, 'adapter_model.safetensors')\""
)
_SPARSE = 0.5  # a LoRI adapter with fewer entries than this share is stored by their places

Layers = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Imported:
    """What was imported.

    Args:
        method: the method's name here.
        base_model: what the authors' config says it was; empty if nothing.
        layers, parameters: number of adapted layers, and of values in the file written.
        notes: what the files do not say and a user should know, in whole sentences.
    """

    method: str
    base_model: str
    layers: int
    parameters: int
    notes: tuple[str, ...]


def import_adapter(
    source: Path, output: Path, *, method: str | None = None, rslora: bool = False, base_model: str | None = None
) -> Imported:
    """Reads an adapter of the authors' code and writes headwater's.

    Args:
        source: folder with `adapter_config.json` and `adapter_model.safetensors`.
        output: the adapter folder to write; it must not exist, or be empty.
        method: "rlora", "hydralora" or "lori"; may be left out where the files tell, which is LoRI.
        rslora: for R-LoRA, scale by alpha / sqrt(r), as its script trains, and not by alpha / r, as its code reloads.
        base_model: the base model, where the authors' config names none or another.

    Raises:
        HeadwaterError: if the weights are pickled, or a file is not of the format; names the first tensor that differs.
    """
    check_output(output)
    if method is not None and method not in METHODS:
        raise HeadwaterError(Problem(f"cannot import {method!r}", "--method", f"one of {', '.join(METHODS)}"))
    config = _config(source)
    file = source / WEIGHTS
    tensors = _tensors(source)
    layers = _layers(tensors, file)
    routed = any("route" in parts or "B0" in parts for parts in layers.values())
    method = _method(method, routed, file)
    if rslora and method != "rlora":
        raise HeadwaterError(Problem("only R-LoRA's scale is in doubt", "--rslora", "leave it out"))
    fields: dict[str, Any] = {
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "target_modules": _targets(layers),
        "task_type": config.get("task_type") or "CAUSAL_LM",
    }
    if not isinstance(fields["r"], int) or not isinstance(fields["lora_alpha"], int | float):
        raise HeadwaterError(Problem("`r` and `lora_alpha` should be numbers", str(source / "adapter_config.json")))
    if routed:
        more, written = _multi_head(method, config, layers, fields["r"], file)
    else:
        more, written = _lori(config, layers, fields["r"], file)
    notes = _rlora_notes(fields["r"], fields["lora_alpha"], rslora) if method == "rlora" else ()
    made = make_config(method, **{**fields, **more, **({"use_rslora": rslora} if method == "rlora" else {})})
    made.base_model_name_or_path = base_model or config.get("base_model_name_or_path")
    made.inference_mode = True
    named = {
        f"base_model.model.{layer}.{method}_branch.{name}": tensor
        for layer, held in written.items()
        for name, tensor in held.items()
    }
    with new_folder(output) as folder:
        made.save_pretrained(str(folder))
        save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    count = sum(t.numel() for t in named.values())
    return Imported(method, made.base_model_name_or_path or "", len(layers), count, notes)


def _config(source: Path) -> dict[str, Any]:
    file = source / "adapter_config.json"
    if not file.is_file():
        fix = "give a folder with adapter_config.json and adapter_model.safetensors; one on a hub, download first"
        raise HeadwaterError(Problem("there is no adapter_config.json here", str(source), fix))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeadwaterError(Problem(f"not readable as JSON: {error}", str(file))) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else None
        what = f"peft_type is {found!r}; the formats that can be imported call themselves LORA"
        raise HeadwaterError(Problem(what, str(file)))
    other = [key for key in ("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out") if config.get(key)]
    other += ["bias"] if config.get("bias", "none") != "none" else []
    if other:
        raise HeadwaterError(
            *(Problem(f"{key}: {config[key]!r} is not part of these methods", str(file)) for key in other)
        )
    return config


def _tensors(source: Path) -> dict[str, Tensor]:
    file = source / WEIGHTS
    if not file.is_file():
        pickled = sorted(p.name for p in source.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if not pickled:
            raise HeadwaterError(Problem(f"there is no {WEIGHTS} here", str(source)))
        fix = f"if you trust where it is from, convert it in its folder: {_CONVERT}"
        raise HeadwaterError(Problem("the weights are pickled, and headwater never unpickles", pickled[0], fix))
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise HeadwaterError(Problem(f"not a readable safetensors file: {error}", str(file))) from error
    for key, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            kind = "has values that are not finite" if tensor.is_floating_point() else f"is {tensor.dtype}"
            raise HeadwaterError(Problem(f"{key} {kind}", str(file)))
    return tensors


def _layers(tensors: Mapping[str, Tensor], file: Path) -> Layers:
    layers: Layers = {}
    for key in sorted(tensors):
        match = _KEY.fullmatch(key)
        if match is not None:
            layers.setdefault(match["layer"], {})[match["part"]] = tensors[key]
        elif not key.endswith(".lora_B.mask"):  # newer PEFTs save LoRI's mask; its zeros are in B already
            expected = "base_model.model.<layer>.lora_A.weight, .lora_B.weight, .lora_B0.weight or .lora_route.weight"
            raise HeadwaterError(
                Problem(f"the tensor {key} is not of any known format", str(file), f"known: {expected}")
            )
    if not layers:
        raise HeadwaterError(Problem("there are no tensors in it", str(file)))
    return layers


def _method(method: str | None, routed: bool, file: Path) -> str:
    if routed and method is None:
        raise HeadwaterError(
            Problem(
                "R-LoRA and HydraLoRA save the same files, so they do not tell which this is",
                str(file),
                "say --method rlora or --method hydralora",
            )
        )
    method = method or "lori"
    if routed == (method == "lori"):
        found = "heads and a router, as of R-LoRA or HydraLoRA" if routed else "one head and no router, as of LoRI"
        raise HeadwaterError(Problem(f"the file has {found}", str(file), f"{method} is not it; change --method"))
    return method


def _targets(layers: Layers) -> list[str]:
    """The shortest `target_modules` that name these layers: the ends of names, where every block has them all."""
    blocks: dict[str, set[str]] = {}
    for name in layers:
        match = re.fullmatch(r"(.*\.\d+)\.(.+)", name)
        if match is None:
            return sorted(layers)
        blocks.setdefault(match[1], set()).add(match[2])
    ends = next(iter(blocks.values()))
    numbers = sorted(int(block.rpartition(".")[2]) for block in blocks)
    whole = all(held == ends for held in blocks.values()) and numbers == list(range(len(numbers)))
    return sorted({end.rpartition(".")[2] for end in ends}) if whole else sorted(layers)


def _check(layer: str, part: str, held: Mapping[str, Tensor], shape: tuple[int | None, ...], file: Path) -> Tensor:
    """The tensor, if it is there and of that shape; None is any size."""
    key = f"base_model.model.{layer}.lora_{part}.weight"
    if part not in held:
        raise HeadwaterError(Problem(f"the tensor {key} is missing", str(file)))
    tensor = held[part]
    fits = tensor.dim() == len(shape) and all(
        want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise HeadwaterError(Problem(f"{key} has shape {tuple(tensor.shape)}, not ({wanted})", str(file)))
    return tensor


def _multi_head(
    method: str, config: Mapping[str, Any], layers: Layers, r: int, file: Path
) -> tuple[dict[str, Any], Layers]:
    first = next(iter(layers.values()))
    N = config.get("lora_nums") or sum(part.startswith("B") for part in first)
    written: Layers = {}
    for layer, held in sorted(layers.items()):
        A = _check(layer, "A", held, (r, None), file)
        B = [_check(layer, f"B{n}", held, (None, r), file) for n in range(N)]
        for n in range(N):
            _check(layer, f"B{n}", held, (len(B[0]), r), file)
        router = _check(layer, "route", held, (N, A.shape[1]), file)
        surplus = sorted(set(held) - {"A", "route", *(f"B{n}" for n in range(N))})
        if surplus:
            key = f"base_model.model.{layer}.lora_{surplus[0]}.weight"
            raise HeadwaterError(Problem(f"the tensor {key} is one too many: there are {N} heads", str(file)))
        written[layer] = {"A": A, "B": torch.stack([head.T for head in B]).contiguous(), "router": router}
    dropout = config.get("lora_dropout") or 0.0
    if method == "rlora":  # zeros: no start to take out, as the file has none
        return {"num_heads": N, "head_dropout": dropout, "init": "zeros", "router_init": "kaiming"}, written
    return {"num_heads": N, "lora_dropout": dropout, "input_dropout": "per_head"}, written


def _lori(config: Mapping[str, Any], layers: Layers, r: int, file: Path) -> tuple[dict[str, Any], Layers]:
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise HeadwaterError(Problem("rank_pattern and alpha_pattern are not part of LoRI", "adapter_config.json"))
    factors = {}
    for layer, held in sorted(layers.items()):
        A = _check(layer, "A", held, (r, None), file)
        factors[layer] = (A, _check(layer, "B", held, (None, r), file).T.contiguous())
    fields: dict[str, Any] = {
        "lora_dropout": config.get("lora_dropout") or 0.0,
        "use_rslora": bool(config.get("use_rslora")),
    }
    kept = {layer: B.flatten().nonzero().squeeze(1).int() for layer, (_, B) in factors.items()}
    share = sum(map(len, kept.values())) / sum(B.numel() for _, B in factors.values())
    if share > _SPARSE:  # LoRI-D
        return fields, {layer: {"A": A, "B": B} for layer, (A, B) in factors.items()}
    fields["kept"] = {layer: len(index) for layer, index in kept.items()}
    fields["mask_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()  # of the file that the places are from
    return fields, {
        layer: {"A": A, "index": kept[layer], "values": B.flatten()[kept[layer].long()]}
        for layer, (A, B) in factors.items()
    }


def _rlora_notes(r: int, alpha: float, rslora: bool) -> tuple[str, ...]:
    reload, train = alpha / r, alpha / r**0.5
    taken = (
        f"{train:g} is taken, as asked; the authors' code would compute with {reload:g}"
        if rslora
        else f"{reload:g} is taken, as the authors' code computes on reload; --rslora takes {train:g}"
    )
    return (
        "The heads' starting offset is not in R-LoRA's files: training subtracts it from the base model's weights and "
        "saves the adapter alone. So this adapter, like the authors' own reload, computes on base weights that are off "
        "by it, much if trained at the paper's starting scale and next to nothing at the released script's.",
        f"The scale is not in R-LoRA's files: its script trains with alpha / sqrt(r) = {train:g} and reloads with "
        f"alpha / r = {reload:g}. {taken}.",
    )
