"""Arrow: prototypes against a full SVD, routing against its equations token by token, refreshing, files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from pool_support import add_again, make_pool, merged, save_lora
from tiny_models import make_tiny_llama

import headwater
from headwater.compose import Adapter, AdapterPool, LowRank, PooledModel
from headwater.compose.arrow import Arrow, ArrowSpec, prototype
from headwater.compose.merge import concat
from headwater.errors import HeadwaterError

NAMES = ["plain", "rs", "patterns", "twin"]
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def pool(tmp_path):
    return make_pool(tmp_path)


def model_of(pool, dtype=torch.float64):
    return PooledModel(make_tiny_llama().to(dtype), pool.load)


def ids(rows=2, length=6, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(router, inputs):
    with torch.no_grad(), router.on():
        return router.pooled.model(inputs).logits


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def observed(router, inputs):
    """Layer -> (x, gate, output of the layer), of one forward."""
    seen, gates, hooks = {}, {}, []
    logits(router, inputs)  # installs the pool's own hooks first
    for name in router._stacks:
        module = router.pooled.model.get_submodule(name)
        hooks.append(
            module.register_forward_hook(
                lambda m, args, y, name=name: seen.__setitem__(name, (args[0].clone(), y.clone()))
            )
        )
    with headwater.observe(router.pooled.model, gates.__setitem__):
        logits(router, inputs)
    for hook in hooks:
        hook.remove()
    return {name: (x, gates[name], y) for name, (x, y) in seen.items()}


@pytest.mark.parametrize("shape", [(4, 40, 24), (1, 8, 8), (16, 20, 64), (8, 8, 6)])
def test_prototypes_are_the_top_right_singular_vectors(shape):
    r, d_in, d_out = shape
    generator = torch.Generator().manual_seed(r)
    for _ in range(5):
        A, B = torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
        true = torch.linalg.svd(B.double() @ A.double())[2][0]
        v = prototype(A, B)
        assert abs(v @ true).item() > 0.999999
        assert v.norm().item() == pytest.approx(1)
        R = torch.randn(r, r, generator=generator) + 3 * torch.eye(r)
        same = prototype(torch.linalg.inv(R) @ A, B @ R)  # the same adapter, other factors
        assert abs(v @ same).item() > 0.9999
        assert abs(v @ prototype(-A, -B)).item() > 0.999999
    assert torch.equal(prototype(A, torch.zeros_like(B)), torch.zeros(d_in).double())


def by_hand(spec, W, held, u):
    """Arrow's equations for one token u: each adapter's coefficient, and the layer's output.

    held: name -> (A, B, s), float64, of the adapters that are on this layer.
    """
    z = {}
    for name, (A, B, _) in held.items():
        z[name] = (torch.linalg.svd(B @ A)[2][0] * u).sum().abs()
        if spec.input_norm != "none":
            z[name] = z[name] / u.norm()
        if spec.input_norm == "sqrt_d":
            z[name] = z[name] * math.sqrt(len(u))
    best = sorted(z, key=lambda name: z[name].item(), reverse=True)[: spec.top_k]
    total = sum(torch.exp(z[name] / spec.temperature) for name in best)
    c = {name: torch.exp(z[name] / spec.temperature) / total for name in best}
    y = W @ u
    if spec.combine == "output":
        for name in best:
            A, B, s = held[name]
            y = y + c[name] * s * (B @ (A @ u))
    elif best:
        A = sum(c[name] * held[name][0] for name in best)
        B = sum(c[name] * held[name][2] * held[name][1] for name in best)
        y = y + B @ (A @ u)
    return c, y


def check_layers(router, held_at, names):
    """Every layer's gates, outputs and gradients against `by_hand`, token by token."""
    base = make_tiny_llama().double()
    seen = observed(router, ids(1, 5))
    for layer, (x, gate, y) in seen.items():
        W, held = base.get_submodule(layer).weight.detach(), held_at(layer)
        mine, plain = (x.detach().clone().requires_grad_() for _ in range(2))
        weights = torch.linspace(-1, 1, y.numel()).double().view_as(y)
        with router.on():
            (router.pooled.model.get_submodule(layer)(mine) * weights).sum().backward()
        outputs = []
        for u, c in zip(plain[0], gate[0], strict=True):
            coefficients, output = by_hand(router.spec, W, held, u)
            outputs.append(output)
            close(c, torch.stack([coefficients.get(name, u.new_zeros(())).detach() for name in names]).float(), 1e-5)
        want = torch.stack(outputs)[None]
        close(y, want.detach(), 1e-5)
        (want * weights).sum().backward()
        close(mine.grad, plain.grad, 1e-4)
    return seen


