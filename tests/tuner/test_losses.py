"""Auxiliary losses: added to the training loss whoever computes it, each token counted once, logged once."""

from __future__ import annotations

import pytest
import torch

from headwater.tuner import MethodLayer, context_of

from .helpers import LAYERS, adapt, assert_near, assert_same, gradients
from .penalised import PENALTY, batch, explicit_penalty, make, train_one_step
from .rows import BY_ID


@pytest.fixture
def expected(tiny_llama):
    """Gradients when the loss is added explicitly."""
    model = make(tiny_llama, penalty=0.0)
    loss, penalty, _ = explicit_penalty(model, batch())
    (loss + PENALTY * penalty).backward()
    with_penalty = gradients(model)
    model.zero_grad()
    model(**batch()).loss.backward()
    name = "base_model.model.model.layers.0.mlp.up_proj.taskprobe_branch.default.A"
    assert (with_penalty[name] - gradients(model)[name]).norm() > 0.1 * with_penalty[name].norm(), "no visible loss"
    return with_penalty


@pytest.mark.parametrize("mode", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_gradient_equals_adding_the_loss(tiny_llama, expected, mode):
    model = make(tiny_llama)
    if mode is not None:
        model.gradient_checkpointing_enable({"use_reentrant": mode})
        model.enable_input_require_grads()
    model(**batch()).loss.backward()
    assert_near(gradients(model), expected)


def test_a_loss_computed_elsewhere_gets_it_as_well(tiny_llama, expected):
    """As trainers do that never look at `outputs.loss`."""
    model, data = make(tiny_llama), batch()
    labels = data.pop("labels")
    out = model(**data)
    assert out.loss is None
    torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    ).backward()
    assert_near(gradients(model), expected)


@pytest.mark.parametrize("mode", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_several_forwards_then_one_backward(tiny_llama, mode):
    model = make(tiny_llama, penalty=0.0)
    for seed in range(2):
        loss, penalty, _ = explicit_penalty(model, batch(seed))
        (loss + PENALTY * penalty).backward()
    expected = gradients(model)
    model = make(tiny_llama)
    if mode is not None:
        model.gradient_checkpointing_enable({"use_reentrant": mode})
        model.enable_input_require_grads()
    sum(model(**batch(seed)).loss for seed in range(2)).backward()
    assert_near(gradients(model), expected)


def test_padding_adds_nothing(tiny_llama, expected):
    model = make(tiny_llama)
    wider = {"input_ids": 258, "attention_mask": 0, "labels": -100}
    data = {
        name: torch.nn.functional.pad(t, (0, 5), value=wider[name]) if name in wider else t
        for name, t in batch().items()
    }
    model(**data).loss.backward()
    assert_near(gradients(model), expected)


@pytest.mark.parametrize("mode", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_it_is_logged_by_name_once(tiny_llama, mode):
    model, data = make(tiny_llama), batch()
    with torch.no_grad():
        _, _, per_layer = explicit_penalty(model, data)
    if mode is not None:
        model.gradient_checkpointing_enable({"use_reentrant": mode})
        model.enable_input_require_grads()
    context, states = context_of(model), []
    model.get_base_model().register_forward_pre_hook(lambda m, args: states.append(context.state))
    loss = model(**data).loss
    after_forward = dict(context.last_losses)
    assert after_forward.keys() == {"penalty"}
    torch.testing.assert_close(after_forward["penalty"], torch.stack(per_layer).mean())
    assert not after_forward["penalty"].requires_grad
    loss.backward()
    assert context.last_losses == after_forward
    assert states[0].losses["penalty"][1] == len(LAYERS), "counted again when recomputed"


def test_no_loss_outside_training(tiny_llama):
    model = make(tiny_llama).eval()
    model(**batch()).loss.backward()
    plain = make(tiny_llama, penalty=0.0).eval()
    plain(**batch()).loss.backward()
    assert_same(gradients(model), gradients(plain))
    assert context_of(model).last_losses == {}


def test_nothing_is_computed_in_vain_without_gradient(tiny_llama):
    model = make(tiny_llama)
    with torch.no_grad():
        model(**batch())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "accumulation", "arguments"),
    [(2, 4, {}), (1, 8, {}), (4, 2, {"gradient_checkpointing": True})],
    ids=["4 of 2", "8 of 1", "checkpointing"],
)
def test_plain_trainer_with_accumulation_equals_one_big_batch(tiny_llama, tmp_path, size, accumulation, arguments):
    """Plain `Trainer` gives each forward the number of learned tokens of the whole step. Oracle: the explicit loss."""
    model = make(tiny_llama, penalty=0.0)
    both = {name: torch.cat([batch(0)[name], batch(1)[name]]) for name in batch()}
    loss, penalty, _ = explicit_penalty(model, both)
    (loss + PENALTY * penalty).backward()
    found = train_one_step(tiny_llama, tmp_path, size=size, accumulation=accumulation, **arguments)
    assert_near(found, gradients(model), relative=1e-3)


def test_balance_loss_of_hydralora_is_its_formula(tiny_llama):
    """Oracle: sum_n mean(g_n) mean(one-hot argmax g)_n over tokens that are not padding, gradients through g only; the
    mean over layers."""
    row = BY_ID["hydralora-balance"]
    data = {name: t for name, t in batch().items() if name != "headwater_task_ids"}
    weight = row.fields["balance_loss_weight"]

    def make_model(balance):
        return adapt(row, tiny_llama(), **row.no_dropout, balance_loss_weight=balance).train()

    model, inputs = make_model(0.0), {}
    for layer in model.modules():
        if isinstance(layer, MethodLayer):
            layer.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0]))
    loss = model(**data).loss
    for layer, x in inputs.items():
        gate = torch.softmax(x[data["attention_mask"].bool()] @ layer.branches["default"].router.T, dim=-1)
        chosen = torch.nn.functional.one_hot(gate.argmax(-1), gate.shape[-1]).float()
        loss = loss + weight / len(LAYERS) * (gate.mean(0) * chosen.mean(0)).sum()
    loss.backward()
    with_loss = make_model(weight)
    with_loss(**data).loss.backward()
    assert_near(gradients(with_loss), gradients(model))
    assert context_of(with_loss).last_losses.keys() == {"balance"}
