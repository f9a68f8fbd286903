"""MoE-LoRA's properties, numbered as in its specification, against loops over tokens and experts."""

from __future__ import annotations

import copy

import plain_equations as plain
import pytest
import torch
from adapted_linear import adapt, base_of, held, leaf, move, noise, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from stock_trainer import train

from headwater import HeadwaterError, NotMergeable, make_config, merge_task, merge_with_gates, observe
from headwater.analysis import heads
from headwater.tuner import context_of, needs_task_ids

quick = settings(max_examples=25, deadline=None)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
d_in, d_out = 5, 6


def model_of(num_experts=4, top_k=2, **fields):
    given = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.0, "num_experts": num_experts, "top_k": top_k, **fields}
    return adapt("moe_lora", d_in, d_out, **given)


def plain_gate(p: list, k: int) -> list:
    """The k largest of p over their sum, zeros elsewhere; with k = 1 the sum has no gradient."""
    if k == 0:
        return p
    chosen = sorted(range(len(p)), key=lambda n: -float(p[n].detach()))[:k]
    total = sum(p[n] for n in chosen)
    return [p[n] / (total.detach() if k == 1 else total) if n in chosen else 0 * p[n] for n in range(len(p))]


def plain_layer(x, base, A, B, gates, s):
    """x `(tokens, d_in)`, A `(N, r, d_in)`, B `(N, r, d_out)`, gates: a list of N per token."""
    rows = []
    for t in range(x.shape[0]):
        y = base(x[t])
        for n in range(A.shape[0]):
            y = y + s * gates[t][n] * (B[n].T @ (A[n] @ x[t]))
        rows.append(y)
    return torch.stack(rows)


@quick
@given(N=st.integers(1, 5), k=st.integers(0, 5), rslora=st.booleans(), lead=st.sampled_from([(6,), (2, 3), (2, 1, 3)]))
def test_property_2_concatenated_is_the_loop_in_value_and_every_gradient(N, k, rslora, lead):
    k = min(k, N)
    model = move(model_of(N, k, use_rslora=rslora), 1)
    A, B, R = (leaf(parameters(model)[name]) for name in ("A", "B", "router"))
    x, weight = noise(*lead, d_in), noise(*lead, d_out, seed=1)
    x_fused, x_plain = leaf(x), leaf(x.flatten(0, -2))
    gates = [plain_gate(plain.softmax_gate(R, token), k) for token in x_plain]
    expected = plain_layer(x_plain, base_of(model), A, B, gates, 3 / (2**0.5 if rslora else 2))
    found = model(x_fused)
    torch.testing.assert_close(found.flatten(0, -2), expected, **CLOSE)
    (found * weight).sum().backward()
    (expected * weight.flatten(0, -2)).sum().backward()
    torch.testing.assert_close(x_fused.grad.flatten(0, -2), x_plain.grad, **CLOSE)
    for name, own in (("A", A), ("B", B), ("router", R)):
        torch.testing.assert_close(parameters(model)[name].grad, own.grad, **CLOSE)


@pytest.mark.parametrize("k", [0, 1, 2, 4])
def test_property_1_starts_at_the_base_and_gates_are_k_shares(k):
    model, seen = model_of(top_k=k), []
    x = noise(2, 7, d_in)
    with observe(model, lambda name, gate: seen.append(gate)):
        assert torch.equal(model.train()(x), base_of(model)(x))
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 7))
    assert torch.all((seen[0] > 0).sum(-1) == (k or 4))


@pytest.mark.parametrize("same", ["one expert", "equal experts"])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_properties_3_and_4_one_expert_and_equal_experts_are_one_lora(same, k):
    N = 1 if same == "one expert" else 4
    model = move(model_of(N, min(k, N)), 2)
    with torch.no_grad():
        for name in ("A", "B"):
            parameters(model)[name].copy_(parameters(model)[name][:1].clone().expand(N, -1, -1))
    A, B = parameters(model)["A"][0], parameters(model)["B"][0]
    x = noise(9, d_in)
    torch.testing.assert_close(model(x), base_of(model)(x) + 3 / 2 * x @ A.T @ B, **CLOSE)


