"""Arrow that mixes factors, and that takes general knowledge off first (GenKnowSub): equations, PEFT's Arrow, files."""

from __future__ import annotations

import hashlib
import warnings

import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from pool_support import MLP, make_pool, merged, save_lora
from test_arrow import UP, check_layers, close, double, ids, logits, model_of
from tiny_models import make_tiny_llama

from headwater.compose import Adapter, AdapterPool, LowRank, PooledModel
from headwater.compose.arrow import Arrow, ArrowSpec
from headwater.compose.merge import fuse
from headwater.errors import HeadwaterError

NAMES = ["a", "b", "c"]
GENERAL = ["g", "h"]
EVEN = {"r": 4, "lora_alpha": 8, "target_modules": MLP}
OTHER = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]}  # another rank, scaling and place


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    plans = dict.fromkeys((*NAMES, *GENERAL), EVEN)
    plans |= {"b": {**EVEN, "lora_alpha": 3}, "rs": {**EVEN, "use_rslora": True}, "other": OTHER}
    return make_pool(tmp_path_factory.mktemp("pool"), plans)


def residual(pool, name, general, subtract, layer):
    """(A, B, s) of an adapter less the general ones' mean at a layer; None where neither has it."""
    own, others = pool.load(name).layers.get(layer), [pool.load(g).layers.get(layer) for g in general]
    if subtract == "factors":
        A, B = own.A.double(), own.B.double()
        for g in others:
            A, B = A - g.A.double() / len(others), B - g.B.double() / len(others)
        return A, B, own.scaling
    sizes = pool.fingerprint.layers[layer]
    W = torch.zeros(sizes[1], sizes[0]).double()
    for weight, factors in [(1.0, own), *((-1 / len(others), g) for g in others)]:
        if factors is not None:
            A, B, s = double(factors)
            for rank in range(factors.rank):
                W += weight * s * torch.outer(B[:, rank], A[rank])
    return W, torch.eye(sizes[1]).double(), 1.0


@pytest.mark.parametrize("k", [1, 2, 9])
def test_factors_are_mixed_token_by_token(pool, k):
    router = Arrow(model_of(pool), pool, NAMES, ArrowSpec(k, 0.5, combine="factors"))

    def held(layer):
        return {name: double(pool.load(name).layers[layer]) for name in NAMES}

    assert len(check_layers(router, held, NAMES)) == 4


@pytest.mark.parametrize(
    ("general", "spec"),
    [
        (["g"], ArrowSpec(2, 0.5)),
        (["other", "b"], ArrowSpec(3, 2.0)),
        (GENERAL, ArrowSpec(2, 0.5, subtract="factors")),
        (GENERAL, ArrowSpec(2, 0.5, combine="factors", subtract="factors")),
    ],
    ids=["updates", "updates of other ranks and layers", "factors", "factors, mixed too"],
)
def test_general_knowledge_is_taken_off_before_routing(pool, general, spec):
    names = ["a", "c"]
    router = Arrow(model_of(pool), pool, names, spec, general)

    def held(layer):
        return {name: residual(pool, name, general, spec.subtract, layer) for name in names}

    assert len(check_layers(router, held, names)) == (6 if "other" in general else 4)


def test_mixing_factors_of_one_adapter_of_twins_and_at_high_temperature(pool):
    inputs, spec = ids(), ArrowSpec(9, 1e7, combine="factors")
    twin = pool.load("b")
    twins = PooledModel(make_tiny_llama().double(), lambda name: Adapter(name, twin.layers))
    average = fuse([pool.load(name) for name in NAMES], [1 / 3] * 3)
    with torch.no_grad():
        alone = merged(make_tiny_llama().double(), (1.0, twin))(inputs).logits
        close(logits(Arrow(model_of(pool), pool, ["b"], spec), inputs), alone)
        close(logits(Arrow(twins, pool, NAMES, ArrowSpec(2, 0.5, combine="factors")), inputs), alone)
        want = merged(make_tiny_llama().double(), (1.0, average))(inputs).logits
        close(logits(Arrow(model_of(pool), pool, NAMES, spec), inputs), want)
    outputs = logits(Arrow(model_of(pool), pool, NAMES, ArrowSpec(9, 1e7)), inputs)
    assert (outputs - want).abs().max() > 1e-2  # the cross terms


def test_an_adapter_less_itself_is_nothing(pool):
    twin = pool.load("a")
    twins = PooledModel(make_tiny_llama().double(), lambda name: Adapter(name, twin.layers))
    inputs = ids()
    with torch.no_grad():
        base = make_tiny_llama().double()(inputs).logits
    for subtract in ("updates", "factors"):
        close(logits(Arrow(twins, pool, NAMES, ArrowSpec(2, subtract=subtract), GENERAL), inputs), base)


def refactored(pool, names):
    """The pool's adapters, those in `names` as (B R) (R^-1 A), which are the same updates."""

    def load(name):
        layers = {}
        for seed, (layer, f) in enumerate(pool.load(name).layers.items()):
            A, B, s = double(f)
            if name in names:
                R = torch.randn(f.rank, f.rank, generator=torch.Generator().manual_seed(seed)).double()
                R += 4 * torch.eye(f.rank)
                A, B = torch.linalg.inv(R) @ A, B @ R
            layers[layer] = LowRank(A, B, s)
        return Adapter(name, layers)

    return PooledModel(make_tiny_llama().double(), load)


