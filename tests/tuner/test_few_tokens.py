"""Decoding: gated heads in few calls on copies of the weights, which must never be old ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import headwater

from .helpers import adapt, layer_output, stir
from .rows import BY_ID

NAME = "model.layers.0.mlp.up_proj"
ROWS = ["rlora", "rlora-center-kaiming", "rlora-one-head", "hydralora", "mlora"]


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def made(row_id, tiny_llama):
    model = adapt(BY_ID[row_id], tiny_llama().double(), autocast=False).double().eval()
    return model, model.get_submodule(f"base_model.model.{NAME}")


def expected(layer, x):
    """The same tokens among many, where nothing is kept."""
    with torch.no_grad():
        return layer(x.repeat(20, 1))[: x.shape[0]]


def check(layer, x):
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer(x), found := layer(x), rtol=0, atol=0)
    torch.testing.assert_close(found, expected(layer, x), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        layer(x)  # kept again, for what follows


@pytest.mark.parametrize("row_id", ROWS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_few_tokens_are_what_they_are_among_many(row_id, tiny_llama, tokens):
    _, layer = made(row_id, tiny_llama)
    x = torch.randn(tokens, 32, dtype=torch.float64)
    check(layer, x)
    assert layer.branch("default")._few
    assert (expected(layer, x) - layer.base_layer(x)).abs().max() > 0.1


@pytest.mark.parametrize("row_id", ROWS)
def test_no_write_is_missed(row_id, tiny_llama):
    model, layer = made(row_id, tiny_llama)
    x, branch = torch.randn(2, 32, dtype=torch.float64), layer.branch("default")
    check(layer, x)
    for name, tensor in [*branch.named_parameters(), *branch.named_buffers()]:
        before = expected(layer, x)
        with torch.no_grad():
            layer(x)
            tensor.add_(torch.randn_like(tensor))  # as an optimiser does
            assert not torch.equal(layer(x), before), name
        check(layer, x)
        tensor.data = tensor.data + 1.0  # as `to` does
        check(layer, x)
        tensor.data.mul_(0.5)  # PyTorch does not see this one; the next prompt does
        check_after_prompt = expected(layer, x)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), check_after_prompt, rtol=1e-10, atol=1e-10)
    stir(model, seed=3)
    check(layer, x)


def test_a_training_step_drops_what_is_kept(tiny_llama):
    model, layer = made("rlora", tiny_llama)
    x, branch = torch.randn(2, 32, dtype=torch.float64), layer.branch("default")
    for run in (lambda: layer(x), lambda: layer_output(BY_ID["rlora"], model, NAME, x.unsqueeze(0))):
        check(layer, x)
        assert branch._few
        model.train()
        run()  # the second through the whole gated block
        model.eval()
        assert not branch._few


def test_copies_and_pickles_keep_nothing(tiny_llama):
    _, layer = made("rlora", tiny_llama)
    branch = layer.branch("default")
    check(layer, torch.randn(1, 32, dtype=torch.float64))
    assert branch._few
    assert not copy.deepcopy(branch)._few
    assert not pickle.loads(pickle.dumps(branch))._few


def test_observers_see_every_token(tiny_llama):
    model, layer = made("rlora", tiny_llama)
    x, seen = torch.randn(1, 32, dtype=torch.float64), []
    check(layer, x)
    with headwater.observe(model, lambda name, gate: seen.append(gate)), torch.no_grad():
        layer(x)
        layer(x)
    assert len(seen) == 2


@pytest.mark.parametrize(("row_id", "most"), [("rlora", 20), ("hydralora", 17), ("mlora", 6)])
def test_calls_for_one_token(row_id, most, tiny_llama):
    """Counted, not timed: what a decoded token costs beyond the frozen layer; views count, too."""
    _, layer = made(row_id, tiny_llama)
    x = torch.randn(1, 32, dtype=torch.float64)

    def calls(function):
        with torch.inference_mode(), Calls() as counter:
            function(x)
        return counter.count

    calls(layer)
    assert calls(layer) - calls(layer.base_layer) <= most
