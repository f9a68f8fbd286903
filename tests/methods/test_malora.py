"""MALoRA's properties, numbered as in its specification, against loops over tokens and experts."""

from __future__ import annotations

import warnings

import plain_equations as plain
import pytest
import torch
from adapted_linear import adapt, base_of, held, leaf, move, noise, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from stock_trainer import train
from test_moe_lora import CLOSE, plain_balance, plain_gate

from headwater import HeadwaterError, NotMergeable, make_config, merge_with_gates
from headwater.methods.base import LayerShape
from headwater.tuner import context_of

quick = settings(max_examples=25, deadline=None)
d_in, d_out, d = 7, 6, 4


def model_of(num_experts=4, top_k=2, **fields):
    given = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "num_experts": num_experts, "top_k": top_k, "shared_rank": d}
    return adapt("malora", fields.pop("d_in", d_in), fields.pop("d_out", d_out), **{**given, **fields})


def plain_layer(x, base, S, P, B, R, k, s):
    """x `(tokens, d_in)`, S `(d, d_in)`, P `(N, r, d)`, B `(N, r, d_out)`, R `(N, d_in)`."""
    rows = []
    for token in x:
        gate, y = plain_gate(plain.softmax_gate(R, token), k), base(token)
        for n in range(P.shape[0]):
            y = y + s * gate[n] * (B[n].T @ (P[n] @ (S @ token)))
        rows.append(y)
    return torch.stack(rows)


@quick
@given(N=st.integers(1, 5), k=st.integers(0, 5), rslora=st.booleans(), lead=st.sampled_from([(6,), (2, 3), (2, 1, 3)]))
def test_property_2_concatenated_is_the_loop_in_value_and_every_gradient(N, k, rslora, lead):
    k = min(k, N)
    model = move(model_of(N, k, use_rslora=rslora), 1)
    names = ("S", "P", "B", "router")
    own = [leaf(parameters(model)[name]) for name in names]
    x, weight = noise(*lead, d_in), noise(*lead, d_out, seed=1)
    x_fused, x_plain = leaf(x), leaf(x.flatten(0, -2))
    expected = plain_layer(x_plain, base_of(model), *own, k, 5 / (3**0.5 if rslora else 3))
    found = model(x_fused)
    torch.testing.assert_close(found.flatten(0, -2), expected, **CLOSE)
    (found * weight).sum().backward()
    (expected * weight.flatten(0, -2)).sum().backward()
    torch.testing.assert_close(x_fused.grad.flatten(0, -2), x_plain.grad, **CLOSE)
    for name, tensor in zip(names, own, strict=True):
        torch.testing.assert_close(parameters(model)[name].grad, tensor.grad, **CLOSE)


@pytest.mark.parametrize("init", ["orthogonal", "svd", "kaiming"])
def test_property_1_starts_at_the_base(init):
    model, x = model_of(init=init, lora_dropout=0.5), noise(2, 7, d_in)
    assert torch.equal(model.train()(x), base_of(model)(x))


def as_moe_lora(model, A):
    """MoE-LoRA with the given A_n and everything else of the MALoRA model."""
    twin = adapt("moe_lora", d_in, d_out, r=3, lora_alpha=5, lora_dropout=0.0, num_experts=4, top_k=2)
    with torch.no_grad():
        for name, value in (("A", A), ("B", parameters(model)["B"]), ("router", parameters(model)["router"])):
            parameters(twin)[name].copy_(value)
    return twin


def test_property_3_equals_moe_lora_with_the_product_as_down_projections():
    model, x = move(model_of(), 2), noise(9, d_in)
    A = parameters(model)["P"] @ parameters(model)["S"]
    torch.testing.assert_close(model(x), as_moe_lora(model, A)(x), **CLOSE)
    assert torch.equal(held(model).A.view(4, 3, d_in), A)


def test_property_4_the_whole_space_as_subspace_is_moe_lora():
    model, x = move(model_of(shared_rank=d_in), 3), noise(9, d_in)
    with torch.no_grad():
        parameters(model)["S"].copy_(torch.eye(d_in))
    torch.testing.assert_close(model(x), as_moe_lora(model, parameters(model)["P"])(x), **CLOSE)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_property_5_equal_experts_are_one_lora(k):
    model, x = move(model_of(top_k=k), 4), noise(9, d_in)
    with torch.no_grad():
        for name in ("P", "B"):
            p = parameters(model)[name]
            p.copy_(p[:1].clone().expand_as(p))
    S, P, B = (parameters(model)[name] for name in ("S", "P", "B"))
    torch.testing.assert_close(model(x), base_of(model)(x) + 5 / 3 * x @ (P[0] @ S).T @ B[0], **CLOSE)


