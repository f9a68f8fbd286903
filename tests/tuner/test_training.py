"""Gradients: with checkpointing, with several forwards before one backward, compiled, and from several threads."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import headwater
from headwater.tuner import MethodLayer, context_of

from .helpers import adapt, assert_same, gradients, layer_output, logits, stir, task_kwargs, tokens, train_loss
from .rows import Row


def checkpointing(model: nn.Module, mode: str) -> None:
    """mode: "none", "reentrant" or "non-reentrant"."""
    if mode != "none":
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        model.enable_input_require_grads()


def recomputed(row: Row) -> dict[str, float]:
    """How near gradients come under reentrant checkpointing."""
    return {} if row.exact_recomputation else {"atol": 1e-6, "rtol": 1e-5}


def count_layer_runs(model: nn.Module) -> list[str]:
    """Grows by a name whenever an adapted layer runs, recomputation included."""
    runs: list[str] = []
    for module in model.modules():
        if isinstance(module, MethodLayer):
            module.register_forward_pre_hook(lambda m, args: runs.append(m.name))
    return runs


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_no_gradient(row, tiny_llama, mode):
    """Two forwards with other tokens and tasks, dropout on, then one backward: bit-equal to the run without."""
    near = {} if mode == "non-reentrant" else recomputed(row)

    def run(mode):
        model = adapt(row, tiny_llama()).train()
        checkpointing(model, mode)
        runs = count_layer_runs(model)
        torch.manual_seed(3)
        losses = [train_loss(row, model, seed=n, first_task=n) for n in range(2)]
        sum(losses).backward()
        return {**gradients(model), "losses": torch.stack(losses).detach()}, len(runs)

    expected, runs = run("none")
    found, runs_with = run(mode)
    assert (runs, runs_with) == (12, 24), "nothing was recomputed, so this test shows nothing"
    assert_same(found, expected, **near)
    assert all(g.abs().max() > 0 for name, g in found.items() if name.endswith(".A"))


def test_dropout_masks_are_drawn_anew_and_follow_the_seed(row, tiny_llama):
    model = adapt(row, tiny_llama()).train()
    torch.manual_seed(0)
    first, second = logits(row, model), logits(row, model)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(logits(row, model), first)
    still = adapt(row, tiny_llama(), **row.no_dropout).train()
    torch.testing.assert_close(logits(row, still), logits(row, still.eval()), atol=1e-4, rtol=1e-4)


def test_two_forwards_before_one_backward_equal_two_backwards(row, tiny_llama):
    def losses(model):
        return [train_loss(row, model, seed=n, first_task=n) for n in range(2)]

    model = adapt(row, tiny_llama(), **row.no_dropout).train()
    sum(losses(model)).backward()
    together = gradients(model)
    model.zero_grad()
    for n in range(2):
        train_loss(row, model, seed=n, first_task=n).backward()
    assert_same(gradients(model), together, atol=1e-6, rtol=1e-4)


def test_gradients_are_those_of_finite_differences(row, tiny_llama):
    """One layer in float64: the slope along each parameter's gradient is that gradient's length."""
    model = adapt(row, tiny_llama().double(), **row.no_dropout, **row.smooth).double()
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(2, 7, width, generator=generator, dtype=torch.float64) for width in (32, 48))
    x.requires_grad_()

    def value():
        return (layer_output(row, model, "model.layers.0.mlp.up_proj", x) * weight).sum()

    value().backward()
    checked = {"x": x, **{n: p for n, p in model.named_parameters() if "layers.0.mlp.up_proj" in n and p.requires_grad}}
    assert len(checked) > 1
    for name, tensor in checked.items():
        length, step = tensor.grad.norm(), 1e-5
        if length == 0:
            assert row.id == "rlora-one-head"
            assert "router" in name
            continue
        with torch.no_grad():
            tensor.add_(step * tensor.grad / length)
            up = value()
            tensor.sub_(2 * step * tensor.grad / length)
            down = value()
            tensor.add_(step * tensor.grad / length)
        torch.testing.assert_close((up - down) / (2 * step), length, atol=1e-8, rtol=1e-6, msg=lambda m, n=name: n + m)


def test_compiled_training_step_has_no_graph_break(row, tiny_llama):
    x = tokens()

    def run(compiled):
        model = adapt(row, tiny_llama(num_hidden_layers=1, attn_implementation="sdpa"), **row.no_dropout).train()
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        loss = forward(input_ids=x, labels=x, **task_kwargs(row)).loss
        loss.backward()
        return {**gradients(model), "loss": loss.detach()}

    torch._dynamo.reset()
    assert_same(run(compiled=True), run(compiled=False), atol=1e-6, rtol=1e-4)


def test_threads_keep_their_task_ids_apart(row, tiny_llama):
    model = adapt(row, tiny_llama())

    def alone(task):
        with torch.no_grad(), headwater.task_ids(model, task):
            return model(input_ids=tokens(seed=task)).logits

    expected = [alone(task) for task in range(3)]
    if row.needs_task_ids:
        with torch.no_grad(), headwater.task_ids(model, 1):
            assert not torch.equal(model(input_ids=tokens(seed=0)).logits, expected[0])
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(alone, [0, 1, 2] * 6))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(logit, expected[n % 3]) for n, logit in enumerate(found))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_whole_and_independent(row, tiny_llama, how):
    model = adapt(row, tiny_llama())
    expected = logits(row, model)
    twin = how(model)
    assert torch.equal(logits(row, twin), expected)
    stir(twin, seed=5)
    assert torch.equal(logits(row, model), expected)
    assert not torch.equal(logits(row, twin), expected)
    assert context_of(twin) is not context_of(model)
    assert len({id(m.context) for m in twin.modules() if isinstance(m, MethodLayer)}) == 1

    twin = how(model).train()
    checkpointing(twin, "reentrant")
    torch.manual_seed(0)
    train_loss(row, twin, first_task=1).backward()
    torch.manual_seed(0)
    train_loss(row, model.train(), first_task=1).backward()
    assert_same(gradients(twin), gradients(model), **recomputed(row))
    twin.unload()
    assert torch.equal(logits(row, model.eval()), expected)
