"""Stock trainers with a headwater config and nothing else."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from transformers import Trainer, TrainingArguments

from headwater.tuner import MethodLayer, context_of

from .helpers import adapt, assert_same, base_weights, config, logits, task_kwargs, tokens
from .rows import BY_ID, ROWS

# SFTTrainer's collator keeps no columns of ours; for methods that need tasks there is HeadwaterTrainer
UNCONDITIONED = [row for row in ROWS if not row.needs_task_ids]
COMMON = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "logging_steps": 1,
    "seed": 3,
}


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Rows(torch.utils.data.Dataset):
    def __init__(self, row):
        self.x, self.ids = tokens(rows=12), task_kwargs(row, 12)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, n):
        return {"input_ids": self.x[n], "labels": self.x[n], **{name: t[n] for name, t in self.ids.items()}}


def test_plain_trainer_resumes_on_the_same_path(row, tiny_llama, tmp_path):
    """Dropout, optimiser and all: six steps equal three steps, a new process's worth of objects, three more."""

    def run(folder, resume=None):
        model = adapt(row, tiny_llama())
        before = base_weights(model)
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=6, save_steps=3, remove_unused_columns=False, **COMMON
        )
        trainer = Trainer(model, arguments, train_dataset=Rows(row))
        trainer.train(resume_from_checkpoint=resume)
        assert_same(base_weights(model), before)
        return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole, losses = run(tmp_path / "whole")
    names = {p.name for p in (tmp_path / "whole" / "checkpoint-3").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    resumed, later = run(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert later == losses
    assert_same(get_peft_model_state_dict(resumed), get_peft_model_state_dict(whole))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "whole" / "checkpoint-6")
    assert torch.equal(logits(row, loaded), logits(row, whole.eval()))


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_plain_trainer_moves_everything_that_is_trained(row, tiny_llama, tmp_path, reentrant):
    """From the real start, in three steps: no router, gate or head stays behind, and no two heads stay equal."""
    model = adapt(row, tiny_llama(), stirred=False, **row.no_dropout)
    start = trained(model)
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, save_strategy="no", remove_unused_columns=False,
        **COMMON, **({} if reentrant is None else checkpointing),
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Rows(row)).train()
    still = {name.rpartition(".")[2] for name, p in trained(model).items() if torch.equal(p, start[name])}
    assert still == ({"router"} if row.id == "rlora-one-head" else set())
    for layer in (m for m in model.modules() if isinstance(m, MethodLayer)):
        held = layer.branch("default").heads()
        heads = [] if held is None else held.B
        assert all(not torch.equal(a, b) for n, a in enumerate(heads) for b in heads[:n] if a.any() or b.any())


