"""One adapted linear layer in every variant that is compared: the floor, PEFT's LoRA, the public loop, ours."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from headwater import make_config
from headwater.methods import methods
from headwater.methods.registry import method as registered

FLOOR = "floor"
LOOP = "R-LoRA, public loop"


@dataclass(frozen=True)
class Shape:
    """A linear layer `d_in -> d_out` under `rows` rows of `length` tokens, and an adapter of N heads of rank r."""

    d_in: int
    d_out: int
    tokens: int
    r: int = 8
    N: int = 3
    dropout: float = 0.1
    rows: int = 4

    @property
    def title(self) -> str:
        return f"{self.d_in} -> {self.d_out}, {self.tokens} tokens, r={self.r}, N={self.N}, dropout {self.dropout:g}"

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """x `(rows, length, d_in)`, which takes a gradient as a hidden state does, and the gradient of y."""
        lead = (self.rows, self.tokens // self.rows)
        x = torch.randn(*lead, self.d_in, dtype=dtype, device=device, requires_grad=True)
        return x, torch.randn(*lead, self.d_out, dtype=dtype, device=device)


class Layer(nn.Module):
    """A model of one frozen linear layer."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class PublicLoop(nn.Module):
    """R-LoRA as its equation reads and as public code computes it: `y = W x + s sum_n g_n B_n D_n(A x)`.

    One tensor as wide as the layer for each head, and A x anew for each. The start's offset is taken out of W once,
    when the adapter is made, so there is no further term.
    """

    def __init__(self, base: nn.Linear, r: int, num_heads: int, dropout: float, scaling: float = 1.0):
        super().__init__()
        d_in, d_out, made = base.in_features, base.out_features, {"device": base.weight.device}
        self.base = base
        self.A = nn.Linear(d_in, r, bias=False, **made)
        self.B = nn.ModuleList(nn.Linear(r, d_out, bias=False, **made) for _ in range(num_heads))
        self.dropout = nn.ModuleList(nn.Dropout(dropout) for _ in range(num_heads))
        self.router = nn.Linear(d_in, num_heads, bias=False, **made)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        x = x.to(self.A.weight.dtype)
        gate = torch.softmax(self.router(x), dim=-1)
        for n, (up, dropout) in enumerate(zip(self.B, self.dropout, strict=True)):
            y = y + (self.scaling * gate[..., n : n + 1] * up(dropout(self.A(x)))).to(y.dtype)
        return y


def frozen_linear(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Linear:
    return nn.Linear(shape.d_in, shape.d_out, bias=False, dtype=dtype, device=device).requires_grad_(False)


def config_of(name: str, *, r: int, N: int, dropout: float, num_tasks: int = 3, **extra: Any) -> Any:
    """A method's config with up-projections of N r ranks altogether, and the same dropout for all.

    Methods with heads or experts get N of rank r; the others one of rank N r. Dropout is on the heads where a method
    has that, else on the input, as in PEFT's LoRA. `extra` are further fields.
    """
    total = N * r
    special: dict[str, dict[str, Any]] = {
        "cola": {"r": r},  # a chain of three links
        "cond_mixlora": {"r": r, "num_factors": total},
        "cora": {"r": total, "variant": "init_b", "init_a": "kaiming", "basis_sha256": "0"},
        "moe_lora": {"top_k": min(2, N)},
        "malora": {"top_k": min(2, N)},
        "smora": {"r": total, "top_k": r},
    }
    known = {field.name for field in dataclasses.fields(registered(name).config)}
    fields: dict[str, Any] = {"r": r} if known & {"num_heads", "num_experts"} else {"r": total}
    fields |= {key: N for key in ("num_heads", "num_experts") if key in known}
    fields |= {"num_tasks": num_tasks} if "num_tasks" in known else {}
    fields["head_dropout" if "head_dropout" in known else "lora_dropout"] = dropout
    fields |= special.get(name, {}) | extra
    return make_config(name, init_seed=0, **fields)


def adapted(linear: nn.Linear, config: Any) -> nn.Module:
    """The one-layer model with an adapter, in train mode, every trainable tensor moved from its start."""
    config.target_modules = {"linear"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*head dropout on heads of this starting size")
        model = get_peft_model(Layer(linear), config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    return model


def peft_lora(linear: nn.Linear, r: int, dropout: float) -> nn.Module:
    return adapted(linear, LoraConfig(r=r, lora_alpha=r, lora_dropout=dropout))


def ours(linear: nn.Linear, shape: Shape, name: str = "rlora", num_tasks: int = 3, **extra: Any) -> nn.Module:
    """One of headwater's methods on the layer; called with task ids where it needs them."""
    config = config_of(name, r=shape.r, N=shape.N, dropout=shape.dropout, num_tasks=num_tasks, **extra)
    model = adapted(linear, config)
    return WithTasks(model, shape.rows, num_tasks) if config.needs_task_ids else model


class WithTasks(nn.Module):
    """Gives the rows of a batch tasks in turn."""

    def __init__(self, model: nn.Module, rows: int, num_tasks: int):
        super().__init__()
        self.model = model
        self.ids = torch.arange(rows) * max(num_tasks // rows, 1) % num_tasks

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, headwater_task_ids=self.ids.to(x.device))


def method_names() -> list[str]:
    """All registered methods that adapt a linear layer by themselves."""
    return [known.name for known in methods()]


def title_of(name: str) -> str:
    return registered(name).title


def step(model: nn.Module, x: Tensor, dy: Tensor, *, autocast: bool = False) -> Callable[[], None]:
    """One forward and backward with fresh gradients."""

    def run() -> None:
        x.grad = None
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            y = model(x)
        y.backward(dy)

    return run
