"""One linear layer with one adapter, and ways to look inside it that do not depend on how the code draws or stores."""

from __future__ import annotations

import warnings

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from headwater import make_config
from headwater.analysis import heads
from headwater.methods import Heads


class OneLinear(nn.Module):
    def __init__(self, d_in: int, d_out: int, seed: int = 0, **factory):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = nn.Linear(d_in, d_out, **factory)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(x)


def adapt(method: str, d_in: int, d_out: int, *, dtype=torch.float64, base_seed: int = 0, **fields) -> PeftModel:
    """A `OneLinear` with an adapter, in eval mode, all of it in `dtype`; `init_seed` is 0 unless given."""
    config = make_config(method, target_modules=["layer"], **{"init_seed": 0, **fields})
    with warnings.catch_warnings():  # layers this small start noisily; the warning has a test of its own
        warnings.filterwarnings("ignore", message=".*head dropout on heads of this starting size")
        return get_peft_model(OneLinear(d_in, d_out, base_seed), config).to(dtype).eval()


def held(model: PeftModel) -> Heads:
    """The one layer's heads."""
    return heads(model)["layer"]


def base_of(model: PeftModel) -> nn.Linear:
    return model.base_model.model.layer.get_base_layer()


def parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The trainable parameters by their own names: A, B (stored as (N, r, d_out)), router."""
    return {name.rsplit(".", 1)[-1]: p for name, p in model.named_parameters() if p.requires_grad}


def move(model: PeftModel, seed: int, size: float = 0.5) -> PeftModel:
    """Adds noise to every trainable parameter, as training would, so that nothing is at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters(model).values():
            p += size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
    return model


def noise(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(tensor: Tensor | None) -> Tensor | None:
    """A float64 copy with its own gradient."""
    return None if tensor is None else tensor.detach().double().clone().requires_grad_()


def head_inputs(update: Tensor, B: Tensor, s: float) -> Tensor:
    """What each head was given, weight included: solves `update = s sum_n B_n c_n` for c, `(tokens, N, r)`.

    Needs `d_out >= N r`, so that the heads' columns are independent. Reads the masks off the output, whatever the order
    in which the code draws them.
    """
    N, d_out, r = B.shape
    assert d_out >= N * r
    columns = s * B.detach().permute(1, 0, 2).reshape(d_out, N * r)
    return torch.linalg.lstsq(columns, update.detach().T).solution.T.reshape(-1, N, r)


def as_mask(seen: Tensor, p: float) -> Tensor:
    """Snaps recovered factors to 0 or 1 / (1 - p); fails if they are neither."""
    kept = (seen * (1 - p)).round()
    assert torch.all((kept == 0) | (kept == 1)), "a dropout factor is neither 0 nor 1 / (1 - p)"
    torch.testing.assert_close(seen * (1 - p), kept, rtol=0, atol=1e-5)
    return kept / (1 - p)
