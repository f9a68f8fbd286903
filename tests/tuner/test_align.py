"""Align-LoRA's loss: its value against torch.distributions, and a gradient that reaches A in every mode."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from tiny_models import make_tiny_llama
from torch.distributions import Independent, Normal, kl_divergence

import headwater
from headwater import HeadwaterError
from headwater.methods.call import Call, State
from headwater.ops.alignment import (
    kl_alignment,
    kl_alignment_per_position,
    membership,
    mmd_alignment,
    over_pairs,
    sample,
    thin,
)
from headwater.tuner import AlignLoss, AlignSpec, MethodLayer, context_of

KINDS = [{"kind": "kl"}, {"kind": "mmd"}, {"kind": "kl", "token_mode": "per_position"}]
WIDTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 5, 10, 15, 20, 25, 30, 35, 100, 1e3, 1e4, 1e5, 1e6)  # the released ones
IDS = torch.tensor([0, 0, 1, 1])
CONFIGS = {
    "lora": lambda: LoraConfig(r=4, target_modules=["gate_proj", "down_proj"], task_type="CAUSAL_LM"),
    "rlora": lambda: headwater.make_config(
        "rlora", r=4, head_dropout=0.0, target_modules=["gate_proj", "down_proj"], task_type="CAUSAL_LM", init_seed=3
    ),
}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), r=st.integers(1, 4))
def test_kl_is_that_of_the_fitted_gaussians(seed, r):
    z, task = noise(60, r, seed=seed), torch.arange(60) % 3
    z = z * (task.unsqueeze(1) + 1.0) + task.unsqueeze(1)
    found = kl_alignment(z, membership(task, None, 3).double())
    fits = []
    for t in range(3):
        own = z[task == t]
        fits.append(Independent(Normal(own.mean(0), own.var(0, unbiased=False).sqrt()), 1))
    for i in range(3):
        for j in range(3):
            expected = (kl_divergence(fits[i], fits[j]) + kl_divergence(fits[j], fits[i])) / 2
            torch.testing.assert_close(found[i, j], expected, rtol=1e-8, atol=1e-10)


def test_the_floor_under_variances_is_of_the_tasks_that_are_there():
    """Whatever their ids: the same rows as tasks 0 and 1 and as 0 and 99, with a nearly constant dimension."""
    z, task = noise(200, 3), torch.arange(200) // 100
    z[:, 2] *= 1e-4
    z[100:, 2] += 1e-3
    fits = [(z[task == t].mean(0), z[task == t].var(0, unbiased=False)) for t in (0, 1)]
    floor = 1e-6 + 1e-4 * sum(v.sum() for _, v in fits) / 6
    assert fits[0][1][2] < floor
    assert floor < fits[0][1][0]
    (m0, v0), (m1, v1) = ((mean, v.clamp_min(floor)) for mean, v in fits)
    expected = 0.25 * ((v0 + (m0 - m1) ** 2) / v1 + (v1 + (m0 - m1) ** 2) / v0 - 2).sum()
    for high in (1, 99):
        found = kl_alignment(z, membership(task * high, None, high + 1).double())
        torch.testing.assert_close(found[0, high], expected, rtol=1e-9, atol=0)


def test_mmd_is_the_mean_of_kernels():
    z, task = noise(14, 3), torch.tensor([0] * 5 + [1] * 9)

    def kernel(a, b):
        return sum(torch.exp(-((a - b) ** 2).sum() / (2 * sigma)) for sigma in WIDTHS)

    def mean(first, second):
        return sum(kernel(a, b) for a in first for b in second) / (len(first) * len(second))

    X, Y = z[:5], z[5:]
    found = mmd_alignment(z, *sample(membership(task, None, 2).double()))
    expected = mean(X, X) + mean(Y, Y) - 2 * mean(X, Y)
    torch.testing.assert_close(found[0, 1], expected, rtol=1e-9, atol=1e-9)
    assert found[0, 0].abs() < 1e-9


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_mmd_gradient_is_right_in_float32(offset):
    """Also where tokens are alike: a distance that is not quite 0 would be magnified by the narrowest kernel."""
    z, member = noise(60, 4) + offset, membership(torch.arange(60) // 30, None, 2)
    z = z.float().double()  # nothing to round
    z[30:40] = z[:10]
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = z.to(dtype).requires_grad_()
        mmd_alignment(leaf, *sample(member.to(dtype)))[0, 1].backward()
        found.append(leaf.grad.double())
    assert (found[0] - found[1]).norm() < 1e-3 * found[1].norm()


def test_per_position_statistics_are_unbiased_ones_over_rows():
    z, task = noise(5, 3, 2), torch.tensor([0, 0, 1, 1, 1])
    found = kl_alignment_per_position(z, task, 2)[0, 1]
    total = 0.0
    for s in range(3):
        (m0, v0), (m1, v1) = ((z[task == t, s].mean(0), z[task == t, s].var(0) + 1e-8) for t in (0, 1))
        gap = (m0 - m1) ** 2
        total = total + 0.25 * ((v0 + gap) / v1 + (v1 + gap) / v0 - 2).sum()
    torch.testing.assert_close(found, total / 3, rtol=1e-9, atol=1e-12)


def loss_of(spec, z, ids, valid=None):
    state = State(batch=len(ids), length=z.shape[1], task_ids=ids, valid=valid)
    return AlignLoss(spec, 1).loss(Call("layer", tuple(z.shape[:2]), state), z.flatten(0, 1))


@pytest.mark.parametrize("fields", KINDS)
def test_property_1_zero_for_equal_tasks_and_blind_to_order(fields):
    spec, half = AlignSpec(**fields), noise(2, 20, 3)
    assert loss_of(spec, torch.cat([half, half]), IDS).abs() < 1e-9
    z = noise(4, 20, 3, seed=1)
    value = loss_of(spec, z, IDS)
    assert value > 0
    torch.testing.assert_close(loss_of(spec, z, 1 - IDS), value)
    torch.testing.assert_close(loss_of(spec, z[[1, 2, 0, 3]], IDS[[1, 2, 0, 3]]), value)


@pytest.mark.parametrize("kind", ["kl", "mmd"])
def test_property_2_padding_adds_nothing(kind):
    spec, z = AlignSpec(kind=kind), noise(4, 20, 3)
    padded = torch.cat([z, 100 + noise(4, 6, 3, seed=2)], dim=1)
    valid = torch.arange(26).expand(4, -1) < 20
    torch.testing.assert_close(loss_of(spec, padded, IDS, valid), loss_of(spec, z, IDS))


@pytest.mark.parametrize("tokens", ["prompt", "answer"])
def test_tokens_says_which_take_part(tokens):
    """Oracle: the loss on those tokens alone."""
    z, labels = noise(4 * 12, 2), torch.full((4, 12), 5)
    labels[:, :7] = -100
    labels[1, :9] = -100
    valid = torch.ones(4, 12, dtype=torch.bool)
    valid[2, :3] = False
    part = (labels == -100 if tokens == "prompt" else labels != -100) & valid
    state = State(4, 12, IDS, valid, prompt=(labels == -100) & valid)
    found = AlignLoss(AlignSpec(tokens=tokens), 1).loss(Call("layer", (4, 12), state), z)
    task = IDS.repeat_interleave(12)
    expected = kl_alignment(z[part.flatten()], membership(task[part.flatten()], None, 2).double())[0, 1]
    torch.testing.assert_close(found, expected)
    with pytest.raises(HeadwaterError, match="needs to know what is learned"):
        AlignLoss(AlignSpec(tokens=tokens), 1).loss(Call("layer", (4, 12), State(4, 12, IDS, valid)), z)


def test_property_9_one_task_or_one_row_contributes_nothing():
    z = noise(4, 20, 3)
    for ids in ([0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 2, 3]):
        assert loss_of(AlignSpec(), z, torch.tensor(ids)) == 0
    assert loss_of(AlignSpec(), noise(4, 2, 3), IDS) == 0, "four tokens a task are fewer than 4 r"


def test_pairs_and_thinning():
    distances, usable = noise(3, 3).abs(), torch.tensor([True, True, False])
    assert over_pairs(distances, usable, reduction="mean") == distances[0, 1]
    all_of_them = over_pairs(distances, torch.ones(3, dtype=torch.bool), reduction="sum")
    torch.testing.assert_close(all_of_them, distances[0, 1] + distances[0, 2] + distances[1, 2])
    kept = thin(torch.ones(2, 1000), 256).sum(1)
    assert kept.tolist() == [256, 256]
    assert thin(torch.ones(1, 10), 256).sum() == 10
    assert sample(torch.ones(2, 1000))[0].sum(1).tolist() == [256, 256]


def gradients(name, checkpointing=None, steps=0, **fields):
    torch.manual_seed(1)
    model = get_peft_model(make_tiny_llama(), CONFIGS[name]()).train()
    if fields:
        headwater.align(model, **fields)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    x = torch.randint(0, 250, (4, 30), generator=torch.Generator().manual_seed(0))
    model(input_ids=x, labels=x, **({"headwater_task_ids": IDS} if fields else {})).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", KINDS[:2])
@pytest.mark.parametrize("name", CONFIGS)
def test_property_3_the_loss_has_a_gradient_with_and_without_checkpointing(name, fields):
    plain, _ = gradients(name)
    aligned, model = gradients(name, weight=5.0, **fields)
    down = [n for n in plain if "lora_A" in n or n.endswith(".A")]
    assert len(down) == 4
    for n in down:
        assert (aligned[n] - plain[n]).norm() > 1e-2 * plain[n].norm()
    assert context_of(model).last_losses["align"] > 0
    for reentrant in (True, False):
        again, _ = gradients(name, reentrant, weight=5.0, **fields)
        for n, grad in aligned.items():
            torch.testing.assert_close(again[n], grad, rtol=1e-5, atol=1e-6)


def gaussian_distance(z, other):
    floor = 1e-6 + 1e-4 * torch.stack([z.var(0, correction=0), other.var(0, correction=0)]).mean().detach()
    a, b = (Independent(Normal(t.mean(0), t.var(0, correction=0).clamp_min(floor).sqrt()), 1) for t in (z, other))
    return (kl_divergence(a, b) + kl_divergence(b, a)) / 2


def kernel_distance(z, other):
    def mean_kernel(a, b):
        squares = (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(-1)
        return sum(torch.exp(-squares / (2 * sigma)) for sigma in WIDTHS).mean()

    return mean_kernel(z, z) + mean_kernel(other, other) - 2 * mean_kernel(z, other)


@pytest.mark.parametrize(("kind", "distance"), [("kl", gaussian_distance), ("mmd", kernel_distance)])
@pytest.mark.parametrize("name", CONFIGS)
def test_property_6_training_has_the_weighted_mean_over_layers_and_logs_it(name, kind, distance):
    """Oracle: the loss of each layer's A x, read off beside an ordinary forward, added by hand."""
    x = torch.randint(0, 250, (4, 20), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(20) < torch.tensor([[20], [13], [17], [20]])
    batch = {"input_ids": x, "attention_mask": valid.long(), "labels": x.masked_fill(~valid, -100)}

    def make():
        torch.manual_seed(1)
        return get_peft_model(make_tiny_llama(), CONFIGS[name]()).double().train()

    model, by_hand = make(), make()
    headwater.align(model, kind=kind, weight=0.7)
    model(**batch, headwater_task_ids=IDS).loss.backward()
    read = {}
    for layer in by_hand.modules():
        A = layer.lora_A["default"].weight if isinstance(layer, LoraLayer) else None
        A = layer.branch("default").A if isinstance(layer, MethodLayer) else A
        if A is not None:
            layer.register_forward_pre_hook(lambda m, args, A=A: read.update({m: args[0] @ A.T}))
    task_loss = by_hand(**batch).loss
    losses = [distance(z[:2][valid[:2]], z[2:][valid[2:]]) for z in read.values()]
    assert len(losses) == 4
    (task_loss + 0.7 * sum(losses) / 4).backward()
    expected = {n: p.grad for n, p in by_hand.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for n, grad in expected.items():
        torch.testing.assert_close(found[n], grad, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(context_of(model).last_losses["align"].double(), sum(losses) / 4, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_detach_input_moves_only_the_down_projections(name):
    plain, _ = gradients(name)
    aligned, _ = gradients(name, weight=5.0, detach_input=True)
    for n, grad in plain.items():
        moved = (aligned[n] - grad).norm() > 1e-5 * grad.norm()  # with a loss the heads' part is computed another way
        assert moved == ("lora_A" in n or n.endswith(".A"))


@pytest.mark.parametrize(
    ("method", "fields"),
    [("rlora", {}), ("hydralora", {"input_dropout": "shared"}), ("hydralora", {"input_dropout": "per_head"})],
)
def test_a_detached_input_is_dropped_as_the_other(method, fields):
    """The loss is of A x behind the dropout, whether or not its gradient goes on to x."""
    found = {}
    for detach in (False, True):
        config = headwater.make_config(
            method, r=4, lora_dropout=0.5, target_modules=["gate_proj"], task_type="CAUSAL_LM", init_seed=3, **fields
        )
        model = get_peft_model(make_tiny_llama(), config).train()
        headwater.align(model, weight=1.0, detach_input=detach)
        x = torch.randint(0, 250, (4, 70), generator=torch.Generator().manual_seed(0))
        torch.manual_seed(1)
        model(input_ids=x, labels=x, headwater_task_ids=IDS)
        found[detach] = context_of(model).last_losses["align"]
    assert found[False] > 0
    torch.testing.assert_close(found[True], found[False])


@pytest.mark.parametrize("name", CONFIGS)
def test_aligning_again_replaces_the_loss(name):
    once, _ = gradients(name, weight=5.0)
    torch.manual_seed(1)
    model = get_peft_model(make_tiny_llama(), CONFIGS[name]()).train()
    headwater.align(model, weight=2.0, kind="mmd")
    headwater.align(model, weight=5.0)
    assert_gradients(model, once)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copied_model_is_aligned_as_well(name, copy):
    expected, _ = gradients(name, weight=5.0)
    torch.manual_seed(1)
    model = get_peft_model(make_tiny_llama(), CONFIGS[name]()).train()
    headwater.align(model, weight=5.0)
    copied = copy(model)
    assert context_of(copied) is not context_of(model)
    assert_gradients(copied, expected)
    assert context_of(model).last_losses == {}


def assert_gradients(model, expected):
    x = torch.randint(0, 250, (4, 30), generator=torch.Generator().manual_seed(0))
    model(input_ids=x, labels=x, headwater_task_ids=IDS).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for n, grad in expected.items():
        torch.testing.assert_close(found[n], grad)


@pytest.mark.parametrize("name", CONFIGS)
def test_weight_zero_takes_the_loss_away(name):
    """And what it asked for: no checkpoint has to be known any more."""
    plain, _ = gradients(name)
    torch.manual_seed(1)
    model = get_peft_model(make_tiny_llama(), CONFIGS[name]()).train()
    headwater.align(model, weight=5.0, token_mode="per_position")
    context = context_of(model)
    assert (context.needs_state, context.needs_batch, context.needs_padding) == (True, True, True)
    headwater.align(model, weight=0.0)
    assert (context.needs_state, context.needs_batch, context.needs_padding) == (False, False, False)
    assert_gradients(model, plain)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_that_is_added_later_is_aligned_as_well(name):
    torch.manual_seed(1)
    model = get_peft_model(make_tiny_llama(), CONFIGS[name]()).train()
    headwater.align(model, weight=5.0)
    model.add_adapter("later", CONFIGS[name]())
    model.set_adapter("later")
    x = torch.randint(0, 250, (4, 30), generator=torch.Generator().manual_seed(0))
    model(input_ids=x, labels=x, headwater_task_ids=IDS)
    assert context_of(model).last_losses["align"] > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_of_an_adapter_that_is_not_active_do_not_dilute_the_loss(name):
    expected, _ = gradients(name, weight=5.0)
    torch.manual_seed(1)
    model = get_peft_model(make_tiny_llama(), CONFIGS[name]())
    other = CONFIGS[name]()
    other.target_modules = {"q_proj", "up_proj"}
    model.add_adapter("other", other)
    headwater.align(model.train(), weight=5.0)
    assert_gradients(model, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_property_4_weight_zero_is_the_method_itself(name):
    plain, _ = gradients(name)
    off, _ = gradients(name, weight=0.0)
    assert all(torch.equal(off[n], grad) for n, grad in plain.items())


def test_property_5_minimising_it_alone_brings_two_tasks_together():
    z = torch.cat([noise(50, 3), 3 * noise(50, 3, seed=1) + 4]).requires_grad_()
    member = membership(torch.arange(100) // 50, None, 2).double()
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        kl_alignment(z, member)[0, 1].backward()
        optimizer.step()
    first, second = z.detach().split(50)
    assert (first.mean(0) - second.mean(0)).abs().max() < 0.05
    assert (first.std(0) / second.std(0) - 1).abs().max() < 0.05


def test_a_frozen_model_in_eval_computes_nothing(tiny_llama):
    _, model = gradients("lora", weight=1.0)
    x = torch.tensor([[1, 2, 3]])
    model.eval()(x)  # no ids, and no error
    assert context_of(model).last_losses == {}


def test_the_page_has_every_field_and_its_default():
    page = (Path(__file__).parents[2] / "docs" / "methods" / "align.md").read_text(encoding="utf-8")
    found = {field: yaml.safe_load(default) for field, default in re.findall(r"(?m)^\| `(\w+)` \| `(.*?)` \|", page)}
    assert found == AlignSpec().model_dump()


def test_wrong_settings_are_refused(tiny_llama):
    model = get_peft_model(tiny_llama(), CONFIGS["lora"]())
    for fields in ({"kind": "cosine"}, {"weight": -1}, {"wieght": 1}, {"kind": "mmd", "token_mode": "per_position"}):
        with pytest.raises(HeadwaterError):
            headwater.align(model, **fields)
    with pytest.raises(HeadwaterError, match="no adapter to align"):
        headwater.align(tiny_llama(), weight=1.0)
    with pytest.raises(ValidationError):
        AlignSpec(kind="cosine")
