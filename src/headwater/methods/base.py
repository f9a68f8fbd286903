"""All that a method file may lean on: its config, its branch, and what registers them.

A method is one file that defines a `MethodConfig` (what the user sets), a `Branch` (parameters, initialisation and what
happens in rank space on one linear layer) and registers both. The PEFT side, written once, is in `headwater.tuner`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..ops import (
    Adapter,
    GatedHeads,
    Tensors,
    adapted_linear,
    add_update,
    are_own,
    draw_seeds,
    drop,
    implementation,
    is_watched,
    project,
    read_exactly,
    read_plainly,
    whole,
    without_autocast,
)
from .call import Call
from .config import MethodConfig as MethodConfig
from .registry import Method as Method
from .registry import register as register


@dataclass(frozen=True)
class LayerShape:
    """The linear layer a branch is attached to: its name, sizes, and rank and alpha after patterns.

    `shared` is one dictionary for all layers of an adapter, for what they have in common while they are being made; the
    functions in its list "finish" are called once all are.
    """

    name: str
    in_features: int
    out_features: int
    r: int
    alpha: float
    weight: Tensor | None = None  # (d_out, d_in) as floats, None where the base is quantised or on the meta device
    on_meta: bool = False  # the base has no values: the adapter is only looked at
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Heads:
    """What one adapted layer holds, for analysis.

    Shapes: A `(r, d_in)`, B `(N, d_out, r)`, router `(N, d_in)`; A0 `(r, d_in)` and B0 `(d_out, r)` are the frozen
    compensation of the starting offset, None where a method has none. `scaling` is the factor s.
    """

    A: Tensor
    B: Tensor
    router: Tensor | None
    A0: Tensor | None
    B0: Tensor | None
    scaling: float


class NotMergeable(HeadwaterError):  # noqa: N818, it states a fact about the method
    """No single weight equals the adapted layer. Carries the reason and a way out."""


class Branch(nn.Module):
    """One adapter's parameters on one linear layer, and what it adds to that layer's output.

    A subclass creates its tensors in `__init__`, float32 on the CPU, drawn from `generator`; frozen ones are buffers,
    because PEFT turns the gradients of parameters back on. It says what it reads from x (`reads`), what happens in rank
    space (`mix`) and what it writes to y (`writes`).
    Keep parameters directly on the module: PEFT's file format has room for one name behind the adapter's. What `reads`,
    `writes` and `factors` give may change with these tensors and with `scaling` alone: decoding holds it until they do.
    """

    by_prompt: bool = False  # goes by what a row's text begins with, so a decoder beside an encoder has nothing to show
    meets_ranks: bool = False  # its learning forwards talk to other ranks, so all ranks run as many of them
    needs_state: bool = False  # uses task ids, the padding mask or auxiliary losses of the forward pass
    has_losses: bool = False  # adds auxiliary losses, which are of a whole batch
    head_dropout: float = 0.0  # dropout that `mix` makes from `call.seed`
    folds: bool = False  # may have a `folded_weight`
    chooses_by: int | None = None  # which of the reads are the logits of a choice: rounded to half precision it differs
    input_masks: int = 1  # dropout masks on x; above 1 `mix` gets the ranks behind each, side by side, in training
    _names: tuple[str, ...] = ()  # of its parameters, in whose place FSDP1 and `nn.DataParallel` put plain tensors

    def __init__(self, config: Any, shape: LayerShape, generator: torch.Generator):
        super().__init__()
        self.lora_dropout = config.lora_dropout
        self.scaling = config.scaling(shape.r, shape.alpha)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if param is not None and name not in self._names:
            self._names += (name,)

    @property
    def drops(self) -> bool:
        return self.lora_dropout > 0 or self.head_dropout > 0

    @property
    def draws(self) -> bool:
        """Whether a call of `adapter` needs seeds."""
        return self.training and self.drops

    def reads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Down-projections `(k, d_in)`: those behind the input dropout, and those that see x as it is."""
        raise NotImplementedError

    def mix(self, *ranks: Any, **call: Any) -> Tensor:
        """`mix(u_1, u_2, ..., call=call)`: from what was read, in the order of `reads`, to what is written; by default
        all ranks as they are, side by side.

        Each `u_i` is `(tokens, k_i)`; the result is `(tokens, m)`. `call` is the `headwater.methods.call.Call`.
        Training runs it twice, without gradients in forward and from the same ranks in backward (`call.again`), so that
        what happens once is behind `call.first_time`, what happens in training alone behind `call.training`, as the
        model may be in another mode by then, and dropout comes from `call.seed`, never from a global generator.
        Gradients reach the ranks and what `mixes` names.
        """
        return ranks[0] if len(ranks) == 1 else torch.cat(ranks, dim=-1)

    @property
    def unmixed(self) -> bool:
        """Whether `mix` is the default one."""
        return type(self).mix is Branch.mix

    def writes(self) -> Tensor:
        """The up-projections, `(m, d_out)`."""
        raise NotImplementedError

    def writes_apart(self) -> tuple[Tensor, ...]:
        """The same in parts, for a method whose `writes` would have to copy them together; frozen ones by themselves,
        so that no gradient is computed for them."""
        return (self.writes(),)

    def mixes(self) -> tuple[Tensor, ...]:
        """All parameters that `mix` may use: the branch's own, and behind them those of other branches, for a method
        that has such and takes them in `as_then`."""
        return tuple([getattr(self, name) for name in self._names])

    def as_then(self, others: Sequence[Tensor]) -> Branch:
        """The branch with these in place of what `mixes` gives: in backward with those of forward, whatever has become
        of the parameters (`torch.func.functional_call`). A copy, as others may use the branch at the same time."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, **dict(zip(self._names, others, strict=False)))  # found before parameters
        return twin

    def forward(self, base: Tensor | nn.Linear, x: Tensor, call: Call) -> Tensor:
        """The frozen layer's output plus the branch's update, `(tokens, d_out)`.

        Args:
            base: the frozen layer's output, or a frozen layer that `ops.is_plain`, run here.
            x: `(tokens, d_in)`.
        """
        # In training without gradients, too: the two forwards of reentrant checkpointing must round alike.
        plain = torch.compiler.is_compiling() or implementation(x.device) == "reference"
        if (call.learns or self.training) and not plain:
            return adapted_linear(self.adapter(x, call), base, x)
        y = base if isinstance(base, Tensor) else F.linear(x, base.weight, base.bias)
        if self.training:
            adapter = self.adapter(x, call)
            h, losses = adapter.mix(read_plainly(adapter, x), x, None)
            call.losses.extend(losses)
        else:
            dropped, clean = self.reads()
            h = self._mix_exactly(project(x, dropped + clean), x, call)
        return add_update(y, h, self.writes_apart(), scale=self.scaling, in_place=y is not base)

    def adapter(self, x: Tensor, call: Call, seeds: tuple[Tensor, Tensor] | None = None) -> Adapter:
        """What `headwater.ops` needs to know of this branch in this call.

        Args:
            seeds: of the dropout on x and in rank space; drawn here if there are none and the branch `draws`.
        """
        if seeds is None and self.draws:
            seeds = draw_seeds(x.device, 1)[0]
        of_input, seed = seeds or (None, None)
        of_input = of_input if self.lora_dropout > 0 else None
        by_hand = not (self.training and call.align is not None)
        heads = self.gated_heads(call, seed) if by_hand else None
        return Adapter(
            self.tensors if heads is None else self.tensors_by_hand,
            functools.partial(self._mix, call, seed, of_input, self.training),
            self.scaling,
            self.lora_dropout,
            of_input,
            self.input_masks,
            heads,
            self.unmixed and by_hand,
            self.tensors_at_rest,
            None if call.state is None else call.state.stacks,
        )

    def tensors(self, others: Sequence[Tensor] | None = None) -> Tensors:
        """As `headwater.ops.Adapter.tensors`."""
        if others is None:
            return Tensors(self.writes_apart(), *self.reads(), self.mixes())
        then = self.as_then(others)
        return Tensors(then.writes_apart(), *then.reads(), tuple(others))

    def tensors_by_hand(self) -> Tensors:
        """Where `mix` does not run, nobody needs what it uses besides."""
        return Tensors(self.writes_apart(), *self.reads(), ())

    def tensors_at_rest(self) -> Tensors | None:
        """As `headwater.ops.Adapter.at_rest`."""
        if is_watched(self) or not whole(self):  # a hook may change them in the forward
            return None
        tensors = self.tensors_by_hand()
        return tensors if are_own(tensors, self) else None

    def gated_heads(self, call: Call, seed: Tensor | None) -> GatedHeads | None:
        """What `mix` does, where that is plain gated heads under masks of `seed`; None where it is something else."""
        return None

    def _mix(
        self,
        call: Call,
        seed: Tensor | None,
        of_input: Tensor | None,
        training: bool,
        ranks: tuple[Tensor, ...],
        x: Tensor,
        others: Sequence[Tensor] | None,
    ) -> tuple[Tensor, list[Tensor]]:
        call = dataclasses.replace(call, seed=seed, training=training, again=others is not None, losses=[])
        branch = self if others is None else self.as_then(others)
        if call.align is not None and training:
            detached = functools.partial(branch._first_ranks, x.detach(), of_input)
            ranks = (call.align(call, ranks[0], detached), *ranks[1:])
        return branch._mix_exactly(ranks, x, call, of_input), call.losses

    def _mix_exactly(self, ranks: Sequence[Tensor], x: Tensor, call: Call, seed: Tensor | None = None) -> Tensor:
        """`mix` in float32 at least, by the same arithmetic with gradients and without: autocast does not reach it."""
        ranks = self.exact(ranks, x, seed)
        if not torch.is_autocast_enabled(x.device.type):
            return self.mix(*ranks, call=call)
        with without_autocast(x.device):
            return self.mix(*ranks, call=call)

    def exact(self, ranks: Sequence[Tensor], x: Tensor, seed: Tensor | None = None) -> Sequence[Tensor]:
        """The ranks, with the logits of a choice read from x once more in float32 where x, or autocast, is of half
        precision. Their gradient is that of the logits that were there.

        Args:
            seed: of the dropout on x; None without.
        """
        at, device = self.chooses_by, x.device.type
        if at is None or device == "meta":
            return ranks
        autocast = torch.is_autocast_enabled(device)
        if not (x.dtype in (torch.bfloat16, torch.float16) or autocast):
            return ranks
        dropped, clean = self.reads()
        x = x.to(torch.get_autocast_dtype(device)) if autocast else x  # as training has it, where x comes cast
        seed = seed if at < len(dropped) else None
        logits, given = read_exactly(x, (*dropped, *clean)[at], seed, self.lora_dropout), ranks[at]
        return (*ranks[:at], given + (logits - given.detach()), *ranks[at + 1 :])

    def _first_ranks(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """What the first down-projection reads from x once more, under the same dropout."""
        first, p = self.reads()[0][:1], self.lora_dropout
        if seed is None:
            return project(x, first)[0]
        tokens = x.shape[0]
        parts = [project(drop(x, seed, p, first_row=n * tokens), first)[0] for n in range(self.input_masks)]
        return torch.cat(parts, -1)

    def folded_weight(self, weight: Tensor, *, transposed: bool) -> Tensor | None:
        """A copy of the base layer's weight that takes its place, with some of the update in it; None for none.

        `transposed`: the weight is `(d_in, d_out)`.
        """
        return None

    def factors(self, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        """The update as one plain LoRA: A `(R, d_in)` and B `(d_out, R)` with B A what the branch adds, s included.

        Args:
            gate: `(N,)`, fixed gates where a method's gates depend on its input.
            task: the task, where a method has an update for each.

        Raises:
            NotMergeable: when no matrix equals the branch and neither was given.
        """
        raise NotImplementedError

    def delta_weight(self, gate: Tensor | None = None, task: int | None = None) -> Tensor:
        """The update as one matrix `(d_out, d_in)`; arguments and errors as of `factors`."""
        A, B = self.factors(gate, task)
        return B @ A

    def heads(self) -> Heads | None:
        """The branch's heads for analysis; None where a method has none."""
        return None


