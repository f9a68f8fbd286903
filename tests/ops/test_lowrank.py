"""The rank-space operation against loops over tokens, heads and ranks, in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwater.ops import add_update, project, spread_heads
from headwater.ops.dropout import drop
from headwater.ops.lowrank import FEW
from headwater.ops.reference import multi_head_update

quick = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 5)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def noise(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(x, A, B, gate, masks, scaling) -> Tensor:
    """`scaling * sum_n gate_tn sum_k B_nok masks_ntk sum_i A_ki x_ti`, one number at a time."""
    (N, d_out, r), (T, d_in) = B.shape, x.shape
    rows = []
    for t in range(T):
        row = []
        for o in range(d_out):
            total = x.new_zeros(())
            for n in range(N):
                for k in range(r):
                    u = sum(A[k, i] * x[t, i] for i in range(d_in))
                    total = total + scaling * gate[t, n] * B[n, o, k] * masks[n, t, k] * u
            row.append(total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@quick
@given(
    T=sizes, d_in=st.integers(1, 3), d_out=st.integers(1, 3), r=st.integers(1, 3), N=st.integers(1, 3),
    p=st.sampled_from([0.0, 0.4]), in_place=st.booleans(), constant_gate=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_fused_and_reference_equal_the_sum_by_hand(T, d_in, d_out, r, N, p, in_place, constant_gate, seed):
    shapes = [(T, d_in), (r, d_in), (N, d_out, r), (N,) if constant_gate else (T, N), (T, d_out), (T, d_out)]
    x, A, B, gate, base, v = (noise(*shape, seed=seed + i) for i, shape in enumerate(shapes))
    mask = drop(torch.ones(T, N * r, dtype=torch.float64), torch.tensor([seed]), p)
    masks = mask.view(T, N, r).transpose(0, 1)

    def fused(x, A, B, gate):
        (z,) = project(x, (A,))
        h = spread_heads(z, gate) * mask
        return add_update(base.clone(), h, B.transpose(1, 2).flatten(0, 1), scale=1.7, in_place=in_place)

    def reference(x, A, B, gate):
        return base + multi_head_update(x, A, B, gate.expand(T, N), masks if p else None, 1.7)

    def plain(x, A, B, gate):
        return base + by_hand(x, A, B, gate.expand(T, N), masks, 1.7)

    results = []
    for way in (plain, fused, reference):
        leaves = [t.clone().requires_grad_() for t in (x, A, B, gate)]
        y = way(*leaves)
        results.append((y, *torch.autograd.grad((y * v).sum(), leaves)))
    expected, *others = results
    for other in others:
        for got, want in zip(other, expected, strict=True):
            torch.testing.assert_close(got, want, **CLOSE)


@quick
@given(
    T=st.sampled_from([1, 4, FEW + 1]),
    d_in=sizes,
    widths=st.lists(sizes, min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_project_reads_every_matrix_as_if_alone(T, d_in, widths, seed):
    x = noise(T, d_in, seed=seed)
    weights = [noise(k, d_in, seed=seed + k + i).requires_grad_() for i, k in enumerate(widths)]
    outputs = project(x, weights)
    assert [u.shape for u in outputs] == [(T, k) for k in widths]
    for u, w in zip(outputs, weights, strict=True):
        torch.testing.assert_close(
            u, torch.stack([torch.stack([(row * x_t).sum() for row in w]) for x_t in x]), **CLOSE
        )
    grads = torch.autograd.grad(sum(u.sum() for u in outputs), weights)
    for grad in grads:
        torch.testing.assert_close(grad, x.sum(0).expand_as(grad), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2])
def test_dtypes_ranks_are_at_least_float32_and_the_output_is_the_bases(dtype, count):
    x = noise(4, 6, dtype=dtype)
    weights = [noise(3, 6, seed=i, dtype=torch.float32) for i in range(count)]
    for u in project(x, weights):
        assert u.dtype == torch.promote_types(dtype, torch.float32)
    y = noise(4, 5, dtype=dtype)
    for in_place in (False, True):
        assert add_update(y.clone(), noise(4, 3, dtype=torch.float32), noise(3, 5), in_place=in_place).dtype == dtype


def test_in_place_adds_into_the_given_memory_and_otherwise_leaves_it_alone():
    y, h, up = noise(4, 5), noise(4, 3, seed=1), noise(3, 5, seed=2)
    before = y.clone()
    fresh = add_update(y, h, up, scale=0.5)
    assert torch.equal(y, before)
    same = add_update(y, h, up, scale=0.5, in_place=True)
    assert same.data_ptr() == y.data_ptr()
    assert torch.equal(same, fresh)
    torch.testing.assert_close(fresh, before + 0.5 * (h @ up), **CLOSE)


def test_spread_heads_lays_heads_side_by_side_and_takes_a_block_per_head():
    z, gate = noise(4, 3), noise(4, 2, seed=1)
    shared = spread_heads(z, gate)
    assert shared.shape == (4, 6)
    for n in range(2):
        torch.testing.assert_close(shared[:, 3 * n : 3 * n + 3], gate[:, n : n + 1] * z, **CLOSE)
    blocks = noise(4, 2, 3, seed=2)
    separate = spread_heads(blocks, gate)
    for n in range(2):
        torch.testing.assert_close(separate[:, 3 * n : 3 * n + 3], gate[:, n : n + 1] * blocks[:, n], **CLOSE)


@pytest.mark.parametrize("tokens", [1, FEW, FEW + 1])
def test_up_projections_in_parts_are_those_stacked(tokens):
    y, h, up = noise(tokens, 5), noise(tokens, 6, seed=1), noise(6, 5, seed=2)
    for in_place in (False, True):
        found = add_update(y.clone(), h, up.split([1, 3, 2]), scale=0.3, in_place=in_place)
        torch.testing.assert_close(found, y + 0.3 * h @ up, **CLOSE)
