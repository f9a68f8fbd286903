"""Layers that cannot carry an adapter: left out of "all-linear", refused by name, all of them at once."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import headwater
from headwater.tuner import MethodLayer

from .helpers import adapt, assert_same, base_weights, logits, task_kwargs, tokens
from .rows import BY_ID, ROWS

ROW = BY_ID["rlora"]
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
every_row = pytest.mark.parametrize(  # a file that an adapter is made from is of the layers of another one
    "row", [row for row in ROWS if row.ingredient is None], ids=lambda row: row.id
)


def tiny_qwen2_moe() -> Qwen2MoeForCausalLM:
    """Has gates of one output, `mlp.shared_expert_gate`, and a shared expert of width 16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                shared_expert_intermediate_size=16, attn_implementation="eager",
            )
        ).eval()  # fmt: skip


def tiny_mamba() -> MambaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()


SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 1}


def adapted(model: torch.nn.Module) -> set[str]:
    return {m.name.rpartition(".")[2] for m in model.modules() if isinstance(m, MethodLayer)}


@pytest.mark.parametrize(
    ("config", "fields", "router"),
    [
        (Llama4TextConfig, {"head_dim": 8, "interleave_moe_layer_step": 1}, "feed_forward.router is .* a Llama4Router"),
        (PhimoeConfig, {}, "mlp.router is .* a PhimoeTopKRouter"),
    ],
)
def test_all_linear_leaves_out_routers_that_give_back_more_than_a_product(config, fields, router):
    base = AutoModelForCausalLM.from_config(config(**SMALL, **fields)).eval()
    before = base(tokens()).logits
    with pytest.warns(UserWarning, match=f"leaves out .*: model.layers.0.{router}"):
        model = adapt(ROW, base, stirred=False, target_modules="all-linear")
    assert "router" not in adapted(model) >= {"q_proj", "o_proj"}
    torch.testing.assert_close(model(tokens()).logits, before)
    with pytest.raises(headwater.HeadwaterError, match=f"layers.0.{router}"):
        adapt(ROW, AutoModelForCausalLM.from_config(config(**SMALL, **fields)), target_modules=["q_proj", "router"])


def test_all_linear_leaves_out_what_is_gone_around_in_training():
    fields = {"altup_num_inputs": 4, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0}
    sizes = {"vocab_size_per_layer_input": 300, "head_dim": 8, "activation_sparsity_pattern": [0.0, 0.0]}
    sizes |= {"layer_types": ["full_attention"] * 2, "intermediate_size": [48, 48]}
    base = AutoModelForCausalLM.from_config(Gemma3nTextConfig(**{**SMALL, **fields, **sizes}))
    with pytest.warns(UserWarning, match=r"altup.correction_coefs cannot be adapted: the model reads its weight"):
        model = adapt(ROW, base, target_modules="all-linear")
    assert "correction_coefs" not in adapted(model) >= {"q_proj", "prediction_coefs"}


