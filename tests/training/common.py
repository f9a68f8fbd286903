"""Small adapted models and tasks for the tests of training."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from headwater import make_config
from headwater.data.encode import Encoded
from headwater.data.mixture import MixtureSpec
from headwater.training import HeadwaterArguments, HeadwaterTrainer

TARGETS = ["gate_proj", "up_proj", "down_proj"]
CPU = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "linear"}


def make_rows(task: int, count: int, *, longest: int = 6, seed: int = 0) -> list[Encoded]:
    """Rows with prompts of 1 to 8 tokens and completions of 1 to `longest`."""
    draw = random.Random(f"{seed} {task}")
    rows = []
    for _ in range(count):
        prompt = [draw.randrange(250) for _ in range(draw.randint(1, 8))]
        completion = [draw.randrange(250) for _ in range(draw.randint(1, longest))]
        rows.append(Encoded(prompt + completion, [-100] * len(prompt) + completion, task))
    return rows


def make_tasks(a: int = 12, b: int = 6) -> dict[str, list[Encoded]]:
    return {"a": make_rows(0, a), "b": make_rows(1, b, longest=15)}


def adapted(base: torch.nn.Module, method: str = "rlora", **fields) -> torch.nn.Module:
    """The base with an adapter without dropout, its parameters moved so that all of them have gradients."""
    torch.manual_seed(1)
    if method == "rlora":
        fields = {"head_dropout": 0.0, **fields}
    if method == "lora":
        config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **fields)
    else:
        config = make_config(method, **{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **fields})
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make_trainer(model, folder: Path, *, tasks=None, mixture=None, evaluator=None, callbacks=None, **args):
    arguments = HeadwaterArguments(output_dir=str(folder), **{**CPU, "max_steps": 4, **args})
    return HeadwaterTrainer(
        model,
        arguments,
        train=tasks or make_tasks(),
        pad_token_id=258,
        mixture=mixture or MixtureSpec(),
        evaluator=evaluator,
        callbacks=callbacks,
    )


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
