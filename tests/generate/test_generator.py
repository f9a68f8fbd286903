"""Adapters as vectors, the generator's training, its file, and that the condition does the work."""

from __future__ import annotations

import importlib
import json
import math
import statistics

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_llama
from torch.optim.optimizer import register_optimizer_step_pre_hook

from headwater.errors import HeadwaterError
from headwater.generate import AdapterGenerator, Layout, fit, new_generator, read_adapter, write_adapter
from headwater.generate.cvae import cvae_loss
from headwater.generate.layout import Scale
from headwater.generate.spec import MetaSpec

LENGTH = 256


def save_lora(folder, *, seed: int = 0, r: int = 2, targets=("up_proj", "down_proj"), **fields):
    torch.manual_seed(seed)
    config = LoraConfig(r=r, lora_alpha=4, target_modules=list(targets), task_type="CAUSAL_LM", **fields)
    model = get_peft_model(make_tiny_llama(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(folder)
    return model


def toy_layout() -> Layout:
    config = {"peft_type": "LORA", "r": 2}
    return Layout(("a", "b", "c"), ((10, 10), (156,), ()), ("float32",) * 3, config)  # 257 numbers


def toy_weights(tasks: int = 3, n: int = 6, noise: float = 0.05) -> dict[str, torch.Tensor]:
    """Tasks whose adapters scatter a little around a random centre of their own."""
    draw = torch.Generator().manual_seed(5)
    return {
        f"task{t}": torch.randn(257, generator=draw) + noise * torch.randn(n, 257, generator=draw) for t in range(tasks)
    }


def toy_vectors(tasks: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(6)
    return {f"task{t}": torch.nn.functional.normalize(torch.randn(16, generator=draw), dim=0) for t in range(tasks)}


def trained(**fields) -> tuple[AdapterGenerator, dict[str, torch.Tensor]]:
    weights = toy_weights()
    settings = {"channels": (16, 32, 32, 16), "latent": 16, "steps": 250, "learning_rate": 3e-3, **fields}
    spec = MetaSpec(**settings)
    generator = new_generator(toy_layout(), weights, toy_vectors(), spec, seed=0)
    fit(generator, weights, spec, seed=0)
    return generator, weights


def distances(generator: AdapterGenerator, weights, *, seed=None) -> list[list[float]]:
    """[task generated for][task compared with], mean squared, in normalised weights."""
    return [
        [
            (generator.normalise(generator.for_task(t, seed=seed), t) - generator.normalise(weights[o].mean(0), t))
            .square()
            .mean()
            .item()
            for o in weights
        ]
        for t in weights
    ]


def test_normalised_and_flattened_adapters_come_back(tmp_path):
    save_lora(tmp_path / "a")
    layout, vector = read_adapter(tmp_path / "a")
    assert list(layout.names) == sorted(layout.names)
    vector[: layout.sizes[0]] = 3.0  # a constant tensor, as an untouched B is
    scale = Scale.of(layout, torch.stack([vector, vector]))
    back = scale.restore(layout, scale.normalise(layout, vector))
    torch.testing.assert_close(back, vector, rtol=0, atol=1e-6)
    assert torch.equal(layout.flatten(layout.unflatten(vector)), vector)
    parts = [part for part in scale.normalise(layout, vector).split(layout.sizes) if part.numel() > 1]
    for part in parts[1:]:
        assert part.mean().item() == pytest.approx(0, abs=1e-5)
        assert part.std(correction=1).item() == pytest.approx(1, abs=1e-5)


def test_a_written_adapter_is_the_read_one_and_loads_strictly(tmp_path):
    model = save_lora(tmp_path / "a", use_rslora=True)
    layout, vector = read_adapter(tmp_path / "a")
    write_adapter(tmp_path / "b", layout, vector)
    ids = torch.arange(12).view(1, -1)
    again = PeftModel.from_pretrained(make_tiny_llama(), str(tmp_path / "b"))
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 4, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_written_adapter_has_the_source_s_keys_shapes_and_dtypes(tmp_path, dtype):
    save_lora(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    source = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(source, file, metadata={"format": "pt"})
    layout, vector = read_adapter(tmp_path / "a")
    assert vector.dtype == torch.float32
    write_adapter(tmp_path / "b", layout, vector)
    written = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert written.keys() == source.keys()
    for name, tensor in source.items():
        assert written[name].dtype == dtype
        assert torch.equal(written[name], tensor)
    model = get_peft_model(make_tiny_llama(), LoraConfig(r=2, lora_alpha=4, target_modules=["up_proj", "down_proj"]))
    result = set_peft_model_state_dict(model, written)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]


@pytest.mark.parametrize("stats", ["per_task_mean", "pooled"])
@pytest.mark.parametrize("origin", ["mean", "none"])
def test_scales_and_origin_are_measured_as_they_say(stats, origin):
    layout, weights, vectors = toy_layout(), toy_weights(n=4, noise=0.5), toy_vectors()
    weights["task1"] = 3 * weights["task1"] + 1
    spec = MetaSpec(channels=(4, 4), latent=4, stats=stats, origin=origin)
    generator = new_generator(layout, weights, vectors, spec, seed=0)
    start = sum(w[i] for w in weights.values() for i in range(4)) / 12 if origin == "mean" else torch.zeros(257)
    torch.testing.assert_close(generator.origin, start)
    tasks = {}
    for name, w in weights.items():
        tasks[name] = []
        for part in torch.split(w - start, [100, 156, 1], dim=1):
            numbers = [[float(x) for x in row] for row in part]
            mean = sum(sum(row) / len(row) for row in numbers) / 4
            stds = [statistics.stdev(row) if len(row) > 1 else 0.0 for row in numbers]
            tasks[name].append((mean, sum(stds) / 4 or 1.0))
    average = [tuple(sum(tasks[t][i][k] for t in tasks) / 3 for k in (0, 1)) for i in range(3)]
    for name in weights:
        want = average if stats == "pooled" else tasks[name]
        scale = generator.scales[name]
        for i, (mean, std) in enumerate(want):
            assert (scale.mean[i].item(), scale.std[i].item()) == pytest.approx((mean, std), rel=1e-4, abs=1e-6)
        decoded = generator.cvae.eval().decode(torch.zeros(1, 4), generator.condition(vectors[name])[None])[0].detach()
        for made, by in ((generator.for_task(name), want), (generator.generate(vectors[name]), average)):
            parts = [d * std + mean for d, (mean, std) in zip(decoded.split([100, 156, 1]), by, strict=True)]
            torch.testing.assert_close(made, torch.cat(parts) + start, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"targets": ("up_proj",)}, r"down_proj\.lora_A.*missing here"),
        ({"r": 3}, r"down_proj\.lora_A\.weight is 3x48 here, 2x48"),
        ({"use_rslora": True}, "use_rslora is True here"),
    ],
)
def test_another_layout_is_refused_with_the_first_differing_key(tmp_path, other, named):
    save_lora(tmp_path / "a")
    save_lora(tmp_path / "b", **other)
    first, _ = read_adapter(tmp_path / "a")
    with pytest.raises(HeadwaterError, match=named):
        first.require_same(read_adapter(tmp_path / "b")[0], "b")


