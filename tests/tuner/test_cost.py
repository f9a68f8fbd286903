"""Heads, experts and tasks are nearly free: no loop over them, no wide tensor for each. Counted, not timed."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .helpers import LAYERS, adapt, layer_output
from .rows import ROWS

NAME = "model.layers.0.mlp.up_proj"
d_in, d_out = LAYERS[NAME]


class Counting(TorchDispatchMode):
    """The size of every new tensor that an operation makes; views are left out."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)}
        for made in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(made) and made.untyped_storage().data_ptr() not in held:
                self.sizes.append(made.numel())
        return result


def sizes(row, tiny_llama, *, rows=2, length=64, train=False, **fields):
    """Sizes of the tensors that one adapted layer's forward makes; it has `rows * length` tokens."""
    model = adapt(row, tiny_llama(), **row.no_dropout, **fields).train(train)
    layer, counting = model.get_submodule(f"base_model.model.{NAME}"), Counting()
    x = torch.randn(rows, length, d_in, generator=torch.Generator().manual_seed(0))
    layer_output(row, model, NAME, x)  # what is made once, at the first forward, is not counted
    layer.register_forward_pre_hook(lambda *_: counting.__enter__() and None, prepend=True)
    layer.register_forward_hook(lambda *_: counting.__exit__(None, None, None), prepend=True, always_call=True)
    layer_output(row, model, NAME, x)
    assert len(counting.sizes) > 1
    return counting.sizes


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_no_tensor_is_wider_than_the_layer_and_few_are_as_wide(row, tiny_llama, train):
    """The base layer's output, the sum, and at most one more; a loop over heads would make one for each."""
    found = sizes(row, tiny_llama, train=train)
    assert max(found) <= 128 * d_out
    assert sum(size >= 128 * d_in for size in found) <= 3


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_the_number_of_operations_does_not_grow_with_heads_experts_or_tokens(row, tiny_llama, train):
    few = sizes(row, tiny_llama, train=train)
    assert len(sizes(row, tiny_llama, train=train, **row.wider)) == len(few)
    assert len(sizes(row, tiny_llama, train=train, rows=4, length=96)) == len(few)


def test_tasks_are_free(tiny_llama):
    by_task = [row for row in ROWS if row.needs_task_ids and "num_tasks" in row.fields]
    assert len(by_task) >= 2
    for row in by_task:
        few = sizes(row, tiny_llama)
        assert sizes(row, tiny_llama, num_tasks=40) == few
