"""Gates watched in training: the numbers in the log, one warning per collapse, and no trace left on the run."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

import headwater
from headwater.analysis.gates import GateRecorder, _sums, statistics_of
from headwater.data.collate import Collator
from headwater.training import MethodCallback, gate_monitor
from headwater.training.gate_monitor import METRICS, same_heads
from headwater.tuner import MethodLayer

from .common import CPU, adapted, make_rows, make_tasks, make_trainer, trained

LAYERS = [f"model.layers.{n}.mlp.{kind}_proj" for n in range(2) for kind in ("gate", "up", "down")]
STILL = {"learning_rate": 0.0, "per_device_train_batch_size": 4, "logging_steps": 2}


def metrics_of(trainer):
    return [{key: line[key] for key in METRICS} for line in trainer.state.log_history if METRICS[0] in line]


class Seen:
    """The gates of every forward with the tokens that are no padding: layer -> forward -> `(tokens, N)`."""

    def __init__(self, model):
        self.gates, self.mask = {name: [] for name in LAYERS}, None
        model.get_base_model().register_forward_pre_hook(self._mask, with_kwargs=True, prepend=True)
        self.watching = headwater.observe(model, self._see)

    def _mask(self, module, args, kwargs):
        self.mask = kwargs["attention_mask"].bool()

    def _see(self, name, gate):
        self.gates[name].append(gate[self.mask])

    def metrics(self, forwards):
        each = []
        for name in LAYERS:
            sums, most = _sums(torch.cat([self.gates[name][n] for n in forwards]).unsqueeze(0), None)
            each.append(statistics_of({name: (sums[0], float(most[0]))})[name])
        entropies = ([s.gate_entropy for s in each], [s.load_entropy for s in each])
        return [sum(e) / len(e) for e in entropies] + [sum(len(s.dead()) for s in each)]


def test_only_training_of_the_active_adapter_is_watched(tiny_llama):
    """And not what a trainer of preferences samples, evaluates, or asks its reference for in between."""
    model, ids = adapted(tiny_llama()), torch.arange(12).view(2, 6)
    model.add_adapter("ref", model.peft_config["default"])
    model.train()
    watched = GateRecorder(model, of_training=True)
    with watched, GateRecorder(model) as everything:
        model(input_ids=ids)
        model.eval()(input_ids=ids)
        model.train().set_adapter("ref")
        model(input_ids=ids)
        model.set_adapter("default")
    assert {s.tokens for s in everything.statistics().values()} == {36}
    assert {s.tokens for s in watched.statistics().values()} == {12}


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "checkpointed"])
def test_the_log_has_the_gates_of_the_first_batch_of_chosen_steps(tiny_llama, tmp_path, checkpointing):
    model = adapted(tiny_llama(), "moe_lora", num_experts=6, top_k=2, lora_dropout=0.0)
    args = {} if checkpointing is None else {"gradient_checkpointing": True}
    if checkpointing is not None:
        args["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing}
    tasks = make_tasks(15, 9)  # three whole steps an epoch
    trainer = make_trainer(model, tmp_path, tasks=tasks, max_steps=6, gradient_accumulation_steps=2, **STILL, **args)
    seen = Seen(model)
    with seen.watching:
        trainer.train()
    assert {len(gates) for gates in seen.gates.values()} == {12}
    found = metrics_of(trainer)
    # steps 0, 2 and 4 are first in their window of two, and each has two batches
    assert [list(line.values()) for line in found] == [pytest.approx(seen.metrics([n]), abs=1e-9) for n in (0, 4, 8)]
    assert len({line["gate_entropy"] for line in found}) == 3, "all windows alike; this shows nothing"


def test_a_long_window_is_seen_every_fourth_step(tiny_llama, tmp_path):
    model = adapted(tiny_llama(), "hydralora", lora_dropout=0.0)
    trainer = make_trainer(model, tmp_path, max_steps=10, **{**STILL, "logging_steps": 10})
    seen = Seen(model)
    with seen.watching:
        trainer.train()
    assert [list(line.values()) for line in metrics_of(trainer)] == [pytest.approx(seen.metrics([0, 4, 8]), abs=1e-9)]


def collate(rows):
    batch = Collator(258)(rows)
    return {key: batch[key] for key in ("input_ids", "attention_mask", "labels", "headwater_task_ids")}


def plain_run(model, folder, callbacks, **fields):
    args = TrainingArguments(
        output_dir=str(folder), remove_unused_columns=False, per_device_train_batch_size=4, **{**CPU, **fields}
    )
    rows = [*make_rows(0, 10), *make_rows(1, 6)]
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collate, callbacks=callbacks)
    trainer.train()
    return trainer


def test_plain_trainer_logs_and_trains_the_same(tiny_llama, tmp_path):
    runs = []
    for callbacks in ([], [MethodCallback()]):
        model = adapted(tiny_llama(), head_dropout=0.3, lora_alpha=2)
        runs.append((plain_run(model, tmp_path, callbacks, max_steps=5, learning_rate=1e-2), trained(model)))
    (without, expected), (watched, weights) = runs
    assert metrics_of(without) == []
    assert len(metrics_of(watched)) == 5
    assert all(0 < line["gate_entropy"] <= 1 for line in metrics_of(watched))
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    assert headwater.tuner.context_of(watched.model).observers == []


@pytest.mark.parametrize("method", ["mlora", "lora"])
def test_without_gates_there_is_nothing_to_log(tiny_llama, tmp_path, method):
    trainer = make_trainer(adapted(tiny_llama(), method), tmp_path, max_steps=2)
    trainer.train()
    assert metrics_of(trainer) == []


def collapsed(base):
    """MTL-LoRA whose tasks all use the second of three heads, on one layer alone."""
    model = adapted(base, "mtl_lora", num_tasks=2, num_heads=3, temperature=1.0)
    layer = next(m for m in model.modules() if isinstance(m, MethodLayer) and m.name == LAYERS[1])
    with torch.no_grad():
        layer.branches["default"].w.copy_(torch.tensor([[0.0, 9, 0], [0, 9, 0]]))
    return model


def said_in(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "collapsed" in str(w.message)]


@pytest.mark.parametrize("plain", [True, False])
def test_a_collapse_is_said_once_with_layer_and_heads(tiny_llama, tmp_path, monkeypatch, plain):
    monkeypatch.setattr(gate_monitor, "LOOK_BACK", 3)
    model = collapsed(tiny_llama())
    settings = {"max_steps": 8, "learning_rate": 1e-6, "logging_steps": 1}
    if plain:
        said = said_in(lambda: plain_run(model, tmp_path, [MethodCallback()], **settings))
    else:
        trainer = make_trainer(model, tmp_path, **settings)
        said = said_in(trainer.train)
        assert {line["dead_experts"] for line in metrics_of(trainer)} == {2}
    (message,) = said
    assert message.startswith(
        f"step 3: 1 layer has collapsed gates or heads in the last 3 steps. {LAYERS[1]}: heads 1, 3"
    )
    assert "of an equal load (dead below 10%), most of the load goes to head 2 (load entropy 0.00)" in message
    assert not any(name in message for name in LAYERS if name != LAYERS[1])


def test_a_new_collapse_is_said_when_it_comes(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(gate_monitor, "LOOK_BACK", 2)
    model = collapsed(tiny_llama())

    class Collapse(MethodCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 4:
                branch = model.get_submodule(f"base_model.model.{LAYERS[4]}").branches["default"]
                branch.w.data.copy_(torch.tensor([[9.0, 0, 0], [9, 0, 0]]))

    settings = {"max_steps": 8, "learning_rate": 1e-6, "logging_steps": 1}
    first, second = said_in(lambda: plain_run(model, tmp_path, [Collapse()], **settings))
    assert (LAYERS[1] in first, LAYERS[4] in first) == (True, False)
    assert (LAYERS[1] in second, LAYERS[4] in second) == (False, True)
    assert second.startswith("step 6: ")


def test_a_healthy_run_says_nothing(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(gate_monitor, "LOOK_BACK", 2)
    assert said_in(make_trainer(adapted(tiny_llama()), tmp_path, max_steps=5).train) == []


def test_heads_that_stay_the_same_are_named(tiny_llama, tmp_path, monkeypatch):
    """Equal heads behind equal gates: R-LoRA with a zero router and one head copied."""
    monkeypatch.setattr(gate_monitor, "LOOK_BACK", 2)
    model = adapted(tiny_llama(), num_heads=4)
    branch = model.get_submodule(f"base_model.model.{LAYERS[2]}").branches["default"]
    with torch.no_grad():
        branch.B[3] = 2 * branch.B[1]
        branch.router[3] = branch.router[1]
    (message,) = said_in(make_trainer(model, tmp_path, max_steps=4, learning_rate=1e-6).train)
    assert f"{LAYERS[2]}: heads 2, 4 have the same weights and gates as another" in message

    branch.router.data[3] += 1.0  # now the gates differ, so the heads will part
    assert said_in(make_trainer(model, tmp_path, max_steps=4, learning_rate=1e-6).train) == []


def test_heads_that_are_zero_are_not_the_same(tiny_llama):
    model = headwater.make_config("hydralora", r=4, target_modules=["up_proj"], task_type="CAUSAL_LM")
    from peft import get_peft_model

    assert same_heads(get_peft_model(tiny_llama(), model), {}) == {}
