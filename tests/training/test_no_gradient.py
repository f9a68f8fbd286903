"""Trained parameters that no row reaches are told of, once."""

from __future__ import annotations

import warnings

import pytest
import torch

from .common import adapted, make_trainer


def said_in(trainer) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(w.message) for w in caught if "no gradient" in str(w.message)]


@pytest.mark.parametrize("method", ["rlora", "lora"])
@pytest.mark.parametrize("steps", [3, 22])
def test_layers_that_no_row_runs_through_are_named_once(tiny_llama, tmp_path, method, steps):
    base = tiny_llama()
    base.model.image = torch.nn.Module()
    base.model.image.up_proj = torch.nn.Linear(32, 32)
    trainer = make_trainer(adapted(base, method), tmp_path, max_steps=steps)
    (said,) = said_in(trainer)
    unused = sum("image" in name and p.requires_grad for name, p in trainer.model.named_parameters())
    assert f"{unused} of " in said
    assert "image.up_proj" in said
    assert "exclude_modules" in said


@pytest.mark.parametrize("method", ["rlora", "mtl_lora", "moe_lora", "smora", "cond_mixlora", "cola", "lora"])
def test_nothing_is_said_where_every_parameter_learns(tiny_llama, tmp_path, method):
    fields = {"mtl_lora": {"num_tasks": 2}, "smora": {"top_k": 2}}.get(method, {})
    assert said_in(make_trainer(adapted(tiny_llama(), method, **fields), tmp_path, max_steps=2)) == []
