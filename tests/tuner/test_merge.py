"""Merging: the same function in one weight, or a refusal that leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import GPT2Config, GPT2LMHeadModel

import headwater
from headwater.analysis import heads as heads_of
from headwater.methods.registry import method
from headwater.tuner import MethodLayer

from .helpers import adapt, assert_same, base_weights, config, logits, stir, tokens
from .rows import BY_ID, ROWS

MERGEABLE = [row for row in ROWS if row.mergeable]
REFUSING = [row for row in ROWS if not row.mergeable]
BY_TASK = [row for row in ROWS if row.needs_task_ids]


def every(rows):
    return pytest.mark.parametrize("row", rows, ids=[row.id for row in rows])


def tiny_gpt2():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation="eager")).eval()


GPT2 = {"target_modules": ["c_attn", "c_fc", "c_proj"], "lora_alpha": 4}


@every(MERGEABLE)
def test_merge_and_unload_computes_the_same(row, tiny_llama):
    model = adapt(row, tiny_llama())
    expected = logits(row, model)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, MethodLayer) for m in merged.modules())
    assert (expected - tiny_llama()(tokens()).logits).abs().max() > 0.01
    torch.testing.assert_close(merged(tokens()).logits, expected, atol=2e-5, rtol=1e-4)


@every(MERGEABLE)
def test_merge_adapter_and_unmerge_adapter_restore_bit_for_bit(row, tiny_llama):
    model = adapt(row, tiny_llama())
    before, expected = base_weights(model), logits(row, model)
    model.merge_adapter()
    assert any(not torch.equal(t, before[name]) for name, t in base_weights(model).items())
    torch.testing.assert_close(logits(row, model), expected, atol=2e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert_same(base_weights(model), before)
    assert torch.equal(logits(row, model), expected)


@every(MERGEABLE)
def test_disabling_a_merged_adapter_gives_the_base(row, tiny_llama):
    base = tiny_llama()
    before = base(tokens()).logits
    model = adapt(row, base)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(row, model), before)


@pytest.mark.parametrize("undo", ["unmerge_adapter", "disable_adapter"])
@pytest.mark.parametrize("base_alone", [False, True])
def test_a_merged_model_may_be_cast(tiny_llama, undo, base_alone):
    """Oracle: the same cast of a model that was never merged."""
    row = BY_ID["mlora"]
    model, expected = adapt(row, tiny_llama()), adapt(row, tiny_llama()).bfloat16()
    model.merge_adapter()
    for module in model.modules() if base_alone else [model]:
        module.bfloat16() if not (base_alone and isinstance(module, MethodLayer)) else None
    if undo == "unmerge_adapter":
        model.unmerge_adapter()
        assert_same(base_weights(model), base_weights(expected))
        assert torch.equal(logits(row, model), logits(row, expected))
        return
    with model.disable_adapter(), expected.disable_adapter():
        assert torch.equal(logits(row, model), logits(row, expected))


def test_a_merged_model_takes_the_weights_before_the_merge_along(tiny_llama):
    """Through bfloat16 and back is a rounding, merged or not; and what is moved leaves nothing behind."""
    model, expected = (adapt(BY_ID["mlora"], tiny_llama()) for _ in range(2))
    model.merge_adapter()
    for one in (model, expected):
        one.bfloat16().float()
    model.unmerge_adapter()
    assert_same(base_weights(model), base_weights(expected))


@every(MERGEABLE)
def test_merging_in_float64_is_as_exact(row, tiny_llama):
    model = adapt(row, tiny_llama().double())
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float64}
    expected = logits(row, model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, expected, atol=1e-12, rtol=1e-10)


@every(MERGEABLE)
def test_two_adapters_merge_together(row, tiny_llama):
    model = adapt(row, tiny_llama())
    model.add_adapter("other", config(row, r=2, target_modules=["up_proj", "q_proj"], init_seed=7))
    stir(model, "other", seed=7)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(row, model)
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(merged(tokens()).logits, expected, atol=5e-5, rtol=1e-4)


@every(MERGEABLE)
def test_unsafe_values_are_refused_by_safe_merge(row, tiny_llama):
    model = adapt(row, tiny_llama())
    before = base_weights(model)
    layer = next(m for m in model.modules() if isinstance(m, MethodLayer) and "layers.1.mlp.up" in m.name)
    with torch.no_grad():
        layer.branches["default"].A[0, 0] = float("nan")
    with pytest.raises(headwater.HeadwaterError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        model.merge_and_unload(safe_merge=True)
    assert_same(base_weights(model), before)
    assert sum(isinstance(m, MethodLayer) for m in model.modules()) == 6
    with pytest.raises(headwater.HeadwaterError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert_same(base_weights(model), before)
    assert not any(m.merged for m in model.modules() if isinstance(m, MethodLayer))


@every(REFUSING)
@pytest.mark.parametrize("verb", ["merge_and_unload", "merge_adapter"])
def test_refusal_names_a_way_out_and_changes_nothing(row, tiny_llama, verb):
    model = adapt(row, tiny_llama())
    before, expected = base_weights(model), logits(row, model)
    with pytest.raises(headwater.NotMergeable, match=r"merg") as refused:
        getattr(model, verb)()
    assert "headwater.merge_" in refused.value.problems[0].fix
    assert_same(base_weights(model), before)
    assert torch.equal(logits(row, model), expected)


def test_a_refusing_adapter_beside_a_mergeable_one_changes_nothing(tiny_llama):
    model = adapt(BY_ID["rlora-one-head"], tiny_llama())
    model.add_adapter("routed", config(BY_ID["rlora"], target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "routed"])
    before = base_weights(model)
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(headwater.NotMergeable):
            verb()
        assert_same(base_weights(model), before)


@every(BY_TASK)
def test_merge_task_computes_what_the_adapter_does_for_that_task(row, tiny_llama):
    model = adapt(row, tiny_llama())
    for task in range(3):
        with torch.no_grad(), headwater.task_ids(model, task):
            expected = model(input_ids=tokens()).logits
        merged = headwater.merge_task(copy.deepcopy(model), task)
        torch.testing.assert_close(merged(tokens()).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("row_id", ["rlora", "hydralora", "rlora-center-kaiming"])
def test_merge_with_gates_is_exact_where_the_gates_are_those(row_id, tiny_llama):
    """With the router at zero the gates are uniform for every token, so merging with them is exact."""
    row = BY_ID[row_id]
    model = adapt(row, tiny_llama())
    heads = heads_of(model)
    assert len(heads) == 6
    with torch.no_grad():
        for held in heads.values():
            held.router.zero_()
    expected = logits(row, model)
    by_name = {name: torch.full((held.B.shape[0],), 1 / held.B.shape[0]) for name, held in heads.items()}
    for gates in ("uniform", by_name):
        merged = headwater.merge_with_gates(copy.deepcopy(model), gates)
        torch.testing.assert_close(merged(tokens()).logits, expected, atol=2e-5, rtol=1e-4)
    before = base_weights(model)
    by_name.pop("model.layers.1.mlp.up_proj")
    with pytest.raises(headwater.HeadwaterError, match=r"layers\.1\.mlp\.up_proj"):
        headwater.merge_with_gates(model, by_name)
    assert_same(base_weights(model), before)


def test_gpt2_has_transposed_weights_and_works_the_same(row):
    base = tiny_gpt2()
    before = base(tokens()).logits
    model = adapt(row, base, stirred=False, **GPT2)
    if row.starts_as_base:
        torch.testing.assert_close(logits(row, model), before, atol=1e-5, rtol=0)
    stir(model)
    expected = logits(row, model)
    assert not torch.allclose(expected, before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(row, model), before)
    sizes = {m.name: (m.in_features, m.out_features) for m in model.modules() if isinstance(m, MethodLayer)}
    assert sizes["transformer.h.0.attn.c_attn"] == (32, 96)
    if row.mergeable:
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(tokens()).logits, expected, atol=5e-5, rtol=1e-4)
    else:
        with pytest.raises(headwater.NotMergeable):
            model.merge_and_unload()


@every(MERGEABLE)
def test_merging_into_bfloat16_rounds_once(row, tiny_llama):
    """Oracle: the float32 sum, rounded."""
    model = adapt(row, tiny_llama().bfloat16())
    layers = {m.name: m for m in model.modules() if isinstance(m, MethodLayer)}
    expected = {
        name: (m.get_base_layer().weight.float() + m.branches["default"].delta_weight()).bfloat16()
        for name, m in layers.items()
    }
    merged = model.merge_and_unload()
    for name, weight in expected.items():
        assert torch.equal(merged.get_submodule(name).weight, weight)


@pytest.mark.parametrize(
    ("row_id", "merge"),
    [
        ("mlora", lambda model: model.merge_adapter()),
        ("mlora", lambda model: model.merge_and_unload()),
        ("mtl_lora", lambda model: headwater.merge_task(model, 1)),
        ("rlora", lambda model: headwater.merge_with_gates(model, "uniform")),
    ],
    ids=["merge_adapter", "merge_and_unload", "merge_task", "merge_with_gates"],
)
def test_a_weight_that_another_layer_has_too_is_not_merged_into(tiny_llama, row_id, merge):
    model = adapt(BY_ID[row_id], tiny_llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    before = base_weights(model)
    with pytest.raises(headwater.HeadwaterError, match=r"merge into lm_head: model\.embed_tokens and lm_head have one"):
        merge(model)
    assert_same(base_weights(model), before)
    untied = adapt(BY_ID[row_id], tiny_llama(), target_modules=["q_proj", "lm_head"])
    merge(untied)


def test_a_weight_that_another_layer_has_too_may_carry_an_adapter_that_is_not_merged(tiny_llama):
    row = BY_ID["mtl_lora"]
    model = adapt(row, tiny_llama(tie_word_embeddings=True), target_modules=["q_proj"])
    model.add_adapter("other", config(row, target_modules=["lm_head"]))
    tied = base_weights(model)["lm_head.weight"]
    assert torch.equal(headwater.merge_task(model, 1).lm_head.weight, tied)


def test_gates_are_uniform_or_one_for_each_layer(tiny_llama):
    model = adapt(BY_ID["hydralora"], tiny_llama())
    before = logits(BY_ID["hydralora"], model)
    with pytest.raises(headwater.HeadwaterError, match="or 'uniform', not 'mean'"):
        headwater.merge_with_gates(model, "mean")
    assert torch.equal(logits(BY_ID["hydralora"], model), before)


def test_fixed_gates_are_of_the_layers_that_the_active_adapter_is_on(tiny_llama):
    row = BY_ID["hydralora"]
    model = adapt(row, tiny_llama(), target_modules=["q_proj"], init_seed=2)
    model.add_adapter("other", config(row, target_modules=["up_proj"]))
    up = base_weights(model)["model.layers.0.mlp.up_proj.weight"]
    delta = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").branch("default")
    expected = base_weights(model)["model.layers.0.self_attn.q_proj.weight"] + delta.delta_weight(
        torch.full((3,), 1 / 3)
    )
    merged = headwater.merge_with_gates(model, "uniform")
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight, expected)
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, up)


@pytest.mark.parametrize(("row_id", "approximate"), [("rlora", True), ("rlora-one-head", False)])
def test_fixed_gates_are_warned_about_where_they_matter(tiny_llama, recwarn, row_id, approximate):
    headwater.merge_with_gates(adapt(BY_ID[row_id], tiny_llama()), "uniform")
    said = [w for w in recwarn if "merged with fixed gates" in str(w.message)]
    assert len(said) == approximate
    assert all(w.filename == __file__ for w in said)


@every([row for row in ROWS if not row.gated])
@pytest.mark.parametrize("gates", ["uniform", torch.zeros(99), None])
def test_there_is_no_gate_to_fix_where_a_method_has_none(row, tiny_llama, gates):
    model = adapt(row, tiny_llama())
    before = base_weights(model)
    names = [m.name for m in model.modules() if isinstance(m, MethodLayer)]
    given = gates if isinstance(gates, str) else {} if gates is None else dict.fromkeys(names, gates)
    with pytest.raises(headwater.HeadwaterError, match="has no gates to hold fixed") as refused:
        headwater.merge_with_gates(model, given)
    assert refused.value.problems[0].fix == "model.merge_and_unload() merges it exactly"
    assert_same(base_weights(model), before)


@every([BY_ID["hydralora"], BY_ID["moe_lora-by-task"]])
def test_a_fixed_merge_that_fails_on_a_later_layer_changes_nothing(row, tiny_llama):
    model = adapt(row, tiny_llama())
    before, weights = logits(row, model), base_weights(model)
    N = 4 if row.name == "moe_lora" else 3
    gates = {m.name: torch.full((N,), 1 / N) for m in model.modules() if isinstance(m, MethodLayer)}
    gates[list(gates)[-1]] = torch.ones(N + 1)
    with pytest.raises(headwater.HeadwaterError, match="a fixed gate is one number per head"):
        headwater.merge_with_gates(model, gates)
    assert_same(base_weights(model), weights)
    assert torch.equal(logits(row, model), before)
    assert not any(m.merged for m in model.modules() if isinstance(m, MethodLayer))


def with_lora(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))


def none_active(model):
    model = adapt(BY_ID["mtl_lora"], model)
    model.base_model.set_adapter([])
    return model


def injected(row_id):
    return lambda model: stir(model := inject_adapter_in_model(config(BY_ID[row_id]), model)) or model


@pytest.mark.parametrize(
    "merge",
    [lambda model: headwater.merge_with_gates(model, "uniform"), lambda model: headwater.merge_task(model, 1)],
    ids=["merge_with_gates", "merge_task"],
)
@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda model: model, "no active headwater adapter"),
        (with_lora, "no active headwater adapter"),
        (none_active, "no active headwater adapter"),
        (injected("rlora"), "not PEFT's wrapper"),
        (injected("mtl_lora"), "not PEFT's wrapper"),
    ],
    ids=["base", "lora", "none active", "injected rlora", "injected mtl_lora"],
)
def test_what_cannot_be_merged_is_left_as_it_was(tiny_llama, merge, made, said):
    model = made(tiny_llama())
    before, modules = base_weights(model), [type(m) for m in model.modules()]
    with pytest.raises(headwater.HeadwaterError, match=said):
        merge(model)
    assert_same(base_weights(model), before)
    assert [type(m) for m in model.modules()] == modules


@every([row for row in ROWS if not row.needs_task_ids])
def test_a_method_without_tasks_has_none_to_merge_for(row, tiny_llama):
    model = adapt(row, tiny_llama())
    before = base_weights(model)
    with pytest.raises(headwater.HeadwaterError, match="does the same for every task") as refused:
        headwater.merge_task(model, 99)
    assert ("merge_and_unload" in refused.value.problems[0].fix) == method(row.name).mergeable
    assert_same(base_weights(model), before)


@every([row for row in BY_TASK if row.name != "taskprobe"])  # a test's own method, which asks nothing of a task
@pytest.mark.parametrize(("task", "said"), [("sst2", "not 'sst2'"), (1.0, "not 1.0"), (3, "out of range")])
def test_a_task_is_a_number_that_the_adapter_knows(row, tiny_llama, task, said):
    model = adapt(row, tiny_llama())
    with pytest.raises(headwater.HeadwaterError, match=f"{said}.*3 tasks, 0 to 2"):
        headwater.merge_task(model, task)
    merged = headwater.merge_task(copy.deepcopy(model), torch.tensor(1))
    assert_same(base_weights(merged), base_weights(headwater.merge_task(model, 1)))


@pytest.mark.parametrize("row_id", ["rlora", "cond_mixlora"])
def test_fixed_gates_may_be_lists(row_id, tiny_llama):
    model, seen = adapt(BY_ID[row_id], tiny_llama()), {}
    with headwater.observe(model, lambda name, gate: seen.update({name: gate[0, 0]}), merging=True):
        logits(BY_ID[row_id], model)
    expected = headwater.merge_with_gates(copy.deepcopy(model), seen)
    merged = headwater.merge_with_gates(model, {name: gate.tolist() for name, gate in seen.items()})
    assert_same(base_weights(merged), base_weights(expected))


def test_every_gate_that_does_not_fit_a_layer_is_named(tiny_llama):
    model = adapt(BY_ID["rlora"], tiny_llama(), target_modules=["q_proj"])
    before = base_weights(model)
    first, second = (f"model.layers.{n}.self_attn.q_proj" for n in range(2))
    with pytest.raises(headwater.HeadwaterError) as refused:
        headwater.merge_with_gates(model, {first: "abc", "lm_head": torch.ones(3)})
    said = [problem.what for problem in refused.value.problems]
    assert said[:2] == [f"no gate for layer {second}", "a gate for 'lm_head', where no active adapter is"]
    assert said[2].startswith(f"the gate for layer {first} is no tensor")
    with pytest.raises(headwater.HeadwaterError, match="or 'uniform', not None"):
        headwater.merge_with_gates(model, None)
    assert_same(base_weights(model), before)
