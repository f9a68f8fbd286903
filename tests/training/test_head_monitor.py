"""How alike heads are over training: the numbers of a plain reading, in the log of those methods that have heads."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

from headwater import make_config
from headwater.analysis import heads
from headwater.training.head_monitor import HEAD_METRICS, HEAD_SIMILARITY, HEAD_UPDATE_SIMILARITY, HeadMonitor

from .common import TARGETS, make_trainer

STEPS = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05}


def adapted(base, method, **fields):
    """The base with a fresh adapter, as it starts."""
    torch.manual_seed(1)
    fields = {"head_dropout": 0.0, **fields} if method == "rlora" else fields
    config = LoraConfig if method == "lora" else partial(make_config, method)
    return get_peft_model(base, config(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **fields))


def plain(model, start=None) -> float:
    """Mean over layers and pairs, in float64, one pair at a time."""
    layers = []
    for name, held in heads(model).items():
        B = held.B.detach().double() - (0 if start is None else start[name].double())
        pairs = list(itertools.combinations(B, 2))
        layers.append(sum(float((a * b).sum() / (a * a).sum().sqrt() / (b * b).sum().sqrt()) for a, b in pairs))
        layers[-1] /= len(pairs)
    return sum(layers) / len(layers)


@pytest.mark.parametrize(("method", "init"), [("rlora", "paper"), ("hydralora", None)])
def test_the_log_has_the_cosines_of_a_plain_reading(tiny_llama, tmp_path, method, init):
    fields = {"num_heads": 3, **({"init": init} if init else {})}
    trainer = make_trainer(adapted(tiny_llama(), method, **fields), tmp_path, **STEPS)
    start = {name: held.B.detach().clone() for name, held in heads(trainer.model).items()}
    trainer.train()
    logged = [line for line in trainer.state.log_history if HEAD_SIMILARITY in line]
    assert [line["step"] for line in logged] == [2, 4]
    assert logged[-1][HEAD_SIMILARITY] == pytest.approx(plain(trainer.model), abs=1e-5)
    assert logged[-1][HEAD_UPDATE_SIMILARITY] == pytest.approx(plain(trainer.model, start), abs=1e-5)
    moved = abs(logged[-1][HEAD_SIMILARITY] - logged[-1][HEAD_UPDATE_SIMILARITY])
    assert moved > 0.01 if method == "rlora" else moved == 0


def test_heads_that_are_zero_have_no_direction(tiny_llama):
    model = adapted(tiny_llama(), "hydralora", num_heads=3)
    monitor = HeadMonitor(model)
    assert monitor.measure() == {}
    layers = list(heads(model).values())
    with torch.no_grad():
        layers[0].B[:] = 1.0  # all alike
        layers[1].B[:2] = 1.0  # one is zero still: left out
    assert monitor.measure() == pytest.approx(dict.fromkeys(HEAD_METRICS, 1.0))


def test_one_head_has_nothing_to_be_like(tiny_llama, tmp_path):
    for method, fields in (("lora", {}), ("rlora", {"num_heads": 1})):
        trainer = make_trainer(adapted(tiny_llama(), method, **fields), tmp_path / method, **STEPS)
        trainer.train()
        assert not any(key in line for line in trainer.state.log_history for key in HEAD_METRICS)


def test_a_resumed_run_still_knows_where_its_heads_began(tiny_llama, tmp_path):
    def made(folder):
        torch.manual_seed(0)
        return make_trainer(
            adapted(tiny_llama(), "rlora", num_heads=3), folder, save_strategy="steps", save_steps=2, **STEPS
        )

    whole, again = made(tmp_path / "whole"), made(tmp_path / "again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    last = [next(line for line in t.state.log_history[::-1] if HEAD_SIMILARITY in line) for t in (whole, again)]
    assert [last[0][key] for key in HEAD_METRICS] == [last[1][key] for key in HEAD_METRICS]
