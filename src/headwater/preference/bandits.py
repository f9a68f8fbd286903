"""Which reward source a batch asks: contextual and plain bandits, and the fixed rules that they are compared with.

LinUCB is the disjoint linear bandit of Li et al. (arXiv 1003.0146, algorithm 1), as LASeR (arXiv 2410.01735) uses it:
per arm k, `A_k = I + sum c c^T`, `b_k = sum r c`, and the arm chosen is

    argmax_k  c^T A_k^-1 b_k  +  alpha sqrt(c^T A_k^-1 c)

`A_k^-1` itself is kept and updated by Sherman and Morrison's identity, O(d^2) a round and equal to the direct solve.
Exp3 is that of Auer et al. (2002): it sees no context and takes rewards in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.errors import HeadwaterError, Problem

Vector = NDArray[np.float64]
Tensors = dict[str, NDArray[np.float64]]


class Picker:
    """Picks one arm a round. This one picks at random; its subclasses learn, or follow a fixed rule.

    Every choice is a function of the seed, the number of choices before it and what was learned, so that a picker that
    is saved and loaded goes on exactly.

    Args:
        arms: names of the arms.
        seed: of ties and of random choices, at least 0.
    """

    learns = False

    def __init__(self, arms: Sequence[str], seed: int = 0):
        self.arms = list(arms)
        self.seed = seed
        self.round = 0
        self.dropped: dict[str, str] = {}

    @property
    def alive(self) -> list[int]:
        """Positions of the arms that can still be picked."""
        return [i for i, arm in enumerate(self.arms) if arm not in self.dropped]

    def choose(self, context: Vector) -> int:
        """The position of the arm to pull for a context, float64 `(d,)`.

        Raises:
            HeadwaterError: every arm was dropped.
        """
        if not self.alive:
            reasons = "; ".join(f"{arm}: {reason}" for arm, reason in self.dropped.items())
            fix = "mend it, and go on with training.resume_from_checkpoint: true"
            raise HeadwaterError(Problem(f"no reward source is left ({reasons})", "preference.sources", fix))
        random = np.random.default_rng([self.seed, self.round])
        arm = self._choose(context, random)
        self.round += 1
        return arm

    def probability(self, arm: int) -> float:
        """That of `arm`, which was just chosen, for pickers that learn from it; 1 for others."""
        return 1.0

    def update(self, arm: int, context: Vector, reward: float, p: float) -> None:
        """Learn that `arm`, chosen with probability `p`, was worth `reward`, in [0, 1], in `context`."""

    def drop(self, arm: int, reason: str) -> None:
        """Never pick `arm` again."""
        self.dropped[self.arms[arm]] = reason

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """All that was learned, as float64 tensors and plain values."""
        return {}, {"round": self.round, "dropped": self.dropped}

    def load(self, tensors: Tensors, values: Mapping[str, Any]) -> None:
        """Takes over what `state` gave."""
        self.round, self.dropped = int(values["round"]), dict(values["dropped"])

    def _choose(self, context: Vector, random: np.random.Generator) -> int:
        return int(random.choice(self.alive))


class LinUCB(Picker):
    """The linear bandit of the module's equations.

    Args:
        arms, seed: as for `Picker`.
        dim: width d of the contexts.
        alpha: weight of the confidence term, >= 0; 0 is greedy ridge regression. For a context of unit length an arm
            that was never pulled scores `alpha`: below 1, a first arm whose rewards exceed it may stay the only one.
    """

    learns = True

    def __init__(self, arms: Sequence[str], dim: int, alpha: float = 1.0, seed: int = 0):
        super().__init__(arms, seed)
        self.alpha = alpha
        self.inverse = np.tile(np.eye(dim), (len(self.arms), 1, 1))
        self.b = np.zeros((len(self.arms), dim))

    def scores(self, context: Vector) -> Vector:
        """The upper confidence bound of every arm, dropped ones included: float64 `(arms,)`."""
        spread = self.inverse @ context  # (arms, d)
        expected = (self.b * spread).sum(1)
        return expected + self.alpha * np.sqrt(np.maximum(spread @ context, 0.0))

    def update(self, arm: int, context: Vector, reward: float, p: float) -> None:
        spread = self.inverse[arm] @ context
        self.inverse[arm] -= np.outer(spread, spread) / (1 + context @ spread)
        self.b[arm] += reward * context

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        return {"inverse": self.inverse, "b": self.b}, super().state()[1]

    def load(self, tensors: Tensors, values: Mapping[str, Any]) -> None:
        super().load(tensors, values)
        self.inverse, self.b = tensors["inverse"].copy(), tensors["b"].copy()

    def _choose(self, context: Vector, random: np.random.Generator) -> int:
        scores = self.scores(context)
        best = max(scores[arm] for arm in self.alive)
        # All arms are equal in the first round, and argmax would always try the first.
        return int(random.choice([arm for arm in self.alive if scores[arm] >= best - 1e-12]))


class Exp3(Picker):
    """Exponential weights without a context.

    `p_k = (1 - gamma) w_k / sum w + gamma / K`, and after a reward r of arm j `w_j *= exp(gamma r / (K p_j))`.

    Args:
        arms, seed: as for `Picker`.
        gamma: share of uniform exploration, in (0, 1].
    """

    learns = True

    def __init__(self, arms: Sequence[str], gamma: float = 0.2, seed: int = 0):
        super().__init__(arms, seed)
        self.gamma = gamma
        self.log_weights = np.zeros(len(self.arms))

    def probabilities(self) -> Vector:
        """Each arm's, float64 `(arms,)`; dropped arms have 0 and do not count among the K."""
        alive = self.alive
        weights = np.exp(self.log_weights[alive] - self.log_weights[alive].max())
        found = np.zeros(len(self.arms))
        found[alive] = (1 - self.gamma) * weights / weights.sum() + self.gamma / len(alive)
        return found

    def probability(self, arm: int) -> float:
        return float(self.probabilities()[arm])

    def update(self, arm: int, context: Vector, reward: float, p: float) -> None:
        if arm in self.alive:
            self.log_weights[arm] += self.gamma * reward / (len(self.alive) * p)

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        return {"log_weights": self.log_weights}, super().state()[1]

    def load(self, tensors: Tensors, values: Mapping[str, Any]) -> None:
        super().load(tensors, values)
        self.log_weights = tensors["log_weights"].copy()

    def _choose(self, context: Vector, random: np.random.Generator) -> int:
        return int(random.choice(len(self.arms), p=self.probabilities()))


