"""Mixed batches against the plain reading: every row alone, on a model whose weights had its updates merged in."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pool_support import PLANS, make_pool, merged
from tiny_models import make_tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from tuner.test_merge import tiny_gpt2

from headwater.compose import Adapter, PooledModel
from headwater.compose.adapter import read_adapter, write_adapter
from headwater.compose.base import BaseFingerprint
from headwater.compose.merge import concat, fuse, linear
from headwater.errors import HeadwaterError

MIXTURES = [{"plain": 1.0}, {"rs": 0.5, "patterns": 0.25}, {}, {"plain": -0.3, "rs": 1.2, "patterns": 0.7}]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture
def pooled(pool):
    return PooledModel(make_tiny_llama().double(), pool.load)


def ids(rows: int, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(pooled, mixtures, inputs, **options) -> torch.Tensor:
    with torch.no_grad(), pooled.rows(mixtures, **options):
        return pooled.model(inputs).logits


def alone(pool, mixture, row) -> torch.Tensor:
    model = merged(make_tiny_llama().double(), *((w, pool.load(name)) for name, w in mixture.items()))
    with torch.no_grad():
        return model(row[None]).logits[0]


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_every_row_is_what_it_would_be_alone(pool, pooled):
    inputs = ids(4)
    together = logits(pooled, MIXTURES, inputs)
    for row, mixture in enumerate(MIXTURES):
        close(together[row], alone(pool, mixture, inputs[row]))
    assert not torch.allclose(together[0], logits(pooled, [{}] * 4, inputs)[0], atol=1e-3)


def test_one_adapter_is_what_stock_peft_makes_of_it(pool):
    inputs = ids(4)
    together = logits(PooledModel(make_tiny_llama(), pool.load), [{name: 1.0} for name in PLANS], inputs)
    for row, name in enumerate(PLANS):
        stock = PeftModel.from_pretrained(make_tiny_llama(), pool.folder(name)).eval()
        with torch.no_grad():
            close(together[row], stock(inputs[row : row + 1]).logits[0], 1e-4)


def test_rows_without_adapters_are_the_base_model_bit_for_bit(pooled):
    inputs = ids(4)
    with torch.no_grad():
        base = make_tiny_llama().double()(inputs).logits
        assert torch.equal(pooled.model(inputs).logits, base)
    together = logits(pooled, MIXTURES, inputs)
    assert torch.equal(together[2], base[2])
    pooled.close()
    with torch.no_grad():
        assert torch.equal(pooled.model(inputs).logits, base)
    assert not any(module._forward_hooks for module in pooled.model.modules() if isinstance(module, torch.nn.Linear))


def test_a_layer_is_linear_in_the_weights(pool, pooled):
    name = "model.layers.0.mlp.up_proj"  # the first adapted layer: what it reads does not depend on the weights
    inputs, seen = ids(2), []
    names = list(PLANS)

    def output(weights):
        handle = pooled.model.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y))
        logits(pooled, [dict(zip(names, row, strict=True)) for row in weights.tolist()], inputs)
        handle.remove()
        return seen.pop()

    pooled.adapter("plain")
    M1, M2 = (torch.randn(2, 4, generator=torch.Generator().manual_seed(s)).double() for s in (1, 2))
    only_mlp = {"plain", "twin"}  # the others change q or v before it
    for column, adapter in enumerate(names):
        if adapter not in only_mlp:
            M1[:, column] = M2[:, column] = 0
    base = output(torch.zeros(2, 4))
    mixed = output(0.5 * M1 - 2 * M2) - base
    close(mixed, 0.5 * (output(M1) - base) - 2 * (output(M2) - base))
    assert mixed.abs().max() > 1e-3


def test_order_of_rows_and_names_does_not_matter(pooled):
    inputs, turn = ids(4), [2, 0, 3, 1]
    together = logits(pooled, MIXTURES, inputs)
    backwards = [dict(reversed(MIXTURES[i].items())) for i in turn]
    close(logits(pooled, backwards, inputs[turn]), together[turn])


def test_alpha_of_one_adapter_scales_its_own_update_only(pool):
    def load(name):
        adapter = pool.load(name)
        if name != "plain":
            return adapter
        layers = {k: dataclasses.replace(f, scaling=2 * f.scaling) for k, f in adapter.layers.items()}
        return Adapter(name, layers)

    inputs, mixtures = ids(2), [{"plain": 0.5, "rs": 0.5}, {"rs": 1.0}]
    model = make_tiny_llama().double()
    doubled = logits(PooledModel(model, load), mixtures, inputs)
    normal = logits(
        PooledModel(make_tiny_llama().double(), pool.load), [{"plain": 1.0, "rs": 0.5}, mixtures[1]], inputs
    )
    close(doubled, normal)


def test_twins_mix_and_fuse_to_themselves(pool):
    twin = pool.load("plain")
    pooled = PooledModel(make_tiny_llama().double(), lambda name: Adapter(name, twin.layers))
    inputs = ids(1)
    single = logits(pooled, [{"a": 1.0}], inputs)
    row = [{"a": 0.2, "b": 0.5, "c": 0.3}]
    close(logits(pooled, row, inputs), single)
    close(logits(pooled, row, inputs, fused=True), single)


def test_fusion_averages_the_factors(pool, pooled):
    inputs, row = ids(3), {"plain": 0.5, "twin": 0.5}
    together = logits(pooled, [row, {"plain": 1.0}, {}], inputs, fused=True)
    model = make_tiny_llama().double()
    a, b = (pool.load(name).layers for name in row)
    with torch.no_grad():
        for layer in a:
            A = 0.5 * a[layer].A.double() + 0.5 * b[layer].A.double()
            B = 0.5 * a[layer].B.double() + 0.5 * b[layer].B.double()
            model.get_submodule(layer).weight += 2.0 * B @ A  # both scale by 8 / 4
        close(together[0], model(inputs[:1]).logits[0])
    close(together[1], alone(pool, {"plain": 1.0}, inputs[1]))
    assert (together[0] - logits(pooled, [row, {}, {}], inputs)[0]).abs().max() > 1e-3  # cross terms
    with pytest.raises(HeadwaterError, match="different ranks"), pooled.rows([{"plain": 0.5, "rs": 0.5}], fused=True):
        pass


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_neither_operations_nor_tensors_grow_with_the_number_of_adapters(pool):
    twin = pool.load("plain")
    seen = {}
    for count in (2, 8):
        pooled = PooledModel(make_tiny_llama(), lambda name: Adapter(name, twin.layers))
        rows = [{f"a{i % count}": 1.0} for i in range(8)]
        inputs = ids(8, 40)
        with torch.no_grad(), pooled.rows(rows):
            pooled.model(inputs)
            with _Watch() as seen[count]:
                pooled.model(inputs, logits_to_keep=1)
    assert seen[2].calls == seen[8].calls
    assert seen[8].largest == seen[2].largest
    assert seen[8].largest < 8 * 40 * 8 * 48  # batch x tokens x adapters x d_out


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"use_cache": False}],
    ids=["cache", "beams", "returned sequences", "no cache"],
)
def test_generation_gives_the_tokens_of_one_adapter_at_a_time(pool, options):
    pooled = PooledModel(make_tiny_llama(), pool.load)
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (5, 8, 6, 7)]
    rows = [{"plain": 1.0}, {"rs": 1.0}, {}, {"patterns": 1.0}]
    width = max(map(len, prompts))
    batch = torch.tensor([[258] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings = {"max_new_tokens": 12, "do_sample": False, **options}
    with pooled.rows(rows):
        together = pooled.model.generate(batch, attention_mask=mask, **settings)
    returned = options.get("num_return_sequences", 1)
    new = []
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        model = make_tiny_llama()
        if row:
            model = PeftModel.from_pretrained(model, pool.folder(next(iter(row)))).eval()
        single = model.generate(input_ids=torch.tensor([prompt]), **settings)
        for k in range(returned):
            want = single[k, len(prompt) :].tolist()
            got = together[i * returned + k, width:].tolist()
            assert got[: len(want)] == want
            new.append(tuple(want))
    assert len(set(new)) > 2


def test_only_what_the_batch_uses_is_loaded_and_stacked(pool):
    loaded = []
    pooled = PooledModel(make_tiny_llama(), lambda name: loaded.append(name) or pool.load(name), keep=2)
    layer = "model.layers.0.mlp.up_proj"
    inputs = ids(1)
    logits(pooled, [{"plain": 1.0}], inputs)
    stack = pooled._row_stacks[layer]
    assert (loaded, stack.ranks) == (["plain"], 4)
    logits(pooled, [{"plain": 0.5}], inputs)
    logits(pooled, [{}], inputs)
    assert pooled._row_stacks[layer] is stack
    logits(pooled, [{"rs": 1.0}], inputs)
    assert (loaded, pooled._row_stacks[layer].ranks) == (["plain", "rs"], 2)
    logits(pooled, [{"patterns": 1.0}], inputs)
    logits(pooled, [{"plain": 1.0}], inputs)
    assert loaded == ["plain", "rs", "patterns", "plain"]  # two are kept


def test_a_stack_much_larger_than_the_batch_needs_is_given_up(pool, pooled):
    inputs, layer = ids(1), "model.layers.0.mlp.up_proj"
    logits(pooled, [dict.fromkeys(PLANS, 0.25)], inputs)
    assert pooled._row_stacks[layer].ranks == 4 + 2 + 3 + 4
    logits(pooled, [{"plain": 0.5, "rs": 0.5}], inputs)
    assert pooled._row_stacks[layer].ranks == 4 + 2 + 3 + 4
    logits(pooled, [{"plain": 1.0}], inputs)
    assert pooled._row_stacks[layer].ranks == 4


def test_wrong_rows_are_refused(pool, pooled):
    with pytest.raises(HeadwaterError, match="2 mixtures of adapters do not fit a batch of 3 rows"):
        logits(pooled, [{"plain": 1.0}, {}], ids(3))
    with pytest.raises(HeadwaterError, match="not finite numbers: plain: nan"), pooled.rows([{"plain": float("nan")}]):
        pass
    with pytest.raises(HeadwaterError, match="no adapter 'nobody'"), pooled.rows([{"nobody": 1.0}]):
        pass
    with pytest.raises(HeadwaterError, match="no rows"), pooled.rows([]):
        pass
    with pytest.raises(HeadwaterError, match="no linear layer"):
        pooled.place(
            Adapter("x", {"model.layers.9.mlp.up_proj": pool.load("plain").layers["model.layers.0.mlp.up_proj"]})
        )


@pytest.mark.parametrize(
    "mixtures",
    [["plain", "rs"], "plain", {"plain": 1.0}, [{"plain": 1.0}, None], [{"plain": "much"}]],
    ids=["names", "a name", "one mixture", "none", "a text as weight"],
)
def test_what_is_no_list_of_mixtures_is_refused(pooled, mixtures):
    message = r"is no list of mixtures|not finite numbers: plain: 'much'"
    with pytest.raises(HeadwaterError, match=message), pooled.rows(mixtures):
        pass


def test_more_rows_than_mixtures_are_refused_where_it_would_be_a_guess_whose_they_are(pooled):
    inputs, two = ids(4), [{"plain": 1.0}, {"rs": 1.0}]
    with pytest.raises(HeadwaterError, match="2 mixtures of adapters do not fit a batch of 4 rows"):
        logits(pooled, two, inputs)
    assert torch.equal(logits(pooled, two[:1], inputs), logits(pooled, two[:1] * 4, inputs))
    twice = [two[0], two[0], two[1], two[1]]
    with torch.no_grad(), pooled.rows(twice):
        cache = pooled.model(inputs[:, :-1]).past_key_values
        want = pooled.model(inputs[:, -1:], past_key_values=copy.deepcopy(cache)).logits
    with torch.no_grad(), pooled.rows(two):
        close(pooled.model(inputs[:, -1:], past_key_values=cache).logits, want)
        pooled.model.generate(ids(2), num_return_sequences=2, num_beams=2, use_cache=False, max_new_tokens=2)
        with pytest.raises(HeadwaterError, match="do not fit"):  # generation is over
            pooled.model(inputs)
    assert "generate" not in vars(pooled.model)


def test_bfloat16(pool):
    inputs = ids(4)
    exact = logits(PooledModel(make_tiny_llama(), pool.load), MIXTURES, inputs)
    half = logits(PooledModel(make_tiny_llama().bfloat16(), pool.load), MIXTURES, inputs)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_merging(pool, pooled):
    names, weights = ["plain", "twin"], [0.7, -0.4]
    adapters = [pool.load(name) for name in names]
    layer = "model.layers.0.mlp.down_proj"
    (A1, B1), (A2, B2) = ((a.layers[layer].A.double(), a.layers[layer].B.double()) for a in adapters)
    s = 2.0
    exact = 0.7 * s * B1 @ A1 - 0.4 * s * B2 @ A2
    close(concat(adapters, weights).layers[layer].delta().double(), exact, 1e-5)
    assert concat(adapters, weights).layers[layer].rank == 8
    factors = s * (0.7 * B1 - 0.4 * B2) @ (0.7 * A1 - 0.4 * A2)
    close(fuse(adapters, weights).layers[layer].delta().double(), factors, 1e-5)
    a, b = (0.7 * s) ** 0.5, (0.4 * s) ** 0.5
    close(linear(adapters, weights).layers[layer].delta().double(), (a * B1 + b * B2) @ (a * A1 - b * A2), 1e-5)
    with pytest.raises(HeadwaterError, match="2 adapters and 1 weights"):
        concat(adapters, [1.0])
    ragged = [pool.load("plain"), pool.load("rs"), pool.load("patterns")]
    merged_one = PooledModel(make_tiny_llama().double(), lambda name: concat(ragged, [0.2, 0.3, 0.5]))
    close(
        logits(merged_one, [{"x": 1.0}], ids(1)),
        logits(pooled, [{"plain": 0.2, "rs": 0.3, "patterns": 0.5}], ids(1)),
        1e-5,
    )


@pytest.mark.parametrize("how", ["cat", "linear"])
def test_peft_merges_to_the_same(pool, how):
    names, weights = ["plain", "twin"], [0.7, 0.4]
    model = PeftModel.from_pretrained(make_tiny_llama(), pool.folder("plain"), adapter_name="plain")
    model.load_adapter(pool.folder("twin"), "twin")
    model.add_weighted_adapter(names, weights, "both", combination_type=how)
    ours = {"cat": concat, "linear": linear}[how]([pool.load(name) for name in names], weights)
    for layer, factors in ours.layers.items():
        theirs = model.get_submodule(f"base_model.model.{layer}").get_delta_weight("both")
        close(factors.delta(), theirs, 1e-5)


# --- bases whose layers are no plain linear layers --------------------------------------------------------------------


@pytest.fixture(scope="module", params=["nf4", "int8", "Conv1D"])
def base(request, tmp_path_factory):
    """The kind, the model as it is stored, a factory of it as it runs, and layers of it to adapt."""
    if request.param == "Conv1D":
        return request.param, tiny_gpt2(), tiny_gpt2, ["c_attn", "c_fc", "c_proj"]
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("base")
    stored = make_tiny_llama(hidden_size=64, intermediate_size=128)  # whole blocks of 64, as four bits want them
    stored.save_pretrained(folder)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    settings = BitsAndBytesConfig(**(four if request.param == "nf4" else {"load_in_8bit": True}))

    def make():
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, device_map="cpu", dtype=torch.float32
        )
        for module in model.modules():  # its second CPU kernel multiplies in bfloat16
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    return request.param, stored, make, ["q_proj", "up_proj", "down_proj"]


def test_rows_on_quantised_and_transposed_layers_are_what_stock_peft_makes_of_them(base, tmp_path):
    kind, stored, make, targets = base
    fingerprint = BaseFingerprint.of(stored)
    adapters = {}
    for seed, name in enumerate(("a", "b")):
        config = LoraConfig(r=3 + seed, lora_alpha=5, target_modules=targets, fan_in_fan_out=kind == "Conv1D")
        model = get_peft_model(copy.deepcopy(stored), config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        model.save_pretrained(tmp_path / name)
        adapters[name] = read_adapter(tmp_path / name, name, fingerprint.layers)
    write_adapter(concat(list(adapters.values()), [0.7, -0.4]), tmp_path / "both", "base")
    pooled = PooledModel(make(), adapters.__getitem__)
    fingerprint.require(pooled.model)
    if kind != "Conv1D":
        assert not pooled.model.model.layers[0].mlp.up_proj.weight.is_floating_point(), "the base is not quantised"
    inputs = ids(4)
    with torch.no_grad():
        alone = make()(inputs).logits
        wanted = {n: PeftModel.from_pretrained(make(), tmp_path / n)(inputs).logits for n in ("a", "b", "both")}
    found = logits(pooled, [{"a": 1.0}, {"b": 1.0}, {"a": 0.7, "b": -0.4}, {}], inputs)
    for row, name in enumerate(("a", "b", "both")):
        assert (wanted[name][row] - alone[row]).abs().max() > 0.1
        close(found[row], wanted[name][row], 2e-4)
    close(found[3], alone[3], 2e-4)
    fused = logits(pooled, [{"a": 1.0}], inputs[:1], fused=True)
    close(fused[0], wanted["a"][0], 2e-4)
    with torch.no_grad():
        close(pooled.model(inputs).logits, alone, 2e-4)
