"""What one forward pass carries to the adapted layers: task ids, the padding mask, auxiliary losses, observers.

A pre-hook on the base model opens a `State` per forward and a hook closes it. Gradient checkpointing runs layers again
in backward, long after the state is closed and perhaps after further forwards; so each checkpointed call remembers the
state it ran under. Thread-local storage keeps threads apart; context variables would, too, but break compiled graphs.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..ops import attach_loss

KEYWORD = "headwater_task_ids"
Observer = Callable[[str, Tensor], None]


@dataclass
class State:
    """One forward pass.

    Args:
        batch, length: rows and positions of the input, 0 when unknown.
        task_ids: LongTensor `(batch,)`, or None.
        valid: bool `(batch, length)`, False on padding, or None when no 2-D mask was given.
        loss_scale: factor on auxiliary losses, so that accumulated micro-batches add up to one mean.
        losses: name -> [sum over layers, detached; number of layers]; recomputed layers are not counted again.
    """

    batch: int = 0
    length: int = 0
    task_ids: Tensor | None = None
    valid: Tensor | None = None
    loss_scale: float | Tensor = 1.0
    losses: dict[str, list[Any]] = field(default_factory=dict)
    closed: bool = False


class Context:
    """Shared by a model's adapted layers."""

    def __init__(self) -> None:
        self._local = threading.local()
        self.observers: list[Observer] = []
        self.loss_scale = 1.0
        self.needs_state = False  # some branch reads the state, so checkpointed layers must carry it
        self.last_losses: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type[Context], tuple[()]]:
        return Context, ()  # thread-local storage cannot be copied; a copied model starts with its own

    @property
    def state(self) -> State | None:
        return getattr(self._local, "state", None)

    @contextlib.contextmanager
    def use(self, state: State | None) -> Iterator[None]:
        before, self._local.state = self.state, state
        try:
            yield
        finally:
            self._local.state = before

    @contextlib.contextmanager
    def task_ids(self, ids: Any) -> Iterator[None]:
        before, self._local.ids = getattr(self._local, "ids", None), _as_ids(ids)
        try:
            yield
        finally:
            self._local.ids = before

    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Forward pre-hook of the base model: takes the keyword out and opens the state."""
        ids = kwargs.pop(KEYWORD, None)
        ids = getattr(self._local, "ids", None) if ids is None else _as_ids(ids)
        inputs = kwargs.get("input_ids", args[0] if args else None)
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        batch, length = inputs.shape[:2] if isinstance(inputs, Tensor) and inputs.dim() > 1 else (0, 0)
        mask = kwargs.get("attention_mask")
        valid = None
        if isinstance(mask, Tensor) and mask.dim() == 2 and length and mask.shape[1] >= length:
            valid = mask[:, -length:].bool()  # with a cache the mask also covers the past
        state = State(batch, length, _fit_ids(ids, batch), valid, self.loss_scale)
        labels, total = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        if isinstance(labels, Tensor) and total is not None:
            # the trainer normalises by the tokens of the whole optimiser step: this micro-batch's share of them
            state.loss_scale = (labels[..., 1:] != -100).sum() / total
        self._local.state = state
        if self.needs_state and module.training:
            self.carry_through_checkpoints(module)
        return args, kwargs

    def close(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of the base model, called on errors as well."""
        state = self.state
        if state is not None:
            state.closed = True
            self.last_losses = {name: total / count for name, (total, count) in state.losses.items()}
        self._local.state = None

    def carry_through_checkpoints(self, model: nn.Module) -> None:
        """Makes transformers' checkpointed layers remember the state of the forward they belong to."""
        for module in model.modules():
            checkpoint = module.__dict__.get("_gradient_checkpointing_func")
            if checkpoint is not None and not hasattr(checkpoint, "carries_headwater_state"):
                module.__dict__["_gradient_checkpointing_func"] = _Carrying(self, checkpoint)


