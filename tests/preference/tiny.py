"""A tiny policy, two tasks and sources made of functions."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from trl import DPOConfig

from headwater import make_config
from headwater.data.encode import DataSpec
from headwater.data.mixture import MixtureSpec
from headwater.data.rows import Row
from headwater.data.tasks import Task
from headwater.preference.bandits import Picker
from headwater.preference.sources import Function
from headwater.preference.spec import PreferenceSpec
from headwater.preference.trainer import LOSSES, PreferenceTrainer

TARGETS = ["q_proj", "up_proj", "down_proj"]


class Spy:
    """Counts its calls; scores a response by how many of its characters are in `liked`."""

    def __init__(self, liked: str = "aeiou"):
        self.liked, self.calls = liked, []

    def __call__(self, *, prompt: str, response: str, answer: str, task: str) -> float:
        self.calls.append((task, prompt, response, answer))
        return float(sum(c in self.liked for c in response))


def make_task(index: int = 0, rows: int = 12) -> Task:
    name = "ab"[index]
    made = [
        [Row(f"{split} {name} {i}:", f" {'xy'[i % 2]}", (" x", " y"), source=f"{name}.jsonl", line=i) for i in range(n)]
        for split, n in (("train", rows), ("validation", 4), ("test", 4))
    ]
    return Task(name, index, "choice_accuracy", 1.0, *made)


def make_policy(base, method: str = "lora", **fields):
    torch.manual_seed(1)
    if method == "lora":
        config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **fields)
    else:
        config = make_config(method, **{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **fields})
    return get_peft_model(base, config)


def make_trainer(
    policy, tokenizer, folder, *, spies=None, picker=None, tasks=None, ensemble=False, preference=None, **arguments
):
    spies = spies or [Spy(), Spy("xyz"), Spy("0123456789")]
    sources = [Function(f"s{i}", spy) for i, spy in enumerate(spies)]
    spec = PreferenceSpec(
        sources=[{"name": s.name, "kind": "function", "function": "a:b"} for s in sources],
        **{"responses": 4, "max_new_tokens": 4, "temperature": 1.0, **(preference or {})},
    )
    args = DPOConfig(
        output_dir=str(folder),
        loss_type=LOSSES[spec.objective],
        beta=spec.beta,
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "remove_unused_columns": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            **arguments,
        },
    )
    return PreferenceTrainer(
        policy,
        args,
        tasks=tasks or [make_task(0), make_task(1)],
        tokenizer=tokenizer,
        sources=sources,
        picker=picker or Picker([s.name for s in sources]),
        ensemble=ensemble,
        spec=spec,
        data=DataSpec(),
        mixture=MixtureSpec(),
    )
