"""The command with which vLLM serves exported adapters."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` takes (vllm/config/lora.py, `MaxLoRARanks`)."""
_UNFIT = ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern", "trainable_token_indices")


def serve_command(base_model: str, adapters: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> str | None:
    """`vllm serve ...` for plain LoRA folders on one base model; None where vLLM would not take them.

    vLLM takes no rank above 512, no DoRA, no bias and no trained modules beside the LoRA (`modules_to_save`), and no
    config without `r`. Of the scaling it reads `r`, `lora_alpha` and `use_rslora` alone, so adapters with patterns of
    ranks would be misread.

    Args:
        base_model: hub id or folder; empty where it is not known, and then there is no command either.
        adapters: the name to serve under -> its folder, and the content of its `adapter_config.json`.
    """
    configs = [config for _, config in adapters.values()]
    if not base_model or any(config.get(key) for config in configs for key in _UNFIT):
        return None
    if any(config.get("bias") != "none" or "r" not in config for config in configs):
        return None
    rank = max(config["r"] for config in configs)
    fitting = next((r for r in RANKS if r >= rank), None)
    if fitting is None:
        return None
    modules = [json.dumps({"name": name, "path": str(path.absolute())}) for name, (path, _) in adapters.items()]
    command = ["vllm", "serve", base_model, "--enable-lora", "--max-lora-rank", str(fitting)]
    return shlex.join([*command, "--max-loras", str(len(modules)), "--lora-modules", *modules])
