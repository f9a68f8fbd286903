"""What the alignment loss compares, those tasks of a batch that have two rows and 4 r tokens; and how it is scaled."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model

import headwater
from headwater.methods import call
from headwater.methods.call import Call, State
from headwater.ops.alignment import kl_alignment, membership
from headwater.tuner import AlignLoss, AlignSpec, context_of

from .helpers import adapt, assert_near, gradients, tokens, train_loss
from .rows import BY_ID

IDS = torch.tensor([0, 0, 1, 1, 2, 2])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(spec, z, valid, ids=IDS):
    """Of z `(rows, length, r)` where `valid` `(rows, length)` is True."""
    state = State(batch=len(ids), length=z.shape[1], task_ids=ids, valid=valid)
    return AlignLoss(spec, 1).loss(Call("layer", tuple(z.shape[:2]), state), z.flatten(0, 1))


@pytest.mark.parametrize("kind", ["kl", "mmd"])
def test_a_task_takes_part_from_4_r_tokens_on(kind):
    """r = 3; tasks 0 and 1 have 20 tokens each, task 2 has 12 or 11."""
    z, all_but_one = noise(6, 10, 3), torch.arange(10) < torch.tensor([10, 10, 10, 10, 6, 5]).unsqueeze(1)
    z[4:] += 3
    valid = torch.arange(10) < torch.tensor([10, 10, 10, 10, 6, 6]).unsqueeze(1)
    spec = AlignSpec(kind=kind)
    two = loss_of(spec, z, valid & (IDS < 2).unsqueeze(1))
    assert loss_of(spec, z, valid) > 1.2 * two
    torch.testing.assert_close(loss_of(spec, z, all_but_one), two)


def test_a_task_of_too_few_tokens_has_no_part_in_the_floor_under_variances():
    z = noise(6, 10, 3)
    z[:4, :, 2] *= 1e-4  # a nearly constant dimension, so that the floor matters
    z[2:4, :, 2] += 1e-3
    z[4:] *= 1e3
    valid = torch.arange(10) < torch.tensor([10, 10, 10, 10, 4, 4]).unsqueeze(1)
    member = membership(torch.arange(40) // 20, None, 2).double()
    torch.testing.assert_close(loss_of(AlignSpec(), z, valid), kl_alignment(z[:4].flatten(0, 1), member)[0, 1])


@pytest.mark.parametrize("ids", [[5, 5, 70_000, 70_000, 100_000, 100_000], [0, 0, 6, 6, 7, 7], [9, 9, 0, 0, 4, 4]])
@pytest.mark.parametrize(
    "fields", [{"kind": "mmd"}, {}, {"reduction": "sum"}, {"token_mode": "per_position"}], ids=lambda f: str(f)
)
def test_ids_with_gaps_cost_and_give_what_ids_without_do(fields, ids):
    """At 100,001 tasks the distances of all pairs would take 80 GB."""
    z, valid = noise(6, 10, 3), torch.arange(10) < torch.tensor([[10], [9], [8], [10], [10], [10]])
    expected = loss_of(AlignSpec(**fields), z, valid)
    torch.testing.assert_close(loss_of(AlignSpec(**fields), z, valid, torch.tensor(ids)), expected)


def test_a_task_below_0_is_refused_beside_ids_with_gaps():
    with pytest.raises(headwater.HeadwaterError, match="task id -1 is out of range"):
        loss_of(AlignSpec(), noise(6, 10, 3), None, torch.tensor([-1, -1, 50, 50, 60, 60]))


def test_fields_beside_a_spec_are_refused_instead_of_ignored(tiny_llama):
    model = adapt(BY_ID["rlora"], tiny_llama())
    with pytest.raises(headwater.HeadwaterError, match="kind and weight would be ignored beside the spec"):
        headwater.align(model, AlignSpec(), weight=3.0, kind="mmd")
    assert context_of(model).align is None


def test_a_lora_that_was_merged_does_not_align_the_next_adapter(tiny_llama):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    headwater.align(model, weight=3.0)
    row, fresh = BY_ID["rlora"], adapt(BY_ID["rlora"], tiny_llama(), **BY_ID["rlora"].no_dropout).train()
    model = adapt(row, model.merge_and_unload(), **row.no_dropout).train()
    for one in (model, fresh):
        train_loss(row, one).backward()  # asks for no task ids
    assert_near(gradients(model), gradients(fresh))


def up_proj(method="lora", **fields):
    fields = {"r": 2, "target_modules": ["up_proj"], "task_type": "CAUSAL_LM", **fields}
    return LoraConfig(**fields) if method == "lora" else headwater.make_config(method, **fields)


def test_dora_is_refused_where_it_is_active(tiny_llama):
    """It takes the identity through its A in each forward, too."""
    model = get_peft_model(tiny_llama(), up_proj())
    model.add_adapter("other", up_proj(use_dora=True))
    headwater.align(model, weight=1.0)
    model.set_adapter("other")
    with pytest.raises(headwater.HeadwaterError, match="align: other: PEFT's DoRA"):
        headwater.align(model, weight=1.0)
    headwater.align(model, weight=0.0)
    assert context_of(model).align is None


def test_lora_on_parameters_is_left_out_and_named(tiny_llama):
    on_parameters = {"target_parameters": ["mlp.up_proj.weight"]}
    model = get_peft_model(tiny_llama(), up_proj(target_modules=["q_proj"], **on_parameters))
    with pytest.warns(UserWarning, match=r"leaves out .*layers\.0\.mlp\.up_proj, .*layers\.1\.mlp\.up_proj$"):
        headwater.align(model, weight=1.0)
    assert context_of(model).align.layers == 2
    model = get_peft_model(tiny_llama(), up_proj(target_modules=[], **on_parameters))
    with pytest.raises(headwater.HeadwaterError, match=r"no adapter to align: .*layers\.0\.mlp\.up_proj"):
        headwater.align(model, weight=1.0)


def test_lora_on_multihead_attention_is_left_out_with_its_output_projection():
    base = torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(8, 2), "linear": torch.nn.Linear(8, 8)})
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["attention", "linear"]))
    with pytest.warns(UserWarning, match=r"\.attention, .*\.attention\.base_layer\.out_proj$"):
        headwater.align(model, weight=1.0)
    assert context_of(model).align.layers == 1


def test_adalora_whose_a_is_a_parameter_is_refused(tiny_llama):
    model = get_peft_model(tiny_llama(), AdaLoraConfig(total_step=9, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(headwater.HeadwaterError, match=r"no adapter to align: .*up_proj"):
        headwater.align(model, weight=1.0)


@pytest.mark.parametrize(("method", "fields"), [("lora", {}), ("multilora", {"num_heads": 1, "lora_dropout": 0.0})])
def test_a_second_active_adapter_halves_the_loss_of_the_first(tiny_llama, method, fields):
    """Updates start at 0, so the gradient of an A is the alignment's alone."""
    model = get_peft_model(tiny_llama(), up_proj(method, **fields)).train()
    model.add_adapter("other", up_proj(method, **fields))
    x, ids, found = tokens(4, 12), torch.tensor([0, 0, 1, 1]), []
    for active in (["default"], ["default", "other"]):
        model.base_model.set_adapter(active)
        headwater.align(model, weight=1.0)
        model.zero_grad()
        model(input_ids=x, labels=x, headwater_task_ids=ids).loss.backward()
        grads = {n: g for n, g in gradients(model).items() if "default" in n and ("lora_A" in n or n.endswith(".A"))}
        assert len(grads) == 2
        found.append(grads)
    for name, grad in found[0].items():
        assert grad.norm() > 0
        torch.testing.assert_close(found[1][name], grad / 2)