def merge_refusal(title: str) -> NotMergeable:
    """The refusal of a method whose gates depend on the input, with the ways out."""
    return NotMergeable(
        Problem(
            f"{title} cannot be merged exactly: its gates depend on the input, so no single weight equals it",
            fix="keep the adapter unmerged, or merge approximately with fixed gates: "
            "headwater.merge_with_gates(model, gates)",
        )
    )


def fixed_gate(gate: Any, num_heads: int) -> Tensor:
    """A gate to merge with, `(num_heads,)`.

    Raises:
        HeadwaterError: if it has another shape; a single number would otherwise count for every head.
    """
    gate = torch.as_tensor(gate)
    if gate.shape != (num_heads,):
        raise HeadwaterError(
            Problem(f"a fixed gate is one number per head, shape ({num_heads},), not {tuple(gate.shape)}", "gates")
        )
    return gate


def known_task(task: int, num_tasks: int) -> int:
    """The task to merge for.

    Raises:
        HeadwaterError: if it is out of range, or no number.
    """
    known = f"the adapter knows {num_tasks} tasks, 0 to {num_tasks - 1}"
    try:
        index = operator.index(task)
    except TypeError:  # the name of a task
        what = f"a task is the number it was trained under, not {task!r}: {known}"
        raise HeadwaterError(Problem(what, "task")) from None
    if not 0 <= index < num_tasks:
        raise HeadwaterError(Problem(f"task {task} is out of range: {known}", "task"))
    return index


def kaiming(rows: int, columns: int, generator: torch.Generator, *, batch: tuple[int, ...] = ()) -> Tensor:
    """`(*batch, rows, columns)` from U(-1/sqrt(columns), 1/sqrt(columns)): PEFT's Kaiming-uniform with a = sqrt(5)."""
    bound = 1 / math.sqrt(columns)
    return torch.empty(*batch, rows, columns).uniform_(-bound, bound, generator=generator)


def normal(std: float, *shape: int, generator: torch.Generator) -> Tensor:
    """A float32 tensor from N(0, std^2), drawn on the CPU so that a seed means the same everywhere."""
    return torch.empty(*shape).normal_(0, std, generator=generator)
