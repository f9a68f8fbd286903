"""Batches cut into narrower parts: the fewest positions, the same rows, the same training."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headwater
from headwater.data.collate import Collator
from headwater.training import trainer as trainer_module
from headwater.training.loss import CompletionCollator, cuts, narrowed

from .common import adapted, make_rows, make_tasks, make_trainer, trained


def cost_of(lengths, firsts, pass_cost):
    ends = [*firsts[1:], len(lengths)]
    return sum((j - i) * lengths[j - 1] + pass_cost for i, j in zip(firsts, ends, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7).map(sorted), st.integers(0, 80))
def test_no_other_cuts_cost_less(lengths, pass_cost):
    places = range(1, len(lengths))
    every = ([0, *chosen] for count in range(len(lengths)) for chosen in itertools.combinations(places, count))
    least = min(cost_of(lengths, firsts, pass_cost) for firsts in every)
    assert cost_of(lengths, cuts(lengths, pass_cost), pass_cost) == least


@pytest.mark.parametrize("pass_cost", [0, 20, 10**6])
def test_parts_hold_the_rows_and_what_is_learned_of_them(pass_cost):
    rows = [*make_rows(0, 5), *make_rows(1, 4, longest=30)]
    batch = CompletionCollator(Collator(258), pass_cost)(rows)
    parts = narrowed(batch)
    assert (len(parts) > 1) == (pass_cost < 10**6) == ("cuts" in batch)
    found, learned = [], []
    for part in parts:
        assert part["input_ids"].shape[1] == part["attention_mask"].sum(1).max()
        for ids, mask, task in zip(part["input_ids"], part["attention_mask"], part["headwater_task_ids"], strict=True):
            found.append((ids[mask.bool()].tolist(), int(task)))
        learned += part["labels"].flatten()[part["completion_index"] + 1].tolist()
    expected = sorted(rows, key=len)
    assert found == [(row.input_ids, row.task) for row in expected]
    assert learned == [label for row in expected for label in row.labels if label != -100]


@pytest.mark.parametrize("method", ["lora", "rlora", "mtl_lora"])
def test_training_in_parts_is_training(tiny_llama, tmp_path, monkeypatch, method):
    fields = {"num_tasks": 2, "lora_dropout": 0.0} if method == "mtl_lora" else {}
    weights, slots = [], []
    for pass_cost in (0, 10**6):
        monkeypatch.setitem(trainer_module.PASS_COST, "cpu", pass_cost)
        model = adapted(tiny_llama(), method, **fields)
        run = make_trainer(model, tmp_path, tasks=make_tasks(12, 12), per_device_train_batch_size=6, learning_rate=1e-3)
        run.train()
        weights.append(trained(model))
        slots.append((run.accounts.tokens, run.accounts.slots))
    (tokens, narrow), (same, wide) = slots
    assert tokens == same <= narrow < wide
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["align", "balance", "none"])
def test_a_batch_with_a_loss_between_rows_stays_whole(tiny_llama, tmp_path, monkeypatch, loss):
    monkeypatch.setitem(trainer_module.PASS_COST, "cpu", 0)
    model = adapted(tiny_llama(), "hydralora", balance_loss_weight=0.1 * (loss == "balance"))
    run = make_trainer(model, tmp_path, tasks=make_tasks(12, 12), per_device_train_batch_size=6, max_steps=2)
    if loss == "align":
        headwater.align(model, kind="kl", weight=0.1)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    run.train()
    assert (len(forwards) == 2) == (loss != "none")
    assert run.activation_bytes > 0


def test_ranks_whose_forwards_meet_run_as_many(tiny_llama, tmp_path, monkeypatch):
    """SMoRA's counts are of all ranks; one forward more on one of them would wait for the others."""
    run = make_trainer(adapted(tiny_llama(), "smora", r=6, top_k=2), tmp_path)
    other = make_trainer(adapted(tiny_llama()), tmp_path)
    assert run.may_cut
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    assert not run.may_cut
    assert other.may_cut


@pytest.mark.parametrize("sharded", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_ranks_that_gather_weights_in_each_forward_run_as_many(tiny_llama, tmp_path, sharded):
    run = make_trainer(adapted(tiny_llama()), tmp_path)
    assert run.may_cut
    setattr(run, sharded, True)
    assert not run.may_cut