class _Carrying:
    """`checkpoint(function, *args)` where `function`, whenever it runs, runs under the state of the first call."""

    carries_headwater_state = True

    def __init__(self, context: Context, checkpoint: Callable[..., Any]):
        self.context, self.checkpoint = context, checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = self.context.state

        @functools.wraps(function)
        def under_state(*inner: Any, **named: Any) -> Any:
            with self.context.use(state):
                return function(*inner, **named)

        return self.checkpoint(under_state, *args, **kwargs)


@dataclass
class Call:
    """One adapted layer's view of the forward pass. Activations come flattened, `(tokens, width)`."""

    name: str
    shape: tuple[int, ...]  # x's leading dimensions
    context: Context
    state: State | None
    losses: list[Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def task_of_token(self) -> Tensor:
        """LongTensor `(tokens,)`, the task of each token.

        Raises:
            HeadwaterError: if no ids were given, or the activations no longer show which row a token belongs to.
        """
        state = self.state
        if state is None or state.task_ids is None:
            raise HeadwaterError(
                Problem(
                    f"the adapter on {self.name} needs the task of every row, and none was given",
                    fix=f"pass {KEYWORD}=LongTensor[batch] to the model, or wrap the call in "
                    "`with headwater.task_ids(model, ids):`",
                )
            )
        rows = state.task_ids.shape[0]
        if self.shape[0] != rows and self.tokens != rows * max(state.length, 1):
            raise HeadwaterError(
                Problem(
                    f"the activations at {self.name}, {tuple(self.shape)}, do not show which of {rows} rows a token "
                    "belongs to",
                    fix="do not target layers behind a token dispatch (mixture-of-experts blocks) with this method",
                )
            )
        return state.task_ids.repeat_interleave(self.tokens // rows)

    def valid_tokens(self) -> Tensor | None:
        """bool `(tokens,)`, False on padding; None when every token counts."""
        state = self.state
        if state is None or state.valid is None or state.valid.numel() != self.tokens:
            return None
        return state.valid.reshape(-1)

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """Mean of `(tokens, k)` over tokens that are not padding, `(k,)`."""
        valid = self.valid_tokens()
        if valid is None:
            return values.mean(0)
        weight = valid.to(values).unsqueeze(-1)
        return (values * weight).sum(0) / weight.sum().clamp_min(1)

    def saw_gate(self, gate: Tensor) -> None:
        """Shows a gate `(tokens, N)` to the observers, in x's leading shape."""
        for observer in self.context.observers:
            observer(self.name, gate.detach().float().unflatten(0, self.shape))

    def add_loss(self, name: str, loss: Tensor, weight: float) -> None:
        """Adds `weight * loss` to the training loss, whoever computes that, and logs `loss` under `name`."""
        scale = 1.0 if self.state is None else self.state.loss_scale
        self.losses.append(loss * weight * scale)
        if self.state is not None and not self.state.closed:
            entry = self.state.losses.setdefault(name, [0.0, 0])
            entry[0] = entry[0] + loss.detach()
            entry[1] += 1

    def attach(self, y: Tensor) -> Tensor:
        """Ties the losses added so far to the layer's output."""
        for loss in self.losses:
            y = attach_loss(y, loss)
        return y


def _as_ids(ids: Any) -> Tensor:
    ids = torch.as_tensor(ids)
    if ids.dim() == 0:
        ids = ids.reshape(1)
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool or ids.numel() == 0:
        raise HeadwaterError(
            Problem(
                f"task ids are one integer per row, shape (batch,), not {tuple(ids.shape)} of {ids.dtype}",
                KEYWORD,
            )
        )
    return ids.long()


def _fit_ids(ids: Tensor | None, batch: int) -> Tensor | None:
    """Repeats ids for beams and returned sequences, which transformers expands row by row."""
    if ids is None or batch == 0 or ids.shape[0] == batch:
        return ids
    if batch % ids.shape[0]:
        raise HeadwaterError(
            Problem(f"{ids.shape[0]} task ids do not fit a batch of {batch} rows", KEYWORD, "give one id per row")
        )
    return ids.repeat_interleave(batch // ids.shape[0])
