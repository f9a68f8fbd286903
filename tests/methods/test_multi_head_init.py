"""How R-LoRA and M-LoRA start (R-LoRA's property 3 and what hangs on it): sizes, clipping, noise, seeds."""

from __future__ import annotations

import re

import pytest
import torch
from adapted_linear import OneLinear, adapt, base_of, held, noise, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

from headwater import HeadwaterError, make_config
from headwater.analysis import heads

D_IN, D_OUT = 2048, 1500  # large, so that empirical sizes are within 3 % of the closed forms


def closed_form(init: str, r: int, N: int, gamma: float) -> tuple[float, list[float]]:
    """Standard deviations of A and of each head, from the papers' table and the released script."""
    if init == "paper":
        factor = D_OUT**0.25 / gamma**0.5
        return D_IN**-0.5 * factor, [D_OUT**-0.5 * factor] * N
    factor = r**0.25 / gamma**0.5
    A, B = max(r, D_IN) ** -0.5, max(r, D_OUT) ** -0.5
    if init == "official_intended":
        return A * factor, [B * factor] * N
    return A * factor**N, [B * factor ** (N - k) for k in range(N)]


@pytest.mark.parametrize("method", ["rlora", "mlora"])
@pytest.mark.parametrize(("r", "N", "gamma"), [(16, 3, 64.0), (12, 5, 16.0)])
@pytest.mark.parametrize("init", ["paper", "official_intended", "official_as_run"])
def test_property_3_sizes_at_the_start_are_the_closed_forms(method, init, r, N, gamma):
    model = adapt(method, D_IN, D_OUT, r=r, num_heads=N, gamma=gamma, init=init, dtype=torch.float32)
    h = held(model)
    std_A, std_B = closed_form(init, r, N, gamma)
    assert h.A.std().item() == pytest.approx(std_A, rel=0.03)
    assert [b.std().item() for b in h.B] == pytest.approx(std_B, rel=0.03)
    if init != "official_as_run":
        assert max(std_B) == min(std_B)

    for matrix in (h.A, *h.B):  # Gaussian: 68.3 % within one standard deviation (a uniform draw has 57.7 %)
        assert (matrix.abs() < matrix.std()).float().mean().item() == pytest.approx(0.683, abs=0.015)
    unit = torch.nn.functional.normalize(h.B.flatten(1), dim=-1)
    assert (unit @ unit.T - torch.eye(N)).abs().max() < 5 / unit.shape[1] ** 0.5  # independent heads

    assert torch.equal(h.A0, h.A)
    torch.testing.assert_close(h.B0, h.B.mean(0))


@pytest.mark.parametrize(("r", "alpha", "gamma"), [(16, 32.0, 64.0), (24, 8.0, 16.0)])
def test_property_3_one_heads_update_depends_on_neither_rank_nor_width(r, alpha, gamma):
    h = held(adapt("rlora", D_IN, D_OUT, r=r, num_heads=2, lora_alpha=alpha, gamma=gamma, head_dropout=0.0))
    for head in h.B:
        assert (h.scaling * head @ h.A).std().item() == pytest.approx(alpha / (gamma * D_IN**0.5), rel=0.03)


def test_property_3_as_run_has_the_unequal_heads_of_the_released_script():
    h = held(adapt("rlora", 896, 4864, r=4, num_heads=5, init="official_as_run", dtype=torch.float32))
    assert h.A.std().item() == pytest.approx(5.7e-6, rel=0.05)
    assert [b.std().item() for b in h.B] == pytest.approx([2.5e-6, 1.4e-5, 7.9e-5, 4.5e-4, 2.5e-3], rel=0.05)


@pytest.mark.parametrize("method", ["rlora", "mlora"])
def test_property_3_zeros_is_hydraloras_start(method):
    fields = {"router_init": "kaiming"} if method == "rlora" else {}
    model = adapt(method, D_IN, D_OUT, r=16, init="zeros", dtype=torch.float32, **fields)
    h = held(model)
    assert h.A0 is None
    assert h.B0 is None
    assert torch.count_nonzero(h.B) == 0
    for uniform in (h.A, *([h.router] if method == "rlora" else [])):  # U(-1/sqrt(d_in), 1/sqrt(d_in))
        assert uniform.abs().max() <= D_IN**-0.5
        assert uniform.std().item() == pytest.approx((3 * D_IN) ** -0.5, rel=0.03)


