"""What injection makes: the same function as before, few trained values, and not a bit of the base changed."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict

import headwater
from headwater.tuner import MethodLayer, is_adapted

from .helpers import LAYERS, adapt, assert_same, base_weights, config, logits, stir, task_kwargs, tokens
from .rows import ROWS


def test_the_matrix_covers_every_method():
    assert {row.name for row in ROWS} >= {method.name for method in headwater.methods()}


def test_flags_are_those_of_the_registry(row):
    method = next(m for m in headwater.methods() if m.name == row.name)
    assert config(row).needs_task_ids == row.needs_task_ids
    assert method.needs_task_ids == row.needs_task_ids or row.id == "moe_lora-by-task"  # the setting decides
    assert method.mergeable == row.mergeable or row.id == "rlora-one-head"


def test_starts_as_the_base_model_unless_documented_otherwise(row, tiny_llama):
    base = tiny_llama()
    before = base(tokens()).logits
    model = adapt(row, base, stirred=False)
    assert torch.allclose(logits(row, model), before, atol=1e-5, rtol=0) == row.starts_as_base
    stir(model)
    assert (logits(row, model) - before).abs().max() > 1e-3, "the adapter does nothing, so the other tests show nothing"


def test_eval_stays_eval_and_train_stays_train(row, tiny_llama):
    """No dropout in a model that was put in eval mode before it was adapted."""
    model = adapt(row, tiny_llama())
    assert torch.equal(logits(row, model), logits(row, model))
    assert not any(m.training for name, m in model.named_modules() if "_branch" in name)
    model = adapt(row, tiny_llama().train())
    assert all(m.training for m in model.modules())
    assert not torch.equal(logits(row, model), logits(row, model))


def test_trainable_count_is_the_closed_formula(row, tiny_llama):
    model = adapt(row, tiny_llama())
    expected = sum(row.trainable(4, d_in, d_out) for d_in, d_out in LAYERS.values())
    expected += sum(math.prod(shape) for shape in row.saved_once.values())
    assert model.get_nb_trainable_parameters()[0] == expected


def test_saved_tensors_are_the_pinned_ones(row, tiny_llama):
    saved = get_peft_model_state_dict(adapt(row, tiny_llama()))
    expected = {
        f"base_model.model.{layer}.{row.name}_branch.{tensor}": shape
        for layer, (d_in, d_out) in LAYERS.items()
        for tensor, shape in (
            row.saved(4, d_in, d_out) | (row.saved_once if layer == next(iter(LAYERS)) else {})
        ).items()
    }
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected
    assert {tensor.dtype for tensor in saved.values() if tensor.is_floating_point()} == {torch.float32}


def test_neither_injection_nor_a_training_step_touches_the_base(row, tiny_llama):
    base = tiny_llama()
    before = base_weights(base)
    model = adapt(row, base)
    assert_same(base_weights(model), before)

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.01)
    for step in range(2):
        x = tokens(seed=step)
        model(input_ids=x, labels=x, **task_kwargs(row)).loss.backward()
        optimiser.step()
    assert_same(base_weights(model), before)


def test_every_trained_tensor_gets_a_gradient(row, tiny_llama):
    model = adapt(row, tiny_llama()).train()
    x = tokens(rows=6)
    model(input_ids=x, labels=x, **task_kwargs(row, 6)).loss.backward()
    dead = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().max() > 0]
    no_say = "router" if row.id == "rlora-one-head" else None  # a router over one head
    assert [name for name in dead if not no_say or no_say not in name] == []


def test_only_adapter_parameters_are_trained_and_frozen_ones_are_buffers(row, tiny_llama):
    model = adapt(row, tiny_llama())
    assert all(p.requires_grad == ("_branch." in name) for name, p in model.named_parameters())
    parameters, buffers = (
        {name.rpartition(".")[2] for name, _ in named if "_branch." in name}
        for named in (model.named_parameters(), model.named_buffers())
    )
    assert parameters | buffers == {*row.saved(4, 32, 48), *row.saved_once}
    assert not parameters & buffers


def down_projection(row) -> str:
    """How its name in the file ends; a row's `saved` names it first."""
    return f".{next(iter(row.saved(4, 32, 48)))}"


