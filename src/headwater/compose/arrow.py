"""Arrow (arXiv 2405.11157, ICML 2024): every token goes to the adapters that change its direction most. No training.

    v_e = the top right singular vector of B_e A_e                one per adapter and layer
    z_e = | v_e . u |                                             u: the token at that layer
    c   = softmax(top-k of z / T), 0 elsewhere
    dy  = sum_e c_e s_e B_e A_e u                                 mixing outputs, as PEFT does
    dy  = (sum_e c_e s_e B_e) (sum_e c_e A_e) u                   mixing factors, as the authors' own code does

B A is never formed: with A' = Q_a R_a and B = Q_b R_b the vector is Q_a times the top right singular vector of the
r x r matrix R_b R_a'. That is exact, where PEFT's version takes 15 power iterations from a random start.

GenKnowSub takes the mean of some general adapters g = 1..m off every adapter first, and routes by what is left:

    s_e B_e A_e - 1/m sum_g s_g B_g A_g                           of updates
    s (B_e - 1/m sum_g B_g) (A_e - 1/m sum_g A_g)                 of factors, as PEFT does

The second is no difference of updates, and changes when an adapter is written as (B R, R^-1 A), which is the same one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import HeadwaterError, Problem
from ..methods.call import Call
from . import ranges
from .adapter import Adapter
from .merge import concat, fuse, require_one_shape, require_same_ranks
from .mixed import PooledModel, Stack
from .pool import AdapterPool
from .saved import read_fitted, write_fitted

KIND = "arrow"
NORMS = ("none", "unit", "sqrt_d")
COMBINE = ("output", "factors")
SUBTRACT = ("updates", "factors")


@dataclass(frozen=True)
class ArrowSpec:
    """How Arrow routes.

    Args:
        top_k: adapters per token and layer; all of them where there are fewer.
        temperature: T, above 0.
        input_norm: z grows with u, and so routing sharpens with it. `none` leaves that as it is in the paper; `unit`
            divides u by its length; `sqrt_d` does that and multiplies by the square root of its width.
        combine: what the coefficients mix, the adapters' outputs or their `factors`. Factors need equal ranks and have
            cross terms c_i c_j B_i A_j.
        subtract: what the general adapters are taken off, updates or factors. Factors need adapters of one shape.
    """

    top_k: int = 3
    temperature: float = 1.0
    input_norm: Literal["none", "unit", "sqrt_d"] = "none"
    combine: Literal["output", "factors"] = "output"
    subtract: Literal["updates", "factors"] = "updates"

    def __post_init__(self) -> None:
        ranges.require(
            self,
            {
                "top_k": ranges.at_least(1, self.top_k),
                "temperature": ranges.positive(self.temperature),
                "input_norm": ranges.one_of(NORMS, self.input_norm),
                "combine": ranges.one_of(COMBINE, self.combine),
                "subtract": ranges.one_of(SUBTRACT, self.subtract),
            },
        )


def prototype(A: Tensor, B: Tensor) -> Tensor:
    """The direction `(d_in,)` of unit length that B A stretches most, float64; zeros where B A is zero."""
    Qa, Ra = torch.linalg.qr(A.T.double())
    _, Rb = torch.linalg.qr(B.double())
    _, sizes, directions = torch.linalg.svd(Rb @ Ra.T)
    return Qa @ directions[0] if sizes[0] > 0 else Qa.new_zeros(Qa.shape[0])


class Arrow:
    """Arrow's routing among some of a pool's adapters. It notices when one of them is replaced in the pool.

    Args:
        pooled: the model.
        pool: where the adapters are.
        names: which of them; all by default, but for the general ones.
        general: adapters of general knowledge, whose mean is taken off each of the others (GenKnowSub). The pool keeps
            its adapters as they are: the difference is made anew whenever it is needed, and never saved.

    Raises:
        HeadwaterError: there is nothing to route among, an adapter is named twice, a general one is also one of
            `names`, or adapters differ in rank or shape where factors are mixed or subtracted.
    """

    def __init__(
        self,
        pooled: PooledModel,
        pool: AdapterPool,
        names: Sequence[str] | None = None,
        spec: ArrowSpec | None = None,
        general: Sequence[str] = (),
    ):
        self.pooled, self.pool, self.spec, self.general = pooled, pool, spec or ArrowSpec(), tuple(general)
        self.names = tuple([n for n in pool.names if n not in self.general] if names is None else names)
        if not self.names:
            raise HeadwaterError(Problem("there are no adapters to route among", str(pool.path)))
        ranges.require_once(self.names)
        ranges.require_once(self.general)
        if both := [name for name in self.names if name in self.general]:
            what = f"{', '.join(both)} would be taken off itself: it is general, and routed to as well"
            raise HeadwaterError(Problem(what, "general", "name an adapter as one of the two"))
        self._made_of: list[dict[str, str]] = []
        self.prototypes: dict[str, Tensor] = {}  # layer -> (adapters, d_in), float32
        self.refresh()

    def refresh(self) -> None:
        """Reads the adapters again and makes their prototypes anew."""
        self.pooled.forget()
        self._build({})

    def _build(self, prototypes: dict[str, Tensor]) -> None:
        self._made_of = self._hashes()
        adapters = self._experts()
        self._stacks: dict[str, Stack] = {}
        self._absent: dict[str, Tensor] = {}  # layer -> bool (adapters,), those that do not adapt it
        self._most: dict[str, int] = {}  # layer -> adapters that a token can go to there
        for layer, stack in self.pooled.stack(adapters).items():
            held = [adapter.layers.get(layer) for adapter in adapters]
            self._absent[layer] = torch.tensor([factors is None for factors in held], device=stack.down.device)
            self._most[layer] = min(self.spec.top_k, sum(factors is not None for factors in held))
            if layer not in prototypes:
                width = stack.down.shape[1]
                rows = [torch.zeros(width) if f is None else prototype(f.A.cpu(), f.B.cpu()).float() for f in held]
                prototypes[layer] = torch.stack(rows)
            down = torch.cat([stack.down, prototypes[layer].to(stack.down)])
            self._stacks[layer] = dataclasses.replace(stack, down=down)
        self.prototypes = prototypes

    def _experts(self) -> list[Adapter]:
        """The adapters to route among, general knowledge taken off."""
        adapters, general = ([self.pooled.adapter(n) for n in names] for names in (self.names, self.general))
        if general:
            factors = self.spec.subtract == "factors"
            if factors:
                require_one_shape([*adapters, *general], "subtract updates instead, or choose adapters of one shape")
            less = [1.0, *[-1 / len(general)] * len(general)]
            adapters = [(fuse if factors else concat)([one, *general], less, one.name) for one in adapters]
        if self.spec.combine == "factors":
            require_same_ranks(adapters, "combine outputs instead, or choose adapters of one rank")
        return adapters

    def _hashes(self) -> list[dict[str, str]]:
        # of the config, too, which scales the weights; that it may change harmlessly costs a refresh
        return [self.pool[name].sha256 for name in (*self.names, *self.general)]

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Forwards and `generate` inside route every token at every layer."""
        if self._hashes() != self._made_of:
            self.refresh()
        with self.pooled.use(self._stacks, self):
            yield

    def mix(self, u: Tensor, x: Tensor, stack: Stack, call: Call) -> Tensor:
        z = u[:, stack.ranks :].abs()
        if self.spec.input_norm != "none":
            length = x.to(u.dtype).norm(dim=-1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
            z = z / length * (x.shape[-1] ** 0.5 if self.spec.input_norm == "sqrt_d" else 1.0)
        best = z.masked_fill(self._absent[call.name], -torch.inf).topk(self._most[call.name])
        chosen = torch.softmax(best.values / self.spec.temperature, -1)
        gate = torch.zeros_like(z).scatter(-1, best.indices, chosen)
        call.saw_gate(gate)
        ranks = u[:, : stack.ranks]
        if self.spec.combine == "output":
            return ranks * stack.spread(gate)
        # One mixed A reads the token, (tokens, r); every B writes that, by its own coefficient.
        blocks = (len(stack.key), -1)
        read = (ranks * gate.index_select(-1, stack.owner)).unflatten(-1, blocks).sum(-2, keepdim=True)
        return (stack.spread(gate).unflatten(-1, blocks) * read).flatten(-2)

    def save(self, folder: str | Path, **fields: Any) -> None:
        """Write the settings and the prototypes. `fields` are kept beside them."""
        kept = {**dataclasses.asdict(self.spec), "general": self.general, **fields}
        write_fitted(folder, KIND, self.pool, (*self.names, *self.general), kept, self.prototypes)

    @classmethod
    def load(cls, folder: str | Path, pool: AdapterPool, pooled: PooledModel) -> Arrow:
        """Routing as it was saved.

        Raises:
            HeadwaterError: the files are damaged, or the pool's adapters are others now.
        """
        names, fields, tensors = read_fitted(folder, KIND, pool)
        known = {field.name for field in dataclasses.fields(ArrowSpec)}
        arrow = cls.__new__(cls)
        arrow.pooled, arrow.pool, arrow.general = pooled, pool, tuple(fields.get("general") or ())
        arrow.names = tuple(name for name in names if name not in arrow.general)
        arrow.spec = ArrowSpec(**{key: value for key, value in fields.items() if key in known})
        for layer, rows in tensors.items():
            width = pool.fingerprint.layers.get(layer, (0, 0))[0]
            if rows.shape != (len(arrow.names), width) or not rows.isfinite().all():
                what = f"the prototypes at {layer} do not fit these adapters on this model"
                raise HeadwaterError(Problem(what, str(folder), "write the routing again with headwater pool arrow"))
        arrow._build(tensors)
        return arrow