def test_only_updates_do_not_depend_on_how_an_adapter_is_written(pool):
    inputs = ids()
    for fields, same in (({}, True), ({"subtract": "factors"}, False), ({"combine": "factors"}, False)):
        spec, names = ArrowSpec(2, **fields), ["a", "c"]
        want = logits(Arrow(model_of(pool), pool, names, spec, GENERAL), inputs)
        found = logits(Arrow(refactored(pool, {"c", "h"}), pool, names, spec, GENERAL), inputs)
        assert ((found - want).abs().max() < 1e-5) == same, fields


@pytest.mark.parametrize("general", [[], GENERAL], ids=["", "GenKnowSub"])
def test_peft_s_arrow_gives_the_same_with_its_prototypes(pool, general):
    """PEFT's directions are approximate; routed by them, ours mixes the same outputs."""
    names = ["a", "c"] if general else NAMES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own unused weights
        theirs = create_arrow_model(
            make_tiny_llama(),
            [str(pool.folder(name)) for name in names],
            ArrowConfig(top_k=2, router_temperature=0.5, use_gks=bool(general), rng_seed=0),
            general_adapter_paths=[str(pool.folder(name)) for name in general],
        ).eval()
    inputs = ids()
    with torch.no_grad():
        want = theirs(inputs).logits
    router = Arrow(model_of(pool, torch.float32), pool, names, ArrowSpec(2, 0.5, subtract="factors"), general)
    found = {
        name.removeprefix("base_model.model.").split(".lora_arrow")[0]: module.prototypes
        for name, module in theirs.named_modules()
        if hasattr(module, "prototypes")
    }
    assert found.keys() == router.prototypes.keys()
    router._build(found)
    close(logits(router, inputs), want, 1e-5)
    assert (want - make_tiny_llama()(inputs).logits).abs().max() > 1e-2


@pytest.mark.parametrize("fields", [{"combine": "factors"}, {"combine": "factors", "subtract": "factors"}, {}])
def test_saved_loaded_and_refreshed_it_is_subtracted_once(pool, tmp_path, fields):
    def digest():
        return {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in pool.path.rglob("*") if f.is_file()}

    before, inputs = digest(), ids()
    router = Arrow(model_of(pool), pool, ["a", "c"], ArrowSpec(2, 0.7, **fields), GENERAL)
    want = logits(router, inputs)
    router.refresh()
    assert torch.equal(logits(router, inputs), want)
    for turn in ("first", "second"):
        router.save(tmp_path / turn)
        router = Arrow.load(tmp_path / turn, AdapterPool(pool.path), model_of(pool))
        assert (router.names, router.general) == (("a", "c"), tuple(GENERAL))
        assert torch.equal(logits(router, inputs), want)
    router.refresh()
    assert torch.equal(logits(router, inputs), want)
    assert digest() == before


def test_a_general_adapter_that_is_replaced_is_noticed(tmp_path):
    pool = make_pool(tmp_path, dict.fromkeys(("a", "b", "g"), EVEN))
    router, inputs = Arrow(model_of(pool), pool, None, general=["g"]), ids()
    assert router.names == ("a", "b")
    router.save(tmp_path / "routing")
    before = logits(router, inputs)
    pool.remove("g")
    pool.add(save_lora(tmp_path / "new", pool.base_model, 77), "g")
    after = logits(router, inputs)
    assert (after - before).abs().max() > 1e-3
    close(after, logits(Arrow(model_of(pool), pool, general=["g"]), inputs))
    with pytest.raises(HeadwaterError, match="'g' is not the one that this was fitted on: it has other weights"):
        Arrow.load(tmp_path / "routing", pool, model_of(pool))


@pytest.mark.parametrize("general", [[], GENERAL])
def test_cached_decoding_and_beams(pool, general):
    spec = ArrowSpec(2, combine="factors")
    router = Arrow(model_of(pool, torch.float32), pool, ["a", "c"], spec, general)
    inputs = ids(2, 5)
    with router.on():
        for beams in (1, 2):
            cached, whole = (
                router.pooled.model.generate(
                    inputs, max_new_tokens=6, do_sample=False, num_beams=beams, use_cache=use_cache
                )
                for use_cache in (True, False)
            )
            assert torch.equal(cached, whole)


def test_bfloat16(pool):
    spec, inputs = ArrowSpec(9, 4.0, combine="factors"), ids(2, 8)
    exact, half = (
        logits(Arrow(model_of(pool, dtype), pool, ["a", "c"], spec, GENERAL), inputs)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_what_cannot_be_mixed_or_subtracted_is_refused(pool):
    for names, general, fields, message in (
        (["a", "other"], (), {"combine": "factors"}, "different ranks .*\n.*combine outputs instead"),
        (["a"], ["other"], {"subtract": "factors"}, "other layers than a.*\n.*subtract updates instead"),
        (["a", "b"], ["g"], {"subtract": "factors"}, "b: its scaling is 0.75, and a's 2"),
        (["a", "rs"], ["g"], {"subtract": "factors"}, "rs: its scaling is 4, and a's 2"),
        (["a", "g"], ["g"], {}, "general: g would be taken off itself"),
        (None, pool.names, {}, "no adapters to route among"),
        (["a"], ["nobody"], {}, "no adapter 'nobody'"),
    ):
        with pytest.raises(HeadwaterError, match=message):
            Arrow(model_of(pool), pool, names, ArrowSpec(2, **fields), general)
    assert UP in Arrow(model_of(pool), pool, ["a", "b"], ArrowSpec(combine="factors")).prototypes
