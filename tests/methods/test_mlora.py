"""M-LoRA's property, number 8 of the alignment paper's specification, part by part."""

from __future__ import annotations

import math

import plain_equations as plain
import pytest
import torch
from adapted_linear import adapt, as_mask, base_of, head_inputs, held, leaf, move, noise, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors import safe_open

from headwater import HeadwaterError, make_config, merge_with_gates

quick = settings(max_examples=25, deadline=None)
dropouts = st.sampled_from([0.0, 0.1, 0.5])
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@st.composite
def layers(draw, **fixed):
    """Arguments of `adapt`: sizes with `d_out >= N r`, so that the heads' columns are independent."""
    r, N = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return {
        "d_in": draw(st.integers(r, 7)),
        "d_out": N * r + draw(st.integers(1, 4)),
        "r": r,
        "num_heads": N,
        "lora_alpha": draw(st.sampled_from([1.0, 8.0, 32.0])),
        "use_rslora": draw(st.booleans()),
        "compensation": draw(st.sampled_from(["buffer", "center"])),
        "init": draw(st.sampled_from(["paper", "official_intended", "zeros"])),
        "gamma": draw(st.sampled_from([4.0, 64.0])),
        "head_agg": draw(st.sampled_from(["mean", "sum"])),
        "init_seed": draw(st.integers(0, 1000)),
        **fixed,
    }


def scaling(layer) -> float:
    return layer["lora_alpha"] / (math.sqrt(layer["r"]) if layer["use_rslora"] else layer["r"])


def start_of(layer, B):
    """The aggregated heads at the start."""
    return B.mean(0) if layer["head_agg"] == "mean" else B.sum(0)


@quick
@given(layer=layers(), p=dropouts, seed=st.integers(0, 1000))
def test_property_8_eval_starts_at_the_base_and_ends_as_one_matrix(layer, p, seed):
    model = adapt("mlora", **layer, head_dropout=p)
    base, x = base_of(model), noise(9, layer["d_in"], seed=seed)
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=1e-5)  # starts are drawn and centred in float32

    A0, B0 = held(model).A.detach().clone(), start_of(layer, held(model).B).detach().clone()
    move(model, seed)
    h = held(model)
    W = base.weight + scaling(layer) * start_of(layer, h.B) @ h.A
    if layer["compensation"] == "buffer" and layer["init"] != "zeros":
        torch.testing.assert_close(h.A0, A0)
        torch.testing.assert_close(h.B0, B0, rtol=1e-6, atol=1e-7)
        W = W - scaling(layer) * h.B0 @ h.A0
    else:
        assert h.A0 is None
        assert h.B0 is None
    assert h.router is None
    y = model(x)
    torch.testing.assert_close(y, x @ W.T + base.bias, **CLOSE)
    assert torch.equal(model(x), y)

    before = base.weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(base.weight, W, rtol=1e-5, atol=1e-5)  # merged in float32
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("agg", ["mean", "sum"])
def test_property_8_there_are_no_gates_to_merge_with_and_merging_is_exact(agg):
    model = move(adapt("mlora", 6, 9, r=2, num_heads=3, head_agg=agg), seed=1)
    x = noise(5, 6)
    y = model(x)
    with pytest.raises(HeadwaterError, match="M-LoRA has no gates to hold fixed"):
        merge_with_gates(model, "uniform")
    torch.testing.assert_close(model.merge_and_unload()(x), y, **CLOSE)


@quick
@given(layer=layers(), p=dropouts, lead=st.sampled_from([(4,), (2, 3), (2, 1, 3)]), seed=st.integers(0, 1000))
def test_property_8_equals_the_plain_loop_in_value_and_every_gradient(layer, p, lead, seed):
    model = move(adapt("mlora", **layer, head_dropout=p), seed).train()
    h, base, N = held(model), base_of(model), layer["num_heads"]
    x = leaf(noise(*lead, layer["d_in"], seed=seed))
    y = model(x)
    assert y.shape == (*lead, layer["d_out"])
    v = noise(*y.shape, seed=seed + 1)
    (y * v).sum().backward()

    flat, mean = leaf(x.flatten(0, -2)), layer["head_agg"] == "mean"
    W, b, s = base.weight.detach(), base.bias.detach(), scaling(layer)
    update = y.detach().flatten(0, -2) - flat @ W.T - b
    if h.A0 is not None:
        update = update + s * flat @ (h.B0 @ h.A0).T
    c = head_inputs(update, h.B, s / N if mean else s)
    masks = as_mask((c / (flat @ h.A.T).unsqueeze(1)).detach(), p)
    if p == 0.5 and masks.numel() > 40:
        assert 0 < torch.count_nonzero(masks) < masks.numel()

    A, B = leaf(h.A), leaf(h.B)
    expected = plain.mlora(flat, W, b, A, B, s, rank_masks=masks, mean=mean, A0=h.A0, B0=h.B0)
    (expected * v.flatten(0, -2)).sum().backward()
    got = {name: q.grad for name, q in parameters(model).items()}
    assert set(got) == {"A", "B"}
    torch.testing.assert_close(y.flatten(0, -2), expected, **CLOSE)
    torch.testing.assert_close(got["A"], A.grad, **CLOSE)
    torch.testing.assert_close(got["B"].transpose(1, 2), B.grad, **CLOSE)
    torch.testing.assert_close(x.grad.flatten(0, -2), flat.grad, **CLOSE)


