"""HydraLoRA's properties, numbered as in its specification.

The converter of released checkpoints, property 7, has tests of its own in tests/cli/test_importing.py.
"""

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
from transformers import LlamaConfig, LlamaForCausalLM

from headwater import HeadwaterError, NotMergeable, make_config, merge_with_gates, observe
from headwater.analysis import heads
from headwater.methods.call import Call, Packed, State
from headwater.methods.hydralora import balance_loss
from headwater.ops import draw_seed, drop
from headwater.tuner import context_of

quick = settings(max_examples=25, deadline=None)
placements = st.sampled_from(["shared", "per_head"])
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
        "input_dropout": draw(placements),
        "init_seed": draw(st.integers(0, 1000)),
        **fixed,
    }


def scaling(layer) -> float:
    return layer["lora_alpha"] / (math.sqrt(layer["r"]) if layer["use_rslora"] else layer["r"])


def masks_of_this_pass(model, x, y, p):
    """The input masks `(tokens, N, d_in)` that the code drew for y, read off y. Needs r == d_in."""
    h, base = held(model), base_of(model)
    c = head_inputs(y - base(x), h.B, h.scaling)
    gate = torch.stack([torch.stack(plain.softmax_gate(h.router, x_t)) for x_t in x])
    dropped = torch.linalg.solve(h.A, (c / gate.unsqueeze(-1)).mT).mT
    return as_mask((dropped / x.unsqueeze(1)).detach(), p)


