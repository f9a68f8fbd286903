"""Derivatives of derivatives, and torch.func, of the plain operations; the fused ones have first derivatives only."""

from __future__ import annotations

import pytest
import torch

from .helpers import adapt, assert_near, gradients, layer_output, task_kwargs, tokens, train_loss
from .rows import BY_ID, ROWS

KEEPS_COUNT = ["hydralora-balance", "moe_lora", "smora", "taskprobe"]  # auxiliary losses, or counts that balance
PER_SAMPLE = [row for row in ROWS if not row.needs_task_ids and row.id not in KEEPS_COUNT]


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("HEADWATER_OPS", "reference")


def rows(chosen):
    return pytest.mark.parametrize("row", chosen, ids=[row.id for row in chosen])


def loss_of(row, model):
    def loss(parameters, x, ids):
        inputs = {"input_ids": x, "labels": x, **ids}
        return torch.func.functional_call(model, parameters, kwargs=inputs).loss

    return loss


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_second_derivatives_of_a_layer(row, tiny_llama):
    """Oracle: a difference of gradients, in float64; the rest of a model computes parts of it in float32."""
    fields = {**row.no_dropout, **row.smooth, **({"bias_update_rate": 0.0} if row.id == "smora" else {})}
    model = adapt(row, tiny_llama().double(), **fields).train()
    generator, name = torch.Generator().manual_seed(3), "model.layers.1.mlp.up_proj"
    x, weight = (torch.randn(2, 5, n, generator=generator, dtype=torch.float64) for n in (32, 48))
    parameters = [p for key, p in model.named_parameters() if p.requires_grad and name in key]
    way = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def slope(**kwargs):
        return torch.autograd.grad((layer_output(row, model, name, x) * weight).square().sum(), parameters, **kwargs)

    def moved(step):
        with torch.no_grad():
            for p, v in zip(parameters, way, strict=True):
                p += step * v
        return slope()

    second = torch.autograd.grad(slope(create_graph=True), parameters, way)
    behind, ahead = moved(-1e-6), moved(2e-6)
    expected = [(a - b) / 2e-6 for a, b in zip(ahead, behind, strict=True)]
    assert any(e.norm() > 0.1 for e in expected)
    for found, e in zip(second, expected, strict=True):
        assert (found - e).norm() <= 1e-3 * e.norm() + 1e-6


@rows([row for row in ROWS if row.id not in KEEPS_COUNT])
def test_torch_func_grad(row, tiny_llama):
    model = adapt(row, tiny_llama(), **row.no_dropout).train()
    x, ids = tokens(), task_kwargs(row)
    found = torch.func.grad(loss_of(row, model))(trained(model), x, ids)
    train_loss(row, model).backward()
    assert_near({name: g for name, g in found.items() if name in gradients(model)}, gradients(model))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@rows(PER_SAMPLE)
def test_gradients_per_sample(row, tiny_llama):
    model = adapt(row, tiny_llama(), **row.no_dropout).train()
    x = tokens(3)
    each = torch.func.vmap(torch.func.grad(loss_of(row, model)), in_dims=(None, 0, None))(
        trained(model), x[:, None], {}
    )
    for n in range(3):
        model.zero_grad()
        model(input_ids=x[n : n + 1], labels=x[n : n + 1]).loss.backward()
        assert_near(
            {name: g[n] for name, g in each.items() if name in gradients(model)}, gradients(model), relative=1e-3
        )


def test_in_eval_mode_the_balancing_ones_too(tiny_llama):
    for row_id in KEEPS_COUNT:
        row = BY_ID[row_id]
        model = adapt(row, tiny_llama())
        found = torch.func.grad(loss_of(row, model))(trained(model), tokens(), task_kwargs(row))
        train_loss(row, model).backward()
        assert_near({name: g for name, g in found.items() if name in gradients(model)}, gradients(model))
