"""Exported folders hold what the adapter computes, and stock PEFT reads them without headwater."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_llama, make_tiny_tokenizer
from transformers import AutoModelForCausalLM
from tuner.helpers import TARGETS, adapt, config, logits, stir, tokens
from tuner.rows import BY_ID, ROWS
from tuner.test_merge import GPT2, tiny_gpt2

import headwater
from headwater.export import as_plain_lora, check_output, new_folder, write_merged, write_plain_lora

MERGEABLE = [row.id for row in ROWS if row.mergeable]
BY_TASK = ["mtl_lora", "moe_lora-by-task"]
PATTERNS = {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"layers.1.mlp.down_proj": 5}, "use_rslora": True}


def saved(folder: Path, model) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every export's folder, what it should compute, and what stock PEFT computed from it in a process of its own."""
    folder = tmp_path_factory.mktemp("exports")
    make_tiny_llama().save_pretrained(folder / "base")
    expected = {}
    for row_id in MERGEABLE:
        row = BY_ID[row_id]
        for name, fields in ((row_id, {}), (f"{row_id}-patterns", PATTERNS)):
            model = adapt(row, make_tiny_llama(), **fields)
            expected[name] = logits(row, model)
            write_plain_lora(model, saved(folder / "adapters" / name, model), folder / name)
        write_merged(model, make_tiny_tokenizer(), folder / f"{row_id}-merged")
        expected[f"{row_id}-merged"] = expected[f"{row_id}-patterns"]
    for row_id in BY_TASK:
        model = adapt(BY_ID[row_id], make_tiny_llama())
        adapter = saved(folder / "adapters" / row_id, model)
        for task in range(3):
            write_plain_lora(model, adapter, folder / f"{row_id}-{task}", task=task)
            with torch.no_grad(), headwater.task_ids(model, task):
                expected[f"{row_id}-{task}"] = model(input_ids=tokens()).logits
    save_file({"x": tokens()}, folder / "input.safetensors")
    (folder / "exports.json").write_text(json.dumps(list(expected)))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, Path(__file__).with_name("stock_peft.py"), folder], check=True, env=environment)
    return folder, expected, load_file(folder / "logits.safetensors")


NAMES = [
    *(f"{row_id}{end}" for row_id in MERGEABLE for end in ("", "-patterns", "-merged")),
    *(f"{row_id}-{task}" for row_id in BY_TASK for task in range(3)),
]


@pytest.mark.parametrize("name", NAMES)
def test_stock_peft_computes_what_the_adapter_does(exported, name):
    _, expected, found = exported
    assert set(found) == set(NAMES)
    assert (expected[name] - make_tiny_llama()(tokens()).logits).abs().max() > 0.01
    torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("-merged")])
