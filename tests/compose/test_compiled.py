"""A pool's adapters on a model that was compiled, and ran, before it got them."""

from __future__ import annotations

import pytest
import torch
from pool_support import make_pool
from tiny_models import make_tiny_llama

from headwater.compose import PooledModel
from headwater.compose.arrow import Arrow
from headwater.compose.flow import FlowGate

MIXTURES = [{"plain": 1.0}, {"rs": 0.5, "patterns": 0.25}, {}, {"plain": -0.3}]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("pool"))


def compiled(by):
    """The model, and what runs it compiled; it has run once."""
    torch.compiler.reset()
    model = make_tiny_llama().double()
    if by == "method":
        model.compile(backend="eager")
    run = model if by == "method" else torch.compile(model, backend="eager")
    with torch.no_grad():
        run(inputs())
    return model, run


def inputs() -> torch.Tensor:
    return torch.randint(0, 256, (4, 7), generator=torch.Generator().manual_seed(0))


def flow(pool, pooled, granularity):
    gate = FlowGate(pooled, ["plain", "rs"], "plain", granularity=granularity)
    generator = torch.Generator().manual_seed(0)
    for weight in gate.weight:
        weight.data = torch.randn(weight.shape, generator=generator)
    return gate.on


WAYS = {
    "rows": lambda pool, pooled: lambda: pooled.rows(MIXTURES),
    "arrow": lambda pool, pooled: Arrow(pooled, pool).on,
    "flow by layer": lambda pool, pooled: flow(pool, pooled, "layer"),
    "flow by module": lambda pool, pooled: flow(pool, pooled, "module"),
}


@pytest.mark.parametrize(("way", "by"), [*((way, "function") for way in WAYS), ("rows", "method")])
def test_a_model_that_ran_compiled_before_gets_its_adapters(pool, way, by):
    model, run = compiled(by)
    other = PooledModel(make_tiny_llama().double(), pool.load)
    x, pooled = inputs(), PooledModel(model, pool.load)
    on, want_on = WAYS[way](pool, pooled), WAYS[way](pool, other)
    with torch.no_grad():
        base = other.model(x).logits
        with want_on():
            want = other.model(x).logits
        with other.rows([{"twin": 1.0}]):
            twin = other.model(x).logits
        assert (want - base).abs().max() > 0.1
        for _ in range(2):
            with pooled.rows([{"twin": 1.0}]):  # on fewer layers
                torch.testing.assert_close(run(x).logits, twin, rtol=1e-9, atol=1e-9)
            with on():
                torch.testing.assert_close(run(x).logits, want, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(run(x).logits, base, rtol=1e-12, atol=1e-12)
            pooled.close()
            torch.testing.assert_close(run(x).logits, base, rtol=1e-12, atol=1e-12)