@pytest.mark.parametrize(
    "spec", [ArrowSpec(2, 0.5), ArrowSpec(9), ArrowSpec(1), ArrowSpec(3, 0.2, "unit"), ArrowSpec(3, 2.0, "sqrt_d")]
)
def test_layers_are_the_equations_token_by_token(pool, spec):
    def held(layer):
        adapters = {name: pool.load(name).layers for name in NAMES}
        return {n: double(layers[layer]) for n, layers in adapters.items() if layer in layers}

    assert len(check_layers(Arrow(model_of(pool), pool, NAMES, spec), held, NAMES)) == 8


def double(factors):
    return factors.A.double(), factors.B.double(), factors.scaling


def test_coefficients(pool):
    router = Arrow(model_of(pool), pool, NAMES, ArrowSpec(2))
    for _, gate, _ in observed(router, ids()).values():
        assert (gate >= 0).all()
        assert ((gate > 0).sum(-1) <= 2).all()
        close(gate.sum(-1), torch.ones(gate.shape[:-1]))


def test_one_adapter_twins_and_high_temperature(pool):
    inputs = ids()
    alone = merged(make_tiny_llama().double(), (1.0, pool.load("rs")))
    twin = pool.load("plain")
    twins = PooledModel(make_tiny_llama().double(), lambda name: Adapter(name, twin.layers))
    average = concat([pool.load(name) for name in ("plain", "twin")], [0.5, 0.5])
    with torch.no_grad():
        close(logits(Arrow(model_of(pool), pool, ["rs"]), inputs), alone(inputs).logits)
        want = merged(make_tiny_llama().double(), (1.0, twin))(inputs).logits
        close(logits(Arrow(twins, pool, ["plain", "twin"]), inputs), want)
        want = merged(make_tiny_llama().double(), (1.0, average))(inputs).logits
        close(logits(Arrow(model_of(pool), pool, ["plain", "twin"], ArrowSpec(2, 1e7)), inputs), want)


def test_a_token_along_a_prototype_goes_to_its_adapter():
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    adapters = {  # rank 1, so the prototype is A's direction
        f"e{i}": Adapter(f"e{i}", {UP: LowRank(basis[:, i : i + 1].T.contiguous(), torch.ones(48, 1), 1.0)})
        for i in range(4)
    }

    class Pool:
        path, names = "x", list(adapters)

        def __getitem__(self, name):
            return type("Entry", (), {"sha256": {"adapter_model.safetensors": name}})

    router = Arrow(PooledModel(make_tiny_llama(), adapters.__getitem__), Pool(), None, ArrowSpec(1))
    seen = {}
    with headwater.observe(router.pooled.model, seen.__setitem__), router.on():
        router.pooled.model.get_submodule(UP)(5 * basis[:, [2, 0, 3]].T[None])
    assert seen[UP].argmax(-1).tolist() == [[2, 0, 3]]


def test_inputs_that_do_not_lie_in_one_piece(pool):
    for spec in (ArrowSpec(2), ArrowSpec(2, combine="factors")):
        router = Arrow(model_of(pool), pool, ["plain", "twin"], spec)
        x = torch.randn(32, 5, 2, generator=torch.Generator().manual_seed(0)).double().permute(2, 1, 0)
        module = router.pooled.model.get_submodule(UP)
        with torch.no_grad(), router.on():
            assert torch.equal(module(x), module(x.contiguous()))
            assert not torch.allclose(module(x), x @ module.weight.T)


