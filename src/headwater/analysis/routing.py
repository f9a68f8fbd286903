"""Which heads each task uses, what the gates do, and how alike the heads have become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwater.analysis.gates import GateRecorder, GateStatistics
from headwater.analysis.weights import heads, meant_adapter
from headwater.data.encode import DataSpec, encode_completion, encode_end, encode_prompt
from headwater.evaluation.forward import (
    base_of,
    evaluating,
    input_device,
    logits_at,
    max_positions,
    pad,
    pad_id,
    task_keywords,
)
from headwater.evaluation.scoring import sample
from headwater.tuner import MethodLayer, context_of, is_adapted, observe
from headwater.tuner.context import LABELS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headwater.data.rows import Row
    from headwater.data.tasks import Task

_BATCH = 8


@dataclass(frozen=True)
class Texts:
    """Token ids of some texts of one task.

    Args:
        sequences: a list of ids per text.
        prompt_lengths: how many tokens of each are its prompt, for methods that route by the prompt alone; None where
            a text has no prompt.
        task_index: the task's index, for methods that go by task.
    """

    sequences: Sequence[Sequence[int]]
    prompt_lengths: Sequence[int] | None = None
    task_index: int | None = None


def task_texts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, data_spec: DataSpec, rows: int
) -> Texts:
    """Some rows of a task, prompt and completion, drawn with a fixed seed from its test rows, or its training rows
    where it has no test.
    """
    limit = max_positions(model)
    chosen = sample(task.test or task.train, rows)
    sequences = [encode_whole(row, tokenizer, data_spec, limit) for row in chosen]
    return Texts(sequences, [len(encode_prompt(row, tokenizer, data_spec)) for row in chosen], task.index)


def routing_by_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    data_spec: DataSpec,
    rows_per_task: int = 16,
) -> dict[str, dict[str, Any]]:
    """How much of its gate each task gives to each head: the mean over all tokens of some rows, see `task_texts`.

    Returns:
        `{"routing": {task: {module: [N]}}, "gates": {module: GateStatistics.as_dict() over all tasks}}`; a task's
        entry is empty where no layer has a router, as in plain LoRA.
    """
    texts = {task.name: task_texts(model, tokenizer, task, data_spec, rows_per_task) for task in tasks}
    by_task, together = gates_by_task(model, texts, pad_id(tokenizer))
    return {
        "routing": {
            name: {module: gates.mean_gate.tolist() for module, gates in by_module.items()}
            for name, by_module in by_task.items()
        },
        "gates": {module: gates.as_dict() for module, gates in together.items()},
    }


def gates_by_task(
    model: nn.Module, texts: Mapping[str, Texts], fill: int = 0
) -> tuple[dict[str, dict[str, GateStatistics]], dict[str, GateStatistics]]:
    """`gate_statistics` of each of several texts by name, and of all their tokens together."""
    if not is_adapted(model):
        return {name: {} for name in texts}, {}
    with GateRecorder(model) as recorder:
        by_task = {name: gate_statistics(model, some, fill=fill) for name, some in texts.items()}
    return by_task, recorder.statistics()


def gate_statistics(
    model: nn.Module, texts: Texts | Sequence[Sequence[int]], *, fill: int = 0
) -> dict[str, GateStatistics]:
    """What the gates of each adapted layer do over the tokens of some texts, padding left out.

    Args:
        model: a causal language model with an adapter of headwater's.
        texts: token ids, a list per text, or `Texts` to say more about them.
        fill: any token id, to pad with.

    Returns:
        Layer name -> its `GateStatistics`; empty for methods without gates.

    Raises:
        HeadwaterError: if the model has no such adapter, or its method goes by task and the texts name none.
    """
    with GateRecorder(model) as recorder:
        _read(model, texts if isinstance(texts, Texts) else Texts(texts), fill)
    return recorder.statistics()


def _read(model: nn.Module, texts: Texts, fill: int) -> None:
    """Runs the model over the texts, a few at a time."""
    lengths = texts.prompt_lengths or [0] * len(texts.sequences)
    rows = sorted(zip(texts.sequences, lengths, strict=True), key=lambda row: len(row[0]), reverse=True)
    with evaluating(model):
        for start in range(0, len(rows), _BATCH):
            sequences, prompts = zip(*rows[start : start + _BATCH], strict=True)
            padded = pad(sequences, fill).to(input_device(model))
            # Only gates are wanted, so the least of the logits, unless the vocabulary head has gates itself.
            width = padded.input_ids.shape[1] if isinstance(base_of(model).get_output_embeddings(), MethodLayer) else 1
            in_prompt = torch.arange(padded.input_ids.shape[1]) < torch.tensor(prompts).unsqueeze(1)
            logits_at(
                model,
                torch.arange(width).expand(len(prompts), -1),
                input_ids=padded.input_ids,
                attention_mask=padded.attention_mask,
                **{LABELS: padded.input_ids.masked_fill(in_prompt.to(padded.input_ids.device), -100)},
                **task_keywords(model, texts.task_index, len(prompts)),
            )


def encode_whole(row: Row, tokenizer: PreTrainedTokenizerBase, data_spec: DataSpec, limit: int | None) -> list[int]:
    """A row's prompt and completion as ids, as many as the model takes.

    A row that is too long to train on must not stop a look at the others.
    """
    parts = (
        encode_prompt(row, tokenizer, data_spec),
        encode_completion(row.completion, tokenizer),
        encode_end(row, tokenizer, data_spec),
    )
    return [token for part in parts for token in part][:limit]


def mean_gates(model: nn.Module, texts: Texts, *, fill: int = 0) -> dict[str, Tensor]:
    """What `merge_with_gates` takes: each routed layer's mean gate over all tokens of the texts, padding left out.

    Returns:
        Layer name -> `(N,)`, float64; for Conditional MixLoRA the mean pairing of its factors, `(E, E)`.

    Raises:
        HeadwaterError: if the model has no adapter of headwater's, or not exactly one is active.
    """
    context = context_of(model)
    meant_adapter(model)  # the gates of two would be mixed
    sums: dict[str, tuple[Tensor, float]] = {}

    def see(name: str, gate: Tensor) -> None:
        state = context.state
        in_order = state is not None and gate.dim() > 2 and gate.shape[:2] == (state.batch, state.length)
        flat = (gate.flatten(0, 1) if in_order else gate).double()  # else it is behind a token dispatch
        if in_order and state is not None and state.valid is not None:
            flat = flat[state.valid.flatten().to(flat.device)]
        total, count = sums.get(name, (0.0, 0.0))
        sums[name] = (flat.sum(0).cpu() + total, len(flat) + count)

    with observe(model, see, merging=True):
        _read(model, texts, fill)
    return {name: total / count for name, (total, count) in sums.items() if count}


def head_similarity(model: nn.Module, adapter_name: str | None = None) -> dict[str, list[list[float]]]:
    """Cosine between the up-projections `B_i` and `B_j` of each two heads, as flat vectors: `{module: [N][N]}`.

    Heads that are still zero point nowhere; their cosine with anything is given as 0. Empty without heads.

    Args:
        adapter_name: by default the active adapter.

    Raises:
        HeadwaterError: there is no such adapter, or none is named and several are active.
    """
    similarity = {}
    for name, held in heads(model, adapter_name).items():
        flat = held.B.detach().flatten(1).cpu().double()  # Apple's GPUs have no float64
        unit = nn.functional.normalize(flat, dim=1)
        similarity[name] = (unit @ unit.T).clamp(-1, 1).tolist()
    return similarity