@every_row
def test_all_linear_leaves_out_what_is_too_small_and_says_so_once(row, tmp_path):
    fields = {**row.no_dropout, "target_modules": "all-linear", "exclude_modules": ["shared_expert_gate"]}
    expected = adapt(row, tiny_qwen2_moe(), **fields)
    del fields["exclude_modules"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = adapt(row, tiny_qwen2_moe(), **fields)
    said = [str(w.message) for w in caught if "all-linear" in str(w.message)]
    assert said == [
        "target_modules='all-linear' leaves out what cannot carry the adapter: rank 4 is larger than layer "
        "model.layers.0.mlp.shared_expert_gate (32 -> 1) allows, and 1 more of this name"
    ]
    assert "shared_expert_gate" not in adapted(model)
    assert adapted(model) == adapted(expected) > {"q_proj", "down_proj"}
    assert torch.equal(logits(row, model), logits(row, expected))

    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*all-linear")
        loaded = PeftModel.from_pretrained(tiny_qwen2_moe(), tmp_path)
    assert torch.equal(logits(row, loaded), logits(row, model))


def test_all_linear_keeps_small_layers_of_a_rank_that_fits_and_names_none_that_are_not_meant():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*all-linear")
        by_pattern = adapt(ROW, tiny_qwen2_moe(), target_modules="all-linear", rank_pattern={"shared_expert_gate": 1})
        excluded = adapt(ROW, tiny_qwen2_moe(), target_modules="all-linear", exclude_modules=r".*shared_expert_gate")
    assert "shared_expert_gate" in adapted(by_pattern)
    assert "shared_expert_gate" not in adapted(excluded)


def test_named_layers_are_refused_all_at_once_with_what_leaves_them_out():
    base = tiny_qwen2_moe()
    before = base_weights(base)
    fields = {"target_modules": ["q_proj", "k_proj", "shared_expert_gate", "down_proj"], "r": 17}
    with pytest.raises(headwater.HeadwaterError) as refused:
        adapt(ROW, base, **fields)
    problems = refused.value.problems
    assert [p.what for p in problems] == [
        f"rank 17 is larger than layer model.layers.0.{name} allows, and 1 more of this name"
        for name in (
            "self_attn.k_proj (32 -> 16)",
            "mlp.shared_expert.down_proj (16 -> 32)",
            "mlp.shared_expert_gate (32 -> 1)",
        )
    ]
    assert {p.where for p in problems} == {"r"}
    end = "or leave out what is too small, exclude_modules: [down_proj, k_proj, shared_expert_gate]"
    for p, most in zip(problems, (16, 16, 1), strict=True):
        assert p.fix == f"use r <= {most}, lower it for these layers alone with rank_pattern, {end}"
    assert adapted(base) == set()
    assert_same(base_weights(base), before)
    ready = end.partition("[")[2].rstrip("]").split(", ")
    assert adapted(adapt(ROW, base, **fields, exclude_modules=ready)) == {"q_proj"}


def test_what_is_no_linear_layer_is_refused_before_anything_is_changed(tiny_llama):
    base = tiny_qwen2_moe()
    with pytest.raises(headwater.HeadwaterError) as refused:
        adapt(ROW, base, target_modules=["q_proj", "embed_tokens", "experts"])
    assert [(p.where, p.what) for p in refused.value.problems] == [
        ("target_modules", "model.embed_tokens is no linear layer but a Embedding, which cannot be adapted"),
        (
            "target_modules",
            "model.layers.0.mlp.experts is no linear layer but a Qwen2MoeExperts, which cannot be adapted, and 1 more "
            "of this name",
        ),
    ]
    assert adapted(base) == set()
    with pytest.raises(headwater.HeadwaterError, match="0 is no linear layer but a Conv1d"):
        adapt(ROW, torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1)), target_modules=["0"], task_type=None)
    everything = adapt(ROW, tiny_llama(), target_modules=r".*(q_proj|mlp\.\w+_proj)")
    assert adapted(everything) == {"q_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("named", [r".*self_attn\..*", r"model\.layers\.0\.mlp\.up_proj.*"])
def test_an_expression_that_also_fits_parts_of_adapted_layers_makes_a_second_adapter(tiny_llama, tmp_path, named):
    model = adapt(ROW, tiny_llama(), target_modules=named)
    model.save_pretrained(tmp_path)
    model.add_adapter("second", model.peft_config["default"])
    model.load_adapter(tmp_path, "third")
    layers = [m for m in model.modules() if isinstance(m, MethodLayer)]
    assert layers
    assert all(list(layer.branches) == ["default", "second", "third"] for layer in layers)


def test_an_expression_that_also_fits_the_model_itself_is_of_its_layers():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    assert adapted(adapt(ROW, model, task_type=None, target_modules=".*")) == {"0", "1"}


def test_where_a_name_also_fits_elsewhere_full_names_are_given():
    pattern = {r"layers.1.mlp.shared_expert.down_proj": 20}
    with pytest.raises(headwater.HeadwaterError) as refused:
        adapt(ROW, tiny_qwen2_moe(), target_modules=["down_proj"], rank_pattern=pattern)
    assert refused.value.problems[0].what == (
        "rank 20 is larger than layer model.layers.1.mlp.shared_expert.down_proj (16 -> 32) allows"
    )
    assert refused.value.problems[0].fix.endswith("exclude_modules: [model.layers.1.mlp.shared_expert.down_proj]")


def test_a_rank_that_fits_nowhere_is_refused_though_all_linear_layers_are_meant(tiny_llama):
    with pytest.raises(headwater.HeadwaterError, match=r"rank 64 is larger than layer model\.layers\.0\.self_attn"):
        adapt(ROW, tiny_llama(), target_modules="all-linear", r=64)


@every_row
def test_layers_that_mambas_code_goes_around_are_not_adapted(row):
    """Their weights are read, `dt_proj`'s everywhere and the others' on a GPU, and their forward never runs."""
    base = tiny_mamba()
    for name in ("x_proj", "dt_proj", "out_proj", "conv1d"):
        with pytest.raises(headwater.HeadwaterError, match=rf"mixer\.{name}.* goes around it") as refused:
            adapt(row, base, target_modules=["in_proj", name], r=2)
        assert [p.where for p in refused.value.problems] == ["target_modules"]
    assert adapted(base) == set()
    with pytest.warns(UserWarning, match=r"leaves out .*layers\.0\.mixer\.out_proj .*and 1 more of this name"):
        model = adapt(row, base, target_modules="all-linear", r=2)
    assert adapted(model) == {"in_proj"}
    model(input_ids=tokens(), **task_kwargs(row))
    assert adapted(adapt(ROW, tiny_qwen2_moe(), target_modules=["o_proj"])) == {"o_proj"}


class Blocks(torch.nn.Module):
    """PyTorch's own encoder blocks and a layer of one's own."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2
        )
        self.last = torch.nn.Linear(16, 16)

    def forward(self, x):
        return self.last(self.blocks(x))


def test_layers_that_pytorchs_own_blocks_go_around_are_not_adapted():
    """`nn.MultiheadAttention` reads its output projection's weight, a whole block in eval mode all weights."""
    fields = {"task_type": None, "target_modules": "all-linear", **ROW.no_dropout}
    with pytest.warns(UserWarning, match=r"leaves out .*self_attn\.out_proj .*linear1"):
        assert adapted(adapt(ROW, Blocks(), **fields)) == {"last"}
    with pytest.raises(headwater.HeadwaterError, match=r"exclude_modules: \[linear1\], or call .*fastpath_enabled"):
        adapt(ROW, Blocks(), task_type=None, target_modules=["linear1"])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = adapt(ROW, Blocks(), task_type=None, target_modules=["linear1", "linear2"], **ROW.no_dropout).eval()
        x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
        changed = model(x)
        with model.disable_adapter():
            assert not torch.allclose(model(x), changed, atol=0.01)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@every_row
def test_all_linear_in_some_of_the_layers(row, tiny_llama, tmp_path):
    fields = {**row.no_dropout, "layers_to_transform": [1]}
    model = adapt(row, tiny_llama(), target_modules="all-linear", **fields)
    named = adapt(row, tiny_llama(), target_modules=sorted(LINEAR), **fields)
    where = {m.name.rpartition(".")[0] for m in model.modules() if isinstance(m, MethodLayer)}
    assert where == {"model.layers.1.self_attn", "model.layers.1.mlp"}
    assert torch.equal(logits(row, model), logits(row, named))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(row, PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(row, model))


def test_all_linear_in_layers_that_are_not_there_is_refused(tiny_llama):
    for fields in ({"layers_to_transform": 7}, {"layers_to_transform": [1], "layers_pattern": "h"}):
        base = tiny_llama()
        with pytest.raises(headwater.HeadwaterError, match="no linear layer is in layers"):
            adapt(ROW, base, target_modules="all-linear", **fields)
        assert adapted(base) == set()


def test_a_layer_that_carries_peft_s_own_adapter_is_refused_or_left_out(tiny_llama):
    """Both would be saved under names that hold only where both are."""
    base = tiny_llama()
    base.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "plain")
    config = headwater.MLoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    with pytest.raises(headwater.HeadwaterError, match=r"q_proj carries an adapter of another kind already \(lora\)"):
        base.add_adapter(config, "ours")
    assert adapted(base) == set()
    base = tiny_llama()
    base.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "plain")
    with pytest.warns(UserWarning, match="leaves out what cannot carry the adapter: .*q_proj carries"):
        base.add_adapter(headwater.MLoraConfig(r=2, target_modules="all-linear"), "ours")
    assert adapted(base) == LINEAR - {"q_proj"}
