"""What a branch can know of the forward pass it is in."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import HeadwaterError, Problem
from ..ops import Stacks, attach_loss, following

KEYWORD = "headwater_task_ids"
LENGTHS = "headwater_row_lengths"
Observer = Callable[[str, Tensor], None]
Align = Callable[["Call", Tensor, Callable[[], Tensor]], Tensor]


@torch.compiler.assume_constant_result  # runs while a graph is being made, where a plain call would break it
def _warn_of_compiling() -> None:
    _warn_once()


@functools.cache  # dynamo makes Python forget which warnings it has shown
def _warn_once() -> None:
    warnings.warn(
        "compiled code cannot see what is done to the loss before backward (a division by the number of accumulated "
        "batches, a gradient scaler's factor), so auxiliary losses count in full in every backward; where the loss is "
        "multiplied by a factor, set `headwater.tuner.context_of(model).loss_scale` to it",
        stacklevel=3,
    )


@dataclass
class Packed:
    """Rows that follow one another in an input of shape `(1, tokens)`, without padding.

    Args:
        lengths: each row's tokens.
    """

    lengths: tuple[int, ...]
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """LongTensors `(tokens,)`: the row of each token, and its place in rows padded to the longest, flattened."""
        if device not in self._on:
            # Few numbers are copied, and all sizes are known here, so that no accelerator has to be waited for.
            lengths, tokens = torch.tensor(self.lengths).to(device, non_blocking=True), sum(self.lengths)
            rows = torch.arange(len(self.lengths), device=device)
            row = rows.repeat_interleave(lengths, output_size=tokens)
            shift = rows * max(self.lengths) - (lengths.cumsum(0) - lengths)
            self._on[device] = row, torch.arange(tokens, device=device) + shift.index_select(0, row)
        return self._on[device]


@dataclass
class State:
    """One forward pass of the whole model.

    Args:
        batch, length: rows and positions of the input, 0 when unknown; of packed rows, the longest one's positions.
        task_ids: LongTensor `(batch,)`, or None.
        valid: bool `(batch, length)`, False on padding, or None when no 2-D mask was given.
        prompt: bool of the input's shape, True on tokens that are neither padding nor learned; None without labels.
        packed: set where the input's rows are packed into one.
        begins: no key-value cache lies behind this forward; False in cached decoding.
        memory: what branches remember for as long as a key-value cache lives; fresh in each forward that starts one.
        loss_scale: factor on auxiliary losses, so that accumulated micro-batches add up to one mean.
        gradient: what the training loss gets as its own gradient, known in backward: the factor of a gradient scaler,
            one over the number of accumulated batches, or the like. A guess until then, and where nobody tells.
        followed: the hook that finds `gradient` in backward.
        losses: name -> [sum over layers, detached; number of layers].
        runs: layer -> how often it ran, where there are losses: some models run one layer at several depths.
        turns: the same of branches that remember something for each time.
        task_range: lowest and highest task id, once somebody asked.
        numbered: the rows' tasks numbered from 0, and how many there are, once somebody asked.
        closed: the forward is over; whatever still runs under this state is a recomputation in backward.
        outer: of an encoder's state, the whole model's; None where it runs by itself.
        read: of an encoder-decoder's state, that of layers in the decoder which read what the encoder wrote.
        stacks: all layers' stacked weights, where they are made together.
    """

    batch: int = 0
    length: int = 0
    task_ids: Tensor | None = None
    valid: Tensor | None = None
    prompt: Tensor | None = None
    packed: Packed | None = None
    begins: bool = True
    memory: dict[Any, Any] = field(default_factory=dict)
    loss_scale: float | Tensor = 1.0
    gradient: float | Tensor = 1.0
    followed: Any = None
    losses: dict[str, list[Any]] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    turns: dict[Any, int] = field(default_factory=dict)
    task_range: tuple[int, int] | None = None
    numbered: tuple[Tensor, int] | None = None
    closed: bool = False
    outer: State | None = None
    read: State | None = None
    stacks: Stacks | None = None

    def range_of_tasks(self, ids: Tensor) -> tuple[int, int]:
        if self.task_range is None:  # once per forward, because reading it waits for an accelerator
            low, high = torch.stack(torch.aminmax(ids)).tolist()
            self.task_range = (low, high)
        return self.task_range


@dataclass
class Call:
    """One adapted layer's view of the forward pass. Activations come flattened, `(tokens, width)`.

    Args:
        name: the layer's name in the base model.
        shape: x's leading dimensions, usually `(batch, length)`.
        state: the forward's state; None for a layer run on its own.
        observers: called with the layer's name and each gate.
        merging: likewise, with what `Branch.factors` takes in the gate's place.
        align: an alignment loss; given A x, `(tokens, r)`, and how to compute it from a detached x, returns A x with
            the loss attached.
        seed: of the dropout in rank space (`headwater.ops.dropout`), drawn for each run of each branch in training.
        learns: whether gradients are taken.
        training: the branch is in training mode, or was in the forward of which this is the backward.
        again: the branch computes its rank space a second time, in backward; nothing is counted or shown.
        turns: which of its layer's runs this is, by who counts in `State.turns`; the same in backward.
    """

    name: str
    shape: tuple[int, ...]
    state: State | None = None
    observers: list[Observer] = field(default_factory=list)
    merging: list[Observer] = field(default_factory=list)
    align: Align | None = None
    losses: list[Tensor] = field(default_factory=list)
    seed: Tensor | None = None
    learns: bool = field(default_factory=torch.is_grad_enabled)
    training: bool = False
    again: bool = False
    turns: dict[Any, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def observed(self) -> bool:
        """Whether anybody wants to see the gates."""
        return bool(self.observers or self.merging)

    @property
    def first_time(self) -> bool:
        """False whenever the layer runs again in backward: count and log only when True."""
        return not self.again and (self.state is None or not self.state.closed)

    def task_of_row(self, num_tasks: int | None = None) -> Tensor:
        """LongTensor `(rows,)`, the task of each row of the batch.

        Args:
            num_tasks: ids must be below it.

        Raises:
            HeadwaterError: if no ids were given, one is out of range, or the activations no longer show which row a
                token belongs to.
        """
        state = self.state
        if state is None or state.task_ids is None:
            raise HeadwaterError(
                Problem(
                    f"the adapter on {self.name} needs the task of every row, and none was given",
                    fix=f"pass {KEYWORD}=LongTensor[batch] to the model, or wrap the call in "
                    "`with headwater.task_ids(model, ids):`; a trainer that has them as a column of its data needs "
                    "remove_unused_columns=False, and its collator has to keep them (docs/training.md)",
                )
            )
        rows = state.task_ids.shape[0]
        self.check_rows(rows)
        if num_tasks is not None and not torch.compiler.is_compiling():
            low, high = state.range_of_tasks(state.task_ids)
            if low < 0 or high >= num_tasks:
                raise HeadwaterError(
                    Problem(
                        f"task id {low if low < 0 else high} is out of range: the adapter knows {num_tasks} tasks, "
                        f"0 to {num_tasks - 1}",
                        KEYWORD,
                        "give each row the id its task was trained under",
                    )
                )
        return state.task_ids

    def task_of_token(self, num_tasks: int | None = None) -> Tensor:
        """LongTensor `(tokens,)`, the task of each token. Raises as `task_of_row` does."""
        return self.to_tokens(self.task_of_row(num_tasks))

    def shows_rows(self, rows: int | None = None) -> bool:
        """Whether x still shows which of the batch's rows a token belongs to; behind a token dispatch it does not."""
        state = self.state
        rows = rows or (state.batch if state is not None else 0)
        if state is None or not rows:
            return len(self.shape) > 1
        if state.packed is not None:
            return self.tokens == sum(state.packed.lengths)
        return self.shape[0] == rows or self.tokens == rows * max(state.length, 1)

    def check_rows(self, rows: int | None = None) -> None:
        """Raises HeadwaterError unless x shows which row a token belongs to."""
        if self.shows_rows(rows):
            return
        count = rows or (0 if self.state is None else self.state.batch) or "the"
        raise HeadwaterError(
            Problem(
                f"the activations at {self.name}, {tuple(self.shape)}, do not show which of {count} rows a token "
                "belongs to",
                fix="do not target layers behind a token dispatch (mixture-of-experts blocks), those of all images "
                "together, or tables of positions with this method",
            )
        )

    def numbered_tasks(self) -> tuple[Tensor, int]:
        """LongTensor `(rows,)`, the batch's tasks in numbers from 0, and how many numbers there are, for what is made
        for each of them. An id is its own number, unless ids go beyond the number of rows."""
        ids, state = self.task_of_row(), cast(State, self.state)
        count = state.range_of_tasks(ids)[1] + 1
        ids = self.task_of_row(count)
        if count <= ids.shape[0]:
            return ids, count
        if state.numbered is None:  # once per forward, because an accelerator has to be waited for
            found, numbers = torch.unique(ids, return_inverse=True)
            state.numbered = numbers, found.shape[0]
        return state.numbered

    @property
    def _packed(self) -> Packed | None:
        return None if self.state is None else self.state.packed

    def by_row(self, values: Tensor) -> Tensor:
        """`(tokens, k)` as `(rows, tokens per row, k)`; packed rows are filled up with zeros."""
        state = self.state
        if self._packed is None or state is None:
            return values.unflatten(0, (self.shape[0] if state is None or not state.batch else state.batch, -1))
        place = self._packed.on(values.device)[1]
        filled = values.new_zeros(state.batch * state.length, *values.shape[1:])
        return filled.index_copy(0, place, values).unflatten(0, (state.batch, state.length))

    def from_rows(self, values: Tensor) -> Tensor:
        """The way back from `by_row`: `(rows, tokens per row, k)` as `(tokens, k)`."""
        flat = values.flatten(0, 1)
        return flat if self._packed is None else flat.index_select(0, self._packed.on(values.device)[1])

    def to_tokens(self, values: Tensor) -> Tensor:
        """A value per row, `(rows, ...)`, as one per token, `(tokens, ...)`."""
        if self._packed is None:
            return values.repeat_interleave(self.tokens // values.shape[0], dim=0)
        return values.index_select(0, self._packed.on(values.device)[0])

    def valid_tokens(self) -> Tensor | None:
        """bool `(tokens,)`, False on padding, on the device of the model's inputs; None when every token counts."""
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

    def saw_gate(self, gate: Tensor, merging: Callable[[], Tensor] | None = None) -> None:
        """Shows a gate `(tokens, N)` to the observers, in x's leading shape.

        Args:
            merging: makes what `Branch.factors` takes for each token, `(tokens, ...)`, where that is not the gate.
        """
        if not self.first_time:
            return
        for observers, shown in ((self.observers, lambda: gate), (self.merging, merging or (lambda: gate))):
            if observers:
                seen = shown().detach().float()
                for observer in observers:
                    observer(self.name, seen.reshape(*self.shape, *seen.shape[1:]))

    def add_loss(self, name: str, loss: Tensor, weight: float) -> None:
        """Adds `weight * loss` to the training loss, whoever computes that, and logs `loss` under `name`."""
        self.losses.append(self.weighted(loss, weight))
        self.log_loss(name, loss)

    def weighted(self, loss: Tensor, weight: float) -> Tensor:
        """`weight * loss` as a part of the training loss: scaled as that is, before backward and in it, and averaged
        over the layer's runs in this forward."""
        state = self.state
        if state is None:
            return loss * weight
        scale = state.loss_scale  # on the device of the model's inputs, which need not be the layer's
        scale = scale.to(loss.device) if isinstance(scale, Tensor) else scale
        if torch.compiler.is_compiling():  # nothing of a compiled forward can be told in its backward
            if not isinstance(scale, Tensor):  # whoever gave the step's number of tokens divides by nothing else
                _warn_of_compiling()
            return loss * weight * scale * state.gradient
        return following(loss * weight * scale, lambda: (state.outer or state).gradient / state.runs.get(self.name, 1))

    def log_loss(self, name: str, loss: Tensor) -> None:
        """Logs `loss`, averaged over layers, under `name`."""
        if self.state is not None and self.first_time:
            entry = self.state.losses.setdefault(name, [0.0, 0])
            loss, total = loss.detach(), entry[0]
            entry[0] = total + (loss.to(total.device) if isinstance(total, Tensor) else loss)
            entry[1] += 1

    def attach(self, y: Tensor) -> Tensor:
        """Ties the losses added so far to the layer's output."""
        for loss in self.losses:
            y = attach_loss(y, loss)
        return y
