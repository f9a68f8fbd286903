"""The fused layer, one autograd function for every method, against plain autograd through the same equations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import headwater
from headwater.methods.base import Branch
from headwater.ops.replayed import Replayed
from headwater.tuner import MethodLayer, context_of

from .helpers import adapt, assert_near, assert_same, gradients, layer_output, task_kwargs, tokens
from .rows import BY_ID, Row


def step(row: Row, model: nn.Module, monkeypatch, ops: str | None, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Logits, every gradient (also the embedding's output's) and the logged losses of one training step."""
    if ops is None:
        monkeypatch.delenv("HEADWATER_OPS", raising=False)
    else:
        monkeypatch.setenv("HEADWATER_OPS", ops)
    model.zero_grad()
    torch.manual_seed(0)
    embedded = model.get_input_embeddings()(tokens(rows=3)).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(inputs_embeds=embedded, labels=tokens(rows=3), **task_kwargs(row, 3))
    out.loss.backward()
    losses = {f"loss {name}": value for name, value in context_of(model).last_losses.items()}
    return {"logits": out.logits.detach(), "x": embedded.grad, **gradients(model), **losses}


@pytest.mark.parametrize("how", ["block", "layers", "alphas apart"])
def test_values_and_gradients_are_those_of_plain_autograd(row, tiny_llama, monkeypatch, how):
    """In float64, to rounding. Dropout on: the masks are the same."""
    fields = {"alpha_pattern": {"gate_proj": 5}} if how == "alphas apart" else {}
    model = adapt(row, tiny_llama().double(), autocast=False, **fields).double().train()
    if how == "layers":
        watch(model)
    expected = step(row, model, monkeypatch, "reference")
    found = step(row, model, monkeypatch, None)
    assert_near(found, expected, relative=1e-9)
    assert all(value.abs().max() > 0 for name, value in found.items() if name.endswith((".A", ".S")))


@pytest.mark.parametrize("shape", [(24,), (2, 12), (2, 3, 4)], ids=str)
def test_any_leading_shape_computes_the_same(row, tiny_llama, shape):
    if row.needs_task_ids or row.name == "cond_mixlora":
        pytest.skip("goes by rows, which one layer alone does not show")
    model = adapt(row, tiny_llama())
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    values, weight = (torch.randn(24, size, generator=torch.Generator().manual_seed(size)) for size in (32, 48))
    found = []
    for lead in ((24,), shape):
        x = values.view(*lead, 32).clone().requires_grad_()
        y = layer(x)
        assert y.shape == (*lead, 48)
        model.zero_grad()
        (y * weight.view_as(y)).sum().backward()
        found.append({"x": x.grad.view(24, 32), "y": y.detach().view(24, 48), **gradients(model)})
    assert found[0]["y"].abs().max() > 0
    assert_near(found[1], found[0], relative=1e-6)


UNMIXED = ["multilora", "cora", "lori", "lori-sparse", "cola"]


@pytest.mark.parametrize("row_id", UNMIXED)
@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_to_mix_is_what_replaying_it_gives(row_id, autocast, tiny_llama, monkeypatch):
    """To the bit; and it is not replayed."""
    row = BY_ID[row_id]
    model = adapt(row, tiny_llama()).train()
    kind, replayed = type(next(m for m in model.modules() if isinstance(m, Branch))), []
    monkeypatch.setattr(Replayed, "_pull", counted(Replayed._pull, replayed))
    found = step(row, model, monkeypatch, None, autocast=autocast)
    assert not replayed
    monkeypatch.setattr(kind, "unmixed", False)
    expected = step(row, model, monkeypatch, None, autocast=autocast)
    assert len(replayed) == len([m for m in model.modules() if isinstance(m, MethodLayer)])
    assert_same(found, expected)


@pytest.mark.parametrize("row_id", UNMIXED)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_nothing_to_mix_is_scaled_as_it_should_be(row_id, dropout, tiny_llama, monkeypatch):
    """Also what reads x without dropout: a chain's earlier link."""
    row = BY_ID[row_id]
    fields = {"lora_dropout": dropout, "alpha_pattern": {"gate_proj": 5, "down_proj": 7}}
    model = adapt(row, tiny_llama().double(), autocast=False, **fields).double().train()
    for name, buffer in model.named_buffers():
        if name.endswith("_tied"):
            nn.init.normal_(buffer)
    expected = step(row, model, monkeypatch, "reference")
    assert_near(step(row, model, monkeypatch, None), expected, relative=1e-9)