def own_loop(row, base, align, compiled, scale=1.0):
    """A loop that accumulates two batches and divides the loss itself."""
    model = adapt(row, base, **row.no_dropout).train()
    if align:
        headwater.align(model, weight=3.0)
    context_of(model).loss_scale = scale
    forward = torch.compile(model, backend="eager") if compiled else model
    for seed in range(2):
        x = tokens(4, 20, seed=seed)
        ids = {"headwater_task_ids": torch.tensor([0, 0, 1, 1])} if align else {}
        (forward(input_ids=x, labels=x, **ids).loss / 2).backward()
    return gradients(model)


@pytest.mark.parametrize(("row_id", "align"), [("hydralora-balance", False), ("rlora", True)])
def test_compiled_losses_are_scaled_by_hand_which_is_said_once(tiny_llama, row_id, align):
    """Oracle: the same loop without a compiler, where they follow the loss by themselves."""
    call._warn_once.cache_clear()
    torch._dynamo.reset()
    row, base = BY_ID[row_id], {"num_hidden_layers": 1, "attn_implementation": "sdpa"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        expected = own_loop(row, tiny_llama(**base), align, compiled=False)
        assert not any("compiled code" in str(w.message) for w in said)
        found = own_loop(row, tiny_llama(**base), align, compiled=True, scale=0.5)
    assert sum("loss_scale` to it" in str(w.message) for w in said) == 1
    assert_near(found, expected)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_does_not_take_a_trainers_scale_along(tiny_llama, how):
    model = adapt(BY_ID["moe_lora"], tiny_llama())
    headwater.align(model, weight=2.0)
    context_of(model).loss_scale = 0.125
    twin = context_of(how(model))
    assert twin.loss_scale == 1.0
    assert twin.align.spec == context_of(model).align.spec
