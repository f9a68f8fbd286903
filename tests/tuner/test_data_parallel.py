"""`torch.nn.DataParallel`, which transformers' Trainer uses by itself where it sees several GPUs."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from headwater.tuner import MethodLayer

from .helpers import TARGETS, adapt, assert_near, gradients, task_kwargs, tokens
from .rows import BY_ID


def replicate(network: nn.Module) -> nn.Module:
    """What `torch.nn.parallel.replicate` does for each device, on the CPU: it only takes accelerators."""
    copies = {}
    for module in network.modules():
        copies[module] = module._replicate_for_data_parallel()
        copies[module]._former_parameters = OrderedDict()
    for module, copy in copies.items():
        for name, child in module._modules.items():
            setattr(copy, name, None if child is None else copies[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                copy._parameters[name] = None
            else:
                setattr(copy, name, parameter.clone())
                copy._former_parameters[name] = getattr(copy, name)
        for name, buffer in module._buffers.items():
            setattr(copy, name, None if buffer is None else buffer.clone())
    return copies[network]


@pytest.mark.parametrize("training", [True, False])
def test_a_replica_computes_with_its_own_weights(row, tiny_llama, training):
    model = adapt(row, tiny_llama(), target_modules=[*TARGETS, "q_proj", "o_proj"], **row.no_dropout).train(training)
    x, ids = tokens(), task_kwargs(row)
    expected = model(input_ids=x, **ids).logits.detach()
    replica = replicate(model)
    shared = ("task_embedding", "task_gate")  # one gate for the whole model, which is looked up where it lies
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(shared):
                parameter.zero_()
    torch.testing.assert_close(replica(input_ids=x, **ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_gradients_of_a_replica_reach_the_model(row, tiny_llama):
    model = adapt(row, tiny_llama(), **row.no_dropout).train()
    x, ids = tokens(), task_kwargs(row)
    model(input_ids=x, labels=x, **ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    replicate(model)(input_ids=x, labels=x, **ids).loss.backward()
    assert_near(gradients(model), expected)


def test_a_replica_holds_nothing_of_the_models_decoding(tiny_llama):
    model = adapt(BY_ID["rlora"], tiny_llama())
    model.generate(input_ids=tokens(1), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    layers = [m for m in model.modules() if isinstance(m, MethodLayer)]
    assert any(held.decoder is not None for layer in layers for held in layer.held)
    for layer in replicate(model).modules():
        if isinstance(layer, MethodLayer):
            assert all(held.decoder is None for held in layer.held)


def test_a_replica_that_unmerges_leaves_the_model_merged(tiny_llama):
    model = adapt(BY_ID["mlora"], tiny_llama())
    with model.disable_adapter():
        expected = model(input_ids=tokens()).logits.detach()
    model.merge_adapter()
    with model.disable_adapter():
        found = replicate(model)(input_ids=tokens()).logits
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert all(m.merged for m in model.modules() if isinstance(m, MethodLayer))
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=tokens()).logits, expected, atol=0, rtol=0)
