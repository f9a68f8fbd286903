"""What may happen to a model between a forward and its backward, and what is refused."""

from __future__ import annotations

import pytest
import torch

from .helpers import adapt, assert_same, config, gradients, train_loss


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
    torch.manual_seed(0)
    train_loss(row, model).backward()
    expected = gradients(model)
    model.zero_grad()
    torch.manual_seed(0)
    loss = train_loss(row, model)
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
    torch.manual_seed(0)
    train_loss(row, model).backward()
    expected = gradients(model)
    model.zero_grad()
    torch.manual_seed(0)
    loss = train_loss(row, model)
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
