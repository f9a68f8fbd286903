"""A model with an auxiliary loss, data with padding, and one step of plain `Trainer` on them."""

from __future__ import annotations

import torch
from transformers import Trainer, TrainingArguments

from headwater.tuner import MethodLayer

from .helpers import adapt, tokens
from .rows import BY_ID

ROW = BY_ID["taskprobe"]  # its loss: penalty * mean over tokens of |A x|^2, summed over layers
PENALTY = ROW.fields["penalty"]


def make(tiny_llama, **fields):
    return adapt(ROW, tiny_llama(), **ROW.no_dropout, **fields).train()


def batch(seed=0):
    """Four rows of lengths 10, 8, 6 and 4, right-padded; every second token is learned, so shares of tokens and of
    learned tokens agree."""
    x = tokens(rows=4, length=10, seed=seed)
    mask = torch.zeros_like(x)
    for n, length in enumerate((10, 8, 6, 4)):
        mask[n, :length] = 1
    labels = x.masked_fill(mask == 0, -100)
    labels[:, ::2] = -100
    return {
        "input_ids": x.masked_fill(mask == 0, 258),
        "attention_mask": mask,
        "labels": labels,
        "headwater_task_ids": torch.tensor([0, 1, 2, 1]),
    }


def explicit_penalty(model, data):
    """The loss from its definition, as a graph of its own: the sum over layers, and per layer."""
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0]))
        for layer in model.modules()
        if isinstance(layer, MethodLayer)
    ]
    loss = model(**data).loss
    for hook in hooks:
        hook.remove()
    valid = data["attention_mask"].bool()
    per_layer = [(x[valid] @ m.branches["default"].A.T).square().sum(-1).mean() for m, x in inputs.items()]
    return loss, sum(per_layer), per_layer


class Rows(torch.utils.data.Dataset):
    def __init__(self, seeds):
        self.rows = [{name: t[n] for name, t in batch(seed).items()} for seed in seeds for n in range(4)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def train_one_step(tiny_llama, folder, *, size, accumulation, **arguments):
    """The step taken, which is the gradient: plain SGD with learning rate 1."""
    model = make(tiny_llama)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=1.0,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    Trainer(model, arguments, train_dataset=Rows([0, 1])).train()
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {name: start[name] - value for name, value in trained.items()}
