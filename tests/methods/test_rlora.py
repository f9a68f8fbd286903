"""R-LoRA's properties, numbered as in its specification; initialisation (3) is in `test_multi_head_init.py`."""

from __future__ import annotations

import math

import plain_equations as plain
import pytest
import torch
from adapted_linear import OneLinear, adapt, as_mask, base_of, head_inputs, held, leaf, move, noise, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

from headwater import HeadwaterError, NotMergeable, make_config, merge_with_gates, observe
from headwater.analysis import heads

quick = settings(max_examples=25, deadline=None)
compensations = st.sampled_from(["buffer", "center"])
dropouts = st.sampled_from([0.0, 0.1, 0.5])
inits = st.sampled_from(["paper", "official_intended", "official_as_run", "zeros"])


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
        "compensation": draw(compensations),
        "gamma": draw(st.sampled_from([4.0, 64.0])),
        "init_seed": draw(st.integers(0, 1000)),
        **fixed,
    }


def masks_of_this_pass(model, x, y, p):
    """The rank masks `(tokens, N, r)` that the code drew for y, read off y."""
    h, base = held(model), base_of(model)
    start = 0 if h.A0 is None else h.scaling * x @ (h.B0 @ h.A0).T
    c = head_inputs(y - base(x) + start, h.B, h.scaling)
    gate = torch.stack([torch.stack(plain.softmax_gate(h.router, x_t)) for x_t in x])
    return as_mask((c / (gate.unsqueeze(-1) * (x @ h.A.T).unsqueeze(1))).detach(), p)


@quick
@given(layer=layers(), init=inits, p=dropouts, seed=st.integers(0, 1000))
def test_property_1_eval_starts_at_the_base_and_leaves_its_weight_alone(layer, init, p, seed):
    if init == "zeros" and layer["num_heads"] > 1:
        layer["router_init"] = "kaiming"  # zero heads: any router leaves the start unchanged
    base = OneLinear(layer["d_in"], layer["d_out"], 0)
    weight_before = base.layer.weight.clone()
    x = noise(9, layer["d_in"], seed=seed, dtype=torch.float32)
    expected = base(x)
    model = adapt("rlora", **layer, init=init, head_dropout=p, dtype=torch.float32)
    assert (model(x) - expected).abs().max() <= 1e-5
    assert torch.equal(base_of(model).weight, weight_before)


@pytest.mark.parametrize("compensation", ["buffer", "center"])
@pytest.mark.parametrize("N", [1, 3, 5])
def test_property_1_bfloat16_base_starts_within_one_ulp(compensation, N):
    fields = {"r": 8, "num_heads": N, "lora_alpha": 32, "compensation": compensation, "init_seed": N}
    base = OneLinear(256, 320, 0).to(torch.bfloat16)
    x = noise(64, 256, seed=N, dtype=torch.bfloat16)
    expected = base(x).float()
    model = get_peft_model(base, make_config("rlora", target_modules=["layer"], **fields)).eval()
    assert {p.dtype for p in parameters(model).values()} == {torch.float32}
    full = adapt("rlora", 256, 320, **fields, dtype=torch.float32)  # the base's precision must not round the start
    assert torch.equal(held(model).A, held(full).A)
    difference = (model(x).float() - expected).norm(dim=-1)
    ulp = 2.0 ** (expected.norm(dim=-1).log2().floor() - 7)  # bfloat16 keeps 8 significant bits
    assert torch.all(difference <= ulp)


@quick
@given(layer=layers(), init=inits, seed=st.integers(0, 1000))
def test_property_2_both_compensations_start_alike_behind_any_router(layer, init, seed):
    layer |= {"router_init": "kaiming", "init": init}
    buffer = adapt("rlora", **{**layer, "compensation": "buffer"})
    center = adapt("rlora", **{**layer, "compensation": "center"})
    x = noise(9, layer["d_in"], seed=seed)
    h = held(buffer)
    size = h.scaling * (x.abs() @ h.A.abs().T @ h.B.abs().sum(0).T).max()  # no entry of an update is larger
    assert (buffer(x) - center(x)).abs().max() <= 1e-6 * size  # weights are float32
    assert held(center).A0 is None
    assert held(center).B0 is None