def test_order_of_adapters_signs_and_alphas(pool):
    inputs = ids()
    router = Arrow(model_of(pool), pool, NAMES, ArrowSpec(2))
    want = logits(router, inputs)
    close(logits(Arrow(model_of(pool), pool, NAMES[::-1], ArrowSpec(2)), inputs), want)

    def flipped(name, factor=1.0):
        layers = pool.load(name).layers
        return Adapter(name, {k: LowRank(-f.A, -f.B, f.scaling * factor) for k, f in layers.items()})

    close(logits(Arrow(PooledModel(make_tiny_llama().double(), flipped), pool, NAMES, ArrowSpec(2)), inputs), want)

    def refactored(name):  # (B R) (R^-1 A), with another R for each layer
        layers = {}
        for seed, (layer, f) in enumerate(pool.load(name).layers.items()):
            R = torch.randn(f.rank, f.rank, generator=torch.Generator().manual_seed(seed)).double()
            R += 4 * torch.eye(f.rank)
            layers[layer] = LowRank(torch.linalg.inv(R) @ f.A.double(), f.B.double() @ R, f.scaling)
        return Adapter(name, layers)

    gauged = Arrow(PooledModel(make_tiny_llama().double(), refactored), pool, NAMES, ArrowSpec(2))
    for layer, rows in router.prototypes.items():
        cosines = (gauged.prototypes[layer] * rows).sum(-1).abs()
        close(cosines, (rows.norm(dim=-1) > 0).to(cosines))  # zeros where an adapter leaves the layer alone
    close(logits(gauged, inputs), want)
    one = Arrow(PooledModel(make_tiny_llama().double(), lambda name: flipped(name, 2.0)), pool, ["rs"])
    alone = merged(make_tiny_llama().double(), (2.0, pool.load("rs")))
    with torch.no_grad():
        close(logits(one, inputs), alone(inputs).logits)


def test_a_replaced_adapter_is_noticed(pool, tmp_path):
    router = Arrow(model_of(pool), pool, NAMES)
    inputs = ids()
    before, old = logits(router, inputs), router.prototypes[UP].clone()
    assert torch.equal(logits(router, inputs), before)
    base = pool.base_model
    pool.remove("plain")
    pool.add(save_lora(tmp_path / "new", base, 77), "plain")
    after = logits(router, inputs)
    assert not torch.allclose(after, before, atol=1e-4)
    assert not torch.allclose(router.prototypes[UP][0].abs(), old[0].abs(), atol=1e-3)
    assert torch.equal(router.prototypes[UP][1:], old[1:])
    close(after, logits(Arrow(model_of(pool), pool, NAMES), inputs))


def test_a_changed_scaling_is_noticed(pool, tmp_path):
    router, inputs = Arrow(model_of(pool), pool, NAMES), ids()
    router.save(tmp_path / "routing")
    before = logits(router, inputs)
    add_again(pool, "plain", tmp_path / "stronger", lora_alpha=80)
    after = logits(router, inputs)
    assert (after - before).abs().max() > 1e-3
    close(after, logits(Arrow(model_of(pool), pool, NAMES), inputs))
    with pytest.raises(HeadwaterError, match=r"'plain' is not the one .*: lora_alpha was 8 and is 80 now"):
        Arrow.load(tmp_path / "routing", pool, model_of(pool))


def test_refreshing_by_hand(pool):
    shift = [1]

    def load(name):
        layers = pool.load(name).layers
        return Adapter(name, {k: LowRank(f.A.roll(shift[0], 1), f.B, f.scaling) for k, f in layers.items()})

    router = Arrow(PooledModel(make_tiny_llama().double(), load), pool, NAMES)
    before = router.prototypes[UP].clone()
    shift[0] = 2
    logits(router, ids())
    assert torch.equal(router.prototypes[UP], before)
    router.refresh()
    close(router.prototypes[UP].abs(), before.roll(1, 1).abs(), 1e-4)