@pytest.mark.parametrize("k", [0, 2])
def test_property_5_the_order_of_experts_does_not_matter(k):
    model, x = move(model_of(top_k=k), 3), noise(9, d_in)
    expected, order = model(x), [2, 0, 3, 1]
    with torch.no_grad():
        for p in parameters(model).values():
            p.copy_(p[order].clone())
    torch.testing.assert_close(model(x), expected, **CLOSE)


def plain_balance(kind, R, tokens, k):
    """The loss over a list of tokens; counts are whole numbers without a gradient."""
    N, T = R.shape[0], len(tokens)
    p = [plain.softmax_gate(R, token) for token in tokens]
    order = [sorted(range(N), key=lambda n, row=row: -float(row[n].detach())) for row in p]
    loss = 0.0
    for n in range(N):
        mean_p = sum(row[n] for row in p) / T
        if kind == "switch":
            loss = loss + sum(o[0] == n for o in order) / T * mean_p
        else:
            slots = sum(n in o[:k] for o in order) / T
            loss = loss + (slots if kind == "mixtral" else slots / k) * mean_p
    return N * loss


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "mola", "switch"])
def test_property_6_balance_losses_and_where_their_gradient_goes(kind, padded):
    model = move(model_of(balance_loss=kind, balance_loss_weight=0.7), 4).train()
    x, mask = noise(2, 5, d_in), torch.ones(2, 5, dtype=torch.long)
    if padded:
        mask[1, 2:] = 0
    model(x, attention_mask=mask).sum().mul(0).backward()  # nothing but the auxiliary loss is left
    R = leaf(parameters(model)["router"])
    loss = plain_balance(kind, R, [x[b, t] for b in range(2) for t in range(5) if mask[b, t]], 2)
    (0.7 * loss).backward()
    torch.testing.assert_close(context_of(model).last_losses["balance"], loss.detach(), **CLOSE)
    torch.testing.assert_close(parameters(model)["router"].grad, R.grad, **CLOSE)
    assert R.grad.abs().max() > 1e-4
    assert not parameters(model)["A"].grad.any()
    model.eval()(x)
    assert not context_of(model).last_losses


@pytest.mark.parametrize(("kind", "even", "collapsed"), [("mixtral", 2, 4), ("mola", 1, 2), ("switch", 1, 2)])
def test_property_6_values_at_balance_and_at_collapse(kind, even, collapsed):
    """Four experts, top-2: tokens that use each pair equally, and tokens that all use the first pair, half each."""
    model = model_of(balance_loss=kind).train()
    x = torch.zeros(1, 4, d_in, dtype=torch.float64)
    x[0, range(4), range(4)] = 1
    with torch.no_grad():
        R = parameters(model)["router"].zero_()
        R[:, :4] = 1e-6 * torch.tensor([[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 2, 1], [1, 0, 0, 2]])
    model(x)
    assert context_of(model).last_losses["balance"].item() == pytest.approx(even, abs=1e-4)
    with torch.no_grad():
        R[:, :4] = torch.tensor([[60, 60 - 1e-6] * 2, [60 - 1e-6, 60] * 2, [0] * 4, [0] * 4])
    model(x)
    assert context_of(model).last_losses["balance"].item() == pytest.approx(collapsed, abs=1e-4)


def test_property_6_with_one_choice_a_token_mixtral_and_mola_agree():
    """Every slot is then a token's first choice, which is also all that Switch counts."""
    x, found = noise(2, 7, d_in), {}
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    for kind in ("mixtral", "mola", "switch"):
        model = move(model_of(top_k=1, balance_loss=kind, balance_loss_weight=0.7), 4).train()
        model(x, attention_mask=mask).sum().mul(0).backward()
        found[kind] = context_of(model).last_losses["balance"], parameters(model)["router"].grad
    R = leaf(parameters(model)["router"])
    loss = plain_balance("mola", R, [*x[0], *x[1, :4]], 1)
    (0.7 * loss).backward()
    for value, grad in found.values():
        torch.testing.assert_close(value, loss.detach(), **CLOSE)
        torch.testing.assert_close(grad, R.grad, **CLOSE)
    assert R.grad.abs().max() > 1e-4


