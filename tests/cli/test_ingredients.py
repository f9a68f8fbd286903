"""`headwater calibrate` and `headwater subspace`: what they write makes an adapter."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from cli_support import run_main, write_run
from full_disk import files_end_after
from safetensors.torch import load_file
from tiny_models import make_tiny_llama, make_tiny_tokenizer

from headwater.errors import HeadwaterError
from headwater.files import saying_why
from headwater.subspace import SubspaceSpec, extract, target_weights

LORI = "{name: lori, r: 4, lora_alpha: 8, target_modules: [up_proj, down_proj]}"


@pytest.fixture
def headwater(capsys):
    return functools.partial(run_main, capsys)


def test_dense_then_mask_then_sparse(headwater, tmp_path):
    run_file = write_run(tmp_path)
    assert headwater("train", run_file, "--set", f"method={LORI}").code == 0
    mask = tmp_path / "mask.safetensors"
    done = headwater("calibrate", tmp_path / "run", "--sparsity", "0.8", "--output", mask)
    assert done.code == 0, done.err
    entries = 2 * 4 * (48 + 32)
    assert f"{round(0.2 * entries)} of {entries} entries in 4 layers" in done.out
    sparse = LORI.replace("}", f", mask: {mask}}}")
    done = headwater("train", run_file, "--set", f"method={sparse}", "--set", f"output_dir={tmp_path / 'sparse'}")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "sparse" / "results.json").read_text())
    assert results["trainable_parameters"] == round(0.2 * entries)


def test_calibrating_another_method_is_an_error(headwater, tmp_path):
    run_file = write_run(tmp_path)
    assert headwater("train", run_file).code == 0
    done = headwater("calibrate", tmp_path / "run", "--output", tmp_path / "mask.safetensors")
    assert done.code == 2
    assert "LoRI-D" in done.err
    assert not (tmp_path / "mask.safetensors").exists()


def test_subspace_then_cora(headwater, tmp_path):
    run_file = write_run(tmp_path)
    basis = tmp_path / "basis.safetensors"
    options = ("--r", "6", "--scope", "layer_projection", "--target", "up_proj", "--target", "down_proj")
    done = headwater("subspace", "--model", tmp_path / "model", *options, "--output", basis)
    assert done.code == 0, done.err
    for name, tensor in load_file(basis).items():
        assert tensor.shape == (48 if "up_proj" in name else 32, 6)
        torch.testing.assert_close(tensor.T @ tensor, torch.eye(6), rtol=0, atol=1e-5)
    cora = f"{{name: cora, basis: {basis}, r: 4, target_modules: [up_proj, down_proj]}}"
    done = headwater("train", run_file, "--set", f"method={cora}")
    assert done.code == 0, done.err
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(saved[f"base_model.model.{name}.cora_branch.B"], load_file(basis)[name][:, :4].T)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--r", "40"), "fewer than r = 40"),
        (("--r", "4", "--target", "c_attn"), "no linear layer named c_attn"),
        (("--r", "4", "--scope", "all"), "scope is one of"),
        (("--r", "4", "--target", "q_proj", "--target", "k_porj"), "model: the model has no linear layer named k_porj"),
        (("--r", "4", "--target", "norm"), "norm is no linear layer"),
        (("--r", "4", "--weight", "1", "--weight", "2"), "--weight: 1 model(s) and 2 weight(s)"),
        (("--r", "4", "--weight", "-1"), "weight: a model counts by a positive number, not -1.0"),
        (("--r", "40", "--target", "up_proj"), "span 32 directions, fewer than r = 40"),
    ],
)
def test_subspace_says_what_is_wrong(headwater, tmp_path, options, said):
    write_run(tmp_path)
    done = headwater("subspace", "--model", tmp_path / "model", *options, "--output", tmp_path / "basis.safetensors")
    assert done.code == 2
    assert said in " ".join(done.err.split())
    assert not (tmp_path / "basis.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "fields", "importance"),
    [
        (("--normalize",), {"normalize": True}, None),
        (("--basis-scale", "s"), {"basis_scale": "s"}, None),
        (("--scope", "global"), {"scope": "global"}, None),
        (("--orientation", "input"), {"orientation": "input"}, None),
        (("--weight", "1", "--weight", "90"), {}, [1.0, 90.0]),
    ],
)
def test_every_option_of_subspace_has_its_effect(headwater, tmp_path, options, fields, importance):
    models = [make_tiny_llama(seed) for seed in (0, 1)]
    for weight in models[1].parameters():
        weight.data.mul_(5)
    for n, model in enumerate(models):
        model.save_pretrained(tmp_path / f"{n}")
        make_tiny_tokenizer().save_pretrained(tmp_path / f"{n}")
    places = ("--model", tmp_path / "0", "--model", tmp_path / "1", "--output", tmp_path / "basis.safetensors")
    assert headwater("subspace", *places, "--target", "q_proj", "--r", 4, *options).code == 0
    found = load_file(tmp_path / "basis.safetensors")

    def differs(spec, importance=None):
        wanted = extract([target_weights(model, spec.targets) for model in models], spec, importance)
        assert wanted.keys() == found.keys()
        return max((wanted[name] - found[name]).abs().max().item() for name in wanted)

    assert differs(SubspaceSpec(4, ("q_proj",), **fields), importance) < 1e-5
    assert differs(SubspaceSpec(4, ("q_proj",))) > 1e-2


def test_a_model_less_itself_has_no_subspace(headwater, tmp_path):
    write_run(tmp_path)
    same = ("--model", tmp_path / "model", "--base", tmp_path / "model", "--normalize", "--r", "2")
    done = headwater("subspace", *same, "--output", tmp_path / "basis.safetensors")
    assert done.code == 2
    assert "they are all zero" in done.err


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("run.yaml/b.safetensors", "{0}/run.yaml is a file, not a folder"),
        ("d.safetensors", "--output: {0}/d.safetensors is a folder"),
        ("b.bin", "'{0}/b.bin' should end on .safetensors"),
    ],
)
@pytest.mark.parametrize("command", [("subspace", "--model"), ("calibrate",)])
def test_a_place_that_cannot_be_written_to_is_named_before_anything_is_read(headwater, tmp_path, command, output, said):
    (tmp_path / "run.yaml").write_text("x")
    (tmp_path / "d.safetensors").mkdir()
    done = headwater(*command, tmp_path / "nowhere", "--output", tmp_path / output)
    assert done.code == 2
    assert said.format(tmp_path) in done.err
    assert "nowhere" not in done.err


def test_a_full_disk_leaves_no_half_of_a_basis(headwater, tmp_path):
    write_run(tmp_path)
    before = set(tmp_path.iterdir())
    basis = tmp_path / "basis.safetensors"
    with files_end_after(100):
        done = headwater("subspace", "--model", tmp_path / "model", "--r", "4", "--target", "q_proj", "--output", basis)
    assert done.code == 2
    assert f"{basis}: this cannot be written: File too large" in done.err
    assert set(tmp_path.iterdir()) == before


def test_an_error_without_a_text_is_named_by_its_kind(tmp_path):
    with pytest.raises(HeadwaterError, match=r"this cannot be written: TimeoutError"), saying_why(tmp_path):
        raise TimeoutError