class RoundRobin(Picker):
    """One arm after the other."""

    def _choose(self, context: Vector, random: np.random.Generator) -> int:
        return self.alive[self.round % len(self.alive)]


class Single(Picker):
    """Always the same arm. When it is dropped none is left."""

    def __init__(self, arms: Sequence[str], arm: str, seed: int = 0):
        super().__init__(arms, seed)
        self.arm = self.arms.index(arm)

    @property
    def alive(self) -> list[int]:
        return [self.arm] if self.arms[self.arm] not in self.dropped else []

    def _choose(self, context: Vector, random: np.random.Generator) -> int:
        return self.arm


class QuantileScale:
    """Maps raw rewards to [0, 1] by the 20 % and 80 % quantiles of all rewards so far, the new one included.

    Below the one it is 0, above the other 1, linear in between (LASeR's public code, after Graves et al. 2017). Where
    both quantiles are the same, as for a first reward, a reward equal to them is 0.5.

    Args:
        window: take the quantiles of this many latest rewards instead, for rewards that drift.
    """

    def __init__(self, window: int | None = None):
        self.window = window
        self.history: list[float] = []

    def __call__(self, raw: float) -> float:
        self.history.append(raw)
        low, high = np.quantile(self.history[-self.window :] if self.window else self.history, (0.2, 0.8))
        if high > low:
            return float(np.clip((raw - low) / (high - low), 0.0, 1.0))
        return 0.5 + 0.5 * float(np.sign(raw - low))
