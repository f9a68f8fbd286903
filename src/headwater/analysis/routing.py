"""Which heads each task uses, and how alike the heads have become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headwater.analysis.weights import heads
from headwater.data.encode import DataSpec, encode_completion, encode_prompt
from headwater.evaluation.forward import (
    evaluating,
    input_device,
    logits_at,
    max_positions,
    pad,
    pad_id,
    task_keywords,
)
from headwater.evaluation.scoring import sample
from headwater.tuner import is_adapted, observe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headwater.data.rows import Row
    from headwater.data.tasks import Task

_BATCH = 8


def routing_by_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    data_spec: DataSpec,
    rows_per_task: int = 16,
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """How much of its gate each task gives to each head: the mean over all tokens, prompt and completion, of some rows.

    Rows are drawn with a fixed seed from the task's test rows, or its training rows where it has no test.

    Returns:
        `{"routing": {task: {module: [N]}}}`; a task's entry is empty where no layer has a router, as in plain LoRA.
    """
    routing: dict[str, dict[str, list[float]]] = {}
    adapted, limit = is_adapted(model), max_positions(model)
    for task in tasks:
        rows = sample(task.test or task.train, rows_per_task)
        sequences = [encode_whole(row, tokenizer, data_spec, limit) for row in rows]
        gates = mean_gates(model, sequences, fill=pad_id(tokenizer), task_index=task.index) if adapted else {}
        routing[task.name] = {module: gate.tolist() for module, gate in gates.items()}
    return {"routing": routing}


def encode_whole(row: Row, tokenizer: PreTrainedTokenizerBase, data_spec: DataSpec, limit: int | None) -> list[int]:
    """A row's prompt and completion as ids, as many as the model takes.

    A row that is too long to train on must not stop a look at the others.
    """
    ids = [*encode_prompt(row, tokenizer, data_spec), *encode_completion(row.completion, tokenizer, end=True)]
    return ids[:limit]


def mean_gates(
    model: nn.Module, sequences: Sequence[Sequence[int]], *, fill: int, task_index: int | None = None
) -> dict[str, Tensor]:
    """Mean gate `(N,)` of each adapted layer that has a router, over the tokens of `sequences`, padding left out."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: Tensor

    def add(name: str, gate: Tensor) -> None:
        # A layer behind a token dispatch sees tokens in an order of its own; all of them count there.
        by_token = gate.reshape(-1, gate.shape[-1]).double()
        if len(by_token) == mask.numel():
            by_token = by_token[mask.reshape(-1).to(gate.device)]
        sums[name] = sums.get(name, 0) + by_token.sum(0).cpu()
        counts[name] = counts.get(name, 0) + len(by_token)

    order = sorted(sequences, key=len, reverse=True)
    with evaluating(model), observe(model, add):
        for start in range(0, len(order), _BATCH):
            padded = pad(order[start : start + _BATCH], fill).to(input_device(model))
            mask = padded.attention_mask.bool()
            batch = len(mask)
            logits_at(
                model,
                torch.zeros((batch, 1), dtype=torch.long),  # gates are all that is wanted, so the least of the logits
                input_ids=padded.input_ids,
                attention_mask=padded.attention_mask,
                **task_keywords(model, task_index, batch),
            )
    return {name: total / counts[name] for name, total in sums.items()}


def head_similarity(model: nn.Module, adapter_name: str = "default") -> dict[str, list[list[float]]]:
    """Cosine between the up-projections `B_i` and `B_j` of each two heads, as flat vectors: `{module: [N][N]}`.

    Heads that are still zero point nowhere; their cosine with anything is given as 0. Empty without heads.
    """
    similarity = {}
    for name, held in heads(model, adapter_name).items():
        flat = held.B.detach().flatten(1).double()
        unit = nn.functional.normalize(flat, dim=1)
        similarity[name] = (unit @ unit.T).clamp(-1, 1).tolist()
    return similarity