def test_init_seed_decides_the_start_whatever_else_is_targeted(row, tiny_llama):
    first = get_peft_model_state_dict(adapt(row, tiny_llama(), stirred=False))
    torch.rand(3)
    again = get_peft_model_state_dict(adapt(row, tiny_llama(), stirred=False))
    assert_same(again, first)
    fewer = {
        name: t
        for name, t in get_peft_model_state_dict(
            adapt(row, tiny_llama(), stirred=False, target_modules=["up_proj"])
        ).items()
        if not name.endswith(tuple(row.saved_once))  # held by the first layer, whichever that is
    }
    assert_same(fewer, {name: t for name, t in first.items() if "up_proj" in name})
    if not row.drawn:
        return
    other = get_peft_model_state_dict(adapt(row, tiny_llama(), stirred=False, init_seed=2))
    assert not torch.equal(*(next(t for n, t in s.items() if n.endswith(down_projection(row))) for s in (first, other)))
    with_global_seed = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = adapt(row, tiny_llama(), stirred=False, init_seed=None)
        with_global_seed.append(
            next(t for n, t in get_peft_model_state_dict(model).items() if n.endswith(down_projection(row)))
        )
    assert torch.equal(with_global_seed[0], with_global_seed[1])
    assert not torch.equal(with_global_seed[0], with_global_seed[2])


def test_layers_start_differently(row, tiny_llama):
    saved = get_peft_model_state_dict(adapt(row, tiny_llama(), stirred=False))
    starts = [t for name, t in saved.items() if name.endswith(down_projection(row)) and t.shape[-1] == 32]
    assert len(starts) == 4
    assert not row.drawn or all(not torch.equal(a, b) for n, a in enumerate(starts) for b in starts[:n])


def test_config_goes_through_json(row, tmp_path):
    made = config(row)
    made.save_pretrained(tmp_path)
    read = type(made).from_pretrained(tmp_path)
    assert read == made
    assert read.peft_type.value == row.name.upper()


@pytest.mark.parametrize("fields", [{"r": 100}, {"rank_pattern": {"down_proj": 33}}])
def test_a_rank_larger_than_the_layer_is_refused_by_name(row, tiny_llama, fields):
    with pytest.raises(headwater.HeadwaterError, match=r"rank \d+ is larger than layer model\.layers\.0\.mlp"):
        adapt(row, tiny_llama(), **fields, **row.large_rank)


@pytest.mark.parametrize("around", ["meta", "float64", "bfloat16"])
def test_starts_the_same_whatever_torch_makes_tensors_of_by_default(row, tiny_llama, around):
    base, settings = tiny_llama(), config(row, tiny_llama())
    expected = get_peft_model_state_dict(get_peft_model(tiny_llama(), settings))
    try:
        if around != "meta":
            torch.set_default_dtype(getattr(torch, around))
        with torch.device("meta") if around == "meta" else contextlib.nullcontext():
            model = get_peft_model(base, config(row, tiny_llama()) if row.ingredient is None else settings)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(get_peft_model_state_dict(model), expected)


def test_a_start_without_a_seed_is_drawn_on_the_cpu(tiny_llama):
    base = tiny_llama()
    with torch.device("meta"):
        model = get_peft_model(base, headwater.RLoraConfig(r=2, target_modules=["q_proj"]))
    assert not any(p.is_meta for p in model.parameters())


REFUSED = {"r": 8, "num_links": 2, "link_ranks": [8, 32], "init_seed": 0}  # k_proj is 16 wide, and comes after q_proj


def test_an_adapter_that_a_layer_refuses_is_on_no_layer(tiny_llama):
    base = tiny_llama()
    hooks, modules = len(base._forward_hooks), [type(m) for m in base.modules()]
    with pytest.raises(headwater.HeadwaterError, match="k_proj"):
        get_peft_model(base, headwater.make_config("cola", target_modules=["q_proj", "k_proj"], **REFUSED))
    assert [type(m) for m in base.modules()] == modules
    assert all(p.requires_grad for p in base.parameters())
    assert not is_adapted(base)
    assert "generate" not in base.__dict__
    assert len(base._forward_hooks) == hooks
    model = get_peft_model(base, headwater.make_config("cola", target_modules=["v_proj"], r=8, num_links=2))
    assert {m.name.rpartition(".")[2] for m in model.modules() if isinstance(m, MethodLayer)} == {"v_proj"}
    assert all("v_proj" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["other", "default"])
def test_an_adapter_that_a_layer_refuses_leaves_the_others_as_they_were(tiny_llama, name):
    """Also one of its own name, which another try on the same base model would replace."""
    row = next(row for row in ROWS if row.name == "cola")
    model = adapt(row, tiny_llama(), target_modules=["q_proj", "up_proj"])
    before, expected = {n: p.requires_grad for n, p in model.named_parameters()}, logits(row, model)
    refused = headwater.make_config("cola", target_modules=["q_proj", "k_proj", "o_proj"], **REFUSED)
    with pytest.raises(headwater.HeadwaterError, match="k_proj"):
        model.add_adapter(name, refused) if name == "other" else get_peft_model(model.get_base_model(), refused)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert torch.equal(logits(row, model), expected)
    model.add_adapter("other", config(row, target_modules=["o_proj"]))
    model.set_adapter("other")
    on = {m.name.rpartition(".")[2] for m in model.modules() if isinstance(m, MethodLayer) and "other" in m.branches}
    assert on == {"o_proj"}
