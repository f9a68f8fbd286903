"""CoRA's properties that concern the adapter: its start, what it can reach, what is trained, its files."""

from __future__ import annotations

import pytest
import torch
from adapted_linear import OneLinear, adapt, base_of, leaf, move, noise, parameters
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_models import make_tiny_llama

from headwater import HeadwaterError, make_config
from headwater.compose.adapter import Adapter, LowRank
from headwater.compose.merge import fuse
from headwater.export.plain import as_plain_lora
from headwater.methods.files import write_tensors
from headwater.subspace import SubspaceSpec, extract
from headwater.tuner import MethodLayer

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
d_in, d_out, r = 5, 8, 3


@pytest.fixture
def basis(tmp_path):
    B = torch.linalg.qr(noise(d_out, 4)).Q.float()
    write_tensors({"layer": B}, tmp_path / "basis.safetensors", {})
    return B, str(tmp_path / "basis.safetensors")


def model_of(path, **fields):
    return adapt("cora", d_in, d_out, basis=path, r=r, lora_alpha=6, **fields)


@pytest.mark.parametrize("variant", ["frozen_b", "init_b"])
def test_fused_is_the_equation_and_properties_1_5_6(basis, variant):
    stored, path = basis
    model, x, weight = model_of(path, variant=variant), noise(4, d_in), noise(4, d_out, seed=1)
    assert torch.equal(model(x), base_of(model)(x))
    (model(x) * weight).sum().backward()
    p = parameters(model)
    assert p["A"].grad.any()
    assert set(p) == ({"A"} if variant == "frozen_b" else {"A", "B"})
    assert variant == "frozen_b" or not p["B"].grad.any()
    assert sum(t.numel() for t in p.values()) == r * d_in + (0 if variant == "frozen_b" else r * d_out)

    move(model, 2).zero_grad()
    own = {name: leaf(t) for name, t in p.items()}
    B = own.get("B", stored[:, :r].T.double())
    x_fused, x_plain = leaf(x), leaf(x)
    fused = model(x_fused)
    expected = torch.stack([base_of(model)(t) + 2.0 * (B.T @ (own["A"] @ t)) for t in x_plain])
    torch.testing.assert_close(fused, expected, **CLOSE)
    (fused * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, t in p.items():
        torch.testing.assert_close(t.grad, own[name].grad, **CLOSE)
    torch.testing.assert_close(x_fused.grad, x_plain.grad, **CLOSE)


def test_a_random_a_starts_as_lora_s(basis):
    A = parameters(adapt("cora", 2048, d_out, basis=basis[1], r=r, init_a="kaiming", dtype=torch.float32))["A"]
    assert A.abs().max() <= 2048**-0.5
    assert A.std().item() == pytest.approx((3 * 2048) ** -0.5, rel=0.03)


def test_properties_4_and_9_a_frozen_basis_rules_the_update(basis):
    stored, path = basis
    model, x = model_of(path), noise(16, d_in)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - noise(16, d_out, seed=3)).square().mean().backward()
        optimizer.step()
    branch = model.base_model.model.layer.branch("default")
    assert torch.equal(branch.B, stored[:, :r].T.double())
    B, delta = branch.B.T, branch.delta_weight()
    torch.testing.assert_close(B @ (B.T @ delta), delta, rtol=1e-5, atol=1e-6)
    assert delta.abs().max() > 0.01


def test_property_10_the_file_holds_the_basis(basis, tmp_path):
    _, path = basis
    model, x = move(model_of(path), 4), noise(3, d_in)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "basis.safetensors").unlink()
    saved = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert saved.basis is None
    assert len(saved.basis_sha256) == 64
    again = PeftModel.from_pretrained(OneLinear(d_in, d_out), tmp_path / "adapter").double()
    torch.testing.assert_close(again(x), model(x), rtol=1e-6, atol=1e-6)
    without_its_file = get_peft_model(OneLinear(d_in, d_out), saved)
    assert without_its_file(x.float()).isnan().all(), "an adapter without its B must not look as if it worked"


def test_property_8_adapters_of_one_basis_merge_by_averaging_a(basis):
    _, path = basis
    branches = [move(model_of(path), seed).base_model.model.layer.branch("default") for seed in (1, 2, 3)]
    expected = sum(w * branch.delta_weight() for w, branch in zip((0.2, 0.5, 0.3), branches, strict=True))
    with torch.no_grad():
        branches[0].A.copy_(sum(w * branch.A for w, branch in zip((0.2, 0.5, 0.3), branches, strict=True)))
    torch.testing.assert_close(branches[0].delta_weight(), expected, **CLOSE)


def test_property_8_pool_merges_fuse_is_that_average_where_weights_add_up_to_one(basis):
    _, path = basis
    models = [move(model_of(path), seed) for seed in (1, 2, 3)]
    plain = [Adapter(str(n), {"layer": LowRank(*as_plain_lora(m)["layer"], 1.0)}) for n, m in enumerate(models)]
    weights = (0.2, 0.5, 0.3)
    merged = fuse(plain, weights).layers["layer"]
    assert merged.rank == r
    expected = sum(w * adapter.layers["layer"].delta() for w, adapter in zip(weights, plain, strict=True))
    torch.testing.assert_close(merged.delta(), expected, rtol=1e-5, atol=1e-6)


def test_property_7_one_source_layer_by_layer_gives_the_weights_own_leading_directions(tmp_path):
    """B of each layer spans the r left singular vectors of W that have the largest singular values."""
    names = [f"model.layers.{n}.mlp.{p}_proj" for n in range(2) for p in ("gate", "down")]
    weights = {name: make_tiny_llama().get_submodule(name).weight.detach() for name in names}
    path = tmp_path / "basis.safetensors"
    write_tensors(extract([weights], SubspaceSpec(r=r, scope="layer_projection")), path, {})
    fields = {"r": r, "target_modules": ["gate_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(make_tiny_llama(), make_config("cora", basis=str(path), **fields))
    found = {m.name: m.branch("default").B for m in model.modules() if isinstance(m, MethodLayer)}
    assert sorted(found) == sorted(names)
    for name, B in found.items():
        U = torch.linalg.svd(weights[name].double()).U[:, :r]
        torch.testing.assert_close(B.double().T @ B.double(), U @ U.T, rtol=0, atol=1e-4)


def test_one_config_makes_several_adapters(basis):
    stored, path = basis
    model = model_of(path)
    model.add_adapter("second", model.peft_config["default"])
    branches = model.base_model.model.layer.branches
    assert torch.equal(branches["second"].B, stored[:, :r].T)


def test_a_basis_of_another_shape_is_refused(tmp_path):
    fields = {"r": 4, "target_modules": ["gate_proj"], "task_type": "CAUSAL_LM"}
    path = tmp_path / "basis.safetensors"

    def make(shape):
        write_tensors({f"model.layers.{n}.mlp.gate_proj": torch.zeros(shape) for n in range(2)}, path, {})
        return get_peft_model(make_tiny_llama(), make_config("cora", basis=str(path), **fields))

    make((48, 4))
    for shape in ((32, 4), (48, 3)):
        with pytest.raises(HeadwaterError, match=r"gate_proj needs a basis of 48 rows and at least 4 columns"):
            make(shape)
    with pytest.raises(HeadwaterError, match="the file has none for it"):
        get_peft_model(
            make_tiny_llama(), make_config("cora", basis=str(path), **{**fields, "target_modules": ["q_proj"]})
        )
    with pytest.raises(HeadwaterError, match="needs the common subspace"):
        make_config("cora")
