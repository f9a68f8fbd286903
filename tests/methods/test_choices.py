"""A choice among experts or ranks: by a float32 router on a base of any dtype, of x dropped or not by method."""

from __future__ import annotations

import pytest
import torch
from adapted_linear import OneLinear, noise
from peft import get_peft_model

import headwater

METHODS = {
    "moe_lora": {"num_experts": 8, "top_k": 2},
    "malora": {"num_experts": 8, "top_k": 2},
    "smora": {"r": 64, "top_k": 8},
}
AT = {"evaluation": False, "training": True}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", AT.values(), ids=AT)
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("tokens", [1000, 8])
def test_the_choice_is_that_of_a_float32_router(method, training, autocast, tokens):
    config = headwater.make_config(method, target_modules=["layer"], lora_dropout=0.0, init_seed=0, **METHODS[method])
    dtype = torch.float32 if autocast else torch.bfloat16
    model = get_peft_model(OneLinear(256, 64, dtype=dtype), config).train(training)
    x = noise(1000, 256, dtype=dtype)[:tokens]
    router = next(p for name, p in model.named_parameters() if "router" in name)
    # autocast rounds x, as it does for every layer, and not the logits
    k, exact = METHODS[method]["top_k"], x.bfloat16().float() @ router.float().T
    rounded = (x.bfloat16() @ router.bfloat16().T).float()
    gates = []
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        headwater.observe(model, lambda name, gate: gates.append(gate)),
        torch.set_grad_enabled(training),
    ):
        y = model(x)
    chosen = gates[0] != 0
    assert torch.equal(chosen, chosen_by(exact, k))
    if tokens == 1000:
        assert not torch.equal(chosen, chosen_by(rounded, k)), "rounding changes nothing here, so this shows nothing"
    if training:
        y.float().square().sum().backward()
        assert router.grad is not None


def chosen_by(logits: torch.Tensor, k: int) -> torch.Tensor:
    return torch.zeros_like(logits).scatter(-1, logits.topk(k, -1).indices, 1.0).bool()


def test_a_choice_behind_dropout_is_of_what_is_left():
    """SMoRA has one mask for A and the router: a token of zeros but for one entry keeps or loses that for both."""
    config = headwater.make_config("smora", target_modules=["layer"], lora_dropout=0.5, init_seed=0, **METHODS["smora"])
    model = get_peft_model(OneLinear(256, 64, dtype=torch.bfloat16), config).train()
    weights = {name.rsplit(".", 1)[-1]: p.data for name, p in model.named_parameters() if p.requires_grad}
    weights["B"].fill_(1.0)
    x, gates = 4 * torch.eye(256, dtype=torch.bfloat16), []
    with headwater.observe(model, lambda name, gate: gates.append(gate)):
        kept = (model(x) != model.get_base_model().layer.get_base_layer()(x)).any(-1)
    assert 0.3 < kept.float().mean() < 0.7
    expected = chosen_by(8 * weights["router"].T, 8)
    assert torch.equal((gates[0] != 0)[kept], expected[kept])
    assert len({tuple(row) for row in (gates[0] != 0)[~kept].tolist()}) == 1, "a choice without anything to choose by"


@pytest.mark.parametrize("method", ["moe_lora", "malora", "cond_mixlora"])
def test_routers_see_x_without_the_dropout_that_experts_have(method):
    fields = METHODS.get(method, {"r": 4, "num_factors": 16})
    config = headwater.make_config(method, target_modules=["layer"], lora_dropout=0.5, init_seed=0, **fields)
    model, x = get_peft_model(OneLinear(64, 16), config), noise(6, 20, 64, dtype=torch.float32)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data.normal_()
    gates, outputs = [], []
    for training in (True, False):
        with headwater.observe(model, lambda name, gate: gates.append(gate)):
            outputs.append(model.train(training)(x))
    torch.testing.assert_close(gates[0], gates[1], rtol=1e-4, atol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 1, "nothing was dropped, so this shows nothing"


@pytest.mark.parametrize("case", ["autocast, scored", "autocast, trained", "bfloat16 adapter"])
@pytest.mark.parametrize("method", ["moe_lora", "mtl_lora"])
def test_what_a_task_chooses_is_computed_in_float32(method, case):
    """So that what is trained is what is scored, and both are what `merge_task` merges."""
    own = {"router": "task", "num_experts": 8, "top_k": 2} if method == "moe_lora" else {"num_heads": 8}
    config = headwater.make_config(method, target_modules=["layer"], num_tasks=40, init_seed=0, **own)
    half, scored = case == "bfloat16 adapter", case != "autocast, trained"
    base = OneLinear(16, 8, dtype=torch.bfloat16 if half else torch.float32)
    model = get_peft_model(base, config, autocast_adapter_dtype=not half).train(not scored)
    held = {name.rsplit(".", 1)[-1]: p.detach().double() for name, p in model.named_parameters()}
    gates = []
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=not half),
        headwater.observe(model, lambda name, gate: gates.append(gate)),
        torch.set_grad_enabled(not scored),
    ):
        model(noise(40, 1, 16, dtype=base.layer.weight.dtype), headwater_task_ids=torch.arange(40))
    if method == "moe_lora":
        p = torch.softmax(held["task_embedding"] @ held["task_gate"].T, -1)
        kept = p.topk(2, -1)
        expected = torch.zeros_like(p).scatter(-1, kept.indices, kept.values / kept.values.sum(-1, keepdim=True))
    else:
        expected = torch.softmax(held["w"] / 0.1, -1)
    torch.testing.assert_close(gates[0][:, 0].double(), expected, rtol=1e-5, atol=1e-6)
