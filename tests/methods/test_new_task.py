"""A task that an adapter is given after its training: the others stay as they are, and training goes on from there."""

from __future__ import annotations

import json
import math

import pytest
import torch
from adapted_linear import adapt, base_of, move, noise, parameters
from peft import PeftModel, get_peft_model
from tiny_models import make_tiny_llama

import headwater
from headwater import HeadwaterError, make_config
from headwater.tuner import MethodLayer

T, n, r, d_in, d_out, tau = 3, 2, 2, 5, 6, 0.5
X = torch.tensor([[4, 5, 6], [7, 8, 9]])
FIELDS = {"num_tasks": 2, "r": 2, "target_modules": ["up_proj", "down_proj"], "task_type": "CAUSAL_LM", "init_seed": 0}


def model_of(**fields):
    given = {"num_tasks": T, "num_heads": n, "r": r, "lora_alpha": 3, "lora_dropout": 0.0, "temperature": tau, **fields}
    return adapt("mtl_lora", d_in, d_out, **given)


def trained(**fields):
    return move(get_peft_model(make_tiny_llama(), make_config("mtl_lora", **FIELDS, **fields)).eval(), 1)


def branches(model):
    return {m.name: m.branch("default") for m in model.modules() if isinstance(m, MethodLayer)}


@pytest.mark.parametrize("lambda_format", ["full", "diag"])
@pytest.mark.parametrize("unknown_task", ["error", "mean"])
def test_other_tasks_stay_bit_for_bit_and_the_new_one_starts_as_the_equation_says(lambda_format, unknown_task):
    model = move(model_of(lambda_format=lambda_format, unknown_task=unknown_task), 1)
    x, tasks = noise(4, 3, d_in), [2, 0, 1, 2]
    before = model(x, headwater_task_ids=tasks).detach()
    assert headwater.add_task(model) == T
    assert torch.equal(model(x, headwater_task_ids=tasks), before)
    mixed = model(x, headwater_task_ids=[2, T, 1, T]).detach()
    assert torch.equal(mixed[[0, 2]], before[[0, 2]])
    A, B, w = (parameters(model)[name].detach() for name in ("A", "B", "w"))
    logits = [sum(w[t, k].item() for t in range(T)) / T for k in range(n)]
    m = [math.exp(logit / tau) for logit in logits]
    update = 3 / r * sum(m[k] / sum(m) * B[k].T @ A for k in range(n))
    expected = base_of(model)(x[[1, 3]]) + x[[1, 3]] @ update.T
    torch.testing.assert_close(mixed[[1, 3]], expected, rtol=1e-10, atol=1e-10)
    assert headwater.add_task(model) == T + 1


@pytest.mark.parametrize("w_init", ["kaiming", "zeros"])
def test_fresh_mixing_is_drawn_as_tasks_begin(w_init):
    fields = {"w_init": w_init, "head_init": "kaiming", "num_heads": 4}
    models = [move(model_of(**fields), 1) for _ in range(2)]
    for model in models:
        headwater.add_task(model, mixing="fresh")
        headwater.add_task(model, mixing="fresh")
    w, again = (parameters(model)["w"].detach() for model in models)
    assert torch.equal(w, again)  # by init_seed
    if w_init == "zeros":
        assert not w[T:].any()
    else:
        assert w[T:].abs().min() > 0
        assert w[T:].abs().max() <= 0.5
        assert not torch.equal(w[T], w[T + 1])


def test_ids_are_those_of_the_tasks_there_are():
    model, x = model_of(), noise(1, 2, d_in)
    with pytest.raises(HeadwaterError, match="task id 3 is out of range"):
        model(x, headwater_task_ids=T)
    headwater.add_task(model)
    model(x, headwater_task_ids=T)
    with pytest.raises(HeadwaterError, match="task id 4 is out of range: the adapter knows 4 tasks"):
        model(x, headwater_task_ids=T + 1)
    headwater.merge_task(model, T)


def test_a_loaded_adapter_trains_on_with_its_new_task_and_is_saved_with_it(tmp_path):
    first = trained()
    first.save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "first", is_trainable=True)
    assert headwater.add_task(model) == 2
    assert torch.equal(model(X, headwater_task_ids=[1, 0]).logits, first(X, headwater_task_ids=[1, 0]).logits)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=X, labels=X, headwater_task_ids=[2, 2]).loss.backward()
        optimizer.step()
    for name, branch in branches(model).items():
        before = branches(first)[name]
        for tensor in ("L", "w"):
            now = getattr(branch, tensor)
            assert torch.equal(now[:2], getattr(before, tensor))
        assert (branch.L[2] - torch.eye(2)).abs().max() > 1e-3
        assert not torch.equal(branch.w[2], before.w.mean(0))
    model.eval().save_pretrained(tmp_path / "second")
    again = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "second")
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["num_tasks"] == 3
    assert torch.equal(again(X, headwater_task_ids=[2, 1]).logits, model(X, headwater_task_ids=[2, 1]).logits)


