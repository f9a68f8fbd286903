"""MultiLoRA's properties, and its equation read plainly: one token and one branch at a time."""

from __future__ import annotations

import pytest
import torch
from adapted_linear import adapt, base_of, leaf, move, noise, parameters

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
N, r, d_in, d_out = 3, 2, 5, 6


def model_of(**fields):
    return adapt("multilora", d_in, d_out, **{"num_heads": N, "r": r, "lora_alpha": 3, "lora_dropout": 0.0, **fields})


@pytest.mark.parametrize("scale_shape", ["vector", "scalar"])
def test_fused_is_the_equation_values_and_gradients(scale_shape):
    model, x, weight = move(model_of(scale_shape=scale_shape), 1), noise(4, d_in), noise(4, d_out, seed=1)
    own = {name: leaf(p) for name, p in parameters(model).items()}
    x_fused, x_plain = leaf(x), leaf(x)
    fused = model(x_fused)
    rows = []
    for token in x_plain:
        y = base_of(model)(token)
        for k in range(N):
            y = y + 3 / r * own["c"][k] * (own["B"][k].T @ (own["A"][k] @ token))
        rows.append(y)
    expected = torch.stack(rows)
    torch.testing.assert_close(fused, expected, **CLOSE)
    (fused * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x_fused.grad, x_plain.grad, **CLOSE)
    for name, p in parameters(model).items():
        torch.testing.assert_close(p.grad, own[name].grad, **CLOSE)


def test_property_1_starts_at_the_base_in_train_and_eval():
    model, x = model_of(lora_dropout=0.3), noise(4, d_in)
    assert torch.equal(model(x), base_of(model)(x))
    assert torch.equal(model.train()(x), base_of(model)(x))


def test_property_2_at_first_only_the_scales_have_a_gradient():
    model, x = model_of(), noise(8, d_in)
    optimizer = torch.optim.SGD(parameters(model).values(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (model(x) - noise(8, d_out, seed=2)).square().sum().backward()
        assert parameters(model)["c"].grad.any()
        assert parameters(model)["A"].grad.any() == parameters(model)["B"].grad.any() == bool(step)
        optimizer.step()


def test_property_3_branches_start_apart_and_uniform_within_bounds():
    p = parameters(adapt("multilora", 2048, 600, num_heads=N, r=16, dtype=torch.float32))
    for name, fan_in in (("A", 2048), ("B", 16)):
        assert p[name].abs().max() <= fan_in**-0.5
        assert p[name].std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.03)
        assert not torch.equal(p[name][0], p[name][1])
    assert not p["c"].any()


def test_properties_4_and_7_merging_is_exact_and_can_be_undone():
    model, x = move(model_of(), 3), noise(4, d_in)
    before, expected = base_of(model).weight.detach().clone(), model(x).detach()
    model.train().eval()
    assert torch.equal(base_of(model).weight, before)
    model.base_model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.base_model.unmerge_adapter()
    assert torch.equal(base_of(model).weight, before)


def test_property_5_order_of_branches_and_scalar_scales():
    model, x = move(model_of(), 4), noise(4, d_in)
    expected = model(x).detach()
    with torch.no_grad():
        for p in parameters(model).values():
            p.copy_(p[[2, 0, 1]])
    torch.testing.assert_close(model(x), expected, **CLOSE)
    scalar = move(model_of(scale_shape="scalar"), 4)
    with torch.no_grad():
        for name, p in parameters(model).items():
            p.copy_(parameters(scalar)[name].expand_as(p))
    torch.testing.assert_close(model(x), scalar(x), **CLOSE)


def test_property_6_one_branch_with_scale_one_is_lora():
    model, x = move(model_of(num_heads=1), 5), noise(4, d_in)
    with torch.no_grad():
        parameters(model)["c"].fill_(1)
    A, B = (parameters(model)[name][0] for name in ("A", "B"))
    torch.testing.assert_close(model(x), base_of(model)(x) + 3 / r * (x @ A.T @ B), **CLOSE)


@pytest.mark.parametrize(("scale_shape", "scales"), [("vector", N * d_out), ("scalar", N)])
def test_property_8_count(scale_shape, scales):
    counted = sum(p.numel() for p in parameters(model_of(scale_shape=scale_shape)).values())
    assert counted == N * r * (d_in + d_out) + scales
