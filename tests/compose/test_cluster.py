"""Clusters of adapters: cosines against dense updates, and groups that were planted."""

from __future__ import annotations

import math

import pytest
import torch
from pool_support import make_pool

from headwater.compose import Adapter, LowRank
from headwater.compose.cluster import cluster, similarity
from headwater.errors import HeadwaterError

SIZES = {"up": (6, 9), "down": (9, 6)}


def drawn(name, seed, rank=3, scaling=1.0, layers=("up", "down")):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in layers:
        d_in, d_out = SIZES[layer]
        A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        made[layer] = LowRank(A, B, scaling)
    return Adapter(name, made)


def rewritten(name, adapter, noise=0.0, scaling=1.0):
    """The adapter with a little noise in A, as (B R) (R^-1 A)."""
    layers = {}
    for layer, f in adapter.layers.items():
        generator = torch.Generator().manual_seed(len(name) + len(layer))
        A = f.A.double() + noise * torch.randn(f.A.shape, generator=generator).double()
        R = torch.randn(f.rank, f.rank, generator=generator).double() + 3 * torch.eye(f.rank)
        layers[layer] = LowRank(torch.linalg.inv(R) @ A, f.B.double() @ R, scaling)
    return Adapter(name, layers)


def test_rounding_gives_no_cosine_above_one():
    same = [Adapter(name, drawn(name, seed).layers) for seed in range(20) for name in ("a", "b")]
    assert similarity(same).abs().max() <= 1


def test_similarities_are_cosines_of_the_updates(tmp_path):
    pool = make_pool(tmp_path)  # ranks, scalings and layers differ
    adapters = [pool.load(name) for name in pool.names]
    dense = []
    for adapter in adapters:
        numbers = []
        for layer, (d_in, d_out) in sorted(pool.fingerprint.layers.items()):
            f = adapter.layers.get(layer)
            W = torch.zeros(d_out, d_in).double()
            for r in range(0 if f is None else f.rank):
                W += f.scaling * torch.outer(f.B[:, r].double(), f.A[r].double())
            numbers += W.flatten().tolist()
        dense.append(numbers)
    found = similarity(adapters)
    for i, u in enumerate(dense):
        for j, v in enumerate(dense):
            inner = sum(x * y for x, y in zip(u, v, strict=True))
            assert found[i, j].item() == pytest.approx(inner / math.hypot(*u) / math.hypot(*v), abs=1e-9)
    assert found[0, 1].abs() > 1e-4


def test_neither_factors_nor_scalings_count_and_signs_do():
    a = drawn("a", 0)
    loud, less = rewritten("loud", a, scaling=7.0), rewritten("less", a, scaling=-1.0)
    nothing = Adapter("nothing", {"up": LowRank(a.layers["up"].A, torch.zeros(9, 3), 1.0)})
    apart = Adapter("apart", {"elsewhere": a.layers["up"]})
    want = [[1, 1, -1, 0, 0], [1, 1, -1, 0, 0], [-1, -1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    found = similarity([a, loud, less, nothing, apart])
    torch.testing.assert_close(found, torch.tensor(want).double(), rtol=0, atol=1e-6)


def test_planted_groups_are_found_in_any_order():
    kinds = {kind: drawn(kind, seed) for seed, kind in enumerate(("news", "code", "film"))}
    adapters = [rewritten(f"{kind}{'i' * n}", a, noise=0.3) for n in range(4) for kind, a in kinds.items()]
    for order in (adapters, adapters[::-1], adapters[5:] + adapters[:5]):
        for seed in range(3):
            found = cluster(order, 3, seed=seed)
            assert {frozenset(names) for names in found} == {
                frozenset(f"{kind}{'i' * n}" for n in range(4)) for kind in kinds
            }
            assert [names[0] for names in found] == [one.name for one in order[:3]]


def test_all_in_one_and_each_alone():
    adapters = [drawn(f"a{seed}", seed, rank=1 + seed) for seed in range(4)]
    assert cluster(adapters, 1) == [["a0", "a1", "a2", "a3"]]
    assert cluster(adapters, 4) == [["a0"], ["a1"], ["a2"], ["a3"]]
    for count in (0, 5):
        with pytest.raises(HeadwaterError, match=f"4 adapters cannot make {count} clusters"):
            cluster(adapters, count)
    with pytest.raises(HeadwaterError, match=r"0 adapters cannot make 1 clusters\n.*headwater pool add"):
        cluster([], 1)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_is_none(seed):
    with pytest.raises(HeadwaterError, match=rf"seed: should be from 0 to 2\*\*32 - 1, not {seed}"):
        cluster([drawn("a", 0)], 1, seed=seed)
    assert cluster([drawn("a", 0)], 1, seed=2**32 - 1) == [["a"]]


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(HeadwaterError, match=r"pip install 'headwater\[pool\]'"):
        cluster([drawn("a", 0)], 1)
