"""The host runs ahead of an accelerator, until something reads a number back or copies one there: that waits for it.

A CPU makes the same calls, so they are counted. What a model of four layers does more often than one of two is done in
every layer. The meta device also takes the way of an accelerator where that is another one than a CPU's.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

import headwater
from headwater.methods.call import Packed
from headwater.tuner import context_of

from .helpers import TARGETS, adapt, task_kwargs, tokens
from .rows import BY_ID

aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.bincount)
CALLS = (torch.tensor, Tensor.tolist, Tensor.numpy, Tensor.cpu)  # no operation of their own tells of these


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        unsized = function is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        by_mask = function is aten.index.Tensor and any(t is not None and t.dtype == torch.bool for t in args[1])
        if function.overloadpacket in READS or unsized or by_mask:
            self.found[str(function)] += 1
            if given[0].is_meta:
                return 1  # of transformers, which asks whether rows are packed
        made = function(*args, **kwargs)
        if len({t.device for t in (*given, *tree_leaves(made)) if isinstance(t, Tensor) and t.dim()}) > 1:
            self.found["copy"] += 1
        return made


class _Calls(TorchFunctionMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in CALLS:
            self.found[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def waits(run) -> Counter[str]:
    """What `run` does that waits for an accelerator, and how often."""
    found: Counter[str] = Counter()
    with _Operations(found), _Calls(found):
        run()
    return found


def in_each_layer(make, *, first=lambda model: None, run) -> Counter[str]:
    """What `run(model, first(model))` does more often in `make(4)`, a model of four layers, than in one of two."""
    counts = []
    for layers in (2, 4):
        model = make(layers)
        before = first(model)
        counts.append(waits(lambda m=model, b=before: run(m, b)))
    return counts[1] - counts[0]


def maker(row, tiny_llama, device="cpu", align=None, **fields):
    def make(layers):
        base = tiny_llama(num_hidden_layers=layers)
        model = adapt(row, base, target_modules=["q_proj", "v_proj", *TARGETS], **fields).train()
        if align:
            headwater.align(model, **align)
        return model.to(device)

    return make


def train(row, model):
    x = tokens(rows=4, length=9).to(next(model.parameters()).device)
    model(input_ids=x, labels=x, use_cache=False, **task_kwargs(row, 4)).loss.backward()


def test_no_layer_waits_in_training(row, tiny_llama):
    make = maker(row, tiny_llama, **row.no_dropout)  # a CPU reads the masks' seeds, an accelerator does not
    found = in_each_layer(make, first=lambda model: train(row, model), run=lambda model, _: train(row, model))
    assert not found


LOCALIZED = {"balance_loss": "localized", "task_types": [1, 0, 0]}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("cola", {"mode": "fold"}),
        ("cola", {"alpha_mode": "fixed_alpha"}),
        ("moe_lora", LOCALIZED),
        ("rlora", {"align": {"kind": "kl"}}),
        ("rlora", {"align": {"kind": "mmd"}}),
        ("rlora", {"align": {"token_mode": "per_position"}}),
    ],
)
def test_nor_does_one_with_other_settings(name, how, tiny_llama):
    row = dataclasses.replace(BY_ID[name], needs_task_ids=True)
    make = maker(row, tiny_llama, **row.no_dropout, **how)
    found = in_each_layer(make, first=lambda model: train(row, model), run=lambda model, _: train(row, model))
    assert not found


def test_no_layer_waits_on_another_device(row, tiny_llama, monkeypatch):
    """With dropout, and task ids that come on the CPU."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # unknown to the meta device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    assert not in_each_layer(maker(row, tiny_llama, "meta"), run=lambda model, _: train(row, model))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_no_layer_waits_for_a_decoded_token(row, tiny_llama, cache):
    def decode(model, cache):
        with torch.no_grad():
            model(input_ids=tokens(length=1), past_key_values=cache, **task_kwargs(row))

    def begin(model):
        config = model.eval().config
        made = DynamicCache() if cache == "dynamic" else StaticCache(config=config, max_cache_len=32)
        with torch.no_grad():
            model(input_ids=tokens(), past_key_values=made, **task_kwargs(row))
        for _ in range(3):  # what is held is made
            decode(model, made)
        return made

    found = in_each_layer(maker(row, tiny_llama), first=begin, run=decode)
    assert not found


def test_ids_are_checked_where_they_are_and_then_moved(tiny_llama):
    model = adapt(BY_ID["mtl_lora"], tiny_llama())
    context = context_of(model)
    x = tokens().to("meta")
    context.open(model, (), {"input_ids": x, "headwater_task_ids": torch.tensor([0, 2])})
    assert context.state.task_ids.device == x.device
    assert context.state.task_range == (0, 2)


def test_packed_rows_are_told_apart_without_knowing_values():
    assert [t.shape for t in Packed((3, 1, 2)).on(torch.device("meta"))] == [(6,), (6,)]
    row, place = Packed((3, 1, 2)).on(torch.device("cpu"))
    assert row.tolist() == [0, 0, 0, 1, 2, 2]
    assert place.tolist() == [0, 1, 2, 3, 6, 7]
