"""Run by torchrun in test_ranks.py: one step over two ranks per normalisation, then a run that is resumed."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import make_tiny_llama

from headwater.training import trainer as trainer_module
from tests.training.common import adapted, make_rows, make_tasks, make_trainer, trained
from tests.training.test_trainer import Gradients

CASES = {"example": "example", "token": "token", "packed": "token"}  # what is saved -> its normalisation


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    tasks = {"a": make_rows(0, 5, longest=2), "b": make_rows(1, 3, longest=20)}
    for case, normalization in CASES.items():
        trainer_module.PASS_COST["cpu"] = 0 if case == "example" else 10**6  # padded batches in parts, and whole
        attention = "sdpa" if case == "packed" else "eager"
        seen = Gradients()
        trainer = make_trainer(
            adapted(make_tiny_llama(attn_implementation=attention)),
            folder / "step",
            tasks=tasks,
            callbacks=[seen],
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=0.0,
            loss_normalization=normalization,
        )
        trainer.train()
        gradients = {name.removeprefix("module."): gradient for name, gradient in seen.steps[0].items()}
        log = trainer.state.log_history[0]
        torch.save({"gradients": gradients, "log": log}, folder / f"{case}{dist.get_rank()}.pt")

    settings = {"per_device_train_batch_size": 2, "max_steps": 8, "save_strategy": "steps", "save_steps": 6}
    weights = []
    for resume in (None, str(folder / "whole" / "checkpoint-6")):  # 5 steps an epoch: inside the second
        model = adapted(make_tiny_llama(attn_implementation="sdpa"), "rlora", head_dropout=0.2, lora_alpha=2)
        run = make_trainer(model, folder / "whole", tasks=make_tasks(14, 6), learning_rate=1e-2, **settings)
        run.train(resume_from_checkpoint=resume)
        weights.append(trained(model))
    same = all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    (folder / f"resumed{dist.get_rank()}").write_text(str(same))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(Path(sys.argv[1]))
