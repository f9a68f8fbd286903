"""The gated heads' implementations: one against the other, against loops, and what their dropout draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwater import HeadwaterError
from headwater.ops import gated_heads
from headwater.ops.dropout import TABLE, draw_seed, draw_seeds, drop, keep_mask, keep_masks, masked, pack, unpack
from headwater.ops.heads import backward, forward, implementation, reference

quick = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 5)
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def noise(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def is_kept(i: int, seed: int, p: float) -> bool:
    """The documented hash in Python's whole numbers."""

    def signed(value: int, bits: int = 32) -> int:
        return (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)

    h = signed(i // 4 * -1640531527 + (seed & 0x7FFFFFFF))
    h = signed((h ^ (h >> 16)) * 0x21F0AAAD) ^ (seed >> 31)
    h = signed((h ^ (h >> 16)) * 0x735A2D97)
    byte = (h % 2**32) >> 8 * (i % 4) & 255
    return 256 * byte + (i + (seed >> 54)) * 159 % 256 >= round(p * 2**16)


@quick
@given(rows=sizes, columns=sizes, first=st.sampled_from([0, 3, 10**6 + 1]), seed=st.integers(0, 2**62 - 1))
def test_masks_are_the_documented_hash(rows, columns, first, seed):
    got = keep_mask(torch.tensor([seed]), rows, columns, 0.3, first_row=first)
    assert got.shape == (rows, columns)
    for t in range(rows):
        for c in range(columns):
            assert got[t, c].item() == is_kept((first + t) * columns + c, seed, 0.3)


@pytest.mark.parametrize("seed", [0, 2**62 - 1, 0x2B67_1234_89AB_CDEF])
def test_large_masks_are_the_documented_hash(seed):
    """Large enough for the bits that take turns, which decide about one entry in 256."""
    got = keep_mask(torch.tensor([seed]), 128, 200, 0.3, first_row=3).flatten()
    assert got.tolist() == [is_kept(i, seed, 0.3) for i in range(600, 600 + 128 * 200)]


def test_the_least_dropout_drops_nothing_and_the_largest_keeps_one_in_256():
    seed = torch.tensor([5])
    assert keep_mask(seed, 64, 1024, 1e-9).all()
    share = keep_mask(seed, 64, 1024, 1 - 1e-9).float().mean()
    assert 0.5 / 256 < share < 1.5 / 256


def test_masks_longer_than_the_tables_go_on_as_they_began():
    seed, p = draw_seed(torch.device("cpu")), 0.1
    long = keep_mask(seed, 4 * TABLE // 1000 + 1, 1000, p)
    assert torch.equal(long[:5], keep_mask(seed, 5, 1000, p))
    assert torch.equal(long[-5:], keep_mask(seed, 5, 1000, p, first_row=len(long) - 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masked_values_are_those_or_zero(dtype):
    values = noise(6, 2 * 16).to(dtype)[:, ::2]
    values[0, :2] = torch.tensor([torch.nan, torch.inf])
    kept = keep_mask(torch.tensor([3]), 6, 16, 0.5)
    kept[0, :2] = False
    assert torch.equal(masked(values, kept), torch.where(kept, values, 0))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seeds", ["drawn", "next to each other"])
def test_masks_look_like_coin_tosses(p, seeds):
    """Rates, and agreement of every pair that could be related, within 5 standard errors."""
    rows, columns, n = 4096, 24, 12
    torch.manual_seed(0)
    drawn = draw_seed(torch.device("cpu"), n) if seeds == "drawn" else torch.arange(n)
    masks = torch.stack([keep_mask(seed, rows, columns, p) for seed in drawn]).float()
    kept, by_chance = 1 - p, p**2 + (1 - p) ** 2

    def is_binomial(rate: Tensor, probability: float, tosses: int) -> None:
        error = (probability * (1 - probability) / tosses) ** 0.5
        assert ((rate - probability).abs() < 5 * error).all(), ((rate - probability) / error).abs().max()

    is_binomial(masks.mean(), kept, masks.numel())
    is_binomial(masks.mean((1, 2)), kept, rows * columns)
    is_binomial(masks.mean((0, 1)), kept, n * rows)
    is_binomial(masks.mean((0, 2)), kept, n * columns)
    agree = masks.flatten(1)
    for i in range(1, n):
        is_binomial((agree[i:] == agree[:-i]).float().mean(), by_chance, agree[i:].numel())
    for i in range(1, columns):  # heads' masks, ranks' masks
        is_binomial((masks[..., i:] == masks[..., :-i]).float().mean((0, 1)), by_chance, n * rows)
    for i in (1, 2, 3, 4, 8, 16, 64, 256, 1024):
        is_binomial((masks[:, i:] == masks[:, :-i]).float().mean((0, 1)), by_chance, n * (rows - i))
    three = (masks[:, :, 0:-2] + masks[:, :, 1:-1] + masks[:, :, 2:]) % 2  # parities: dependence that pairs do not show
    odd = (1 - (2 * p - 1) ** 3) / 2  # probability of an odd number of kept among three
    is_binomial(three.mean((0, 1)), odd, n * rows)


def test_seeds_follow_the_global_generator_and_blocks_make_the_whole():
    torch.manual_seed(3)
    first = draw_seed(torch.device("cpu"), 2)
    assert first[0] != first[1]
    torch.manual_seed(3)
    assert torch.equal(draw_seed(torch.device("cpu"), 2), first)
    torch.manual_seed(3)
    pairs = draw_seeds(torch.device("cpu"), 3)
    torch.manual_seed(3)
    assert torch.equal(
        torch.cat([s for pair in pairs for s in pair]), torch.cat([draw_seed(torch.device("cpu"), 2) for _ in "abc"])
    )
    x = noise(10, 7)
    whole = drop(x, first[0], 0.4)
    assert torch.equal(torch.cat([drop(x[:6], first[0], 0.4), drop(x[6:], first[0], 0.4, first_row=6)]), whole)
    torch.testing.assert_close(whole[whole != 0], (x / 0.6)[whole != 0], **CLOSE)
    assert 0 < (whole == 0).sum() < 70


def test_bits_hold_the_mask():
    kept = keep_mask(torch.tensor([11]), 37, 24, 0.4)
    bits = pack(kept)
    assert bits.shape == (37, 3)
    assert bits.dtype == torch.uint8
    assert torch.equal(unpack(bits, torch.bfloat16), kept.to(torch.bfloat16))
    assert torch.equal(unpack(bits[5:9], torch.float64), kept[5:9].double())


@pytest.mark.parametrize("count", [1, 3])
def test_masks_of_several_seeds_are_those_of_each(count):
    seeds = list(draw_seed(torch.device("cpu"), count).split(1))
    together = keep_masks(seeds, 7, 33, 0.3)
    for mask, seed in zip(together, seeds, strict=True):
        assert torch.equal(mask, keep_mask(seed, 7, 33, 0.3))


def by_hand(z: Tensor, gate: Tensor, seed: Tensor | None, p: float) -> Tensor:
    (T, r), N = z.shape, gate.shape[-1]
    h = []
    for t in range(T):
        g = gate if gate.dim() == 1 else gate[t].exp() / gate[t].exp().sum()
        for n in range(N):
            for k in range(r):
                kept = seed is None or is_kept((n * r + k) * T + t, int(seed), p)
                h.append(g[n] * z[t, k] / (1 - (p if seed is not None else 0)) * kept)
    return torch.stack(h).view(T, N * r)


@quick
@given(T=sizes, r=sizes, N=sizes, p=st.sampled_from([0.0, 0.3]), fixed=st.booleans(), seed=st.integers(0, 1000))
def test_every_implementation_is_the_sum_by_hand(T, r, N, p, fixed, seed):
    z, gate, v = noise(T, r, seed=seed), noise(*((N,) if fixed else (T, N)), seed=seed + 1), noise(T, N * r, seed=2)
    key = torch.tensor([seed]) if p else None

    def run(function):
        leaves = [z.clone().requires_grad_(), gate.clone().requires_grad_(not fixed)]
        h = function(*leaves)
        return h, *torch.autograd.grad((h * v).sum(), leaves[: 2 - fixed])

    expected = run(lambda z, gate: by_hand(z, gate, key, p))
    for way in (
        lambda z, gate: reference(z, gate, key, p),
        lambda z, gate: gated_heads(z, gate, seed=key, dropout=p),
        lambda z, gate: gated_heads(z.T.contiguous().T, gate, seed=key, dropout=p),
    ):
        for got, want in zip(run(way), expected, strict=True):
            torch.testing.assert_close(got, want, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(gated_heads(z, gate, seed=key, dropout=p), expected[0], **CLOSE)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("fixed", [False, True])
def test_gradcheck(p, fixed):
    z, gate = noise(4, 3).requires_grad_(), noise(*((2,) if fixed else (4, 2)), seed=1).requires_grad_(not fixed)
    assert torch.autograd.gradcheck(lambda z, gate: gated_heads(z, gate, seed=torch.tensor([5]), dropout=p), (z, gate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fixed", [False, True])
def test_custom_ops_are_what_they_say(dtype, fixed):
    z, gate = noise(5, 3, dtype=dtype).requires_grad_(), noise(*((2,) if fixed else (5, 2)), seed=1, dtype=dtype)
    seed = torch.tensor([7])
    torch.library.opcheck(torch.ops.headwater.gated_heads, (z, gate.requires_grad_(not fixed), seed, 0.3))
    dh = noise(5, 6, dtype=dtype)
    torch.library.opcheck(torch.ops.headwater.gated_heads_backward, (dh, z.detach(), gate.detach(), seed, 0.3))
    h = forward(z.detach(), gate.detach(), seed, 0.3)
    dz, dgate = backward(dh, z.detach(), gate.detach(), seed, 0.3)
    assert (h.dtype, dz.dtype, dgate.dtype) == (dtype, dtype, dtype)
    exact = reference(z.detach().double(), gate.detach().double(), seed, 0.3)
    torch.testing.assert_close(h.double(), exact, rtol=2**-7 if dtype == torch.bfloat16 else 5e-6, atol=1e-6)


def test_the_choice_of_implementation(monkeypatch):
    monkeypatch.delenv("HEADWATER_OPS", raising=False)
    assert implementation(torch.device("cpu")) == "autograd"
    monkeypatch.setenv("HEADWATER_OPS", "reference")
    assert implementation(torch.device("cpu")) == "reference"
    monkeypatch.setenv("HEADWATER_OPS", "tritn")
    with pytest.raises(HeadwaterError, match=r"HEADWATER_OPS.*tritn"):
        implementation(torch.device("cpu"))


def test_compiled_with_a_drawn_seed_gives_the_same_masks():
    def run(z, gate):
        return gated_heads(z, gate, seed=draw_seed(z.device), dropout=0.4).square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = []
    for function in (run, compiled):
        z, gate = noise(6, 3).requires_grad_(), noise(6, 2, seed=1).requires_grad_()
        torch.manual_seed(1)
        function(z, gate).backward()
        results.append((z.grad, gate.grad))
    torch.testing.assert_close(*results, **CLOSE)
