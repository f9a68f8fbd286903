"""Adapters in the authors' formats compute here what the authors' code computes when it loads them."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys

import pytest
import torch
from cli_support import run_main
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_llama

from headwater.errors import HeadwaterError
from headwater.importing import import_adapter

R, N, ALPHA = 3, 4, 6
LAYERS = {
    f"model.layers.{n}.mlp.{kind}": (48, 32) if kind == "down_proj" else (32, 48)
    for n in range(2)
    for kind in ("gate_proj", "down_proj")
}
PREFIX = "base_model.model."


def multi_head_tensors(seed=0):
    """The keys and shapes of the authors' `state_dict`, which is filtered by "lora_"."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.empty(shape).normal_(0, 0.5, generator=generator)

    tensors = {}
    for name, (d_in, d_out) in LAYERS.items():
        tensors[f"{PREFIX}{name}.lora_route.weight"] = normal(N, d_in)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = normal(R, d_in)
        for n in range(N):
            tensors[f"{PREFIX}{name}.lora_B{n}.weight"] = normal(d_out, R)
    return tensors


def write(folder, tensors, **fields):
    folder.mkdir(exist_ok=True)
    config = {
        "base_model_name_or_path": "some/base",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "lora_nums": N,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": R,
        "target_modules": ["gate_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def authors_layer(x, W, tensors, name):
    """Their forward in eval mode, after `from_pretrained`, by loops in float64: the scale is alpha / r."""
    key = f"{PREFIX}{name}.lora_"
    A, route = tensors[f"{key}A.weight"].double(), tensors[f"{key}route.weight"].double()
    y = x @ W.T
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            logits = [sum(route[n, i] * x[b, t, i] for i in range(x.shape[2])).item() for n in range(N)]
            total = sum(math.exp(logit) for logit in logits)
            for n in range(N):
                B = tensors[f"{key}B{n}.weight"].double()
                y[b, t] += math.exp(logits[n]) / total * (B @ (A @ x[b, t])) * (ALPHA / R)
    return y


@pytest.mark.parametrize("method", ["rlora", "hydralora"])
def test_multi_head_adapters_compute_what_the_authors_code_does(tmp_path, method):
    tensors = multi_head_tensors()
    done = import_adapter(write(tmp_path / "theirs", tensors), tmp_path / "ours", method=method)
    assert (done.method, done.layers, done.base_model) == (method, 4, "some/base")
    model = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "ours").double().eval()
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "branches")}
    assert adapted == set(LAYERS)
    generator = torch.Generator().manual_seed(1)
    for name, (d_in, _) in LAYERS.items():
        layer = model.get_base_model().get_submodule(name)
        x = torch.empty(2, 3, d_in, dtype=torch.float64).normal_(generator=generator)
        found = layer(x).detach()
        wanted = authors_layer(x, layer.base_layer.weight.detach(), tensors, name)
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["down_proj", "gate_proj"]
    if method == "rlora":
        assert (config["head_dropout"], config["lora_dropout"]) == (0.1, 0.0)  # theirs acts on A x, per head
    else:
        assert (config["lora_dropout"], config["input_dropout"]) == (0.1, "per_head")


def test_rloras_missing_start_and_scale_are_named_and_the_scale_can_be_chosen(tmp_path):
    source = write(tmp_path / "theirs", multi_head_tensors())
    reload = import_adapter(source, tmp_path / "reload", method="rlora")
    trained = import_adapter(source, tmp_path / "trained", method="rlora", rslora=True)
    assert "starting offset is not in R-LoRA's files" in reload.notes[0]
    assert "alpha / sqrt(r) = 3.4641 and reloads with alpha / r = 2. 2 is taken" in reload.notes[1]
    assert "3.4641 is taken, as asked" in trained.notes[1]
    x = torch.arange(7)[None]
    updates = []
    for folder in ("reload", "trained"):
        model = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / folder).eval()
        layer = model.get_base_model().get_submodule("model.layers.0.mlp.gate_proj")
        hidden = model.get_base_model().model.embed_tokens(x)
        updates.append((layer(hidden) - layer.base_layer(hidden)).detach())
    torch.testing.assert_close(updates[1], math.sqrt(R) * updates[0])
    assert import_adapter(source, tmp_path / "hydra", method="hydralora").notes == ()
    with pytest.raises(HeadwaterError, match="only R-LoRA's scale is in doubt"):
        import_adapter(source, tmp_path / "x", method="hydralora", rslora=True)


