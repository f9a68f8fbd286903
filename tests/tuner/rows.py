"""The test matrix: one row per method, or per setting of a method that takes another path through the code.

A new method adds one row here and passes every test in this folder that takes the `row` fixture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwater.methods.files import pack_bits

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Row:
    """One method as the matrix runs it.

    Args:
        name: the method's registered name.
        saved: from rank, d_in and d_out of a layer to the tensors that the adapter file holds for it. Files that people
            have must stay readable, so changing an entry of an old row is a breaking change.
        trainable: from rank, d_in and d_out to the number of trained values on that layer, in closed form.
        fields: config fields that differ from `helpers.DEFAULTS`.
        no_dropout: config fields that make train mode deterministic.
        mergeable: `merge_and_unload` gives an equal model; otherwise it must refuse.
        needs_task_ids: every forward gets the task of each row.
        starts_as_base: the freshly adapted model computes what the base model computes.
        alpha_over_rank: the scale is alpha over the rank or its root; otherwise it is alpha.
        smooth: config fields that make the layer a differentiable function of all that is trained, where it is none: a
            top-k flips under rounding, and the slope of a straight-through estimator is another than its gradient.
        large_rank: config fields that go with a rank of 100, where the config alone would object to it.
        exact_recomputation: gradients under reentrant checkpointing are bit-equal; otherwise a parameter that is read
            more than once has its parts added in another order.
        gated: the method has gates to observe.
        saved_once: tensors that only the first of the adapter's layers holds, for all of them; all are trained.
        kept_wide: buffers that stay float32 in an adapter of half precision.
        wider: config fields that make it hold twice as much: heads, experts, ranks or links.
        learns: a tensor that the first step moves.
        drawn: the start is random.
        ingredient: a config field that names a tensor file to make the adapter from, and what such a file holds for a
            layer, from its name, rank, d_in and d_out.
        label: tells several rows of one method apart.
    """

    name: str
    saved: Callable[[int, int, int], Shapes]
    trainable: Callable[[int, int, int], int]
    fields: dict[str, Any] = field(default_factory=dict)
    no_dropout: dict[str, Any] = field(default_factory=lambda: {"lora_dropout": 0.0})
    mergeable: bool = False
    needs_task_ids: bool = False
    starts_as_base: bool = True
    alpha_over_rank: bool = True
    smooth: dict[str, Any] = field(default_factory=dict)
    large_rank: dict[str, Any] = field(default_factory=dict)
    exact_recomputation: bool = True
    gated: bool = True
    saved_once: Shapes = field(default_factory=dict)
    kept_wide: tuple[str, ...] = ()
    wider: dict[str, Any] = field(default_factory=lambda: {"num_heads": 6})
    learns: str = "B"
    drawn: bool = True
    ingredient: tuple[str, Callable[[str, int, int, int], dict[str, Tensor]]] | None = None
    label: str = ""

    @property
    def id(self) -> str:
        return self.label or self.name


def basis_of(name: str, r: int, d_in: int, d_out: int) -> dict[str, Tensor]:
    return {name: torch.randn(d_out, r, generator=torch.Generator().manual_seed(r)) / d_out**0.5}


def mask_of(name: str, r: int, d_in: int, d_out: int) -> dict[str, Tensor]:
    """Every other rank's entries."""
    mask = torch.zeros(r, d_out, dtype=torch.bool)
    mask[::2] = True
    A = torch.randn(r, d_in, generator=torch.Generator().manual_seed(r)) / d_in**0.5
    return {f"{name}.mask": pack_bits(mask), f"{name}.shape": torch.tensor((r, d_out)), f"{name}.A": A}


HEAD_DROPOUT_OFF = {"lora_dropout": 0.0, "head_dropout": 0.0}

