"""Plain `transformers.Trainer` on the tiny model, with nothing overridden."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from headwater import make_config


class Repeats(torch.utils.data.Dataset):
    """Rows that repeat one token, a pattern that is quickly learned; tasks 0, 1, 2 in turn where asked for."""

    def __init__(self, tasks: bool):
        self.tasks = tasks

    def __len__(self) -> int:
        return 16

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        ids = torch.full((10,), 20 + 7 * n)
        row = {"input_ids": ids, "labels": ids}
        return {**row, "headwater_task_ids": torch.tensor(n % 3)} if self.tasks else row


def train(base, folder, method: str, *, steps: int = 30, accumulation: int = 1, tasks: bool = False, **fields):
    """Trains; returns the model, the losses by step, and the names of trained tensors that have not moved."""
    config = make_config(
        method, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM", init_seed=0, **fields
    )
    model = get_peft_model(base, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=2e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        remove_unused_columns=False,
        seed=3,
    )
    trainer = Trainer(model, arguments, train_dataset=Repeats(tasks))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    still = [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    return model, losses, still
