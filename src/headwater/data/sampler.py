"""Batches of a mixture of tasks: exact shares, even repetition, little padding, and the same order every time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from headwater.data.mixture import apportion
from headwater.errors import HeadwaterError, Problem

WINDOW = 50
"""Batches within which rows are sorted by length: enough to find rows alike, few enough to keep the order random."""

Batching = Literal["mixed", "balanced", "by_length", "homogeneous"]
Rows = NDArray[np.int64]


class MixtureBatchSampler(Sampler[list[int]]):
    """Yields batches of row indices into the tasks' rows, concatenated in the order of the tasks.

    An epoch is as many draws as there are training rows. How many go to each task is fixed by the shares, with the
    method of largest remainders (in whole batches when batches are homogeneous; equally when they are balanced). A task
    walks through shuffles of its own rows and goes on in the next epoch where it stopped, so no row comes a second time
    before all of its task came once. The draws of a task are spread evenly over the epoch. Within windows of about 50
    batches rows of like length are put together, as far as `batching` allows, and the batches of a window are shuffled.
    A batch that is not full comes last.

    All is a function of the seed, the epoch and the batch number. So a resumed run that sets the epoch and skips the
    batches that it had goes on as if it had never stopped.

    Args:
        lengths: tokens of each training row, per task; they only serve to put rows of like length together.
        shares: each task's share of the draws, summing to 1; tasks without rows have 0.
        batch_size: rows per batch.
        seed: at least 0.
        batching: `mixed`: each batch holds the tasks by their shares, nearly; `balanced`: every task as often as every
            other, to within one, where the tasks with one more rotate; `by_length`: rows of like length, of whatever
            task; `homogeneous`: one task in a batch.
        drop_last: leave out a last batch that is not full. Its rows are not lost: tasks go on with them next epoch.

    Raises:
        HeadwaterError: shares that do not fit the tasks, or fewer batches than homogeneous batches need.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        shares: Sequence[float],
        batch_size: int,
        seed: int,
        batching: Batching = "mixed",
        drop_last: bool = False,
    ):
        self.lengths = [np.asarray(task, dtype=np.int64) for task in lengths]
        self.batch_size = batch_size
        self.seed = seed
        self.batching = batching
        self.drop_last = drop_last
        self.epoch = 0
        _check(self.lengths, shares, batch_size)
        self._offsets = np.cumsum([0, *map(len, self.lengths)])
        self._flat = np.concatenate(self.lengths)
        total = int(self._offsets[-1])
        self._sizes = batch_sizes(total, batch_size, drop_last=drop_last)
        if not self._sizes:
            what = f"{total} training rows do not fill one batch of {batch_size}"
            fix = "use a smaller batch size, or keep the last batch"
            raise HeadwaterError(Problem(what, "training.per_device_train_batch_size", fix))
        self._counts = self._apportion(shares)

    def _apportion(self, shares: Sequence[float]) -> list[int]:
        """Draws per task in one epoch."""
        draws = sum(self._sizes)
        if self.batching in ("mixed", "by_length"):
            return apportion(shares, draws)
        if self.batching == "balanced":
            present = [float(len(task) > 0) for task in self.lengths]
            return apportion([p / sum(present) for p in present], draws)
        batches = apportion(shares, len(self._sizes))
        counts = [count * self.batch_size for count in batches]
        # The batch that is not full goes to the task where it matters least.
        counts[int(np.argmax(batches))] -= self.batch_size - self._sizes[-1]
        return counts

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch
        for batch in self._plan(epoch):
            yield batch.tolist()
        self.epoch = epoch + 1

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration goes through."""
        self.epoch = epoch

    def realised_shares(self, batches: int | None = None) -> dict[str, list[Any]]:
        """What the first `batches` batches of a run hold, counted, or one epoch.

        Returns:
            Per task: `rows` and `tokens` (counts), `row_shares` and `token_shares` (sum to 1).
        """
        rows = np.zeros(len(self.lengths), dtype=np.int64)
        tokens = np.zeros(len(self.lengths), dtype=np.int64)
        left = len(self) if batches is None else batches
        for epoch in range(-(-left // len(self))):
            plan = self._plan(epoch)[:left]
            left -= len(plan)
            drawn = np.concatenate(plan)
            task = np.searchsorted(self._offsets, drawn, side="right") - 1
            rows += np.bincount(task, minlength=len(rows))
            tokens += np.bincount(task, weights=self._flat[drawn], minlength=len(rows)).astype(np.int64)
        return {
            "rows": rows.tolist(),
            "row_shares": (rows / max(1, rows.sum())).tolist(),
            "tokens": tokens.tolist(),
            "token_shares": (tokens / max(1, tokens.sum())).tolist(),
        }

    def _plan(self, epoch: int) -> list[Rows]:
        """All batches of an epoch, as global row indices."""
        random = np.random.default_rng([self.seed, 0, epoch])
        draws = [self._draws(task, epoch) for task in range(len(self.lengths))]
        if self.batching == "homogeneous":
            return self._homogeneous(draws, random)
        if self.batching == "balanced":  # any stretch holds each task as often as any other, to within one
            present = [task for task, drawn in enumerate(draws) if len(drawn)]
            return self._dealt(np.resize(present, sum(self._sizes)), draws, random)
        order = _spread([len(d) for d in draws], random)
        if self.batching == "mixed":
            return self._dealt(order, draws, random)
        mixed = np.empty(len(order), dtype=np.int64)
        for task, drawn in enumerate(draws):
            mixed[order == task] = drawn
        return self._by_length(mixed, self._sizes, random)

    def _draws(self, task: int, epoch: int) -> Rows:
        """The task's rows of an epoch: positions `epoch * count` and on in an endless chain of shuffles."""
        size, count = len(self.lengths[task]), self._counts[task]
        if not count:
            return np.empty(0, dtype=np.int64)
        first, last = epoch * count, (epoch + 1) * count
        shuffles = [
            np.random.default_rng([self.seed, 1, task, k]).permutation(size)
            for k in range(first // size, (last - 1) // size + 1)
        ]
        begin = first - first // size * size
        return np.concatenate(shuffles)[begin : begin + count] + self._offsets[task]

    def _by_length(self, rows: Rows, sizes: Sequence[int], random: np.random.Generator) -> list[Rows]:
        """Cut rows into batches of these sizes, of like length within each window, a smaller one last."""
        plan: list[Rows] = []
        for window in _windows(sizes):
            chosen, rows = rows[: window.sum()], rows[window.sum() :]
            plan += self._cut(self._sorted(chosen), window, random)
        return _smaller_last(plan)

    def _homogeneous(self, draws: list[Rows], random: np.random.Generator) -> list[Rows]:
        batches: list[list[Rows]] = []
        for drawn in draws:
            full, rest = divmod(len(drawn), self.batch_size)
            sizes = [self.batch_size] * full + [rest] * bool(rest)
            batches.append(self._by_length(drawn, sizes, random) if sizes else [])
        order = _spread([len(b) for b in batches], random)
        queues = [iter(b) for b in batches]
        return _smaller_last([next(queues[task]) for task in order])

    def _dealt(self, order: Rows, draws: list[Rows], random: np.random.Generator) -> list[Rows]:
        """Batches of the tasks that `order` deals out; within each window a task's rows are dealt short ones first, so
        that rows of like length meet as far as the tasks of a batch allow."""
        plan: list[Rows] = []
        done, taken = 0, [0] * len(draws)
        for window in _windows(self._sizes):
            stretch = order[done : done + window.sum()]
            dealt = np.empty(len(stretch), dtype=np.int64)
            for task, drawn in enumerate(draws):
                places = stretch == task
                chosen = drawn[taken[task] : taken[task] + places.sum()]
                dealt[places] = self._sorted(chosen)
                taken[task] += len(chosen)
            done += len(stretch)
            plan += self._cut(dealt, window, random)
        return _smaller_last(plan)

    def _sorted(self, rows: Rows) -> Rows:
        return rows[np.argsort(self._flat[rows], kind="stable")]

    def _cut(self, rows: Rows, sizes: Rows, random: np.random.Generator) -> list[Rows]:
        """A window's rows as batches of these sizes, shuffled; where a smaller one is cut out is chance, too."""
        parts = np.split(rows, np.cumsum(random.permutation(sizes))[:-1])
        return [parts[i] for i in random.permutation(len(parts))]


def batch_sizes(rows: int, batch_size: int, *, drop_last: bool) -> list[int]:
    """The rows of each batch of an epoch of so many rows; a last one that is not full may be left out."""
    full, rest = divmod(rows, batch_size)
    return [batch_size] * full + [rest] * bool(rest and not drop_last)


def _windows(sizes: Sequence[int]) -> list[Rows]:
    return np.array_split(np.asarray(sizes), max(1, round(len(sizes) / WINDOW)))


def _spread(counts: Sequence[int], random: np.random.Generator) -> Rows:
    """Task numbers in an order that spreads each task's `counts` evenly, with random places within its stride."""
    task = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([(np.arange(n) + random.random(n)) / max(1, n) for n in counts])
    return task[np.argsort(place, kind="stable")]


def _smaller_last(plan: list[Rows]) -> list[Rows]:
    """accelerate splits batches among processes and takes the first that is not full for the end."""
    return sorted(plan, key=lambda batch: -len(batch))


def _check(lengths: Sequence[Rows], shares: Sequence[float], batch_size: int) -> None:
    if batch_size < 1:
        raise HeadwaterError(Problem(f"the batch size is {batch_size}, not 1 or more"))
    if len(lengths) != len(shares) or not abs(sum(shares) - 1) < 1e-6 or min(shares) < 0:
        raise HeadwaterError(Problem(f"{len(shares)} shares {list(shares)} do not fit {len(lengths)} tasks"))
    for task, (rows, share) in enumerate(zip(lengths, shares, strict=True)):
        if share > 0 and not len(rows):
            raise HeadwaterError(Problem(f"task {task} has a share of {share:.3g} and no training rows"))