@quick
@given(layer=layers(num_heads=3, d_out=13), seed=st.integers(0, 1000))
def test_property_8_heads_differ_in_gradient_only_through_their_masks(layer, seed):
    for p in (0.0, 0.5):
        model = move(adapt("mlora", **layer, head_dropout=p), seed).train()
        (model(noise(30, layer["d_in"], seed=seed)) * noise(30, 13, seed=seed + 1)).sum().backward()
        first, *others = parameters(model)["B"].grad
        for other in others:
            same = torch.allclose(first, other, rtol=1e-12, atol=1e-12)  # processors round rows by their place
            assert same == (p == 0)
        assert first.abs().max() > 0


@quick
@given(layer=layers(), p=dropouts, seed=st.integers(0, 1000))
def test_property_8_a_sum_is_a_mean_with_n_times_alpha(layer, p, seed):
    alpha, N = layer["lora_alpha"], layer["num_heads"]
    outputs, grads = [], []
    for agg, a in (("sum", alpha), ("mean", N * alpha)):
        fields = {**layer, "head_agg": agg, "lora_alpha": a}
        model = move(adapt("mlora", **fields, head_dropout=p), seed).train()
        torch.manual_seed(seed)  # the same masks
        outputs.append(model(noise(9, layer["d_in"], seed=seed)))
        outputs[-1].square().sum().backward()
        grads.append([q.grad for q in parameters(model).values()])
    # the sum's compensation is rounded to float32 after adding up, the mean's before
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@quick
@given(layer=layers(head_agg="mean", init="paper"), seed=st.integers(0, 1000))
def test_property_8_is_rlora_with_an_even_gate(layer, seed):
    shared = {key: value for key, value in layer.items() if key != "head_agg"}
    x = noise(9, layer["d_in"], seed=seed)
    outputs = []
    for model in (adapt("mlora", **layer), adapt("rlora", **shared, router_init="zeros")):
        with torch.no_grad():
            parameters(model)["B"].add_(noise(*parameters(model)["B"].shape, seed=seed))
        torch.manual_seed(seed)
        outputs.append(model.train()(x))
    torch.testing.assert_close(*outputs, **CLOSE)


def test_property_8_dropout_on_the_input_does_not_reach_the_compensation():
    model = move(adapt("mlora", 6, 9, r=2, num_heads=3, head_dropout=0.0, lora_dropout=0.5), seed=1)
    with torch.no_grad():
        parameters(model)["B"].zero_()  # the compensation is all that is left
    x = noise(30, 6)
    expected = model(x)
    assert (expected - base_of(model)(x)).abs().max() > 1e-2
    torch.testing.assert_close(model.train()(x), expected, **CLOSE)


def test_property_8_heads_have_no_order():
    model = move(adapt("mlora", 6, 9, r=2, num_heads=4), seed=1)
    x = noise(5, 6)
    y = model(x)
    with torch.no_grad():
        parameters(model)["B"].copy_(parameters(model)["B"][[2, 0, 3, 1]])
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("agg", ["mean", "sum"])
@pytest.mark.parametrize("N", [1, 3, 5])
def test_property_8_bfloat16_base_starts_within_one_ulp(agg, N):
    model = adapt("mlora", 256, 320, r=8, num_heads=N, head_agg=agg, dtype=torch.float32)
    base_of(model).to(torch.bfloat16)
    x = noise(64, 256, seed=N, dtype=torch.bfloat16)
    expected = base_of(model)(x).float()
    difference = (model(x).float() - expected).norm(dim=-1)
    assert model(x).dtype == torch.bfloat16
    assert torch.all(difference <= 2.0 ** (expected.norm(dim=-1).log2().floor() - 7))


@pytest.mark.parametrize("agg", ["mean", "sum"])
def test_property_8_saved_loaded_and_merged_gives_the_same_logits(tmp_path, tiny_llama, agg):
    targets = {"target_modules": ["gate_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = make_config("mlora", r=4, num_heads=3, lora_alpha=8, gamma=256, head_dropout=0.1, head_agg=agg, **targets)
    model = move(get_peft_model(tiny_llama(), config).eval(), seed=1, size=0.05)
    ids = torch.arange(40).view(2, 20)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(loaded(ids).logits, expected)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-5)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert {name.rsplit(".", 1)[-1] for name in file.keys()} == {"A", "B", "A0", "B0"}  # noqa: SIM118


def test_property_8_disabling_gives_the_base_exactly_and_modes_return_self():
    model = move(adapt("mlora", 6, 9, r=2), seed=4)
    layer, x = model.base_model.model.layer, noise(7, 6)
    expected = base_of(model)(x)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected)
    assert layer.train() is layer
    assert layer.eval() is layer