def test_cached_decoding_and_bfloat16(pool):
    router = Arrow(model_of(pool, torch.float32), pool, NAMES, ArrowSpec(2))
    inputs = ids(2, 5)
    with router.on():
        cached = router.pooled.model.generate(inputs, max_new_tokens=6, do_sample=False)
        whole = router.pooled.model.generate(inputs, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, whole)
    half = Arrow(model_of(pool, torch.bfloat16), pool, NAMES, ArrowSpec(1))
    exact = Arrow(model_of(pool, torch.float32), pool, NAMES, ArrowSpec(1))
    layer = "model.layers.0.self_attn.q_proj"  # both see the same tokens there
    chosen = [observed(router, ids(4, 20))[layer][1].argmax(-1) for router in (half, exact)]
    assert (chosen[0] == chosen[1]).float().mean() > 0.95


def test_saved_and_loaded_exactly(pool, tmp_path):
    router, inputs = Arrow(model_of(pool), pool, NAMES, ArrowSpec(2, 0.7, "unit")), ids()
    router.save(str(tmp_path / "routing"), note="x")  # a text will do
    again = Arrow.load(str(tmp_path / "routing"), AdapterPool(pool.path), model_of(pool))
    assert again.spec == router.spec
    assert torch.equal(logits(again, inputs), logits(router, inputs))
    assert json.loads((tmp_path / "routing" / "arrow.json").read_text())["note"] == "x"
    pool.remove("plain")
    with pytest.raises(HeadwaterError, match="no adapter 'plain'"):
        Arrow.load(tmp_path / "routing", pool, model_of(pool))


def test_settings_that_are_refused(pool):
    assert ArrowSpec() == ArrowSpec(3, 1.0, "none", "output")  # PEFT's
    with pytest.raises(HeadwaterError) as caught:
        ArrowSpec(0, 0.0, "l2", "outputs", "weights")
    assert [problem.where for problem in caught.value.problems] == [
        "top_k",
        "temperature",
        "input_norm",
        "combine",
        "subtract",
    ]
    with pytest.raises(HeadwaterError, match="no adapters"):
        Arrow(model_of(pool), pool, [])
    with pytest.raises(HeadwaterError, match="temperature: it is inf"):
        ArrowSpec(temperature=float("inf"))  # which JSON could not keep
    for names, general in ((["plain", "plain"], []), (["plain"], ["rs", "rs"])):
        with pytest.raises(HeadwaterError, match=r"the adapters are (plain, plain|rs, rs)\n.*name each once"):
            Arrow(model_of(pool), pool, names, general=general)


def test_damaged_files_are_named(pool, tmp_path):
    """Settings and prototypes as no routing has them, whoever made them so."""
    folder = tmp_path / "routing"
    for field, value, message in (
        ("temperature", "x", "temperature: it is x, and should be a finite number above 0"),
        ("temperature", None, "temperature: it is None"),
        ("top_k", 1.5, "top_k: it is 1.5, and should be a whole number"),
    ):
        Arrow(model_of(pool), pool, NAMES[:3]).save(folder)
        file = folder / "arrow.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
        with pytest.raises(HeadwaterError, match=message):
            Arrow.load(folder, pool, model_of(pool))
    for damage in (
        lambda rows: rows[:-1],
        lambda rows: rows[:, :-1],
        lambda rows: rows * math.nan,
    ):
        arrow = Arrow(model_of(pool), pool, NAMES[:3])
        arrow.prototypes[UP] = damage(arrow.prototypes[UP])
        arrow.save(folder)
        with pytest.raises(HeadwaterError, match=f"{folder}: the prototypes at {UP} do not fit these adapters"):
            Arrow.load(folder, pool, model_of(pool))
    arrow = Arrow(model_of(pool), pool, NAMES[:3])
    arrow.prototypes["model.layers.7.mlp.up_proj"] = arrow.prototypes.pop(UP)
    arrow.save(folder)
    with pytest.raises(HeadwaterError, match=r"the prototypes at model\.layers\.7\.mlp\.up_proj do not fit"):
        Arrow.load(folder, pool, model_of(pool))