def test_a_layer_that_gets_no_tokens(row, tiny_llama):
    """As an expert that nobody was sent to."""
    if row.needs_task_ids or row.name == "cond_mixlora":
        pytest.skip("knows whose row a token is")
    layer = next(m for m in adapt(row, tiny_llama()).train().modules() if isinstance(m, MethodLayer))
    x = torch.randn(0, layer.base_layer.in_features, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.shape, x.grad.shape) == ((0, layer.base_layer.out_features), x.shape)
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


def counted(function, calls):
    def run(*args):
        calls.append(args)
        return function(*args)

    return run


def watch(model: nn.Module) -> None:
    """Puts a hook on every adapted layer, so that each runs by itself."""
    for module in model.modules():
        if isinstance(module, MethodLayer):
            module.register_forward_hook(lambda *_: None)


def distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> torch.Tensor:
    """Relative differences, one for each tensor that is not zero."""
    assert found.keys() == exact.keys()
    pairs = [(found[name].double(), value.double()) for name, value in exact.items() if value.any()]
    return torch.stack([(got - value).norm() / value.norm() for got, value in pairs])


def test_in_float32_one_layer_is_within_5e6_of_float64(row, tiny_llama, monkeypatch):
    """Or within twice what plain autograd rounds, where a gradient is a small difference of large numbers."""
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    v = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1))

    def run(dtype, ops):
        model = adapt(row, tiny_llama().to(dtype), autocast=False, **row.smooth).to(dtype).train()
        step(row, model, monkeypatch, ops)
        model.zero_grad()
        torch.manual_seed(0)
        leaf = x.to(dtype).requires_grad_()
        y = layer_output(row, model, "model.layers.0.mlp.up_proj", leaf)
        (y * v).sum().backward()
        return {"y": y.detach(), "x": leaf.grad, **gradients(model)}

    exact = run(torch.float64, "reference")
    fused, plain = (distance(run(torch.float32, ops), exact) for ops in (None, "reference"))
    assert (fused <= (2 * plain).clamp_min(5e-6)).all(), (fused, plain)


def test_autocast_is_about_as_near_to_float32_as_plain_autograd_is(row, tiny_llama, monkeypatch):
    all_experts = {"top_k": 0, "balance_loss": "none"} if row.name in ("moe_lora", "malora") else {}
    if row.name in ("smora", "cond_mixlora"):
        pytest.skip("another top-k is another function")
    model = adapt(row, tiny_llama(num_hidden_layers=1), **row.smooth | all_experts).train()
    exact = step(row, model, monkeypatch, "reference")
    plain, fused = (step(row, model, monkeypatch, ops, autocast=True) for ops in ("reference", None))
    assert {name: value.dtype for name, value in fused.items()} == {name: value.dtype for name, value in plain.items()}
    assert distance(fused, exact).mean() < 1.5 * distance(plain, exact).mean()


def test_several_active_adapters(tiny_llama, monkeypatch):
    row = BY_ID["rlora"]
    model = adapt(row, tiny_llama().double(), autocast=False)
    model.add_adapter("second", headwater.make_config("rlora", r=2, target_modules=["up_proj"], init_seed=5))
    model.base_model.set_adapter(["default", "second"])
    model = model.double().train()
    found, expected = (step(row, model, monkeypatch, ops) for ops in (None, "reference"))
    assert any("second" in name for name in found)
    assert_near(found, expected, relative=1e-9)


@pytest.mark.parametrize("fields", [{}, {"detach_input": True}, {"kind": "mmd"}])
def test_the_alignment_loss_comes_along(tiny_llama, monkeypatch, fields):
    row = BY_ID["rlora"]
    model = adapt(row, tiny_llama().double(), autocast=False).double().train()
    headwater.align(model, weight=3.0, **fields)

    def run(ops):
        with headwater.task_ids(model, [0, 0, 1]):
            return step(row, model, monkeypatch, ops)

    assert_near(run(None), run("reference"), relative=1e-9)


