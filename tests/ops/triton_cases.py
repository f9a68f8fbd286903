"""The Triton kernels against the reference. Collected by `test_triton.py` alone, which runs it in a process of its own:

with TRITON_INTERPRET=1, read when triton is first imported, through Triton's interpreter on the CPU; or on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from headwater.ops import adapter, gated_heads, heads, read_exactly, triton_dropout, triton_heads
from headwater.ops.dropout import keep_mask

DEVICE = os.environ["HEADWATER_TEST_DEVICE"]
CLOSE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.float16: {"rtol": 2e-3, "atol": 2e-4},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-3},
}
# The interpreter multiplies matrices of bfloat16 as if its bits were whole numbers.
HALF, OTHER = (torch.bfloat16, None) if DEVICE == "cuda" else (torch.float16, torch.bfloat16)
# tokens, r, N: one token and none; neither a power of two; more tokens than a block; more heads, and more ranks, than
# tokens in the smallest block; single ranks and heads, which Triton turns into constants
SIZES = [(1, 8, 3), (0, 3, 2), (7, 3, 3), (130, 5, 6), (300, 8, 3), (21, 2, 33), (19, 40, 2), (33, 1, 1)]


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("HEADWATER_OPS", "triton")


def noise(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(DEVICE, dtype)


def inputs(tokens: int, r: int, N: int, *, fixed: bool, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """z and logits as they come from one stacked matmul, so neither is contiguous, and dh."""
    read = 2 * noise(tokens, r + N, seed=1, dtype=dtype)
    gate = noise(N, seed=2, dtype=dtype) if fixed else read[:, r:]
    return read[:, :r], gate, noise(tokens, N * r, seed=3, dtype=dtype)


def key(seed: int = 2**61 + 12345) -> Tensor:
    return torch.tensor([seed], device=DEVICE)


def expected(z: Tensor, gate: Tensor, dh: Tensor, seed: Tensor | None, p: float) -> tuple[Tensor, ...]:
    """h, dz and the gate's gradient through plain autograd in float64."""
    z, gate = (t.detach().double().requires_grad_() for t in (z, gate))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADWATER_OPS", "reference")
        h = heads.reference(z, gate, seed, p)
    dz, dgate = torch.autograd.grad(h, (z, gate), dh.double(), allow_unused=True)
    return h.detach(), dz, torch.empty(0, device=DEVICE) if dgate is None else dgate


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_values_and_gradients(size, fixed, p):
    check(size, fixed, p, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fixed", [False, True])
def test_narrower_dtypes(dtype, fixed):
    check((150, 5, 3), fixed, 0.3, dtype)


def check(size: tuple[int, int, int], fixed: bool, p: float, dtype: torch.dtype) -> None:
    z, gate, dh = inputs(*size, fixed=fixed, dtype=dtype)
    seed = key() if p else None
    h = triton_heads.forward(z, gate, seed, p)
    dz, dgate = triton_heads.backward(dh, z, gate, seed, p)
    assert (h.dtype, dz.dtype, dgate.dtype) == (dtype, dtype, dtype)
    for got, want in zip((h, dz, dgate), expected(z, gate, dh, seed, p), strict=True):
        torch.testing.assert_close(got, want.to(dtype), **CLOSE[dtype])


@pytest.mark.parametrize("size", SIZES[2:], ids=str)  # strides of a single row or none mean nothing
def test_layout_is_that_of_the_other_implementation(size):
    z, gate, dh = inputs(*size, fixed=False)
    mine = triton_heads.forward(z, gate, key(), 0.3), *triton_heads.backward(dh, z, gate, key(), 0.3)
    other = heads.forward(z, gate, key(), 0.3), *heads.backward(dh, z, gate, key(), 0.3)
    assert [t.stride() for t in mine] == [t.stride() for t in other]
    from_features = dh.T.contiguous().T
    for got, want in zip(triton_heads.backward(from_features, z, gate, key(), 0.3), mine[1:], strict=True):
        torch.testing.assert_close(got, want, **CLOSE[torch.float64])  # sums run in another order


def test_columns_may_lie_far_apart():
    """Where 32 bits do not count the entries; on a CPU, memory that nobody touches is not taken."""
    far = torch.empty(2**31 + 1, dtype=torch.float16, device=DEVICE).as_strided((1, 3), (1, 2**30))
    z = far.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    assert torch.equal(triton_heads.forward(z, far, None, 0.0), triton_heads.forward(z.clone(), z.clone(), None, 0.0))
    dh = torch.ones(1, 9, dtype=torch.float16, device=DEVICE)
    found = triton_heads.backward(dh, z, far, None, 0.0)
    for got, want in zip(found, triton_heads.backward(dh, z.clone(), z.clone(), None, 0.0), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**62 - 1])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_masks_are_identical(seed, p):
    tokens, r, N = 300, 5, 3
    z, gate = torch.ones(tokens, r, device=DEVICE), torch.ones(N, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADWATER_OPS", "autograd")
        kept = keep_mask(key(seed), N * r, tokens, p).T
    assert torch.equal(triton_heads.forward(z, gate, key(seed), p) != 0, kept)
    dh = torch.ones(tokens, N * r, device=DEVICE)
    dz, _ = triton_heads.backward(dh, z, gate, key(seed), p)
    torch.testing.assert_close(dz, kept.unflatten(1, (N, r)).sum(1) / (1 - p))


@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_large_logits_neither_overflow_nor_vanish(size):
    z = torch.ones(3, 2, device=DEVICE)
    gate = torch.tensor([[size, 0.0, 0.0]], device=DEVICE).expand(3, 3)
    h = triton_heads.forward(z, gate, None, 0.0)
    want = torch.softmax(gate, -1).repeat_interleave(2, dim=1)
    torch.testing.assert_close(h, want)
    assert torch.isfinite(triton_heads.backward(h, z, gate, None, 0.0)[1]).all()


@pytest.mark.parametrize("fixed", [False, True])
def test_gradcheck_through_the_dispatcher(fixed):
    z, gate, _ = (t.detach() for t in inputs(5, 3, 2, fixed=fixed))
    assert torch.autograd.gradcheck(
        lambda z, gate: gated_heads(z, gate, seed=key(), dropout=0.3),
        (z.requires_grad_(), gate.requires_grad_(not fixed)),
        nondet_tol=0.0,
    )


@pytest.mark.parametrize("first_row", [0, 7, 10**6 + 1])
@pytest.mark.parametrize("size", [(70, 33), (1, 1), (3, 1100), (0, 4)], ids=str)
def test_masks_of_whole_tensors(first_row, size, monkeypatch):
    mine = keep_mask(key(), *size, 0.3, first_row=first_row)
    monkeypatch.setenv("HEADWATER_OPS", "autograd")
    other = keep_mask(key(), *size, 0.3, first_row=first_row)
    assert torch.equal(mine, other)
    torch.library.opcheck(torch.ops.headwater.keep_mask, (key(), *size, 0.3, first_row))


def test_a_compiled_graph_calls_the_kernels():
    z, gate, dh = inputs(40, 3, 2, fixed=False)

    def run(z: Tensor, gate: Tensor) -> Tensor:
        return (gated_heads(z, gate, seed=key(), dropout=0.3) * dh).sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    leaves = [[t.detach().clone().requires_grad_() for t in (z, gate)] for _ in range(2)]
    run(*leaves[0]).backward()
    compiled(*leaves[1]).backward()
    for plain, through in zip(*leaves, strict=True):
        assert torch.equal(plain.grad, through.grad)


# tokens, d_in, r: one, none; no multiples of 4 or of a block; several blocks each way; more ranks than a launch takes
READS = [(1, 1, 1), (0, 4, 3), (70, 33, 5), (7, 300, 8), (130, 140, 17), (9, 24, 70)]


@pytest.mark.parametrize(
    ("size", "dtype", "programs"),
    [
        *((size, torch.float64, 1) for size in READS),
        *((READS[4], dtype, 1024) for dtype in CLOSE if dtype is not OTHER),
    ],
    ids=str,
)  # one program does several steps, or one each
@pytest.mark.parametrize(("masks", "k"), [(1, 0), (3, 0), (1, 5), (3, 19)])
def test_x_under_its_masks_is_read_and_comes_back(size, masks, k, programs, dtype, monkeypatch):
    monkeypatch.setattr(triton_dropout, "PROGRAMS", programs)
    tokens, d_in, r = size
    x, dx = noise(tokens, d_in, seed=0, dtype=dtype), noise(tokens, d_in, seed=1, dtype=dtype)
    down, du = noise(r, d_in, seed=2, dtype=dtype), noise(masks * r, tokens, seed=3, dtype=dtype).T
    clean, d_clean = noise(k, d_in, seed=4, dtype=dtype), noise(tokens, k, seed=5, dtype=dtype)
    beside, back = ({"clean": clean}, {"clean": clean, "d_clean": d_clean}) if k else ({}, {})
    kept = keep_mask(key(), masks * tokens, d_in, 0.3).view(masks, tokens, d_in)
    u, of_clean = triton_dropout.read(x, down, key(), 0.3, masks, **beside)
    want_u, want_dx, want_down = torch.zeros_like(u).double(), dx.double(), torch.zeros_like(down).double()
    for n in range(masks):
        seen, columns = kept[n] * x.double(), slice(n * r, (n + 1) * r)
        want_u[:, columns] = seen @ down.double().T
        want_dx += kept[n] * (du[:, columns].double() @ down.double())
        want_down += du[:, columns].double().T @ seen
    want_dx += d_clean.double() @ clean.double()
    alone = triton_dropout.add_back(None, du, x, down, key(), 0.3, masks, **back)
    found = triton_dropout.add_back(dx, du, x, down, key(), 0.3, masks, **back)
    assert torch.equal(alone[0], found[0])
    assert (u.dtype, found[0].dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    pairs = [(u, want_u), (dx, want_dx), (found[0], want_down)]
    if k:
        assert torch.equal(alone[1], found[1])
        pairs += [(of_clean, x.double() @ clean.double().T), (found[1], d_clean.double().T @ x.double())]
    for got, want in pairs:
        size = want.abs().max().clamp_min(1e-6) if want.numel() else 1.0
        torch.testing.assert_close(got.double() / size, want / size, **CLOSE[dtype])


def test_millions_of_tokens_fit_into_a_grid(monkeypatch):
    """CUDA's and HIP's least room: 2**31 - 1 programs the first way, 2**16 - 1 the others."""
    grids = []
    monkeypatch.setattr(triton_dropout, "_launch", lambda kernel, grid, *_, **__: grids.append(grid))
    x, down, du = (torch.empty(*size, device="meta") for size in ((2**24, 64), (8, 64), (2**24, 24)))
    triton_dropout.read(x, down, key(), 0.1, 3)
    triton_dropout.add_back(None, du, x, down, key(), 0.1, 3)
    assert len(grids) == 4
    assert all(first < 2**31 and all(way < 2**16 for way in others) for first, *others in grids)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("size", [(1, 33, 3), (0, 8, 2), (70, 300, 30)], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e3])
def test_logits_are_read_exactly(p, size, scale, monkeypatch):
    monkeypatch.setattr(adapter, "MANY", -1)
    tokens, d_in, k = size
    x, down = noise(tokens, d_in, seed=0, dtype=HALF), noise(k, d_in, seed=1, dtype=torch.float32) * scale
    seed = key() if p else None
    found = read_exactly(x, down, seed, p)
    kept = keep_mask(key(), tokens, d_in, p) if p else torch.ones_like(x)
    expected = (kept * x.double()) @ down.double().T / (1 - p)
    assert found.dtype == torch.float32
    size = max(scale, 1e-30) * d_in**0.5
    torch.testing.assert_close(found.double() / size, expected / size, rtol=0, atol=3e-6)


LAYERS = [
    ("rlora", {"num_heads": 3, "r": 4}),  # neither ranks nor rows of u are a multiple of 8
    ("rlora", {"num_heads": 2, "r": 8, "lora_dropout": 0.2}),
    ("rlora", {"num_heads": 3, "r": 5, "head_dropout": 0.0}),
    ("rlora", {"num_heads": 1, "r": 3, "compensation": "center"}),
    ("hydralora", {"num_heads": 3, "r": 5, "lora_dropout": 0.2}),
    ("hydralora", {"num_heads": 70, "r": 2, "lora_dropout": 0.2}),  # more router rows than a launch takes
    ("hydralora", {"num_heads": 3, "r": 4, "lora_dropout": 0.2, "input_dropout": "per_head"}),
    ("mlora", {"num_heads": 3, "r": 5, "lora_dropout": 0.2}),
    ("mtl_lora", {"num_heads": 3, "r": 5, "lora_dropout": 0.2, "num_tasks": 2}),
    ("multilora", {"num_heads": 3, "r": 5, "lora_dropout": 0.2}),
]


@pytest.mark.parametrize(("name", "fields"), LAYERS, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_trains_as_with_the_other_implementation(name, fields, autocast, monkeypatch):
    from adapted_linear import adapt, move, parameters

    model = move(adapt(name, 24, 40, dtype=torch.float32, **fields), seed=5, size=0.3).to(DEVICE).train()
    x = noise(2, 71, 24, seed=6, dtype=torch.float32).requires_grad_()
    tasks = {"headwater_task_ids": torch.tensor([1, 0], device=DEVICE)} if name == "mtl_lora" else {}
    found = []
    for chosen in ("triton", "autograd"):
        monkeypatch.setenv("HEADWATER_OPS", chosen)
        torch.manual_seed(0)
        with torch.autocast(DEVICE, HALF, enabled=autocast):
            y = model(x, **tasks)
        own = parameters(model)
        found.append((y.detach(), *torch.autograd.grad(y.float().square().mean(), [x, *own.values()])))
    assert_alike(*found, autocast=autocast)


def assert_alike(found: list[Tensor], expected: list[Tensor], *, autocast: bool) -> None:
    close = {"rtol": 3e-2, "atol": 3e-2} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    for got, want in zip(found, expected, strict=True):
        size = want.abs().max().clamp_min(1e-6)
        torch.testing.assert_close(got / size, want / size, **close)


@pytest.mark.parametrize(("name", "fields"), [*LAYERS[:5], *LAYERS[6:8]], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.*head dropout on heads of this starting size")
def test_a_whole_model_trains_as_with_the_other_implementation(name, fields, checkpointing, monkeypatch):
    """Gate and up projection read x together in one function over the block."""
    model = llama(name, **fields)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for chosen in ("triton", "autograd"):
        monkeypatch.setenv("HEADWATER_OPS", chosen)
        found.append(gradients_of(model, loss_of(model)))
    assert_alike(*found, autocast=False)


def llama(name: str, *, twice: bool = False, **fields):
    """A small model with an adapter that is not as it starts, in training."""
    from peft import get_peft_model
    from tiny_models import make_tiny_llama

    base = make_tiny_llama()
    if twice:
        base.model.layers[1] = base.model.layers[0]
    model = get_peft_model(base, settings(name, **fields)).to(DEVICE).train()
    stir(model, 0)
    return model


def settings(name: str, **fields):
    import headwater

    targets = ["gate_proj", "up_proj", "down_proj", "q_proj"]
    return headwater.make_config(name, target_modules=targets, task_type="CAUSAL_LM", init_seed=0, **fields)


def stir(model, seed: int) -> None:
    """Changes what is trained as fused optimisers do: no version tells of it."""
    for n, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(noise(*parameter.shape, seed=100 * seed + n, dtype=torch.float32), alpha=0.1)


def loss_of(model) -> Tensor:
    ids = torch.arange(3 * 11, device=DEVICE).reshape(3, 11)
    torch.manual_seed(0)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients_of(model, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def check_stacks(model, monkeypatch, *, autocast: bool = False) -> int:
    """A step gives what it gives where every layer stacks its own weights; returns how many layers do so in it."""
    from headwater.ops import by_kernels, stacks

    alone, found = [], []
    take, stack_now = stacks.Stacks.take, stacks.stack_now
    for takes in (True, False):
        with monkeypatch.context() as patch, torch.autocast(DEVICE, HALF, enabled=autocast):
            patch.setattr(stacks.Stacks, "take", lambda *args, takes=takes: take(*args) if takes else None)
            patch.setattr(by_kernels, "stack_now", lambda *args, takes=takes: alone.append(takes) or stack_now(*args))
            found.append(gradients_of(model, loss_of(model)))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
    loss_of(model)  # so that the next forward knows what is wanted
    return sum(alone)


# Few heads, and masks on them in one case alone: Triton's interpreter takes its time for each.
WEIGHTS = [
    ("rlora", {"num_heads": 2, "r": 4}),
    ("rlora", {"num_heads": 2, "r": 8, "head_dropout": 0.0, "lora_dropout": 0.2}),
    ("hydralora", {"num_heads": 2, "r": 5, "lora_dropout": 0.2}),
    ("mlora", {"num_heads": 2, "r": 8, "head_dropout": 0.0, "compensation": "center"}),  # only the cast to stack
]
FEW = {"num_heads": 2, "head_dropout": 0.0}
quiet = pytest.mark.filterwarnings("ignore:.*head dropout on heads of this starting size")
STACKS = 3 * 2  # of a forward: q's, those of gate and up together, and down's, in each of two layers


@quiet
@pytest.mark.parametrize(("name", "fields"), WEIGHTS, ids=str)
def test_weights_stacked_for_all_layers_are_those_of_now(name, fields, monkeypatch):
    model = llama(name, **fields)
    assert check_stacks(model, monkeypatch) == STACKS  # the first forward does not know yet what is wanted
    for seed in (1, 2):
        stir(model, seed)
        assert check_stacks(model, monkeypatch) == 0
    with torch.no_grad():
        loss_of(model.eval())
    assert check_stacks(model.train(), monkeypatch, autocast=True) == STACKS  # another dtype
    with torch.autocast(DEVICE, HALF):
        loss_of(model)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".A" not in parameter_name)
    stir(model, 3)
    assert check_stacks(model, monkeypatch, autocast=True) == 0


@quiet
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoints_second_forward_finds_the_stacked_weights(reentrant, monkeypatch):
    model = llama("rlora", r=8, **FEW, lora_dropout=0.2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss_of(model)
    for seed in (1, 2):
        stir(model, seed)
        assert check_stacks(model, monkeypatch) == 0


@quiet
def test_a_layer_that_runs_twice_in_a_forward(monkeypatch):
    model = llama("rlora", twice=True, r=8, **FEW)
    loss_of(model)
    stir(model, 1)
    assert check_stacks(model, monkeypatch) == 0


@quiet
def test_adapters_that_take_turns_and_that_are_active_together(monkeypatch):
    model = llama("rlora", r=8, **FEW)
    model.add_adapter("other", settings("rlora", r=4, **FEW))
    for names in (["default"], ["other"], ["default", "other"], ["other"]):
        model.base_model.set_adapter(names)
        stir(model, len(names))
        assert check_stacks(model, monkeypatch) > 0
        stir(model, 5)
        assert check_stacks(model, monkeypatch) == 0
    model.delete_adapter("other")
    model.set_adapter("default")
    assert check_stacks(model, monkeypatch) == STACKS


@quiet
@pytest.mark.parametrize(("dropout", "autocast"), [(0.0, False), (0.2, True)])
def test_a_backward_is_of_the_weights_of_its_forward(dropout, autocast):
    model = llama("rlora", r=8, **FEW, lora_dropout=dropout)
    with torch.autocast(DEVICE, HALF, enabled=autocast):
        loss_of(model)
        expected = gradients_of(model, loss_of(model))
        before = loss_of(model)
        stir(model, 1)
        loss_of(model)
    for got, want in zip(gradients_of(model, before), expected, strict=True):
        assert torch.equal(got, want)


@quiet
def test_weights_that_are_not_whole_between_forwards_are_stacked_by_their_layers(monkeypatch):
    """As sharded and offloaded ones are; hooked ones may be others in the forward."""
    model = llama("rlora", r=8, **FEW)
    loss_of(model)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    branch, hooks = layer.branch("default"), []
    weight, shard = branch.A, torch.nn.Parameter(torch.empty(0, device=DEVICE))
    hooks.append(layer.register_forward_pre_hook(lambda *_: branch._parameters.update(A=weight)))
    hooks.append(layer.register_forward_hook(lambda *_: branch._parameters.update(A=shard)))
    branch._parameters["A"] = shard
    loss_of(model)
    branch._parameters["A"] = shard
    assert loss_of(model).isfinite()
    for hook in hooks:
        hook.remove()
    branch._parameters["A"] = weight
    loss_of(model)
    assert check_stacks(model, monkeypatch) == 0
    branch.register_forward_pre_hook(lambda *_: None)
    loss_of(model)
    assert check_stacks(model, monkeypatch) == 1


@quiet
@pytest.mark.parametrize("between", ["flat", "meta", "gone"])
def test_between_forwards_something_else_may_be_where_weights_are(between):
    """A part of a flat shard, or a tensor in a parameter's place whose memory is gone (FSDP); nothing (offloading)."""
    model = llama("rlora", r=8, **FEW, compensation="buffer")
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda *_: None)  # a hook splits the block, whose seeds a GPU then draws apart
    expected = loss_of(model)
    branch = layer.branch("default")
    weights = {name: p.detach().clone() for name, p in branch._parameters.items()}

    def put(there: bool) -> None:
        for name, w in weights.items():
            if between == "flat":
                branch._parameters[name].data = w if there else w.flatten()[:5]
            elif between == "meta":
                branch._parameters[name] = torch.nn.Parameter(w if there else w.to("meta"))
            else:
                branch._parameters.pop(name, None)
                branch.__dict__.setdefault(name, w.clone()).data.copy_(w if there else w * float("nan"))

    layer.register_forward_pre_hook(lambda *_: put(True))
    layer.register_forward_hook(lambda *_: put(False))
    put(False)
    for _ in range(3):
        assert torch.equal(loss_of(model), expected)


@quiet
@pytest.mark.parametrize("way", ["written", "exchanged", "parametrized"])
def test_weights_that_a_forward_does_not_begin_with(way, monkeypatch):
    from headwater.ops import stacks

    model = llama("rlora", r=8, **FEW)
    inner, branch = model.base_model.model.model, model.base_model.model.model.layers[1].mlp.up_proj.branch("default")
    weight = branch.A
    before, other = weight.detach().clone(), torch.nn.Parameter(3 * weight.detach())

    def change(there: bool) -> None:
        if way == "written":
            with torch.no_grad():
                weight.copy_(other if there else before)
        elif way == "exchanged":
            branch._parameters["A"] = other if there else weight

    if way == "parametrized":
        noise = torch.nn.Module()
        noise.forward = lambda w: w * (1 + torch.rand((), device=DEVICE))  # another one whenever somebody asks
        torch.nn.utils.parametrize.register_parametrization(branch, "A", noise)
    inner.register_forward_pre_hook(lambda *_: change(True))
    inner.register_forward_hook(lambda *_: change(False))
    loss_of(model)
    found = loss_of(model)
    monkeypatch.setattr(stacks, "_make", lambda _: {})
    assert torch.equal(found, loss_of(model))
