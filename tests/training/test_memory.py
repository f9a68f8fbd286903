"""What a forward keeps for its backward is counted once per storage, and does not change what is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headwater.training.memory import SavedBytes


def test_a_storage_counts_once_and_parameters_not_at_all():
    layer = nn.Linear(3, 5, bias=False)
    x = torch.randn(7, 3)
    with SavedBytes(layer) as saved:
        y = layer(x)  # keeps x for the weight's gradient
        z = y * y  # keeps y, twice
        z.view(-1).exp()  # keeps its result
    assert saved.total == 4 * (7 * 3 + 7 * 5 + 7 * 5)


def test_frozen_parts_keep_nothing():
    layer = nn.Linear(3, 5).requires_grad_(False)
    with SavedBytes(layer) as saved:
        layer(torch.randn(7, 3))
    assert saved.total == 0


def test_gradients_are_those_without_counting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
    x = torch.randn(4, 3)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with SavedBytes(model):
        loss = model(x).square().sum()
    loss.backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0)


def test_an_error_inside_takes_the_hooks_away():
    with pytest.raises(ZeroDivisionError), SavedBytes(nn.Linear(1, 1)) as saved:
        raise ZeroDivisionError
    before = saved.total
    torch.randn(3, requires_grad=True).exp()
    assert saved.total == before == 0