def test_an_adapter_loaded_for_inference_stays_frozen(tmp_path):
    trained().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_tiny_llama(), tmp_path)
    headwater.add_task(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_what_decoding_holds_is_made_anew():
    model = trained()
    written = {"input_ids": X, "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    before = model.generate(**written, output_logits=True, headwater_task_ids=[0, 1])
    headwater.add_task(model)
    for branch in branches(model).values():
        branch.L.data[2] *= 3
    found, plain = (
        torch.stack(model.generate(**written, output_logits=True, headwater_task_ids=[2, 1], use_cache=cache).logits)
        for cache in (True, False)
    )
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[:, 0], torch.stack(before.logits)[:, 0], atol=1e-3)


def test_one_of_several_adapters_of_one_config_gets_it():
    model = trained()
    model.add_adapter("other", model.peft_config["default"])
    headwater.add_task(model, adapter_name="other")
    assert {name: config.num_tasks for name, config in model.peft_config.items()} == {"default": 2, "other": 3}
    with pytest.raises(HeadwaterError, match="task id 2 is out of range"):
        model(X, headwater_task_ids=2)
    model.set_adapter("other")
    model(X, headwater_task_ids=2)


def test_what_cannot_be_done_is_refused_and_changes_nothing():
    model = trained()
    with pytest.raises(HeadwaterError, match="mixing is one of mean, fresh, not 'zeros'"):
        headwater.add_task(model, mixing="zeros")
    with pytest.raises(HeadwaterError, match=r"no headwater adapter named 'first'\n.*its adapters: default"):
        headwater.add_task(model, adapter_name="first")
    with pytest.raises(HeadwaterError, match="no headwater adapter named 'default'"):
        headwater.add_task(make_tiny_llama())
    with pytest.raises(HeadwaterError, match="R-LoRA cannot be given a task later"):
        headwater.add_task(adapt("rlora", d_in, d_out, r=2))
    assert model.peft_config["default"].num_tasks == 2
    one = model_of(num_tasks=1)
    one.merge_adapter()
    with pytest.raises(HeadwaterError, match="'default' is merged into the base model"):
        headwater.add_task(one)
    one.unmerge_adapter()
    assert headwater.add_task(one) == 1


@pytest.mark.parametrize("lambda_format", ["full", "diag"])
def test_an_adapter_that_is_continued_keeps_its_tasks_and_adds_the_others(tmp_path, lambda_format):
    first = trained(lambda_format=lambda_format)
    first.save_pretrained(tmp_path / "first")
    fields = {**FIELDS, "init_seed": 9, "num_tasks": 4, "lambda_format": lambda_format}
    config = make_config("mtl_lora", **fields, continue_from=str(tmp_path / "first"))
    model = get_peft_model(make_tiny_llama(), config).eval()
    assert torch.equal(model(X, headwater_task_ids=[1, 0]).logits, first(X, headwater_task_ids=[1, 0]).logits)
    headwater.add_task(first)
    for task in (2, 3):
        torch.testing.assert_close(model(X, headwater_task_ids=task).logits, first(X, headwater_task_ids=2).logits)
    assert all(p.requires_grad for branch in branches(model).values() for p in branch.parameters())
    model.save_pretrained(tmp_path / "second")
    saved = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert (saved["num_tasks"], saved["continue_from"], len(saved["continued_sha256"])) == (4, None, 64)
    again = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "second")
    assert torch.equal(again(X, headwater_task_ids=[3, 0]).logits, model(X, headwater_task_ids=[3, 0]).logits)


def test_an_adapter_of_a_float64_base_is_continued_without_rounding(tmp_path):
    first = move(get_peft_model(make_tiny_llama().double(), make_config("mtl_lora", **FIELDS)).eval(), 1)
    first.save_pretrained(tmp_path)
    config = make_config("mtl_lora", **FIELDS, continue_from=str(tmp_path))
    model = get_peft_model(make_tiny_llama().double(), config).eval()
    assert torch.equal(model(X, headwater_task_ids=[1, 0]).logits, first(X, headwater_task_ids=[1, 0]).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tasks": 1}, "num_tasks: the continued adapter knows 2 tasks, this one 1"),
        ({"temperature": 0.2}, "continue_from: it has temperature 0.1, this one 0.2"),
        ({"lora_alpha": 1}, "continue_from: it has lora_alpha 16, this one 1"),
        ({"r": 4}, r"continue_from: no MTL-LoRA adapter of this layout: layer model\.layers\.0\.mlp\.up_proj needs"),
        ({"num_heads": 2}, "no MTL-LoRA adapter of this layout"),
        ({"lambda_format": "diag"}, "no MTL-LoRA adapter of this layout"),
        ({"target_modules": ["up_proj", "gate_proj"]}, r"layer model\.layers\.0\.mlp\.gate_proj needs .* it has none"),
        ({"target_modules": ["up_proj"]}, r"would be lost; the first is model\.layers\.0\.mlp\.down_proj"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_continue_an_adapter_is_refused(tmp_path, fields, message):
    trained().save_pretrained(tmp_path)
    config = make_config("mtl_lora", **{**FIELDS, **fields}, continue_from=str(tmp_path))
    with pytest.raises(HeadwaterError, match=message):
        get_peft_model(make_tiny_llama(), config)


def test_an_adapter_of_another_method_is_not_continued(tmp_path):
    shared = {key: value for key, value in FIELDS.items() if key != "num_tasks"}
    get_peft_model(make_tiny_llama(), make_config("hydralora", **shared)).save_pretrained(tmp_path)
    config = make_config("mtl_lora", **FIELDS, continue_from=str(tmp_path))
    with pytest.raises(HeadwaterError, match="it has peft_type 'HYDRALORA', this one 'MTL_LORA'") as refused:
        get_peft_model(make_tiny_llama(), config)
    assert len(refused.value.problems) == 1
