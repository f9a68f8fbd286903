"""An attached loss must act as if it had been added to the training loss, whatever that is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from headwater.ops import attach_loss, following


def gradient(weight: torch.Tensor, run) -> torch.Tensor:
    leaf = weight.clone().requires_grad_()
    run(leaf).backward()
    return leaf.grad


@settings(max_examples=25, deadline=None)
@given(factor=st.sampled_from([0.0, 1e-3, 1.0, -7.0]), count=st.integers(0, 3), seed=st.integers(0, 1000))
def test_gradient_is_that_of_the_sum_of_losses(factor, count, seed):
    weight = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def losses(w):
        return [(w**2).sum() * 0.3, w.sin().sum(), (w[0] * w[1]).exp()][:count]

    def attached(w):
        y = w * 2
        for loss in losses(w):
            y = attach_loss(y, loss)
        return factor * y.cos().sum()

    def added(w):
        return factor * (w * 2).cos().sum() + sum(losses(w))

    torch.testing.assert_close(gradient(weight, attached), gradient(weight, added), rtol=1e-12, atol=1e-12)


def test_value_shape_and_dtype_are_untouched():
    y = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
    loss = torch.tensor(2.0, requires_grad=True)
    out = attach_loss(y, loss)
    assert torch.equal(out, y)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert loss.grad == 1
    assert torch.equal(y.grad, torch.ones_like(y))


def test_a_following_loss_learns_its_gradient_in_backward():
    loss, factor = torch.tensor(2.0, requires_grad=True), []
    y = attach_loss(torch.ones(2, requires_grad=True), following(loss * 3, lambda: factor[0]))
    factor.append(0.5)
    y.sum().backward()
    assert loss.grad == 1.5


def test_without_a_backward_pass_nothing_happens():
    loss = torch.tensor(2.0, requires_grad=True)
    with torch.no_grad():
        assert not attach_loss(torch.ones(2), loss).requires_grad
    assert loss.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_survives_gradient_checkpointing_and_counts_once(reentrant):
    weight = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def layer(x, w):
        y = x * w
        return attach_loss(y, (y**2).mean())

    def checkpointed(w):
        y = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
        for _ in range(2):
            y = checkpoint(layer, y, w, use_reentrant=reentrant)
        return y.sum()

    def added(w):
        y = torch.ones(3, 4, dtype=torch.float64) * w
        return (y * w).sum() + (y**2).mean() + ((y * w) ** 2).mean()

    torch.testing.assert_close(gradient(weight, checkpointed), gradient(weight, added), rtol=1e-12, atol=1e-12)
