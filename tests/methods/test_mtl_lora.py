"""MTL-LoRA's properties, and its equation read plainly: one row, one token, one up-projection at a time."""

from __future__ import annotations

import pytest
import torch
from adapted_linear import adapt, base_of, leaf, move, noise, parameters

import headwater
from headwater import HeadwaterError, NotMergeable, make_config

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
T, n, r, d_in, d_out = 3, 2, 2, 5, 6


def model_of(**fields):
    given = {"num_tasks": T, "num_heads": n, "r": r, "lora_alpha": 3, "lora_dropout": 0.0, "temperature": 0.5, **fields}
    return adapt("mtl_lora", d_in, d_out, **given)


def plain(x, tasks, A, B, L, w, s, temperature):
    """The update for x `(rows, length, d_in)`."""
    rows = []
    for row, t in zip(x, tasks, strict=True):
        weights = torch.exp(w[t] / temperature) / torch.exp(w[t] / temperature).sum()
        tokens = []
        for token in row:
            v = (L[t] if L.dim() == 3 else torch.diag(L[t])) @ (A @ token)
            tokens.append(s * sum(weights[k] * (B[k].T @ v) for k in range(B.shape[0])))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@pytest.mark.parametrize("lambda_format", ["full", "diag"])
def test_fused_is_the_equation_values_and_gradients(lambda_format):
    model = move(model_of(lambda_format=lambda_format), 1)
    x, weight, tasks = noise(4, 3, d_in), noise(4, 3, d_out, seed=1), [2, 0, 0, 2]
    own = {name: leaf(p) for name, p in parameters(model).items()}
    x_fused, x_plain = leaf(x), leaf(x)
    fused = model(x_fused, headwater_task_ids=tasks)
    base = base_of(model)
    expected = base(x_plain) + plain(x_plain, tasks, *(own[name] for name in ("A", "B", "L", "w")), 3 / r, 0.5)
    torch.testing.assert_close(fused, expected, **CLOSE)
    (fused * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x_fused.grad, x_plain.grad, **CLOSE)
    for name, p in parameters(model).items():
        torch.testing.assert_close(p.grad, own[name].grad, **CLOSE)


