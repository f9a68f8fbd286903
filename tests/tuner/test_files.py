"""An adapter's files: what is written, and that another process computes the same logits from them, bit for bit."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load, load_file, save_file

from headwater.cli.adapters import attach
from headwater.errors import HeadwaterError

from .fresh_process import WAYS
from .helpers import adapt, assert_same, logits, task_kwargs, tokens
from .rows import BY_ID, ROWS

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Expected logits by row, logits by row and way from one fresh process, and that process's failures."""
    from tiny_models import make_tiny_llama

    folder = tmp_path_factory.mktemp("fresh")
    fields = {"attn_implementation": "sdpa"}  # not saved with a model; this is what loading one chooses
    make_tiny_llama(**fields).save_pretrained(folder / "base")
    x, expected = tokens(rows=3, length=9), {}
    save_file({"x": x}, folder / "input.safetensors")
    (folder / "pickles").mkdir()
    for row in ROWS:
        base = make_tiny_llama(**fields)
        base.config._name_or_path = base.name_or_path = str(folder / "base")
        model = adapt(row, base)
        model.save_pretrained(folder / "adapters" / row.id)
        (folder / "pickles" / row.id).write_bytes(pickle.dumps(model))
        expected[row.id] = logits(row, model, x)
    rows = {r.id: {"needs_task_ids": r.needs_task_ids, "test_only": r.name == "taskprobe"} for r in ROWS}
    (folder / "settings.json").write_text(json.dumps({"rows": rows, "threads": torch.get_num_threads()}))
    done = subprocess.run(
        [sys.executable, "-m", "tuner.fresh_process", folder],
        cwd=TESTS,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return expected, load_file(folder / "logits.safetensors"), json.loads((folder / "failures.json").read_text())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row_id", BY_ID)
def test_a_fresh_process_computes_the_same_logits_bit_for_bit(reloaded, row_id, way):
    expected, found, failures = reloaded
    assert failures.get(f"{row_id}/{way}", "") == ""
    assert torch.equal(found[f"{row_id}/{way}"], expected[row_id])


def test_only_safetensors_and_text_are_written(row, tiny_llama, tmp_path):
    adapt(row, tiny_llama()).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == row.name.upper()
    assert {name: written[name] for name in row.fields} == row.fields


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_gives_the_same_dtype_and_device_either_way(row, tiny_llama, tmp_path, dtype, low_cpu_mem_usage):
    model = adapt(row, tiny_llama().to(dtype), autocast=dtype == torch.float32)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_llama().to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    state = get_peft_model_state_dict(loaded)
    assert {(t.dtype, t.device.type) for t in state.values() if t.is_floating_point()} == {(torch.float32, "cpu")}
    saved = get_peft_model_state_dict(model)
    assert_same(state, {name: t.float() if t.is_floating_point() else t for name, t in saved.items()})
    assert {n.rpartition(".")[2] for n, p in loaded.named_parameters() if p.requires_grad} == {
        n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad
    }


def test_loaded_for_inference_is_frozen_and_for_training_is_not(row, tiny_llama, tmp_path):
    model = adapt(row, tiny_llama())
    model.save_pretrained(tmp_path)
    trainable = model.get_nb_trainable_parameters()[0]
    assert PeftModel.from_pretrained(tiny_llama(), tmp_path).get_nb_trainable_parameters()[0] == 0
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert again.get_nb_trainable_parameters()[0] == trainable
    x = tokens()
    again.train()(input_ids=x, labels=x, **task_kwargs(row)).loss.backward()
    with_gradient = {name for name, p in again.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_file_without_a_tensor_is_reported(row, tiny_llama, tmp_path):
    adapt(row, tiny_llama()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load(file.read_bytes())  # not mapped: the file is written over
    gone = next(name for name in tensors if name.endswith(f".{row.learns}"))
    save_file({name: t for name, t in tensors.items() if name != gone}, file)
    with pytest.warns(UserWarning, match=r"missing adapter keys"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("row_id", BY_ID)
def test_the_command_line_takes_an_adapter_only_whole(row_id, tmp_path, tiny_llama):
    """PEFT warns of what a file lacks, and leaves out what has no place."""
    model = adapt(BY_ID[row_id], tiny_llama())
    model.save_pretrained(tmp_path)
    assert_same(get_peft_model_state_dict(attach(tiny_llama(), tmp_path)), get_peft_model_state_dict(model))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load(path.read_bytes())
    first = next(name for name in sorted(tensors) if "layers.0" in name)  # a file is read in any order
    save_file({name: t for name, t in tensors.items() if name != first}, path)
    with pytest.raises(HeadwaterError, match="cannot be loaded: Found missing adapter keys"):
        attach(tiny_llama(), tmp_path)
    save_file({**tensors, first.replace("layers.0", "layers.7"): tensors[first].clone()}, path)
    with pytest.raises(HeadwaterError, match=r"1 of its tensors have no place in the model, such as .*layers\.7"):
        attach(tiny_llama(), tmp_path)