@pytest.mark.parametrize("compensation", ["buffer", "center"])
def test_property_2_an_uneven_gate_does_not_start_at_the_base(compensation):
    model = adapt("rlora", 64, 80, r=4, num_heads=5, lora_alpha=32, compensation=compensation, router_init="kaiming")
    x = noise(50, 64)
    expected = base_of(model)(x)
    assert (model(x) - expected).norm() > 0.05 * expected.norm()
    with torch.no_grad():
        parameters(model)["router"].fill_(0.3)  # equal rows: an even gate again
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


def test_property_2_centred_heads_give_the_shared_projection_no_first_gradient_and_buffers_do():
    sizes = {}
    for compensation in ("buffer", "center"):
        model = adapt("rlora", 8, 12, r=2, num_heads=3, head_dropout=0.0, compensation=compensation)
        (model(noise(20, 8)) * noise(20, 12, seed=1)).sum().backward()
        grads = {name: p.grad.abs().max().item() for name, p in parameters(model).items()}
        assert grads["router"] > 1e-3  # random heads break the symmetry behind a zero router
        sizes[compensation] = grads["A"]
    assert sizes["center"] < 1e-6 < 1e-2 < sizes["buffer"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compensation", ["buffer", "center"])
def test_property_4_saved_and_loaded_onto_a_fresh_base_gives_the_same_logits(tmp_path, tiny_llama, compensation, dtype):
    fields = {"r": 4, "num_heads": 3, "lora_alpha": 32, "head_dropout": 0.2, "gamma": 256.0, "router_init": "kaiming"}
    config = make_config(
        "rlora", **fields, compensation=compensation, target_modules=["gate_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    assert config.use_rslora
    model = move(get_peft_model(tiny_llama().to(dtype), config).eval(), seed=1, size=0.05)
    ids = torch.arange(40).view(2, 20)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_llama().to(dtype), tmp_path)
    assert (loaded(ids).logits - expected).abs().max() <= 1e-6
    assert (expected - tiny_llama().to(dtype)(ids).logits).abs().max() > 1e-3
    scalings = {h.scaling for h in heads(loaded).values()}
    assert scalings == {32 / math.sqrt(4)}

    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    kinds = {"A", "B", "router"} | ({"A0", "B0"} if compensation == "buffer" else set())
    assert {name.rsplit(".", 1)[-1] for name in names} == kinds
    assert len(names) == 2 * 2 * len(kinds)  # two layers, two modules each, and nothing of the base


def test_property_5_equal_heads_get_masks_of_their_own_and_their_mean_is_the_eval_output():
    N, r, p, tokens = 2, 3, 0.3, 5_000
    model = move(adapt("rlora", 6, 10, r=r, num_heads=N, head_dropout=p), seed=1)
    x = noise(1, 6).expand(tokens, 6)
    y = model.train()(x)
    masks = masks_of_this_pass(model, x, y, p)
    kept = masks != 0
    # chance agreement of two independent masks is p^2 + (1-p)^2 = .58, between heads, ranks and tokens alike
    for first, second in ((kept[:, 0], kept[:, 1]), (kept[:, :, 0], kept[:, :, 1]), (kept[1:], kept[:-1])):
        assert (first == second).double().mean() == pytest.approx(0.58, abs=0.02)
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.01)

    with torch.no_grad():
        parameters(model)["B"][1] = parameters(model)["B"][0]
    y = model(x)
    expected = model.eval()(x)
    error = (y.mean(0) - expected[0]).abs()
    assert torch.all(error <= 5 * y.std(0) / tokens**0.5)
    assert torch.all(y.std(0) > 0.01)


@quick
@given(layer=layers(), p=dropouts, seed=st.integers(0, 1000))
def test_property_5_eval_is_deterministic_and_without_dropout_so_is_training(layer, p, seed):
    model = move(adapt("rlora", **layer, head_dropout=p), seed)
    x = noise(9, layer["d_in"], seed=seed)
    evaluated = model(x)
    assert torch.equal(model(x), evaluated)
    if p == 0:
        assert torch.equal(model.train()(x), evaluated)


@quick
@given(layer=layers(), p=dropouts, lead=st.sampled_from([(4,), (2, 3), (2, 1, 3)]), seed=st.integers(0, 1000))
def test_property_6_equals_the_plain_loop_in_value_and_every_gradient(layer, p, lead, seed):
    model = move(adapt("rlora", **layer, head_dropout=p, router_init="kaiming"), seed).train()
    h, base = held(model), base_of(model)
    x = leaf(noise(*lead, layer["d_in"], seed=seed))
    y = model(x)
    assert y.shape == (*lead, layer["d_out"])
    v = noise(*y.shape, seed=seed + 1)
    (y * v).sum().backward()

    flat = leaf(x.flatten(0, -2))
    masks = masks_of_this_pass(model, flat, y.detach().flatten(0, -2), p)
    A, B, R = leaf(h.A), leaf(h.B), leaf(h.router)
    A0, B0 = (None, None) if h.A0 is None else (h.A0.double(), h.B0.double())
    s = layer["lora_alpha"] / (math.sqrt(layer["r"]) if layer["use_rslora"] else layer["r"])
    expected = plain.rlora(flat, base.weight.detach(), base.bias.detach(), A, B, R, s, rank_masks=masks, A0=A0, B0=B0)
    (expected * v.flatten(0, -2)).sum().backward()

    got = {name: p.grad for name, p in parameters(model).items()}
    assert set(got) == {"A", "B", "router"}
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(y.flatten(0, -2), expected, **close)
    torch.testing.assert_close(got["A"], A.grad, **close)
    torch.testing.assert_close(got["B"].transpose(1, 2), B.grad, **close)
    torch.testing.assert_close(got["router"], R.grad, **close)
    torch.testing.assert_close(x.grad.flatten(0, -2), flat.grad, **close)


def test_property_6_dropout_on_the_input_reaches_neither_the_gate_nor_the_compensation():
    model = move(adapt("rlora", 3, 9, r=3, num_heads=2, head_dropout=0.0, lora_dropout=0.4), seed=2).train()
    h, base, x = held(model), base_of(model), noise(30, 3)
    y = model(x)
    gate = torch.stack([torch.stack(plain.softmax_gate(h.router, x_t)) for x_t in x])
    c = head_inputs(y - base(x) + h.scaling * x @ (h.B0 @ h.A0).T, h.B, h.scaling) / gate.unsqueeze(-1)
    torch.testing.assert_close(c[:, 0], c[:, 1])
    mask = as_mask((torch.linalg.solve(h.A, c[:, 0].T).T / x).detach(), 0.4)
    assert 0 < (mask == 0).double().mean() < 1


@pytest.mark.parametrize("lead", [(), (0,), (6,), (2, 3), (1, 3, 2), (2, 0)])
def test_property_6_any_leading_shape(lead):
    model = move(adapt("rlora", 5, 8, r=2), seed=3)
    x = noise(6, 5)[: math.prod(lead)].reshape(*lead, 5)
    torch.testing.assert_close(model(x).reshape(-1, 8), model(x.reshape(-1, 5)))
    assert model(x).shape == (*lead, 8)


@quick
@given(layer=layers(), seed=st.integers(0, 1000), lead=st.sampled_from([(5,), (2, 3), (2, 1, 3)]))
def test_property_7_gates_add_up_to_one_and_heads_have_no_order(layer, seed, lead):
    model = move(adapt("rlora", **layer), seed)
    x = noise(*lead, layer["d_in"], seed=seed)
    seen = []
    with observe(model, lambda name, gate: seen.append((name, gate))):
        y = model(x)
    ((name, gate),) = seen
    assert (name, gate.shape, gate.dtype) == ("layer", (*lead, layer["num_heads"]), torch.float32)
    torch.testing.assert_close(gate.sum(-1), torch.ones(lead), rtol=0, atol=1e-6)

    order = torch.randperm(layer["num_heads"], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for p in (parameters(model)["B"], parameters(model)["router"]):
            p.copy_(p[order])
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


@quick
@given(layer=layers(num_heads=1, d_out=8), seed=st.integers(0, 1000))
def test_property_7_one_head_is_lora_with_its_start_taken_out(layer, seed):
    model = move(adapt("rlora", **layer), seed)
    h, base, x = held(model), base_of(model), noise(9, layer["d_in"], seed=seed)

    lora = get_peft_model(
        OneLinear(layer["d_in"], 8, 0),
        LoraConfig(
            r=layer["r"], lora_alpha=layer["lora_alpha"], use_rslora=layer["use_rslora"], target_modules=["layer"]
        ),
    )
    lora = lora.double().eval()
    with torch.no_grad():
        lora.base_model.model.layer.lora_A["default"].weight.copy_(h.A)
        lora.base_model.model.layer.lora_B["default"].weight.copy_(h.B[0])
    expected = lora(x)
    if layer["compensation"] == "buffer":
        expected = expected - h.scaling * x @ h.A0.T @ h.B0.T
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)

    before = base.weight.clone()
    y = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)  # the merged matrix is summed in float32
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("compensation", ["buffer", "center"])
def test_property_8_disabling_gives_the_base_exactly_and_modes_return_self(compensation):
    model = move(adapt("rlora", 6, 9, r=2, compensation=compensation), seed=4)
    layer, x = model.base_model.model.layer, noise(7, 6)
    expected = base_of(model)(x)
    assert not torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected)
    assert layer.train() is layer
    assert layer.eval() is layer


