"""LoRA-Flow: values and gradients against its equations in float64, its starts, training, files."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from pool_support import add_again, make_pool, merged
from tiny_models import make_tiny_llama

import headwater
from headwater.compose import Adapter, LowRank, PooledModel
from headwater.compose.flow import FlowGate, FlowSpec, train_gates
from headwater.compose.merge import concat
from headwater.data.encode import Encoded
from headwater.errors import HeadwaterError

NAMES = ["plain", "rs", "patterns"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture
def pooled(pool):
    return PooledModel(make_tiny_llama().double(), pool.load)


def drawn(gate, seed=0, size=0.5):
    """The gates with random weights and biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return gate


def ids(rows, length=6, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(gate, inputs, **options):
    with torch.no_grad(), gate.on():
        return gate.pooled.model(inputs, **options).logits


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


GATED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")  # of each layer, what NAMES adapt


def plainly(pool, names, W, b, tau, inputs, granularity="layer"):
    """The whole tiny Llama under LoRA-Flow, one row at a time, with one loop per token and adapter for the mixing.

    W, of each gate `(k, d)`, and b `(gates, k)` are float64 leaves; returns logits `(rows, length, vocabulary)`.
    """

    def weigh(gate, u_t):
        e = [torch.exp((W[gate][j] * u_t).sum() / tau) for j in range(len(names))]
        return [e_j / sum(e) + b[gate][j] for j, e_j in enumerate(e)]

    modules = [f"model.layers.{layer}.{module}" for layer in range(2) for module in GATED]
    model = make_tiny_llama().double()
    adapters = [pool.load(name).layers for name in names]
    rotary, layers = model.model.rotary_emb, model.model.layers

    def linear(name, module, u, w):
        rows = []
        for t in range(u.shape[0]):
            h = module.weight @ u[t]
            if name in modules:
                w_t = weigh(modules.index(name), u[t]) if granularity == "module" else w[t]
                for w_tj, layers_of in zip(w_t, adapters, strict=True):
                    if name in layers_of:
                        f = layers_of[name]
                        h = h + w_tj * f.scaling * (f.B.double() @ (f.A.double() @ u[t]))
            rows.append(h)
        return torch.stack(rows)

    out = []
    for row in inputs:
        x = model.model.embed_tokens(row)
        length = len(row)
        cos, sin = (part[0] for part in rotary(x[None], torch.arange(length)[None]))

        def turn(v, cos=cos, sin=sin):
            half = v.shape[-1] // 2
            return v * cos[:, None] + torch.cat([-v[..., half:], v[..., :half]], -1) * sin[:, None]

        embedded = x
        for number, layer in enumerate(layers):
            gate, seen = (0, embedded) if granularity == "step" else (number, x)
            w = None if granularity == "module" else [weigh(gate, seen[t]) for t in range(length)]
            at = f"model.layers.{number}"
            attention, mlp = layer.self_attn, layer.mlp
            normed = layer.input_layernorm(x)
            q, k, v = (
                linear(f"{at}.self_attn.{p}", getattr(attention, p), normed, w).view(length, -1, 8)
                for p in PROJECTIONS[:3]
            )
            q, k = turn(q), turn(k)
            heads = []
            for head in range(4):
                scores = q[:, head] @ k[:, head // 2].T / 8**0.5
                future = torch.ones(length, length).triu(1).bool()
                heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, head // 2])
            x = x + linear(f"{at}.self_attn.o_proj", attention.o_proj, torch.cat(heads, -1), w)
            normed = layer.post_attention_layernorm(x)
            gate, up = (linear(f"{at}.mlp.{p}", getattr(mlp, p), normed, w) for p in PROJECTIONS[4:6])
            x = x + linear(f"{at}.mlp.down_proj", mlp.down_proj, F.silu(gate) * up, w)
        out.append(model.lm_head(model.model.norm(x)))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("granularity", "widths"), [("layer", [32, 32]), ("step", [32]), ("module", 2 * [32, 32, 32, 48])]
)
def test_values_and_gradients_are_the_equations(pool, pooled, granularity, widths):
    gate = drawn(FlowGate(pooled, NAMES, None, temperature=0.3, granularity=granularity)).double()
    assert [tuple(weight.shape) for weight in gate.weight] == [(3, width) for width in widths]
    assert sum(p.numel() for p in gate.parameters()) == sum(3 * width + 3 for width in widths)
    inputs = ids(2)
    *W, b = (p.detach().clone().requires_grad_() for p in (*gate.weight, gate.bias))
    want = plainly(pool, NAMES, W, b, 0.3, inputs, granularity)
    with gate.on():
        got = pooled.model(inputs).logits
    close(got, want, 1e-6)  # the model takes softmax over attention scores in float32
    for result in (want, got):
        (result * torch.linspace(-1, 1, result.numel()).double().view_as(result)).sum().backward()
    close(gate.bias.grad, b.grad, 1e-5)
    for mine, plain in zip(gate.weight, W, strict=True):
        close(mine.grad, plain.grad, 1e-5)
        assert plain.grad.abs().max() > 1e-3


@pytest.mark.parametrize("granularity", ["layer", "step", "module"])
@pytest.mark.parametrize("start", NAMES)
def test_gates_start_at_the_named_adapter_exactly(pool, pooled, start, granularity):
    gate = FlowGate(pooled, NAMES, start, granularity=granularity)
    assert gate.bias.sum(1).abs().max() < 1e-6
    inputs = ids(2)
    model = merged(make_tiny_llama().double(), (1.0, pool.load(start)))
    with torch.no_grad():
        close(logits(gate, inputs), model(inputs).logits, 1e-6)


@pytest.mark.parametrize("k", range(1, 9))
def test_every_number_of_adapters_starts_with_exact_weights(pool, k):
    twin = pool.load("plain")
    pooled = PooledModel(make_tiny_llama(), lambda name: Adapter(name, twin.layers))
    gate, seen = FlowGate(pooled, [f"a{i}" for i in range(k)], "a0"), []
    with headwater.observe(pooled.model, lambda name, weights: seen.append(weights)):
        logits(gate, ids(1))
    want = torch.eye(k)[0].expand(1, 6, k)
    assert len(seen) == 4
    assert all(torch.equal(weights, want) for weights in seen)


def test_without_a_start_it_is_the_average_of_outputs(pool, pooled):
    average = concat([pool.load(name) for name in NAMES], [1 / 3] * 3)
    inputs = ids(2)
    with torch.no_grad():
        close(
            logits(FlowGate(pooled, NAMES, None), inputs),
            merged(make_tiny_llama().double(), (1.0, average))(inputs).logits,
            1e-5,
        )


def test_weights_sum_to_one_plus_the_bias_and_may_be_negative(pooled):
    gate, seen = drawn(FlowGate(pooled, NAMES, "rs"), size=1.5), {}
    with headwater.observe(pooled.model, seen.__setitem__):
        logits(gate, ids(2))
    for name, weights in seen.items():
        block = int(name.split(".")[2])
        close(weights.sum(-1), (1 + gate.bias[block].sum()).expand(2, 6).float(), 1e-5)
        assert torch.equal(weights, seen[f"model.layers.{block}.mlp.up_proj"])  # one gate per decoder layer
    assert min(weights.min() for weights in seen.values()) < 0


def test_the_bias_is_outside_the_softmax(pool, pooled):
    gate, inputs, layer = drawn(FlowGate(pooled, NAMES, None)), ids(1), "model.layers.0.self_attn.v_proj"
    seen = []
    logits(gate, inputs)
    pooled.model.get_submodule(layer).register_forward_hook(lambda m, a, y: seen.append(y))
    logits(gate, inputs)
    x = pooled.model.model.layers[0].input_layernorm(pooled.model.model.embed_tokens(inputs))
    with torch.no_grad():
        for weight in gate.weight:
            weight += torch.randn(1, 32)  # moves all logits of a token by the same amount
    logits(gate, inputs)
    close(seen[1], seen[0], 1e-5)
    with torch.no_grad():
        gate.bias += 0.25
    logits(gate, inputs)
    delta = sum(a.layers[layer].delta().double() for a in map(pool.load, NAMES) if layer in a.layers)
    close(seen[2] - seen[1], 0.25 * x @ delta.T, 1e-6)


def test_order_of_the_adapters_does_not_matter(pooled):
    gate, inputs, turn = drawn(FlowGate(pooled, NAMES, None)), ids(2), [2, 0, 1]
    other = FlowGate(pooled, [NAMES[i] for i in turn], None)
    with torch.no_grad():
        for theirs, mine in zip(other.weight, gate.weight, strict=True):
            theirs.copy_(mine[turn])
        other.bias.copy_(gate.bias[:, turn])
    close(logits(gate, inputs), logits(other, inputs))


@pytest.mark.parametrize("granularity", ["layer", "step", "module"])
def test_cached_decoding_and_padding_change_nothing(pool, granularity):
    pooled = PooledModel(make_tiny_llama(), pool.load)
    gate, inputs = drawn(FlowGate(pooled, NAMES, None, granularity=granularity)), ids(1, 9)
    whole = logits(gate, inputs)
    with torch.no_grad(), gate.on():
        past, steps = None, []
        for part in (inputs[:, :5], *inputs[:, 5:].split(1, 1)):
            out = pooled.model(part, past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
    close(torch.cat(steps, 1), whole, 1e-5)
    padded = torch.cat([torch.full((1, 4), 258), inputs], 1)
    mask = (torch.arange(13) >= 4).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    close(logits(gate, padded, attention_mask=mask, position_ids=positions)[:, 4:], whole, 1e-5)
    with gate.on():
        beams = pooled.model.generate(inputs, num_beams=2, max_new_tokens=5, do_sample=False)
        single = pooled.model.generate(inputs, max_new_tokens=5, do_sample=False, use_cache=False)
        cached = pooled.model.generate(inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(single, cached)
    assert beams.shape[0] == 1


def rows(count=12):
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        tokens = torch.randint(0, 256, (7,), generator=generator).tolist()
        made.append(Encoded([*tokens, 65], [-100] * 7 + [65], 0))
    return made


@pytest.mark.parametrize("granularity", ["layer", "step", "module"])
def test_training_changes_the_gates_and_nothing_else(pool, granularity):
    pooled = PooledModel(make_tiny_llama(), pool.load)
    before = {name: p.clone() for name, p in pooled.model.named_parameters()}
    kept = {name: pooled.adapter(name).layers["model.layers.0.mlp.up_proj"].A.clone() for name in NAMES}
    gate = FlowGate(pooled, NAMES, "plain", granularity=granularity)
    seen = []
    spec = FlowSpec(examples=8, epochs=6, learning_rate=0.05)
    losses = train_gates(gate, rows(), 258, spec, progress=lambda *call: seen.append(call))
    assert len(losses) == 12
    assert seen[-1] == (12, 12, losses[-1])
    assert losses[-1] < losses[0]
    assert all(weight.abs().min() > 0 for weight in gate.weight)
    assert all(torch.equal(p, before[name]) for name, p in pooled.model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in pooled.model.parameters())
    for name, A in kept.items():
        assert torch.equal(pooled.adapter(name).layers["model.layers.0.mlp.up_proj"].A, A)
    again = FlowGate(pooled, NAMES, "plain", granularity=granularity)
    assert train_gates(again, rows(), 258, spec) == losses
    with pytest.raises(HeadwaterError, match="no rows"):
        train_gates(again, [], 258, spec)


def test_the_first_loss_is_the_start_adapter_s(pool):
    gate = FlowGate(PooledModel(make_tiny_llama(), pool.load), NAMES, "rs")
    made = rows(4)
    first = train_gates(gate, made, 258, FlowSpec(epochs=1))[0]
    stock = PeftModel.from_pretrained(make_tiny_llama(), pool.folder("rs")).eval()
    with torch.no_grad():
        out = stock(torch.tensor([row.input_ids for row in made])).logits[:, -2]
    assert first == pytest.approx(F.cross_entropy(out, torch.full((4,), 65)).item(), rel=1e-5)


@pytest.mark.parametrize("granularity", ["layer", "step", "module"])
def test_saved_and_loaded_exactly(pool, pooled, tmp_path, granularity):
    gate, inputs = drawn(FlowGate(pooled, NAMES, "rs", temperature=1.1, granularity=granularity)), ids(2)
    gate.save(str(tmp_path / "gates"), pool, note="x")  # a text will do
    other = PooledModel(make_tiny_llama().double(), pool.load)
    again = FlowGate.load(str(tmp_path / "gates"), pool, other)
    assert torch.equal(logits(again, inputs), logits(gate, inputs))
    assert (again.names, again.start, again.granularity) == (tuple(NAMES), "rs", granularity)
    file = tmp_path / "gates" / "flow.json"
    written = json.loads(file.read_text())
    for change, message in (
        ({"adapters": dict(reversed(written["adapters"].items()))}, "tensors are of the adapters"),
        ({"adapters": {**written["adapters"], "rs": "0" * 64}}, "not the one that this was fitted on"),
        (
            {"adapters": {**written["adapters"], "twin": written["adapters"]["plain"]}},
            "tensors are of",
        ),
        ({"places": ["model.layers.1"]}, "do not fit"),
        ({"granularity": "step" if granularity == "layer" else "layer"}, "do not fit"),
        ({"kind": "arrow"}, "not version 2 of a flow file"),
        ({"schema": 1}, "not version 2 of a flow file\n.*fit it again with headwater pool flow"),
    ):
        file.write_text(json.dumps({**written, **change}))
        with pytest.raises(HeadwaterError, match=message):
            FlowGate.load(tmp_path / "gates", pool, other)
    file.write_text("{")
    with pytest.raises(HeadwaterError, match="not readable"):
        FlowGate.load(tmp_path / "gates", pool, other)
    file.write_text(json.dumps(written))
    (tmp_path / "gates" / "flow.safetensors").unlink()
    with pytest.raises(HeadwaterError, match=r"flow\.safetensors: not readable: No such file"):
        FlowGate.load(tmp_path / "gates", pool, other)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_alpha": 80}, "lora_alpha was 8 and is 80 now"),
        ({"use_rslora": True}, "use_rslora was False and is True now"),
        ({"alpha_pattern": {"up_proj": 80}}, r"alpha_pattern was \[\] and is \[\['up_proj', 80\]\] now"),
        ({"base_model_name_or_path": "elsewhere/base", "inference_mode": False, "lora_alpha": 8.0}, None),
    ],
)
def test_gates_go_with_the_adapters_scalings(tmp_path, changes, told):
    """Gates were fitted on updates of a certain strength. What else the config says does not matter."""
    pool = make_pool(tmp_path)
    model = PooledModel(make_tiny_llama(), pool.load)
    FlowGate(model, NAMES, "rs").save(tmp_path / "gates", pool)
    add_again(pool, "plain", tmp_path / "again", **changes)
    if told is None:
        assert FlowGate.load(tmp_path / "gates", pool, model).names == tuple(NAMES)
    else:
        with pytest.raises(HeadwaterError, match=f"'plain' is not the one that this was fitted on: {told}"):
            FlowGate.load(tmp_path / "gates", pool, model)


def test_what_is_refused(pooled):
    for names, start, message in (
        ([], None, "there are no adapters to mix"),
        (["rs", "rs"], None, "name each once"),
        (["rs"], "plain", "not among"),
    ):
        with pytest.raises(HeadwaterError, match=message):
            FlowGate(pooled, names, start)
    with pytest.raises(HeadwaterError, match="granularity: it is token, and should be layer, step or module"):
        FlowGate(pooled, ["rs"], None, granularity="token")


def test_a_layer_outside_the_decoder_layers_takes_a_gate_of_its_own_or_none(pool):
    head = {"lm_head": LowRank(torch.ones(2, 32), torch.ones(300, 2) * torch.linspace(-1, 1, 300)[:, None], 0.5)}
    outside = PooledModel(make_tiny_llama(), lambda name: Adapter(name, head))
    for granularity in ("layer", "step"):
        with pytest.raises(HeadwaterError, match=r"lm_head: this layer is in no decoder layer.*\n.*granularity module"):
            FlowGate(outside, ["x"], "x", granularity=granularity)
    gate, inputs = FlowGate(outside, ["x"], "x", granularity="module"), ids(1)
    with torch.no_grad():
        want = merged(make_tiny_llama(), (1.0, Adapter("x", head)))(inputs).logits
    close(logits(gate, inputs), want, 1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("examples", 0),
        ("epochs", -1),
        ("epochs", math.nan),
        ("batch_size", 0),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("seed", -1),
    ],
)
def test_numbers_that_no_training_could_go_by_are_refused(field, value):
    with pytest.raises(HeadwaterError, match=f"{field}: it is {value}, and should be"):
        FlowSpec(**{field: value})


def test_all_numbers_out_of_range_come_at_once():
    with pytest.raises(HeadwaterError) as caught:
        FlowSpec(examples=0, epochs=0, batch_size=-2)
    assert [problem.where for problem in caught.value.problems] == ["examples", "epochs", "batch_size"]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_no_softmax_has_is_refused(pool, temperature):
    pooled = PooledModel(make_tiny_llama(), pool.load)
    with pytest.raises(HeadwaterError, match="temperature: it is"):
        FlowGate(pooled, NAMES, None, temperature)