@pytest.mark.parametrize("row", UNCONDITIONED, ids=[row.id for row in UNCONDITIONED])
def test_sft_trainer(row, tiny_llama, tiny_tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    base = tiny_llama()
    before = base_weights(base)
    texts = [{"prompt": f"{n} + {n} = ", "completion": str(2 * n)} for n in range(8)]
    trainer = trl.SFTTrainer(
        base,
        trl.SFTConfig(output_dir=str(tmp_path), max_steps=2, save_strategy="no", bf16=False, **COMMON),
        train_dataset=Dataset.from_list(texts),
        processing_class=tiny_tokenizer,
        peft_config=config(row),
    )
    start = trained(trainer.model)
    assert {name.split("_branch.")[0].rpartition(".")[2] for name in start} == {row.name}
    trainer.train()
    assert_same(base_weights(trainer.model), before)
    moved = {name for name, p in trained(trainer.model).items() if not torch.equal(p, start[name])}
    assert {name.rpartition(".")[2] for name in moved} >= {row.learns}
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert torch.equal(logits(row, loaded), logits(row, trainer.model.eval()))


def test_sft_trainer_minimises_the_auxiliary_loss(tiny_llama, tiny_tokenizer, tmp_path):
    """Its loss is its own, so only what arrives through the gradient can lower the router's imbalance."""
    trl = pytest.importorskip("trl")
    row = BY_ID["hydralora-balance"]

    sums = [{"prompt": f"{n} = ", "completion": str(n)} for n in range(8)]

    def first_router_step(weight, size=2, accumulation=1, rows=sums, loss_type="nll"):
        trainer = trl.SFTTrainer(
            tiny_llama(),
            trl.SFTConfig(
                output_dir=str(tmp_path),
                max_steps=1,
                save_strategy="no",
                bf16=False,
                optim="sgd",
                max_grad_norm=0.0,
                gradient_accumulation_steps=accumulation,
                loss_type=loss_type,
                **{**COMMON, "per_device_train_batch_size": size},
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer,
            peft_config=config(row, balance_loss_weight=weight, lora_dropout=0.0),
        )
        start = trained(trainer.model)
        trainer.train()
        return {name: p - start[name] for name, p in trained(trainer.model).items() if name.endswith(".router")}

    # the heads start at zero, so the router's first gradient is the auxiliary loss's alone
    assert not any(step.any() for step in first_router_step(0.0).values())
    once, twice = first_router_step(50.0), first_router_step(100.0)
    assert all(step.any() for step in once.values())
    for name, step in once.items():
        torch.testing.assert_close(twice[name], 2 * step, atol=1e-6, rtol=1e-2)

    # Equal rows are as balanced in a part of the batch as in all of it, so parts must add up to one whole.
    rows = [{"prompt": "1 = ", "completion": "1"}] * 8
    whole, *others = (first_router_step(50.0, 8 // n, n, rows, kind) for kind in ("nll", "dft") for n in (1, 4))
    for name, step in whole.items():
        for other in others:  # dynamic fine-tuning weighs the tokens, not what the router adds
            torch.testing.assert_close(other[name], step, atol=1e-6, rtol=1e-3)


def test_dpo_trainer_minimises_the_auxiliary_loss(tiny_llama, tiny_tokenizer, tmp_path):
    """Its loss prefers some tokens to others: their gradients, which cancel, say nothing of the router's."""
    trl = pytest.importorskip("trl")
    trainer = trl.DPOTrainer(
        tiny_llama(),
        args=trl.DPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            save_strategy="no",
            bf16=False,
            optim="sgd",
            max_grad_norm=0.0,
            **COMMON,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{n} = ", "chosen": "1", "rejected": "2"} for n in range(8)]),
        processing_class=tiny_tokenizer,
        peft_config=config(BY_ID["hydralora-balance"], balance_loss_weight=50.0, lora_dropout=0.0),
    )
    states, original = [], trainer.compute_loss

    def compute_loss(*args, **kwargs):
        loss = original(*args, **kwargs)
        states.extend(context_of(trainer.model)._local.with_losses)
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()
    assert [float(state.gradient) for state in states] == [1.0]


@pytest.mark.parametrize("row", UNCONDITIONED, ids=[row.id for row in UNCONDITIONED])
def test_the_reference_of_an_adapter_that_is_trained_on_is_its_copy(row, tiny_llama, tiny_tokenizer, tmp_path):
    """TRL makes it and copies the parameters; what is drawn at the start and kept as a buffer must follow."""
    trl = pytest.importorskip("trl")
    torch.manual_seed(0)
    adapt(row, tiny_llama(), init_seed=None).save_pretrained(tmp_path / "start")
    torch.manual_seed(5)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "start", is_trainable=True)
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(output_dir=str(tmp_path), max_steps=1, save_strategy="no", bf16=False, **COMMON),
        train_dataset=Dataset.from_list([{"prompt": f"{n} = ", "chosen": "1", "rejected": "2"} for n in range(8)]),
        processing_class=tiny_tokenizer,
    )
    assert list(trainer.model.peft_config) == ["default", "ref"]
    model = trainer.model.eval()
    expected = logits(row, model)
    model.set_adapter("ref")
    assert torch.equal(logits(row, model), expected)