def test_router_z_loss():
    model = move(model_of(z_loss_weight=0.3), 5).train()
    x = noise(2, 4, d_in)
    model(x, attention_mask=torch.tensor([[1] * 4, [1, 1, 0, 0]])).sum().mul(0).backward()
    R = leaf(parameters(model)["router"])
    tokens = [*x[0], *x[1, :2]]
    loss = sum(torch.log(sum(torch.exp(R[n] @ t) for n in range(4))) ** 2 for t in tokens) / 6
    (0.3 * loss).backward()
    torch.testing.assert_close(context_of(model).last_losses["router_z"], loss.detach(), **CLOSE)
    torch.testing.assert_close(parameters(model)["router"].grad, R.grad, **CLOSE)


def test_localized_balance_is_loramoes_formula():
    model = move(model_of(top_k=0, balance_loss="localized", balance_loss_weight=0.5, task_types=[1, 0, 0]), 6).train()
    x, mask, tasks = noise(3, 3, d_in), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]), [2, 0, 1]
    model(x, attention_mask=mask, headwater_task_ids=tasks).sum().mul(0).backward()
    R, entries = leaf(parameters(model)["router"]), []
    for b, task in enumerate(tasks):
        kind = [1, 0, 0][task]
        for n in range(4):
            own = (n < 2) == (kind == 1)
            used = sum(plain.softmax_gate(R, x[b, t])[n] for t in range(3) if mask[b, t])
            entries.append(used * (1.1 if own else 0.9))
    mean = sum(entries) / 12
    loss = sum((e - mean) ** 2 for e in entries) / 11 / (mean**2 + 1e-10)
    (0.5 * loss).backward()
    torch.testing.assert_close(context_of(model).last_losses["balance"], loss.detach(), **CLOSE)
    torch.testing.assert_close(parameters(model)["router"].grad, R.grad, **CLOSE)
    with pytest.raises(HeadwaterError, match="needs the task of every row"):
        model(x)
    model.eval()(x)  # needs no tasks once trained


@pytest.mark.filterwarnings("error:.*lru_cache")
def test_localized_balance_compiles_without_a_word():
    model = move(model_of(top_k=0, balance_loss="localized", task_types=[1, 0, 0]), 6).train()
    x, found = noise(3, 3, d_in), []
    for forward in (model, torch.compile(model, backend="eager", fullgraph=True)):
        model.zero_grad()
        forward(x, headwater_task_ids=torch.tensor([2, 0, 1])).sum().backward()
        found.append(parameters(model)["router"].grad.clone())
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        ("moe_lora", {"balance_loss": "mixtral", "balance_loss_weight": 1.0}),
        ("moe_lora", {"balance_loss": "localized", "balance_loss_weight": 1.0, "task_types": [0, 1], "top_k": 0}),
        ("moe_lora", {"balance_loss": "none", "z_loss_weight": 1.0}),
        ("hydralora", {"balance_loss_weight": 1.0}),
    ],
    ids=["mixtral", "localized", "z", "hydralora"],
)
def test_the_weight_of_a_loss_means_the_same_at_any_depth(tiny_llama, method, loss):
    def router_gradient(layers):
        fields = {"target_modules": ["q_proj"], "lora_dropout": 0.0, **loss}
        torch.manual_seed(0)
        model = get_peft_model(
            tiny_llama(), make_config(method, init_seed=1, layers_to_transform=layers, **fields)
        ).train()
        ids = torch.arange(20).view(2, 10)
        tasks = torch.tensor([0, 1])
        # B is zero, so the router hears of its own loss alone
        model(input_ids=ids, labels=ids, headwater_task_ids=tasks).loss.backward()
        return next(p.grad for n, p in model.named_parameters() if "layers.0" in n and n.endswith("router"))[:]

    torch.testing.assert_close(router_gradient([0]), 2 * router_gradient([0, 1]), rtol=1e-5, atol=1e-9)


# --- routed by task ---------------------------------------------------------------------------------------------------


def by_task(**fields):
    return move(model_of(router="task", num_tasks=3, task_dim=4, expert_init="normal", **fields), 7)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("length", [3, 5])
