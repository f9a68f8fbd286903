"""Stock LoRA adapters that cannot be exported: said in a sentence, and nothing is written."""

from __future__ import annotations

import json

import pytest
import torch
from compose.pool_support import save_base, save_lora
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import make_tiny_llama, make_tiny_tokenizer
from transformers import AutoModelForCausalLM

from headwater.cli import export
from headwater.errors import HeadwaterError
from headwater.export import rewrite_lora, serve_command, write_merged

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def lora(tmp_path):
    return save_lora(tmp_path / "lora", "some/base")


@pytest.mark.parametrize("patterns", [{}, {"layers.1.mlp.up_proj": 5}])
def test_weights_that_are_cut_short_are_refused(tmp_path, patterns):
    lora = save_lora(tmp_path / "lora", "some/base", rank_pattern=patterns)
    (lora / WEIGHTS).write_bytes((lora / WEIGHTS).read_bytes()[:500])
    (tmp_path / "out").mkdir()
    with pytest.raises(HeadwaterError, match="not a readable safetensors file"):
        rewrite_lora(lora, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_pickled_weights_are_refused(lora, tmp_path):
    torch.save(load_file(lora / WEIGHTS), lora / "adapter_model.bin")
    (lora / WEIGHTS).unlink()
    with pytest.raises(HeadwaterError, match=r"(?s)there is no adapter_model.safetensors.*pickled file"):
        rewrite_lora(lora, tmp_path)


def test_a_config_without_a_rank_means_peft_s_own_and_vllm_does_not_take_it(tmp_path):
    lora = save_lora(tmp_path / "lora", "some/base", r=8)
    fields = json.loads((lora / CONFIG).read_text())
    del fields["r"]
    (lora / CONFIG).write_text(json.dumps(fields))
    (tmp_path / "out").mkdir()
    assert rewrite_lora(lora, tmp_path / "out") == 8
    assert serve_command("some/base", {"a": (tmp_path, fields)}) is None


def test_without_a_base_model_there_is_no_command(tmp_path):
    fields = {"r": 4, "bias": "none"}
    assert serve_command("some/base", {"a": (tmp_path, fields)}) is not None
    assert serve_command("", {"a": (tmp_path, fields)}) is None


def test_a_quantised_base_is_not_merged_into(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    base = AutoModelForCausalLM.from_pretrained(
        save_base(tmp_path / "base"), quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    model = get_peft_model(base, LoraConfig(target_modules=["up_proj"]))
    before = base.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(HeadwaterError, match="the base model is quantised"):
        write_merged(model, make_tiny_tokenizer(), tmp_path / "out")
    assert torch.equal(base.model.layers[0].mlp.up_proj.weight, before)
    assert not (tmp_path / "out").exists()


def test_an_update_that_is_not_finite_is_not_merged(tmp_path):
    model = get_peft_model(make_tiny_llama(), LoraConfig(target_modules=["up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(3e38)
    with pytest.raises(HeadwaterError, match=r"PEFT cannot merge this adapter: .*broken"):
        write_merged(model, make_tiny_tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_of_per_task_alone_are_refused_elsewhere(lora, tmp_path):
    with pytest.raises(HeadwaterError, match="--score-rows: the option does not apply here"):
        export.run(str(lora), str(tmp_path / "out"), merge=False, per_task=False, rows=64, score_rows=3)
