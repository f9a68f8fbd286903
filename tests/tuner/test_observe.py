"""`headwater.observe`: every gate of every adapted layer, once, in the layer's leading shape."""

from __future__ import annotations

import pytest
import torch

import headwater

from .helpers import LAYERS, adapt, logits, task_kwargs, tokens, train_loss
from .rows import BY_ID, ROWS

ROUTED = [row for row in ROWS if row.gated]


@pytest.fixture(params=ROUTED, ids=[row.id for row in ROUTED])
def row(request):
    return request.param


def test_each_layer_shows_its_gate_once_per_forward(row, tiny_llama):
    model = adapt(row, tiny_llama())
    expected, seen = logits(row, model), {}
    with headwater.observe(model, lambda name, gate: seen.setdefault(name, []).append(gate)):
        found = logits(row, model)
        assert {name: len(gates) for name, gates in seen.items()} == dict.fromkeys(LAYERS, 1)
        logits(row, model, tokens(rows=3, length=4))
    logits(row, model)
    assert torch.equal(found, expected), "looking changed the output"
    for first, second in seen.values():
        assert (first.shape[:2], second.shape[:2]) == ((2, 7), (3, 4))
        assert first.dtype == torch.float32
        assert not first.requires_grad


@pytest.mark.parametrize("row_id", ["rlora", "rlora-center-kaiming", "hydralora"])
def test_softmax_gates_are_those_of_the_router(row_id, tiny_llama):
    """Oracle: softmax of the router on what went into the layer."""
    model, inputs, seen = adapt(BY_ID[row_id], tiny_llama()), {}, {}
    for name in LAYERS:
        layer = model.get_submodule(f"base_model.model.{name}")
        layer.register_forward_pre_hook(lambda module, args, name=name: inputs.__setitem__(name, args[0]))
    with headwater.observe(model, seen.__setitem__):
        logits(BY_ID[row_id], model)
    for name in LAYERS:
        router = model.get_submodule(f"base_model.model.{name}").branches["default"].router
        expected = torch.softmax(inputs[name] @ router.T, dim=-1)
        torch.testing.assert_close(seen[name], expected.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(seen[name].sum(-1), torch.ones(2, 7))


def test_task_gates_are_those_of_the_rows_tasks(tiny_llama):
    model, seen = adapt(BY_ID["taskprobe"], tiny_llama()), {}
    with headwater.observe(model, seen.__setitem__), torch.no_grad():
        model(input_ids=tokens(rows=3), headwater_task_ids=torch.tensor([2, 0, 2]))
    for name, gate in seen.items():
        table = model.get_submodule(f"base_model.model.{name}").branches["default"].table
        assert torch.equal(gate, table[[2, 0, 2]].unsqueeze(1).expand(-1, 7, -1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_not_observed_again(row, tiny_llama, reentrant):
    model, names = adapt(row, tiny_llama()).train(), []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with headwater.observe(model, lambda name, gate: names.append(name)):
        train_loss(row, model).backward()
    assert sorted(names) == sorted(LAYERS)


def test_nested_observers_and_errors(row, tiny_llama):
    model, outer, inner = adapt(row, tiny_llama()), [], []
    with headwater.observe(model, lambda name, gate: outer.append(name)):
        with pytest.raises(ZeroDivisionError), headwater.observe(model, lambda name, gate: 1 / 0):
            logits(row, model)
        outer.clear()
        with headwater.observe(model, lambda name, gate: inner.append(name)):
            logits(row, model)
    logits(row, model)
    assert outer == inner == list(LAYERS)


def test_disabled_adapters_show_nothing(row, tiny_llama):
    model, names = adapt(row, tiny_llama()), []
    with headwater.observe(model, lambda name, gate: names.append(name)), model.disable_adapter():
        logits(row, model)
    assert names == []


def test_cached_generation_shows_one_position_a_step(row, tiny_llama):
    model, lengths = adapt(row, tiny_llama()), []
    with headwater.observe(model, lambda name, gate: lengths.append(gate.shape[:2]) if "0.mlp.up" in name else None):
        model.generate(
            input_ids=tokens(),
            max_new_tokens=3,
            min_new_tokens=3,
            pad_token_id=258,
            do_sample=False,
            **task_kwargs(row),
        )
    assert lengths == [(2, 7), (2, 1), (2, 1)]
