"""A LoRA adapter as plain matrices, read from and written to the folder that PEFT saves."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import HeadwaterError, Problem

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
Sizes = Mapping[str, tuple[int, int]]
"""Layer name -> (d_in, d_out)."""

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Fields of LoraConfig that say nothing about the arithmetic, or that are read below.
_FREE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "eva_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "init_lora_weights",
}  # fmt: skip
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base's weights as well
_OFF: tuple[Any, ...] = (None, False, "none", {}, [])
_PATTERNS = ("rank_pattern", "alpha_pattern")
_SHOWN = 3


@dataclass(frozen=True)
class LowRank:
    """One adapter on one linear layer: it adds `scaling * B A x`. A `(r, d_in)`, B `(d_out, r)`, any float dtype."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """The update as one matrix `(d_out, d_in)`."""
        return self.scaling * (self.B @ self.A)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: layer name -> factors. Layers are named as in the base model, ranks and scalings may differ."""

    name: str
    layers: dict[str, LowRank]


def read_adapter(folder: str | Path, name: str, sizes: Sizes | None = None) -> Adapter:
    """Read a PEFT LoRA adapter; nothing is unpickled.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        name: what the adapter will be called.
        sizes: the base model's linear layers, which the adapter has to fit; None leaves that out.

    Raises:
        HeadwaterError: everything that is wrong with it: files missing, pickled, linked or broken, another kind of
            adapter than LoRA, a variant of LoRA that is more than `scaling * B A x`, numbers that are not finite, or
            layers that the base model does not have.
    """
    folder = Path(folder)
    problems = _file_problems(folder)
    if problems:
        raise HeadwaterError(*problems)
    config = read_config(folder)
    problems += config_problems(config, str(folder / CONFIG_FILE))
    factors = _read_factors(folder, problems)
    layers: dict[str, LowRank] = {}
    where = str(folder / WEIGHTS_FILE)
    for layer, pair in sorted(factors.items()):
        wrong = _pair_problem(layer, pair, sizes)
        if wrong is None and not problems:
            rank, scaling = rank_and_scaling(config, layer)
            if rank == pair["A"].shape[0]:
                layers[layer] = LowRank(pair["A"], pair["B"], scaling)
                continue
            wrong = f"{layer} has rank {pair['A'].shape[0]}, and the config says {rank}"
        if wrong is not None:
            problems.append(Problem(wrong, where))
    if not factors and not problems:
        problems.append(Problem("the file holds no LoRA factors", where))
    if len(problems) > 2 * _SHOWN:
        problems = [*problems[: 2 * _SHOWN], Problem(f"and {len(problems) - 2 * _SHOWN} more problems", where)]
    if problems:
        raise HeadwaterError(*problems)
    return Adapter(name, layers)


def write_adapter(adapter: Adapter, folder: Path, base_model: str) -> None:
    """Write an adapter as a plain PEFT LoRA, exactly; `folder` is made."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    ranks = {layer: factors.rank for layer, factors in adapter.layers.items()}
    alphas = {layer: factors.scaling * factors.rank for layer, factors in adapter.layers.items()}
    r, alpha = max(ranks.values()), next(iter(alphas.values()))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        r=r,
        lora_alpha=cast(int, alpha),  # PEFT takes any number
        target_modules=sorted(adapter.layers),
        rank_pattern={layer: rank for layer, rank in ranks.items() if rank != r},
        alpha_pattern={layer: value for layer, value in alphas.items() if value != alpha},
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{layer}.lora_{which}.weight": getattr(factors, which).detach().cpu().contiguous()
        for layer, factors in adapter.layers.items()
        for which in ("A", "B")
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Raises:
        HeadwaterError: it is not a JSON object.
    """
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeadwaterError(Problem(f"not readable as JSON: {error}", str(file))) from None
    if not isinstance(config, dict):
        raise HeadwaterError(Problem("should be a JSON object", str(file)))
    return config


def _file_problems(folder: Path) -> list[Problem]:
    if folder.is_symlink() or not folder.is_dir():
        return [Problem("this is not a folder, or a link to one", str(folder), "give the adapter's folder itself")]
    problems = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        file = folder / name
        if file.is_symlink():
            fix = f"copy the adapter with its files, for instance cp -rL {folder} COPY"
            problems.append(Problem("this file is a symbolic link", str(file), fix))
        elif not file.is_file():
            problems.append(_missing(folder, name))
    return problems


