"""Run in a process of its own: loads every saved adapter in every way there is and writes the logits it computes.

    python -m tuner.fresh_process FOLDER

FOLDER holds `base/`, `adapters/<row id>/` and `pickles/<row id>`. It gets `logits.safetensors`, keyed `<row id>/<way>`,
and `failures.json` with the tracebacks of ways that failed.
"""

from __future__ import annotations

import json
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS = [
    "peft_from_pretrained",
    "peft_low_cpu_mem",
    "peft_load_adapter",
    "auto_peft",
    "auto_model",
    "native_load_adapter",
    "pickle",
]


def load(way: str, base: Path, adapter: Path, pickled: Path) -> Any:
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    def bare() -> Any:
        return AutoModelForCausalLM.from_pretrained(base)

    if way == "peft_from_pretrained":
        return PeftModel.from_pretrained(bare(), adapter)
    if way == "peft_low_cpu_mem":
        return PeftModel.from_pretrained(bare(), adapter, low_cpu_mem_usage=True)
    if way == "peft_load_adapter":
        model = PeftModel.from_pretrained(bare(), adapter, adapter_name="first")
        model.load_adapter(adapter, "second")
        model.set_adapter("second")
        model.delete_adapter("first")
        return model
    if way == "auto_peft":
        return AutoPeftModelForCausalLM.from_pretrained(adapter)
    if way == "auto_model":
        return AutoModelForCausalLM.from_pretrained(adapter)
    if way == "native_load_adapter":
        model = bare()
        model.load_adapter(str(adapter))
        return model
    return pickle.loads(pickled.read_bytes())


def attempt(what: Callable[[], Any]) -> tuple[Any, str]:
    try:
        return what(), ""
    except Exception:
        return None, traceback.format_exc()


def main(folder: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    unpickled = {}
    for row_id in settings["rows"]:  # first, while nobody has imported headwater: unpickling has to
        if not settings["rows"][row_id]["test_only"]:
            unpickled[row_id], _ = attempt(lambda row_id=row_id: load("pickle", *paths(folder, row_id)))

    import torch
    from safetensors.torch import load_file, save_file

    import headwater

    if any(method["test_only"] for method in settings["rows"].values()):
        from . import task_probe  # noqa: F401, a third party's method: importing its file is all

    torch.set_num_threads(settings["threads"])
    x = load_file(folder / "input.safetensors")["x"]
    found, failures = {}, {}
    for row_id, about in settings["rows"].items():
        ids = {"headwater_task_ids": torch.arange(len(x)) % 3} if about["needs_task_ids"] else {}
        for way in WAYS:
            model, failure = unpickled.get(row_id) if way == "pickle" else None, ""
            if model is None:
                model, failure = attempt(lambda way=way, row_id=row_id: load(way, *paths(folder, row_id)))
            if model is not None:
                with torch.no_grad():
                    output, failure = attempt(lambda m=model, ids=ids: m.eval()(input_ids=x, **ids).logits)
                if output is not None:
                    found[f"{row_id}/{way}"] = output.contiguous()
            if failure:
                failures[f"{row_id}/{way}"] = failure
    assert headwater.methods()
    save_file(found, folder / "logits.safetensors")
    (folder / "failures.json").write_text(json.dumps(failures))


def paths(folder: Path, row_id: str) -> tuple[Path, Path, Path]:
    return folder / "base", folder / "adapters" / row_id, folder / "pickles" / row_id


if __name__ == "__main__":
    main(Path(sys.argv[1]))
