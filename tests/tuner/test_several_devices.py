"""A model spread over two GPUs: what a layer gets of the forward lies on the first one, the layer on the second.

PyTorch's fake tensors have devices, and mind them, but no numbers.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from headwater.evaluation.likelihood import copied
from headwater.methods.call import Call, State
from headwater.methods.cond_mixlora import CondMixLoraBranch
from headwater.methods.smora import SMoraBranch
from headwater.training.accounts import Accounts
from headwater.tuner import AlignLoss, AlignSpec

INPUTS, LAYER = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def two_gpus():
    with FakeTensorMode(), torch.no_grad():
        yield


def call(**fields) -> Call:
    valid, ids = torch.ones(2, 3, dtype=torch.bool, device=INPUTS), torch.zeros(2, dtype=torch.long, device=INPUTS)
    return Call("layer", (2, 3), State(2, 3, ids, valid, task_range=(0, 1), **fields), learns=True)


def test_a_loss_is_weighted_and_logged():
    scale = torch.ones((), device=INPUTS)
    layers = call(loss_scale=scale)
    for device in (INPUTS, LAYER):
        layers.add_loss("balance", torch.ones((), device=device), 0.5)
    assert [loss.device for loss in layers.losses] == [INPUTS, LAYER]
    total, count = layers.state.losses["balance"]
    assert (total.device, count) == (INPUTS, 2)
    books = Accounts.__new__(Accounts)
    books._auxiliary = {}
    for _ in range(2):
        books.add_auxiliary({"balance": torch.ones((), device=LAYER)}, scale)
    assert books._auxiliary["balance"].device == LAYER


def test_padding_is_left_out():
    smora = SimpleNamespace(counts=torch.zeros(4, device=LAYER), k=2)
    SMoraBranch.count(smora, torch.zeros(6, 2, dtype=torch.long, device=LAYER), call())
    assert smora.counts.device == LAYER
    cond = SimpleNamespace(config=SimpleNamespace(pool="prompt"))
    labelled = call(prompt=torch.ones(2, 3, dtype=torch.bool, device=INPUTS))
    assert CondMixLoraBranch.pooled(cond, torch.ones(6, 4, device=LAYER), labelled).device == LAYER


@pytest.mark.parametrize("tokens", ["all", "prompt"])
def test_tasks_are_aligned(tokens):
    spec = AlignSpec(tokens=tokens)
    labelled = call(prompt=torch.ones(2, 3, dtype=torch.bool, device=INPUTS))
    assert AlignLoss(spec, 1).loss(labelled, torch.ones(6, 2, device=LAYER)).device == LAYER


def test_a_cache_is_copied(monkeypatch):
    seen = []
    monkeypatch.setattr(
        DynamicLayer, "batch_select_indices", lambda layer, rows: seen.append((layer.keys.device, rows.device))
    )
    cache = DynamicCache()
    for index, device in enumerate((INPUTS, LAYER)):
        cache.update(torch.ones(2, 1, 3, 4, device=device), torch.ones(2, 1, 3, 4, device=device), index)
    copied(cache, torch.zeros(5, dtype=torch.long, device=INPUTS))
    assert seen == [(INPUTS, INPUTS), (LAYER, LAYER)]