def test_property_7_task_gates_are_the_loop_also_when_rows_are_as_many_as_positions(length, k):
    model, tasks = by_task(top_k=k), [2, 0, 1, 1, 2]
    A, B, E, G = (leaf(parameters(model)[name]) for name in ("A", "B", "task_embedding", "task_gate"))
    x, weight = noise(5, length, d_in), noise(5, length, d_out, seed=1)
    found = model(x, headwater_task_ids=tasks)
    rows = [
        plain_layer(row, base_of(model), A, B, [plain_gate(plain.softmax_gate(G, E[task]), k)] * length, 3 / 2)
        for row, task in zip(x, tasks, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(rows), **CLOSE)
    alone = torch.cat([model(x[b : b + 1], headwater_task_ids=[task]) for b, task in enumerate(tasks)])
    torch.testing.assert_close(found, alone, **CLOSE)
    (found * weight).sum().backward()
    (torch.stack(rows) * weight).sum().backward()
    for name, own in (("A", A), ("B", B), ("task_embedding", E), ("task_gate", G)):
        torch.testing.assert_close(parameters(model)[name].grad, own.grad, **CLOSE)


@pytest.mark.parametrize("k", [0, 2])
def test_property_7_merging_for_a_task_is_exact(k):
    model, x = by_task(top_k=k), noise(2, 5, d_in)
    assert needs_task_ids(model)
    assert not needs_task_ids(model_of())
    for task in range(3):
        expected = model(x, headwater_task_ids=task)
        merged = merge_task(copy.deepcopy(model), task)
        torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotMergeable, match="merge_task"):
        model.merge_and_unload()
    for task in (3, -1):
        with pytest.raises(HeadwaterError, match="0 to 2"):
            merge_task(model, task)


@pytest.mark.parametrize(("tasks", "message"), [(None, "needs the task"), ([0, 3], "out of range"), ([-1, 0], "range")])
def test_tasks_missing_or_unknown_are_refused(tasks, message):
    with pytest.raises(HeadwaterError, match=message):
        by_task()(noise(2, 5, d_in), **({} if tasks is None else {"headwater_task_ids": tasks}))


def test_an_unknown_task_is_none_of_the_known_ones_when_compiled():
    """Ids are not read there, so that nothing waits for an accelerator; -1 must not count from the end."""
    model = torch.compile(by_task().eval(), backend="eager")
    for task in (3, -1):
        with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
            model(noise(2, 5, d_in), headwater_task_ids=torch.tensor([task, 0]))


def test_the_task_gate_is_one_for_the_whole_model_and_survives_a_file(tiny_llama, tmp_path):
    """In the released code each layer holds, and counts, a gate of its own that is never used."""
    fields = {"target_modules": ["q_proj", "up_proj"], "router": "task", "num_tasks": 3, "num_experts": 4, "r": 2}
    model = get_peft_model(tiny_llama(), make_config("moe_lora", task_type="CAUSAL_LM", **fields))
    names = [name for name, _ in model.named_parameters() if name.endswith(("task_gate", "task_embedding"))]
    assert len(names) == 2
    factors = sum(4 * 2 * (32 + out) for out in (32, 48)) * 2
    assert model.get_nb_trainable_parameters()[0] == factors + 3 * 64 + 64 * 4
    move(model, 1)
    ids, tasks = torch.arange(20).view(2, 10), torch.tensor([0, 2])
    expected = model(input_ids=ids, headwater_task_ids=tasks).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(loaded(input_ids=ids, headwater_task_ids=tasks).logits, expected)
    assert torch.equal(copy.deepcopy(model)(input_ids=ids, headwater_task_ids=tasks).logits, expected)


# --- what else must hold ----------------------------------------------------------------------------------------------


def test_property_8_unchosen_experts_get_no_gradient_and_training_is_the_same_function():
    model, x = move(model_of(top_k=1), 8), noise(1, d_in)
    torch.testing.assert_close(model.train()(x), model.eval()(x), rtol=0, atol=0)
    model(x).sum().backward()
    chosen = int((x @ parameters(model)["router"].T).argmax())
    for n in range(4):
        for name in ("A", "B"):
            assert bool(parameters(model)[name].grad[n].any()) == (n == chosen)
    assert parameters(model)["router"].grad.any()  # top-1 gates are always 1, and yet the router learns