@pytest.mark.parametrize("compensation", ["buffer", "center"])
def test_property_8_gradients_reach_only_heads_projection_and_router(compensation):
    model = adapt("rlora", 6, 9, r=2, compensation=compensation, router_init="kaiming").train()
    model(noise(7, 6)).square().sum().backward()
    assert {name for name, p in parameters(model).items() if p.grad.abs().sum() > 0} == {"A", "B", "router"}
    assert all(p.grad is None for p in base_of(model).parameters())
    h = held(model)
    for frozen in (h.A0, h.B0):
        assert frozen is None or not frozen.requires_grad


@pytest.mark.parametrize("compensation", ["buffer", "center"])
def test_property_8_merging_is_refused_unless_gates_are_named(compensation):
    model = move(adapt("rlora", 6, 9, r=2, num_heads=3, compensation=compensation), seed=5)
    before = base_of(model).weight.clone()
    for refused in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotMergeable, match="merge_with_gates"):
            refused()
    assert torch.equal(base_of(model).weight, before)

    gate = torch.tensor([0.5, 0.3, 0.2])
    h, x = held(model), noise(7, 6)
    expected = base_of(model)(x) + sum(h.scaling * gate[n] * x @ h.A.T @ h.B[n].T for n in range(3))
    if h.A0 is not None:
        expected = expected - h.scaling * x @ h.A0.T @ h.B0.T
    merged = merge_with_gates(model, {"layer": gate})
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", [torch.ones(1), torch.ones(2), torch.ones(3, 1), torch.ones(())])
def test_property_8_a_fixed_gate_of_the_wrong_shape_is_refused(gate):
    model = move(adapt("rlora", 6, 9, r=2, num_heads=3), seed=5)
    before = base_of(model).weight.clone()
    with pytest.raises(HeadwaterError, match="one number per head"):
        merge_with_gates(model, {"layer": gate})
    assert torch.equal(base_of(model).weight, before)
