"""Adapters in dtypes that cannot hold, or not tell apart, what the arithmetic asks for."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_tiny_llama

from headwater.compose import Adapter, LowRank, PooledModel
from headwater.compose.merge import concat, fuse, linear
from headwater.errors import HeadwaterError

LAYER = "model.layers.0.mlp.up_proj"  # 32 -> 48


def drawn(dtype=torch.float32, scaling=2.0, seed=0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 32), (48, 4)))
    return Adapter("drawn", {LAYER: LowRank(A, B, scaling)})


@pytest.mark.parametrize(
    ("base", "scaling", "factor"),
    [(torch.float32, 1e300, 1.0), (torch.float32, -1e39, 1.0), (torch.float16, 2.0, 1e5)],
)
def test_an_adapter_that_overflows_is_refused_before_it_shares_a_batch(base, scaling, factor):
    adapter = drawn(scaling=scaling)
    adapter.layers[LAYER].A.mul_(factor)
    adapters = {"large": adapter, "plain": drawn(seed=1)}
    pooled = PooledModel(make_tiny_llama().to(base), adapters.__getitem__)
    ids = torch.arange(10).view(2, 5)
    said = pytest.raises(HeadwaterError, match=f"at {LAYER} are too large for this model's dtype")
    with said, pooled.rows([{"plain": 1.0}, {"large": 1.0}]):
        pass
    with torch.no_grad(), pooled.rows([{"plain": 1.0}, {}]):
        assert pooled.model(ids).logits.isfinite().all()


@pytest.mark.parametrize("how", [concat, fuse, linear])
def test_a_merged_adapter_has_the_dtype_that_holds_all_whatever_their_order(how):
    half, full = drawn(torch.bfloat16), drawn(seed=1)
    merged = [how([half, full], [0.3, 0.7]), how([full, half], [0.7, 0.3])]
    for layer in (adapter.layers[LAYER] for adapter in merged):
        assert (layer.A.dtype, layer.B.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(*(adapter.layers[LAYER].delta() for adapter in merged))
    twice = how([half, half], [0.3, 0.7]).layers[LAYER]
    assert (twice.A.dtype, twice.B.dtype) == (torch.bfloat16, torch.bfloat16)