def test_property_6_updates_stay_in_the_shared_subspace():
    """Four experts of rank 3 and d = 4: any mixture has rank 4, with rows in the span of S."""
    model = move(model_of(), 5)
    delta = base_of(model).weight.clone()
    merge = model.base_model.model.layer.branches["default"].delta_weight(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert torch.linalg.matrix_rank(merge, rtol=1e-10) == d
    S = parameters(model)["S"]
    outside = merge - merge @ torch.linalg.pinv(S) @ S
    assert outside.abs().max() < 1e-12
    assert torch.equal(base_of(model).weight, delta)
    one = model.base_model.model.layer.branches["default"].delta_weight(torch.tensor([1.0, 0, 0, 0]))
    assert torch.linalg.matrix_rank(one, rtol=1e-10) == 3


def test_property_7_unchosen_experts_get_no_gradient_and_the_shared_matrix_always_does():
    for seed in range(5):
        model, x = move(model_of(top_k=1), seed), noise(1, d_in, seed=seed)
        model(x).sum().backward()
        chosen = int((x @ parameters(model)["router"].T).argmax())
        for n in range(4):
            for name in ("P", "B"):
                assert bool(parameters(model)[name].grad[n].any()) == (n == chosen)
        assert parameters(model)["S"].grad.abs().min() > 0
        assert parameters(model)["router"].grad.any()  # top-1 gates are always 1, and yet the router learns


def start(init, **fields):
    given = {"num_experts": 8, "r": 8, "shared_rank": 16, "init": init, "dtype": torch.float32}
    return parameters(model_of(d_in=1024, d_out=16, **{**given, **fields}))


@pytest.mark.parametrize(("init", "factor"), [("orthogonal", 1.0), ("kaiming", 3**-0.5), ("svd", None)])
def test_property_8_size_of_the_starting_down_projections(init, factor):
    """Against a Kaiming-uniform A, whose entries deviate by 1 / sqrt(3 d_in)."""
    p = start(init)
    size = (p["P"] @ p["S"]).std().item() * (3 * 1024) ** 0.5
    assert size == pytest.approx(factor, rel=0.05) if factor else 0.4 < size < 0.7
    if init != "kaiming":
        torch.testing.assert_close(p["S"] @ p["S"].T, torch.eye(16), rtol=0, atol=1e-5)
    assert torch.count_nonzero(p["B"]) == 0
    assert p["router"].abs().max() <= 1024**-0.5
    assert p["router"].std().item() == pytest.approx((3 * 1024) ** -0.5, rel=0.03)


def test_property_8_svd_keeps_a_kaiming_start_where_it_fits():
    """With d = N r nothing is cut off, so each P_n S is uniform with a Kaiming-uniform A's bound and deviation."""
    p = start("svd", num_experts=2, top_k=1, r=8, shared_rank=16)
    A = p["P"] @ p["S"]
    assert A.abs().max() <= 1024**-0.5 * 1.0001
    assert A.std().item() == pytest.approx((3 * 1024) ** -0.5, rel=0.05)


def test_no_dimension_of_the_subspace_is_dead_from_the_start():
    """One expert of rank 8 in a subspace of 16: the SVD has 8 vectors, and the other 8 must be able to learn."""
    model = model_of(num_experts=1, top_k=1, r=8, shared_rank=16, init="svd", d_in=32, d_out=16)
    with torch.no_grad():
        parameters(model)["B"].normal_(generator=torch.Generator().manual_seed(0))
    model(noise(40, 32)).square().sum().backward()
    assert parameters(model)["P"].grad.abs().amax((0, 1)).min() > 0


def test_parameter_count_and_default_subspace():
    p = parameters(adapt("malora", 64, d_out, r=4))
    assert sum(t.numel() for t in p.values()) == 8 * 64 + 8 * 4 * 8 + 8 * 4 * d_out + 8 * 64
    assert p["S"].shape == (8, 64)


def test_balance_loss_reaches_the_router():
    model, x = move(model_of(balance_loss="mixtral", balance_loss_weight=0.7), 6).train(), noise(2, 5, d_in)
    model(x, attention_mask=torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])).sum().mul(0).backward()
    R = leaf(parameters(model)["router"])
    loss = plain_balance("mixtral", R, [*x[0], *x[1, :2]], 2)
    (0.7 * loss).backward()
    torch.testing.assert_close(context_of(model).last_losses["balance"], loss.detach(), **CLOSE)
    torch.testing.assert_close(parameters(model)["router"].grad, R.grad, **CLOSE)


def test_merging_only_with_fixed_gates_of_the_right_shape():
    model, x, gate = move(model_of(), 7), noise(7, d_in), torch.tensor([0.5, 0.3, 0.2, 0.0])
    S, P, B = (parameters(model)[name] for name in ("S", "P", "B"))
    expected = base_of(model)(x) + sum(5 / 3 * gate[n] * x @ (P[n] @ S).T @ B[n] for n in range(4))
    with pytest.raises(NotMergeable, match="merge_with_gates"):
        model.merge_and_unload()
    with pytest.raises(HeadwaterError, match="one number per head"):
        merge_with_gates(model, {"layer": torch.ones(1)})
    torch.testing.assert_close(merge_with_gates(model, {"layer": gate})(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"top_k": 1, "init": "svd"}])
