"""What may happen to a model between a forward and its backward, and what is refused."""

from __future__ import annotations

import pytest
import torch

from .helpers import adapt, assert_same, config, gradients, task_kwargs, tokens, train_loss


def gradients_and_loss(row, model):
    """The gradients of a step, and the loss of the same step before its backward."""
    torch.manual_seed(0)
    train_loss(row, model).backward()
    expected = gradients(model)
    model.zero_grad()
    torch.manual_seed(0)
    return expected, train_loss(row, model)


def test_the_mode_is_that_of_the_forward(row, tiny_llama):
    """A model that is evaluated before its backward keeps auxiliary losses and dropout."""
    model = adapt(row, tiny_llama()).train()
    found = []
    for mode in (True, False):
        model.zero_grad()
        torch.manual_seed(0)
        loss = train_loss(row, model.train())
        model.train(mode)
        loss.backward()
        found.append(gradients(model))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("how", ["frozen", "switched"])
def test_what_is_not_trained_any_more_gets_nothing(how, row, tiny_llama):
    """PEFT freezes an adapter when another one becomes the active one. Others get what they would."""
    model = adapt(row, tiny_llama()).train()
    if how == "switched":
        model.add_adapter("other", config(row, tiny_llama()))
    expected, loss = gradients_and_loss(row, model)
    if how == "switched":
        model.set_adapter("other")
    else:
        for parameter in list(model.parameters())[::2]:
            parameter.requires_grad_(False)
    loss.backward()
    left = {name for name, p in model.named_parameters() if p.requires_grad}
    assert_same(gradients(model), {name: g for name, g in expected.items() if name in left})


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_it_is_of_the_weights_of_the_forward_or_refused(base, row, tiny_llama):
    """As autograd's own is; a step of an optimiser in between would else give gradients of no weights at all."""
    model = adapt(row, tiny_llama().to(base)).train()
    expected, loss = gradients_and_loss(row, model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017, either will do
    else:
        assert_same(gradients(model), expected)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_it_is_of_the_parameters_that_took_part_in_the_forward_alone(base, row, tiny_llama):
    """`torch.func.functional_call`, as where another network makes them."""
    model = adapt(row, tiny_llama().to(base)).train()
    others = {n: (1.5 * p).detach().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(0)
    x = {"input_ids": tokens(), "labels": tokens(), **task_kwargs(row)}
    loss = torch.func.functional_call(model, others, (), x).loss
    found = torch.autograd.grad(loss, list(others.values()), allow_unused=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(others.get(name, parameter))
    torch.manual_seed(0)
    train_loss(row, model).backward()
    assert_same({name: g for name, g in zip(others, found, strict=True) if g is not None}, gradients(model))


def test_a_parameters_hook_runs_once_on_its_whole_gradient(row, tiny_llama):
    model = adapt(row, tiny_llama()).train()
    found = []
    for factor in (1, 2):
        model.zero_grad()
        hooks = [p.register_hook(lambda g, c=factor: c * g) for p in model.parameters() if p.requires_grad]
        torch.manual_seed(0)
        train_loss(row, model).backward()
        found.append(gradients(model))
        for hook in hooks:
            hook.remove()
    assert_same(found[1], {name: 2 * g for name, g in found[0].items()})
