"""Run in a process of its own, which must never load headwater: the logits of exported folders.

    python stock_peft.py FOLDER

FOLDER holds `base/`, `input.safetensors` and `exports.json`, a list of folders; it gets `logits.safetensors`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(folder: Path) -> None:
    x = load_file(folder / "input.safetensors")["x"]
    found = {}
    for name in json.loads((folder / "exports.json").read_text()):
        adapted = (folder / name / "adapter_config.json").is_file()
        model = AutoModelForCausalLM.from_pretrained(
            folder / ("base" if adapted else name), attn_implementation="eager"
        )
        if adapted:
            model = PeftModel.from_pretrained(model, folder / name)
        with torch.no_grad():
            found[name] = model.eval()(input_ids=x).logits.contiguous()
    assert "headwater" not in sys.modules
    save_file(found, folder / "logits.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