def test_experts_start_apart_and_routers_as_published():
    model = adapt("moe_lora", 2048, 8, num_experts=4, r=4, dtype=torch.float32)
    A, R = held(model).A.view(4, 4, 2048), held(model).router
    for tensor in (A, R):
        assert tensor.abs().max() <= 2048**-0.5
        assert tensor.std().item() == pytest.approx((3 * 2048) ** -0.5, rel=0.05)
    assert all(not torch.equal(A[0], A[n]) for n in (1, 2, 3))
    model = adapt("moe_lora", 2048, 8, num_experts=4, r=4, expert_init="normal", dtype=torch.float32)
    assert held(model).A.std().item() == pytest.approx(0.01, rel=0.05)
    model = adapt("moe_lora", 8, 8, router="task", num_tasks=100, dtype=torch.float32)
    assert parameters(model)["task_embedding"].std().item() == pytest.approx(1, rel=0.05)
    gate = parameters(model)["task_gate"]
    assert gate.abs().max() <= 64**-0.5
    assert gate.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)


def test_fixed_gates_merge_and_other_shapes_do_not():
    model, x, gate = move(model_of(), 9), noise(7, d_in), torch.tensor([0.5, 0.3, 0.2, 0.0])
    expected = plain_layer(x, base_of(model), parameters(model)["A"], parameters(model)["B"], [gate] * 7, 3 / 2)
    with pytest.raises(HeadwaterError, match="one number per head"):
        merge_with_gates(model, {"layer": torch.ones(1)})
    torch.testing.assert_close(merge_with_gates(model, {"layer": gate})(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["moe_lora", "malora"])
def test_layers_can_have_experts_of_their_own_number(tiny_llama, method):
    """MoLA: higher layers have more."""
    fields = {"r": 2, "num_experts": 3, "top_k": 2, "balance_loss": "mola", "target_modules": ["gate_proj", "up_proj"]}
    pattern = {r".*layers\.1\..*": 5, "gate_proj": 2}
    model = get_peft_model(tiny_llama(), make_config(method, experts_pattern=pattern, task_type="CAUSAL_LM", **fields))
    found = {name: held.B.shape[0] for name, held in heads(model).items()}
    layer = "model.layers.{}.mlp.{}".format
    assert found == {
        layer(0, "gate_proj"): 2, layer(0, "up_proj"): 3, layer(1, "gate_proj"): 5, layer(1, "up_proj"): 5,
    }  # fmt: skip
    x = torch.tensor([[1, 2, 3]])
    model.train()(input_ids=x, labels=x).loss.backward()
    assert {p.grad.shape[0] for n, p in model.named_parameters() if n.endswith("router")} == {2, 3, 5}
    with pytest.raises(HeadwaterError, match="top_k 3 is larger than num_experts 2"):
        make_config(method, experts_pattern={"gate_proj": 2}, top_k=3)
    with pytest.raises(HeadwaterError, match="experts_pattern needs whole numbers"):
        make_config(method, experts_pattern={"gate_proj": 0})


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"balance_loss": "mola"}, {"router": "task", "num_tasks": 3}])
def test_plain_trainer_lowers_the_loss_and_moves_every_tensor(tiny_llama, tmp_path, fields):
    given = {"r": 2, "num_experts": 4, **fields}
    _, losses, still = train(tiny_llama(), tmp_path, "moe_lora", tasks="router" in fields, **given)
    assert sum(losses[-4:]) / 4 < losses[0] - 0.2
    assert not still


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"num_experts": 0, "top_k": 0}, "num_experts"),
        ({"top_k": 9}, "top_k"),
        ({"top_k": -1}, "top_k"),
        ({"balance_loss": "x"}, "balance_loss"),
        ({"balance_loss": "mixtral", "top_k": 0}, "balance_loss"),
        ({"balance_loss_weight": -1.0}, "balance_loss_weight"),
        ({"z_loss_weight": -1.0}, "z_loss_weight"),
        ({"localized_delta": 1.0}, "localized_delta"),
        ({"balance_loss": "localized"}, "task_types"),
        ({"balance_loss": "localized", "task_types": [0, 2]}, "task_types"),
        ({"balance_loss": "localized", "task_types": [0, 1], "num_experts": 3}, "task_types"),
        ({"router": "x"}, "router"),
        ({"expert_init": "x"}, "expert_init"),
        ({"num_tasks": 0}, "num_tasks"),
        ({"task_dim": 0}, "task_dim"),
    ],
)
def test_a_bad_value_is_one_problem_that_names_its_field(fields, where):
    with pytest.raises(HeadwaterError) as refused:
        make_config("moe_lora", **fields)
    assert [problem.where for problem in refused.value.problems] == [where]
