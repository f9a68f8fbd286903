"""Half-precision and quantised base models, autocast, inference mode."""

from __future__ import annotations

import accelerate
import pytest
import torch
from peft import PeftModel
from torch import nn

import headwater
from headwater.tuner import MethodLayer

from .helpers import (
    TARGETS,
    adapt,
    assert_same,
    base_weights,
    gradients,
    layer_output,
    logits,
    stir,
    task_kwargs,
    tokens,
    train_loss,
)
from .rows import BY_ID


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def assert_layer_is_as_exact_as_bfloat16_allows(row, model, exact_model):
    name = "model.layers.0.mlp.up_proj"
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, exact = layer_output(row, model, name, x), layer_output(row, exact_model, name, x.float())
    with model.disable_adapter():
        assert relative(layer_output(row, model, name, x), exact) > 0.5
    assert relative(found, exact) < 2**-7


def test_bfloat16_base_keeps_a_float32_adapter(row, tiny_llama):
    base = tiny_llama().bfloat16()
    before = base(tokens()).logits
    model = adapt(row, base, stirred=False, **row.smooth)
    assert {p.dtype for name, p in model.named_parameters() if "_branch." in name} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "_branch." not in name} == {torch.bfloat16}
    if row.starts_as_base:
        assert relative(logits(row, model), before) < 2**-7
    stir(model)
    assert logits(row, model).dtype == torch.bfloat16
    assert_layer_is_as_exact_as_bfloat16_allows(row, model, adapt(row, tiny_llama().bfloat16().float(), **row.smooth))
    train_loss(row, model.train()).backward()
    assert {g.dtype for g in gradients(model).values()} == {torch.float32}


def test_bfloat16_adapter_where_asked_for(row, tiny_llama):
    model = adapt(row, tiny_llama().bfloat16(), autocast=False, **row.smooth)
    branches = {n: t for n, t in model.state_dict().items() if "_branch." in n and t.is_floating_point()}
    wide = {name for name, tensor in branches.items() if tensor.dtype == torch.float32}
    assert wide == {name for name in branches if name.endswith(row.kept_wide)}
    assert {t.dtype for name, t in branches.items() if name not in wide} == {torch.bfloat16}
    assert_layer_is_as_exact_as_bfloat16_allows(row, model, adapt(row, tiny_llama().bfloat16().float(), **row.smooth))
    train_loss(row, model.train()).backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_a_float64_base_has_a_float64_adapter_in_the_file_too(row, tiny_llama, tmp_path):
    model = adapt(row, tiny_llama().double())
    assert {p.dtype for name, p in model.named_parameters() if "_branch." in name} == {torch.float64}
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny_llama().double(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(row, loaded), logits(row, model))
    narrow = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}


def test_autocast_runs_a_float32_model_in_bfloat16(row, tiny_llama):
    """One layer's output and gradients: a whole random model multiplies its roundings."""
    model = adapt(row, tiny_llama(), **row.no_dropout, **row.smooth).train()
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 5, 32, generator=generator), torch.randn(2, 5, 48, generator=generator)

    def run():
        model.zero_grad()
        y = layer_output(row, model, "model.layers.0.mlp.up_proj", x)
        (y * weight).sum().backward()
        return y.detach(), gradients(model)

    y, exact = run()
    with torch.autocast("cpu", torch.bfloat16):
        half, found = run()
    assert (y.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert relative(half, y) < 2**-6
    assert found.keys() == exact.keys() != set()
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() <= 0.02 * gradient.norm(), name


def test_under_autocast_scoring_computes_what_training_does(row, tiny_llama):
    """Bit for bit, choices included: without gradients another code runs, and rounding the ranks there would show."""
    model = adapt(row, tiny_llama())
    x = torch.randn(6, 40, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        learning = layer_output(row, model, "model.layers.0.mlp.up_proj", x).detach()
        with torch.no_grad():
            scoring = layer_output(row, model, "model.layers.0.mlp.up_proj", x)
    assert torch.equal(scoring, learning)


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], TARGETS], ids=["single layers", "whole blocks"])
def test_backward_inside_autocast_is_backward_outside(row, tiny_llama, targets):
    """What is read of x is mixed in float32, in forward and when backward does it again."""
    model = adapt(row, tiny_llama(), target_modules=targets, **row.no_dropout, **row.smooth).train()
    found = []
    for inside in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = train_loss(row, model)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_inference_mode_computes_the_same(row, tiny_llama):
    model = adapt(row, tiny_llama())
    expected = logits(row, model)
    with torch.inference_mode():
        found = model(input_ids=tokens(), **task_kwargs(row)).logits
    assert torch.equal(found, expected)
    train_loss(row, model.train()).backward()  # what inference mode touched can still be trained


# --- quantised bases -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    from tiny_models import make_tiny_llama

    folder = tmp_path_factory.mktemp("base")
    # sizes in whole blocks of 64, as four-bit weights want them
    make_tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["nf4", "int8"])