@pytest.mark.parametrize("compensation", ["buffer", "center"])
def test_property_3_router_starts_as_asked(compensation):
    zeros, kaiming = (
        held(adapt("rlora", D_IN, 8, r=2, num_heads=8, compensation=compensation, router_init=how)).router
        for how in ("zeros", "kaiming")
    )
    assert torch.count_nonzero(zeros) == 0
    assert kaiming.abs().max() <= D_IN**-0.5
    assert kaiming.std().item() == pytest.approx((3 * D_IN) ** -0.5, rel=0.03)


@settings(max_examples=20, deadline=None)
@given(
    method=st.sampled_from(["rlora", "mlora", "mlora sum"]),
    alpha=st.sampled_from([1.0, 16.0, 500.0]),
    compensation=st.sampled_from(["buffer", "center"]),
    seed=st.integers(0, 1000),
)
def test_norm_clip_keeps_the_starting_offset_below_the_largest_weight(method, alpha, compensation, seed):
    method, _, agg = method.partition(" ")
    fields = {"r": 3, "num_heads": 4, "lora_alpha": alpha, "head_dropout": 0.0, "init_seed": seed}
    fields |= {"head_agg": agg} if agg else {}
    free = adapt(method, 20, 30, **fields)
    clipped = adapt(method, 20, 30, **fields, compensation=compensation, init_norm_clip=True)
    largest = base_of(free).weight.abs().max()
    h = held(free)
    offset = (h.scaling * h.B0 @ h.A0).abs().max()
    c = min(1.0, (largest / offset).item())
    torch.testing.assert_close(held(clipped).A, h.A * c**0.5)
    if compensation == "buffer":
        torch.testing.assert_close(held(clipped).B, h.B * c**0.5)
        assert (held(clipped).scaling * held(clipped).B0 @ held(clipped).A0).abs().max() <= largest * (1 + 1e-5)
    assert (c < 1) == bool(offset > largest)
    x = noise(5, 20)
    torch.testing.assert_close(clipped(x), base_of(clipped)(x), rtol=0, atol=1e-5)


def test_norm_clip_without_a_usable_weight_is_refused():
    config = make_config("rlora", target_modules=["layer"], r=2, init_norm_clip=True, head_dropout=0.0)
    base = OneLinear(6, 8)
    torch.nn.init.zeros_(base.layer.weight)
    for unusable in (base, OneLinear(6, 8, device="meta")):
        with pytest.raises(HeadwaterError, match="init_norm_clip needs"):
            get_peft_model(unusable, config)


def test_a_clipped_adapter_is_loaded_on_a_base_whose_weights_are_not_at_hand(tmp_path):
    config = make_config("rlora", target_modules=["layer"], r=2, init_norm_clip=True, head_dropout=0.0)
    model = get_peft_model(OneLinear(6, 8), config)
    model.save_pretrained(tmp_path)
    quantised = OneLinear(6, 8)
    quantised.layer.weight = torch.nn.Parameter(torch.zeros(48, 1, dtype=torch.uint8), requires_grad=False)
    loaded = PeftModel.from_pretrained(quantised, tmp_path)
    for name, value in held_state(model).items():
        assert torch.equal(held_state(loaded)[name], value), name


def held_state(model):
    return model.base_model.model.layer.branch("default").state_dict()


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("rlora", {}),
        ("rlora", {"init": "official_intended", "gamma": 0.05}),
        ("rlora", {"compensation": "center"}),
        ("mlora", {}),
        ("mlora", {"head_agg": "sum"}),
        ("rlora", {"init_norm_clip": True, "head_dropout": 0.9}),
    ],
)
def test_the_noise_warning_states_the_noise_that_dropout_makes(method, fields):
    p, N = 0.3, 4
    fields = {"r": 6, "num_heads": N, "lora_alpha": 500.0, "head_dropout": p, "init_seed": 0, **fields}
    with pytest.warns(UserWarning, match="head dropout on heads of this starting size") as caught:
        model = get_peft_model(OneLinear(400, 300), make_config(method, target_modules=["layer"], **fields))
    said = float(re.search(r"(\d+)%", str(caught[0].message))[1]) / 100
    x = noise(3000, 400, dtype=torch.float32)
    base = base_of(model)
    with torch.no_grad():
        measured = (model.train()(x) - model.eval()(x)).std() / (base(x) - base.bias).std()
    assert said == pytest.approx(measured.item(), rel=0.1)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 16},
        {"lora_alpha": 500, "head_dropout": 0.0},
        {"lora_alpha": 500, "init": "zeros", "router_init": "kaiming"},
        {"lora_alpha": 500, "inference_mode": True},
    ],
)
def test_no_noise_warning_without_noise(fields, recwarn):
    get_peft_model(OneLinear(400, 300), make_config("rlora", target_modules=["layer"], **fields))
    assert not [w for w in recwarn if "dropout" in str(w.message)]


