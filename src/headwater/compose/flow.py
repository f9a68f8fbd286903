"""LoRA-Flow (arXiv 2402.11455, ACL 2024): a small gate before each decoder layer mixes adapters token by token.

    w_t = softmax(W x_t / tau) + b           x_t: what enters the decoder layer, before its norm;  eq. 5
    h_t' = h_t + sum_j w_t,j s_j B_j A_j u_t  for every adapted linear of that layer               eq. 6

The bias stands outside the softmax, so weights may be negative or add up to more than 1. Only W and b are trained, on
about 200 examples. As in the authors' code the gates start at one adapter exactly: W = 0 and b = e_j - 1/k.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.collate import Collator
from ..data.encode import Encoded
from ..errors import HeadwaterError, Problem
from ..methods.call import Call
from ..ops import project
from . import ranges
from .mixed import PooledModel, Stack
from .pool import AdapterPool
from .saved import read_fitted, write_fitted

KIND = "flow"


@dataclass(frozen=True)
class FlowSpec:
    """How gates are trained: Adam (0.9, 0.95) with a cosine schedule and a fifth of the steps to warm up, as in the
    paper's code. Unlike that code without weight decay, which pulls b towards the plain average, and without the
    adapters' dropout.

    Args:
        examples: most rows to train on, drawn at random.
        epochs: passes over them.
        learning_rate: the highest; the paper searches 1e-3 and 1e-4.
        batch_size: rows per step; the paper searches 2, 4 and 8.

    Raises:
        HeadwaterError: naming every number that is out of range.
    """

    examples: int = 200
    epochs: int = 5
    learning_rate: float = 1e-3
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.require(
            self,
            {
                "examples": ranges.at_least(1, self.examples),
                "epochs": ranges.at_least(1, self.epochs),
                "learning_rate": ranges.rate(self.learning_rate),
                "batch_size": ranges.at_least(1, self.batch_size),
                "seed": ranges.seed(self.seed),
            },
        )


class FlowGate(nn.Module):
    """One gate per decoder layer, for k adapters.

    Args:
        pooled: the model.
        names: the adapters, in the gates' order.
        start: the adapter at which the gates start; None starts at the plain average, b = 0.
        temperature: tau.

    Attributes:
        weight: `(decoder layers, k, d)`, float32. bias: `(decoder layers, k)`, float32.

    Raises:
        HeadwaterError: fewer than one adapter, names twice, an unknown start, a temperature that is not above 0, or an
            adapter on a layer that is in no decoder layer.
    """

    def __init__(self, pooled: PooledModel, names: Sequence[str], start: str | None, temperature: float = 1.0):
        super().__init__()
        if not names or len(set(names)) < len(names):
            raise HeadwaterError(Problem(f"the adapters to mix are {', '.join(names) or 'none'}", fix="name each once"))
        if start is not None and start not in names:
            raise HeadwaterError(Problem(f"the start {start!r} is not among the adapters {', '.join(names)}", "start"))
        self.pooled, self.names, self.start, self.temperature = pooled, tuple(names), start, temperature
        ranges.require(self, {"temperature": ranges.positive(temperature)})
        self._block_of = _blocks(pooled, names)
        self.blocks = list(dict.fromkeys(self._block_of.values()))
        config: Any = pooled.model.config
        k, width = len(names), config.get_text_config().hidden_size
        self.weight = nn.Parameter(torch.zeros(len(self.blocks), k, width))
        self.bias = nn.Parameter(torch.zeros(len(self.blocks), k))
        if start is not None:
            with torch.no_grad():
                uniform = torch.softmax(torch.zeros(k), -1)  # what the softmax gives at W = 0, to the last bit
                self.bias.add_(torch.eye(k)[list(names).index(start)] - uniform)
        self._now: dict[str, Tensor] = {}
        self.to(next(pooled.model.parameters()).device)  # or every decoder layer would wait for its gate

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Forwards and `generate` inside mix the adapters as the gates say."""
        pooled = self.pooled
        stacks = pooled.stack([pooled.adapter(name) for name in self.names])
        hooks = [
            pooled.model.get_submodule(block).register_forward_pre_hook(
                functools.partial(self._enter, position, block), with_kwargs=True
            )
            for position, block in enumerate(self.blocks)
        ]
        try:
            with pooled.use(stacks, self):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self._now.clear()

    def _enter(self, position: int, block: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        (z,) = project(x.reshape(-1, x.shape[-1]), (self.weight[position].to(x.device),))
        self._now[block] = torch.softmax(z / self.temperature, -1) + self.bias[position].to(z)

    def mix(self, u: Tensor, x: Tensor, stack: Stack, call: Call) -> Tensor:
        gate = self._now[self._block_of[call.name]]
        if gate.shape[0] != u.shape[0]:
            what = f"{call.name} sees {u.shape[0]} tokens and its decoder layer {gate.shape[0]}"
            raise HeadwaterError(Problem(what, fix="LoRA-Flow cannot mix adapters on layers behind a token dispatch"))
        call.saw_gate(gate)
        return u * stack.spread(gate)

    def save(self, folder: Path, pool: AdapterPool, **fields: Any) -> None:
        """Write the gates. `fields` are kept beside them, e.g. how they were trained."""
        kept = {"blocks": self.blocks, "start": self.start, "temperature": self.temperature, **fields}
        write_fitted(folder, KIND, pool, self.names, kept, {"weight": self.weight, "bias": self.bias})

    @classmethod
    def load(cls, folder: Path, pool: AdapterPool, pooled: PooledModel) -> FlowGate:
        """Gates as they were saved.

        Raises:
            HeadwaterError: the files are damaged, or made for other adapters or another model.
        """
        names, fields, tensors = read_fitted(folder, KIND, pool)
        gate = cls(pooled, names, fields.get("start"), fields.get("temperature", 1.0))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in gate.state_dict().items()}
        if shapes != wanted or fields.get("blocks") != gate.blocks:
            what = f"the gates have shapes {shapes}, and these adapters on this model need {wanted}"
            raise HeadwaterError(Problem(what, str(folder), "train them again"))
        gate.load_state_dict(tensors)
        return gate