def test_a_server_that_ignores_unknown_keys_cannot_misread_it(exported, name):
    folder, _, _ = exported
    assert sorted(path.name for path in (folder / name).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    fields = json.loads((folder / name / "adapter_config.json").read_text())
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert set(fields) <= known | {"peft_version"}
    assert fields["peft_type"] == "LORA"
    assert fields["r"] == fields["lora_alpha"]
    assert not any(
        fields[key] for key in ("use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "modules_to_save")
    )
    assert sorted(fields["target_modules"]) == sorted(TARGETS)
    for key, tensor in load_file(folder / name / "adapter_model.safetensors").items():
        assert tensor.shape["lora_B" in key] == fields["r"]
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize(
    ("row_id", "rank"),
    [("lori", 4), ("cora", 4), ("mlora", 8), ("rlora-one-head", 8), ("multilora", 12), ("cola", 4)],
)
def test_rank_is_no_larger_than_the_method_needs(exported, row_id, rank):
    """M-LoRA's and R-LoRA's heads share an A, and their start is r more; links of a chain to come count nothing."""
    folder, _, _ = exported
    assert json.loads((folder / row_id / "adapter_config.json").read_text())["r"] == rank


def test_experts_that_a_task_does_not_use_are_left_out(tiny_llama, tmp_path):
    model = adapt(BY_ID["moe_lora-by-task"], tiny_llama(), top_k=2)
    assert {A.shape[0] for A, _ in as_plain_lora(model, task=1).values()} == {2 * 4}
    with torch.no_grad(), headwater.task_ids(model, 1):
        expected = model(input_ids=tokens()).logits
    write_plain_lora(model, str(saved(tmp_path / "adapter", model)), str(tmp_path / "plain"), task=1)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    torch.testing.assert_close(plain(tokens()).logits, expected, atol=2e-5, rtol=1e-4)


def test_layers_that_names_alone_do_not_tell_apart_are_named_in_full(tiny_llama, tmp_path):
    row = BY_ID["mlora"]
    model = adapt(row, tiny_llama(), target_modules=["up_proj", "down_proj"], layers_to_transform=[1])
    write_plain_lora(model, saved(tmp_path / "adapter", model), tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    names = {f"model.layers.1.mlp.{name}" for name in ("up_proj", "down_proj")}
    assert set(plain.peft_config["default"].target_modules) == names
    torch.testing.assert_close(plain(tokens()).logits, logits(row, model), atol=2e-5, rtol=1e-4)


def test_modules_that_were_trained_beside_it_come_along(tiny_llama, tmp_path):
    row = BY_ID["lori"]
    model = adapt(row, tiny_llama(), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save.default.weight.mul_(1.5)
    write_plain_lora(model, saved(tmp_path / "adapter", model), tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    torch.testing.assert_close(plain(tokens()).logits, logits(row, model), atol=3e-5, rtol=1e-4)


def test_transposed_weights(tmp_path):
    row = BY_ID["multilora"]
    model = adapt(row, tiny_gpt2(), **GPT2)
    write_plain_lora(model, saved(tmp_path / "adapter", model), tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "plain")
    assert plain.peft_config["default"].fan_in_fan_out
    torch.testing.assert_close(plain(tokens()).logits, logits(row, model), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("row_id", ["rlora", "mtl_lora", "cond_mixlora"])
def test_what_is_no_single_update_is_refused(tiny_llama, row_id):
    with pytest.raises(headwater.NotMergeable):
        as_plain_lora(adapt(BY_ID[row_id], tiny_llama()))


@pytest.mark.parametrize(("row_id", "way_out"), [("rlora", "give gates="), ("mtl_lora", "give task=")])
def test_a_refusal_names_the_argument_that_is_missing(tiny_llama, row_id, way_out):
    with pytest.raises(headwater.NotMergeable, match=f"(?s)^model.layers.0.*{way_out}"):
        as_plain_lora(adapt(BY_ID[row_id], tiny_llama()))


def two_adapters(tiny_llama):
    """`news` and `other`, which is on fewer layers and the active one."""
    row = BY_ID["mlora"]
    model = get_peft_model(tiny_llama(), config(row), "news")
    model.add_adapter("other", config(row, target_modules=["up_proj"], r=2))
    stir(model)
    model.set_adapter("other")
    return row, model


def test_the_active_adapter_is_taken_or_the_named_one(tiny_llama, tmp_path):
    row, model = two_adapters(tiny_llama)
    model.save_pretrained(tmp_path / "adapters")
    for name in ("news", "other", None):
        adapter = tmp_path / "adapters" / (name or "other")
        write_plain_lora(model, adapter, tmp_path / f"plain-{name}", adapter_name=name)
        plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / f"plain-{name}")
        model.set_adapter(name or "other")
        torch.testing.assert_close(plain(tokens()).logits, logits(row, model), atol=2e-5, rtol=1e-4)
        model.set_adapter("other")
    assert set(as_plain_lora(model)) == {f"model.layers.{i}.mlp.up_proj" for i in range(2)}


def test_an_adapter_that_is_not_there_is_refused_with_those_that_are(tiny_llama):
    _, model = two_adapters(tiny_llama)
    with pytest.raises(headwater.HeadwaterError, match=r"(?s)no adapter 'default'.*there are news, other"):
        as_plain_lora(model, adapter_name="default")
    model.base_model.set_adapter(["news", "other"])
    with pytest.raises(headwater.HeadwaterError, match=r"(?s)2 adapters are active.*name one: there are news, other"):
        as_plain_lora(model)
    with pytest.raises(headwater.HeadwaterError, match="no headwater adapter"):
        as_plain_lora(tiny_llama())
    with pytest.raises(headwater.HeadwaterError, match="no headwater adapter"):
        as_plain_lora(get_peft_model(tiny_llama(), LoraConfig(target_modules=["up_proj"])))


def test_uniform_gates(tiny_llama):
    row = BY_ID["rlora"]
    model = adapt(row, tiny_llama())
    layers = as_plain_lora(model, gates="uniform")
    before = {name: model.get_base_model().get_submodule(name).get_base_layer().weight.clone() for name in layers}
    with pytest.warns(UserWarning, match="fixed gates"):
        merged = headwater.merge_with_gates(model, "uniform")
    for name, (A, B) in layers.items():
        update = merged.get_submodule(name).weight - before[name]
        torch.testing.assert_close(B @ A, update, atol=1e-5, rtol=1e-4)
        assert update.abs().max() > 1e-3
    with pytest.raises(headwater.HeadwaterError, match="'uniform', not 'mean'"):
        as_plain_lora(model, gates="mean")


@pytest.mark.parametrize("row_id", ["mlora", None])
def test_merging_into_tied_embeddings_is_refused(tiny_llama, tmp_path, row_id):
    base = tiny_llama(tie_word_embeddings=True)
    if row_id is None:
        model = get_peft_model(base, LoraConfig(target_modules=["lm_head"]))
    else:
        model = get_peft_model(base, config(BY_ID[row_id], target_modules=["lm_head"]))
        stir(model)
    before = base.get_input_embeddings().weight.clone()
    with pytest.raises(headwater.HeadwaterError, match=r"lm_head.* shares its weight"):
        write_merged(model, make_tiny_tokenizer(), tmp_path)
    assert torch.equal(base.get_input_embeddings().weight, before)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_lora_on_the_input_embeddings_is_merged_where_nothing_else_has_their_weight(tiny_llama, tmp_path, tied):
    base = tiny_llama(tie_word_embeddings=tied)
    model = get_peft_model(base, LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    want = model(torch.arange(6)[None]).logits
    if tied:
        with pytest.raises(headwater.HeadwaterError, match="embed_tokens shares its weight"):
            write_merged(model, make_tiny_tokenizer(), tmp_path)
        return
    write_merged(model, make_tiny_tokenizer(), tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(merged(torch.arange(6)[None]).logits, want, atol=1e-5, rtol=1e-5)


def test_a_folder_is_whole_or_not_there(tmp_path):
    def fail():
        with new_folder(tmp_path / "a" / "b") as work:
            (work / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not any((tmp_path / "a").iterdir())
    (tmp_path / "c").mkdir()
    with new_folder(tmp_path / "c") as work:
        (work / "whole").write_text("x")
        assert not any((tmp_path / "c").iterdir())
    assert [path.name for path in tmp_path.glob("c/*")] == ["whole"]
    for taken in (tmp_path / "c", tmp_path / "c" / "whole"):
        with pytest.raises(headwater.HeadwaterError, match="is there already"):
            check_output(taken)