def test_the_condition_decides_what_is_written():
    """With a strong KL term and paired losses: own task near, others far, for z = 0 and for drawn z."""
    generator, weights = trained()
    for seed in (None, 1):
        found = distances(generator, weights, seed=seed)
        assert all(found[i][i] < 0.1 for i in range(3)), found
        assert all(found[i][j] > 1 for i in range(3) for j in range(3) if i != j), found
    a, b = generator.tasks["task0"], generator.tasks["task1"]
    swapped = generator.normalise(generator.generate(b, scale="task0"), "task0")
    other = generator.normalise(weights["task1"].mean(0), "task0")
    assert (swapped - other).square().mean() < 0.3 * (
        swapped - generator.normalise(weights["task0"].mean(0), "task0")
    ).square().mean()
    assert not torch.equal(a, b)


def test_a_weak_kl_term_lets_z_carry_the_task():
    found = distances(*trained(beta=1e-4), seed=3)
    assert sum(found[i][i] for i in range(3)) / 3 > 0.1, found


def test_a_condition_is_the_direction_from_the_tasks_centre_in_units_of_z():
    vectors = toy_vectors()
    spec = MetaSpec(channels=(4, 4), latent=4)
    generator = new_generator(toy_layout(), toy_weights(), vectors, spec, seed=0)
    new = torch.linspace(-1, 2, 16)
    for v in (*vectors.values(), new):
        gap = [float(v[i]) - sum(float(other[i]) for other in vectors.values()) / 3 for i in range(16)]
        length = sum(g**2 for g in gap) ** 0.5
        torch.testing.assert_close(generator.condition(v), torch.tensor([16**0.5 * g / length for g in gap]))


def test_shuffled_conditions_spoil_it():
    generator, weights = trained()
    names = list(weights)
    right = sum(distances(generator, weights)[i][i] for i in range(3))
    generator.tasks = dict(zip(names, [generator.tasks[n] for n in (*names[1:], names[0])], strict=True))
    assert sum(distances(generator, weights)[i][i] for i in range(3)) > 5 * right


