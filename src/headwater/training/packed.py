"""Batches without padding: rows follow one another in one long row, and attention keeps them apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ..data.encode import Encoded
from ..evaluation.forward import base_of, evaluating, input_device
from ..methods.call import KEYWORD, LENGTHS
from ..tuner import needs_task_ids

ATTENTION = "headwater_rows"


def pack(rows: Sequence[Encoded]) -> dict[str, Any]:
    """Rows one after another.

    Returns:
        `input_ids`, `position_ids`, `labels`: int64 `[1, tokens]`, positions beginning at 0 in each row;
        `headwater_task_ids`: int64 `[rows]`; `headwater_row_lengths`: a tuple of ints.
    """
    return {
        "input_ids": torch.tensor([[i for row in rows for i in row.input_ids]]),
        "position_ids": torch.tensor([[i for row in rows for i in range(len(row))]]),
        "labels": torch.tensor([[i for row in rows for i in row.labels]]),
        KEYWORD: torch.tensor([row.task for row in rows]),
        LENGTHS: tuple(map(len, rows)),
    }


def attention_by_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    headwater_row_lengths: Sequence[int] | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention on each of the packed rows by itself, through PyTorch's fused function.

    Args:
        query, key, value: `(1, heads, tokens, d)`; keys and values may have fewer heads.
        dropout: of the weights.
        scaling: of query times key; None for 1 / sqrt(d).
        headwater_row_lengths: how many tokens each row has.
        more: `sliding_window` says how many tokens, itself included, a token sees. Whatever else changes the weights is
            refused.

    Returns:
        `(1, tokens, heads, d)`, and None for the weights.

    Raises:
        ValueError: if the model does not hand on the lengths or its window, makes a mask of its own, is not causal, or
            asks for what the fused function cannot do.
    """
    kind, lengths, window = type(module).__name__, headwater_row_lengths, more.get("sliding_window")
    if lengths is None or attention_mask is not None or not getattr(module, "is_causal", True):
        raise ValueError(f"{kind} cannot keep packed rows apart")
    if "sliding_window" not in more and getattr(getattr(module, "config", None), "sliding_window", None):
        raise ValueError(f"{kind} has its sliding window in the mask alone")
    for name in ("softcap", "s_aux", "position_bias"):
        if more.get(name) is not None:
            raise ValueError(f"{kind} asks for {name}")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # older versions of PyTorch have no fused function for fewer keys than queries
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    parts = []
    # `split` and not slices: in backward the rows' gradients are put together once
    for q, k, v in zip(*(t.split(list(lengths), dim=2) for t in (query, key, value)), strict=True):
        near = _near(q.shape[2], window, q.device)
        of_row = F.scaled_dot_product_attention(q, k, v, near, dropout, is_causal=near is None, scale=scaling)
        parts.append(of_row.transpose(1, 2))
    return torch.cat(parts, dim=1), None


def _near(length: int, window: int | None, device: torch.device) -> Tensor | None:
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


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
    if "llama_4_scaling_beta" in (getattr(config, "rope_parameters", None) or {}):
        return "some versions of transformers scale its queries by their place in the batch"
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.is_prompt_learning or getattr(adapter, "alora_invocation_tokens", None):
            return "its adapter treats a row by where it begins or what it holds"
    ids = list(range(min(9, config.vocab_size)))
    rows = [Encoded(part, part, 0) for part in (ids[:4], ids[4:])]
    try:
        with evaluating(model):
            alone = torch.cat([_logits(model, [row]) for row in rows], dim=1)
            with rows_apart(model):
                together = _logits(model, rows)
    except Exception as error:  # whatever a model does with an input that it was not written for
        return f"{type(error).__name__}: {error}"
    bound = 1e-4 if base.dtype in (torch.float32, torch.float64) else 0.05
    if not (alone - together).abs().max() <= bound * alone.abs().max():  # nor if either is NaN
        return "what it makes of a row depends on the rows before"
    return None


def _logits(model: nn.Module, rows: list[Encoded]) -> Tensor:
    batch = pack(rows)
    names = ["input_ids", "position_ids", *[KEYWORD] * needs_task_ids(model)]
    inputs = {name: batch[name].to(input_device(model)) for name in names}
    if len(rows) > 1:
        inputs[LENGTHS] = batch[LENGTHS]
    return model(**inputs).logits.float()