def quantised(request, saved_base):
    """A factory of quantised models."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    settings = BitsAndBytesConfig(**(four if request.param == "nf4" else {"load_in_8bit": True}))

    def make():
        model = AutoModelForCausalLM.from_pretrained(
            saved_base, quantization_config=settings, device_map="cpu", dtype=torch.float32
        )
        for module in model.modules():
            # Where the CPU has bf16 units, bitsandbytes multiplies in bf16 if x needs no gradient, and in float32 if it
            # does: the base's own outputs then depend on what is in front of a layer.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    return make


def test_bitsandbytes_base(row, quantised):
    base = quantised()
    weight = base.model.layers[0].mlp.up_proj.weight
    assert not weight.is_floating_point(), "the base is not quantised, so this test shows nothing"
    before = base(tokens()).logits.detach()
    model = adapt(row, base, stirred=False)
    if row.starts_as_base:
        assert relative(logits(row, model), before) < 1e-4
    untouched = {name: t for name, t in base_weights(model).items() if "up_proj" in name}
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert isinstance(layer, MethodLayer)
    assert (layer.in_features, layer.out_features) == (64, 128)

    model.train()
    stir(model)
    train_loss(row, model).backward()
    assert set(gradients(model)) == {name for name, p in model.named_parameters() if "_branch." in name}
    model.eval()
    assert relative(logits(row, model), before) > 0.01
    with model.disable_adapter():
        torch.testing.assert_close(logits(row, model), before, atol=1e-6, rtol=1e-6)
    with pytest.raises(headwater.HeadwaterError, match="quantised" if row.mergeable else "merg"):
        model.merge_and_unload()
    assert sum(isinstance(m, MethodLayer) for m in model.modules()) == 6
    assert_same({name: t for name, t in base_weights(model).items() if "up_proj" in name}, untouched)


def test_an_adapter_is_loaded_from_a_meta_device_onto_a_quantised_base(quantised, tmp_path):
    row = BY_ID["rlora"]
    model = adapt(row, quantised())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(row, loaded), logits(row, model))


@pytest.mark.parametrize("row_id", ["rlora", "mlora"])
def test_an_offloaded_base_has_its_adapter_where_it_runs(saved_base, tmp_path, row_id):
    from transformers import AutoModelForCausalLM

    row, parts = BY_ID[row_id], ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    base = AutoModelForCausalLM.from_pretrained(
        saved_base, device_map={**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}, offload_folder=tmp_path / "o"
    )
    assert base.model.layers[1].mlp.up_proj.weight.is_meta
    before = logits(row, base)
    model = adapt(row, base, stirred=False)
    torch.testing.assert_close(logits(row, model), before, atol=1e-5, rtol=1e-5)
    stir(model)
    adapted = logits(row, model)
    model.save_pretrained(tmp_path / "adapter")
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved_base), tmp_path / "adapter")
    torch.testing.assert_close(logits(row, whole), adapted, atol=1e-5, rtol=1e-5)
    if row.mergeable:
        torch.testing.assert_close(logits(row, model.merge_and_unload()), adapted, atol=1e-4, rtol=1e-4)


def test_an_offloaded_adapter_computes_the_same(row, tiny_llama):
    """Each layer's tensors are there for as long as it runs."""
    model = adapt(row, tiny_llama())
    expected = logits(row, model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for name, p in model.named_parameters() if "_branch." in name)
    assert torch.equal(logits(row, model), expected)
    assert torch.equal(logits(row, model), expected)


def test_a_partly_quantised_base_is_left_whole_by_a_refused_merge(saved_base):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["gate_proj", "lm_head"])
    base = AutoModelForCausalLM.from_pretrained(
        saved_base, quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    assert base.model.layers[0].mlp.gate_proj.weight.is_floating_point()
    assert not base.model.layers[0].mlp.up_proj.weight.is_floating_point()
    model = adapt(BY_ID["mlora"], base)
    before = base_weights(model)
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(headwater.HeadwaterError, match="up_proj: its weight is quantised"):
            verb()
    assert_same(base_weights(model), before)


def test_torchao_int8_base(row, tiny_llama):
    quantization = pytest.importorskip("torchao.quantization")
    base = tiny_llama(hidden_size=64, intermediate_size=128)
    quantization.quantize_(
        base,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda m, name: isinstance(m, nn.Linear) and name.rpartition(".")[2] in TARGETS,
    )
    before = base(tokens()).logits.detach()
    model = adapt(row, base, stirred=False)
    if row.starts_as_base:
        assert relative(logits(row, model), before) < 1e-4
    stir(model)
    train_loss(row, model.train()).backward()
    model.eval()
    assert relative(logits(row, model), before) > 0.01
    with model.disable_adapter():
        assert torch.equal(logits(row, model), before)
    with pytest.raises(headwater.HeadwaterError, match="quantised" if row.mergeable else "merg"):
        model.merge_and_unload()