def test_a_saved_generator_writes_the_same_adapters(tmp_path):
    generator, _ = trained(steps=3)
    generator.save(tmp_path / "g")
    again = AdapterGenerator.load(tmp_path / "g")
    for seed in (None, 4):
        assert torch.equal(again.for_task("task1", seed=seed), generator.for_task("task1", seed=seed))
    assert not torch.equal(generator.for_task("task1", seed=4), generator.for_task("task1", seed=5))
    new = torch.ones(16)
    assert torch.equal(again.generate(new), generator.generate(new))
    sizes = generator.sizes()
    on_disk = (tmp_path / "g" / "generator.safetensors").stat().st_size
    assert 0 <= on_disk - sizes["model"] - sizes["tasks"] - sizes["origin"] < 20_000  # the file's header


def test_a_damaged_generator_is_an_error(tmp_path):
    generator, _ = trained(steps=1)
    generator.save(tmp_path / "g")
    (tmp_path / "g" / "generator.safetensors").write_bytes(b"nothing")
    with pytest.raises(HeadwaterError, match="damaged"):
        AdapterGenerator.load(tmp_path / "g")
    with pytest.raises(HeadwaterError, match="generator's folder"):
        AdapterGenerator.load(tmp_path / "nowhere")


def test_training_goes_on_exactly_where_it_was_stopped(tmp_path):
    weights, spec = toy_weights(), MetaSpec(channels=(8, 8), latent=4, steps=9, save_steps=4, kl_warmup=5)

    def start() -> AdapterGenerator:
        return new_generator(toy_layout(), weights, toy_vectors(), spec, seed=2)

    whole = start()
    fit(whole, weights, spec, seed=2)

    class StopError(Exception):
        pass

    def stop(step: int, values: dict[str, float]) -> None:
        if step == 6:
            raise StopError

    with pytest.raises(StopError):
        fit(start(), weights, spec, seed=2, state=tmp_path / "state", report=stop)
    steps: list[int] = []
    resumed = start()
    fit(resumed, weights, spec, seed=2, state=tmp_path / "state", report=lambda step, _: steps.append(step))
    assert steps == [5, 6, 7, 8, 9]
    for name, tensor in whole.cvae.state_dict().items():
        assert torch.equal(tensor, resumed.cvae.state_dict()[name]), name
    with pytest.raises(HeadwaterError, match="beta differ"):
        fit(start(), weights, spec.model_copy(update={"beta": 0.5}), seed=2, state=tmp_path / "state")


def test_a_batch_has_as_many_adapters_of_each_task_each_with_its_own_condition(monkeypatch):
    weights, module, seen = toy_weights(), importlib.import_module("headwater.generate.fit"), []

    def loss(cvae, x, c, **options):
        seen.append((x, c))
        return cvae_loss(cvae, x, c, **options)

    monkeypatch.setattr(module, "cvae_loss", loss)
    spec = MetaSpec(channels=(8, 8), latent=4, steps=4, rows_per_task=2)
    generator = new_generator(toy_layout(), weights, toy_vectors(), spec, seed=2)
    fit(generator, weights, spec, seed=2)
    assert len(seen) == 4
    for x, c in seen:
        tasks = []
        for row, condition in zip(x, c, strict=True):
            (task,) = (t for t in weights if any(torch.equal(row, one) for one in generator.normalise(weights[t], t)))
            assert torch.equal(condition, generator.condition(generator.tasks[task]))
            tasks.append(task)
        assert sorted(tasks) == sorted(2 * list(weights))


@pytest.mark.parametrize(
    ("warmup", "shares"), [(0, [1.0] * 8), (1, [1.0] * 8), (4, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0])]
)
def test_the_rate_is_half_a_cosine_and_the_kl_term_warms_up(monkeypatch, warmup, shares):
    weights = toy_weights()
    spec = MetaSpec(channels=(8, 8), latent=4, steps=8, learning_rate=0.01, beta=0.02, kl_warmup=warmup)
    module, rates, betas = importlib.import_module("headwater.generate.fit"), [], []

    def loss(*args, beta, **options):
        betas.append(beta)
        return cvae_loss(*args, beta=beta, **options)

    monkeypatch.setattr(module, "cvae_loss", loss)
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        fit(new_generator(toy_layout(), weights, toy_vectors(), spec, seed=2), weights, spec, seed=2)
    finally:
        hook.remove()
    assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])
    assert betas == pytest.approx([0.02 * share for share in shares])