def train_gates(
    gate: FlowGate,
    rows: Sequence[Encoded],
    pad_token_id: int,
    spec: FlowSpec,
    *,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> list[float]:
    """Train the gates on completions; the base model and the adapters stay as they are.

    Args:
        rows: encoded rows; `spec.examples` of them are used.
        progress: called after each step with its number, the number of steps and the loss.

    Returns:
        The loss of each step: mean over the batch's completion tokens of -log p, in nats.

    Raises:
        HeadwaterError: there are no rows, or a loss is not finite.
    """
    from ..training.loss import CompletionHead, completion_losses, loss_positions

    if not rows:
        raise HeadwaterError(Problem("there are no rows to train the gates on"))
    model, collate = gate.pooled.model, Collator(pad_token_id)
    draw = torch.Generator().manual_seed(spec.seed)
    chosen = [rows[i] for i in torch.randperm(len(rows), generator=draw)[: spec.examples].tolist()]
    per_epoch = math.ceil(len(chosen) / spec.batch_size)
    steps, losses = per_epoch * spec.epochs, []
    optimiser = torch.optim.Adam(gate.parameters(), lr=spec.learning_rate, betas=(0.9, 0.95), eps=1e-5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, functools.partial(_rate, steps=steps))
    device = next(model.parameters()).device
    head = CompletionHead(model)
    try:
        with _frozen(model), gate.on(), torch.enable_grad():
            for step in range(steps):
                if step % per_epoch == 0:
                    order = torch.randperm(len(chosen), generator=draw).tolist()
                start = step % per_epoch * spec.batch_size
                batch = collate([chosen[i] for i in order[start : start + spec.batch_size]])
                where = loss_positions(batch["labels"])
                index, lengths = where["completion_index"].to(device), where["completion_lengths"].to(device)
                with head.at(index):
                    out = model(
                        input_ids=batch["input_ids"].to(device),
                        attention_mask=batch["attention_mask"].to(device),
                        use_cache=False,
                    )
                    logits = head.rows(out.logits, index)
                summed = completion_losses(logits, batch["labels"].to(device), index, lengths, per_example=False)
                loss = summed.sum() / lengths.sum().clamp_min(1)
                if not torch.isfinite(loss):
                    raise HeadwaterError(Problem(f"the loss of step {step + 1} is not finite", fix="lower the rate"))
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                losses.append(loss.item())
                progress(step + 1, steps, losses[-1])
    finally:
        head.remove()
    return losses


def _rate(step: int, steps: int) -> float:
    """The share of the highest learning rate at a step: a fifth of them warm up, then a cosine to 0."""
    warm = max(1, round(0.2 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, so without dropout or checkpointing, and without gradients for its parameters."""
    training = model.training
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in learning:
            parameter.requires_grad_(True)


def _blocks(pooled: PooledModel, names: Sequence[str]) -> dict[str, str]:
    """Adapted layer -> the decoder layer that it is in, in the model's order."""
    lists = {name for name, module in pooled.model.named_modules() if isinstance(module, nn.ModuleList)}
    adapted = {layer for name in names for layer in pooled.adapter(name).layers}
    found, outside = {}, []
    for layer, _ in pooled.model.named_modules():
        if layer in adapted:
            parts = layer.split(".")
            ends = (i for i in range(len(parts) - 1) if ".".join(parts[: i + 1]) in lists)
            first = next(ends, None)
            if first is None:
                outside.append(Problem("LoRA-Flow has a gate per decoder layer, and this layer is in none", layer))
            else:
                found[layer] = ".".join(parts[: first + 2])
    if outside:
        raise HeadwaterError(*outside)
    return found
