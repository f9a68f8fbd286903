"""The loss on completions, with logits made only where it needs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.encode import IGNORED
from ..methods.call import LENGTHS
from ..tuner.model import sees_batch


def loss_positions(labels: Tensor, lengths: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Where the loss of a batch is.

    Args:
        labels: LongTensor `[batch, seq]`, -100 where there is no loss; `labels[b, s]` is predicted at s - 1.
        lengths: of the rows, where they are packed into one.

    Returns:
        `completion_index`: LongTensor `[n]`, the positions that predict a label, counted through the flattened batch;
        `completion_lengths`: LongTensor `[batch]`, how many of them each row has.
    """
    learned = labels != IGNORED
    if lengths is not None:  # nothing in a row predicts its first token
        learned[0, list(itertools.accumulate(lengths[:-1], initial=0))] = False
    counted = F.pad(learned[:, 1:], (0, 1))
    rows = counted if lengths is None else counted[0].split(list(lengths))
    return {
        "completion_index": counted.flatten().nonzero().squeeze(1),
        "completion_lengths": torch.stack([row.sum() for row in rows]),
    }


class CompletionCollator:
    """Adds `loss_positions` to what `collate` returns: on the CPU, so that no step waits for the device to count.

    Args:
        collate: pads rows on the right, or packs them.
        pass_cost: what a further forward and backward costs beside its positions, in positions. Where the padding of a
            batch costs more, its rows are sorted by length and `cuts` says how it is cut into narrower parts, see
            `narrowed`. None: batches stay whole.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, Tensor]], pass_cost: int | None = None):
        self.collate, self.pass_cost = collate, pass_cost

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        widths = [0]
        if self.pass_cost is not None:
            rows = sorted(rows, key=len)
            widths = cuts([len(row) for row in rows], self.pass_cost)
        batch: dict[str, Any] = self.collate(rows)
        batch |= loss_positions(batch["labels"], batch.get(LENGTHS))
        if len(widths) > 1:
            counts = batch["completion_lengths"].tolist()
            ends = [*widths[1:], len(rows)]
            batch["cuts"] = [(i, j, len(rows[j - 1]), sum(counts[i:j])) for i, j in zip(widths, ends, strict=True)]
        return batch


def cuts(lengths: Sequence[int], pass_cost: int) -> list[int]:
    """Where to cut rows, sorted by length, so that padded positions plus `pass_cost` for each part are fewest.

    Returns:
        The parts' first rows; the first is 0.
    """
    n = len(lengths)
    best, begins = [0.0] + [float("inf")] * n, [0] * (n + 1)
    for j in range(1, n + 1):
        for i in range(j):
            cost = best[i] + (j - i) * lengths[j - 1] + pass_cost
            if cost < best[j]:
                best[j], begins[j] = cost, i
    found, j = [], n
    while j:
        j = begins[j]
        found.append(j)
    return found[::-1]


def narrowed(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """A batch as the parts that its `cuts` say, each as wide as its longest row; a batch without them as it is."""
    if "cuts" not in batch:
        return [batch]
    batch = dict(batch)
    parts, done, width = [], 0, batch["labels"].shape[1]
    index = batch.pop("completion_index")
    for i, j, narrow, count in batch.pop("cuts"):
        part = {key: value[i:j, :narrow] if value.dim() == 2 else value[i:j] for key, value in batch.items()}
        own = index[done : done + count]
        part["completion_index"] = (own // width - i) * narrow + own % width
        parts.append(part)
        done += count
    return parts


class CompletionHead:
    """Makes a model's output embedding compute logits only at chosen positions.

    A forward pre-hook on the output embedding selects hidden rows, `[batch, seq, d]` -> `[1, n, d]`, so the matmul with
    the vocabulary and everything elementwise behind it (soft-capping, casts) exist for those n rows alone.

    Args:
        model: a causal language model, wrapped by PEFT or not.
    """

    def __init__(self, model: nn.Module):
        find = getattr(model, "get_output_embeddings", None)
        head = find() if callable(find) else None
        if sees_batch(model, head):
            head = None
        self._index: Tensor | None = None
        self._selected = False
        self._hook = head.register_forward_pre_hook(self._select) if isinstance(head, nn.Module) else None

    # A compiled model takes what it finds on its modules, hooks included, for constant: it would be compiled anew for
    # every number of positions.
    @torch.compiler.disable
    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._index is None or not args:
            return None
        self._selected = True
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._index).unsqueeze(0), *args[1:])

    @contextmanager
    def at(self, index: Tensor) -> Iterator[None]:
        """Forwards inside compute logits at the flattened positions `index`, LongTensor `[n]`, only."""
        self._index, self._selected = index, False
        try:
            yield
        finally:
            self._index = None

    def rows(self, logits: Tensor, index: Tensor) -> Tensor:
        """The logits `[n, vocab]` at `index`, from the output of the last forward inside `at`."""
        # A model that uses its output embedding's weight without calling the module never met the hook.
        return logits[0] if self._selected else logits.flatten(0, 1).index_select(0, index)

    def remove(self) -> None:
        """Takes the hook off the model."""
        if self._hook is not None:
            self._hook.remove()


def completion_losses(
    logits: Tensor, labels: Tensor, index: Tensor, lengths: Tensor, *, per_example: bool, label_smoothing: float = 0.0
) -> Tensor:
    """Each row's contribution to the loss before it is divided by the number of items.

    Args:
        logits: `[n, vocab]`, any float dtype; the softmax is computed in float32.
        labels: LongTensor `[batch, seq]`, or `[1, tokens]` of packed rows.
        index, lengths: from `loss_positions`.
        per_example: a row counts as the mean over its completion tokens instead of their sum.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.

    Returns:
        Tensor `[batch]`, float32; 0 for a row without completion tokens.
    """
    targets = labels.flatten()[index + 1]
    losses = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)
    row_of = torch.arange(len(lengths), device=index.device).repeat_interleave(lengths, output_size=len(index))
    if per_example:
        losses = losses / lengths[row_of]
    return losses.new_zeros(len(lengths)).index_add(0, row_of, losses)


def count_items(lengths: Tensor, *, per_example: bool) -> Tensor:
    """What the loss is divided by, a LongTensor `[batch]`: 1 per row that has completion tokens, or their number."""
    return (lengths > 0).long() if per_example else lengths