def test_one_warning_for_all_layers_names_the_worst(tiny_llama):
    """Noise goes with 1 / std(W): of three layers that are made quieter or louder the loudest is named."""
    base, quiet = tiny_llama(), {"model.layers.0.mlp.up_proj": 0.5, "model.layers.1.mlp.up_proj": 0.25}
    with torch.no_grad():
        for name, factor in quiet.items():
            base.get_submodule(name).weight *= factor
        base.get_submodule("model.layers.0.mlp.down_proj").weight *= 1e4  # far from loud
    with pytest.warns(UserWarning, match="starting size") as caught:
        get_peft_model(base, make_config("rlora", target_modules=["up_proj", "down_proj"], lora_alpha=200.0))
    (message,) = [str(w.message) for w in caught if "starting size" in str(w.message)]
    assert message.startswith("model.layers.1.mlp.up_proj: head dropout")
    assert "3 layers are above 50%" in message


def test_a_zero_base_weight_is_no_obstacle():
    base = OneLinear(6, 8)
    torch.nn.init.zeros_(base.layer.weight)
    model = get_peft_model(base, make_config("rlora", target_modules=["layer"], r=2))
    x = noise(3, 6, dtype=torch.float32)
    torch.testing.assert_close(model.eval()(x), base_of(model)(x), rtol=0, atol=1e-5)


METHODS = ["rlora", "mlora", "hydralora"]


def start(tiny_llama, method: str, targets: list[str], **fields) -> dict[str, torch.Tensor]:
    """Every trainable tensor at the start, by its full name."""
    config = make_config(method, target_modules=targets, r=4, **fields)
    model = get_peft_model(tiny_llama(), config)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_init_seed_gives_a_layer_the_same_start_whatever_else_is_targeted(tiny_llama, method):
    alone = start(tiny_llama, method, ["up_proj"], init_seed=7)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    together = start(tiny_llama, method, ["q_proj", "down_proj", "up_proj", "gate_proj"], init_seed=7)
    assert torch.equal(torch.get_rng_state(), state), "a seeded start must leave the global generator alone"
    assert alone
    assert len(together) == 4 * len(alone)
    assert all(torch.equal(together[name], tensor) for name, tensor in alone.items())


@pytest.mark.parametrize("method", METHODS)
def test_layers_of_one_seed_differ(tiny_llama, method):
    model = get_peft_model(tiny_llama(), make_config(method, target_modules=["gate_proj", "up_proj"], init_seed=7))
    starts = [h.A for h in heads(model).values()]
    assert len(starts) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


@pytest.mark.parametrize("method", METHODS)
def test_another_init_seed_gives_another_start(tiny_llama, method):
    first, second = (start(tiny_llama, method, ["up_proj"], init_seed=seed) for seed in (7, 8))
    assert all(not torch.equal(first[name], second[name]) for name in first if name.endswith(".A"))


@pytest.mark.parametrize("method", METHODS)
def test_without_init_seed_torchs_own_seed_rules(tiny_llama, method):
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(start(tiny_llama, method, ["up_proj", "down_proj"]))
    same, again, other = runs
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert all(not torch.equal(same[name], other[name]) for name in same if name.endswith(".A"))


def test_two_adapters_of_one_seed_start_alike():
    model = adapt("rlora", 6, 8, r=2, init_seed=3)
    model.add_adapter("second", make_config("rlora", target_modules=["layer"], r=2, init_seed=3))
    torch.testing.assert_close(heads(model, "second")["layer"].A.double(), held(model).A)
    assert parameters(model)
