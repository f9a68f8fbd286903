"""LoRAHub: the composed adapter and the objective against their equations, the search, files."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from pool_support import MLP, make_pool, merged
from tiny_models import make_tiny_llama

from headwater.compose import Adapter, PooledModel
from headwater.compose.adapter import read_adapter
from headwater.compose.hub import BOX, HubSpec, compose, search
from headwater.data.encode import Encoded
from headwater.errors import HeadwaterError

NAMES = ["a", "b", "c"]
PLANS = {name: {"r": 4, "lora_alpha": 8, "target_modules": MLP, "size": 0.2} for name in NAMES}
DOWN = "model.layers.1.mlp.down_proj"


def sharp():
    """The tiny model with logits that differ enough for adapters to matter."""
    model = make_tiny_llama()
    model.lm_head.weight.data *= 40
    return model


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("pool"), {**PLANS, "wide": {**PLANS["a"], "r": 6}})


@pytest.fixture
def pooled(pool):
    return PooledModel(sharp(), pool.load)


def rows(pool, count=8, planted="b"):
    """Rows whose completions one adapter of the pool finds likely."""
    generator = torch.Generator().manual_seed(5)
    model = merged(sharp(), (1.0, pool.load(planted)))
    made = []
    for _ in range(count):
        prompt = torch.randint(0, 256, (6,), generator=generator)
        with torch.no_grad():
            answer = model.generate(input_ids=prompt[None], max_new_tokens=4, do_sample=False)[0, 6:].tolist()
        made.append(Encoded([*prompt.tolist(), *answer], [-100] * 6 + answer, 0))
    return made


def loss_of(model, made):
    """Mean -log p over all completion tokens, row by row."""
    total, count = 0.0, 0
    for row in made:
        with torch.no_grad():
            log_p = F.log_softmax(model(torch.tensor([row.input_ids])).logits[0], -1)
        for position, label in enumerate(row.labels):
            if label != -100:
                total, count = total - log_p[position - 1, label].item(), count + 1
    return total / count


def test_the_composed_adapter_is_the_equation(pool):
    adapters, w = [pool.load(name) for name in NAMES], [0.5, -1.2, 0.7]
    layers = [a.layers[DOWN] for a in adapters]
    A = sum(w_i * f.A.double() for w_i, f in zip(w, layers, strict=True))
    B = sum(w_i * f.B.double() for w_i, f in zip(w, layers, strict=True))

    def delta(*weights):
        return compose(adapters, weights).layers[DOWN].delta().double()

    torch.testing.assert_close(delta(*w), 2.0 * B @ A, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(delta(*(-x for x in w)), delta(*w), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(delta(*(2 * x for x in w)), 4 * delta(*w), rtol=1e-5, atol=1e-5)
    for sign in (1.0, -1.0):
        torch.testing.assert_close(delta(0, sign, 0), layers[1].delta().double(), rtol=1e-5, atol=1e-6)
    assert not delta(0, 0, 0).any()


def test_adapters_of_another_shape_are_refused(pool, pooled):
    with pytest.raises(HeadwaterError, match="rank is 6, and a's 4"):
        compose([pool.load("a"), pool.load("wide")], [1, 1])
    a = pool.load("a")
    louder = Adapter("louder", {k: dataclasses.replace(f, scaling=3.0) for k, f in a.layers.items()})
    fewer = Adapter("fewer", dict(list(a.layers.items())[:1]))
    with pytest.raises(HeadwaterError, match="scaling is 3, and a's 2") as caught:
        compose([a, louder, fewer], [1, 1, 1])
    assert "fewer: it adapts other layers than a" in str(caught.value)
    with pytest.raises(HeadwaterError, match="rank is 6"):
        search(pooled, ["a", "wide"], rows(pool, 1), 258, HubSpec())


@pytest.mark.parametrize("penalty", ["paper", "official"])
def test_every_evaluation_is_the_objective(pool, pooled, penalty):
    given, calls, modes = rows(pool, 7), [], set()
    spec = HubSpec(budget=6, penalty=penalty)
    made = [given[i] for i in torch.randperm(7, generator=torch.Generator().manual_seed(0))[:5].tolist()]

    def see(*call):
        calls.append(call)
        modes.add(pooled.model.training)

    pooled.model.train()
    found = search(pooled, NAMES, given, 258, spec, progress=see)
    assert (modes, pooled.model.training) == ({False}, True)
    assert [call[:2] for call in calls] == [(i, 6) for i in range(1, 7)]
    best = [call[2] for call in calls]
    assert best == sorted(best, reverse=True)
    assert best[-1] == found.objective == min(e["objective"] for e in found.evaluations)
    best_weights = min(found.evaluations, key=lambda e: e["objective"])["weights"]
    assert best_weights != found.evaluations[-1]["weights"]
    assert list(found.weights.values()) == best_weights
    again = compose([pool.load(name) for name in NAMES], best_weights).layers[DOWN]
    assert torch.equal(found.adapter.layers[DOWN].delta(), again.delta())
    assert found.evaluations[0]["weights"] == [0.0, 0.0, 0.0]
    at_zero = loss_of(sharp(), made) / (5 if penalty == "official" else 1)
    assert found.evaluations[0]["objective"] == pytest.approx(at_zero, rel=1e-4)
    adapters = [pool.load(name) for name in NAMES]
    for evaluation in found.evaluations:
        loss = loss_of(merged(sharp(), (1.0, compose(adapters, evaluation["weights"]))), made)
        assert evaluation["loss"] == pytest.approx(loss, rel=1e-3)
        size = sum(abs(w) for w in evaluation["weights"])
        want = loss + 0.05 * size if penalty == "paper" else loss / 5 + 0.05 * size / 3
        assert evaluation["objective"] == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("penalty", ["paper", "official"])
def test_a_loss_of_one_s_own(pool, pooled, penalty):
    """One minus the mean probability of the likeliest next token: of the composed model, on the rows that are drawn."""
    given, seen = rows(pool, 7), []

    def unsure(model, made):
        seen.append(([row.input_ids for row in made], model.training, torch.is_grad_enabled()))
        found = [model(torch.tensor([row.input_ids])).logits[0, -1].softmax(-1).max().item() for row in made]
        return 1 - sum(found) / len(found)

    found = search(pooled, NAMES, given, 258, HubSpec(budget=6, penalty=penalty), loss=unsure)
    made = [given[i] for i in torch.randperm(7, generator=torch.Generator().manual_seed(0))[:5].tolist()]
    assert seen == [([row.input_ids for row in made], False, False)] * 6
    assert len({round(evaluation["loss"], 3) for evaluation in found.evaluations}) > 2
    for evaluation in found.evaluations:
        adapter = compose([pool.load(name) for name in NAMES], evaluation["weights"])
        loss, size = unsure(merged(sharp(), (1.0, adapter)), made), sum(abs(w) for w in evaluation["weights"])
        want = loss + 0.05 * size if penalty == "paper" else loss / 5 + 0.05 * size / 3
        assert evaluation["loss"] == pytest.approx(loss, abs=1e-4)
        assert evaluation["objective"] == pytest.approx(want, abs=1e-4)


def test_a_planted_task_among_five_is_come_nearer_to(tmp_path):
    """Forty evaluations need not name the planted adapter, but have to beat none and weights at random."""
    names = ["a", "b", "c", "d", "e"]
    five = make_pool(tmp_path, dict.fromkeys(names, PLANS["a"]))
    drawn = (torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1) * BOX
    at_random = [compose([five.load(name) for name in names], w.tolist()) for w in drawn]
    for planted in ("a", "d"):
        found = search(PooledModel(sharp(), five.load), names, rows(five, planted=planted), 258, HubSpec())
        assert len(found.evaluations) == 40
        held_out = rows(five, 16, planted)[8:]
        loss, *others = (loss_of(merged(sharp(), (1.0, one)), held_out) for one in (found.adapter, *at_random))
        assert loss < loss_of(sharp(), held_out)
        assert loss < sum(others) / len(others)


def test_a_planted_task_is_found(pool, pooled):
    found = search(pooled, NAMES, rows(pool), 258, HubSpec())
    assert len(found.evaluations) == 40
    assert all(abs(w) <= BOX for e in found.evaluations for w in e["weights"])
    assert found.objective == min(e["objective"] for e in found.evaluations)
    best = next(e for e in found.evaluations if e["objective"] == found.objective)
    assert list(found.weights.values()) == best["weights"]
    assert HubSpec().penalty == "paper"
    assert found.optimiser.startswith("NGOpt -> ")
    assert len(found.optimiser) > len("NGOpt -> ")
    generator = torch.Generator().manual_seed(0)
    held_out = rows(pool, 16)[8:]
    at_random = [
        loss_of(merged(sharp(), (1.0, compose([pool.load(n) for n in NAMES], w.tolist()))), held_out)
        for w in (torch.rand(5, 3, generator=generator) * 2 - 1) * BOX
    ]
    loss = loss_of(merged(sharp(), (1.0, found.adapter)), held_out)
    assert loss < loss_of(sharp(), held_out)
    assert loss < sum(at_random) / len(at_random)
    assert abs(abs(found.weights["b"]) - 1) < 0.3  # w and -w are the same adapter
    assert max(abs(found.weights["a"]), abs(found.weights["c"])) < 0.3
    assert search(pooled, NAMES, rows(pool), 258, HubSpec()).evaluations == found.evaluations


def test_weights_without_a_finite_loss_are_passed_over(pooled):
    def explode(name):
        layers = pooled.adapter(name).layers
        return Adapter(name, {k: dataclasses.replace(f, B=f.B * 1e38) for k, f in layers.items()})

    wild = PooledModel(sharp(), explode)
    made = [Encoded([1, 2, 3, 4], [-100, -100, 3, 4], 0)]
    found = search(wild, NAMES, made, 258, HubSpec(budget=8))
    assert [e["loss"] == e["loss"] for e in found.evaluations] == [True] + [False] * 7  # the search starts at 0
    assert found.objective == pytest.approx(loss_of(sharp(), made), rel=1e-4)
    assert set(found.weights.values()) == {0.0}
    with pytest.raises(HeadwaterError, match="no weights that were tried gave a finite loss"):
        search(wild, NAMES, made, 258, HubSpec(budget=4, optimiser="CMA"))  # starts beside 0


def test_no_loss_is_too_large_to_be_better_than_none(pooled):
    """A perplexity of billions, say."""
    made, given = [Encoded([1, 2, 3, 4], [-100, -100, 3, 4], 0)], iter([math.nan, 3e12, 2e12, math.inf])
    found = search(pooled, NAMES, made, 258, HubSpec(budget=4), loss=lambda *_: next(given))
    assert list(found.weights.values()) == found.evaluations[2]["weights"]


def test_an_adapter_that_is_named_twice_is_refused(pooled):
    with pytest.raises(HeadwaterError, match="the adapters are a, b, a"):
        search(pooled, ["a", "b", "a"], [Encoded([1, 2], [-100, 2], 0)], 258, HubSpec(budget=1))


def test_a_search_among_no_adapters_is_refused(pool, pooled):
    with pytest.raises(HeadwaterError, match="there are no adapters to compose"):
        search(pooled, [], rows(pool, 1), 258, HubSpec())


def test_another_optimiser(pool, pooled):
    spec = HubSpec(budget=5, optimiser="CMA", seed=1)
    found = search(pooled, NAMES, rows(pool, 2), 258, spec)
    assert found.optimiser.startswith("CMA -> CMA")
    assert search(pooled, NAMES, rows(pool, 2), 258, spec).evaluations == found.evaluations
    assert search(pooled, NAMES, rows(pool, 2), 258, dataclasses.replace(spec, seed=2)).evaluations != found.evaluations
    with pytest.raises(HeadwaterError, match="no optimiser 'Nobody'"):
        search(pooled, NAMES, rows(pool, 1), 258, HubSpec(optimiser="Nobody"))
    with pytest.raises(HeadwaterError, match="no rows"):
        search(pooled, NAMES, [], 258, HubSpec())


def test_saved_and_read_back_exactly(pool, pooled, tmp_path):
    found = search(pooled, NAMES, rows(pool, 2), 258, HubSpec(budget=4))
    found.save(str(tmp_path / "hub"), pool, task="t")  # a text will do
    again = read_adapter(tmp_path / "hub", "hub", pool.fingerprint.layers)
    for layer, factors in found.adapter.layers.items():
        assert torch.equal(again.layers[layer].A, factors.A)
        assert torch.equal(again.layers[layer].B, factors.B)
        assert again.layers[layer].scaling == factors.scaling
    record = json.loads((tmp_path / "hub" / "hub.json").read_text())
    assert (record["weights"], record["optimiser"], record["task"]) == (found.weights, found.optimiser, "t")
    inputs = torch.arange(6)[None]
    with torch.no_grad():
        stock = PeftModel.from_pretrained(sharp(), tmp_path / "hub").eval()(inputs).logits
        ours = merged(sharp(), (1.0, found.adapter))(inputs).logits
    torch.testing.assert_close(stock, ours, rtol=1e-3, atol=1e-3)


def test_without_nevergrad(pool, pooled, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nevergrad", None)
    with pytest.raises(HeadwaterError, match=r"pip install 'headwater\[pool\]'"):
        search(pooled, NAMES, rows(pool, 1), 258, HubSpec())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("examples", 0),
        ("examples", 1.5),
        ("budget", -1),
        ("budget", math.nan),
        ("budget", None),
        ("seed", -1),
        ("penalty", "none"),
    ],
)
def test_settings_that_no_search_could_go_by_are_refused(field, value):
    with pytest.raises(HeadwaterError, match=f"{field}: it is {value}, and should be"):
        HubSpec(**{field: value})