def _missing(folder: Path, name: str) -> Problem:
    fix = ""
    if name == WEIGHTS_FILE and any((folder / f"adapter_model.{end}").exists() for end in ("bin", "pt", "pth")):
        fix = "there is a pickled file, which is never read; save the adapter again with a current PEFT"
    return Problem(f"there is no {name} in this folder", str(folder), fix)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, of whatever kind it is; nothing is unpickled.

    Raises:
        HeadwaterError: there is no `adapter_model.safetensors`, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise HeadwaterError(_missing(folder, WEIGHTS_FILE))
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        what = f"not a readable safetensors file: {error}"
        raise HeadwaterError(Problem(what, str(file), "fetch or save it again")) from None


def config_problems(config: Mapping[str, Any], where: str) -> list[Problem]:
    """Why an adapter with this config is not `scaling * B A x` on linear layers; empty if it is."""
    if config.get("peft_type") != "LORA":
        fix = "headwater export writes plain LoRA adapters from runs of its own methods"
        return [Problem(f"this is a {config.get('peft_type')!r} adapter, and a pool holds LoRA adapters", where, fix)]
    problems = [
        Problem(f"{key} is {value!r}, which is more than plain LoRA, scaling * B A x", where)
        for key, value in sorted(config.items())
        if key not in _FREE and value not in _OFF
    ]
    start = config.get("init_lora_weights", True)
    if start not in _HARMLESS_STARTS:
        fix = "save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        what = f"init_lora_weights is {start!r}: the adapter goes with changed base weights, so it is no plain LoRA"
        problems.append(Problem(what, where, fix))
    problems += _number_problem("r", config.get("r", 8), where, whole=True)
    problems += _number_problem("lora_alpha", config.get("lora_alpha", 8), where)
    for field in _PATTERNS:
        entries = config.get(field) or {}
        if not isinstance(entries, dict):
            problems.append(Problem(f"{field} should be a JSON object", where))
            continue
        for key, value in entries.items():
            if not _compiles(key):
                problems.append(Problem(f"{field}: {key!r} is no regular expression", where))
            problems += _number_problem(f"{field}[{key}]", value, where, whole=field == "rank_pattern")
    return problems


def _number_problem(key: str, value: Any, where: str, *, whole: bool = False) -> list[Problem]:
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if good and (value >= 1 or not whole):
        return []
    return [Problem(f"{key} is {value!r}, not a {'positive whole' if whole else 'finite'} number", where)]


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _read_factors(folder: Path, problems: list[Problem]) -> dict[str, dict[str, Tensor]]:
    try:
        tensors = read_tensors(folder)
    except HeadwaterError as error:
        problems += error.problems
        return {}
    factors: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None or tensor.dim() != 2:
            strange.append(name)
        else:
            factors.setdefault(match[1], {})[match[2]] = tensor
    if strange:
        shown = ", ".join(strange[:_SHOWN]) + (f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else "")
        what = f"it holds tensors that are not LoRA factors of linear layers: {shown}"
        where = str(folder / WEIGHTS_FILE)
        problems.append(Problem(what, where, "a pool holds adapters on linear layers only"))
    return factors


def _pair_problem(layer: str, pair: Mapping[str, Tensor], sizes: Sizes | None) -> str | None:
    if len(pair) < 2:
        return f"{layer} has lora_{next(iter(pair))} alone"
    A, B = pair["A"], pair["B"]
    if not (A.is_floating_point() and B.is_floating_point()):
        return f"{layer} holds {A.dtype} and {B.dtype}, not floating-point numbers"
    if A.shape[0] != B.shape[1]:
        return f"{layer}: A has {A.shape[0]} ranks and B {B.shape[1]}"
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        return f"{layer} holds numbers that are not finite"
    if sizes is None:
        return None
    if layer not in sizes:
        return f"the base model has no linear layer {layer}"
    if (A.shape[1], B.shape[0]) != tuple(sizes[layer]):
        wide = f"{A.shape[1]} -> {B.shape[0]}"
        return f"{layer} maps {wide}, and the base model's {sizes[layer][0]} -> {sizes[layer][1]}"
    return None


def scaling_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that decide each layer's rank and scaling, as JSON gives them back.

    With the weights, whose names say where they belong, they are the whole update. Patterns are lists of pairs, because
    the first that fits counts.
    """
    patterns = {field: [list(pair) for pair in (config.get(field) or {}).items()] for field in _PATTERNS}
    plain = {"r": config.get("r", 8), "lora_alpha": config.get("lora_alpha", 8)}
    return {**plain, "use_rslora": bool(config.get("use_rslora")), **patterns}


def rank_and_scaling(config: Mapping[str, Any], layer: str) -> tuple[int, float]:
    """A layer's rank and scaling by an adapter's config, patterns and rsLoRA included."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r = ranks.get(get_pattern_key(list(ranks), layer), config.get("r", 8))
    alpha = alphas.get(get_pattern_key(list(alphas), layer), config.get("lora_alpha", 8))
    return r, alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
