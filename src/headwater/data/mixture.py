"""How much of each task an epoch holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from headwater.errors import HeadwaterError, Problem

if TYPE_CHECKING:
    from headwater.data.encode import Encoded


class MixtureSpec(BaseModel):
    """How tasks are mixed.

    With `n` rows and weight `w`, a task's share of the draws is proportional to

    - `proportional`: w n, so that an epoch shows every row once when all weights are 1;
    - `temperature`: w n^(1/T); T = 1 is proportional, T -> infinity uniform;
    - `uniform` and `weights`: w, whatever the number of rows.

    Batches are `mixed` (each has the shares, as nearly as its size allows), `balanced` (every task equally often in
    each, which leaves no room for other shares), `by_length` (rows of like length: the least padding, but where tasks
    differ in length hardly more than one of them in a batch) or `homogeneous` (one task each).
    """

    model_config = ConfigDict(extra="forbid")

    strategy: Literal["proportional", "temperature", "uniform", "weights"] = "proportional"
    temperature: float = Field(2.0, gt=0, allow_inf_nan=False)
    batching: Literal["mixed", "balanced", "by_length", "homogeneous"] = "mixed"

    @model_validator(mode="after")
    def _balanced_means_equal(self) -> MixtureSpec:
        if self.batching == "balanced" and self.strategy in ("temperature", "weights"):
            raise ValueError(f"balanced batches give every task an equal share, which strategy: {self.strategy} is not")
        return self


def shares(sizes: Sequence[int], weights: Sequence[float], spec: MixtureSpec) -> list[float]:
    """Each task's share of the draws, summing to 1; a task without training rows gets 0.

    Args:
        sizes: training rows per task.
        weights: positive weight per task.

    Raises:
        HeadwaterError: no task has a training row, or weights differ while batches are balanced.
    """
    if not any(sizes):
        raise HeadwaterError(Problem("no task has training rows", "tasks", "give at least one task a `train` file"))
    if spec.batching == "balanced":
        if len(set(weights)) > 1:
            what = "balanced batches give every task an equal share, but the tasks' weights differ"
            raise HeadwaterError(Problem(what, "mixture.batching", "leave the weights out, or use batching: mixed"))
        exponent = 0.0
    else:
        exponent = {"proportional": 1.0, "temperature": 1 / spec.temperature}.get(spec.strategy, 0.0)
    # Logarithms, for a low temperature raises sizes to powers that overflow.
    logs = [math.log(w) + exponent * math.log(n) if n else -math.inf for n, w in zip(sizes, weights, strict=True)]
    most = max(logs)
    parts = [math.exp(value - most) for value in logs]
    total = math.fsum(parts)
    return [part / total for part in parts]


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Split `total` draws by shares with the method of largest remainders; ties go to the earlier task.

    A task with a share gets at least one draw, for otherwise it would never be seen; the fullest tasks give it up.

    Raises:
        HeadwaterError: there are fewer draws than tasks.
    """
    if total < sum(share > 0 for share in shares):
        tasks = sum(share > 0 for share in shares)
        what, fix = f"{total} draws cannot hold all of {tasks} tasks", "use a smaller batch size"
        raise HeadwaterError(Problem(what, "training.per_device_train_batch_size", fix))
    whole = math.fsum(shares)
    quotas = [share / whole * total for share in shares]
    # Shares are rounded binary fractions: without the slack, a quota of 3 could count as 2.9999 and lose its tie.
    counts = [max(math.floor(quota + 1e-9), 1) if quota > 0 else 0 for quota in quotas]
    while sum(counts) > total:
        counts[max(range(len(counts)), key=lambda t: (counts[t] > 1, counts[t] - quotas[t], counts[t]))] -= 1
    order = sorted(range(len(counts)), key=lambda t: round(counts[t] - quotas[t], 9))
    for t in order[: total - sum(counts)]:
        counts[t] += 1
    return counts


def check_tasks(train: Mapping[str, Sequence[Encoded]], weights: Mapping[str, float]) -> None:
    """Raises HeadwaterError where rows carry another task's id than their place says, or a weight is of no task."""
    problems = [
        Problem(f"its rows carry the task id {other}, but it is task {index} by its place", f"train[{name!r}]")
        for index, (name, rows) in enumerate(train.items())
        if (other := next((row.task for row in rows if row.task != index), None)) is not None
    ]
    known = f"the tasks are {', '.join(train)}"
    problems += [Problem("there is no such task", f"weights[{name!r}]", known) for name in weights if name not in train]
    if problems:
        raise HeadwaterError(*problems)