@pytest.mark.parametrize("head_init", ["zeros", "kaiming"])
def test_property_1_starts_at_the_base_for_every_task(head_init):
    model = model_of(head_init=head_init, w_init="zeros" if head_init == "kaiming" else "kaiming", dtype=torch.float64)
    x = noise(3, 2, d_in)
    torch.testing.assert_close(model(x, headwater_task_ids=[0, 1, 2]), base_of(model)(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lambda_format", ["full", "diag"])
def test_starts_as_released_and_only_the_up_projections_have_a_first_gradient(lambda_format):
    """With three heads a task's largest mixing weight is 0.84 on average at the default temperature, and 0.43 at 1."""
    fields = {"num_tasks": 800, "num_heads": 3, "r": 8, "lambda_format": lambda_format, "dtype": torch.float32}
    model = adapt("mtl_lora", 2048, 8, **fields)
    p = parameters(model)
    assert torch.equal(p["L"], (torch.eye(8) if lambda_format == "full" else torch.ones(8)).expand_as(p["L"]))
    assert not p["B"].any()
    for name, fan_in in (("A", 2048), ("w", 3)):
        assert p[name].abs().max() <= fan_in**-0.5
        assert p[name].std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.04)
    largest = []
    with headwater.observe(model, lambda name, gate: largest.append(gate.max(-1).values.mean().item())):
        y = model.train()(noise(800, 1, 2048, dtype=torch.float32), headwater_task_ids=range(800))
    assert largest == pytest.approx([0.84], abs=0.02)
    assert torch.softmax(p["w"], -1).max(-1).values.mean().item() == pytest.approx(0.43, abs=0.01)
    y.square().sum().backward()
    assert [name for name, tensor in p.items() if tensor.grad.any()] == ["B"]


def test_property_2_one_task_and_one_head_is_lora_with_its_matrix_folded_in():
    model = move(model_of(num_tasks=1, num_heads=1), 2)
    A, B, L = (parameters(model)[name].detach() for name in ("A", "B", "L"))
    x = noise(2, 3, d_in)
    expected = base_of(model)(x) + 3 / r * (x @ (L[0] @ A).T @ B[0])
    torch.testing.assert_close(model(x, headwater_task_ids=0), expected, **CLOSE)


def test_property_3_rows_do_not_see_each_other():
    model, x = move(model_of(), 3), noise(3, 4, d_in)
    together = model(x, headwater_task_ids=[1, 2, 0])
    for row, task in enumerate([1, 2, 0]):
        torch.testing.assert_close(together[row : row + 1], model(x[row : row + 1], headwater_task_ids=task), **CLOSE)


@pytest.mark.parametrize("task", range(T))
def test_property_4_merging_for_a_task_is_exact(task):
    model, x = move(model_of(), 4), noise(2, 3, d_in)
    expected = model(x, headwater_task_ids=task).detach()
    torch.testing.assert_close(headwater.merge_task(model, task)(x), expected, rtol=1e-5, atol=1e-5)


def test_property_5_tasks_out_of_the_batch_get_no_gradient():
    model = move(model_of(), 5)
    model(noise(2, 3, d_in), headwater_task_ids=[1, 1]).square().sum().backward()
    grads = {name: p.grad for name, p in parameters(model).items()}
    for name in ("L", "w"):
        assert not grads[name][[0, 2]].any()
        assert grads[name][1].any()
    assert grads["A"].any()
    assert grads["B"].any()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_property_5_under_adamw_tasks_that_were_never_seen_move_by_weight_decay_alone(weight_decay):
    model, rate, steps = move(model_of(), 5), 0.05, 4
    before = {name: p.detach().clone() for name, p in parameters(model).items()}
    optimizer = torch.optim.AdamW(parameters(model).values(), rate, weight_decay=weight_decay)
    for step in range(steps):
        optimizer.zero_grad()
        model(noise(2, 3, d_in, seed=step), headwater_task_ids=[1, 1]).square().sum().backward()
        optimizer.step()
    for name in ("L", "w"):
        now = parameters(model)[name].detach()
        shrunk = before[name] * (1 - rate * weight_decay) ** steps
        torch.testing.assert_close(now[[0, 2]], shrunk[[0, 2]], rtol=1e-12, atol=0)
        assert weight_decay or torch.equal(now[[0, 2]], before[name][[0, 2]])
        assert (now[1] - shrunk[1]).abs().min() > 1e-3


def test_property_5_a_task_that_leaves_the_batches_moves_on_by_adams_momentum():
    model = move(model_of(), 5)
    optimizer = torch.optim.AdamW(parameters(model).values(), 0.05, weight_decay=0.0)
    seen = []
    for task in (0, 1):
        optimizer.zero_grad()
        model(noise(2, 3, d_in, seed=task), headwater_task_ids=task).square().sum().backward()
        optimizer.step()
        seen.append(parameters(model)["L"][0].detach().clone())
    assert (seen[1] - seen[0]).abs().max() > 1e-3


@pytest.mark.parametrize("gate", [[1.0], 1.0, [0.2, 0.3, 0.5]])
def test_a_fixed_gate_is_one_number_for_each_head(gate):
    model = move(model_of(num_tasks=1), 4)
    x, gates = noise(4, d_in), torch.tensor(gate)
    with pytest.raises(HeadwaterError, match=rf"shape \({n},\), not"):
        headwater.merge_with_gates(model, {"layer": gates})
    A, B, L, _ = (leaf(parameters(model)[name]) for name in ("A", "B", "L", "w"))
    expected = base_of(model)(x) + 3 / r * (x @ A.T @ L[0].T) @ (0.2 * B[0] + 0.7 * B[1])
    merged = headwater.merge_with_gates(model, {"layer": torch.tensor([0.2, 0.7], dtype=torch.float64)})
    torch.testing.assert_close(merged(x), expected, **CLOSE)


def test_property_6_temperature():
    x, task = noise(1, 1, d_in), 0
    flat, sharp = (move(model_of(temperature=t), 6) for t in (1e6, 1e-4))
    for model, weights in ((flat, torch.full((n,), 1 / n)), (sharp, None)):
        p = {name: value.detach() for name, value in parameters(model).items()}
        if weights is None:
            weights = torch.nn.functional.one_hot(p["w"][task].argmax(), n)
        B = torch.einsum("k,kro->ro", weights.double(), p["B"])
        expected = base_of(model)(x) + 3 / r * (x @ (p["L"][task] @ p["A"]).T @ B)
        torch.testing.assert_close(model(x, headwater_task_ids=task), expected, rtol=1e-5, atol=1e-5)
    before = sharp(x, headwater_task_ids=task)
    with torch.no_grad():
        parameters(sharp)["w"][task] += 7
    torch.testing.assert_close(sharp(x, headwater_task_ids=task), before, rtol=1e-6, atol=1e-8)
    for bad in (0.0, -1.0):
        with pytest.raises(HeadwaterError, match="temperature must be positive"):
            make_config("mtl_lora", temperature=bad)


def test_property_7_diag_is_full_with_a_diagonal():
    full, diag, x = move(model_of(), 7), model_of(lambda_format="diag"), noise(2, 3, d_in)
    with torch.no_grad():
        for name, p in parameters(diag).items():
            p.copy_(parameters(full)[name].diagonal(dim1=-2, dim2=-1) if name == "L" else parameters(full)[name])
        parameters(full)["L"].copy_(torch.diag_embed(parameters(diag)["L"]))
    torch.testing.assert_close(full(x, headwater_task_ids=[0, 2]), diag(x, headwater_task_ids=[0, 2]), **CLOSE)


def test_property_8_missing_and_wrong_ids_are_errors():
    model, x = model_of(), noise(2, 3, d_in)
    with pytest.raises(HeadwaterError, match="needs the task of every row"):
        model(x)
    for ids in ([0, 3], [-1, 0]):
        with pytest.raises(HeadwaterError, match="out of range"):
            model(x, headwater_task_ids=ids)
    with pytest.raises(NotMergeable, match="merging needs to know which"):
        model.base_model.merge_and_unload()


@pytest.mark.parametrize("lambda_format", ["full", "diag"])
def test_unknown_tasks_can_have_the_mean(lambda_format):
    model = move(model_of(unknown_task="mean", lambda_format=lambda_format), 1)
    x, tasks = noise(3, 2, d_in), [1, 7, -2]
    A, B, L, w = (parameters(model)[name].detach() for name in ("A", "B", "L", "w"))
    m = torch.softmax(w / 0.5, dim=1).mean(0)
    mean_L = L.mean(0) if L.dim() == 3 else torch.diag(L.mean(0))
    mean = 3 / r * torch.einsum("k,kro,rs,si->oi", m, B, mean_L, A)
    found = model(x, headwater_task_ids=tasks) - base_of(model)(x)
    torch.testing.assert_close(found[:1], plain(x[:1], [1], A, B, L, w, 3 / r, 0.5), **CLOSE)
    torch.testing.assert_close(found[1:], x[1:] @ mean.T, **CLOSE)
    with pytest.raises(HeadwaterError, match="needs the task of every row"):
        model(x)


def test_heads_that_could_not_part_are_refused():
    with pytest.raises(HeadwaterError, match="same gradient"):
        make_config("mtl_lora", w_init="zeros")
    model = model_of()  # and with the defaults they do part
    x, target = noise(8, 3, d_in), noise(8, 3, d_out, seed=9)
    optimizer = torch.optim.SGD(parameters(model).values(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x, headwater_task_ids=[0, 1, 2, 0, 1, 2, 0, 1]) - target).square().mean().backward()
        optimizer.step()
    B = parameters(model)["B"]
    assert (B[0] - B[1]).abs().max() > 1e-3
    assert (parameters(model)["w"] - parameters(model_of())["w"]).abs().max() > 1e-6