@quick
@given(layer=layers(), p=dropouts, seed=st.integers(0, 1000))
def test_property_1_starts_exactly_at_the_base_in_training_too(layer, p, seed):
    model = adapt("hydralora", **layer, lora_dropout=p, dtype=torch.float32)
    x = noise(9, layer["d_in"], seed=seed, dtype=torch.float32)
    with torch.no_grad():
        parameters(model)["router"].mul_(100)
    for mode in (True, False):
        assert torch.equal(model.train(mode)(x), base_of(model)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_property_1_starts_as_the_paper_says(dtype):
    model = get_peft_model(
        OneLinear(2048, 96).to(dtype), make_config("hydralora", target_modules=["layer"], r=24, num_heads=8)
    )
    h = held(model)
    assert torch.count_nonzero(h.B) == 0
    for uniform in (h.A, h.router):  # U(-1/sqrt(d_in), 1/sqrt(d_in))
        assert uniform.dtype == torch.float32
        assert uniform.abs().max() <= 2048**-0.5
        assert uniform.std().item() == pytest.approx((3 * 2048) ** -0.5, rel=0.03)
    x = noise(9, 2048, dtype=dtype)
    assert torch.equal(model(x), base_of(model)(x))


@quick
@given(layer=layers(), seed=st.integers(0, 1000), even=st.booleans())
def test_property_2_first_gradients_reach_the_heads_only(layer, seed, even):
    model = adapt("hydralora", **layer, lora_dropout=0.0).train()
    if even:
        with torch.no_grad():
            parameters(model)["router"].zero_()
    h, x = held(model), noise(9, layer["d_in"], seed=seed)
    delta = noise(9, layer["d_out"], seed=seed + 1)  # the loss's gradient at y
    (model(x) * delta).sum().backward()

    got = {name: p.grad for name, p in parameters(model).items()}
    assert torch.count_nonzero(got["A"]) == 0
    assert torch.count_nonzero(got["router"]) == 0
    for n in range(layer["num_heads"]):
        expected = torch.zeros(layer["d_out"], layer["r"], dtype=torch.float64)
        for t in range(9):
            g = plain.softmax_gate(h.router, x[t])
            expected += scaling(layer) * g[n] * torch.outer(delta[t], h.A @ x[t])
        torch.testing.assert_close(got["B"][n].T, expected.detach(), **CLOSE)
        assert expected.abs().max() > 0
    if even:
        torch.testing.assert_close(got["B"], got["B"][:1].expand_as(got["B"]), **CLOSE)


class OurDropout(torch.nn.Module):
    """PEFT's dropout with the mask that ours draws next."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        flat = x.flatten(0, -2)
        return drop(flat, draw_seed(x.device, 2)[:1], self.p).view_as(x) if self.training else x


@quick
@given(layer=layers(num_heads=1), p=dropouts, train=st.booleans(), lead=st.sampled_from([(6,), (2, 3), (2, 1, 3)]))
def test_property_3_one_head_is_pefts_lora(layer, p, train, lead):
    model = move(adapt("hydralora", **layer, lora_dropout=p), seed=1)
    config = LoraConfig(
        r=layer["r"],
        lora_alpha=layer["lora_alpha"],
        use_rslora=layer["use_rslora"],
        lora_dropout=p,
        target_modules=["layer"],
    )
    lora = get_peft_model(OneLinear(layer["d_in"], layer["d_out"]), config).double()
    with torch.no_grad():
        lora.base_model.model.layer.lora_A["default"].weight.copy_(held(model).A)
        lora.base_model.model.layer.lora_B["default"].weight.copy_(held(model).B[0])
        if p:
            lora.base_model.model.layer.lora_dropout["default"] = OurDropout(p)
    x = noise(*lead, layer["d_in"])
    outputs = []
    for either in (model, lora):
        torch.manual_seed(5)  # the same mask on x
        outputs.append(either.train(train)(x))
    torch.testing.assert_close(*outputs, **CLOSE)

    (outputs[0].square().sum() + outputs[1].square().sum()).backward()
    theirs = {name.rsplit(".", 3)[-3]: q.grad for name, q in lora.named_parameters() if q.requires_grad}
    torch.testing.assert_close(parameters(model)["A"].grad, theirs["lora_A"], **CLOSE)
    torch.testing.assert_close(parameters(model)["B"].grad[0].T, theirs["lora_B"], **CLOSE)
    assert torch.count_nonzero(parameters(model)["router"].grad) == 0

    y, base = model.eval()(x), base_of(model)
    before = base.weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)  # the merged matrix is summed in float32
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)


@quick
@given(layer=layers(), p=dropouts, lead=st.sampled_from([(4,), (2, 3), (2, 1, 3)]), seed=st.integers(0, 1000))
def test_property_4_equals_the_plain_loop_in_value_and_every_gradient(layer, p, lead, seed):
    if p:  # masks on x can be read off the output when A is square
        layer["d_in"] = layer["r"]
    model = move(adapt("hydralora", **layer, lora_dropout=p), seed).train()
    h, base = held(model), base_of(model)
    x = leaf(noise(*lead, layer["d_in"], seed=seed))
    y = model(x)
    assert y.shape == (*lead, layer["d_out"])
    v = noise(*y.shape, seed=seed + 1)
    (y * v).sum().backward()

    flat = leaf(x.flatten(0, -2))
    masks = torch.ones(flat.shape[0], layer["num_heads"], layer["d_in"], dtype=torch.float64)
    if p:
        masks = masks_of_this_pass(model, flat, y.detach().flatten(0, -2), p)
    A, B, R = leaf(h.A), leaf(h.B), leaf(h.router)
    W, b = base.weight.detach(), base.bias.detach()
    expected = plain.hydralora(flat, W, b, A, B, R, scaling(layer), input_masks=masks)
    (expected * v.flatten(0, -2)).sum().backward()

    got = {name: q.grad for name, q in parameters(model).items()}
    assert set(got) == {"A", "B", "router"}
    torch.testing.assert_close(y.flatten(0, -2), expected, **CLOSE)
    torch.testing.assert_close(got["A"], A.grad, **CLOSE)
    torch.testing.assert_close(got["B"].transpose(1, 2), B.grad, **CLOSE)
    torch.testing.assert_close(got["router"], R.grad, **CLOSE)
    torch.testing.assert_close(x.grad.flatten(0, -2), flat.grad, **CLOSE)


@pytest.mark.parametrize("placement", ["shared", "per_head"])
def test_property_4_masks_are_of_the_kind_asked_for(placement):
    p, x = 0.3, noise(2000, 3)
    fields = {"r": 3, "num_heads": 2, "input_dropout": placement, "lora_dropout": p}
    model = move(adapt("hydralora", 3, 9, **fields), seed=1).train()
    kept = masks_of_this_pass(model, x, model(x), p) != 0
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.03)
    agreement = (kept[:, 0] == kept[:, 1]).double().mean().item()
    # independent masks agree by chance with probability p^2 + (1-p)^2
    assert agreement == (1 if placement == "shared" else pytest.approx(0.58, abs=0.03))
    assert (kept[1:] == kept[:-1]).double().mean().item() == pytest.approx(0.58, abs=0.03)


@quick
@given(layer=layers(), seed=st.integers(0, 1000), train=st.booleans())
def test_property_4_without_dropout_the_two_placements_are_one(layer, seed, train):
    x = noise(9, layer["d_in"], seed=seed)
    shared, per_head = (
        move(adapt("hydralora", **{**layer, "input_dropout": how}, lora_dropout=0.0), seed).train(train)
        for how in ("shared", "per_head")
    )
    assert torch.equal(shared(x), per_head(x))


@quick
@given(layer=layers(), seed=st.integers(0, 1000), lead=st.sampled_from([(5,), (2, 3), (2, 1, 3)]))
def test_property_5_gates_add_up_to_one_and_only_differences_between_heads_count(layer, seed, lead):
    model = move(adapt("hydralora", **layer), seed)
    x = noise(*lead, layer["d_in"], seed=seed)
    seen = []
    with observe(model, lambda name, gate: seen.append((name, gate))):
        y = model(x)
    ((name, gate),) = seen
    assert (name, gate.shape, gate.dtype) == ("layer", (*lead, layer["num_heads"]), torch.float32)
    torch.testing.assert_close(gate.sum(-1), torch.ones(lead), rtol=0, atol=1e-6)

    order = torch.randperm(layer["num_heads"], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for q in (parameters(model)["B"], parameters(model)["router"]):
            q.copy_(q[order])
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
        parameters(model)["router"].add_(noise(layer["d_in"], seed=seed + 1))  # the same row onto every row
        torch.testing.assert_close(model(x), y, rtol=1e-11, atol=1e-11)


@quick
@given(layer=layers(), seed=st.integers(0, 1000))
def test_property_6_an_even_gate_is_the_mean_head_as_one_matrix(layer, seed):
    model = move(adapt("hydralora", **layer), seed)
    with torch.no_grad():
        parameters(model)["router"].zero_()
    h, x, base = held(model), noise(9, layer["d_in"], seed=seed), base_of(model)
    W = base.weight + scaling(layer) * h.B.mean(0) @ h.A
    y = model(x)
    torch.testing.assert_close(y, x @ W.T + base.bias, **CLOSE)
    merged = merge_with_gates(model, "uniform")
    torch.testing.assert_close(merged(x), y, rtol=1e-5, atol=1e-5)


def count(method: str, base_config: LlamaConfig, **fields) -> int:
    with torch.device("meta"):
        base = LlamaForCausalLM(base_config)
    return get_peft_model(base, make_config(method, **fields)).get_nb_trainable_parameters()[0]


def test_property_7_trainable_count_is_the_formula():
    # Two of LLaMA-2-7B's 32 layers: the published 8.39 M (N=3) and 23.1 M (N=10) leave the router out.
    llama = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, vocab_size=8)
    for N, published in ((3, 8.39e6), (10, 23.1e6)):
        counted = count("hydralora", llama, r=8, num_heads=N, target_modules=["q_proj", "v_proj"])
        assert counted == 2 * 2 * (8 * 4096 + N * 8 * 4096 + N * 4096)
        assert 16 * (counted - 2 * 2 * N * 4096) == pytest.approx(published, rel=2e-3)
    mlp = count("hydralora", llama, r=4, num_heads=3, target_modules=["up_proj", "down_proj"], lora_dropout=0.0)
    assert mlp == 2 * sum(4 * i + 3 * 4 * o + 3 * i for i, o in ((4096, 11008), (11008, 4096)))


def test_property_7_saved_and_loaded_gives_the_same_bits(tmp_path, tiny_llama):
    targets = {"target_modules": ["q_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = make_config("hydralora", r=4, num_heads=3, lora_alpha=32, lora_dropout=0.3, use_rslora=True, **targets)
    model = move(get_peft_model(tiny_llama(), config).eval(), seed=1, size=0.05)
    ids = torch.arange(40).view(2, 20)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(loaded(ids).logits, expected)
    assert not torch.equal(expected, tiny_llama()(ids).logits)
    for name, h in heads(loaded).items():
        assert h.scaling == 32 / math.sqrt(4)
        for kind in ("A", "B", "router"):
            assert torch.equal(getattr(h, kind), getattr(heads(model)[name], kind))
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert len(names) == 2 * 3 * 3
    assert {name.rsplit(".", 1)[-1] for name in names} == {"A", "B", "router"}


def test_property_8_merging_is_refused_and_switching_off_gives_the_base():
    model = move(adapt("hydralora", 6, 9, r=2, num_heads=3), seed=5)
    layer, x, base = model.base_model.model.layer, noise(7, 6), base_of(model)
    before, expected = base.weight.clone(), base(x)
    for refused in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotMergeable, match="merge_with_gates"):
            refused()
    assert torch.equal(base.weight, before)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected)
    assert layer.train() is layer
    assert layer.eval() is layer

    gate, h = torch.tensor([0.5, 0.3, 0.2]), held(model)
    fixed = expected + sum(h.scaling * gate[n] * x @ h.A.T @ h.B[n].T for n in range(3))
    torch.testing.assert_close(merge_with_gates(model, {"layer": gate})(x), fixed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", [torch.ones(1), torch.ones(2), torch.ones(3, 1), torch.ones(())])
def test_property_8_a_fixed_gate_of_the_wrong_shape_is_refused(gate):
    model = move(adapt("hydralora", 6, 9, r=2, num_heads=3), seed=5)
    before = base_of(model).weight.clone()
    with pytest.raises(HeadwaterError, match="one number per head"):
        merge_with_gates(model, {"layer": gate})
    assert torch.equal(base_of(model).weight, before)


@pytest.mark.parametrize("padded", [False, True])
def test_the_balance_loss_is_added_to_the_gradient_and_logged(padded):
    """`sum_n mean(g_n) mean(choice_n)` of each row, choice the one-hot argmax without a gradient; padding does not
    count. The mean over rows."""
    weight, lengths = 0.7, (5, 2 if padded else 5)
    model = move(adapt("hydralora", 4, 9, r=2, num_heads=3, lora_dropout=0.0, balance_loss_weight=weight), seed=3)
    x, v = noise(2, 5, 4), noise(2, 5, 9, seed=1)
    mask = torch.tensor([[1] * length + [0] * (5 - length) for length in lengths]) if padded else None
    h, R = held(model), leaf(held(model).router)
    (model.train()(x, attention_mask=mask) * v).sum().backward()

    loss = 0.0
    for row, length in enumerate(lengths):
        gates = [torch.stack(plain.softmax_gate(R, x[row, t])) for t in range(length)]
        chosen = [int(g.argmax()) for g in gates]
        loss = loss + sum(sum(g[n] for g in gates) / length * chosen.count(n) / length for n in range(3)) / 2
    no_masks = torch.ones(10, 3, 4, dtype=torch.float64)
    base = base_of(model)
    W, b, A, B = base.weight.detach(), base.bias.detach(), h.A.detach(), h.B.detach()
    y = plain.hydralora(x.flatten(0, 1), W, b, A, B, R, h.scaling, input_masks=no_masks)
    ((y * v.flatten(0, 1)).sum() + weight * loss).backward()
    torch.testing.assert_close(parameters(model)["router"].grad, R.grad, **CLOSE)
    torch.testing.assert_close(context_of(model).last_losses["balance"], loss.detach(), **CLOSE)

    model.zero_grad()
    (model.eval()(x, attention_mask=mask) * v).sum().backward()
    assert (parameters(model)["router"].grad - R.grad).abs().max() > 1e-4  # no such loss in evaluation
    assert not context_of(model).last_losses


def test_the_balance_loss_is_of_each_row_where_rows_are_seen():
    """Two rows, each all on a head of its own: neither is balanced, though all tokens together are."""
    gate = torch.eye(2, dtype=torch.float64).repeat_interleave(3, 0)  # three tokens on head 0, three on head 1

    def loss(gate, shape, **state):
        return balance_loss(gate, Call("layer", shape, State(**state))).item()

    assert loss(gate, (2, 3), batch=2, length=3) == 1
    assert loss(gate, (6,), batch=2, length=3) == 1  # flattened on the way
    assert loss(gate[1:], (1, 5), batch=2, length=3, packed=Packed((2, 3))) == 1
    valid = torch.tensor([[True] * 3, [False] * 3])
    assert loss(gate, (2, 3), batch=2, length=3, valid=valid) == 1  # a row of padding alone is no row
    assert loss(gate[1:5], (4,), batch=2, length=3) == 0.5  # behind a token dispatch: all tokens as one
    assert loss(gate, (6,)) == 0.5
    assert balance_loss(gate, Call("layer", (6,))).item() == 0.5