def test_plain_trainer_lowers_the_loss_and_moves_every_tensor(tiny_llama, tmp_path, fields):
    _, losses, still = train(tiny_llama(), tmp_path, "malora", r=2, num_experts=4, **fields)
    assert sum(losses[-4:]) / 4 < losses[0] - 0.2
    assert not still


@pytest.mark.parametrize(
    ("fields", "where"),
    [({"shared_rank": -1}, "shared_rank"), ({"init": "x"}, "init"), ({"top_k": 9}, "top_k")],
)
def test_a_bad_value_is_one_problem_that_names_its_field(fields, where):
    with pytest.raises(HeadwaterError) as refused:
        make_config("malora", **fields)
    assert [problem.where for problem in refused.value.problems] == [where]


def test_a_subspace_smaller_than_the_rank_is_warned_about():
    with pytest.warns(UserWarning, match="layer: shared_rank 3 is below r 4: no expert can use more than 3"):
        model_of(r=4, shared_rank=3)


def test_a_rank_pattern_that_exceeds_the_subspace_is_warned_about_once(tiny_llama, recwarn):
    fields = {"r": 2, "shared_rank": 3, "target_modules": ["up_proj", "down_proj"], "init_seed": 0}
    model = get_peft_model(tiny_llama(), make_config("malora", **fields, rank_pattern={"down_proj": 4}))
    said = [str(w.message) for w in recwarn if "no expert can use" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("model.layers.0.mlp.down_proj: shared_rank 3 is below r 4")
    recwarn.clear()
    config = model.peft_config["default"]
    config.inference_mode = True
    get_peft_model(tiny_llama(), config)
    assert not [w for w in recwarn if "no expert can use" in str(w.message)], "loaded, it is too late to choose"


def trained(d_in, d_out, N, r, d):
    """Numbers that experts and subspace train, the router aside."""
    return d * d_in + N * r * d + N * r * d_out


@quick
@given(
    saving=st.floats(0.05, 0.9), N=st.integers(1, 6), r=st.integers(1, 6), shared=st.integers(0, 9),
    sizes=st.tuples(st.integers(6, 40), st.integers(6, 40)),
)  # fmt: skip
def test_a_budget_gives_each_layer_the_largest_rank_that_it_allows(saving, N, r, shared, sizes):
    d_in, d_out = sizes
    d = min(shared or 2 * r, d_in)
    most = (1 - saving) * N * r * (d_in + d_out)
    fits = [rank for rank in range(1, 2 * r * (d_in + d_out)) if trained(d_in, d_out, N, rank, d) <= most + 1e-6]
    fields = {"r": r, "num_experts": N, "top_k": 1, "shared_rank": shared, "budget_saving": saving, "lora_alpha": 6}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not fits:
            with pytest.raises(HeadwaterError, match="leaves no rank"):
                model_of(d_in=d_in, d_out=d_out, **fields)
            return
        model = model_of(d_in=d_in, d_out=d_out, **fields)
        by_r = model_of(d_in=d_in, d_out=d_out, scale_by="r", **fields)
    found = parameters(model)
    assert found["B"].shape == (N, max(fits), d_out)
    assert sum(found[name].numel() for name in ("S", "P", "B")) <= most + 1e-6
    assert held(model).scaling == pytest.approx(6 / max(fits))
    assert held(by_r).scaling == pytest.approx(6 / r)


def test_the_specifications_example_of_a_budget():
    """Llama-2-7B, 8 experts of rank 8 on all linear layers: d = 16 and rank 12 train 6.8 % less than MoE-LoRA."""
    sizes = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    whole, ours = sum(8 * 8 * (i + o) for i, o in sizes), sum(trained(i, o, 8, 12, 16) for i, o in sizes)
    assert 1 - ours / whole == pytest.approx(0.068, abs=5e-4)
    config = make_config("malora", budget_saving=1 - ours / whole)
    ranks = [config.ranks(LayerShape("x", i, o, 8, 16)) for i, o in sizes]
    assert {d for d, _ in ranks} == {16}
    assert min(rank for _, rank in ranks) <= 12 <= max(rank for _, rank in ranks)


def test_ranks_of_single_layers():
    narrow = make_config("malora", r=4)  # d = 2 r = 8
    assert narrow.ranks(LayerShape("x", 7, 9, 4, 16)) == (7, 4)
    assert make_config("malora", r=4, shared_rank=9).ranks(LayerShape("x", 7, 9, 4, 16)) == (7, 4)
    # (0.7 * 3 * 8 * (48 + 32) - 16 * 48) / (3 * (16 + 32)) is 4, and 3.9999999999999982 in floating point.
    exact = make_config("malora", r=8, num_experts=3, budget_saving=0.3)
    assert exact.ranks(LayerShape("x", 48, 32, 8, 16)) == (16, 4)


def test_a_budget_beyond_the_subspace_is_warned_about():
    with pytest.warns(UserWarning, match="shared_rank 1 is below r 5"):
        model_of(r=4, shared_rank=1, budget_saving=0.2, num_experts=4)
