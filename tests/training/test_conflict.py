"""Conflict between tasks' gradients: a plain reading, row by row and parameter by parameter, and planted cases."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from headwater.analysis.conflict import Conflict, gradient_conflict
from headwater.data.encode import Encoded
from headwater.errors import HeadwaterError

from .common import adapted, make_rows


def tasks_of(*counts):
    return {f"task {n}": make_rows(n, count) for n, count in enumerate(counts)}


def plain_gradients(model, rows, task_id):
    """One row at a time, without padding; the gradient of the mean over all completion tokens."""
    model.zero_grad()
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        more = {**task_id, "headwater_labels": torch.tensor([row.labels])} if task_id else {}
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0].double()
        for place, label in enumerate(row.labels):
            if label != -100 and place:
                total, tokens = total + F.cross_entropy(logits[place - 1], torch.tensor(label)), tokens + 1
    (total / tokens).backward()
    return {n: p.grad.double().clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def plain_cosine(a, b, pick):
    dot = lengths_a = lengths_b = 0.0
    for name in a:
        x, y = pick(name, a[name]), pick(name, b[name])
        if x is not None:
            dot, lengths_a, lengths_b = dot + (x * y).sum(), lengths_a + (x * x).sum(), lengths_b + (y * y).sum()
    return float(dot / lengths_a.sqrt() / lengths_b.sqrt())


@pytest.mark.parametrize("method", ["rlora", "mtl_lora", "cond_mixlora", "lora"])
def test_cosines_are_those_of_a_plain_reading(tiny_llama, method):
    fields = {"rlora": {"num_heads": 2}, "mtl_lora": {"num_tasks": 3}}.get(method, {})
    model = adapted(tiny_llama(), method, **fields).eval()
    rows = tasks_of(5, 6, 3)
    found = gradient_conflict(model, rows, fill=258)
    given = [{} if method == "lora" else {"headwater_task_ids": torch.tensor([n])} for n in range(3)]
    plain = [plain_gradients(model, some, given[n]) for n, some in enumerate(rows.values())]

    def ends(*names):
        return lambda name, g: g if any(f".{n}." in f".{name}." for n in names) else None

    picks = {"all": lambda name, g: g, "A": ends("A", "lora_A"), "B": ends("B", "lora_B")}
    if method == "rlora":
        picks["router"] = ends("router")
        picks |= {f"head {n + 1}": lambda name, g, n=n: g[n] if name.endswith(".B") else None for n in range(2)}
    assert set(picks) <= set(found)
    for part, pick in picks.items():
        assert found[part].tasks == list(rows)
        for i in range(3):
            for j in range(3):
                assert found[part].cosine[i][j] == pytest.approx(plain_cosine(plain[i], plain[j], pick), abs=1e-4)


def test_the_same_rows_agree_and_the_model_is_left_alone(tiny_llama):
    model = adapted(tiny_llama(), "hydralora", num_heads=2, lora_dropout=0.5).train()
    rows = make_rows(0, 6)
    found = gradient_conflict(model, {"a": rows, "b": rows})
    assert found["all"].cosine[0][1] == pytest.approx(1, abs=1e-6)
    assert (found["all"].mean, found["all"].negative) == (pytest.approx(1, abs=1e-6), 0.0)
    assert (next(iter(found)), list(found)[-2:]) == ("all", ["head 1", "head 2"])
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_tasks_that_want_opposite_answers_conflict(tiny_llama):
    def rows(answer):
        return [Encoded([n, n + 1, answer], [-100, -100, answer], 0) for n in range(8)]

    model = adapted(tiny_llama(), "hydralora", num_heads=2)
    old = model.get_base_model().lm_head.weight
    new = torch.zeros_like(old)
    new[20] = torch.randn(old.shape[1]) * 0.1
    new[21] = -new[20]  # so what makes one answer likelier makes the other less likely
    model.get_base_model().lm_head.weight = torch.nn.Parameter(new, requires_grad=False)
    found = gradient_conflict(model, {"yes": rows(20), "no": rows(21)})
    assert found["all"].cosine[0][1] < -0.9
    assert found["all"].negative == 1.0


def test_pairs_without_a_gradient_do_not_count():
    nan = math.nan
    conflict = Conflict(["a", "b", "c"], [[1.0, -0.5, nan], [-0.5, 1.0, nan], [nan, nan, nan]])
    assert conflict.pairs == [-0.5]
    some = Conflict(["a", "b", "c"], [[1.0, -0.5, 0.2], [-0.5, 1.0, 0.0], [0.2, 0.0, 1.0]])
    assert (some.mean, some.negative) == (pytest.approx(-0.1), pytest.approx(1 / 3))
    assert conflict.as_dict()["negative"] == 1.0
    assert Conflict(["a", "b"], [[nan, nan], [nan, nan]]).mean is None


def test_one_task_is_an_error(tiny_llama):
    with pytest.raises(HeadwaterError, match="one task"):
        gradient_conflict(adapted(tiny_llama()), {"a": make_rows(0, 2)})
