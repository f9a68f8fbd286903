"""Batches without padding: rows follow one another in one long row, and attention keeps them apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..data.encode import IGNORED, Encoded
from ..evaluation.forward import base_of, evaluating, input_device
from ..methods.call import KEYWORD, LENGTHS
from ..tuner import needs_task_ids

ATTENTION = "headwater_rows"


def pack(rows: Sequence[Encoded]) -> dict[str, Any]:
    """Rows one after another.

    Returns:
        `input_ids`, `position_ids`, `labels`: int64 `[1, tokens]`, positions beginning at 0 in each row, whose first
        label is left out, as nothing in the row predicts it; `headwater_task_ids`: int64 `[rows]`;
        `headwater_row_lengths`: a tuple of ints.
    """
    return {
        "input_ids": torch.tensor([[i for row in rows for i in row.input_ids]]),
        "position_ids": torch.tensor([[i for row in rows for i in range(len(row))]]),
        "labels": torch.tensor([[i for row in rows for i in (IGNORED, *row.labels[1:])]]),
        KEYWORD: torch.tensor([row.task for row in rows]),
        LENGTHS: tuple(map(len, rows)),
    }


def attention_by_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    headwater_row_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention through PyTorch's fused function, on each of the packed rows by itself.

    Args:
        query, key, value: `(1, heads, tokens, d)`.
        headwater_row_lengths: how many tokens each row has.
        sliding_window: how many tokens, itself included, a token sees; None for all before it.

    Returns:
        `(1, tokens, heads, d)`, and None for the weights.

    Raises:
        ValueError: if the model makes a mask of its own, is not causal, or does not hand on the lengths.
    """
    lengths = headwater_row_lengths
    if lengths is None or attention_mask is not None or not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} cannot keep packed rows apart")
    parts = []
    # `split` and not slices: in backward the rows' gradients are put together once
    for q, k, v in zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True):
        near = _near(q.shape[2], sliding_window, q.device)
        parts.append(sdpa_attention_forward(module, q, k, v, near, **kwargs)[0])
    return torch.cat(parts, dim=1), None


def _near(length: int, window: int | None, device: torch.device) -> Tensor | None:
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)[None, None]


AttentionInterface.register(ATTENTION, attention_by_rows)


@contextmanager
def rows_apart(model: nn.Module) -> Iterator[None]:
    """Forwards and backwards inside are of packed rows."""
    config = base_of(model).config
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def why_not(model: nn.Module) -> str | None:
    """Why a model cannot take packed rows; None if it can, which is tried: two rows must give what each gives alone."""
    base = base_of(model)
    if not isinstance(base, PreTrainedModel):
        return "it is not one of transformers' models"
    config = base.config
    if config._attn_implementation != "sdpa":
        return f"its attention is {config._attn_implementation!r}, not 'sdpa'"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or config.sub_configs:
        return f"its layers are {', '.join(sorted(kinds))}" if kinds else "it is made of several models"
    ids = list(range(min(9, config.vocab_size)))
    rows = [Encoded(part, part, 0) for part in (ids[:4], ids[4:])]
    try:
        with evaluating(model):
            alone = torch.cat([_logits(model, [row]) for row in rows], dim=1)
            with rows_apart(model):
                together = _logits(model, rows)
    except (TypeError, ValueError) as error:
        return str(error)
    bound = 1e-4 if base.dtype in (torch.float32, torch.float64) else 0.05
    if (alone - together).abs().max() > bound * alone.abs().max():
        return "what it makes of a row depends on the rows before"
    return None


def _logits(model: nn.Module, rows: list[Encoded]) -> Tensor:
    batch = pack(rows)
    names = ["input_ids", "position_ids", *[KEYWORD] * needs_task_ids(model)]
    inputs = {name: batch[name].to(input_device(model)) for name in names}
    if len(rows) > 1:
        inputs[LENGTHS] = batch[LENGTHS]
    return model(**inputs).logits.float()