@pytest.mark.parametrize("method", ["rlora", "hydralora", "mlora"])
def test_a_width_whose_masks_do_not_fill_bytes(method, monkeypatch):
    from peft import get_peft_model

    fields = {"r": 2, "num_heads": 3, "lora_dropout": 0.3, "target_modules": ["layer"], "init_seed": 0}
    model = get_peft_model(Linear(13, 9), headwater.make_config(method, **fields), autocast_adapter_dtype=False)
    model = model.double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    results = []
    for ops in ("reference", "autograd"):
        monkeypatch.setenv("HEADWATER_OPS", ops)
        torch.manual_seed(0)
        x = torch.randn(5, 7, 13, dtype=torch.float64).requires_grad_()
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        results.append({"y": y.detach(), "x": x.grad, **gradients(model)})
    assert_near(results[1], results[0], relative=1e-9)


@pytest.mark.parametrize("fields", [{}, {"input_dropout": "per_head"}])
def test_masks_on_x_are_the_same_block_by_block(fields, tiny_llama, monkeypatch):
    monkeypatch.setattr("headwater.ops.adapter.BLOCK", 100)
    row = BY_ID["hydralora"]
    model = adapt(row, tiny_llama().double(), autocast=False, lora_dropout=0.3, **fields).double().train()
    found, expected = (step(row, model, monkeypatch, ops) for ops in (None, "reference"))
    assert_near(found, expected, relative=1e-9)


class Linear(nn.Module):
    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.layer = nn.Linear(d_in, d_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def saved_bytes(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, model: nn.Module) -> int:
    """Memory kept for backward of `function(x)` that is no parameter or buffer of the model; x itself counts."""
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(x)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("method", ["rlora", "hydralora", "mlora"])
@pytest.mark.parametrize(("d_in", "d_out"), [(896, 4864), (4864, 896), (640, 2048)])
def test_saved_for_backward_is_little_more_than_the_input(method, d_in, d_out):
    from peft import get_peft_model

    dropout = {"lora_dropout": 0.1} if method == "hydralora" else {"head_dropout": 0.1}
    config = headwater.make_config(method, r=8, num_heads=3, target_modules=["layer"], **dropout)
    model = get_peft_model(Linear(d_in, d_out), config).train()
    x = torch.randn(64, d_in, requires_grad=True)
    assert saved_bytes(model, x, model) <= 1.05 * x.nbytes


def test_two_matmuls_of_the_models_width_and_six_thin_ones():
    """Counted, not timed: what a training step of one R-LoRA layer does beyond the frozen layer."""
    from peft import get_peft_model
    from torch.utils.flop_counter import FlopCounterMode, addmm_flop

    T, d_in, d_out, r, N = 128, 96, 160, 4, 3
    config = headwater.make_config("rlora", r=r, num_heads=N, target_modules=["layer"])
    model = get_peft_model(Linear(d_in, d_out), config).train()
    x = torch.randn(T, d_in, requires_grad=True)
    in_place = {torch.ops.aten.addmm_: lambda *shapes, **_: addmm_flop(*shapes[:3])}  # not counted by itself
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(x).sum().backward()
    wide = 2 * (2 * T * d_in * d_out)
    reads, trained, writes = r + N + r, r + N, N * r + r  # the start's A0 and B0 included
    thin = 2 * T * ((reads + reads + trained) * d_in + (writes + writes + N * r) * d_out)
    assert counter.get_total_flops() == wide + thin


def test_backward_shows_and_counts_nothing_a_second_time(tiny_llama):
    """A layer run by itself, without a model's forward round it that would tell the two runs of `mix` apart."""
    model, seen = adapt(BY_ID["smora"], tiny_llama()).train(), []
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    with headwater.observe(model, lambda name, gate: seen.append(name)):
        layer(torch.randn(40, 32)).sum().backward()
    assert len(seen) == 1
    branch = layer.branches["default"]
    assert branch.counts.sum() == 40 * branch.k