ROWS = [
    Row(
        "rlora",
        saved=lambda r, i, o: {"A": (r, i), "B": (3, r, o), "router": (3, i), "A0": (r, i), "B0": (r, o)},
        trainable=lambda r, i, o: r * i + 3 * r * o + 3 * i,
        no_dropout=HEAD_DROPOUT_OFF,
    ),
    Row(
        "rlora",
        label="rlora-center-kaiming",
        fields={"compensation": "center", "router_init": "kaiming", "num_heads": 2},
        saved=lambda r, i, o: {"A": (r, i), "B": (2, r, o), "router": (2, i)},
        trainable=lambda r, i, o: r * i + 2 * r * o + 2 * i,
        no_dropout=HEAD_DROPOUT_OFF,
        starts_as_base=False,  # the released script's router is not uniform at the start
    ),
    Row(
        "rlora",
        label="rlora-one-head",
        fields={"num_heads": 1},
        saved=lambda r, i, o: {"A": (r, i), "B": (1, r, o), "router": (1, i), "A0": (r, i), "B0": (r, o)},
        trainable=lambda r, i, o: r * i + r * o + i,
        no_dropout=HEAD_DROPOUT_OFF,
        mergeable=True,
    ),
    Row(
        "hydralora",
        saved=lambda r, i, o: {"A": (r, i), "B": (3, r, o), "router": (3, i)},
        trainable=lambda r, i, o: r * i + 3 * r * o + 3 * i,
    ),
    Row(
        "hydralora",
        label="hydralora-balance",
        fields={"input_dropout": "per_head", "balance_loss_weight": 0.3},
        saved=lambda r, i, o: {"A": (r, i), "B": (3, r, o), "router": (3, i)},
        trainable=lambda r, i, o: r * i + 3 * r * o + 3 * i,
    ),
    Row(
        "mlora",
        saved=lambda r, i, o: {"A": (r, i), "B": (3, r, o), "A0": (r, i), "B0": (r, o)},
        trainable=lambda r, i, o: r * i + 3 * r * o,
        no_dropout=HEAD_DROPOUT_OFF,
        mergeable=True,
        gated=False,
    ),
    Row(
        "mtl_lora",
        fields={"num_tasks": 3},
        saved=lambda r, i, o: {"A": (r, i), "B": (3, r, o), "L": (3, r, r), "w": (3, 3)},
        trainable=lambda r, i, o: r * i + 3 * r * o + 3 * r * r + 9,
        needs_task_ids=True,
    ),
    Row(
        "multilora",
        saved=lambda r, i, o: {"A": (3, r, i), "B": (3, r, o), "c": (3, o)},
        trainable=lambda r, i, o: 3 * (r * i + r * o + o),
        mergeable=True,
        gated=False,
    ),
    Row(
        "moe_lora",
        fields={"num_experts": 4, "top_k": 2, "balance_loss": "mixtral", "balance_loss_weight": 0.1},
        wider={"num_experts": 8},
        saved=lambda r, i, o: {"A": (4, r, i), "B": (4, r, o), "router": (4, i)},
        trainable=lambda r, i, o: 4 * (r * i + r * o + i),
    ),
    Row(
        "moe_lora",
        label="moe_lora-by-task",
        fields={"num_experts": 4, "top_k": 0, "router": "task", "num_tasks": 3, "task_dim": 5},
        wider={"num_experts": 8},
        saved=lambda r, i, o: {"A": (4, r, i), "B": (4, r, o)},
        saved_once={"task_embedding": (3, 5), "task_gate": (4, 5)},
        trainable=lambda r, i, o: 4 * (r * i + r * o),
        needs_task_ids=True,
        exact_recomputation=False,  # all layers' parts of the one gate
    ),
    Row(
        "malora",
        fields={"num_experts": 4, "shared_rank": 6},
        wider={"num_experts": 8},
        saved=lambda r, i, o: {"S": (6, i), "P": (4, r, 6), "B": (4, r, o), "router": (4, i)},
        trainable=lambda r, i, o: 6 * i + 4 * (r * 6 + r * o + i),
        smooth={"top_k": 0},
        large_rank={"shared_rank": 0},
    ),
    Row(
        "smora",
        fields={"top_k": 2, "bias_update_rate": 1e-3},
        wider={"r": 8},
        saved=lambda r, i, o: {"A": (r, i), "B": (r, o), "router": (r, i), "bias": (r,), "counts": (r,)},
        trainable=lambda r, i, o: 2 * r * i + r * o,
        alpha_over_rank=False,
        kept_wide=("bias", "counts"),
    ),
    Row(
        "cond_mixlora",
        fields={"num_factors": 6},
        wider={"num_factors": 12},
        saved=lambda r, i, o: {
            "A": (6, i),
            "B": (6, o),
            "router_A": (6, i),
            "router_B": (6, i),
            "router_AB": (r, 6, i),
        },
        trainable=lambda r, i, o: 6 * (3 * i + o + r * i),
        smooth={"router_grad": "scored"},
        large_rank={"num_factors": 100},
        exact_recomputation=False,
    ),
    Row(
        "lori",
        wider={"r": 8},
        saved=lambda r, i, o: {"A": (r, i), "B": (r, o)},
        trainable=lambda r, i, o: r * o,
        mergeable=True,
        gated=False,
    ),
    Row(
        "lori",
        label="lori-sparse",
        ingredient=("mask", mask_of),
        fields={"reuse_a": False},
        learns="values",
        wider={"r": 8},
        saved=lambda r, i, o: {"A": (r, i), "values": ((r + 1) // 2 * o,), "index": ((r + 1) // 2 * o,)},
        trainable=lambda r, i, o: (r + 1) // 2 * o,
        mergeable=True,
        gated=False,
    ),
    Row(
        "cora",
        ingredient=("basis", basis_of),
        learns="A",
        drawn=False,
        wider={"r": 8},
        saved=lambda r, i, o: {"A": (r, i), "B": (r, o)},
        trainable=lambda r, i, o: r * i,
        mergeable=True,
        gated=False,
    ),
    Row(
        "cora",
        label="cora-init-b",
        ingredient=("basis", basis_of),
        fields={"variant": "init_b", "init_a": "kaiming"},
        wider={"r": 8},
        saved=lambda r, i, o: {"A": (r, i), "B": (r, o)},
        trainable=lambda r, i, o: r * i + r * o,
        mergeable=True,
        starts_as_base=False,  # A is random and B is not zero
        gated=False,
    ),
    Row(
        "cola",
        wider={"num_links": 6},
        saved=lambda r, i, o: {"A": (r, i), "B": (r, o), "A_tied": (2 * r, i), "B_tied": (2 * r, o), "link": ()},
        trainable=lambda r, i, o: r * i + r * o,
        mergeable=True,
        gated=False,
    ),
    Row(
        "taskprobe",  # not headwater's: task_probe.py, beside this file
        fields={"penalty": 0.2},
        wider={"r": 8},
        saved=lambda r, i, o: {"A": (r, i), "B": (r, o), "table": (3, r)},
        trainable=lambda r, i, o: r * i + r * o + 3 * r,
        needs_task_ids=True,
    ),
]
BY_ID = {row.id: row for row in ROWS}