def lori_folder(folder, *, sparse, mask=False):
    """A LoRI adapter as PEFT saves it: dense, zeros included; newer PEFTs save the attached mask as well."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=["q_proj", "up_proj"])
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(make_tiny_llama(), config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
            if sparse:
                parameter.data *= torch.rand(parameter.shape, generator=generator) < 0.1
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    if mask:
        masks = {k.replace("weight", "mask"): (t != 0).float() for k, t in tensors.items() if "lora_B" in k}
        save_file({**tensors, **masks}, folder / "adapter_model.safetensors")
    return model.eval(), tensors


@pytest.mark.parametrize(("sparse", "mask"), [(False, False), (True, False), (True, True)], ids=["D", "S", "S-mask"])
def test_lori_computes_what_peft_computes_with_the_published_file(tmp_path, sparse, mask):
    published, tensors = lori_folder(tmp_path / "theirs", sparse=sparse, mask=mask)
    done = import_adapter(tmp_path / "theirs", tmp_path / "ours")
    assert (done.method, done.layers, done.notes) == ("lori", 4, ())
    model = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "ours").eval()
    x = torch.arange(20).view(2, 10)
    with torch.no_grad():
        wanted = published(input_ids=x).logits
        torch.testing.assert_close(model(input_ids=x).logits, wanted)
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=x).logits, wanted)
    for name in {key.split(".lora_")[0].removeprefix(PREFIX) for key in tensors}:
        branch = model.get_base_model().get_submodule(name).branches["default"]
        assert torch.equal(branch.writes().T, tensors[f"{PREFIX}{name}.lora_B.weight"])
    nonzero = sum(int((t != 0).sum()) for k, t in tensors.items() if "lora_B" in k)
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    names = {key.rpartition(".")[2] for key in stored}
    assert names == ({"A", "index", "values"} if sparse else {"A", "B"})
    if sparse:
        assert sum(t.numel() for k, t in stored.items() if k.endswith("values")) == nonzero
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert load_file(again / "adapter_model.safetensors").keys() == stored.keys()


def test_layers_that_are_not_every_blocks_are_named_in_full(tmp_path):
    one = "model.layers.1.mlp.gate_proj"
    tensors = {key: t for key, t in multi_head_tensors().items() if key.startswith(f"{PREFIX}{one}.")}
    import_adapter(write(tmp_path / "theirs", tensors), tmp_path / "ours", method="hydralora")
    model = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "ours")
    assert [n for n, module in model.get_base_model().named_modules() if hasattr(module, "branches")] == [one]


FIRST = f"{PREFIX}model.layers.0.mlp.down_proj.lora_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{FIRST}B2.weight"), f"the tensor {FIRST}B2.weight is missing"),
        (lambda t: t.pop(f"{FIRST}route.weight"), f"the tensor {FIRST}route.weight is missing"),
        (
            lambda t: t.update({f"{FIRST}A.weight": torch.ones(2, 48)}),
            f"{FIRST}A.weight has shape (2, 48), not (3, any)",
        ),
        (
            lambda t: t.update({f"{FIRST}B1.weight": torch.ones(31, 3)}),
            f"{FIRST}B1.weight has shape (31, 3), not (32, 3)",
        ),
        (lambda t: t.update({f"{FIRST}route.weight": torch.ones(3, 48)}), "has shape (3, 48), not (4, 48)"),
        (
            lambda t: t.update({f"{FIRST}B4.weight": torch.ones(32, 3)}),
            f"{FIRST}B4.weight is one too many: there are 4",
        ),
        (lambda t: t.update({f"{FIRST}B4.bias": torch.ones(32)}), f"the tensor {FIRST}B4.bias is not of any known"),
        (lambda t: t.update({f"{FIRST}B0.weight": torch.full((32, 3), math.nan)}), "has values that are not finite"),
        (lambda t: t.update({f"{FIRST}B0.weight": torch.ones(32, 3, dtype=torch.int8)}), "is torch.int8"),
        (lambda t: t.clear(), "there are no tensors in it"),
    ],
)
def test_the_first_tensor_that_differs_is_named(tmp_path, change, message):
    tensors = multi_head_tensors()
    change(tensors)
    with pytest.raises(HeadwaterError) as caught:
        import_adapter(write(tmp_path / "theirs", tensors), tmp_path / "ours", method="rlora")
    assert message in str(caught.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora: True is not part of these methods"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: ['lm_head'] is not part"),
        ({"bias": "all"}, "bias: 'all' is not part"),
        ({"r": None}, "`r` and `lora_alpha` should be numbers"),
        ({"lora_dropout": 2.0}, "must be in [0, 1)"),
    ],
)
def test_configs_of_other_methods_are_refused(tmp_path, fields, message):
    with pytest.raises(HeadwaterError) as caught:
        import_adapter(write(tmp_path / "theirs", multi_head_tensors(), **fields), tmp_path / "ours", method="rlora")
    assert message in str(caught.value)


def test_the_method_must_be_said_where_files_do_not_tell_and_must_fit(tmp_path):
    source = write(tmp_path / "theirs", multi_head_tensors())
    with pytest.raises(HeadwaterError, match="say --method rlora or --method hydralora"):
        import_adapter(source, tmp_path / "ours")
    with pytest.raises(HeadwaterError, match="heads and a router"):
        import_adapter(source, tmp_path / "ours", method="lori")
    with pytest.raises(HeadwaterError, match="cannot import 'smora'"):
        import_adapter(source, tmp_path / "ours", method="smora")
    lori_folder(tmp_path / "lori", sparse=False)
    with pytest.raises(HeadwaterError, match="one head and no router"):
        import_adapter(tmp_path / "lori", tmp_path / "ours", method="rlora")


def test_pickles_are_refused_and_the_way_out_works(tmp_path):
    source = write(tmp_path / "theirs", multi_head_tensors())
    tensors = load_file(source / "adapter_model.safetensors")
    torch.save(tensors, source / "adapter_model.bin")
    (source / "adapter_model.safetensors").unlink()
    with pytest.raises(HeadwaterError, match="never unpickles") as caught:
        import_adapter(source, tmp_path / "ours", method="rlora")
    command = shlex.split(caught.value.problems[0].fix.partition("in its folder: ")[2])
    subprocess.run([sys.executable, *command[1:]], cwd=source, check=True, timeout=120)
    assert import_adapter(source, tmp_path / "ours", method="rlora").layers == 4


def test_the_command(tmp_path, capsys):
    source = write(tmp_path / "theirs", multi_head_tensors(), base_model_name_or_path=None)
    arguments = ("import", source, "--output", tmp_path / "ours", "--method", "rlora")
    done = run_main(capsys, *arguments)
    assert done.code == 0
    assert done.err.count("warning: ") == 3
    assert "give it with --base" in done.err
    values = len(LAYERS) * R * N * 40 + sum((N + R) * d_in for d_in, _ in LAYERS.values())
    assert f"{values:,}" in done.out
    done = run_main(capsys, *arguments)
    assert (done.code, "is there already" in done.err) == (2, True)
    done = run_main(capsys, *arguments[:3], tmp_path / "named", "--method", "hydralora", "--base", "the/base")
    assert (done.code, done.err) == (0, "")
    config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["peft_type"]) == ("the/base", "HYDRALORA")
