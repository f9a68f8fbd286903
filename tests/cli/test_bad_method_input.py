"""What is wrong with a method's fields or files: said before anything is trained, with file, line and field."""

from __future__ import annotations

import shutil

import pytest
import torch
from cli_support import run_main, write_run

from headwater.methods.files import pack_bits, write_tensors

LAYERS = [f"model.layers.{n}.mlp.{name}" for n in range(2) for name in ("up_proj", "down_proj")]
OUT = {"up_proj": 48, "down_proj": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_run(folder)
    basis = {name: torch.eye(OUT[name.rpartition(".")[2]])[:, :4] for name in LAYERS}
    write_tensors(basis, folder / "basis.safetensors", {})
    write_tensors({name: torch.eye(64)[:, :4] for name in LAYERS}, folder / "other_model.safetensors", {})
    mask = {}
    for name in LAYERS:
        shape = (4, OUT[name.rpartition(".")[2]])
        mask |= {f"{name}.mask": pack_bits(torch.ones(shape)), f"{name}.shape": torch.tensor(shape)}
    write_tensors(mask, folder / "mask.safetensors", {})
    (folder / "text.safetensors").write_text("not tensors at all")
    return folder


@pytest.fixture
def run_with(made, tmp_path, capsys, monkeypatch):
    """`headwater train` with this `method:` in line 2 of the file."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(method, **settings):
        lines = (made / "run.yaml").read_text().replace(str(made), str(tmp_path)).splitlines()
        lines[1] = f"method: {{target_modules: [up_proj, down_proj], lora_alpha: 2, {method}}}"
        (tmp_path / "run.yaml").write_text("\n".join(lines) + "\n")
        return run_main(capsys, "train", "run.yaml", *(a for k, v in settings.items() for a in ("--set", f"{k}={v}")))

    return run


@pytest.mark.parametrize(
    ("method", "field", "says"),
    [
        ("name: moe_lora, num_experts: 4, top_k: 5", "top_k", "top_k 5 is larger than num_experts 4"),
        ("name: malora, num_experts: 2, top_k: 3", "top_k", "top_k 3 is larger than num_experts 2"),
        ("name: smora, r: 4, top_k: 8", "top_k", "must be between 1 and r = 4"),
        ("name: cond_mixlora, r: 8, num_factors: 4", "num_factors", "at least the rank, 8"),
        ("name: mtl_lora, temperature: 0", "temperature", "must be positive, not 0"),
        ("name: mtl_lora, temperature: -0.1", "temperature", "must be positive"),
        ("name: mtl_lora, num_tasks: 1", "num_tasks", "num_tasks is 1, but there are 2 tasks"),
        ("name: moe_lora, router: task, num_tasks: 1", "num_tasks", "num_tasks is 1, but there are 2 tasks"),
        ("name: moe_lora, balance_loss: localized, task_types: [1]", "task_types", "1 entries, but there are 2 tasks"),
        ("name: moe_lora, balance_loss: localized", "task_types", "needs the type, 0 or 1, of each task"),
        ("name: malora, r: 4, budget_saving: 0.9", "budget_saving", "leaves no rank for its experts"),
        ("name: lori, r: 4, mask: none.safetensors", "mask", "no such file: none.safetensors"),
        ("name: lori, r: 4, mask: text.safetensors", "mask", "not a readable safetensors file"),
        ("name: lori, r: 2, mask: mask.safetensors", "mask", "the mask is of another layout"),
        ("name: lori, r: 4, mask: mask.safetensors, target_modules: [up_proj]", "mask", "has layers that this"),
        ("name: lori, continue_from: nowhere", "continue_from", "cannot be read"),
        ("name: cora, r: 4", "basis", "needs the common subspace of one or several models"),
        ("name: cora, r: 4, basis: none.safetensors", "basis", "no such file"),
        ("name: cora, r: 4, basis: other_model.safetensors", "basis", "needs a basis of 48 rows"),
        ("name: cora, r: 8, basis: basis.safetensors", "basis", "at least 8 columns"),
        ("name: cola, num_links: 3, knots: [5, 2]", "knots", "2 rising steps"),
    ],
)  # fmt: skip
def test_a_wrong_method_is_refused_before_training(run_with, method, field, says, tmp_path):
    if method.count("target_modules"):
        method, target = method.split(", target_modules: ")
        done = run_with(method, **{"method.target_modules": target})
    else:
        done = run_with(method)
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert says in " ".join(done.err.split()), done.err
    assert f"run.yaml:2: method.{field}: " in done.err
    assert not (tmp_path / "run" / "adapter").exists()
    assert "before" not in done.out, "the tasks were scored first"


def test_folding_into_half_precision_is_refused(run_with):
    done = run_with("name: cola, mode: fold", **{"model.dtype": "bfloat16"})
    assert done.code == 2
    assert "run.yaml:2: method.mode: links cannot be folded" in done.err
    assert "Traceback" not in done.err


def test_files_of_a_method_stay_found_from_elsewhere(run_with, tmp_path):
    """`config.yaml` says where they were, whatever folder it is run from."""
    settings = {"training.max_steps": 1, "training.save_steps": 9}
    assert run_with("name: cora, r: 4, basis: basis.safetensors", **settings).code == 0
    assert f"basis: {tmp_path / 'basis.safetensors'}" in (tmp_path / "run" / "config.yaml").read_text()
