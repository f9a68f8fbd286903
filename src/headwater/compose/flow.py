"""LoRA-Flow (arXiv 2402.11455, ACL 2024): small gates mix adapters token by token, one before each decoder layer.

    w_t = softmax(W x_t / tau) + b           x_t: what enters the decoder layer, before its norm;  eq. 5
    h_t' = h_t + sum_j w_t,j s_j B_j A_j u_t  for every adapted linear of that layer               eq. 6

The paper also measures (table 3) one gate for all layers, which reads what enters the first, the word embedding
(`step`), and one gate for each adapted linear, which reads that linear's own input u_t (`module`).

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
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..data.collate import Collator
from ..data.encode import Encoded
from ..errors import HeadwaterError, Problem
from ..methods.call import Call
from ..ops import project
from . import ranges
from .base import linear_layers
from .mixed import PooledModel, Stack
from .pool import AdapterPool
from .saved import read_fitted, write_fitted

KIND = "flow"
Granularity = Literal["layer", "step", "module"]


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
    """Gates for k adapters.

    Args:
        pooled: the model.
        names: the adapters, in the gates' order.
        start: the adapter at which the gates start; None starts at the plain average, b = 0.
        temperature: tau.
        granularity: a gate per decoder `layer`; one for all of them (`step`), that reads what enters the first; or one
            per adapted linear `module`, that reads what enters that.

    Attributes:
        places: the modules whose input the gates read.
        weight: of each gate `(k, width of that input)`, float32. bias: `(gates, k)`, float32.

    Raises:
        HeadwaterError: fewer than one adapter, names twice, an unknown start or granularity, a temperature that is not
            above 0, or an adapter on a layer that is in no decoder layer, unless gates are per module.
    """

    def __init__(
        self,
        pooled: PooledModel,
        names: Sequence[str],
        start: str | None,
        temperature: float = 1.0,
        granularity: Granularity = "layer",
    ):
        super().__init__()
        if not names:
            raise HeadwaterError(Problem("there are no adapters to mix"))
        ranges.require_once(names)
        if start is not None and start not in names:
            raise HeadwaterError(Problem(f"the start {start!r} is not among the adapters {', '.join(names)}", "start"))
        self.pooled, self.names, self.start, self.temperature = pooled, tuple(names), start, temperature
        self.granularity = granularity
        ranges.require(
            self,
            {
                "temperature": ranges.positive(temperature),
                "granularity": ranges.one_of(get_args(Granularity), granularity),
            },
        )
        self._place_of = _places(pooled, names, granularity)
        self.places = list(dict.fromkeys(self._place_of.values()))
        self._position = {place: position for position, place in enumerate(self.places)}
        config: Any = pooled.model.config
        k, hidden, linear = len(names), config.get_text_config().hidden_size, linear_layers(pooled.model)
        widths = [linear[place][0] if granularity == "module" else hidden for place in self.places]
        self.weight = nn.ParameterList([nn.Parameter(torch.zeros(k, width)) for width in widths])
        self.bias = nn.Parameter(torch.zeros(len(self.places), k))
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
        try:
            with pooled.use(stacks, self, () if self.granularity == "module" else self.places):
                yield
        finally:
            self._now.clear()

    def enter(self, place: str, x: Tensor) -> None:
        """Weighs the adapters by what enters a place, `(..., d)`."""
        self._now[place] = self._weigh(place, x.reshape(-1, x.shape[-1]))

    def _weigh(self, place: str, x: Tensor) -> Tensor:
        """w `(tokens, k)` for what enters a place, `(tokens, d)`."""
        position = self._position[place]
        (z,) = project(x, (self.weight[position].to(x.device),))
        return torch.softmax(z / self.temperature, -1) + self.bias[position].to(z)

    def mix(self, u: Tensor, x: Tensor, stack: Stack, call: Call) -> Tensor:
        if self.granularity == "module":
            gate = self._weigh(call.name, x)
        else:
            gate = self._now[self._place_of[call.name]].to(u.device)
        if gate.shape[0] != u.shape[0]:
            what = f"{call.name} sees {u.shape[0]} tokens and its decoder layer {gate.shape[0]}"
            fix = "behind a token dispatch gates have to be of granularity module"
            raise HeadwaterError(Problem(what, fix=fix))
        call.saw_gate(gate)
        return u * stack.spread(gate)

    def save(self, folder: str | Path, pool: AdapterPool, **fields: Any) -> None:
        """Write the gates. `fields` are kept beside them, e.g. how they were trained."""
        made = {"start": self.start, "temperature": self.temperature, "granularity": self.granularity}
        write_fitted(folder, KIND, pool, self.names, {"places": self.places, **made, **fields}, self.state_dict())

    @classmethod
    def load(cls, folder: str | Path, pool: AdapterPool, pooled: PooledModel) -> FlowGate:
        """Gates as they were saved.

        Raises:
            HeadwaterError: the files are damaged, or made for other adapters or another model.
        """
        names, fields, tensors = read_fitted(folder, KIND, pool)
        made = (fields.get("temperature", 1.0), fields.get("granularity", "layer"))
        gate = cls(pooled, names, fields.get("start"), *made)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        wanted = {name: tensor.shape for name, tensor in gate.state_dict().items()}
        if shapes != wanted or fields.get("places") != gate.places:
            what = "the gates do not fit these adapters on this model: their places or sizes are others"
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


def _places(pooled: PooledModel, names: Sequence[str], granularity: Granularity) -> dict[str, str]:
    """Adapted layer -> the module whose input its gate reads, in the model's order."""
    lists = {name for name, module in pooled.model.named_modules() if isinstance(module, nn.ModuleList)}
    adapted = {layer for name in names for layer in pooled.adapter(name).layers}
    ordered = [layer for layer, _ in pooled.model.named_modules() if layer in adapted]
    if granularity == "module":
        return {layer: layer for layer in ordered}
    found, outside = {}, []
    for layer in ordered:
        parts = layer.split(".")
        ends = (i for i in range(1, len(parts)) if ".".join(parts[:i]) in lists)
        end = next(ends, None)
        if end is None:
            what = "this layer is in no decoder layer, whose input a gate could read"
            outside.append(Problem(what, layer, "take gates of granularity module"))
        else:
            number = parts[end] if granularity == "layer" else "0"
            found[layer] = ".".join([*parts[:end], number])
    if outside:
        raise HeadwaterError(*outside)
    return found
