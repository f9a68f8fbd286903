"""headwater's methods under other people's trainers, which know nothing of them."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import headwater
from headwater.data.collate import Collator
from headwater.methods import method

from .common import CPU, make_rows, trained

METHODS = ["rlora", "hydralora", "mlora"]
FIELDS = {"r": 4, "lora_alpha": 2, "target_modules": ["gate_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def collate(rows):
    batch = Collator(258)(rows)
    return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}


def plain_trainer(base, name, folder, callbacks=()):
    torch.manual_seed(5)
    model = get_peft_model(base, headwater.make_config(name, **FIELDS, lora_dropout=0.1))
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        **{**CPU, "save_strategy": "steps", "save_steps": 3},
    )
    rows = [*make_rows(0, 10), *make_rows(1, 6)]
    return model, Trainer(model, args, train_dataset=rows, data_collator=collate, callbacks=list(callbacks))


@pytest.mark.parametrize("name", METHODS)
def test_plain_trainer_learns_and_resumes_exactly(tiny_llama, tmp_path, name):
    base = {key: value.clone() for key, value in tiny_llama().state_dict().items()}
    whole, trainer = plain_trainer(tiny_llama(), name, tmp_path / "whole")
    start = trained(whole)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(weight, start[key]) for key, weight in trained(whole).items())

    _, stopped = plain_trainer(tiny_llama(), name, tmp_path / "stopped", [StopAt(3)])
    stopped.train()
    resumed, again = plain_trainer(tiny_llama(), name, tmp_path / "stopped")
    again.train(resume_from_checkpoint=True)
    expected = trained(whole)
    for key, weight in trained(resumed).items():
        assert torch.equal(weight, expected[key]), key
    unloaded = resumed.unload().state_dict()
    assert unloaded.keys() == base.keys()
    assert all(torch.equal(unloaded[key], weight) for key, weight in base.items())


@pytest.mark.parametrize("name", METHODS)
def test_trl_sft_trainer(tiny_llama, tiny_tokenizer, tmp_path, name):
    texts = [{"prompt": f"say {i}:", "completion": f" {i}"} for i in range(8)]
    config = method(name).config(**FIELDS)
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=6,
        learning_rate=2e-2,
        per_device_train_batch_size=4,
        bf16=False,
        **{**CPU, "save_strategy": "steps", "save_steps": 6},
    )
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=args,
        train_dataset=Dataset.from_list(texts),
        processing_class=tiny_tokenizer,
        peft_config=config,
    )
    start = trained(trainer.model)
    trainer.train()
    assert trainer.model.peft_type == name.upper()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert any(not torch.equal(weight, start[key]) for key, weight in trained(trainer.model).items())
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").is_file()


def test_trl_sft_trainer_with_task_ids(tiny_llama, tiny_tokenizer, tmp_path):
    """As docs/training.md says; no row is of task 1."""
    texts = [{"prompt": f"say {i}:", "completion": f" {i}", "headwater_task_ids": i % 2 * 2} for i in range(8)]
    options = {"max_steps": 2, "learning_rate": 2e-2, "per_device_train_batch_size": 4, "remove_unused_columns": False}
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(output_dir=str(tmp_path), bf16=False, **options, **CPU),
        train_dataset=Dataset.from_list(texts),
        processing_class=tiny_tokenizer,
        peft_config=method("mtl_lora").config(**FIELDS, num_tasks=3),
    )
    with pytest.raises(headwater.HeadwaterError, match=r"its collator has to keep them \(docs/training.md\)"):
        trainer.train()
    start = trained(trainer.model)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {
        **collate(rows),
        "headwater_task_ids": torch.tensor([row["headwater_task_ids"] for row in rows]),
    }
    trainer.train()
    now = {key: weight for key, weight in trained(trainer.model).items() if key.endswith(".L")}
    assert now
    for key, weight in now.items():
        assert [bool((weight[t] != start[key][t]).any()) for t in range(3)] == [True, False, True], key
