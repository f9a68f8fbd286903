"""Chain of LoRA: train a LoRA, freeze it into the sum, start a fresh one with a fresh optimiser, repeat.

Xia et al., "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning", arXiv:2401.04151.

    y = W x + sum_{j < i} s_j B_j A_j x + s_i B_i A_i dropout(x)          link i trains, earlier links are tied

Tied links are stacked in the adapter: the base weight is never touched, so quantised bases work and half precision
cannot round the update away. The sum is one LoRA of rank r_1 + ... + r_M, and merges as one. The paper folds each link
into W instead; `mode="fold"` does so in a copy of W, which the base layer then uses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from .base import Branch, Heads, LayerShape, Method, MethodConfig, kaiming, register
from .call import Call


@dataclass
class ColaConfig(MethodConfig):
    """Chain of LoRA; `r` is the rank of the first link. See `MethodConfig` for the other fields.

    Args:
        num_links: M, the length of the chain; 1 is LoRA.
        link_ranks: rank of each link, e.g. [8, 4, 2], the first being `r`; by default all have `r`.
        knots: optimiser steps after which a link is tied, M - 1 of them, rising; by default the run is split evenly.
        alpha_mode: "fixed_scaling" keeps s when the rank changes; "fixed_alpha" keeps alpha.
        reinit_a: "fresh" draws a new A for each link; "same" starts each from the first link's, drawn
            from `init_seed`.
        train_factor: "both"; "B" with each link's A random and frozen; "A" with its B so.
        mode: "stack" computes tied links from their factors; "fold" adds them to a copy of the base weight, which costs
            that copy and makes a forward as cheap as one LoRA's. Both save the same file, and an adapter loaded for
            inference is stacked.
        lr_policy: "continue" leaves the learning rate to the trainer, one schedule over the whole run; "restart" gives
            each link a linear decay of its own.
        link_warmup: for "restart", the share of a link's steps over which its rate first rises.

    Raises:
        HeadwaterError: `mode="fold"` on a base weight that is quantised or of half precision, or a link of larger rank
            than its layer.
    """

    num_links: int = 3
    link_ranks: list[int] = field(default_factory=list)
    knots: list[int] = field(default_factory=list)
    alpha_mode: str = "fixed_scaling"
    reinit_a: str = "fresh"
    train_factor: str = "both"
    mode: str = "stack"
    lr_policy: str = "continue"
    link_warmup: float = 0.0

    def problems(self) -> list[Problem | None]:
        ranks, knots = self.link_ranks, self.knots
        return [
            *super().problems(),
            self.check("num_links", self.num_links >= 1, "must be at least 1"),
            self.one_of("alpha_mode", ("fixed_scaling", "fixed_alpha")),
            self.one_of("reinit_a", ("fresh", "same")),
            Problem("reinit_a='same' needs a seed to draw the first link's A from again", "init_seed", "set init_seed")
            if self.reinit_a == "same" and self.init_seed is None
            else None,
            self.one_of("train_factor", ("both", "A", "B")),
            self.one_of("mode", ("stack", "fold")),
            self.one_of("lr_policy", ("continue", "restart")),
            self.check("link_warmup", 0 <= self.link_warmup < 1, "must be in [0, 1)"),
            Problem(f"link_ranks needs {self.num_links} ranks of at least 1, not {ranks}", "link_ranks")
            if ranks and (len(ranks) != self.num_links or min(ranks) < 1)
            else None,
            Problem(
                f"link_ranks starts with {ranks[0]} and r is {self.r}, but both are the first link's rank",
                "link_ranks",
                f"set r to {ranks[0]}, by which the scaling then divides, or begin link_ranks with {self.r}",
            )
            if ranks and ranks[0] != self.r
            else None,
            Problem("link_ranks and rank_pattern cannot be combined", "rank_pattern")
            if ranks and self.rank_pattern
            else None,
            Problem(f"knots needs {self.num_links - 1} rising steps of at least 1, not {knots}", "knots")
            if knots and (len(knots) != self.num_links - 1 or sorted(set(knots)) != knots or knots[0] < 1)
            else None,
        ]

    def knots_of(self, total_steps: int) -> list[int]:
        """The steps after which a link is tied, in a run of `total_steps` optimiser steps."""
        return self.knots or [round(total_steps * i / self.num_links) for i in range(1, self.num_links)]

    def learning_rate_factor(self, step: int, total_steps: int) -> float:
        """What the peak learning rate is multiplied by after `step` steps: a linear decay for each link."""
        knots = [0, *self.knots_of(total_steps), total_steps]
        link = min(sum(step >= knot for knot in knots), self.num_links) - 1
        steps, done = knots[link + 1] - knots[link], step - knots[link]
        warmup = round(self.link_warmup * steps)
        return done / warmup if done < warmup else max(0.0, (steps - done) / max(1, steps - warmup))


class ColaBranch(Branch):
    A: Tensor
    B: Tensor
    A_tied: Tensor
    B_tied: Tensor
    link: Tensor

    def __init__(self, config: ColaConfig, shape: LayerShape, generator: torch.Generator):
        super().__init__(config, shape, generator)
        self.config, self.alpha, self.seed = config, shape.alpha, generator.initial_seed()
        self.ranks = config.link_ranks or [shape.r] * config.num_links
        most = min(shape.in_features, shape.out_features)
        if max(self.ranks) > most:
            too_large = ", ".join(str(rank) for rank in self.ranks if rank > most)
            raise HeadwaterError(
                Problem(
                    f"link_ranks has {too_large}, larger than layer {shape.name} ({shape.in_features} -> "
                    f"{shape.out_features}) allows",
                    "link_ranks",
                    f"use ranks <= {most}, or leave this layer out of target_modules",
                )
            )
        # Links have room from the start, so that neither the optimiser, nor DDP, nor a checkpoint ever sees a shape
        # change. A link of smaller rank has zero rows in A and B, which then get no gradient.
        R, d_in, d_out, tied = max(self.ranks), shape.in_features, shape.out_features, sum(self.ranks[:-1])
        for name, size in (("A", d_in), ("B", d_out)):
            if config.train_factor in ("both", name):
                self.register_parameter(name, nn.Parameter(torch.zeros(R, size)))
            else:
                self.register_buffer(name, torch.zeros(R, size))
        self.register_buffer("A_tied", torch.zeros(tied, d_in))
        self.register_buffer("B_tied", torch.zeros(tied, d_out))
        self.register_buffer("link", torch.zeros((), dtype=torch.int64))
        self._tied: int | None = 0
        self.start_link(0)
        self.learning_rate_factor = config.learning_rate_factor if config.lr_policy == "restart" else None
        self.folds = config.mode == "fold" and not config.inference_mode and not shape.on_meta
        if self.folds and (shape.weight is None or shape.weight.dtype not in (torch.float32, torch.float64)):
            kind = "quantised" if shape.weight is None else str(shape.weight.dtype).removeprefix("torch.")
            raise HeadwaterError(
                Problem(
                    f"links cannot be folded into {shape.name}: its weight is {kind}, which would round them away",
                    "mode",
                    "use mode: stack, or load the base model in float32",
                )
            )
        self._folded: Tensor | None = None  # made when first needed, from W and what is tied, so that resuming is exact
        self._folded_from: tuple[Any, ...] = ()  # which W

    def start_link(self, link: int) -> None:
        """Makes A and B those of a new link: one random, the other zero."""
        generator = torch.Generator().manual_seed(self.seed + (link if self.config.reinit_a == "fresh" else 0))
        rank = self.ranks[link]
        random, zero = (self.B, self.A) if self.config.train_factor == "A" else (self.A, self.B)
        size = random.shape[1]
        drawn = kaiming(rank, size, generator) if random is self.A else kaiming(size, rank, generator).T
        random.data.zero_()
        random.data[:rank] = drawn.to(random)
        zero.data.zero_()

    @property
    def tied(self) -> int:
        """How many links are tied: `link` as a number, read from the device only once after it was loaded."""
        if self._tied is None:
            self._tied = int(self.link)
        return self._tied

    def relative_scaling(self, link: int) -> float:
        """A link's scaling divided by the first one's."""
        if self.config.alpha_mode == "fixed_scaling":
            return 1.0
        return self.config.scaling(self.ranks[link], self.alpha) / self.scaling

    @torch.no_grad()
    def tie(self) -> None:
        """Ties the knot: the current link joins the frozen ones and a fresh one begins. The output does not change.

        Raises:
            HeadwaterError: the current link is the last.
        """
        link = self.tied
        if link + 1 == len(self.ranks):
            what = f"link {link + 1} of {len(self.ranks)} is the last, and no other can begin"
            raise HeadwaterError(Problem(what, "num_links", "make the chain longer, or tie fewer knots"))
        start, rank = sum(self.ranks[:link]), self.ranks[link]
        self.A_tied[start : start + rank] = self.A[:rank]
        self.B_tied[start : start + rank] = self.B[:rank] * self.relative_scaling(link)
        self.link += 1
        self._tied = link + 1
        self.start_link(link + 1)
        self._folded = None

    def before_training(self, total_steps: int) -> None:
        """Called by the trainer, which then knows how long the run is.

        Raises:
            HeadwaterError: if a link would never be trained.
        """
        knots = self.config.knots
        if knots and knots[-1] >= total_steps:
            raise HeadwaterError(
                Problem(
                    f"the last link would begin after step {knots[-1]}, but the run has {total_steps} steps",
                    "knots",
                    "give earlier knots or fewer links, or leave knots out to split the run evenly",
                )
            )

    def after_step(self, step: int, total_steps: int) -> bool:
        """Called by the trainer after each optimiser step.

        Returns:
            True if a knot was tied, so the optimiser must forget what it knows.
        """
        due = sum(step >= knot for knot in self.config.knots_of(total_steps))
        if self.tied >= min(due, len(self.ranks) - 1):
            return False
        self.tie()
        return True

    def folded_weight(self, weight: Tensor, *, transposed: bool) -> Tensor | None:
        if not self.folds:
            return None
        now = weight.data_ptr(), None if weight.is_inference() else weight._version
        if (self._folded is None or self._folded_from != now) and self.tied:
            with torch.inference_mode(False), torch.no_grad():  # what inference mode makes cannot be trained under
                tied = self.scaling * (self.B_tied.T @ self.A_tied)
                self._folded = weight.detach() + (tied.T if transposed else tied).to(weight)
            self._folded_from = now
        return self._folded

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._folded = self._tied = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._folded = None
        return super()._apply(fn, recurse)

    def reads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (self.A,), () if self.folds else (self.A_tied,)

    @property
    def unmixed(self) -> bool:
        return type(self).mix is ColaBranch.mix and self.config.alpha_mode == "fixed_scaling"

    def mix(self, z: Tensor, *tied: Tensor, call: Call) -> Tensor:
        if self.config.alpha_mode == "fixed_alpha":
            z = z * self.relative_scaling(self.tied)
        return super().mix(z, *tied)

    def writes(self) -> Tensor:
        return torch.cat(self.writes_apart())

    def writes_apart(self) -> tuple[Tensor, ...]:
        return (self.B,) if self.folds else (self.B, self.B_tied)

    def chain(self) -> tuple[Tensor, Tensor]:
        """A and B of all links, `(r_1 + ... + r_M, d_in)` and `(r_1 + ... + r_M, d_out)`."""
        A = torch.cat([self.relative_scaling(self.tied) * self.A, self.A_tied])
        return A, torch.cat([self.B, self.B_tied])

    def factors(self, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        A, B = self.chain()
        return A, self.scaling * B.T

    def heads(self) -> Heads:
        """The whole chain as one head of rank r_1 + ... + r_M."""
        A, B = self.chain()
        return Heads(A, B.T.unsqueeze(0), None, None, None, self.scaling)


register(
    Method(
        name="cola",
        title="Chain of LoRA",
        paper="arXiv:2401.04151",
        family="residual chain",
        config=ColaConfig,
        branch=ColaBranch,
        mergeable=True,
    )
)
